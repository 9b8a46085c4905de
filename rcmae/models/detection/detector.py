"""Mask R-CNN on a plain ViT: one module, so that whoever gathers its weights gathers them once.

In training it gives losses, in evaluation detections. Everything random comes from outside: draws
of sampling and of drop path, keyed by an image's position (`draws.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rcmae.models.blocks import Draws, drop_path_rates
from rcmae.models.detection.benchmark import Pyramid
from rcmae.models.detection.boxes import widened
from rcmae.models.detection.heads import RegionHeads
from rcmae.models.detection.inference import Detections, select, with_masks
from rcmae.models.detection.layers import draw
from rcmae.models.detection.losses import (
    Losses,
    Regions,
    Targets,
    box_losses,
    joined,
    mask_losses,
    proposal_losses,
)
from rcmae.models.detection.matching import (
    BACKGROUND,
    FOREGROUND,
    IGNORED,
    match_anchors,
    match_regions,
    sample,
)
from rcmae.models.detection.proposals import (
    ProposalNetwork,
    Proposals,
    Proposed,
    propose,
)
from rcmae.models.detection.regions import roi_align_levels
from rcmae.models.detection.sizes import POOLED, STRIDES, DetectorSizes
from rcmae.models.detection.vitdet import SimplePyramid
from rcmae.models.protocol import Place, layer_of


@dataclass(frozen=True)
class Sampling:
    """The draws of a batch."""

    anchors: Tensor  # [B, A] int64, one an anchor: of the two samplings' numbers, see `matching`
    regions: Tensor  # [B, A + M] int64, one an anchor that a region came from, then one an object
    keep: Tensor | None = None  # [B, depth, 2] bool, as blocks.drop_path_draws


@dataclass(frozen=True)
class Choices:
    """What a training step sees of anchors and regions: drawn, or another process's."""

    labels: Tensor  # [B, A] int8 of anchors
    objects: Tensor  # [B, A] int64, the object that each anchor is nearest to
    regions: tuple[Regions, ...]  # of each image


