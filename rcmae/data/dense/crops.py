"""Training crops of images with their maps, each keyed by its position: a random scale, a box that
no class fills, a flip, distorted colours, padding (mmsegmentation's pipeline)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rcmae.data.batch import Extra
from rcmae.data.dense import distortion, geometry
from rcmae.data.dense.geometry import Size
from rcmae.data.dense.maps import none_of, read_map
from rcmae.data.draws import Purpose, uniform
from rcmae.data.members.protocol import Seen, stacked
from rcmae.data.transforms import MAX_PIXELS, View, decode

MAPS = "maps"  # in Batch.extra: [B, H, W], see maps.py; none_of it where there is no label
EXTENTS = "extents"  # [B, 2] int64: rows and columns that are image; the rest is padding
_SCALE, _BOXES = range(2)  # draws of one purpose


@dataclass(frozen=True)
class Labels:
    """How a set's maps are read."""

    num_classes: int
    zero_is_none: bool = False
    section: str = "segment"  # of the recipe that says so, for messages


@dataclass(frozen=True)
class Augment:
    """What is done to an image and its map."""

    scale: tuple[float, float] = (0.5, 2.0)  # of the limits: four times the crop, and the crop
    max_class_share: float = 0.75  # of a crop's labelled pixels
    flip: float = 0.5  # probability
    distort: bool = True
    antialias: bool = False  # where an image becomes smaller


@dataclass(frozen=True)
class Crops:
    """The members of a segmentation's samples: a `Members`."""

    crop: Size
    labels: Labels
    augment: Augment = Augment()
    in_channels: int = 3
    max_pixels: int = MAX_PIXELS
    kinds: tuple[str, ...] = ("map",)
    optional: tuple[str, ...] = ()

    def views(
        self, image: bytes, content: Mapping[str, bytes], seed: int, positions: Sequence[int]
    ) -> list[Seen]:
        """Crops of one sample at several positions. Raises BadImage."""
        pixels = decode(image, self.in_channels, max_pixels=self.max_pixels)
        size = (pixels.shape[0], pixels.shape[1])
        values = read_map(
            content["map"],
            size,
            self.labels.num_classes,
            zero_is_none=self.labels.zero_is_none,
            max_pixels=self.max_pixels,
        )
        whole = torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(values)
        return [self._seen(*whole, seed, position) for position in positions]

    def collate(self, rows: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Extra]:
        """Maps and extents of all rows."""
        return {name: stacked([row[name] for row in rows]) for name in (MAPS, EXTENTS)}

    def _seen(self, image: Tensor, values: Tensor, seed: int, position: int) -> Seen:
        augment = self.augment
        low, high = augment.scale
        factor = low + (high - low) * uniform(seed, Purpose.SCALE, _SCALE, position, count=1)[0]
        old = (image.shape[1], image.shape[2])
        size = geometry.within(old, geometry.limits_of(self.crop).times(factor))
        values = geometry.resize_map(values, size)
        draws = uniform(seed, Purpose.SCALE, _BOXES, position, count=2 * (geometry.TRIES + 1))
        drawn = geometry.boxes(size, self.crop, draws)
        box = geometry.mixed_box(values, self.crop, drawn, augment.max_class_share)
        image = geometry.resize_image(image, size, antialias=augment.antialias)
        image, values = (geometry.cut(each, box, self.crop) for each in (image, values))
        extent = (image.shape[1], image.shape[2])
        flipped = bool(uniform(seed, Purpose.FLIP, 0, position, count=1)[0] < augment.flip)
        if flipped:
            image, values = image.flip(-1), values.flip(-1)
        if augment.distort:
            rows = image.permute(1, 2, 0).contiguous().numpy()
            rows = distortion.distorted(rows, distortion.drawn(seed, position))
            image = torch.from_numpy(rows).permute(2, 0, 1)
        by = [one / new for one, new in zip(old, size, strict=True)]
        where = [round(side * by[axis % 2]) for axis, side in enumerate((*box, *extent))]
        view = View(
            geometry.padded(image, self.crop, 0),
            (where[0], where[1], where[2], where[3], int(flipped)),
        )
        values = geometry.padded(values, self.crop, none_of(values))
        return Seen(view, {MAPS: values, EXTENTS: torch.tensor(extent)})


def without_padding(images: Tensor, extents: Tensor) -> Tensor:
    """Normalised images [B, C, H, W] with 0 where they are padding.

    Args:
        images: left as they are.
        extents: [B, 2] rows and columns that are image.
    """
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device) < extents[:, :1]
    columns = torch.arange(width, device=images.device) < extents[:, 1:]
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return images.masked_fill(~inside, 0.0)
