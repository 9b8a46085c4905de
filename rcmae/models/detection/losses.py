"""The five losses of Mask R-CNN, as sums of each image and what they count.

The published runs have one image on a GPU, so each loss is normalised within its image: it depends
on no rank and on no image that happens to stand beside. `Losses.by_image` gives that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rcmae.models.detection.boxes import encode, widened
from rcmae.models.detection.heads import Scored
from rcmae.models.detection.matching import FOREGROUND, IGNORED
from rcmae.models.detection.proposals import Proposed
from rcmae.models.detection.regions import roi_align
from rcmae.models.detection.sizes import ProposalSizes

LOSSES = ("rpn_cls", "rpn_loc", "cls", "box_reg", "mask")


class Targets(NamedTuple):
    """The objects of an image."""

    boxes: Tensor  # [n, 4] float32
    classes: Tensor  # [n] int64, from 0
    masks: Tensor  # [n, H, ceil(W / 8)] uint8 on the canvas, a bit a pixel, as numpy.packbits


class Regions(NamedTuple):
    """Regions of an image that the losses see; foreground first."""

    boxes: Tensor  # [R, 4] float32
    classes: Tensor  # [R] int64; the number of classes is background
    object: Tensor  # [R] int64, the object that each shows, -1 for background


@dataclass(frozen=True)
class Losses:
    """Sums of each image [B], and what each counts."""

    sums: dict[str, Tensor]
    counts: dict[str, Tensor]

    def by_image(self) -> dict[str, Tensor]:
        """Of each image [B] by itself; 0 where it has nothing to count."""
        return {name: self.sums[name] / self.counts[name].clamp(min=1) for name in LOSSES}

    def of_batch(self) -> dict[str, Tensor]:
        """Of all images as one, as one process of the published code computes them."""
        return {
            name: self.sums[name].sum() / self.counts[name].sum().clamp(min=1) for name in LOSSES
        }


def proposal_losses(
    found: Proposed,
    labels: Tensor,
    objects: Tensor,
    targets: Sequence[Targets],
    sizes: ProposalSizes,
) -> Losses:
    """Of anchors: whether each shows an object, and where.

    Args:
        found: of the network.
        labels: [B, A] int8 after sampling: foreground, background, or ignored.
        objects: [B, A] int64, the object that each anchor is nearest to.
        targets: of each image.
        sizes: both are divided by the anchors that are sampled of an image, whatever there are.
    """
    right = (labels == FOREGROUND).to(found.logits.dtype)
    each = F.binary_cross_entropy_with_logits(found.logits, right, reduction="none")
    scores = (each * (labels != IGNORED)).sum(dim=1)
    places = []
    for image, target in enumerate(targets):
        shown = (labels[image] == FOREGROUND).nonzero()[:, 0]
        nearest = target.boxes.float()[objects[image, shown]]
        wanted = encode(found.anchors[shown], nearest, sizes.weights)
        places.append((found.deltas[image, shown] - wanted).abs().sum())
    counts = scores.new_full((len(targets),), sizes.sampled)
    return Losses(
        {"rpn_cls": scores, "rpn_loc": torch.stack(places)},
        {"rpn_cls": counts, "rpn_loc": counts},
    )


def box_losses(
    scored: Scored,
    regions: Sequence[Regions],
    targets: Sequence[Targets],
    weights: Sequence[float],
) -> Losses:
    """Of regions, image by image: their class, and where the object is."""
    scores = []
    places = []
    start = 0
    for seen, target in zip(regions, targets, strict=True):
        rows = slice(start, start + len(seen.classes))
        start = rows.stop
        scores.append(F.cross_entropy(scored.scores[rows], seen.classes, reduction="sum"))
        shown = (seen.object >= 0).nonzero()[:, 0]
        kind = scored.deltas.dtype
        wanted = encode(
            seen.boxes[shown].to(kind), target.boxes[seen.object[shown]].to(kind), weights
        )
        got = scored.deltas[rows][shown, seen.classes[shown]]
        places.append((got - wanted).abs().sum())
    counts = scored.scores.new_tensor([len(seen.classes) for seen in regions])
    return Losses(
        {"cls": torch.stack(scores), "box_reg": torch.stack(places)},
        {"cls": counts, "box_reg": counts},
    )


def mask_losses(
    logits: Tensor, regions: Sequence[Regions], targets: Sequence[Targets], width: int
) -> Losses:
    """Of foreground regions, image by image.

    Args:
        logits: [F, side, side] of each one's class.
        regions, targets: of each image.
        width: of the canvas in pixels.
    """
    sums = []
    counts = []
    start = 0
    for seen, target in zip(regions, targets, strict=True):
        shown = (seen.object >= 0).nonzero()[:, 0]
        got = logits[start : start + len(shown)]
        start += len(shown)
        wanted = mask_targets(seen, target, logits.shape[-1], width, logits.dtype)
        sums.append(F.binary_cross_entropy_with_logits(got, wanted, reduction="sum"))
        counts.append(got.numel())
    return Losses({"mask": torch.stack(sums)}, {"mask": logits.new_tensor(counts)})


@torch.no_grad()
def mask_targets(
    seen: Regions, target: Targets, side: int, width: int, dtype: torch.dtype
) -> Tensor:
    """[F, side, side] 0 or 1: what foreground regions show of their object's mask."""
    shown = (seen.object >= 0).nonzero()[:, 0]
    maps = widened(unpack(target.masks, width).to(dtype))[:, None]
    boxes = seen.boxes[shown].to(maps.dtype)
    found = roi_align(maps, boxes, seen.object[shown], side, 1.0)
    return (found[:, 0] >= 0.5).to(dtype)


def unpack(packed: Tensor, width: int) -> Tensor:
    """[..., width] bool of bits [..., ceil(width / 8)] uint8, as numpy.packbits."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    bits = packed[..., None].bitwise_right_shift(shifts).bitwise_and(1)
    return bits.flatten(-2)[..., :width].bool()


def joined(*parts: Losses) -> Losses:
    """All of them as one."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for part in parts:
        sums |= part.sums
        counts |= part.counts
    return Losses(sums, counts)
