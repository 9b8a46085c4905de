"""BootMAE: two regressors, a teacher of the whole image, masks of boxes."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor, nn

from rcmae.data.batch import Batch
from rcmae.data.masking import BlockMask
from rcmae.engines.schedules import epoch_momentum, warmup_half_cosine
from rcmae.models.bootmae import BootstrappedAutoencoder
from rcmae.models.patches import patchify
from rcmae.models.protocol import TABLES
from rcmae.models.sizes import NetworkSizes
from rcmae.objectives import Context, new
from rcmae.objectives.mae import crowding, pixel_targets

from .fixture import EXACT, PRECISIONS, Fixture, Limit, Limits, Unusable
from .networks import gradients, image_size, losses, masked


def bootmae_limits(fixture: Fixture, precision: str, weighted: bool) -> Limits:
    """What the folder states, with weights of the mask and without."""
    text = fixture.tolerance(precision)
    if precision == "float64":
        stated = re.search(r"relative (\S+) where weight_mask is on.*else (\S+)", text)
        if stated is None:
            raise Unusable(f"states no limits for {precision} that can be read: {text!r}")
        limit = Limit(1e-12, float(stated[1 if weighted else 2]))
        return Limits(limit, limit, limit, limit)
    stated = re.search(r"losses relative (\S+), gradients relative (\S+) of", text)
    if stated is None:
        raise Unusable(f"states no limits for {precision} that can be read: {text!r}")
    loss = float(stated[1])
    grad = float(stated[2])
    return Limits(Limit(0.0, loss), Limit(0.0, loss), Limit(0.0, grad), Limit(0.0, loss))


def bootmae_forward(fixture: Fixture) -> None:
    """Masks, both predictions and targets, both terms, gradients and a step of the moving
    average.
    """
    for precision in PRECISIONS:
        student = _network(fixture, "model.safetensors", precision)
        teacher = _network(fixture, "ema.safetensors", precision).requires_grad_(False)
        teacher.keep(("tokens",))
        inputs = fixture.arrays("inputs.safetensors")
        # the recorded order: what boxes hide comes last, in each part by noise; a roll may follow
        order = inputs["block_mask"].flatten(1) - inputs["noise"].flatten(1)
        ids = order.argsort(dim=1, stable=True)
        wanted = fixture.arrays("expected.safetensors")["idx_shuffle"]
        fixture.close("masks", "idx_shuffle", ids, wanted, EXACT)
        for case, stated in fixture.value("cases").items():
            if "official_code_fails" in stated:
                _check_without_features(fixture, case)
            else:
                _check_case(fixture, case, (student, teacher), ids, precision)


def _network(fixture: Fixture, file: str, precision: str) -> BootstrappedAutoencoder:
    """The package's network of the folder's sizes, with a file of published weights."""
    config = fixture.config
    state = fixture.arrays(file)
    low, high = config["fea_list"]
    sizes = NetworkSizes(
        image_size=image_size(config),
        patch_size=config["patch_size"],
        in_channels=state["patch_embed.proj.weight"].shape[1],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        decoder_dim=config["decode_dim"],
        decoder_depth=config["decoder_depth"],
        decoder_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
    )
    model = BootstrappedAutoencoder(sizes, low_layer=low, high_layer=high)
    tables = {name: state[name] for name in TABLES if name in state}
    fixture.all_close(
        "position tables", dict(model.named_buffers()), tables, Limit(1e-6, 0.0), "float32"
    )
    problem = ""
    try:
        computed = dict(model.named_buffers())  # tables, where none is recorded
        model.load_state_dict(computed | state, strict=True)
    except RuntimeError as error:
        problem = str(error)
    fixture.true("weights load strictly", file, not problem, problem)
    return model.to(PRECISIONS[precision])


def _check_without_features(fixture: Fixture, case: str) -> None:
    objective = new("bootmae", feature_weight=0.0)
    bare = not objective.needs_teacher and list(objective.weights) == ["reconstruction"]
    fixture.true("cases", f"{case}: a feature weight of 0 works", bare, "it has a teacher")


def _check_case(
    fixture: Fixture,
    case: str,
    networks: tuple[BootstrappedAutoencoder, BootstrappedAutoencoder],
    order: Tensor,
    precision: str,
) -> None:
    """One case: student and teacher on the recorded images, hidden by the order of patches."""
    config = fixture.config
    student, teacher = networks
    stated = fixture.value("cases")[case]
    inputs = fixture.arrays("inputs.safetensors")
    ids = order.roll(stated["roll"], dims=1)
    if stated["roll"]:
        wanted = fixture.arrays("expected.safetensors")["idx_shuffle_rolled"]
        fixture.close("masks", "idx_shuffle_rolled", ids, wanted, EXACT)
    noise = inputs["noise"].flatten(1)
    dtype = PRECISIONS[precision]
    batch = masked(fixture, inputs["images"], noise, dtype, config["mask_num"])
    batch = replace(batch, ids_shuffle=ids)
    if not stated["roll"] and precision == "float64":
        check_bootmae_outputs(fixture, student, teacher, batch, stated["weight_mask"])
    objective = new(
        "bootmae",
        Context(epochs=config["epochs"]),
        feature_weight=config["feature_weight"],
        weight_mask=stated["weight_mask"],
    )
    progress = config["epoch"] / config["epochs"]
    loss, terms = losses(objective, student, teacher, batch, progress)
    limit = bootmae_limits(fixture, precision, stated["weight_mask"]).loss
    used = min(1.0, 4 * (1 + config["epoch"]) / config["epochs"]) * config["feature_weight"]
    found = {
        "Rloss": terms["reconstruction"],
        "total_loss": loss,
        "feature_weight_used": used,
        "Ploss": terms["features"] * config["feature_weight"] / used,
    }
    for name, value in found.items():
        fixture.close("losses", f"{case} {name}", value, stated[name], limit, precision)
    _check_gradients(fixture, case, gradients(student, loss), precision)
    _check_average(fixture, case, student, precision)


def _check_gradients(fixture: Fixture, case: str, grads: dict[str, Tensor], precision: str) -> None:
    stated = fixture.value("cases")[case]
    limit = bootmae_limits(fixture, precision, stated["weight_mask"]).gradient
    norms = {name: grad.double().norm() for name, grad in grads.items()}
    wanted = {
        name: torch.tensor(norm, dtype=torch.float64) for name, norm in stated["grad_norm"].items()
    }
    fixture.all_close("gradient norms", norms, wanted, limit, precision)
    total = torch.stack(list(norms.values())).norm()
    fixture.close("gradient norms", case, total, stated["grad_norm_total"], limit, precision)
    if case == "main":
        for file in fixture.files("grads.*"):
            fixture.all_close("gradients", grads, fixture.arrays(file), limit, precision)


def _check_average(fixture: Fixture, case: str, student: nn.Module, precision: str) -> None:
    """The teacher after one step towards the student."""
    config = fixture.config
    stated = fixture.value("cases")[case]
    limit = bootmae_limits(fixture, precision, stated["weight_mask"]).loss
    momentum = epoch_momentum(
        config["epoch"], base=config["model_ema_decay"], dynamic=config["model_ema_dynamic"]
    )
    fixture.close("momenta", case, momentum, stated["ema_decay"], limit, precision)
    before = fixture.arrays("ema.safetensors")
    moved = {
        name: before[name].to(PRECISIONS[precision]).lerp(param.detach(), 1.0 - momentum)
        for name, param in student.named_parameters()
    }
    after = fixture.arrays("ema_after_update_some.safetensors")
    small = Limit(1e-12 if precision == "float64" else 1e-6, 1e-6)
    fixture.all_close("moving average", moved, after, small, precision)


def check_bootmae_outputs(
    fixture: Fixture,
    student: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    weighted: bool,
) -> None:
    """Predictions and targets of every hidden patch, of the folder's pictures and features."""
    expected = fixture.arrays("expected.safetensors")
    num_patches = batch.ids_shuffle.shape[1]
    limit = bootmae_limits(fixture, "float64", weighted).activation
    patch = fixture.config["patch_size"]
    hidden = batch.ids_shuffle[:, batch.num_visible :]
    outputs = student(batch.images, batch.ids_shuffle, batch.num_visible, ("features", "pixels"))
    features_of_teacher = teacher(batch.images, None, None, ("tokens",))["tokens"]
    fixture.close(
        "predictions and targets",
        "feature_target",
        features_of_teacher,
        expected["feature_target"],
        limit,
        "float64",
    )

    def of_hidden(rows: Tensor) -> Tensor:
        return rows.take_along_dim(hidden[:, :, None], dim=1)

    # the published code also predicts what is seen; losses read the hidden patches alone, and so
    # does this package
    features = of_hidden(expected["feature_pred"])
    fixture.close(
        "predictions and targets", "feature_pred", outputs["features"], features, limit, "float64"
    )
    pixels = of_hidden(patchify(expected["pixel_pred"], patch))
    fixture.close(
        "predictions and targets", "pixel_pred", outputs["pixels"], pixels, limit, "float64"
    )
    everything = torch.arange(num_patches).expand(len(batch), -1)
    target = pixel_targets(batch.images, everything, num_patches, norm_pix=True, kind="channel")
    want = patchify(expected["pixel_target"], patch)
    fixture.close("predictions and targets", "pixel_target", target, want, limit, "float64")
    mask = torch.zeros(batch.ids_shuffle.shape).scatter(1, hidden, 1.0)  # [B, L], 1 = hidden
    fixture.close("masks", "loss_mask", mask, expected["loss_mask"].flatten(1), EXACT, "float64")
    if weighted:
        weights = torch.zeros(mask.shape, dtype=torch.float64).scatter(
            1, hidden, crowding(batch).double()
        )
        fixture.close(
            "masks", "weight_mask", weights, expected["weight_mask"].flatten(1), limit, "float64"
        )


