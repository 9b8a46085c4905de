"""Masked autoencoding (He et al., CVPR 2022): predict the pixels of the hidden patches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcmae.batch import Batch
from rcmae.vit import patches_at

NORM_EPS = 1e-6  # added to a patch's variance


def pixel_targets(images: Tensor, ids: Tensor, num_patches: int, *, norm_pix: bool) -> Tensor:
    """What is to be predicted for the patches `ids` [B, n]: their pixels [B, n, p*p*C], in the order of `patchify`.

    Args:
        images: [B, C, H, W] normalised.
        ids: raster indices.
        num_patches: in an image; it gives the side of a patch.
        norm_pix: each patch less its mean, over its deviation (of the unbiased variance) (MAE, section 4.2).
    """
    patch_size = math.isqrt(images.shape[2] * images.shape[3] // num_patches)
    pixels = widen(patches_at(images, patch_size, ids).permute(0, 1, 3, 4, 2).flatten(2))
    if not norm_pix:
        return pixels
    variance, mean = torch.var_mean(pixels, dim=2, keepdim=True)
    return (pixels - mean) * torch.rsqrt(variance + NORM_EPS)


def squared_error(pred: Tensor, target: Tensor) -> Tensor:
    """Sum over patches of the mean over a patch's pixels of the squared difference; both [B, n, p*p*C]."""
    return F.mse_loss(widen(pred), target, reduction="sum") / pred.shape[2]


def widen(values: Tensor) -> Tensor:
    """Losses are computed in float32, whatever the model computes in; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()


@dataclass(frozen=True)
class MAE:
    """Mean squared error on the hidden patches."""

    norm_pix_loss: bool = True
    needs_teacher: bool = field(default=False, init=False)

    @property
    def weights(self) -> dict[str, float]:
        """Each term's weight in the total loss."""
        return {"reconstruction": 1.0}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Hidden patches of the micro-batch."""
        return {"reconstruction": len(batch) * (batch.ids_shuffle.shape[1] - batch.num_visible)}

    def __call__(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, progress: float
    ) -> dict[str, Tensor]:
        """Sum over hidden patches; `teacher` and `progress` play no part."""
        pred = student(batch.images, batch.ids_shuffle, batch.num_visible)  # [B, hidden, p*p*C]
        return {"reconstruction": squared_error(pred, hidden_targets(batch, norm_pix=self.norm_pix_loss))}


def hidden_targets(batch: Batch, *, norm_pix: bool) -> Tensor:
    """`pixel_targets` of the patches that the encoder did not see, in the order of the predictions."""
    hidden = batch.ids_shuffle[:, batch.num_visible :]
    return pixel_targets(batch.images, hidden, batch.ids_shuffle.shape[1], norm_pix=norm_pix)
