"""RC-MAE: student and teacher, and trainings in which the teacher follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rcmae.engines.schedules import warmup_half_cosine
from rcmae.engines.teacher import Teacher
from rcmae.models.patches import patchify
from rcmae.models.vit import MaskedAutoencoder
from rcmae.objectives import new
from rcmae.objectives.mae import pixel_targets

from .fixture import PRECISIONS, Fixture, Unusable
from .networks import (
    build,
    case_of,
    check_grads,
    check_mask,
    check_trained,
    gradients,
    losses,
    masked,
    optimizer_for,
    update,
)
from .schedules import Kind, published_momentum


def rcmae_forward(fixture: Fixture) -> None:
    """Student and teacher on the same masked images: targets, predictions, losses and gradients
    for each weight.
    """
    for precision, dtype in PRECISIONS.items():
        limits = fixture.limits(precision)
        student = build(fixture, "student.safetensors", dtype)
        teacher = build(fixture, "teacher.safetensors", dtype).requires_grad_(False)
        inputs = fixture.arrays("inputs.safetensors")
        expected = dict(fixture.arrays("expected.safetensors"))
        batch = masked(fixture, inputs["images"], inputs["noise"], dtype)
        check_mask(fixture, batch, expected)
        mask = (batch.ids_shuffle, batch.num_visible)
        everything = torch.arange(student.num_patches).expand(len(batch), -1)
        outputs = {
            "latent": student.encode(batch.images, batch.ids_shuffle[:, : batch.num_visible]),
            "student_pred": student(batch.images, *mask, ("all_pixels",))["all_pixels"],
            "teacher_pred": teacher(batch.images, *mask, ("all_pixels",))["all_pixels"],
            "target": patchify(batch.images, student.patch_size),
            "target_norm_pix": pixel_targets(
                batch.images, everything, student.num_patches, norm_pix=True
            ),
        }
        fixture.all_close(
            "predictions and targets", outputs, expected, limits.activation, precision
        )
        files = {file: case_of(fixture.meaning(file)) for file in fixture.files("grads.*")}
        for case, stated in fixture.value("cases").items():
            norm_pix = stated["norm_pix_loss"]
            gamma = stated["gamma"]
            objective = new("rcmae", norm_pix_loss=norm_pix, consistency_weight=gamma)
            loss, terms = losses(objective, student, teacher, batch)
            found = {
                "mae_loss": terms["reconstruction"],
                "consistency_loss": terms["consistency"],
                "total_loss": loss,
            }
            for name, value in found.items():
                fixture.close(
                    "losses", f"{case} {name}", value, stated[name], limits.loss, precision
                )
            grads = gradients(student, loss)
            check_grads(fixture, case, grads, stated, precision)
            for file, of in files.items():
                if of == {"norm_pix": norm_pix, "gamma": gamma}:
                    fixture.all_close(
                        "gradients", grads, fixture.arrays(file), limits.gradient, precision
                    )


class TrainCase(NamedTuple):
    """One recorded training: what it is called, and when the teacher moves with which momentum."""

    rows: str  # value: what was logged at each optimizer step
    student: str  # files
    teacher: str
    kind: Kind  # schedule of the momentum
    each_micro_step: bool  # whether the teacher moves at each, or at optimizer steps only
    # value: what it was at each micro-step, 1 where the teacher was left alone
    momentum: str | None = None


def rcmae_train(fixture: Fixture) -> None:
    """Training steps over some epochs, the momentum indexed as published and as it was meant."""
    kinds: dict[str, Kind] = {"official": "published", "global_step": "cosine"}
    cases = [
        TrainCase(
            f"{case}_steps",
            f"{case}_student.safetensors",
            f"{case}_teacher.safetensors",
            kind,
            True,
        )
        for case, kind in kinds.items()
    ]
    check_training(fixture, cases)
    base, per_epoch, epochs = (
        fixture.config[key] for key in ("momentum_teacher", "iters", "epochs")
    )
    name = "momentum_schedule"
    limit = fixture.limits("float64").loss
    schedule = [
        published_momentum(index, "cosine", base, per_epoch, epochs)
        for index in range(epochs * per_epoch)
    ]
    fixture.close("momenta", name, schedule, fixture.value(name), limit, "float64")


def rcmae_train_accum(fixture: Fixture) -> None:
    """The same with accumulation: the teacher moved at each micro-step (published), or at
    optimizer steps.
    """
    check_training(
        fixture,
        [
            TrainCase(
                "official_rows",
                "student.safetensors",
                "official_teacher.safetensors",
                "published",
                True,
                "official_momentum",
            ),
            TrainCase(
                "ema_on_update_rows",
                "ema_on_update_student.safetensors",
                "ema_on_update_teacher.safetensors",
                "cosine",
                False,
                "ema_on_update_momentum",
            ),
        ],
    )


def check_training(fixture: Fixture, cases: Sequence[TrainCase]) -> None:
    """Train as each case says, in each precision, and compare rows, weights, teacher, moments
    and groups.
    """
    for precision, dtype in PRECISIONS.items():
        for case in cases:
            student = build(fixture, "init.safetensors", dtype)
            teacher = build(fixture, "init.safetensors", dtype).requires_grad_(False)
            optimizer = optimizer_for(
                student, fixture.config["weight_decay"], fixture.config["betas"]
            )
            check_groups(fixture, optimizer)
            train(fixture, case, student, teacher, optimizer, precision)
            check_trained(fixture, case.student, dict(student.named_parameters()), precision)
            check_trained(fixture, case.teacher, dict(teacher.named_parameters()), precision)
            for file in fixture.files(f"{case.rows.split('_')[0]}_adamw_state.safetensors"):
                moments = {
                    f"{name}.{key}": moment
                    for name, param in student.named_parameters()
                    for key, moment in optimizer.state[param].items()
                }
                check_trained(fixture, file, moments, precision)


def train(
    fixture: Fixture,
    case: TrainCase,
    student: MaskedAutoencoder,
    teacher: MaskedAutoencoder,
    optimizer: torch.optim.Optimizer,
    precision: str,
) -> None:
    """The recorded micro-steps, compared row by row."""
    config = fixture.config
    limits = fixture.limits(precision)
    accumulation = config["accum_iter"]
    per_epoch = config["iters"]
    if per_epoch % accumulation:
        raise Unusable(f"config.iters={per_epoch} is not divisible by accum_iter={accumulation}")
    objective = new(
        "rcmae", norm_pix_loss=config["norm_pix_loss"], consistency_weight=config["gamma"]
    )
    move_teacher = moving_average(student, teacher)
    inputs = fixture.arrays("inputs.safetensors")
    rows = fixture.value(case.rows)
    each = 1 if case.each_micro_step else accumulation
    momenta = []
    for micro, (images, noise) in enumerate(zip(inputs["images"], inputs["noise"], strict=True)):
        loss, terms = losses(
            objective, student, teacher, masked(fixture, images, noise, PRECISIONS[precision])
        )
        (loss / accumulation).backward()
        step = micro // accumulation
        last = (micro + 1) % accumulation == 0
        lr = _rate(config, step)
        if last:
            update(optimizer, lr)
        momentum = 1.0
        if case.each_micro_step or last:
            momentum = published_momentum(
                micro // each,
                case.kind,
                config["momentum_teacher"],
                per_epoch // each,
                config["epochs"],
            )
            move_teacher(momentum)
        momenta.append(momentum)
        if last:
            found = {"train_loss": loss, "lr": lr, "momentum": momentum}
            found |= {"s_loss": terms["reconstruction"], "rec_cons_loss": terms["consistency"]}
            found |= {"student_l2": l2(student), "teacher_l2": l2(teacher)}
            what = f"{case.rows.rpartition('_')[0]} losses, rates and norms"
            for key in found.keys() & rows[step].keys():
                fixture.close(
                    what, f"{key} {step}", found[key], rows[step][key], limits.loss, precision
                )
    if case.momentum:
        fixture.close(
            "momenta", case.momentum, momenta, fixture.value(case.momentum), limits.loss, precision
        )


def _rate(config: Mapping[str, Any], step: int) -> float:
    """The learning rate of an optimizer step."""
    steps_per_epoch = config["iters"] / config["accum_iter"]
    return warmup_half_cosine(
        step,
        warmup_steps=config["warmup_epochs"] * steps_per_epoch,
        total_steps=config["epochs"] * steps_per_epoch,
        lr=config["lr"],
        min_lr=config["min_lr"],
    )


def moving_average(student: nn.Module, teacher: nn.Module) -> Callable[[float], None]:
    """What moves the teacher: in float32 the package's own.

    In float64, which that one does not keep, its formula.
    """
    masters = [param.data for param in student.parameters()]
    copies = [param.data for param in teacher.parameters()]
    if masters[0].dtype == torch.float32:
        return Teacher(masters, copies).update

    def update(momentum: float) -> None:
        torch._foreach_lerp_(copies, masters, 1.0 - momentum)

    return update


def l2(model: nn.Module) -> Tensor:
    """L2 norm of all parameters and position tables."""
    arrays = [*model.parameters(), *model.buffers()]
    return torch.stack([array.detach().double().norm() for array in arrays]).norm()


def check_groups(fixture: Fixture, optimizer: torch.optim.Optimizer) -> None:
    """Which parameters decay."""
    for value, decays in (("no_decay", False), ("decay", True)):
        if fixture.has(value):
            groups = [
                group
                for group in optimizer.param_groups
                if group["name"].endswith("_no_decay") != decays
            ]
            names = {name for group in groups for name in group["param_names"]}
            fixture.true(
                "decay groups",
                value,
                names == set(fixture.value(value)),
                "other names than recorded",
            )
