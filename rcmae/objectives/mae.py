"""Masked autoencoding (He et al., CVPR 2022): predict the pixels of the hidden patches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from rcmae.data.batch import Batch
from rcmae.models.patches import patches_at
from rcmae.objectives.options import MAEOptions, PixelNorm
from rcmae.objectives.protocol import Context
from rcmae.objectives.terms import Sum, hidden_patches, widen

# added to the variance
NORM_EPS: dict[PixelNorm, float] = {"unbiased": 1e-6, "biased": 1e-6, "channel": 1e-5}


class MAE:
    """Mean squared error on the hidden patches."""

    Options = MAEOptions

    @staticmethod
    def make(options: MAEOptions, context: Context) -> Sum:
        """The loss."""
        weight_mask = bool(options.weight_mask)
        return Sum(
            {"reconstruction": Reconstruction(options.norm_pix_loss, options.norm, weight_mask)}
        )


@dataclass(frozen=True)
class Reconstruction:
    """Squared error to the pixels of the hidden patches."""

    norm_pix_loss: bool = True
    pixel_norm: PixelNorm = "unbiased"
    weight_mask: bool = False  # patches count by how hidden their surroundings are: `crowding`
    weight: float = field(default=1.0, init=False)
    student_output: str = field(default="pixels", init=False)
    teacher_output: None = field(default=None, init=False)

    def count(self, batch: Batch) -> int:
        """Hidden patches."""
        return hidden_patches(batch)

    def total(
        self, student: Tensor, teacher: Tensor | None, batch: Batch, progress: float
    ) -> Tensor:
        """Sum over hidden patches of the mean over their pixels; `student`: [B, hidden, p*p*C]."""
        target = hidden_targets(batch, norm_pix=self.norm_pix_loss, kind=self.pixel_norm)
        return squared_error(student, target, crowding(batch) if self.weight_mask else None)


def pixel_targets(
    images: Tensor, ids: Tensor, num_patches: int, *, norm_pix: bool, kind: PixelNorm = "unbiased"
) -> Tensor:
    """What is to be predicted for the patches `ids` [B, n]: their pixels [B, n, p*p*C], in the
    order of `patchify`.

    Args:
        images: [B, C, H, W] normalised.
        ids: raster indices.
        num_patches: in an image; it gives the side of a patch.
        norm_pix: each patch less its mean, over its deviation (MAE, section 4.2).
        kind: of the mean and variance: see `pixel_statistics`.
    """
    patch_size = math.isqrt(images.shape[2] * images.shape[3] // num_patches)
    pixels = widen(patches_at(images, patch_size, ids).permute(0, 1, 3, 4, 2).flatten(2))
    if not norm_pix:
        return pixels
    mean, variance = pixel_statistics(pixels, images.shape[1], kind)
    return (pixels - mean) * torch.rsqrt(variance)


def pixel_statistics(pixels: Tensor, channels: int, kind: PixelNorm) -> tuple[Tensor, Tensor]:
    """Mean and variance that patches [B, n, p*p*C] are normalised by: of each patch [B, n, 1], or
    with kind "channel" of each of its channels [B, n, p*p*C].
    """
    if kind != "channel":
        variance, mean = torch.var_mean(
            pixels, dim=2, correction=int(kind == "unbiased"), keepdim=True
        )
        return mean, variance + NORM_EPS[kind]
    # [B, n, C]
    variance, mean = torch.var_mean(pixels.unflatten(2, (-1, channels)), dim=2, correction=0)
    each = pixels.shape[2] // channels
    return mean.repeat(1, 1, each), variance.repeat(1, 1, each) + NORM_EPS[kind]


def hidden_targets(batch: Batch, *, norm_pix: bool, kind: PixelNorm = "unbiased") -> Tensor:
    """`pixel_targets` of the patches that the encoder did not see, in the order of the
    predictions.
    """
    hidden = batch.ids_shuffle[:, batch.num_visible :]
    return pixel_targets(
        batch.images, hidden, batch.ids_shuffle.shape[1], norm_pix=norm_pix, kind=kind
    )


def squared_error(pred: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over patches of the mean over a patch's numbers of the squared difference; both [B, n,
    d].

    `weights` [B, n]: how much each patch counts; None: 1.
    """
    wide = widen(pred)
    if weights is None:
        # torch 2.11 has no gradient of a float64 prediction and a float32 target
        return F.mse_loss(wide, target.to(wide.dtype), reduction="sum") / pred.shape[2]
    return ((wide - target).square().mean(dim=2) * weights).sum()


def crowding(batch: Batch) -> Tensor:
    """1 + the share of a hidden patch's 3 x 3 surroundings that is hidden (BootMAE's code); [B,
    hidden] float32.

    What lies beyond the image's edge counts as seen. Images have as many patches across as their
    shape says."""
    ids = batch.ids_shuffle
    (height, width) = batch.images.shape[2:]
    side = math.isqrt(height * width // ids.shape[1])
    # 1 = hidden
    hidden = torch.ones(ids.shape, device=ids.device).scatter(1, ids[:, : batch.num_visible], 0.0)
    near = F.avg_pool2d(
        hidden.view(len(ids), 1, height // side, width // side), 3, stride=1, padding=1
    )
    return 1.0 + near.flatten(1).gather(1, ids[:, batch.num_visible :])
