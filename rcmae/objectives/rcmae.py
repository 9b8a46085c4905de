"""Reconstruction-consistent masked autoencoding (Lee et al., ICLR 2023): agree with a moving average of oneself, too.

The teacher sees the same patches; its prediction of the hidden ones is a second target, unnormalised as it comes
(section 3). Not done: the consistency on visible patches, which neither the paper's loss nor the published one has.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rcmae.batch import Batch
from rcmae.objectives.mae import hidden_targets, squared_error, widen


@dataclass(frozen=True)
class RCMAE:
    """Error to the pixels plus `consistency_weight` times the error to the teacher, both on the hidden patches."""

    norm_pix_loss: bool = True
    consistency_weight: float = 1.0
    needs_teacher: bool = field(default=True, init=False)

    @property
    def weights(self) -> dict[str, float]:
        """Each term's weight in the total loss."""
        return {"reconstruction": 1.0, "consistency": self.consistency_weight}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Hidden patches of the micro-batch, for both terms."""
        hidden = len(batch) * (batch.ids_shuffle.shape[1] - batch.num_visible)
        return {"reconstruction": hidden, "consistency": hidden}

    def __call__(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, progress: float
    ) -> dict[str, Tensor]:
        """Sums over hidden patches; `progress` plays no part."""
        assert teacher is not None
        with torch.no_grad():  # before the student's activations take their memory
            teacher_pred = teacher(batch.images, batch.ids_shuffle, batch.num_visible)  # [B, hidden, p*p*C]
        pred = student(batch.images, batch.ids_shuffle, batch.num_visible)
        return {
            "reconstruction": squared_error(pred, hidden_targets(batch, norm_pix=self.norm_pix_loss)),
            "consistency": squared_error(pred, widen(teacher_pred)),
        }
