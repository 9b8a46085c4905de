"""What an objective is, here or in anybody's module (`objective.name=MODULE:NAME`).

MODULE:NAME names a `Factory`: a class, or anything else with `make`, and with `Options` where the
objective has some. `make` gives an `Objective`, which knows no engine, rank or run. Most are a
`terms.Sum` of a few terms, and then `objective.terms` adds shipped ones to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rcmae.data.batch import Batch


@dataclass(frozen=True)
class Context:
    """What an objective may know of the run besides its options; None where nothing is run."""

    epochs: float | None = None  # in the whole run
    steps: int | None = None  # in the whole run


class Factory(Protocol):
    """What MODULE:NAME names.

    It may have an attribute `Options`, a pydantic model: the keys of `objective.options`. Where the
    loss reads other outputs of the networks than the student's `pixels`, the model says so in
    `reads`: a `rcmae.config.Reads`, as attribute or property.
    """

    def make(self, options: Any, context: Context) -> Objective:
        """The objective; `options`: an instance of `Options`."""


class Objective(Protocol):
    """A loss: total = sum over terms of weights[term] * sum[term] / count[term], both over the
    whole step.

    It gives *sums* over a micro-batch and counts from the data alone what they are divided by; the
    loop divides by the count of the whole step over all ranks, so that a loss never depends on how
    the step was split. Not done: a mean per micro-batch, which would.
    """

    @property
    def needs_teacher(self) -> bool:
        """Whether `teacher` is called."""

    @property
    def teacher_outputs(self) -> tuple[str, ...]:
        """The outputs it is asked for: the teacher consists of the parts that give these."""

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
