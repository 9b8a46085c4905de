"""Colours of an 8-bit image, distorted as segmentation trains with (SSD, Liu et al., 2016).

Saturation and hue are moved in HSV of 8 bits (hue in steps of two degrees), as published: a float
one differs by up to three levels. Back in RGB numbers are cut off, as OpenCV's vector code does: at
the right edge, where its plain code takes over and rounds, it differs by a level."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rcmae.data.draws import Purpose, uniform

Pixels = NDArray[np.uint8]


class Distortion(NamedTuple):
    """What is done to an image; None is left out."""

    brightness: float | None = None  # levels that are added
    contrast: float | None = None  # factor of all values
    saturation: float | None = None  # factor
    hue: int | None = None  # steps of two degrees
    contrast_first: bool = False  # or after the hue


@dataclass(frozen=True)
class Strength:
    """How far distortions go; each is made to half of the images."""

    brightness: float = 32.0  # levels
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: int = 18  # steps of two degrees


def drawn(seed: int, position: int, strength: Strength = Strength()) -> Distortion:
    """The distortion of the sample at a position of the run."""
    draws = uniform(seed, Purpose.DISTORT, position, count=9)
    coins, sizes = draws[:5] < 0.5, draws[5:].tolist()

    def between(low: float, high: float, draw: float) -> float:
        return low + (high - low) * draw

    return Distortion(
        between(-strength.brightness, strength.brightness, sizes[0]) if coins[0] else None,
        between(*strength.contrast, sizes[1]) if coins[1] else None,
        between(*strength.saturation, sizes[2]) if coins[2] else None,
        int(2 * strength.hue * sizes[3]) - strength.hue if coins[3] else None,
        bool(coins[4]),
    )


def distorted(pixels: Pixels, how: Distortion) -> Pixels:
    """The image [h, w, 3] RGB, distorted."""
    if how.brightness is not None:
        pixels = _levels(pixels, 1.0, how.brightness)
    if how.contrast is not None and how.contrast_first:
        pixels = _levels(pixels, how.contrast, 0.0)
    if how.saturation is not None:
        pixels = saturated(pixels, how.saturation)
    if how.hue is not None:
        pixels = turned(pixels, how.hue)
    if how.contrast is not None and not how.contrast_first:
        pixels = _levels(pixels, how.contrast, 0.0)
    return pixels


def saturated(pixels: Pixels, factor: float) -> Pixels:
    """With the saturation multiplied."""
    hue, saturation, value = to_hsv(pixels)
    return to_rgb(hue, _levels(saturation, factor, 0.0), value)


def turned(pixels: Pixels, steps: int) -> Pixels:
    """With the hue turned by steps of two degrees."""
    hue, saturation, value = to_hsv(pixels)
    return to_rgb(((hue.astype(np.int16) + steps) % 180).astype(np.uint8), saturation, value)


def to_hsv(pixels: Pixels) -> tuple[Pixels, Pixels, Pixels]:
    """Hue 0 to 179, saturation and value 0 to 255, each [h, w], of RGB [h, w, 3]."""
    red, green, blue = (np.ascontiguousarray(pixels[..., channel]) for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    saturation = _saturations().take((value.astype(np.intp) << 8) | spread)
    is_red = value == red
    is_green = (value == green) & ~is_red
    first = np.where(is_red, green, np.where(is_green, blue, red)).astype(np.intp)
    other = np.where(is_red, blue, np.where(is_green, red, green))
    largest = np.where(is_red, np.intp(0), np.where(is_green, np.intp(1), np.intp(2)))
    hue = _hues().take(((largest * 511 + first - other + 255) << 8) | spread)
    return hue, saturation, value


def to_rgb(hue: Pixels, saturation: Pixels, value: Pixels) -> Pixels:
    """RGB [h, w, 3] of `to_hsv`'s three, cut off to whole numbers."""
    place = (hue.astype(np.intp) << 8) | saturation
    high = value.astype(np.float32)
    whole = np.empty((*hue.shape, 3), np.uint8)
    for channel, factors in enumerate(_factors()):
        whole[..., channel] = high * factors.take(place)
    return whole


# Tables of what these compute, several times as fast as arithmetic on each pixel.


@cache
def _saturations() -> Pixels:
    """[256 * 256]: of a value and a spread, the largest less the smallest of the three."""
    value, spread = np.mgrid[:256, :256].astype(np.int32)
    return _divided(spread, 255, value).astype(np.uint8).reshape(-1)


@cache
def _hues() -> Pixels:
    """[3 * 511 * 256]: of the largest of the three, the difference of the two others, a spread."""
    largest, difference, spread = np.mgrid[:3, -255:256, :256].astype(np.int32)
    hue = _divided(difference + 2 * largest * spread, 30, spread) % 180
    return hue.astype(np.uint8).reshape(-1)


@cache
def _factors() -> NDArray[np.float32]:
    """[3, 180 * 256]: what red, green and blue have of the value, of a hue and a saturation."""
    sixth = (np.arange(180, dtype=np.float32) / np.float32(30.0))[:, None]
    share = (np.arange(256, dtype=np.float32) / np.float32(255.0))[None]
    rows = []
    for place in np.arange(3, dtype=np.float32) * 2:  # of red, green and blue on the circle
        distance = np.abs((sixth - place + 3.0) % 6.0 - 3.0)  # 0 to 3 sixths
        pure = np.clip(2.0 - distance, 0.0, 1.0)  # of a colour of full saturation
        rows.append((1.0 - share * (1.0 - pure)).reshape(-1))
    return np.stack(rows)


def _divided(above: NDArray[np.int32], factor: int, below: NDArray[np.int32]) -> NDArray[np.int32]:
    """above * factor / below, rounded, as OpenCV does it: by a table of quotients of 12 bits."""
    table = np.rint((factor << 12) / np.maximum(np.arange(256), 1)).astype(np.int32)
    quotients: NDArray[np.int32] = (above * table[below] + (1 << 11)) >> 12
    return quotients


def _levels(values: Pixels, factor: float, more: float) -> Pixels:
    """Multiplied and added to, kept in 0 to 255, and cut off to whole numbers."""
    table = np.clip(
        np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(more), 0, 255
    )
    lookup = table.astype(np.uint8).tolist() * (3 if values.ndim == 3 else 1)
    return np.array(Image.fromarray(values).point(lookup))  # as numpy indexes, in C
