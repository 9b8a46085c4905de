"""Every size, limit and threshold of a detector: values, no code of any."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rcmae.models.patches import Positions
from rcmae.models.sizes import NetworkSizes

STRIDES = (4, 8, 16, 32, 64)  # pixels, of the pyramid's levels p2 to p6
POOLED = 4  # levels that regions are read from: all but the last

Norm = Literal["LN", "BN"]  # of pyramid and heads: over channels, or over all ranks' images


@dataclass(frozen=True)
class BackboneSizes:
    """A plain ViT with windows, and its pyramid."""

    vit: NetworkSizes  # of the canvas; its decoder plays no part
    window: int  # side of an attention window in patches
    windowed: tuple[int, ...]  # numbers of the blocks that attend within windows; vitdet
    channels: int = 256  # of each level
    table: tuple[int, int] = (14, 14)  # grid of the positions that pretraining had; vitdet
    drop_path: float = 0.0  # at the last block; it grows from 0 at the first
    positions: Positions = "column_first"  # order of the fixed table's halves; benchmark
    groups: int = 32  # of the adapters' group norm; benchmark


@dataclass(frozen=True)
class ProposalSizes:
    """Anchors, and how regions are proposed from them."""

    anchors: tuple[tuple[float, ...], ...] = ((32,), (64,), (128,), (256,), (512,))  # pixels
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height over width
    iou: tuple[float, float] = (0.3, 0.7)  # below: background; from here on: an object
    sampled: int = 256  # anchors of an image that the loss sees
    positive: float = 0.5  # of these at most
    per_level: tuple[int, int] = (2000, 1000)  # best of a level: training, evaluation
    kept: tuple[int, int] = (1000, 1000)  # best of all levels
    nms: float = 0.7
    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)  # of the four deltas
    convs: int = 2  # before the two outputs


@dataclass(frozen=True)
class RegionSizes:
    """Which regions are looked at, and how they are classified, boxed and masked."""

    num_classes: int
    iou: float = 0.5  # from here on a region shows an object
    sampled: int = 512  # regions of an image that the losses see
    positive: float = 0.25  # of these at most
    canonical: tuple[float, int] = (224.0, 4)  # a region of this side is read at this level
    weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)  # of the four deltas
    box_side: int = 7  # of a region's features for the box head
    mask_side: int = 14  # for the mask head, which doubles it
    score: float = 0.05  # a detection's must be above
    nms: float = 0.5  # of detections of a class
    detections: int = 100  # best of an image
    heads: HeadSizes = field(default_factory=lambda: HeadSizes())


@dataclass(frozen=True)
class HeadSizes:
    """Layers of the box head and the mask head."""

    box_convs: int = 4
    box_width: int = 1024  # of the linear layer after them
    mask_convs: int = 4


@dataclass(frozen=True)
class DetectorSizes:
    """A detector's."""

    backbone: BackboneSizes
    proposals: ProposalSizes
    regions: RegionSizes
    kind: Literal["vitdet", "benchmark"] = "vitdet"
    decayed_norms: bool = False  # whether norms and positions of the ViT decay, too

    @property
    def norm(self) -> Norm:
        """Of pyramid and heads."""
        return "LN" if self.kind == "vitdet" else "BN"


def windowed_blocks(depth: int) -> tuple[int, ...]:
    """All but the last of each quarter, which attend globally: what both methods have."""
    each = max(1, depth // 4)
    return tuple(number for number in range(depth) if (number + 1) % each)
