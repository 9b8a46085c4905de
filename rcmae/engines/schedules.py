"""What the learning rate and the teacher's momentum are at each step: pure functions of numbers,
no state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Shape:
    """How a learning rate falls over a training, apart from its warm-up.

    `cosine`: half a cosine (SGDR, Loshchilov and Hutter, 2017). `poly`: (1 - done) to a power
    (DeepLab). `steps`: a tenth at each milestone (Mask R-CNN). `wsd`: stays, then falls over the
    last part (warm-up, stable, decay; Hu et al., 2024), linearly or by 1 - sqrt (Haegele et al.,
    2024): nothing before that part depends on when the training ends.
    """

    name: Literal["cosine", "poly", "steps", "wsd"] = "cosine"
    power: float = 1.0
    milestones: tuple[float, ...] = ()  # parts of the training
    cooldown: float = 0.2  # part of the training
    curve: Literal["linear", "1-sqrt"] = "linear"  # of the cooldown

    def at(self, done: float) -> float:
        """The part of the full rate at a part of the training: 1 at its beginning; both 0 to 1."""
        if self.name == "poly":
            return (1.0 - done) ** self.power
        if self.name == "steps":
            return 0.1 ** sum(done >= milestone for milestone in self.milestones)
        if self.name == "wsd":
            left = min(1.0, (1.0 - done) / self.cooldown)
            return left if self.curve == "linear" else 1.0 - math.sqrt(1.0 - left)
        return 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Warmup:
    """How a learning rate rises at first.

    Args:
        steps: how long.
        start: part of the rate that the very first step has.
        kind: None: the shape begins after the warm-up, as MAE has it. "multiply": the warm-up is a
            factor on the falling rate, as mmcv has it. "to_schedule": a line to the value that the
            shape has at the end of the warm-up, as detectron2 has it.
    """

    steps: float
    start: float = 0.0
    kind: Literal["multiply", "to_schedule"] | None = None


def learning_rate(
    step: float, *, total_steps: float, lr: float, min_lr: float, shape: Shape, warmup: Warmup
) -> float:
    """The learning rate of an optimizer step, counted from 0.

    Args:
        step: which one.
        total_steps: of the training; the shape ends at it.
        lr: the full rate.
        min_lr: what the shape falls to; no part of the warm-up.
        shape, warmup: how it falls and rises.
    """

    def falling(done: float) -> float:
        return min_lr + (lr - min_lr) * shape.at(done)

    if warmup.kind is None:
        if step < warmup.steps:
            first = lr * warmup.start
            return first + lr * (1.0 - warmup.start) * step / warmup.steps
        return falling((step - warmup.steps) / (total_steps - warmup.steps))
    if step >= warmup.steps:
        return falling(step / total_steps)
    risen = step / warmup.steps
    if warmup.kind == "multiply":
        return falling(step / total_steps) * (1.0 - (1.0 - risen) * (1.0 - warmup.start))
    first = lr * warmup.start
    return first + (falling(warmup.steps / total_steps) - first) * risen


def warmup_half_cosine(
    step: float, *, warmup_steps: float, total_steps: float, lr: float, min_lr: float
) -> float:
    """The rate that MAE trains with (appendix A.1): linear from 0 to `lr`, then half a cosine down
    to `min_lr`, which plays no part in the warm-up.
    """
    return learning_rate(
        step,
        total_steps=total_steps,
        lr=lr,
        min_lr=min_lr,
        shape=Shape(),
        warmup=Warmup(warmup_steps),
    )


def teacher_momentum(
    update: int,
    *,
    kind: Literal["cosine", "constant", "published", "by_epoch"],
    base: float,
    end: float,
    total_updates: int,
    updates_per_epoch: int,
    dynamic: bool = True,
) -> float:
    """The momentum of an update of the teacher, counted from 0: teacher = m * teacher + (1 - m) *
    student.

    Args:
        update: which one, over the whole run.
        kind: "cosine" goes from `base` to `end` by half a cosine over the run (RC-MAE, section 4).
            "published" starts that curve again at every epoch, as the released code does, so that
            it stays close to `base`. "constant" stays at `base`. "by_epoch" is BootMAE's:
            `epoch_momentum`.
        base: momentum of the first update.
        end: momentum that the one after the last would have.
        total_updates: of the run: optimizer steps, or micro-steps where the teacher moves at each.
        updates_per_epoch: in the same unit; for "published" and "by_epoch" alone.
        dynamic: for "by_epoch" alone.
    """
    if kind == "constant":
        return base
    if kind == "by_epoch":
        return epoch_momentum(update // updates_per_epoch, base=base, dynamic=dynamic)
    place = update % updates_per_epoch if kind == "published" else update
    return end + 0.5 * (base - end) * (1.0 + math.cos(math.pi * place / total_updates))


def epoch_momentum(epoch: int, *, base: float, dynamic: bool) -> float:
    """BootMAE's momentum in an epoch, counted from 0 (its code): linear from `base` to 0.9999 at
    epoch 100.

    Then, where `dynamic`, linear to 0.99999 at epoch 400, where it stays.
    """
    if epoch < 100:
        return base + epoch / 100 * (0.9999 - base)
    return 0.9999 + min(300, epoch - 100) / 300 * (0.99999 - 0.9999) if dynamic else 0.9999
