"""Restart markers: a part of a JPEG cut out as a JPEG of its own, before anything is decoded; and
the markers added to a file, its coefficients left as they are.

A JPEG's Huffman codes, most of what decoding costs, can be read from their start alone. A restart
marker (ITU-T T.81, B.2.4.4 and F.2.1.3.1) begins anew: what lies between two of them can be read by
itself. Where they stand at equal places of each row of blocks, a crop takes the segments that it
needs, in a file with a smaller frame. Its pixels are those of the whole image: where chroma is
interpolated, one block more is taken on either side.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from rcmae.data.jpeg.markers import END, SCAN, Box
from rcmae.data.jpeg.turbo import Transform, library
from rcmae.errors import Refused

_HUFFMAN_FRAMES = (0xC0, 0xC1)  # baseline and extended, sequential
_RESTART_INTERVAL = 0xDD
_RESTARTS = np.arange(0xD0, 0xD8, dtype=np.uint8)  # in this order, over and over
_BLOCK = 8  # pixels
_WORTH = 0.9  # a part of more of the image is not cut out: finding it costs as much
_BOX = 0.72  # of a side, about what the published random crop takes
_MARKER_BYTES = 3.5  # a marker, the bits up to it, and a first coefficient that has no other before
_SMALLEST = 24  # pixels between two markers, at least
# of turbojpeg.h
_INIT_TRANSFORM = 2
_STOP_ON_WARNING, _OPTIMIZE, _RESTART_BLOCKS = 0, 11, 18


class Layout(NamedTuple):
    """Where the frame of a JPEG of one scan is, and how its blocks are grouped."""

    frame: int  # first byte of the height in its header
    scan: int  # first byte of the Huffman codes
    height: int  # pixels
    width: int
    unit_height: int  # of an MCU, the unit that codes are grouped in, in pixels
    unit_width: int
    interval: int  # MCUs between two restart markers; 0: there are none

    @property
    def rows(self) -> int:
        """MCUs from top to bottom."""
        return -(-self.height // self.unit_height)

    @property
    def columns(self) -> int:
        """MCUs from left to right."""
        return -(-self.width // self.unit_width)


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


def layout(data: bytes) -> Layout | None:
    """The layout of a JPEG; None of those that are progressive, of several scans or torn."""
    at = 2
    interval = 0
    frame = None
    while at + 4 <= len(data) and data[at] == 0xFF:
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
        elif kind == SCAN:
            if frame is None or not segment or segment[0] != frame[1][5]:
                return None  # another kind of frame, or not all colours in this scan
            return _laid_out(frame[0], frame[1], at + 2 + length, interval)
        at += 2 + length
    return None


def _laid_out(frame: int, header: bytes, scan: int, interval: int) -> Layout | None:
    height = int.from_bytes(header[1:3], "big")
    width = int.from_bytes(header[3:5], "big")
    factors = header[7::3]  # of each colour: how many blocks of it an MCU has, along and down
    across = [factor >> 4 for factor in factors]
    down = [factor & 15 for factor in factors]
    if not (height and width and factors and all(across) and all(down)):
        return None
    if len(factors) == 1:
        across = down = [1]  # of a single colour an MCU is a block, whatever the factors
    unit_height, unit_width = _BLOCK * max(down), _BLOCK * max(across)
    return Layout(frame, scan, height, width, unit_height, unit_width, interval)


def cut_out(data: bytes, box: Box) -> tuple[bytes, Box] | None:
    """A box of an image as a JPEG of its own.

    Args:
        data: a whole file.
        box: inside the image.

    Returns:
        The file, and where the box lies in it, a multiple of 8 pixels from where it was; None where
        restart markers do not allow that, or where it would not pay.
    """
    found = layout(data)
    if found is None or not found.interval:
        return None
    segments = _segments(found, box)
    if segments is None or segments.share > _WORTH:
        return None
    marks = _marks(data, found.scan, segments.rows * segments.columns)
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
    above = found.unit_height if found.unit_height > _BLOCK else 0
    beside = found.unit_width if found.unit_width > _BLOCK else 0
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


def _marks(data: bytes, scan: int, count: int) -> NDArray[np.int64] | None:
    """The first byte of the marker behind each of `count` segments, the last of which is that of
    the end; None: these are not the markers that are there.
    """
    codes = np.frombuffer(data, np.uint8)[scan:]
    marked = codes[:-1] == 0xFF
    marked &= codes[1:] != 0  # 0: the byte before is of a code
    marks = np.flatnonzero(marked)
    if len(marks) != count or marks[-1] != len(codes) - len(END):
        return None
    expected = np.resize(_RESTARTS, count)
    expected[-1] = END[1]
    return marks + scan if (codes[marks + 1] == expected).all() else None


def _joined(
    data: bytes, head: bytes, segments: _Segments, marks: NDArray[np.int64], scan: int
) -> bytes:
    """A file of a header and of the range of segments, their markers numbered anew."""
    taken = segments.right - segments.left
    first = np.arange(segments.top, segments.bottom) * segments.columns + segments.left
    starts = np.where(first == 0, scan, marks[first - 1] + 2)
    ends = marks[first + taken - 1] + 2
    parts = [data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    file = bytearray().join([head, *parts])
    lengths = ends - starts
    moved = len(head) + np.cumsum(lengths) - lengths - starts  # of each row: new place less old
    within = first[:, None] + np.arange(taken)
    places = (marks[within] + moved[:, None]).reshape(-1) + 1
    codes = np.frombuffer(file, np.uint8)
    codes[places] = np.resize(_RESTARTS, len(places))
    codes[-1] = END[1]
    return bytes(file)


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
    plain = layout(data)
    if plain is None or not 0 < plain.interval <= plain.columns:
        return False
    whole = _segments(plain, Box(0, 0, plain.height, plain.width))
    return whole is not None and _marks(data, plain.scan, whole.rows * whole.columns) is not None


def with_restarts(data: bytes) -> bytes:
    """The file with restart markers, its coefficients and thus its pixels as they were; itself,
    where it has usable ones. A progressive one becomes sequential.

    Raises:
        Refused: no libjpeg-turbo 3.1 is here.
        ValueError: the bytes are damaged.
    """
    if has_restarts(data):
        return data
    plain = layout(data)
    if plain is None or plain.interval:
        data = _transformed(data, 0)
        plain = layout(data)
        if plain is None:
            raise ValueError("it has several scans")
    unit = (plain.unit_height, plain.unit_width)
    interval = restart_interval((plain.height, plain.width), unit, len(data))
    made = _transformed(data, interval)
    written = layout(made)
    if written is None or written.interval != interval:
        found = library()
        raise Refused(
            f"{found.told if found else 'libjpeg-turbo'} adds no restart markers; 3.1 and later do "
            "(a newer system, or conda install libjpeg-turbo: $CONDA_PREFIX/lib is looked in)"
        )
    return made


def check_adds_restarts() -> None:
    """Raises Refused: no libjpeg-turbo 3.1 is here."""
    with_restarts(simplejpeg.encode_jpeg(np.zeros((64, 64, 1), np.uint8), colorspace="GRAY"))


def _transformed(data: bytes, interval: int) -> bytes:
    """The coefficients of a file coded anew, sequential, with best tables."""
    found = library()
    if found is None:
        raise Refused(
            "restart markers are added by libjpeg-turbo 3.1 or later (libturbojpeg.so), and there "
            "is none here: a system that has it, or conda install libjpeg-turbo ($CONDA_PREFIX/lib "
            "is looked in)"
        )
    turbo = found.loaded
    handle = turbo.tj3Init(_INIT_TRANSFORM)
    if not handle:
        raise MemoryError("libjpeg-turbo gave no transformer")
    made = ctypes.c_void_p()
    size = ctypes.c_size_t()
    try:
        for name, value in (
            (_STOP_ON_WARNING, 1),
            (_OPTIMIZE, 1),
            (_RESTART_BLOCKS, interval),
        ):
            turbo.tj3Set(handle, name, value)
        failed = turbo.tj3Transform(
            handle, data, len(data), 1, made, size, ctypes.byref(Transform())
        )
        if failed:
            raise ValueError(turbo.tj3GetErrorStr(handle).decode())
        return ctypes.string_at(made, size.value)
    finally:
        turbo.tj3Free(made)
        turbo.tj3Destroy(handle)
