"""What the student is asked to do: a callable over (student, teacher, batch, progress) that knows
no engine or rank.

An objective gives *sums* over a micro-batch, one a term, and tells from the data alone what they
count; the loop divides by the count of the whole step over all ranks, so a loss never depends on
how the step was cut. Not done: a mean per micro-batch, which would. Each published objective is a
file; `TERMS` can be added to any of them (`Sum.plus`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from rcmae.data.batch import Batch
from rcmae.objectives.bootmae import BootMAE, Features
from rcmae.objectives.mae import MAE, Reconstruction
from rcmae.objectives.rcmae import RCMAE, Consistency
from rcmae.objectives.supmae import Classification, SupMAE
from rcmae.objectives.terms import Sum, Term

__all__ = ["MAE", "OBJECTIVES", "RCMAE", "TERMS", "BootMAE", "Objective", "Sum", "SupMAE"]


class Objective(Protocol):
    """One task.

    total = sum over terms of weights[term] * sum[term] / count[term], both over the whole step.
    """

    @property
    def needs_teacher(self) -> bool:
        """Whether `teacher` is called."""

    @property
    def weights(self) -> dict[str, float]:
        """Each term's weight in the total loss."""

    def counts(self, batch: Batch) -> dict[str, int]:
        """What each term's sum over this micro-batch counts.

        Known from the data alone: add it up over the step.
        """

    def __call__(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, progress: float
    ) -> dict[str, Tensor]:
        """Each term's sum over this micro-batch, a float32 scalar (float64 for a float64 model).

        Args:
            student: called once, with gradients.
            teacher: called without, where `needs_teacher`.
            batch: images normalised.
            progress: 0 at the run's first step, 1 after its last.
        """


OBJECTIVES: dict[str, Callable[..., Sum]] = {
    "mae": MAE,
    "rcmae": RCMAE,
    "supmae": SupMAE,
    "bootmae": BootMAE,
}
TERMS: dict[str, Callable[..., Term]] = {
    "reconstruction": Reconstruction,
    "consistency": Consistency,
    "class": Classification,
    "features": Features,
}
