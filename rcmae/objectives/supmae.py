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
from rcmae.objectives.mae import PixelNorm, Reconstruction
from rcmae.objectives.terms import Sum, widen


def SupMAE(
    norm_pix_loss: bool = True,
    class_weight: float = 0.01,
    class_temperature: float = 10.0,
    class_smoothing: float = 0.0,
    pixel_norm: PixelNorm = "unbiased",
) -> Sum:
    """Error to the pixels of the hidden patches plus `class_weight` times the error of the
    class.
    """
    return Sum(
        {
            "reconstruction": Reconstruction(norm_pix_loss, pixel_norm),
            "class": Classification(class_weight, class_temperature, class_smoothing),
        }
    )


@dataclass(frozen=True)
class Classification:
    """Cross entropy of the logits over a temperature, of the images that have a label."""

    weight: float = 0.01
    temperature: float = 10.0
    smoothing: float = 0.0  # this much of the target is spread evenly over all classes
    student: str = field(default="classes", init=False)
    teacher: None = field(default=None, init=False)

    def count(self, batch: Batch) -> int:
        """Labelled images; waits for the device where the labels are on one."""
        return 0 if batch.labels is None else int((batch.labels != NO_LABEL).sum())

    def total(self, seen: Tensor, taught: Tensor | None, batch: Batch, progress: float) -> Tensor:
        """Sum over labelled images; `seen`: logits [B, classes]."""
        logits = widen(seen) / self.temperature
        if batch.labels is None:
            return logits.sum() * 0.0  # every rank's backward pass goes the same way
        return F.cross_entropy(
            logits,
            batch.labels,
            ignore_index=NO_LABEL,
            label_smoothing=self.smoothing,
            reduction="sum",
        )
