"""A picture of any size seen through windows of one: logits averaged where windows overlap, brought
to the picture's size, and the largest taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rcmae.data.dense.maps import is_wide

Size = tuple[int, int]  # (height, width) in pixels
STRIP_NUMBERS = 2**25  # logits of a strip of the picture: 128 MiB in float32


class Window(NamedTuple):
    """A part of an image."""

    top: int
    left: int
    bottom: int
    right: int


def windows(size: Size, crop: Size, stride: Size) -> list[Window]:
    """The windows that cover an image, row by row; the last of a row is moved back, so that all
    have the crop's size. A side that is shorter than the crop gives a shorter window.
    """
    found = []
    for top, bottom in _spans(size[0], crop[0], stride[0]):
        for left, right in _spans(size[1], crop[1], stride[1]):
            found.append(Window(top, left, bottom, right))
    return found


def _spans(side: int, crop: int, stride: int) -> Iterator[tuple[int, int]]:
    for number in range(max(side - crop + stride - 1, 0) // stride + 1):
        end = min(number * stride + crop, side)
        yield max(end - crop, 0), end


class Canvas:
    """Logits of an image, gathered window by window.

    Args:
        size: of the image.
        crop, stride: of the windows.
        flipped: whether it is the mirror image.
    """

    def __init__(self, size: Size, crop: Size, stride: Size, *, flipped: bool = False) -> None:
        self.windows = windows(size, crop, stride)
        self.flipped = flipped
        self._size = size
        self._sums: Tensor | None = None  # [classes, height, width]
        self._missing = len(self.windows)

    @property
    def is_full(self) -> bool:
        """Whether all windows have come."""
        return self._missing == 0

    def add(self, window: Window, logits: Tensor) -> None:
        """Logits [classes, h, w] of a window, at its size or larger: padding is cut away."""
        if self._sums is None:
            self._sums = logits.new_zeros(logits.shape[0], *self._size)
        height, width = window.bottom - window.top, window.right - window.left
        part = self._sums[:, window.top : window.bottom, window.left : window.right]
        part += logits[:, :height, :width]
        self._missing -= 1

    def logits(self) -> Tensor:
        """[classes, height, width], averaged over the windows that cover a pixel, turned back where
        the image was flipped."""
        assert self._sums is not None
        assert self.is_full
        counts = self._sums.new_zeros(self._size)
        for top, left, bottom, right in self.windows:
            counts[top:bottom, left:right] += 1
        averaged = self._sums / counts
        return averaged.flip(-1) if self.flipped else averaged


def rows_resized(logits: Tensor, size: Size, rows: range) -> Tensor:
    """Some rows [classes, len(rows), width] of the logits [classes, h, w] at another size: bilinear
    between pixel centres. The same numbers whatever the rows are that are asked for."""
    height = logits.shape[1]
    places = torch.arange(rows.start, rows.stop, device=logits.device, dtype=torch.float64)
    places = ((places + 0.5) * (height / size[0]) - 0.5).clamp(0, height - 1)
    upper = places.floor().long()
    lower = (upper + 1).clamp(max=height - 1)
    share = (places - upper).to(logits.dtype)[:, None]
    mixed = logits[:, upper] * (1 - share) + logits[:, lower] * share
    sides = (len(rows), size[1])
    return F.interpolate(mixed[None], sides, mode="bilinear", align_corners=False)[0]


def probabilities(logits: Sequence[Tensor], size: Size, rows: range) -> Tensor:
    """Some rows [classes, len(rows), width] of what a picture shows, averaged over several logits
    of it (scales, flips)."""
    total = torch.zeros(())
    for each in logits:
        total = total.to(each.device) + rows_resized(each, size, rows).softmax(dim=0)
    return total / len(logits)


def predicted(logits: Sequence[Tensor], size: Size) -> Tensor:
    """The most likely class [height, width] of each pixel of a picture, uint8 or int16 as maps of
    as many classes, strip by strip: a picture of 6 megapixels and 150 classes would take 3.6 GB at
    once.

    Args:
        logits: of the picture at any sizes, one a scale and flip.
        size: of the picture.
    """
    height, width = size
    num_classes = logits[0].shape[0]
    step = max(1, STRIP_NUMBERS // (num_classes * width))
    dtype = torch.int16 if is_wide(num_classes) else torch.uint8
    strips = []
    for start in range(0, height, step):
        rows = range(start, min(start + step, height))
        if len(logits) == 1:  # the largest logit has the largest probability
            strip = rows_resized(logits[0], size, rows)
        else:
            strip = probabilities(logits, size, rows)
        strips.append(strip.argmax(dim=0).to(dtype))
    return torch.cat(strips)
