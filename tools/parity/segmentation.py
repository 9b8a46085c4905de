"""Segmentation: encoder and pyramid, heads and their losses, training steps, windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rcmae.data.batch import Batch
from rcmae.data.dense.crops import MAPS
from rcmae.data.dense.maps import NONE
from rcmae.engines.optim import param_groups, set_rates
from rcmae.engines.schedules import Shape, Warmup, learning_rate
from rcmae.engines.updates import clip
from rcmae.evaluation.dense.scores import confusion
from rcmae.evaluation.dense.windows import Canvas, predicted, probabilities, rows_resized, windows
from rcmae.models import kernels
from rcmae.models.segmentation.attention import relative_bias
from rcmae.models.segmentation.backbone import Form
from rcmae.models.segmentation.fitting import fit_encoder
from rcmae.models.segmentation.heads import resized
from rcmae.models.segmentation.segmenter import Heads, Keep, Segmenter
from rcmae.models.sizes import NetworkSizes
from rcmae.objectives.segmentation import SegmentationLoss, pixel_loss

from .fixture import EXACT, PRECISIONS, Fixture, Limit, Unusable
from .networks import gradients, image_size

Config = Mapping[str, Any]


def form_of(config: Config, state: Mapping[str, Tensor]) -> Form:
    """The encoder of a folder, by its settings and the names of its weights."""
    split = any(name.endswith("attn.q_bias") for name in state)
    return Form(
        levels=tuple(config["out_indices"]),
        relative_positions=bool(config.get("use_rel_pos_bias", True)),
        layer_scale=bool(config.get("init_values", 1)),
        qkv_bias="qv" if split else "qkv",
        drop_path=config.get("drop_path", config.get("drop_path_rate", 0.0)),
    )


def heads_of(config: Config) -> Heads:
    """The heads of a folder."""
    return Heads(
        config["num_classes"],
        width=config["channels"],
        auxiliary_width=config["aux_channels"],
        dropout=config.get("dropout_ratio", 0.0),
        scales=tuple(config["pool_scales"]),
    )


def segmenter(config: Config, state: Mapping[str, Tensor], dtype: torch.dtype) -> Segmenter:
    """The package's network of a folder's sizes; `state` tells how its weights are named."""
    for key, ours in (
        ("layer_norm_eps", kernels.LAYER_NORM_EPS),
        ("adam_eps", kernels.ADAM_EPS),
        ("batch_norm_eps", 1e-5),
        ("batch_norm_momentum", 0.1),
        ("ignore_index", NONE),
        ("align_corners", False),
        ("use_abs_pos_emb", True),
        ("aux_level", 2),
    ):
        if config.get(key, ours) != ours:
            raise Unusable(f"config.{key}={config[key]}: this package has {ours}")
    side = config["img_size"] if "img_size" in config else config["image_size"]
    sizes = NetworkSizes(
        image_size=image_size({"img_size": side}),
        patch_size=config["patch_size"],
        in_channels=config.get("in_chans", 3),
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config.get("mlp_ratio", 4),
    )
    heads = heads_of(config) if "num_classes" in config else Heads(2, width=4, auxiliary_width=4)
    return Segmenter(sizes, form_of(config, state), heads).to(dtype)


def load(fixture: Fixture, model: torch.nn.Module, name: str, state: dict[str, Tensor]) -> None:
    """Put the recorded weights into the model; each name of one must be in the other."""
    problem = ""
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        problem = str(error)
    fixture.true("weights load strictly", name, not problem, problem)


def batch_of(images: Tensor, maps: Tensor) -> Batch:
    """Images with maps as the stream gives them."""
    nothing = torch.empty(0)
    return Batch(
        images, torch.empty(len(images), 0), 0, None, (), nothing, nothing, extra={MAPS: maps}
    )


# ---------------------------------------------------------------------------------- the backbone


def seg_backbone(fixture: Fixture) -> None:
    """Weights of another grid, then maps, pyramid and gradients under both namings."""
    _check_index(fixture)
    for precision in PRECISIONS:
        _check_loading(fixture, precision)
        for file in fixture.files(r"model_.*\.safetensors"):
            naming = file.removeprefix("model_").removesuffix(".safetensors")
            _check_maps(fixture, naming, precision)


def _check_index(fixture: Fixture) -> None:
    """Which row of the table each pair of tokens takes."""
    wanted = fixture.arrays("index.safetensors")["relative_position_index"]
    grid = fixture.config["grid"]
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    count = (2 * rows - 1) * (2 * columns - 1) + 3
    numbers = torch.arange(count, dtype=torch.float64)[:, None]
    fixture.close(
        "relative positions", "index", relative_bias(numbers, (rows, columns))[0], wanted, EXACT
    )


def _check_loading(fixture: Fixture, precision: str) -> None:
    """A pretraining's weights go into the encoder: what matched, and the positions."""
    weights = fixture.arrays("checkpoint.safetensors")
    dtype = PRECISIONS[precision]
    model = segmenter(fixture.config, weights, dtype)
    fit = fit_encoder(model, {name: value.to(dtype) for name, value in weights.items()})
    index = ".relative_position_index"  # no table here: it follows from the grid
    missing = {name for name in fixture.value("not_in_checkpoint") if not name.endswith(index)}
    unexpected = set(fixture.value("left_in_checkpoint"))
    for what, got, want in (
        ("not in the checkpoint", set(fit.fresh), missing),
        ("left in the checkpoint", set(fit.unused), unexpected),
    ):
        told = f"{sorted(got ^ want)} are in one of both"
        fixture.true("what of the weights matched", what, got == want, told, precision)
    wanted = fixture.arrays("loaded.safetensors")
    fixture.all_close(
        "positions",
        model.backbone.state_dict(),
        wanted,
        fixture.limits(precision).activation,
        precision,
    )
    for name, value in fixture.value("initial").items():
        for key, weight in model.backbone.state_dict().items():
            if key == name or key.endswith(f".{name}"):
                fixture.close("constants", key, weight, torch.full_like(weight, value), EXACT)


