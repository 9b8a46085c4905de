"""Reconstruction-consistent masked autoencoding (Lee et al., ICLR 2023): agree with a moving
average of oneself, too.

The teacher sees the same patches; its prediction of the hidden ones is a second target,
unnormalised as it comes (section 3). Not done: the consistency on visible patches, which neither
the paper's loss nor the published one has."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from rcmae.data.batch import Batch
from rcmae.objectives.mae import PixelNorm, Reconstruction, squared_error
from rcmae.objectives.terms import Sum, hidden_patches, widen


def RCMAE(
    norm_pix_loss: bool = True, consistency_weight: float = 1.0, pixel_norm: PixelNorm = "unbiased"
) -> Sum:
    """Error to the pixels plus `consistency_weight` times the error to the teacher, both on the
    hidden patches.
    """
    return Sum(
        {
            "reconstruction": Reconstruction(norm_pix_loss, pixel_norm),
            "consistency": Consistency(consistency_weight),
        }
    )


@dataclass(frozen=True)
class Consistency:
    """Squared error to the teacher's predictions of the hidden patches."""

    weight: float = 1.0
    student: str = field(default="pixels", init=False)
    teacher: str = field(default="pixels", init=False)

    def count(self, batch: Batch) -> int:
        """Hidden patches."""
        return hidden_patches(batch)

    def total(self, seen: Tensor, taught: Tensor | None, batch: Batch, progress: float) -> Tensor:
        """Sum over hidden patches of the mean over their pixels; both [B, hidden, p*p*C]."""
        assert taught is not None
        return squared_error(seen, widen(taught))
