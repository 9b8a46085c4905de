"""Images blurred, displaced, enlarged: plain operations on [C, H, W], by lengths in pixels of an
image whose shorter side has 224."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 224  # pixels of the shorter side that lengths are given for


# ------------------------------------------------------------------------------- the size of things


def scale_of(image: Tensor) -> float:
    """Pixels of the image for a pixel of one whose shorter side has 224."""
    return min(image.shape[-2:]) / SIDE


def reference(image: Tensor) -> tuple[int, int]:
    """(height, width) of the image if its shorter side had 224 pixels."""
    scale = scale_of(image)
    return round(image.shape[-2] / scale), round(image.shape[-1] / scale)


def resized(texture: Tensor, image: Tensor) -> Tensor:
    """A texture [C, h, w] at the image's size."""
    size = (image.shape[1], image.shape[2])
    if texture.shape[1:] == size:
        return texture
    return F.interpolate(texture[None], size, mode="bilinear", antialias=True)[0]


# -------------------------------------------------------------------------- blurring and displacing


@functools.lru_cache(maxsize=64)
def smoothing(length: int, sigma: float, reach: float) -> Tensor:
    """[length, length], which smooths a row by a Gaussian of this deviation, cut at `reach` of
    them; ends mirrored.
    """
    offsets = torch.arange(-int(reach * sigma + 0.5), int(reach * sigma + 0.5) + 1)
    weights = torch.exp(-offsets.double().square() / (2 * sigma**2))
    at = (torch.arange(length)[:, None] + offsets) % (2 * length)
    at = torch.where(at < length, at, 2 * length - 1 - at)
    matrix = torch.zeros(length, length, dtype=torch.float64)
    return matrix.scatter_add_(1, at, (weights / weights.sum()).expand_as(at)).float()


def smoothed(image: Tensor, sigma: float, reach: float = 4.0) -> Tensor:
    """[..., H, W] after a Gaussian of this deviation in pixels."""
    rows = smoothing(image.shape[-2], sigma, reach)
    columns = smoothing(image.shape[-1], sigma, reach)
    return rows @ image @ columns.T


def convolved(image: Tensor, taps: Tensor, weights: Tensor) -> Tensor:
    """[C, H, W] as the weighted sum of its copies displaced by `taps` [N, 2] (down, right) pixels;
    edges mirrored.

    A tap between pixels is shared out among its four neighbours.
    """
    corner = taps.floor()
    part = taps - corner
    margin = int(taps.abs().max().ceil()) + 1
    kernel = torch.zeros(2 * margin + 2, 2 * margin + 2, dtype=weights.dtype)
    for down in (0, 1):
        for right in (0, 1):
            share = (part[:, 0] if down else 1 - part[:, 0]) * (
                part[:, 1] if right else 1 - part[:, 1]
            )
            at = corner.long() + margin + torch.tensor([down, right])
            kernel.index_put_((at[:, 0], at[:, 1]), weights * share, accumulate=True)
    height, width = image.shape[1:]
    padded = F.pad(image[None], (margin,) * 4, "reflect")[0]
    total = torch.zeros_like(image)
    for top, left in kernel.nonzero().tolist():
        # few, where a square of numbers would be mostly zeros
        total += float(kernel[top, left]) * padded[:, top : top + height, left : left + width]
    return total


def sampled(image: Tensor, places: Tensor) -> Tensor:
    """[C, H, W] read at `places` [2, H, W] (row, column) in pixels, bilinearly.

    What lies outside is mirrored.
    """
    height, width = image.shape[1:]
    grid = torch.stack([(2 * places[1] + 1) / width - 1, (2 * places[0] + 1) / height - 1], dim=-1)
    return F.grid_sample(image[None], grid[None], padding_mode="reflection", align_corners=False)[0]


def own_places(image: Tensor) -> Tensor:
    """[2, H, W], the row and the column of every pixel."""
    rows = torch.arange(image.shape[-2], dtype=torch.float32)
    columns = torch.arange(image.shape[-1], dtype=torch.float32)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))


def zoomed(image: Tensor, factors: Sequence[float]) -> Tensor:
    """[N, C, H, W]: the image enlarged about its centre by each factor, cut to its size."""
    turn = torch.zeros(len(factors), 2, 3)
    turn[:, 0, 0] = turn[:, 1, 1] = 1 / torch.tensor(factors, dtype=torch.float32)
    many = image.expand(len(factors), *image.shape)
    return F.grid_sample(
        many,
        F.affine_grid(turn, list(many.shape), False),
        padding_mode="border",
        align_corners=False,
    )


def trail(radius: float, sigma: float, angle: float) -> tuple[Tensor, Tensor]:
    """Taps and weights of a motion in one direction (degrees), fading as one half of a Gaussian,
    as ImageMagick's.
    """
    steps = torch.arange(2 * int(radius) + 1, dtype=torch.float32)
    weights = torch.exp(-steps.square() / (2 * sigma**2))
    way = torch.tensor([math.sin(math.radians(angle)), math.cos(math.radians(angle))])
    return steps[:, None] * way, weights / weights.sum()
