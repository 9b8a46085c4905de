"""Sizes and boxes of an image with its map: pure functions of numbers and draws."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from rcmae.data.dense.maps import none_of

TRIES = 10  # boxes that are looked at before one is taken as it comes
Size = tuple[int, int]  # (height, width) in pixels


class Limits(NamedTuple):
    """The sides that a resized image may have, in pixels."""

    longer: float
    shorter: float

    def times(self, factor: float) -> Limits:
        """Scaled, cut down to whole pixels."""
        return Limits(int(self.longer * factor), int(self.shorter * factor))


def limits_of(crop: Size) -> Limits:
    """As published: four times the crop, and the crop."""
    return Limits(4 * min(crop), min(crop))


def within(size: Size, limits: Limits) -> Size:
    """The largest size of the same shape within the limits."""
    factor = min(limits.longer / max(size), limits.shorter / min(size))
    return _times(size, factor)


def at_least(size: Size, shorter: int) -> Size:
    """The size of the same shape whose shorter side is this, whatever the longer becomes."""
    return _times(size, shorter / min(size))


def resize_image(image: Tensor, size: Size, *, antialias: bool) -> Tensor:
    """[C, h, w] uint8 at another size: bilinear. The published pipelines do not antialias."""
    if tuple(image.shape[1:]) == size:
        return image
    return interpolate(image[None], size, mode="bilinear", antialias=antialias)[0]


def resize_map(values: Tensor, size: Size) -> Tensor:
    """[h, w] at another size: each pixel is that at floor(place * old / new)."""
    rows, columns = (
        torch.arange(new) * old // new for old, new in zip(values.shape, size, strict=True)
    )
    return values[rows][:, columns]


def boxes(size: Size, crop: Size, draws: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Where boxes of the crop's size begin (top, left), each of two draws; a side that is shorter
    than the crop begins at 0.
    """
    ranges = [max(side - length, 0) + 1 for side, length in zip(size, crop, strict=True)]
    pairs = draws.reshape(-1, 2)
    return [(int(down * ranges[0]), int(across * ranges[1])) for down, across in pairs]


def mixed_box(
    values: Tensor, crop: Size, drawn: Iterable[tuple[int, int]], max_share: float
) -> tuple[int, int]:
    """The first box (top, left) that two classes or more share, none of which fills it; else the
    last, as it comes.

    Args:
        values: the map [h, w].
        crop: of the box.
        drawn: boxes, `TRIES` to be looked at and one more.
        max_share: of the labelled pixels that a class stays under; 1: the first box is taken.
    """
    box = (0, 0)
    for number, box in enumerate(drawn):
        if max_share >= 1.0 or number == TRIES or _is_mixed(cut(values, box, crop), max_share):
            break
    return box


def cut(pixels: Tensor, box: tuple[int, int], crop: Size) -> Tensor:
    """The part of [..., h, w] in a box; smaller where the image ends before."""
    top, left = box
    return pixels[..., top : top + crop[0], left : left + crop[1]]


def padded(pixels: Tensor, crop: Size, value: int) -> Tensor:
    """[..., h, w] filled up at the bottom and at the right."""
    if tuple(pixels.shape[-2:]) == crop:
        return pixels
    whole = pixels.new_full((*pixels.shape[:-2], *crop), value)
    whole[..., : pixels.shape[-2], : pixels.shape[-1]] = pixels
    return whole


def _is_mixed(values: Tensor, max_share: float) -> bool:
    none = none_of(values)
    counts = torch.bincount(values.reshape(-1), minlength=none + 1)[:none]
    return int((counts > 0).sum()) > 1 and float(counts.max()) / float(counts.sum()) < max_share


def _times(size: Size, factor: float) -> Size:
    height, width = (int(side * factor + 0.5) for side in size)
    return max(height, 1), max(width, 1)
