"""Boxes (x0, y0, x1, y1) in pixels, x1 and y1 exclusive: areas, overlaps, coding, anchors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

LARGEST_STEP = math.log(1000.0 / 16)  # of a side's logarithm: no delta makes a box overflow


def widened(values: Tensor) -> Tensor:
    """float32, or float64 as it is."""
    return values if values.dtype == torch.float64 else values.float()


def areas(boxes: Tensor) -> Tensor:
    """[...] of boxes [..., 4]; 0 for one that is turned inside out."""
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def overlaps(one: Tensor, other: Tensor) -> Tensor:
    """[N, M] intersection over union of boxes [N, 4] and [M, 4]; 0 where they do not meet."""
    upper = torch.minimum(one[:, None, 2:], other[None, :, 2:])
    lower = torch.maximum(one[:, None, :2], other[None, :, :2])
    sides = (upper - lower).clamp(min=0)
    shared = sides[..., 0] * sides[..., 1]
    union = areas(one)[:, None] + areas(other)[None] - shared
    return torch.where(shared > 0, shared / union, torch.zeros_like(shared))


def clip(boxes: Tensor, extent: Tensor) -> Tensor:
    """Boxes [..., 4] cut to what is image: extent [4]."""
    low = torch.cat([extent[:2], extent[:2]]).to(boxes.dtype)
    high = torch.cat([extent[2:], extent[2:]]).to(boxes.dtype)
    return torch.minimum(torch.maximum(boxes, low), high)


def encode(sources: Tensor, targets: Tensor, weights: Sequence[float]) -> Tensor:
    """Deltas [N, 4] that lead from boxes to others: centres in sides of the source, sides as
    logarithms, times the weights (Girshick et al., 2014, appendix C).
    """
    sides = sources[:, 2:] - sources[:, :2]
    centres = sources[:, :2] + 0.5 * sides
    wanted_sides = targets[:, 2:] - targets[:, :2]
    wanted_centres = targets[:, :2] + 0.5 * wanted_sides
    deltas = torch.cat([(wanted_centres - centres) / sides, (wanted_sides / sides).log()], dim=1)
    return deltas * deltas.new_tensor(weights)


def decode(sources: Tensor, deltas: Tensor, weights: Sequence[float]) -> Tensor:
    """Boxes [N, 4 K] of deltas [N, 4 K], K a source [N, 4]: `encode` backwards."""
    steps = deltas.unflatten(1, (-1, 4)) / deltas.new_tensor(weights)  # [N, K, 4]
    sides = (sources[:, 2:] - sources[:, :2])[:, None]
    centres = sources[:, None, :2] + 0.5 * sides
    new_centres = steps[..., :2] * sides + centres
    halves = 0.5 * steps[..., 2:].clamp(max=LARGEST_STEP).exp() * sides
    return torch.cat([new_centres - halves, new_centres + halves], dim=2).flatten(1)


def cell_anchors(sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """[sizes * ratios, 4] float32 anchors around 0: of one area a size, size by size."""
    found = []
    for size in sizes:
        for ratio in ratios:
            width = math.sqrt(size**2 / ratio)
            height = ratio * width
            found.append([-width / 2, -height / 2, width / 2, height / 2])
    return torch.tensor(found, dtype=torch.float64).float()


def grid_anchors(cell: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """[rows * columns * A, 4] float32 anchors of a level, centred on its pixels' corners, row by
    row.
    """
    rows, columns = (
        torch.arange(side, dtype=torch.float32, device=cell.device) * stride for side in grid
    )
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    shifts = torch.stack([x, y, x, y], dim=2).reshape(-1, 1, 4)
    return (shifts + cell).reshape(-1, 4)


def by_image(values: Tensor, starts: Sequence[int]) -> list[Tensor]:
    """Rows of all images, image by image; starts: [B + 1]."""
    return [values[start:end] for start, end in pairwise(starts)]
