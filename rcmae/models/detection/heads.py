"""What a region shows: its class, its box and its mask (He et al., 2017; heads of ViTDet)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcmae.models.detection.boxes import widened
from rcmae.models.detection.layers import NormedConv
from rcmae.models.detection.sizes import Norm, RegionSizes


class Scored(NamedTuple):
    """What the box head says of regions."""

    scores: Tensor  # [R, classes + 1] logits, background last
    deltas: Tensor  # [R, classes, 4] from the region to an object of the class


class BoxHead(nn.Module):
    """Convolutions and a linear layer over a region's features."""

    def __init__(self, sizes: RegionSizes, channels: int, norm: Norm) -> None:
        super().__init__()
        self._convs = sizes.heads.box_convs
        for number in range(1, self._convs + 1):
            setattr(self, f"conv{number}", NormedConv(channels, channels, 3, norm, relu=True))
        self.fc1 = nn.Linear(channels * sizes.box_side**2, sizes.heads.box_width)

    def forward(self, x: Tensor) -> Tensor:
        """[R, C, 7, 7] to [R, width]."""
        for number in range(1, self._convs + 1):
            x = getattr(self, f"conv{number}")(x)
        return F.relu(self.fc1(x.flatten(1)))


class BoxPredictor(nn.Module):
    """Scores and deltas of what the box head found."""

    def __init__(self, sizes: RegionSizes) -> None:
        super().__init__()
        width = sizes.heads.box_width
        self.cls_score = nn.Linear(width, sizes.num_classes + 1)
        self.bbox_pred = nn.Linear(width, 4 * sizes.num_classes)

    def forward(self, x: Tensor) -> Scored:
        """Of [R, width]."""
        return Scored(self.cls_score(x), self.bbox_pred(x).unflatten(1, (-1, 4)))


class MaskHead(nn.Module):
    """Convolutions, then twice the side, then a map for each class."""

    def __init__(self, sizes: RegionSizes, channels: int, norm: Norm) -> None:
        super().__init__()
        self._convs = sizes.heads.mask_convs
        for number in range(1, self._convs + 1):
            conv = NormedConv(channels, channels, 3, norm, relu=True)
            setattr(self, f"mask_fcn{number}", conv)
        self.deconv = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.predictor = nn.Conv2d(channels, sizes.num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[R, C, 14, 14] to logits [R, classes, 28, 28]."""
        for number in range(1, self._convs + 1):
            x = getattr(self, f"mask_fcn{number}")(x)
        found: Tensor = self.predictor(F.relu(self.deconv(x)))
        return found


class RegionHeads(nn.Module):
    """All heads of regions, by the published names."""

    def __init__(self, sizes: RegionSizes, channels: int, norm: Norm) -> None:
        super().__init__()
        self.box_head = BoxHead(sizes, channels, norm)
        self.box_predictor = BoxPredictor(sizes)
        self.mask_head = MaskHead(sizes, channels, norm)

    def boxes(self, pooled: Tensor) -> Scored:
        """Of regions [R, C, 7, 7]; float32 (float64 for a float64 model)."""
        x = pooled.to(self.box_predictor.cls_score.weight.dtype)
        scored = self.box_predictor(self.box_head(x))
        return Scored(widened(scored.scores), widened(scored.deltas))

    def masks(self, pooled: Tensor, classes: Tensor) -> Tensor:
        """Logits [R, 28, 28] of each region's class [R], of regions [R, C, 14, 14]."""
        logits = self.mask_head(pooled.to(self.mask_head.predictor.weight.dtype))
        rows = torch.arange(len(classes), device=classes.device)
        return widened(logits[rows, classes])