def _check_maps(fixture: Fixture, naming: str, precision: str) -> None:
    """Maps of the levels, pyramid in training and evaluation, statistics, loss, gradients."""
    dtype = PRECISIONS[precision]
    limits = fixture.limits(precision)
    state = fixture.arrays(f"model_{naming}.safetensors")
    expected = fixture.arrays(f"expected_{naming}.safetensors")
    inputs = fixture.arrays(f"inputs_{naming}.safetensors")
    stated = fixture.value(naming)
    model = segmenter(fixture.config, state, dtype).backbone
    load(fixture, model, naming, state)
    images = inputs["images"].to(dtype, copy=True).requires_grad_()
    model.eval()
    with torch.no_grad():
        got = {f"eval_{number}": each for number, each in enumerate(model(images))}
    model.train()
    maps = model.outputs(images)
    got |= {f"level_{number}": each for number, each in enumerate(maps)}
    pyramid = model.pyramid(maps)
    got |= {f"train_{number}": each for number, each in enumerate(pyramid)}
    got |= {f"after.{name}": value for name, value in model.state_dict().items()}
    fixture.all_close("maps and statistics", got, expected, limits.activation, precision)
    loss = torch.stack(
        [(each * inputs[f"weight_{number}"].to(dtype)).sum() for number, each in enumerate(pyramid)]
    ).sum()
    fixture.close("losses", naming, loss, stated["loss"], limits.loss, precision)
    grads = gradients(model, loss)
    assert images.grad is not None
    grads["images"] = images.grad
    want = fixture.arrays(f"grads_{naming}.safetensors")
    fixture.all_close("gradients", grads, want, limits.gradient, precision)
    norms = {name: grad.norm() for name, grad in grads.items()}
    recorded = stated["grad_norm"] | {"images": stated["grad_norm_images"]}
    for name, norm in recorded.items():
        fixture.close(
            "gradient norms", f"{naming} {name}", norms[name], norm, limits.gradient, precision
        )


# ------------------------------------------------------------------------------------- the heads


def upernet(fixture: Fixture) -> None:
    """Pyramid, logits and losses of both heads: plain, with given dropout, without any label."""
    for precision in PRECISIONS:
        for case in ("plain", "dropout", "no_labels"):
            _check_heads(fixture, case, precision)
    maps = fixture.arrays("inputs.safetensors")["maps"]
    pixels = {"all": maps.numel(), "ignored": int((maps == NONE).sum())}
    for name, count in fixture.value("pixels").items():
        fixture.close("pixels", name, pixels[name], count, EXACT)