class Detector(nn.Module):
    """The whole network, by the published names. Weights are drawn from a fixed seed.

    Args:
        sizes: all of them.
    """

    most_objects = 256  # of an image that have draws of their own; more share them
    graph_changes = True  # a batch without objects has nothing for the heads of regions

    def __init__(self, sizes: DetectorSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self._draws = Draws()
        channels = sizes.backbone.channels
        kind = SimplePyramid if sizes.kind == "vitdet" else Pyramid
        self.backbone = kind(sizes.backbone, self._draws)
        self.proposal_generator = ProposalNetwork(sizes.proposals, channels)
        self.roi_heads = RegionHeads(sizes.regions, channels, sizes.norm)
        self.drop_path_rates = drop_path_rates(sizes.backbone.drop_path, sizes.backbone.vit.depth)
        self.draw_weights(torch.Generator().manual_seed(0))

    def draw_weights(self, generator: torch.Generator) -> None:
        """Draw all weights but the positions: a function of the generator's state and the sizes."""
        for name, param in self.named_parameters():
            if not name.endswith("pos_embed"):
                draw(name, param, generator)

    def forward(
        self,
        images: Tensor,
        extents: Tensor,
        targets: Sequence[Targets] | None = None,
        draws: Sampling | None = None,
        choices: Choices | None = None,
    ) -> dict[str, Tensor] | list[Detections]:
        """Losses by name, [B] each, where there are targets; else detections of each image.

        Args:
            images: [B, C, H, W] normalised, padding 0.
            extents: [B, 4] the box of each canvas that is image.
            targets: of each image.
            draws: of the two samplings, and of drop path.
            choices: those of another process, in place of what `draws` gives.
        """
        self._draws.keep = None if draws is None else draws.keep
        levels, found = self.look(images)
        if targets is None:
            return self.detect(levels, found, extents)
        if choices is None:
            assert draws is not None, "a training needs draws, or another's choices"
            choices = self.choose(found, extents, targets, draws)
        return self.losses(levels, found, targets, choices).by_image()

    def look(self, images: Tensor) -> tuple[list[Tensor], Proposed]:
        """Levels of the pyramid, and what anchors show."""
        levels = self.backbone(images.to(self.compute_dtype))
        return levels, self.proposal_generator(levels)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.roi_heads.box_predictor.cls_score.weight.dtype

    @torch.no_grad()
    def choose(
        self, found: Proposed, extents: Tensor, targets: Sequence[Targets], draws: Sampling
    ) -> Choices:
        """Which anchors and regions the losses see."""
        sizes = self.sizes.proposals
        proposals = propose(found, extents, sizes, training=self.training)
        labels = []
        objects = []
        for target, luck in zip(targets, draws.anchors, strict=True):
            match = match_anchors(found.anchors, target.boxes.float(), sizes.iou)
            shown, hidden = sample(match.kind, luck, sizes.sampled, sizes.positive)
            label = torch.full_like(match.kind, IGNORED)
            label[shown] = FOREGROUND
            label[hidden] = BACKGROUND
            labels.append(label)
            objects.append(match.object)
        regions = [
            self._regions(proposed, target, luck)
            for proposed, target, luck in zip(proposals, targets, draws.regions, strict=True)
        ]
        return Choices(torch.stack(labels), torch.stack(objects), tuple(regions))

    def _regions(self, proposed: Proposals, target: Targets, draws: Tensor) -> Regions:
        """Of an image; draws: [A + M]. Its objects' own boxes are regions, too."""
        sizes = self.sizes.regions
        boxes = torch.cat([proposed.boxes, target.boxes.float()])
        match = match_regions(boxes, target.boxes.float(), sizes.iou)
        anchors = len(draws) - self.most_objects
        own = anchors + torch.arange(len(target.boxes), device=boxes.device) % self.most_objects
        luck = draws[torch.cat([proposed.anchors, own])]
        shown, hidden = sample(match.kind, luck, sizes.sampled, sizes.positive)
        classes = torch.full((len(shown) + len(hidden),), sizes.num_classes, device=boxes.device)
        objects = torch.full_like(classes, -1)
        objects[: len(shown)] = match.object[shown]
        classes[: len(shown)] = target.classes[match.object[shown]]
        return Regions(boxes[torch.cat([shown, hidden])], classes, objects)

    def losses(
        self,
        levels: Sequence[Tensor],
        found: Proposed,
        targets: Sequence[Targets],
        choices: Choices,
    ) -> Losses:
        """The five. Every head runs, also where there is no region for it: an engine that gathers
        weights head by head waits for every rank.
        """
        sizes = self.sizes.regions
        first = proposal_losses(
            found, choices.labels, choices.objects, targets, self.sizes.proposals
        )
        regions = choices.regions
        scored = self.roi_heads.boxes(
            self.pool(levels, [each.boxes for each in regions], sizes.box_side)
        )
        second = box_losses(scored, regions, targets, sizes.weights)
        shown = [each.boxes[each.object >= 0] for each in regions]
        classes = torch.cat([each.classes[each.object >= 0] for each in regions])
        logits = self.roi_heads.masks(self.pool(levels, shown, sizes.mask_side), classes)
        width = levels[0].shape[3] * STRIDES[0]
        return joined(first, second, mask_losses(logits, regions, targets, width))

    def pool(self, levels: Sequence[Tensor], boxes: Sequence[Tensor], side: int) -> Tensor:
        """[R, C, side, side] of regions, image by image; float32 (float64 for a float64 model)."""
        wide = [widened(level) for level in levels[:POOLED]]
        canonical = self.sizes.regions.canonical
        return roi_align_levels(wide, boxes, side, STRIDES[:POOLED], canonical)

    @torch.no_grad()
    def detect(
        self, levels: Sequence[Tensor], found: Proposed, extents: Tensor
    ) -> list[Detections]:
        """Detections of each image on its canvas, with masks of 28 x 28 within their boxes."""
        sizes = self.sizes.regions
        proposals = propose(found, extents, self.sizes.proposals, training=False)
        regions = [each.boxes for each in proposals]
        scored = self.roi_heads.boxes(self.pool(levels, regions, sizes.box_side))
        starts = [len(each) for each in regions]
        parts = zip(scored.scores.split(starts), scored.deltas.split(starts), strict=True)
        chosen = [
            select(scored._replace(scores=scores, deltas=deltas), boxes, extent, sizes)
            for (scores, deltas), boxes, extent in zip(parts, regions, extents, strict=True)
        ]
        pooled = self.pool(levels, [each.boxes for each in chosen], sizes.mask_side)
        classes = torch.cat([each.classes for each in chosen])
        return with_masks(chosen, self.roi_heads.masks(pooled, classes).float().sigmoid())

    def num_anchors(self, size: tuple[int, int]) -> int:
        """Of an image of this height and width."""
        each = len(self.sizes.proposals.ratios) * len(self.sizes.proposals.anchors[0])
        cells = 0
        height, width = (side // STRIDES[POOLED - 2] for side in size)  # of p4, a patch a pixel
        for level in ((4 * height, 4 * width), (2 * height, 2 * width), (height, width)):
            cells += level[0] * level[1]
        half = (height // 2, width // 2)
        return each * (cells + half[0] * half[1] + -(-half[0] // 2) * -(-half[1] // 2))

    # what engines and optimizers ask

    @property
    def num_layers(self) -> int:
        """The embedding, a layer a block, and what follows."""
        return len(self.all_blocks()) + 2

    def all_blocks(self) -> list[nn.Module]:
        """The ViT's."""
        vit: Any = self.backbone.vit
        return list(vit.blocks)

    def place_of(self, name: str) -> Place:
        """Where a parameter is, and whether it decays.

        As published: of the vitdet backbone everything does but the ViT's norms and positions, so
        biases and the norms of pyramid and heads, too; of the benchmark backbone everything but
        norms.
        """
        self.get_parameter(name)
        inner = re.sub(r"^backbone\.(net|bottom_up)\.", "", name)
        in_vit = inner != name and not inner.startswith(("ms_adaptor", "windowed", "global"))
        depth = len(self.all_blocks())
        layer = layer_of(inner, depth) if in_vit else depth + 1
        return Place("encoder" if in_vit else "head", layer, self._decays(name, inner, in_vit))

    def _decays(self, name: str, inner: str, in_vit: bool) -> bool:
        if self.sizes.decayed_norms:
            return True
        if self.sizes.kind == "vitdet":
            return not (in_vit and (inner == "pos_embed" or ".norm" in inner))
        return ".norm" not in name and not inner.startswith("ms_adaptor.0.1.")
