"""An objective is a sum of named terms over what student and teacher give: pixels, features,
classes, tokens.

A term names the one output of each that it compares and gives a sum over the micro-batch with what
it counts. `Sum` calls each network once for all its terms, so `rcmae` and a class loss, or `mae`
and features of a teacher, share their forward passes and need no file of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rcmae.data.batch import Batch
from rcmae.models.protocol import Outputs

# set on a teacher whose weights may still be on their way when a step begins: the student computes
# first, and they arrive behind it
ARRIVES = "arrives"


class Term(Protocol):
    """A part of a loss."""

    @property
    def weight(self) -> float:
        """In the total loss."""

    @property
    def student_output(self) -> str:
        """The student's output that it reads, by the names of `models.protocol.Output`."""

    @property
    def teacher_output(self) -> str | None:
        """The teacher's, if any."""

    def count(self, batch: Batch) -> int:
        """What its sum over this micro-batch counts; from the data alone."""

    def total(
        self, student: Tensor, teacher: Tensor | None, batch: Batch, progress: float
    ) -> Tensor:
        """Its sum over this micro-batch, a float32 scalar (float64 for a float64 model).

        Args:
            student: the student's output.
            teacher: the teacher's, without a gradient; None where it asks for none.
            batch: images normalised.
            progress: 0 at the run's first step, 1 after its last.
        """


@dataclass(frozen=True)
class Sum:
    """An objective made of terms. What each method gives is said in `Objective`."""

    terms: Mapping[str, Term]

    @property
    def student_outputs(self) -> tuple[str, ...]:
        """What the student is asked for."""
        return tuple(sorted({term.student_output for term in self.terms.values()}))

    @property
    def teacher_outputs(self) -> tuple[str, ...]:
        """What the teacher is asked for: it consists of the parts that give this, and of no
        others.
        """
        asked = {term.teacher_output for term in self.terms.values()}
        return tuple(sorted(output for output in asked if output))

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares with one."""
        return bool(self.teacher_outputs)

    @property
    def weights(self) -> dict[str, float]:
        """Each term's weight in the total loss."""
        return {name: term.weight for name, term in self.terms.items()}

    def counts(self, batch: Batch) -> dict[str, int]:
        """What each term's sum counts."""
        return {name: term.count(batch) for name, term in self.terms.items()}

    def __call__(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, progress: float
    ) -> dict[str, Tensor]:
        """Each term's sum over this micro-batch."""
        targets: Outputs = {}
        waits = getattr(teacher, ARRIVES, False)
        if not waits:  # before the student's activations take their memory
            targets = self._targets(teacher, batch)
        preds = student_forward(student, batch, self.student_outputs)
        if waits:
            targets = self._targets(teacher, batch)
        sums = {}
        for name, term in self.terms.items():
            target = targets[term.teacher_output] if term.teacher_output else None
            sums[name] = term.total(preds[term.student_output], target, batch, progress)
        return sums

    def _targets(self, teacher: nn.Module | None, batch: Batch) -> Outputs:
        """What the terms ask of the teacher."""
        if not self.needs_teacher:
            return {}
        assert teacher is not None
        with torch.no_grad():
            return teacher_forward(teacher, batch, self.teacher_outputs)

    def plus(self, terms: Mapping[str, Term]) -> Sum:
        """This and more terms; one of the same name replaces."""
        return replace(self, terms={**self.terms, **terms})


def student_forward(student: nn.Module, batch: Batch, outputs: tuple[str, ...]) -> Outputs:
    """The student's outputs, with drop path where it has any."""
    network: Any = student if hasattr(student, "branches") else getattr(student, "module", student)
    keep = network.branches(batch.positions) if hasattr(network, "branches") else None
    given = {} if keep is None else {"keep": keep}
    found: Outputs = student(batch.images, batch.ids_shuffle, batch.num_visible, outputs, **given)
    return found


def teacher_forward(teacher: nn.Module, batch: Batch, outputs: tuple[str, ...]) -> Outputs:
    """The teacher's outputs, pixels for the patches hidden from the student: under its mask, or
    under one of its own.

    Under its own it may have seen some of them; what it predicts there, too, is what is compared
    (RC-MAE, section 5)."""
    if batch.teacher_ids is None or "pixels" not in outputs:
        found: Outputs = teacher(batch.images, batch.ids_shuffle, batch.num_visible, outputs)
        return found
    every = teacher(batch.images, batch.teacher_ids, batch.num_visible, ("all_pixels",))
    pred = every["all_pixels"]  # [B, L, p*p*C] in raster order
    hidden = batch.ids_shuffle[:, batch.num_visible :, None]
    found = {"pixels": pred.take_along_dim(hidden, dim=1)}
    if "tokens" in outputs:
        found |= teacher(batch.images, None, None, ("tokens",))
    return found


def hidden_patches(batch: Batch) -> int:
    """Hidden patches of the micro-batch."""
    return len(batch) * (batch.ids_shuffle.shape[1] - batch.num_visible)


def widen(values: Tensor) -> Tensor:
    """Losses are computed in float32, whatever the model computes in; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()
