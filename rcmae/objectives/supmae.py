"""Supervised masked autoencoding (Liang et al., 2022): tell the image's class from its visible
patches, too.

The class is read from the encoder's visible tokens alone (section 3), so it costs next to nothing.
Images without a label (-100) are reconstructed like the others; they count in the head's batch
norm, which is a matter of images, and not in the class loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional as F

from rcmae.data.batch import NO_LABEL, Batch
from rcmae.objectives.mae import Reconstruction
from rcmae.objectives.options import ClassOptions, SupMAEOptions
from rcmae.objectives.protocol import Context
from rcmae.objectives.terms import Sum, widen


class SupMAE:
    """Error to the pixels of the hidden patches plus `class_weight` times that of the class."""

    Options = SupMAEOptions

    @staticmethod
    def make(options: SupMAEOptions, context: Context) -> Sum:
        """The loss."""
        return Sum(
            {
                "reconstruction": Reconstruction(options.norm_pix_loss, options.norm),
                "class": Classification.make(options.class_weight, options, context),
            }
        )


@dataclass(frozen=True)
class Classification:
    """Cross entropy of the logits over a temperature, of the images that have a label."""

    weight: float = 0.01
    temperature: float = 10.0
    smoothing: float = 0.0  # this much of the target is spread evenly over all classes
    student_output: str = field(default="classes", init=False)
    teacher_output: None = field(default=None, init=False)

    @classmethod
    def make(cls, weight: float, options: ClassOptions, context: Context) -> Classification:
        """The term, to be added to an objective."""
        return cls(weight, options.class_temperature, options.class_smoothing)

    def count(self, batch: Batch) -> int:
        """Labelled images; waits for the device where the labels are on one."""
        return 0 if batch.labels is None else int((batch.labels != NO_LABEL).sum())

    def total(
        self, student: Tensor, teacher: Tensor | None, batch: Batch, progress: float
    ) -> Tensor:
        """Sum over labelled images; `student`: logits [B, classes]."""
        logits = widen(student) / self.temperature
        if batch.labels is None:
            return logits.sum() * 0.0  # every rank's backward pass goes the same way
        return F.cross_entropy(
            logits,
            batch.labels,
            ignore_index=NO_LABEL,
            label_smoothing=self.smoothing,
            reduction="sum",
        )
