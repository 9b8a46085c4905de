"""ROI align and non-maximum suppression: torchvision's where its extension loads, else plain torch.

Both have short exact forms. Bilinear sampling of a box's grid is separable, so ROI align (He et
al., 2017; aligned, as many samples a bin as it has pixels) is Wy @ map @ Wx^T with two small
matrices a region. Suppression is the fixed point of "kept = overlapped by no better one that is
kept". torchvision's own way without its extension compiles at its first call, which takes minutes.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rcmae.models.detection.boxes import areas
from rcmae.process import extensions  # noqa: F401, torchvision imports beside a CPU torch

import torchvision.ops


@cache
def has_extension(device: str) -> bool:
    """Whether torchvision's compiled operators are there for this kind of device."""
    extension: Any = importlib.import_module("torchvision.extension")
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    if key is None or not extension._has_ops():
        return False
    return all(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"torchvision::{name}", key)
        for name in ("nms", "roi_align")
    )


def roi_align(maps: Tensor, boxes: Tensor, index: Tensor, side: int, scale: float) -> Tensor:
    """[R, C, side, side] of what boxes show of maps.

    Args:
        maps: [N, C, H, W] float32 or float64.
        boxes: [R, 4] of the same type, in pixels of the image.
        index: [R] int64, which map each box lies in.
        side: bins of a region.
        scale: of a map over its image.
    """
    if has_extension(maps.device.type):
        rois = torch.cat([index[:, None].to(boxes.dtype), boxes], dim=1)
        return torchvision.ops.roi_align(maps, rois, side, scale, sampling_ratio=0, aligned=True)
    return plain_roi_align(maps, boxes, index, side, scale)


def plain_roi_align(maps: Tensor, boxes: Tensor, index: Tensor, side: int, scale: float) -> Tensor:
    """`roi_align` in plain torch."""
    columns, rows = (
        _samples(boxes[:, axis], boxes[:, axis + 2], maps.shape[3 - axis], side, scale)
        for axis in (0, 1)
    )
    parts = []
    order = []
    for number in index.unique().tolist():
        chosen = (index == number).nonzero()[:, 0]
        parts.append(_pooled(maps[number], rows[chosen], columns[chosen]))
        order.append(chosen)
    if not parts:
        # of nothing: still a function of the maps, for whoever waits for their gradient
        return maps[:1, :, :1, :1].expand(-1, -1, side, side)[:0]
    return torch.cat(parts)[torch.cat(order).argsort()]


def _pooled(features: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[R, C, P, P] of a map [C, H, W]; rows: [R, P, H], columns: [R, P, W]."""
    count, side, height = rows.shape
    channels, _, width = features.shape
    wide = features.permute(1, 0, 2).reshape(height, channels * width)
    lines = (rows.reshape(count * side, height) @ wide).reshape(count, side * channels, width)
    found = lines @ columns.transpose(1, 2)  # [R, P * C, P]
    return found.reshape(count, side, channels, side).transpose(1, 2)


def _samples(start: Tensor, end: Tensor, length: int, side: int, scale: float) -> Tensor:
    """[R, side, length] of each bin along one axis: how much of each pixel its mean has."""
    first = start * scale - 0.5
    bins = (end * scale - 0.5 - first) / side  # [R] pixels of a bin
    each = bins.ceil().clamp(min=0)  # [R] samples of a bin
    most = max(1, int(each.max())) if len(each) else 1
    place = torch.arange(most, device=start.device, dtype=start.dtype)
    number = torch.arange(side, device=start.device, dtype=start.dtype)
    within = (place + 0.5) * (bins / each.clamp(min=1))[:, None]  # [R, most]
    at = first[:, None, None] + number[:, None] * bins[:, None, None] + within[:, None]
    counts = (place < each[:, None])[:, None] & (at >= -1.0) & (at <= length)
    at = at.clamp(0.0, length - 1)  # [R, side, most]
    low = at.floor()
    high = (low + 1).clamp(max=length - 1)
    share = (at - low) * counts
    rest = (1.0 - (at - low)) * counts
    weights = start.new_zeros(len(start), side, length)
    weights.scatter_add_(2, low.long(), rest)
    weights.scatter_add_(2, high.long(), share)
    return weights / each.clamp(min=1)[:, None, None]


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """[K] int64, the boxes that no better one overlaps by more than a threshold, best first; of
    equal scores the first is the better.
    """
    order = scores.argsort(descending=True, stable=True)
    if has_extension(boxes.device.type):
        # a score that falls by the rank: ties are broken here, not by the kernel
        ranked = torch.arange(len(order), 0, -1, device=boxes.device, dtype=boxes.dtype)
        return order[torchvision.ops.nms(boxes[order], ranked, threshold)]
    return plain_nms(boxes, scores, threshold)


def plain_nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """`nms` in plain torch."""
    order = scores.argsort(descending=True, stable=True)
    ordered = boxes[order]
    upper = torch.minimum(ordered[:, None, 2:], ordered[None, :, 2:])
    lower = torch.maximum(ordered[:, None, :2], ordered[None, :, :2])
    sides = (upper - lower).clamp(min=0)
    shared = sides[..., 0] * sides[..., 1]
    area = areas(ordered)
    # [N, N]: the box of the column is better, and too near
    near = (shared / (area[:, None] + area[None] - shared) > threshold).tril(-1)
    kept = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    while True:
        still = ~(near & kept).any(dim=1)
        if torch.equal(still, kept):
            return order[kept]
        kept = still


def nms_by_kind(boxes: Tensor, scores: Tensor, kinds: Tensor, threshold: float) -> Tensor:
    """`nms` of each kind [N] (level or class) by itself; all that is kept, best first."""
    kept = []
    for kind in kinds.unique().tolist():
        of_kind = (kinds == kind).nonzero()[:, 0]
        kept.append(of_kind[nms(boxes[of_kind], scores[of_kind], threshold)])
    if not kept:
        return kinds.new_empty(0)
    found = torch.cat(kept).sort().values
    return found[scores[found].argsort(descending=True, stable=True)]


def roi_align_levels(
    levels: Sequence[Tensor],
    boxes: Sequence[Tensor],
    side: int,
    strides: Sequence[int],
    canonical: tuple[float, int],
) -> Tensor:
    """[R, C, side, side] of regions, image by image, each read at the level of its size (Lin et
    al., 2017, equation 1).

    Args:
        levels: [B, C, h, w] each, the finest first, float32 or float64.
        boxes: [R_b, 4] of each image, in pixels.
        side: bins of a region.
        strides: of the levels, in pixels.
        canonical: a region of this side is read at this level, counted from log2 of its stride.
    """
    joined = torch.cat(list(boxes)).to(levels[0].dtype)
    counts = torch.tensor([len(each) for each in boxes], device=joined.device)
    image = torch.arange(len(boxes), device=joined.device).repeat_interleave(counts)
    lowest = strides[0].bit_length() - 1
    size, level = canonical
    at = (level + torch.log2(areas(joined).sqrt() / size + 1e-8)).floor()
    at = at.clamp(lowest, lowest + len(levels) - 1).long() - lowest
    parts = []
    order = []
    for number, (features, stride) in enumerate(zip(levels, strides, strict=True)):
        chosen = (at == number).nonzero()[:, 0]
        parts.append(roi_align(features, joined[chosen], image[chosen], side, 1.0 / stride))
        order.append(chosen)
    return torch.cat(parts)[torch.cat(order).argsort()]
