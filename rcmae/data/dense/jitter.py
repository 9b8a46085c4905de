"""Large-scale jitter (Ghiasi et al., 2021): an image at a random scale, cut or padded to a canvas.

Two orders are published. ViTDet flips, resizes and cuts; what is left of the canvas is 0 after the
image is normalised, at the bottom and the right. The detection benchmark resizes, cuts and fills up
with grey, and then flips: its padding may lie at the left. Resizing is antialiased
bilinear: torch's of a whole image, Pillow's of a part, so nothing else of a JPEG has to be decoded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

from rcmae.data.jpeg import Box, decode_box
from rcmae.data.transforms import MAX_PIXELS, BadImage, decode, plain_jpeg

Size = tuple[int, int]  # (height, width) in pixels
Style = Literal["vitdet", "benchmark"]
GREY = 128  # what the benchmark fills up with, before an image is normalised


class Jitter(NamedTuple):
    """Where an image goes on a canvas."""

    source: Size
    resized: Size
    top: int  # of the cut, in the resized image (of vitdet: flipped already)
    left: int
    size: Size  # of the cut
    canvas: Size
    flipped: bool
    style: Style

    @property
    def extent(self) -> tuple[int, int, int, int]:
        """(x0, y0, x1, y1) of the canvas that is image."""
        height, width = self.size
        if self.style == "benchmark" and self.flipped:
            return self.canvas[1] - width, 0, self.canvas[1], height
        return 0, 0, width, height

    @property
    def factors(self) -> tuple[float, float]:
        """Resized over source: down, along."""
        return self.resized[0] / self.source[0], self.resized[1] / self.source[1]


def jitter_of(
    source: Size, canvas: Size, *, scale: float, offset: float, flipped: bool, style: Style
) -> Jitter:
    """Of the draws of an image.

    Args:
        source: of the image.
        canvas: what a scale of 1 fits into.
        scale: of the image over that.
        offset: 0 to 1, of both sides alike: where the cut is.
        flipped: whether the image is mirrored.
        style: whose order.
    """
    factor = min(canvas[0] * scale / source[0], canvas[1] * scale / source[1])
    height, width = (max(1, round(side * factor)) for side in source)
    top = round(max(height - canvas[0], 0) * offset)
    left = round(max(width - canvas[1], 0) * offset)
    size = (min(canvas[0], height), min(canvas[1], width))
    return Jitter(source, (height, width), top, left, size, canvas, flipped, style)


def fitted(source: Size, canvas: Size) -> Jitter:
    """The whole image, as large as it goes: for evaluation."""
    return jitter_of(source, canvas, scale=1.0, offset=0.0, flipped=False, style="vitdet")


def seen_pixels(pixels: NDArray[np.uint8], jitter: Jitter) -> NDArray[np.uint8]:
    """The cut [h, w, C] of decoded pixels, flipped as `vitdet` has it; the benchmark's flip is of
    the canvas.
    """
    return _resized(pixels, Box(0, 0, *jitter.source), 1, jitter)


def seen(
    data: bytes, jitter: Jitter, channels: int, margin: float, *, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """`seen_pixels` of an encoded image: of a JPEG only the part is decoded, at a half, a quarter
    or an eighth where the cut needs no more.

    Args:
        data: the file.
        jitter: of its size.
        channels: 1 or 3.
        margin: a JPEG is shrunk as long as it keeps this many times the pixels of the cut.
        max_pixels: a larger image is refused before it takes memory.

    Raises:
        BadImage: the bytes cannot be decoded.
    """
    head = plain_jpeg(data, max_pixels) if channels in (1, 3) else None
    if head is None or (head.height, head.width) != jitter.source:
        return seen_pixels(decode(data, channels, max_pixels=max_pixels), jitter)
    shrink = _shrink(jitter, margin)
    box = _source_box(jitter, shrink)
    try:
        pixels = decode_box(data, box, shrink, channels, head)
    except ValueError:
        return seen_pixels(decode(data, channels, max_pixels=max_pixels), jitter)  # if Pillow can
    return _resized(pixels, box, shrink, jitter)


def on_canvas(
    pixels: NDArray[np.uint8], jitter: Jitter, fill: Sequence[int] = ()
) -> NDArray[np.uint8]:
    """[C, H, W] of the cut [h, w, C]. The padding is `fill` [C] or 0; the benchmark's is grey."""
    height, width = jitter.size
    channels = pixels.shape[2]
    levels = [GREY] * channels if jitter.style == "benchmark" else fill or [0] * channels
    canvas = np.empty((channels, *jitter.canvas), np.uint8)
    canvas[:] = np.array(levels, np.uint8)[:, None, None]
    canvas[:, :height, :width] = pixels.transpose(2, 0, 1)
    if jitter.style == "benchmark" and jitter.flipped:
        canvas = canvas[:, :, ::-1]
    return np.ascontiguousarray(canvas)


