"""From scores of regions to detections, and from small masks to masks of an image's own size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rcmae.models.detection.boxes import clip, decode
from rcmae.models.detection.heads import Scored
from rcmae.models.detection.regions import nms_by_kind
from rcmae.models.detection.sizes import RegionSizes


class Detections(NamedTuple):
    """Of one image, best first."""

    boxes: Tensor  # [D, 4] float32
    scores: Tensor  # [D] float32
    classes: Tensor  # [D] int64, from 0
    masks: Tensor  # [D, 28, 28] float32 probabilities within the box; or [D, H, W] bool, pasted


@torch.no_grad()
def select(scored: Scored, regions: Tensor, extent: Tensor, sizes: RegionSizes) -> Detections:
    """The best detections of an image, masks still empty.

    A region may be a detection of each class; one that a better one of its class overlaps too much
    is none.

    Args:
        scored: of its regions.
        regions: [R, 4].
        extent: [4] the box of the canvas that is image.
        sizes: thresholds.
    """
    probabilities = scored.scores.float().softmax(dim=1)[:, :-1]
    boxes = decode(regions.float(), scored.deltas.float().flatten(1), sizes.weights)
    boxes = clip(boxes.unflatten(1, (-1, 4)), extent.float())
    usable = boxes.flatten(1).isfinite().all(dim=1) & probabilities.isfinite().all(dim=1)
    region, kind = ((probabilities > sizes.score) & usable[:, None]).nonzero().unbind(1)
    boxes = boxes[region, kind]
    scores = probabilities[region, kind]
    kept = nms_by_kind(boxes, scores, kind, sizes.nms)[: sizes.detections]
    side = 2 * sizes.mask_side
    return Detections(
        boxes[kept], scores[kept], kind[kept], scores.new_zeros(len(kept), side, side)
    )


@torch.no_grad()
def rescaled(found: Detections, extent: Tensor, size: tuple[int, int]) -> Detections:
    """Boxes of a canvas as boxes of the image that lies in it, at its own height and width."""
    height, width = size
    origin = torch.cat([extent[:2], extent[:2]]).float()
    scale = torch.stack([width / (extent[2] - extent[0]), height / (extent[3] - extent[1])])
    boxes = (found.boxes - origin) * torch.cat([scale, scale]).float()
    whole = boxes.new_tensor([0, 0, width, height])
    return found._replace(boxes=clip(boxes, whole))


@torch.no_grad()
def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int], chunk: int = 8) -> Tensor:
    """[D, H, W] bool: small masks [D, m, m] stretched into their boxes [D, 4], cut at one half.

    A few at a time: of a hundred on a large photograph the floats alone would take gigabytes.
    """
    height, width = size
    rows = torch.arange(height, device=masks.device, dtype=torch.float32) + 0.5
    columns = torch.arange(width, device=masks.device, dtype=torch.float32) + 0.5
    found = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    for start in range(0, len(masks), chunk):
        part = slice(start, start + chunk)
        x0, y0, x1, y1 = boxes[part].float().unbind(1)
        down = (rows - y0[:, None]) / (y1 - y0)[:, None] * 2 - 1  # [d, H]
        along = (columns - x0[:, None]) / (x1 - x0)[:, None] * 2 - 1  # [d, W]
        count = len(down)
        grid = torch.stack(
            [
                along[:, None].expand(count, height, width),
                down[:, :, None].expand(count, height, width),
            ],
            dim=3,
        )
        # a box without area gives what is no number; nothing is pasted there
        grid = grid.nan_to_num(nan=2.0, posinf=2.0, neginf=-2.0)
        sampled = F.grid_sample(masks[part, None].float(), grid, align_corners=False)
        found[part] = sampled[:, 0] >= 0.5
    return found


def with_masks(found: Sequence[Detections], masks: Tensor) -> list[Detections]:
    """Detections of each image with their part of all masks [D, 28, 28]."""
    parts = masks.split([len(each.scores) for each in found])
    return [each._replace(masks=part) for each, part in zip(found, parts, strict=True)]
