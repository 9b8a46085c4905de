"""A map as segmentation trains with it: a class a byte, of more than 255 classes two bytes; the
largest number of the type is no label."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcmae.data.members.maps import decode_map, no_label
from rcmae.data.transforms import MAX_PIXELS, BadImage

NONE = 255  # a pixel without a label, of a map of bytes
WIDE_NONE = 2**15 - 1  # the same of a wide map, int16: torch counts and compares no uint16
MAX_CLASSES = 4096  # an evaluation counts their square
_NAMED = 5  # classes that a message names

Classes = NDArray[np.uint8] | NDArray[np.int16]


def none_of(values: Tensor) -> int:
    """The number that is no label in a map."""
    return WIDE_NONE if values.dtype == torch.int16 else NONE


def is_wide(num_classes: int) -> bool:
    """Whether maps of so many classes have two bytes a pixel."""
    return num_classes > NONE


def read_map(
    data: bytes,
    size: tuple[int, int],
    num_classes: int,
    *,
    zero_is_none: bool = False,
    max_pixels: int = MAX_PIXELS,
    section: str = "segment",
) -> Classes:
    """The classes [h, w] of an encoded map.

    Args:
        data: PNG of one channel.
        size: (height, width) of its image.
        num_classes: all labels must lie below.
        zero_is_none: zero means that there is no label, and n is class n - 1.
        max_pixels: a larger one is refused before it takes memory.
        section: of the recipe that says so, for messages.

    Raises:
        BadImage: it is no map of this image or of these classes; says which values lie outside,
            and of how many pixels.
    """
    numbers = decode_map(data, size, max_pixels=max_pixels)
    none = no_label(numbers)
    counts = np.bincount(numbers.reshape(-1), minlength=1)
    first = int(zero_is_none)
    outside = [int(value) for value in np.flatnonzero(counts) if value >= num_classes + first]
    outside = [value for value in outside if value != none]
    if outside:
        named = ", ".join(f"{value} ({counts[value]:,} pixels)" for value in outside[:_NAMED])
        more = f" and {len(outside) - _NAMED} more" * (len(outside) > _NAMED)
        hint = ""
        if outside == [num_classes] and not zero_is_none:
            hint = f"; if zero is no label, set {section}.map_zero=none"
        raise BadImage(
            f"its map has numbers outside {section}.num_classes={num_classes}: {named}{more}{hint}"
        )
    wide = is_wide(num_classes)
    if numbers.dtype == np.uint8 and not wide:
        narrow = numbers.astype(np.uint8, copy=False)
        return without_zero(narrow) if zero_is_none else narrow
    last = min(first + num_classes, none)
    table = np.full(none + 1, WIDE_NONE if wide else NONE, np.int16)
    table[first:last] = np.arange(last - first)
    return table[numbers] if wide else table.astype(np.uint8)[numbers]


def without_zero(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The map of a set whose zero means that there is no label (ADE20K): 0 -> none, n -> n - 1;
    none stays none.
    """
    table = np.arange(256, dtype=np.int16) - 1
    table[0] = table[NONE] = NONE
    return table.astype(np.uint8)[values]