def _check_heads(fixture: Fixture, case: str, precision: str) -> None:
    config = fixture.config
    dtype = PRECISIONS[precision]
    limits = fixture.limits(precision)
    state = fixture.arrays("model.safetensors")
    inputs = fixture.arrays("inputs.safetensors")
    stated = fixture.value(case)
    model = _heads_alone(fixture, state, dtype)
    levels = [
        inputs[f"level_{number}"].to(dtype, copy=True).requires_grad_() for number in range(4)
    ]
    keep = Keep()
    if case == "dropout":
        keep = Keep(None, inputs["keep_decode"], inputs["keep_auxiliary"])
    pyramid = model.backbone.pyramid(levels)
    logits = [
        model.decode_head(pyramid, keep.decode),
        model.auxiliary_head(pyramid[config["aux_level"]], keep.auxiliary),
    ]
    maps = inputs["maps"]
    if case == "no_labels":
        maps = torch.full_like(maps, NONE)
    weights = (1.0, config["aux_weight"])
    losses = [
        weight * pixel_loss(each, maps) / maps.numel()
        for each, weight in zip(logits, weights, strict=True)
    ]
    total = torch.stack(losses).sum()
    got = dict(zip(("loss_decode", "loss_auxiliary_weighted"), losses, strict=True))
    for name, value in (got | {"total": total}).items():
        fixture.close("losses", f"{case} {name}", value, stated[name], limits.loss, precision)
    for name, each in zip(("acc_decode", "acc_auxiliary"), logits, strict=True):
        right = _percent_right(each, maps, config["num_classes"])
        fixture.close(
            "accuracies", f"{case} {name}", right, stated[name], Limit(0.0, 1e-6), precision
        )
    grads = gradients(model, total)
    grads |= {f"level_{number}": _grad(each) for number, each in enumerate(levels)}
    _check_head_arrays(fixture, case, model, pyramid, logits, precision)
    _check_head_grads(fixture, case, grads, stated, precision)


def _check_head_arrays(
    fixture: Fixture,
    case: str,
    model: Segmenter,
    pyramid: Sequence[Tensor],
    logits: Sequence[Tensor],
    precision: str,
) -> None:
    """What a forward gives, the statistics after it, and what evaluation then makes of them."""
    expected = fixture.arrays("expected.safetensors")
    of_case = {"plain": "logits", "dropout": "dropout_logits"}
    if case not in of_case:
        return
    arrays = {
        f"{of_case[case]}_{name}": each
        for name, each in zip(("decode", "auxiliary"), logits, strict=True)
    }
    limit = fixture.limits(precision).activation
    if case == "plain":
        arrays |= {f"pyramid_{number}": each for number, each in enumerate(pyramid)}
        arrays |= {f"after.{name}": value for name, value in model.state_dict().items()}
        inputs = fixture.arrays("inputs.safetensors")
        levels = [inputs[f"level_{number}"].to(pyramid[0].dtype) for number in range(len(pyramid))]
        model.eval()
        with torch.no_grad():
            arrays["eval_logits"] = model.decode_head(model.backbone.pyramid(levels))
        taken = resized(arrays["eval_logits"], inputs["maps"].shape[-2:]).argmax(dim=1)
        recorded = expected["eval_prediction"]
        fixture.close("predicted pixels", case, taken, recorded, EXACT, precision)
        known = arrays.keys() | {"eval_prediction"}
        known |= {name for name in expected if name.startswith(of_case["dropout"])}
        left = sorted(expected.keys() - known)
        fixture.true("arrays that are known", case, not left, f"{left} are none of them", precision)
    wanted = {name: expected[name] for name in expected.keys() & arrays.keys()}
    fixture.all_close("logits and statistics", arrays, wanted, limit, precision)


def _check_head_grads(
    fixture: Fixture, case: str, grads: dict[str, Tensor], stated: Config, precision: str
) -> None:
    limit = fixture.limits(precision).gradient
    if case == "no_labels":
        finite = all(bool((grad == 0).all()) for grad in grads.values())
        fixture.true("gradients without a label", case, finite, "are not all 0", precision)
        return
    file = "grads.safetensors" if case == "plain" else "grads_dropout_some.safetensors"
    fixture.all_close(f"gradients, {case}", grads, fixture.arrays(file), limit, precision)
    for name, norm in stated.get("grad_norm", {}).items():
        fixture.close("gradient norms", name, grads[name].norm(), norm, limit, precision)


def _heads_alone(fixture: Fixture, state: dict[str, Tensor], dtype: torch.dtype) -> Segmenter:
    """A network whose pyramid and heads have the recorded weights."""
    config = fixture.config
    around = {
        "embed_dim": config["dim"],
        "num_heads": 1,
        "depth": 4,
        "out_indices": range(4),
        "patch_size": config["image_size"] // config["grid"],
    }
    model = segmenter({**config, **around}, state, dtype)
    encoder = {
        name: value
        for name, value in model.state_dict().items()
        if name.startswith("backbone.") and not name.startswith("backbone.fpn")
    }
    load(fixture, model, "pyramid and heads", encoder | state)
    return model.train()


