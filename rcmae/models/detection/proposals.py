"""The region proposal network (Ren et al., 2015): scores and deltas of anchors, and the best of
them as regions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcmae.models.detection.boxes import cell_anchors, clip, decode, grid_anchors, widened
from rcmae.models.detection.regions import nms_by_kind
from rcmae.models.detection.sizes import STRIDES, ProposalSizes


class Proposed(NamedTuple):
    """What the network says of all anchors, levels one after the other."""

    logits: Tensor  # [B, A] whether there is an object
    deltas: Tensor  # [B, A, 4] from the anchor to it
    anchors: Tensor  # [A, 4] float32
    counts: tuple[int, ...]  # anchors of each level


class Proposals(NamedTuple):
    """Regions of one image, best first."""

    boxes: Tensor  # [P, 4] float32
    logits: Tensor  # [P] float32
    anchors: Tensor  # [P] int64, the anchor that each came from


class _Head(nn.Module):
    """Shared by the levels; it holds what the published names call `rpn_head`."""

    def __init__(self, sizes: ProposalSizes, channels: int) -> None:
        super().__init__()
        each = len(sizes.ratios) * len(sizes.anchors[0])
        convs = [
            (f"conv{number}", nn.Conv2d(channels, channels, 3, padding=1))
            for number in range(sizes.convs)
        ]
        self.conv = nn.Sequential(OrderedDict(convs))
        self.objectness_logits = nn.Conv2d(channels, each, 1)
        self.anchor_deltas = nn.Conv2d(channels, 4 * each, 1)

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """[B, h * w * each] and [B, h * w * each, 4] of each level."""
        logits = []
        deltas = []
        for x in levels:
            for conv in self.conv:
                x = F.relu(conv(x))
            logits.append(self.objectness_logits(x).permute(0, 2, 3, 1).flatten(1))
            deltas.append(
                self.anchor_deltas(x).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4))
            )
        return logits, deltas


class ProposalNetwork(nn.Module):
    """Levels of a pyramid to what each anchor shows.

    Args:
        sizes: of anchors and proposals.
        channels: of each level.
    """

    def __init__(self, sizes: ProposalSizes, channels: int) -> None:
        super().__init__()
        self._sizes = sizes
        self.rpn_head = _Head(sizes, channels)

    def forward(self, levels: Sequence[Tensor]) -> Proposed:
        """Of levels [B, C, h, w]; logits and deltas are float32 (float64 for a float64 model)."""
        logits, deltas = self.rpn_head(levels)
        anchors = [
            grid_anchors(
                cell_anchors(sizes, self._sizes.ratios).to(level.device),
                (level.shape[2], level.shape[3]),
                stride,
            )
            for level, sizes, stride in zip(levels, self._sizes.anchors, STRIDES, strict=True)
        ]
        return Proposed(
            widened(torch.cat(logits, dim=1)),
            widened(torch.cat(deltas, dim=1)),
            torch.cat(anchors),
            tuple(len(each) for each in anchors),
        )


@torch.no_grad()
def propose(
    found: Proposed, extents: Tensor, sizes: ProposalSizes, *, training: bool
) -> list[Proposals]:
    """The best regions of each image: of each level so many, cut to the image, none of them
    overlapped too much by a better one of its level; then the best of all. In float32.

    Args:
        found: of the network.
        extents: [B, 4] the box of each canvas that is image.
        sizes: how many.
        training: whether for training, where there may be more.
    """
    which = 0 if training else 1
    logits = found.logits.float()
    deltas = found.deltas.float()
    results = []
    for image, extent in enumerate(extents):
        chosen = _best_of_levels(logits[image], found.counts, sizes.per_level[which])
        boxes = decode(found.anchors[chosen], deltas[image, chosen], sizes.weights)
        boxes = clip(boxes, extent.float())
        scores = logits[image, chosen]
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        usable = has_area & boxes.isfinite().all(dim=1) & scores.isfinite()
        chosen, boxes, scores = chosen[usable], boxes[usable], scores[usable]
        bounds = torch.tensor(found.counts, device=chosen.device).cumsum(0)
        level = torch.bucketize(chosen, bounds, right=True)
        kept = nms_by_kind(boxes, scores, level, sizes.nms)[: sizes.kept[which]]
        results.append(Proposals(boxes[kept], scores[kept], chosen[kept]))
    return results


def _best_of_levels(logits: Tensor, counts: Sequence[int], each: int) -> Tensor:
    """Numbers of the anchors with the best logits of each level, best first."""
    chosen = []
    start = 0
    for count in counts:
        order = logits[start : start + count].argsort(descending=True, stable=True)
        chosen.append(start + order[:each])
        start += count
    return torch.cat(chosen)