def _seen_first(jitter: Jitter) -> bool:
    """Whether the image is flipped before it is cut."""
    return jitter.flipped and jitter.style == "vitdet"


def _window(jitter: Jitter) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) of the cut in the source, unflipped."""
    down, along = jitter.factors
    height, width = jitter.size
    left = jitter.left
    if _seen_first(jitter):
        left = jitter.resized[1] - jitter.left - width
    return left / along, jitter.top / down, (left + width) / along, (jitter.top + height) / down


def _shrink(jitter: Jitter, margin: float) -> int:
    room = min(1.0 / factor for factor in jitter.factors) / margin
    return max(factor for factor in (1, 2, 4, 8) if factor == 1 or factor <= room)


def _rounded_up(jitter: Jitter, shrink: int) -> Size:
    """The source, to whole pixels of the shrunken image."""
    height, width = (-(-side // shrink) * shrink for side in jitter.source)
    return height, width


def _whole(pixels: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """All pixels [h, w, C] at another size: as Pillow within a level, four times as fast."""
    image = torch.from_numpy(np.require(pixels, requirements=("C", "W"))).permute(2, 0, 1)[None]
    found = interpolate(image, size, mode="bilinear", antialias=True)[0]
    resized: NDArray[np.uint8] = found.permute(1, 2, 0).numpy()
    return resized


def _source_box(jitter: Jitter, shrink: int) -> Box:
    """What the cut is computed from: the window, and what antialiasing reads beside it. All four
    numbers are multiples of `shrink`, but at the end of the image.
    """
    x0, y0, x1, y1 = _window(jitter)
    down, along = jitter.factors
    bounds = []
    for start, end, factor, side in (
        (y0, y1, down, jitter.source[0]),
        (x0, x1, along, jitter.source[1]),
    ):
        reach = max(1.0 / factor, shrink) + 2 * shrink
        first = max(0, math.floor((start - reach) / shrink)) * shrink
        last = min(-(-side // shrink), math.ceil((end + reach) / shrink)) * shrink
        bounds.append((first, last - first))
    (top, height), (left, width) = bounds
    return Box(top, left, height, width)


def _resized(pixels: NDArray[np.uint8], box: Box, shrink: int, jitter: Jitter) -> NDArray[np.uint8]:
    """The cut of a decoded part.

    Args:
        pixels: of the part, shrunk.
        box: the part in the source.
        shrink: by which it was.
        jitter: what is cut.
    """
    whole = (box.top, box.left, box.height, box.width) == (0, 0, *_rounded_up(jitter, shrink))
    if whole and jitter.size == jitter.resized:
        found = _whole(pixels, jitter.resized)
        return found[:, ::-1] if _seen_first(jitter) else found
    x0, y0, x1, y1 = _window(jitter)
    # a shrunken image may stand for a little more than the source: its last pixel is partly beyond
    rows, columns = pixels.shape[:2]
    window = (
        max((x0 - box.left) / shrink, 0.0),
        max((y0 - box.top) / shrink, 0.0),
        min((x1 - box.left) / shrink, columns),
        min((y1 - box.top) / shrink, rows),
    )
    height, width = jitter.size
    grey = pixels.shape[2] == 1
    try:
        image = Image.fromarray(pixels[:, :, 0] if grey else pixels)
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=window)
    except (MemoryError, ValueError) as error:
        raise BadImage(f"cannot be resized to {width}x{height}: {error}") from error
    cut = np.asarray(image)
    cut = cut[:, :, None] if grey else cut
    return cut[:, ::-1] if _seen_first(jitter) else cut