def _percent_right(logits: Tensor, maps: Tensor, num_classes: int) -> float:
    """Of all pixels, those without a label too."""
    taken = resized(logits, maps.shape[-2:]).argmax(dim=1)
    return 100.0 * int(confusion(maps, taken, num_classes).diagonal().sum()) / maps.numel()


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


# ---------------------------------------------------------------------------------- the training


def poly_rate(case: Config, step: int) -> float:
    """The rate of a step of a folder's schedule."""
    return learning_rate(
        step,
        total_steps=case["total"],
        lr=case["lr"],
        min_lr=case["min_lr"],
        shape=Shape("poly", power=case["power"]),
        warmup=Warmup(case["warmup"], start=case["warmup_ratio"], kind="multiply"),
    )


def seg_schedule(fixture: Fixture) -> None:
    """Rates, groups of parameters, and training steps."""
    config = fixture.config
    for case in fixture.value("schedules"):
        for step, rate in case["rows"]:
            fixture.close(
                "rates", f"step {step}", poly_rate(case, step), rate, Limit(1e-24, 1e-12), "float64"
            )
    own = {"total": config["total_iters"], "warmup": config["warmup_iters"]}
    for precision, dtype in PRECISIONS.items():
        limits = fixture.limits(precision)
        state = fixture.arrays("model.safetensors")
        model = segmenter(config, state, dtype)
        load(fixture, model, "whole network", state)
        groups = param_groups(model.train(), config["weight_decay"], config["layer_decay"])
        _check_groups(fixture, groups)
        optimizer = kernels.adamw(groups, betas=tuple(config["betas"]))
        inputs = fixture.arrays("inputs.safetensors")
        for index, row in enumerate(fixture.value("steps")):
            lr = poly_rate({**config, **own}, row["iter"])
            batch = batch_of(inputs["images"][index].to(dtype), inputs["maps"][index])
            got = _step(model, optimizer, batch, config, lr)
            names = {"lr": limits.loss, "grad_norm": limits.gradient}
            for name, value in got.items():
                limit = names.get(name, limits.loss)
                fixture.close(
                    "losses, norms, rates", f"{name} {index}", value, row[name], limit, precision
                )
        of_group = {(group["lr_scale"], group["weight_decay"]): group["lr"] for group in groups}
        for stated, rate in zip(
            fixture.value("param_groups"), fixture.value("group_lrs_at_last_step"), strict=True
        ):
            mine = of_group[stated["lr_scale"], stated["weight_decay"]]
            fixture.close("rates of the groups", stated["name"], mine, rate, limits.loss, precision)
        _check_after(fixture, model, precision)


def _step(
    model: Segmenter, optimizer: torch.optim.Optimizer, batch: Batch, config: Config, lr: float
) -> dict[str, Any]:
    """A training step; what the folder recorded of it."""
    objective = SegmentationLoss(auxiliary=config["aux_weight"])
    sums, counts = objective(model, None, batch, 0.0), objective.counts(batch)
    terms = [objective.weights[name] * sums[name] / counts[name] for name in sums]
    total = torch.stack(terms).sum()
    total.backward()
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    clip(grads, norm, config["clip_grad"])
    set_rates(optimizer.param_groups, lr=lr, weight_decay=config["weight_decay"])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    named = dict(zip(("loss_decode", "loss_auxiliary_weighted"), terms, strict=True))
    return {"loss": total, **named, "grad_norm": norm, "lr": lr}


def _check_groups(fixture: Fixture, groups: Sequence[Mapping[str, Any]]) -> None:
    each = {
        name: [group["lr_scale"], group["weight_decay"]]
        for group in groups
        for name in group["param_names"]
    }
    stated = fixture.value("param_scale_and_wd")
    told = sorted(
        name for name in each.keys() | stated.keys() if each.get(name) != stated.get(name)
    )
    fixture.true("layer decay groups", "each parameter", not told, f"{told[:5]} differ")
    mine = {
        (group["lr_scale"], group["weight_decay"]): set(group["param_names"]) for group in groups
    }
    theirs = {
        (group["lr_scale"], group["weight_decay"]): set(group["params"])
        for group in fixture.value("param_groups")
    }
    fixture.true("layer decay groups", "groups", mine == theirs, "differ from those recorded")


