"""Reconstruction-consistent masked autoencoding (Lee et al., ICLR 2023): agree with a moving
average of oneself, too.

The teacher sees the same patches; its prediction of the hidden ones is a second target,
unnormalised as it comes (section 3). Not done: the consistency on visible patches, which neither
the paper's loss nor the published one has."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from rcmae.data.batch import Batch
from rcmae.objectives.mae import Reconstruction, squared_error
from rcmae.objectives.options import ConsistencyOptions, RCMAEOptions
from rcmae.objectives.protocol import Context
from rcmae.objectives.terms import Sum, hidden_patches, widen


class RCMAE:
    """Error to the pixels plus `consistency_weight` times the error to the teacher, both on the
    hidden patches.
    """

    Options = RCMAEOptions

    @staticmethod
    def make(options: RCMAEOptions, context: Context) -> Sum:
        """The loss."""
        return Sum(
            {
                "reconstruction": Reconstruction(options.norm_pix_loss, options.norm),
                "consistency": Consistency(options.consistency_weight),
            }
        )


@dataclass(frozen=True)
class Consistency:
    """Squared error to the teacher's predictions of the hidden patches."""

    weight: float = 1.0
    student_output: str = field(default="pixels", init=False)
    teacher_output: str = field(default="pixels", init=False)

    @classmethod
    def make(cls, weight: float, options: ConsistencyOptions, context: Context) -> Consistency:
        """The term, to be added to an objective."""
        return cls(weight)

    def count(self, batch: Batch) -> int:
        """Hidden patches."""
        return hidden_patches(batch)

    def total(
        self, student: Tensor, teacher: Tensor | None, batch: Batch, progress: float
    ) -> Tensor:
        """Sum over hidden patches of the mean over their pixels; both [B, hidden, p*p*C]."""
        assert teacher is not None
        return squared_error(student, widen(teacher))