def bootmae_schedules(fixture: Fixture) -> None:
    """The moving average's momentum by epochs, the learning rate, and what masks of boxes look
    like.
    """
    limit = Limit(float(fixture.tolerance("float64")), 0.0)
    for epoch, base, dynamic, want in fixture.value("ema_decay"):
        got = epoch_momentum(epoch, base=base, dynamic=dynamic)
        fixture.close("momenta", f"epoch {epoch} from {base}", got, want, limit, "float64")
    stated = fixture.value("cosine_scheduler")
    args = stated["args"]
    each = args["niter_per_ep"]
    warmup = args["warmup_epochs"] * args["niter_per_ep"]
    for index, want in enumerate(stated["values"]):
        # the published table reaches its height one step early and stands on it for two: the
        # warm-up's last is 1 here
        step = index if index >= warmup else index * warmup / (warmup - 1)
        got = args["base_value"]
        if step < warmup or index > warmup:
            got = warmup_half_cosine(
                step,
                warmup_steps=warmup,
                total_steps=args["epochs"] * each,
                lr=args["base_value"],
                min_lr=args["final_value"],
            )
        fixture.close("learning rates", f"step {index}", got, want, limit, "float64")
    config = fixture.config
    masks = fixture.arrays("block_masks.safetensors")["masks"].bool()
    side = config["grid"]
    drawn = BlockMask(
        (side, side),
        num_visible=side**2 - config["num_mask_patches"],
        num_boxed=config["num_mask_patches"],
        smallest=config["min_mask_patches_per_block"],
        largest=config["max_mask_patches_per_block"],
    )
    ours = torch.stack([torch.from_numpy(drawn.boxes(0, position)) for position in range(500)])
    for name, found in (("recorded", masks), ("drawn", ours)):
        counts = found.flatten(1).sum(dim=1)
        fixture.true(
            "boxes",
            f"{name}: as many hidden in each",
            bool((counts == config["num_mask_patches"]).all()),
            f"{counts.min()} to {counts.max()}, wanted {config['num_mask_patches']}",
        )
    # how compact they are: hidden neighbours of hidden patches; within five deviations of the
    # difference of means
    theirs, mine = (neighbours(found) for found in (masks, ours))
    deviation = (theirs.var() / len(theirs) + mine.var() / len(mine)).sqrt().item()
    fixture.close(
        "boxes", "neighbours hidden together", mine.mean(), theirs.mean(), Limit(5 * deviation, 0.0)
    )


def neighbours(masks: Tensor) -> Tensor:
    """For each mask [n, rows, columns], how many pairs of adjacent patches it hides."""
    across = (masks[:, :, 1:] & masks[:, :, :-1]).flatten(1).sum(dim=1)
    return (across + (masks[:, 1:] & masks[:, :-1]).flatten(1).sum(dim=1)).double()
