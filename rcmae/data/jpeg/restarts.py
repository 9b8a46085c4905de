"""Restart markers: a part of a JPEG cut out as a JPEG of its own, before anything is decoded; and
the markers added to a file, its coefficients left as they are.

A JPEG's Huffman codes, most of what decoding costs, can be read from their start alone. A restart
marker (ITU-T T.81, B.2.4.4 and F.2.1.3.1) begins anew: what lies between two of them can be read by
itself. Where they stand at equal places of each row of blocks, a crop takes the segments that it
needs, in a file with a smaller frame. Its pixels are those of the whole image: where chroma is
interpolated, one block more is taken on either side. Files made here say in an APP9 marker how long
the segments are, which saves looking for the markers; those without it are searched.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from rcmae.data.jpeg.markers import BLOCK, END, Box, Layout, layout, with_segments
from rcmae.data.jpeg.recoding import INSTALL, PROGRAM, recoder
from rcmae.errors import Refused

_FIRST, _KINDS = 0xD0, 8  # restart markers, one after the other, over and over
_WORTH = 0.9  # a part of more of the image is not cut out: finding it costs as much
_BOX = 0.72  # of a side, about what the published random crop takes
_MARKER_BYTES = 3.5  # a marker, the bits up to it, and a first coefficient that has no other before
_SMALLEST = 24  # pixels between two markers, at least
_LENGTH = np.dtype("<u2")


class _Segments(NamedTuple):
    """Segments between restart markers that lie in a grid, as a range of each side."""

    top: int
    bottom: int  # the first that is beyond
    left: int
    right: int
    rows: int  # of the whole grid
    columns: int
    height: int  # of a segment, in pixels
    width: int

    @property
    def share(self) -> float:
        """Of all segments, those in the range."""
        taken = (self.bottom - self.top) * (self.right - self.left)
        return taken / (self.rows * self.columns)


def cut_out(data: bytes, box: Box, found: Layout | None) -> tuple[bytearray, Box] | None:
    """A box of an image as a JPEG of its own.

    Args:
        data: a whole file.
        box: inside the image.
        found: its layout.

    Returns:
        The file, and where the box lies in it, a multiple of 8 pixels from where it was; None where
        restart markers do not allow that, or where it would not pay.
    """
    if found is None or not found.interval:
        return None
    segments = _segments(found, box)
    if segments is None or segments.share > _WORTH:
        return None
    marks = _marks(data, found, segments.rows * segments.columns)
    if marks is None:
        return None
    top = segments.top * segments.height
    left = segments.left * segments.width
    height = min(found.height, segments.bottom * segments.height) - top
    width = min(found.width, segments.right * segments.width) - left
    size = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    head = data[: found.frame] + size + data[found.frame + 4 : found.scan]
    part = _joined(data, head, segments, marks, found.scan)
    return part, Box(box.top - top, box.left - left, box.height, box.width)


def _segments(found: Layout, box: Box) -> _Segments | None:
    """Those that a box needs; None: they do not lie in a grid."""
    rows_each, rest = divmod(found.interval, found.columns)
    if rows_each == 0:
        rows_each = 1
        columns_each, rest = found.interval, found.columns % found.interval
    else:
        columns_each = found.columns
    if rest:
        return None
    height = rows_each * found.unit_height
    width = columns_each * found.unit_width
    rows = -(-found.rows // rows_each)
    columns = found.columns // columns_each
    # what interpolation of chroma looks at
    above = found.unit_height if found.unit_height > BLOCK else 0
    beside = found.unit_width if found.unit_width > BLOCK else 0
    return _Segments(
        top=max(0, box.top - above) // height,
        bottom=min(rows, -(-(box.top + box.height + above) // height)),
        left=max(0, box.left - beside) // width,
        right=min(columns, -(-(box.left + box.width + beside) // width)),
        rows=rows,
        columns=columns,
        height=height,
        width=width,
    )


def _marks(data: bytes, found: Layout, count: int) -> NDArray[np.int64] | None:
    """The first byte of the marker behind each of `count` segments, the last of which is that of
    the end; None: these are not the markers that are there.
    """
    codes = np.frombuffer(data, np.uint8, offset=found.scan)
    marks = _listed(codes, found.segments, count)
    if marks is None:
        marks = _searched(codes, count)
    return None if marks is None else marks + found.scan


def _listed(codes: NDArray[np.uint8], segments: bytes, count: int) -> NDArray[np.int64] | None:
    """Where the file says that the markers are, if they are. A code has no 0xFF but with 0 behind
    it, so what looks like a marker is one.
    """
    if len(segments) != _LENGTH.itemsize * count:
        return None
    marks = np.cumsum(np.frombuffer(segments, _LENGTH), dtype=np.int64) - 2
    if marks[-1] != len(codes) - len(END) or not (codes[marks] == 0xFF).all():
        return None
    return marks if _are_in_order(codes, marks) else None


def _searched(codes: NDArray[np.uint8], count: int) -> NDArray[np.int64] | None:
    marked = codes[:-1] == 0xFF
    marked &= codes[1:] != 0  # 0: the byte before is of a code
    marks: NDArray[np.int64] = marked.nonzero()[0]
    if len(marks) != count or marks[-1] != len(codes) - len(END):
        return None
    return marks if _are_in_order(codes, marks) else None


def _are_in_order(codes: NDArray[np.uint8], marks: NDArray[np.int64]) -> bool:
    """Whether all markers but the last are restarts, none of them missing."""
    return bool((codes[marks[:-1] + 1] == _numbers(len(marks) - 1)).all())


def _numbers(count: int) -> NDArray[np.uint8]:
    """The second bytes of so many restart markers."""
    return (np.arange(count) % _KINDS + _FIRST).astype(np.uint8)


def _joined(
    data: bytes, head: bytes, segments: _Segments, marks: NDArray[np.int64], scan: int
) -> bytearray:
    """A file of a header and of the range of segments, their markers numbered anew."""
    begins = np.concatenate(([scan], marks[:-1] + 2))
    grid = (segments.rows, segments.columns)
    rows = slice(segments.top, segments.bottom)
    ends = marks.reshape(grid)[rows, segments.left : segments.right]
    firsts = begins.reshape(grid)[rows, segments.left].tolist()
    lasts = ends[:, -1].tolist()
    parts = [head]
    moved = []  # of each row: new place less old
    length = len(head)
    for first, last in zip(firsts, lasts, strict=True):
        parts.append(data[first : last + 2])
        moved.append(length - first)
        length += last + 2 - first
    file = bytearray().join(parts)
    places = ends + np.array(moved)[:, None] + 1
    codes = np.frombuffer(file, np.uint8)
    codes[places.reshape(-1)] = _numbers(places.size)
    codes[-1] = END[1]
    return file


def restart_interval(size: tuple[int, int], unit: tuple[int, int], length: int) -> int:
    """MCUs between two restart markers: few for a crop to waste little, many to take few bytes.

    Args:
        size: height and width of the image.
        unit: those of an MCU, in pixels.
        length: bytes of the file.
    """
    columns = -(-size[1] // unit[1])
    rows = -(-size[0] // unit[0])

    def cost(interval: int) -> float:
        segment = interval * unit[1]
        decoded = min(1.0, _BOX + segment / size[1]) if interval < columns else 1.0
        return decoded + _MARKER_BYTES * rows * (columns // interval) / max(1, length)

    divisors = [each for each in range(1, columns + 1) if columns % each == 0]
    wide = [each for each in divisors if each * unit[1] >= _SMALLEST]
    return min(wide or divisors[-1:], key=cost)


def has_restarts(data: bytes) -> bool:
    """Whether a file has restart markers by which parts of its rows can be cut out."""
    return _with_lengths(data) is not None


def with_restarts(data: bytes) -> bytes:
    """The file with restart markers and the lengths of its segments, its coefficients and thus its
    pixels as they were; itself, where it has them. A progressive one becomes sequential.

    Raises:
        Refused: it has none, and nothing here adds them.
        ValueError: the bytes are damaged.
    """
    listed = _with_lengths(data)
    if listed is not None:
        return listed
    recoded = recoder()
    found = layout(data)
    if found is None or found.interval:
        data = recoded(data, 0)
        found = layout(data)
        if found is None:
            raise ValueError("it has several scans")
    unit = (found.unit_height, found.unit_width)
    interval = restart_interval((found.height, found.width), unit, len(data))
    made = recoded(data, interval)
    written = layout(made)
    if written is None or written.interval != interval:
        raise ValueError("coded anew, it has other restart markers than were asked for")
    return _with_lengths(made) or made


def _with_lengths(data: bytes) -> bytes | None:
    """The file with the lengths of its segments; None: it has no markers by which parts of its rows
    can be cut out.
    """
    found = layout(data)
    if found is None or not 0 < found.interval <= found.columns:
        return None
    whole = _segments(found, Box(0, 0, found.height, found.width))
    if whole is None:
        return None
    count = whole.rows * whole.columns
    codes = np.frombuffer(data, np.uint8, offset=found.scan)
    if _listed(codes, found.segments, count) is not None:
        return data
    marks = _searched(codes, count)
    if marks is None:
        return None
    lengths = np.diff(marks + 2, prepend=0)
    if lengths.max() > np.iinfo(_LENGTH).max:
        return data
    return with_segments(data, found, lengths.astype(_LENGTH).tobytes())


def check_adds_restarts() -> None:
    """Raises Refused: nothing here adds restart markers; says what does."""
    grey = simplejpeg.encode_jpeg(np.zeros((64, 64, 1), np.uint8), colorspace="GRAY")
    try:
        with_restarts(grey)
    except Refused:
        raise
    except ValueError as error:
        raise Refused(f"{PROGRAM} adds no restart markers ({error}): {INSTALL}") from error
