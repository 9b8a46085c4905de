"""What the markers of a JPEG say: its header, how its blocks lie, its scans, its end."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

END = b"\xff\xd9"
SCAN = 0xDA  # the marker that a scan begins with
BLOCK = 8  # pixels of its side
_HUFFMAN_FRAMES = (0xC0, 0xC1)  # baseline and extended, sequential
_RESTART_INTERVAL = 0xDD
_APPLICATION = 0xE9  # APP9, which no format that we know of uses
_SEGMENTS = b"RCMAE segments\0"
_FRAMES = bytes((0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF))
# a marker and the length of its segment; not those that have none, and may stand within a scan
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])(..)", re.DOTALL)
_MOST_MARKERS = 10_000  # of a file, and bytes that fill up between them; a camera's has some tens
_MOST_FILLING = 2**16  # bytes between two markers before the codes: Pillow reads them one by one
_COLOURS = ("YCbCr", "Gray", "RGB")


class Layout(NamedTuple):
    """Where the frame of a JPEG of one scan is, and how its blocks are grouped."""

    frame: int  # first byte of the height in its header
    scan: int  # first byte of the Huffman codes
    height: int  # pixels
    width: int
    unit_height: int  # of an MCU, the unit that codes are grouped in, in pixels
    unit_width: int
    interval: int  # MCUs between two restart markers; 0: there are none
    # [segments] uint16, little-endian: bytes of codes from each marker to the end of the next, as
    # the file says; to be believed where the markers are there
    segments: bytes

    @property
    def rows(self) -> int:
        """MCUs from top to bottom."""
        return -(-self.height // self.unit_height)

    @property
    def columns(self) -> int:
        """MCUs from left to right."""
        return -(-self.width // self.unit_width)


class Header(NamedTuple):
    """What the header of a JPEG says."""

    height: int
    width: int
    colours: str  # as libjpeg-turbo names them
    layout: Layout | None  # None: progressive, of several scans or torn

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
    return Header(height, width, colour, layout(data))


def layout(data: bytes) -> Layout | None:
    """The layout of a JPEG; None of those that are progressive, of several scans or torn, or have
    no end of markers.
    """
    at = 2
    interval = 0
    segments = b""
    frame = None
    for _ in range(_MOST_MARKERS):
        if at + 4 > len(data) or data[at] != 0xFF:
            return None
        kind = data[at + 1]
        if kind == 0xFF:  # a byte that fills up
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at + 4 : at + 2 + length]
        if len(segment) != length - 2:
            return None
        if kind in _HUFFMAN_FRAMES:
            if frame is not None or len(segment) < 6 or len(segment) != 6 + 3 * segment[5]:
                return None
            frame = (at + 5, segment)
        elif kind == _RESTART_INTERVAL and length == 4:
            interval = int.from_bytes(segment, "big")
        elif kind == _APPLICATION and segment.startswith(_SEGMENTS):
            segments = segment[len(_SEGMENTS) :]
        elif kind == SCAN:
            if frame is None or not segment or segment[0] != frame[1][5]:
                return None  # another kind of frame, or not all colours in this scan
            return _laid_out(frame[0], frame[1], at + 2 + length, interval, segments)
        at += 2 + length
    return None


def with_segments(data: bytes, found: Layout, lengths: bytes) -> bytes:
    """The file with what its layout says as `segments`, where a marker can hold it."""
    content = _SEGMENTS + lengths
    length = 2 + len(content)
    if length >= 2**16:
        return data
    marker = bytes((0xFF, _APPLICATION)) + length.to_bytes(2, "big") + content
    at = found.frame - 5  # before that of the frame
    return data[:at] + marker + data[at:]


def _laid_out(
    frame: int, header: bytes, scan: int, interval: int, segments: bytes
) -> Layout | None:
    height = int.from_bytes(header[1:3], "big")
    width = int.from_bytes(header[3:5], "big")
    factors = header[7::3]  # of each colour: how many blocks of it an MCU has, along and down
    across = [factor >> 4 for factor in factors]
    down = [factor & 15 for factor in factors]
    if not (height and width and factors and all(across) and all(down)):
        return None
    if len(factors) == 1:
        across = down = [1]  # of a single colour an MCU is a block, whatever the factors
    unit_height, unit_width = BLOCK * max(down), BLOCK * max(across)
    return Layout(frame, scan, height, width, unit_height, unit_width, interval, segments)


def scans(data: bytes, above: int) -> int:
    """How many scans a JPEG has, as soon as that may be more than `above`; else 0 or 1.

    Each scan of a progressive JPEG goes over all of its pixels, and a few bytes make one.

    Raises:
        ValueError: there is no end of markers, or of bytes that are none.
    """
    found = 0
    parts = 0  # colours of the image
    at = 2
    for _ in range(_MOST_MARKERS):
        marker = _MARKER.search(data, at)
        if not found and (marker.start() if marker else len(data)) - at > _MOST_FILLING:
            raise ValueError(f"over {_MOST_FILLING:,} bytes between its markers")
        if marker is None or marker[1] == END[1:]:
            return found
        kind, start = marker[1][0], marker.start(2)
        if kind in _FRAMES:
            # of one that is progressive each scan counts, whatever it has
            parts = data[start + 7] if kind in _HUFFMAN_FRAMES and len(data) > start + 7 else 0
        elif kind == SCAN:
            found += 1
            if found == 1 and len(data) > start + 2 and data[start + 2] == parts:
                return 1  # decoders look for no other
            if found == 1 and data.count(bytes((0xFF, SCAN)), start) < above:
                return 0
        at = start + max(2, int.from_bytes(marker[2], "big"))
    raise ValueError(f"over {_MOST_MARKERS:,} markers")


def is_whole(data: bytes) -> bool:
    """Whether the end of a JPEG is there."""
    return data.endswith(END)
