"""Random numbers that depend on what they are for, never on what was drawn before.

Every draw is Philox4x64 raw bits under the key (seed, purpose) at a counter that names the thing
drawn for: an absolute position in the run, a block of a stream. So the same position gets the same
crop and mask on any rank, in any worker, after any resume. Only raw bits and stable sorts are used:
numpy keeps those across versions, Generator's methods not."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Purpose(IntEnum):
    """What a draw is for.

    The values are part of every run's identity: add new ones, never renumber.
    """

    SHARDS = 1  # order of the shards in a pass
    ROTATION = 2  # where in the circle of shards a pass starts
    BLOCK = 3  # order of the samples in a shuffle block
    CROP = 4
    FLIP = 5
    MASK = 6
    MASK_BLOCKS = 20  # boxes of a block mask
    DROP_PATH = 21
    AUGMENT = 22
    ERASE = 23
    MIX = 24
    CORRUPTION = 25
    TASK = 26  # what a task from outside draws
    SCALE = 27  # of an image with its map or objects, and where it is cut
    DISTORT = 28  # brightness, contrast, saturation, hue
    DROPOUT = 29  # of whole channels
    ANCHORS = 30  # that are sampled
    REGIONS = 31
    BANK = 32  # patches of an image that others are compared with
    HELD = 33  # views of a held set's images


def raw(seed: int, purpose: Purpose, *where: int, count: int) -> NDArray[np.uint64]:
    """`count` raw 64-bit words for the place `where` (at most three non-negative numbers)."""
    assert 0 <= seed < 2**64, seed
    assert len(where) <= 3, where
    try:
        generator = _generators.one
    except AttributeError:
        generator = _generators.one = np.random.Philox(0)
    # The lowest word counts Philox blocks within one draw; the others name the place, so places
    # never overlap.
    counter = (0, *where, 0, 0, 0)[:4]
    # a sixth of the time that a new generator takes: numpy asks the system for a seed first
    generator.state = {
        "bit_generator": "Philox",
        "state": {"counter": counter, "key": (seed, int(purpose))},
        "buffer": (0, 0, 0, 0),
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }
    return generator.random_raw(count)


_generators = threading.local()


def uniform(seed: int, purpose: Purpose, *where: int, count: int) -> NDArray[np.float64]:
    """`count` doubles in [0, 1), 53 random bits each."""
    return (raw(seed, purpose, *where, count=count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, purpose: Purpose, *where: int, count: int) -> NDArray[np.int64]:
    """A random order of 0 .. count - 1."""
    return np.argsort(raw(seed, purpose, *where, count=count), kind="stable").astype(
        np.int64, copy=False
    )


def random_box(
    rows: int,
    columns: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draws: Sequence[float],
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a box of random area and aspect: log-uniform in aspect, as
    RandomResizedCrop's.

    Args:
        rows, columns: size of the image.
        scale: range of the box's area over the image's.
        ratio: range of width over height.
        draws: four numbers in [0, 1) for each try; where no box fits, the largest centred one
            within `ratio` is taken.
    """
    low = math.log(ratio[0])
    high = math.log(ratio[1])
    for at in range(0, len(draws), 4):
        area = rows * columns * (scale[0] + (scale[1] - scale[0]) * draws[at])
        aspect = math.exp(low + (high - low) * draws[at + 1])
        width = round(math.sqrt(area * aspect))
        height = round(math.sqrt(area / aspect))
        if 0 < width <= columns and 0 < height <= rows:
            top = int(draws[at + 2] * (rows - height + 1))
            left = int(draws[at + 3] * (columns - width + 1))
            return top, left, height, width
    height = min(rows, max(1, round(columns / ratio[0])))
    width = min(columns, max(1, round(rows * ratio[1])))
    return (rows - height) // 2, (columns - width) // 2, height, width
