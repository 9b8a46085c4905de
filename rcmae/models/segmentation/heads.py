"""What reads a class for each place off the maps: UPerNet (Xiao et al., 2018), a fully
convolutional head beside it, and one linear layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcmae.models.batchnorm import GlobalBatchNorm

POOL_SCALES = (1, 2, 3, 6)
AUXILIARY_LEVEL = 2  # of the pyramid
AUXILIARY_WIDTH = 256


def resized(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Maps [B, C, h, w] at another size: bilinear between pixel centres, not antialiased."""
    if maps.shape[-2:] == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def drop_channels(maps: Tensor, keep: Tensor | None, rate: float) -> Tensor:
    """Maps without the channels that `keep` [B, C] has not; the others are scaled up.

    `keep`: 1 = stays; None: nothing is dropped.
    """
    if keep is None:
        return maps
    return maps * (keep.to(maps.dtype) / (1.0 - rate))[:, :, None, None]


class ConvModule(nn.Module):
    """A convolution without a bias that keeps the size, batch norm, ReLU."""

    def __init__(self, channels: int, width: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)
        self.bn = GlobalBatchNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, width, h, w]."""
        return F.relu(self.bn(self.conv(x)))


class UPerHead(nn.Module):
    """UPerNet's head on a pyramid of four maps of one width.

    Args:
        channels: of the maps.
        width: of the head.
        num_classes: that it tells apart.
        dropout: rate of whole channels before the last layer.
        scales: sides that the smallest map is pooled to.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        num_classes: int,
        *,
        dropout: float = 0.1,
        scales: Sequence[int] = POOL_SCALES,
    ) -> None:
        super().__init__()
        self.width = width
        self.dropout = dropout
        self.conv_seg = nn.Conv2d(width, num_classes, 1)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), ConvModule(channels, width, 1))
            for side in scales
        )
        self.bottleneck = ConvModule(channels + len(scales) * width, width, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(channels, width, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(ConvModule(width, width, 3) for _ in range(3))
        self.fpn_bottleneck = ConvModule(4 * width, width, 3)

    def top(self, smallest: Tensor) -> Tensor:
        """[B, width, h, w] of the smallest map, pooled at several scales."""
        size = smallest.shape[-2:]
        pooled = [resized(module(smallest), size) for module in self.psp_modules]
        return self.bottleneck(torch.cat([smallest, *pooled], dim=1))

    def features(self, pyramid: Sequence[Tensor]) -> Tensor:
        """[B, width, h, w] of the largest map's size."""
        *lower, smallest = pyramid
        laterals = [conv(each) for conv, each in zip(self.lateral_convs, lower, strict=True)]
        laterals.append(self.top(smallest))
        for level in range(len(laterals) - 1, 0, -1):
            size = laterals[level - 1].shape[-2:]
            laterals[level - 1] = laterals[level - 1] + resized(laterals[level], size)
        outputs = [conv(each) for conv, each in zip(self.fpn_convs, laterals[:-1], strict=True)]
        outputs.append(laterals[-1])
        size = outputs[0].shape[-2:]
        return self.fpn_bottleneck(torch.cat([resized(each, size) for each in outputs], dim=1))

    def forward(self, pyramid: Sequence[Tensor], keep: Tensor | None = None) -> Tensor:
        """Logits [B, classes, h, w]; `keep`: [B, width], as `drop_channels` takes it."""
        return self.conv_seg(drop_channels(self.features(pyramid), keep, self.dropout))


class FCNHead(nn.Module):
    """One convolution and a classifier on one map (Long et al., 2015): the auxiliary head."""

    def __init__(
        self, channels: int, width: int, num_classes: int, *, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.width = width
        self.dropout = dropout
        self.conv_seg = nn.Conv2d(width, num_classes, 1)
        self.convs = nn.Sequential(ConvModule(channels, width, 3))

    def forward(self, maps: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits [B, classes, h, w]; `keep`: [B, width]."""
        return self.conv_seg(drop_channels(self.convs(maps), keep, self.dropout))


class LinearHead(nn.Module):
    """Dropout, batch norm and one linear layer on normed tokens: what dense features are judged
    by (DINOv2, section 7.4)."""

    def __init__(self, channels: int, num_classes: int, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.width = channels
        self.dropout = dropout
        self.bn = GlobalBatchNorm(channels)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor], keep: Tensor | None = None) -> Tensor:
        """Logits [B, classes, rows, columns] of the one map; `keep`: [B, channels]."""
        (features,) = maps
        dropped = drop_channels(features.to(self.conv_seg.weight.dtype), keep, self.dropout)
        return self.conv_seg(self.bn(dropped))
