"""What the markers of a JPEG say: its header, its scans, its end."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

END = b"\xff\xd9"
SCAN = 0xDA  # the marker that a scan begins with
_FRAMES = bytes((0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF))
# a marker and the length of its segment; not those that have none, and may stand within a scan
_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd8\xff])(..)", re.DOTALL)
_COLOURS = ("YCbCr", "Gray", "RGB")


class Header(NamedTuple):
    """What the header of a JPEG says."""

    height: int
    width: int
    colours: str  # as libjpeg-turbo names them

    @property
    def plain(self) -> bool:
        """Whether its colours are those this module decodes."""
        return self.colours in _COLOURS


class Box(NamedTuple):
    """A part of an image, in its pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """This part of an image, a view."""
        return pixels[self.top : self.top + self.height, self.left : self.left + self.width]


def header(data: bytes) -> Header:
    """The header of a JPEG. Raises ValueError."""
    height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
    return Header(height, width, colour)


def scans(data: bytes, above: int) -> int:
    """How many scans a JPEG has, as soon as that may be more than `above`; else 0 or 1.

    Each scan of a progressive JPEG goes over all of its pixels, and a few bytes make one.
    """
    found = 0
    parts = 0  # colours of the image
    at = 2
    while (marker := _MARKER.search(data, at)) is not None and marker[1] != END[1:]:
        kind, start = marker[1][0], marker.start(2)
        if kind in _FRAMES:
            # of one that is progressive each scan counts, whatever it has
            parts = data[start + 7] if kind in _FRAMES[:2] and len(data) > start + 7 else 0
        elif kind == SCAN:
            found += 1
            if found == 1 and len(data) > start + 2 and data[start + 2] == parts:
                return 1  # decoders look for no other
            if found == 1 and data.count(bytes((0xFF, SCAN)), start) < above:
                return 0
        at = start + max(2, int.from_bytes(marker[2], "big"))
    return found


def is_whole(data: bytes) -> bool:
    """Whether the end of a JPEG is there."""
    return data.endswith(END)
