"""Pixio: block masks, encoder and deep decoder, losses, gradients, training steps, with a teacher;
its encoder on whole images of any size; names and shapes of its architectures."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rcmae.data.batch import Batch
from rcmae.data.masking import GridMask, patches_of_blocks, visible_count
from rcmae.engines.optim import param_groups
from rcmae.errors import Refused
from rcmae.models import kernels
from rcmae.models.classifier import Classifier
from rcmae.models.fitting import fit_weights
from rcmae.models.sizes import NetworkSizes
from rcmae.models.vit import Encoder, MaskedAutoencoder
from rcmae.objectives import new
from rcmae.weights.conversion import Heads, pixio_config
from rcmae.weights.encoder import DECODER_HEADS, HEADS
from rcmae.weights.names import family_names, published_names
from rcmae.weights.reading import NetworkWeights
from rcmae.weights.shapes import sizes_of

from .fixture import EXACT, PRECISIONS, Fixture, Limit, Limits, Unusable
from .networks import (
    build,
    case_of,
    check_grads,
    gradients,
    losses,
    optimizer_for,
    update,
    without_key_bias,
)
from .schedules import rate_at


def pixio_masks(fixture: Fixture) -> None:
    """Which patches are seen and in which order, of recorded noise; what cannot be is refused."""
    noise = fixture.arrays("noise.safetensors")
    expected = fixture.arrays("expected.safetensors")
    shares = fixture.value("hidden_share")
    for case in fixture.config["cases"]:
        name = case["name"]
        grid = (case["grid"], case["grid"])
        mask = grid_mask(grid, case["mask_grid"], case["mask_ratio"])
        ids = block_order(noise[name], grid, case["mask_grid"])
        found = _mask_arrays(ids, mask.num_visible)
        for key, array in found.items():
            fixture.close("masks", f"{name}/{key}", array, expected[f"{name}/{key}"], EXACT)
        counts = {
            "blocks": mask.num_patches // mask.block**2,
            "visible_blocks": mask.blocks_visible,
            "visible_patches": mask.num_visible,
        }
        for key, count in counts.items():
            fixture.close("counts", f"{name} {key}", count, shares[name][key], EXACT)
        share = found["mask"].mean()  # as recorded: float32
        fixture.close("counts", f"{name} share", share, shares[name]["hidden_share"], EXACT)
    for name in fixture.value("unfit"):
        match = re.fullmatch(r"g(\d+)_b(\d+)_r([\d.]+)", name)
        if match is None:
            raise Unusable(f"values.unfit has {name!r}, which names no grid, block and ratio")
        side = int(match[1])
        refused = False
        try:
            grid_mask((side, side), int(match[2]), float(match[3]))
        except Refused:
            refused = True
        fixture.true("masks that cannot be", name, refused, "was not refused")


def grid_mask(grid: tuple[int, int], block: int, ratio: float) -> GridMask:
    """The package's mask."""
    return GridMask(grid, block, visible_count(grid[0] * grid[1] // block**2, ratio))


def block_order(noise: Tensor, grid: tuple[int, int], block: int) -> Tensor:
    """The order of the patches [N, L] that noise [N, blocks] makes: the smallest are seen."""
    order = noise.argsort(dim=1, stable=True).numpy()
    return torch.from_numpy(patches_of_blocks(order, grid, block))


def _mask_arrays(ids: Tensor, num_visible: int) -> dict[str, Tensor]:
    """What is recorded of a mask: seen patches, 1 = hidden in raster order, places."""
    hidden = torch.ones(ids.shape)
    return {
        "ids_keep": ids[:, :num_visible],
        "mask": hidden.scatter(1, ids[:, :num_visible], 0.0),
        "ids_restore": ids.argsort(dim=1),
    }


# ------------------------------------------------------------------------------------- pretraining


def pixio_forward(fixture: Fixture) -> None:
    """Outputs, losses, scores and gradients for each block, training steps, a teacher."""
    for precision in PRECISIONS:
        fixture.limits(precision)  # or it is unusable
        student = _model(fixture, "model.safetensors", precision)
        _check_groups(fixture, student)
        _check_outputs(fixture, student, precision)
        _check_losses(fixture, student, precision)
        _check_teacher(fixture, student, precision)
        _check_steps(fixture, student, precision)


def _model(fixture: Fixture, file: str, precision: str) -> MaskedAutoencoder:
    """The network with a file's weights, which may be of float64."""
    tokens = fixture.config["n_cls_tokens"]
    dtype = PRECISIONS[precision]
    model = build(fixture, file, dtype, class_tokens=tokens, positions="learned")
    model.load_state_dict(fixture.arrays(file))
    return model


def _batch(
    fixture: Fixture, model: MaskedAutoencoder, images: Tensor, noise: Tensor, block: int
) -> Batch:
    """Recorded images under the mask that recorded noise makes of blocks."""
    dtype: torch.dtype = model.mask_token.dtype
    mask = grid_mask(model.grid, block, fixture.config["mask_ratio"])
    nothing = torch.empty(0)
    return Batch(
        images=images.to(dtype),
        ids_shuffle=block_order(noise, model.grid, block),
        num_visible=mask.num_visible,
        labels=None,
        keys=(),
        positions=nothing,
        crops=nothing,
    )


def _batch_of_block(fixture: Fixture, model: MaskedAutoencoder, block: int) -> Batch:
    inputs = fixture.arrays("inputs.safetensors")
    return _batch(fixture, model, inputs["images"], inputs[f"noise_block{block}"], block)


def _check_outputs(fixture: Fixture, model: MaskedAutoencoder, precision: str) -> None:
    """Masks, latents and predictions of each block."""
    limit = fixture.limits(precision).activation
    expected = fixture.arrays("expected.safetensors")
    for block in fixture.config["mask_grid"]:
        batch = _batch_of_block(fixture, model, block)
        for key, array in _mask_arrays(batch.ids_shuffle, batch.num_visible).items():
            name = f"{key}_block{block}"
            fixture.close("masks", name, array, expected[name], EXACT)
        seen = batch.ids_shuffle[:, : batch.num_visible]
        outputs = model(batch.images, batch.ids_shuffle, batch.num_visible, ("all_pixels",))
        pairs = {"latent": model.encode(batch.images, seen), "pred": outputs["all_pixels"]}
        for key, got in pairs.items():
            name = f"{key}_block{block}"
            fixture.close("predictions", name, got, expected[name], limit, precision)


def _check_losses(fixture: Fixture, model: MaskedAutoencoder, precision: str) -> None:
    """Losses, scores of single images and gradients of each block, normalised or not."""
    limits = fixture.limits(precision)
    some = fixture.arrays("grads_others_some.safetensors")
    for case, stated in fixture.value("losses").items():
        block = _block_of(case)
        norm_pix = case_of(case)["norm_pix"]
        batch = _batch_of_block(fixture, model, block)
        objective = new("pixio", norm_pix_loss=norm_pix)
        loss, _ = losses(objective, model, None, batch)
        fixture.close("losses", case, loss, stated["loss"], limits.loss, precision)
        for row, score in enumerate(stated["scores"]):
            one = dataclasses.replace(
                batch,
                images=batch.images[row : row + 1],
                ids_shuffle=batch.ids_shuffle[row : row + 1],
            )
            own, _ = losses(objective, model, None, one)
            fixture.close("scores", f"{case} {row}", own, score, limits.loss, precision)
        grads = gradients(model, loss)
        check_grads(fixture, case, grads, stated, precision)
        prefix = f"block{block}_{'norm' if norm_pix else 'raw'}/"
        _close_gradients(fixture, grads, some, prefix, precision)
        for file in fixture.files(r"grads\.safetensors"):
            told = fixture.meaning(file)
            if (_block_of(told), case_of(told)["norm_pix"]) == (block, norm_pix):
                _close_gradients(fixture, grads, fixture.arrays(file), "", precision)


def _check_teacher(fixture: Fixture, student: MaskedAutoencoder, precision: str) -> None:
    """The student beside a teacher: predictions, both terms, gradients."""
    limits = fixture.limits(precision)
    stated = fixture.value("rcpixio")
    expected = fixture.arrays("expected.safetensors")
    some = fixture.arrays("grads_others_some.safetensors")
    trained = fixture.files(r"after_\d+_steps\.safetensors")  # the teacher, as values.rcpixio says
    if len(trained) != 1:
        raise Unusable(f"has {len(trained)} files of weights after steps: which is the teacher?")
    teacher = _model(fixture, trained[0], precision).requires_grad_(False)
    for name in [key for key in expected if key.startswith("teacher_pred_block")]:
        block = int(name.removeprefix("teacher_pred_block"))
        batch = _batch_of_block(fixture, student, block)
        pred = teacher(batch.images, batch.ids_shuffle, batch.num_visible, ("all_pixels",))
        fixture.close(
            "predictions", name, pred["all_pixels"], expected[name], limits.activation, precision
        )
        loss, terms = losses(new("rcpixio"), student, teacher, batch)
        for key, got in {**terms, "total": loss}.items():
            fixture.close("losses", f"rcpixio {key}", got, stated[key], limits.loss, precision)
        grads = gradients(student, loss)
        norms = {key: grad.double().norm() for key, grad in grads.items()}
        wanted = {
            key: torch.tensor(norm, dtype=torch.float64)
            for key, norm in stated["grad_norm"].items()
        }
        fixture.all_close("gradient norms", norms, wanted, limits.gradient, precision)
        _close_gradients(fixture, grads, some, "rcpixio/", precision)


def _check_steps(fixture: Fixture, model: MaskedAutoencoder, precision: str) -> None:
    """Training steps: losses and rates of each, and the weights after them."""
    train = fixture.config["train"]
    if train.get("clip_grad") is not None or train.get("eps", kernels.ADAM_EPS) != kernels.ADAM_EPS:
        raise Unusable(f"config.train: this check knows eps={kernels.ADAM_EPS} and no clipping")
    limit = fixture.limits(precision).loss
    inputs = fixture.arrays("inputs.safetensors")
    objective = new("pixio", norm_pix_loss=train["norm_pix_loss"])
    optimizer = optimizer_for(model, train["weight_decay"], train["betas"])
    per_epoch = train["iters_per_epoch"]
    start = train.get("start_epoch", train["warmup_epochs"])
    for index, row in enumerate(fixture.value("train_rows")):
        images, noise = (inputs[key][index] for key in ("train_images", "train_noise"))
        batch = _batch(fixture, model, images, noise, train["mask_grid"])
        loss, _ = losses(objective, model, None, batch)
        loss.backward()
        lr = rate_at(train, start * per_epoch + index, per_epoch)
        update(optimizer, lr)
        for key, got in (("loss", loss), ("lr", lr)):
            name = f"{key} {index}"
            fixture.close("training losses, rates", name, got, row[key], limit, precision)
    for file in fixture.files("after_.*"):
        # the gradient of keys' biases is rounding, which Adam makes whole steps of
        wanted = {key: without_key_bias(key, value) for key, value in fixture.arrays(file).items()}
        params = {key: without_key_bias(key, value) for key, value in model.named_parameters()}
        fixture.all_close(
            file.removesuffix(".safetensors"),
            params,
            wanted,
            fixture.limits(precision).weight,
            precision,
        )


def _check_groups(fixture: Fixture, model: MaskedAutoencoder) -> None:
    """Which parameters decay, in the recorded order."""
    decays = _decays(model)
    names = [name for name, _ in model.named_parameters()]
    groups = [[name for name in names if decays[name] == decay] for decay in (False, True)]
    recorded = fixture.value("optimizer_groups")
    fixture.true("optimizer groups", "names", groups == recorded, "other groups than recorded")


def _decays(model: MaskedAutoencoder) -> dict[str, bool]:
    return {
        name: group["weight_decay"] > 0
        for group in param_groups(model, 0.05)
        for name in group["param_names"]
    }


def _close_gradients(
    fixture: Fixture,
    grads: Mapping[str, Tensor],
    recorded: Mapping[str, Tensor],
    prefix: str,
    precision: str,
) -> None:
    """Gradients of the parameters that are recorded under a prefix."""
    own = {f"{prefix}{name}": grad for name, grad in grads.items()}
    wanted = {name: grad for name, grad in recorded.items() if name.startswith(prefix)}
    limit = fixture.limits(precision).gradient
    fixture.all_close("gradients", own, wanted, limit, precision)


def _under(arrays: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What has the prefix, without it."""
    found = {name: value for name, value in arrays.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): value for name, value in found.items()}


def _block_of(text: str) -> int:
    """Patches of a block's side, as in `mask_grid=4` or `mask_grid 4`."""
    match = re.search(r"mask_grid[ =](\d+)", text)
    if match is None:
        raise Unusable(f"names no mask_grid: {text!r}")
    return int(match[1])


# ---------------------------------------------------------------------------- encoder, whole images


def pixio_encoder(fixture: Fixture) -> None:
    """Class and patch tokens of recorded blocks, with and without the norm, at each size; the
    features that evaluations read."""
    _check_other_names(fixture)
    for precision in PRECISIONS:
        limit = _encoder_limit(fixture, precision)
        images = fixture.arrays("inputs.safetensors")
        expected = fixture.arrays("expected.safetensors")
        _check_own_size(fixture, precision, limit)
        for height, width in fixture.config["sizes"]:
            size = f"{height}x{width}"
            model = _classifier(fixture, (height, width), precision)
            found = _tokens(fixture, model, images[f"images_{size}"].to(PRECISIONS[precision]))
            wanted = _under(expected, f"{size}/")
            pooler = wanted.pop("hf_pooler_output")
            told = {f"{size}/{key}": value for key, value in found.items()}
            want = {f"{size}/{key}": value for key, value in wanted.items()}
            fixture.all_close("tokens and features", told, want, limit, precision)
            last = max(fixture.config["blocks_recorded"])
            got = found[f"block{last}/cls_tokens_norm"].mean(dim=1)
            allowed = _pooler_limit(fixture, size, limit)
            fixture.close("transformers' pooler", size, got, pooler, allowed, precision)


def _encoder_limit(fixture: Fixture, precision: str) -> Limit:
    """The one limit that the folder states for a precision."""
    if precision == "float64":
        limits: Limits = fixture.limits(precision)
        return limits.activation
    stated = re.match(r"(\d\S*) of the largest magnitude", fixture.tolerance(precision))
    if stated is None:
        raise Unusable(f"states no limit that can be read: {fixture.tolerance(precision)!r}")
    return Limit(0.0, float(stated[1]))


def _pooler_limit(fixture: Fixture, size: str, limit: Limit) -> Limit:
    """The limit, and twice what transformers, which interpolates in float32, was off by."""
    told = fixture.value("transformers_difference")[size]
    off = float(told["pooler_output - mean of cls_tokens_norm"])
    return Limit(limit.absolute + 2 * off, limit.relative)


def _encoder_sizes(fixture: Fixture, image: tuple[int, int]) -> NetworkSizes:
    config = fixture.config
    if config.get("layer_norm_eps", kernels.LAYER_NORM_EPS) != kernels.LAYER_NORM_EPS:
        raise Unusable(f"config.layer_norm_eps: this package has {kernels.LAYER_NORM_EPS}")
    return NetworkSizes(
        image_size=image,
        patch_size=config["patch_size"],
        in_channels=fixture.arrays("model.safetensors")["patch_embed.proj.weight"].shape[1],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        class_tokens=config["n_cls_tokens"],
    )


def _check_own_size(fixture: Fixture, precision: str, limit: Limit) -> None:
    """The network that pretrains, on whole images of its own size; weights load strictly."""
    side = fixture.config["img_size"]
    expected = fixture.arrays("expected.safetensors")
    model = Encoder(_encoder_sizes(fixture, (side, side)), positions="learned")
    problem = ""
    try:
        model.load_state_dict(fixture.arrays("model.safetensors"), strict=True)
    except RuntimeError as error:
        problem = str(error)
    fixture.true("weights load strictly", "model.safetensors", not problem, problem)
    size = f"{side}x{side}"
    if f"images_{size}" not in fixture.arrays("inputs.safetensors"):
        return
    images = fixture.arrays("inputs.safetensors")[f"images_{size}"].to(PRECISIONS[precision])
    model = model.to(PRECISIONS[precision])
    last = fixture.config["depth"] - 1
    outputs = model.outputs_without_mask(images, ("tokens", "class_tokens", "encoded"))
    found = {
        f"{size}/block{last}/patch_tokens": outputs["tokens"],
        f"{size}/block{last}/cls_tokens": outputs["class_tokens"],
        f"{size}/block{last}/patch_tokens_norm": outputs["encoded"][:, 1:],
        f"{size}/knn_feature": F.normalize(outputs["class_tokens"].mean(dim=1), dim=1),
        f"{size}/hf_pooler_output": outputs["encoded"][:, 0],
    }
    wanted = {name: expected[name] for name in found.keys() & expected.keys()}
    fixture.all_close("network that pretrains", found, wanted, limit, precision)


def _classifier(fixture: Fixture, image: tuple[int, int], precision: str) -> Classifier:
    """The network that probes and users read, at a size."""
    dtype = PRECISIONS[precision]
    model = Classifier(_encoder_sizes(fixture, image), num_classes=0, pool="cls").to(dtype)
    side = fixture.config["img_size"] // fixture.config["patch_size"]
    weights = fixture.arrays("model.safetensors")
    fit_weights(model, {key: value.to(dtype) for key, value in weights.items()}, (side, side))
    return model.eval()


def _tokens(fixture: Fixture, model: Classifier, images: Tensor) -> dict[str, Tensor]:
    """Tokens of the recorded blocks by the recorded names, and the k-NN feature."""
    blocks = fixture.config["blocks_recorded"]
    found: dict[str, Tensor] = {}
    for ending, norm in (("", False), ("_norm", True)):
        given: Any = model.forward_intermediates(
            images,
            indices=blocks,
            return_prefix_tokens=True,
            norm=norm,
            output_fmt="NLC",
            intermediates_only=True,
        )
        for block, (patches, prefix) in zip(blocks, given, strict=True):
            found[f"block{block}/patch_tokens{ending}"] = patches
            found[f"block{block}/cls_tokens{ending}"] = prefix
    last = found[f"block{max(blocks)}/cls_tokens"]
    return found | {"knn_feature": F.normalize(last.mean(dim=1), dim=1)}


def _check_other_names(fixture: Fixture) -> None:
    """Names and settings of the folder that is written for transformers, and the way back."""
    weights = fixture.arrays("model.safetensors")
    theirs = family_names(weights, "pixio")
    if fixture.has("hf_saved_names"):
        recorded = sorted(fixture.value("hf_saved_names"))
        fixture.true("transformers' names", "saved", sorted(theirs) == recorded, "others")
    back = published_names(theirs)
    same = back.keys() == weights.keys() and all(torch.equal(back[k], weights[k]) for k in weights)
    fixture.true("transformers' names", "there and back", same, "weights changed")
    if fixture.has("hf_config"):
        stated = fixture.value("hf_config")
        heads = {"num_heads": fixture.config["num_heads"]}
        source = NetworkWeights(dict(weights), None, heads, "the folder", {})
        ours = pixio_config(source, weights, Heads())
        for key, got in ours.items():
            fixture.true("transformers' settings", key, got == stated[key], f"{got!r} is ours")
    if fixture.has("hf_names"):
        reason = "names of modules in memory; those that are saved are compared"
        fixture.leave_out("hf_names", reason)


# ------------------------------------------------------------------------------------------- names


def pixio_arch_names(fixture: Fixture) -> None:
    """Names, shapes, order, counts, heads and decay of each architecture, of no weights."""
    for name, stated in fixture.value("architectures").items():
        recorded = {key: tuple(shape) for key, shape in stated["state_dict"]}
        sizes = sizes_of(recorded)
        model = _of_sizes(fixture, sizes)
        whole = "decoder_dim" in sizes
        own = {
            key: tuple(value.shape)
            for key, value in model.state_dict().items()
            if whole or model.place_of(key).part == "encoder"
        }
        fixture.true("names, shapes, order", name, [*own.items()] == [*recorded.items()], "differ")
        parts = {key: model.place_of(key).part for key in own}
        counts = {
            "parameters": sum(map(_numel, own.values())),
            "encoder_parameters": _count(own, parts, "encoder"),
            "decoder_parameters": _count(own, parts, "decoder"),
            "heads": HEADS.get(sizes["embed_dim"]),
            "decoder_heads": DECODER_HEADS.get(sizes.get("decoder_dim", 0)),
        }
        for key, got in counts.items():
            if key in stated:
                fixture.true(
                    "counts and heads", f"{name} {key}", got == stated[key], f"{got} is ours"
                )
        if "decay" in stated:
            decays = _decays(model)
            fixture.true(
                "decay",
                name,
                all(decays[key] for key in stated["decay"])
                and all(decays[key] == (len(shape) > 1) for key, shape in own.items()),
                "other parameters decay than recorded",
            )


def _of_sizes(fixture: Fixture, sizes: Mapping[str, Any]) -> MaskedAutoencoder:
    side = fixture.config["img_size"]
    with torch.device("meta"):
        return MaskedAutoencoder(
            NetworkSizes(
                image_size=(side, side),
                patch_size=sizes["patch_size"],
                in_channels=sizes["in_channels"],
                embed_dim=sizes["embed_dim"],
                depth=sizes["depth"],
                num_heads=1,
                decoder_dim=sizes.get("decoder_dim", 4),
                decoder_depth=sizes.get("decoder_depth", 1),
                decoder_heads=1,
                mlp_ratio=sizes["mlp_ratio"],
                class_tokens=sizes["class_tokens"],
            ),
            positions="learned",
        )


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _count(shapes: Mapping[str, tuple[int, ...]], parts: Mapping[str, str], part: str) -> int:
    """Elements of one part."""
    return sum(_numel(shape) for name, shape in shapes.items() if parts[name] == part)
