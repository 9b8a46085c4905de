"""What the learning rate and the teacher's momentum are at each step: pure functions of numbers,
no state.
"""

from __future__ import annotations

import math
from typing import Literal


def warmup_half_cosine(
    step: float, *, warmup_steps: float, total_steps: float, lr: float, min_lr: float
) -> float:
    """The learning rate of an optimizer step, counted from 0 (MAE, appendix A.1).

    Linear from 0, which the very first step has, to `lr` over `warmup_steps`; then half a cosine
    down to `min_lr` at `total_steps`. `min_lr` plays no part in the warm-up.
    """
    if step < warmup_steps:
        return lr * step / warmup_steps
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * done))


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