def _check_after(fixture: Fixture, model: Segmenter, precision: str) -> None:
    """Weights and statistics after the steps, and the norm of each weight."""
    limit = fixture.limits(precision).weight
    state = model.state_dict()
    for file in fixture.files(r"after_.*"):
        fixture.all_close("after the steps", state, fixture.arrays(file), limit, precision)
    for name in (each for each in fixture.value("norm_after_3_steps") if each in state):
        wanted = fixture.value("norm_after_3_steps")[name]
        root = state[name].numel() ** 0.5  # of as many errors
        allowed = Limit(limit.absolute * root, limit.relative)
        fixture.close("norms after the steps", name, state[name].norm(), wanted, allowed, precision)
    strange = sorted(fixture.value("norm_after_3_steps").keys() - state.keys())
    fixture.true("norms after the steps", "names", not strange, f"{strange} are not here")


# ----------------------------------------------------------------------------------- the windows


def slide_inference(fixture: Fixture) -> None:
    """Which windows, their logits averaged, resized, and averaged over flips and scales."""
    for row in fixture.value("window_table"):
        size = (row["height"], row["width"])
        found = windows(size, _pair(row["crop"]), _pair(row["stride"]))
        same = [list(each) for each in found] == row["windows"]
        fixture.true("windows", f"{row['height']}x{row['width']}", same, "differ")
    for precision, dtype in PRECISIONS.items():
        state = fixture.arrays("model.safetensors")
        model = segmenter(fixture.config, state, dtype)
        load(fixture, model, "whole network", state)
        with torch.no_grad():
            _check_picture(fixture, model.eval(), precision)


def _check_picture(fixture: Fixture, model: Segmenter, precision: str) -> None:
    config = fixture.config
    limit = fixture.limits(precision).activation
    expected = fixture.arrays("expected.safetensors")
    inputs = fixture.arrays("inputs.safetensors")
    crop, stride, original = (_pair(config[key]) for key in ("crop", "stride", "original"))
    rows = range(original[0])

    def seen(images: Tensor, *, flipped: bool = False) -> Tensor:
        """Averaged logits [classes, h, w]."""
        image = images.to(PRECISIONS[precision])
        image = image.flip(-1) if flipped else image
        canvas = Canvas(_pair(image.shape[-2:]), crop, stride, flipped=flipped)
        for window in canvas.windows:
            top, left, bottom, right = window
            part = image[:, :, top:bottom, left:right]
            canvas.add(window, resized(model(part)[0], part.shape[-2:])[0])
        return canvas.logits()

    image, scaled = inputs["image"], inputs["scaled"]
    found = windows(_pair(image.shape[-2:]), crop, stride)
    same = [list(each) for each in found] == fixture.value("windows")
    fixture.true("windows", "of the image", same, "differ")
    plain = seen(image)
    flipped = seen(image, flipped=True)
    variants = [plain, flipped, seen(scaled), seen(scaled, flipped=True)]
    first = found[0]
    part = image[:, :, : first.bottom, : first.right].to(plain.dtype)
    arrays = {
        "window_logits": resized(model(part)[0], part.shape[-2:]),
        "slide_logits": plain[None],
        "original_logits": rows_resized(plain, original, rows)[None],
        "probabilities": probabilities([plain], original, rows)[None],
        "flipped_probabilities": probabilities([flipped], original, rows)[None],
        "averaged_probabilities": probabilities(variants, original, rows)[None],
    }
    predictions = {
        "prediction": predicted([plain], original),
        "averaged_prediction": predicted(variants, original),
    }
    known = arrays.keys() | predictions.keys()
    fixture.true(
        "arrays that are known", "expected", expected.keys() <= known, "are more", precision
    )
    wanted = {name: array for name, array in expected.items() if name in arrays}
    fixture.all_close("logits and probabilities", arrays, wanted, limit, precision)
    for name, taken in predictions.items():
        fixture.close("predicted pixels", name, taken, expected[name], EXACT, precision)
    for name, margin in fixture.value("smallest_margin").items():
        of = variants if name == "averaged" else [plain]
        two = probabilities(of, original, rows).topk(2, dim=0)[0]
        got = (two[0] - two[1]).min()
        fixture.close("margins", name, got, margin, Limit(2 * sum(limit), 0.0), precision)


def _pair(sides: Sequence[int]) -> tuple[int, int]:
    height, width = sides
    return height, width
