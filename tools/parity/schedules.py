"""Learning rates and momenta, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from rcmae.data.masking import visible_count
from rcmae.engines.schedules import teacher_momentum, warmup_half_cosine

from .fixture import EXACT, Fixture

Kind = Literal["cosine", "constant", "published"]


def published_momentum(
    update: int, kind: Kind, base: float, updates_per_epoch: int, epochs: int
) -> float:
    """The teacher's momentum as recorded: it ends at 1."""
    return teacher_momentum(
        update,
        kind=kind,
        base=base,
        end=1.0,
        total_updates=epochs * updates_per_epoch,
        updates_per_epoch=updates_per_epoch,
    )


def lr_schedule(fixture: Fixture) -> None:
    """The learning rate at each step, and how many patches a mask ratio leaves."""
    for case in fixture.value("schedules"):
        for epoch, iteration, _, lr, scaled in case["rows"]:
            for name, want, scale in (("lr", lr, 1.0), ("lr with lr_scale 0.5", scaled, 0.5)):
                got = scale * warmup_half_cosine(
                    epoch * case["iters"] + iteration,
                    warmup_steps=case["warmup_epochs"] * case["iters"],
                    total_steps=case["epochs"] * case["iters"],
                    lr=case["lr"],
                    min_lr=case["min_lr"],
                )
                fixture.same(
                    "learning rates", f"{name} at epoch {epoch} iteration {iteration}", got, want
                )
    for patches, ratio, kept in fixture.value("len_keep"):
        what = f"{patches} patches, mask_ratio {ratio}"
        fixture.close("patches kept", what, visible_count(patches, ratio), kept, EXACT, "float64")


def momentum_schedule(fixture: Fixture) -> None:
    """The teacher's momentum at each step, as published and as meant."""
    for case in fixture.value("cases"):
        schedule_of = [case["momentum_teacher"], case["iters_per_epoch"], case["epochs"]]
        total = case["epochs"] * case["iters_per_epoch"]
        schedule = [published_momentum(update, "cosine", *schedule_of) for update in range(total)]
        fixture.same("momenta", "length", len(schedule), case["length"])
        parts = {
            "schedule": schedule,
            "head": schedule[: len(case["head"])],
            "tail": schedule[-len(case["tail"]) :],
        }
        for name, part in parts.items():
            if case[name] is not None:
                fixture.same("momenta", name, part, case[name])
        for epoch, iteration, published, meant in case["rows"]:
            place = epoch * case["iters_per_epoch"] + iteration
            kinds: dict[Kind, float] = {"published": published, "cosine": meant}
            for kind, want in kinds.items():
                got = published_momentum(place, kind, *schedule_of)
                fixture.same("momenta", f"{kind}, epoch {epoch} iteration {iteration}", got, want)
    if fixture.has("cosine_scheduler_with_warmup"):
        fixture.leave_out(
            "cosine_scheduler_with_warmup",
            "the teacher's momentum has no warm-up, in RC-MAE or here",
        )


def rate_at(config: Mapping[str, Any], step: int, per_epoch: int) -> float:
    """The learning rate of a step of a folder's schedule."""
    return warmup_half_cosine(
        step,
        warmup_steps=config["warmup_epochs"] * per_epoch,
        total_steps=config["epochs"] * per_epoch,
        lr=config["lr"],
        min_lr=config["min_lr"],
    )
