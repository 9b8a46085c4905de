"""JPEG to pixels: the part asked for, at full, half, quarter or eighth size, by libjpeg-turbo.

Where a file has restart markers, the part is cut out before anything is decoded (`restarts`). Else
where libjpeg-turbo 3 is found as a shared library (a release of the system or of conda, else that
of the `turbojpeg` wheel, which is a pre-release) only the part is transformed and converted, and
nothing below it is read; else simplejpeg, which brings its own, decodes the whole and the part is
cut out. The pixels are the same, so a run may go from one machine to the other. The one difference:
there, damage outside the part may be seen, but a missing end is seen everywhere.
"""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from rcmae.data.jpeg.markers import Box, Header, is_whole, layout
from rcmae.data.jpeg.restarts import cut_out
from rcmae.data.jpeg.turbo import Fraction, Region, library
from rcmae.errors import Refused

# channels -> names of simplejpeg and of turbojpeg.h
_PIXEL_FORMATS = {3: ("RGB", 0), 1: ("GRAY", 6)}
# of turbojpeg.h, too
_INIT_DECOMPRESS = 1
_STOP_ON_WARNING = 0
_SUBSAMPLING = 4
_WIDTH = 5
# pixels; by chroma subsampling as numbered there: 444 422 420 grey 440 411 441
_MCU_WIDTHS = (8, 16, 16, 8, 8, 32, 8)


def decodes_parts() -> bool:
    """Whether parts are decoded alone here; else the whole is, to the same pixels."""
    return library() is not None


def decode_box(
    data: bytes, box: Box, shrink: int = 1, channels: int = 3, head: Header | None = None
) -> NDArray[np.uint8]:
    """The pixels of a box of a plain JPEG, [box.height / shrink, box.width / shrink, channels].

    Args:
        data: the whole file.
        box: inside the image; all four numbers are multiples of `shrink`.
        shrink: 1, 2, 4 or 8.
        channels: 1 (grey) or 3 (RGB).
        head: what `header` says of the file, where it was asked.

    Raises:
        ValueError: the bytes are damaged or cut short.
    """
    assert not any(number % shrink for number in box), (box, shrink)
    file: bytes | bytearray = data
    complete = is_whole(data)
    cut = cut_out(data, box, head.layout if head else layout(data)) if complete else None
    if cut is not None:
        file, box = cut
    small = Box(*(number // shrink for number in box))
    if complete and cut is None and decodes_parts():
        return _decode_part(data, small, shrink, channels)
    return small.of(_decode_whole(file, shrink, channels))


def decode_cmyk(data: bytes) -> NDArray[np.uint8]:
    """The inks of a JPEG for print, [H, W, 4].

    Raises ValueError: the bytes are damaged or cut short.
    """
    return simplejpeg.decode_jpeg(data, "CMYK")


def _decode_whole(data: bytes | bytearray, shrink: int, channels: int) -> NDArray[np.uint8]:
    if shrink == 1:
        return simplejpeg.decode_jpeg(data, _PIXEL_FORMATS[channels][0])
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    return simplejpeg.decode_jpeg(
        data,
        _PIXEL_FORMATS[channels][0],
        min_height=-(-height // shrink),
        min_width=-(-width // shrink),
        min_factor=shrink,
    )


class _Decoder:
    """A decompressor of libjpeg-turbo: for one thread at a time."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._handle = library.tj3Init(_INIT_DECOMPRESS)
        if not self._handle:
            raise MemoryError("libjpeg-turbo gave no decompressor")
        library.tj3Set(self._handle, _STOP_ON_WARNING, 1)

    def __del__(self) -> None:
        self._library.tj3Destroy(self._handle)

    def decode(self, data: bytes, box: Box, shrink: int, channels: int) -> NDArray[np.uint8]:
        """The pixels of a box, given in pixels of the shrunken image."""
        library = self._library
        handle = self._handle
        self._check(library.tj3SetCroppingRegion(handle, Region(0, 0, 0, 0)))  # of the last image
        self._check(library.tj3DecompressHeader(handle, data, len(data)))
        self._check(library.tj3SetScalingFactor(handle, Fraction(1, shrink)))
        # A part starts at a multiple of the MCU's width. Chroma at its sides is interpolated
        # without what lies beyond, so it is one MCU wider than the box on either side, and the box
        # cut out: the same pixels as from the whole.
        subsampling = library.tj3Get(handle, _SUBSAMPLING)
        if subsampling not in range(len(_MCU_WIDTHS)):
            raise Refused("chroma subsampling of a kind that libjpeg-turbo has no name for")
        mcu = _MCU_WIDTHS[subsampling] // shrink
        width = -(-library.tj3Get(handle, _WIDTH) // shrink)
        left = max(0, box.left // mcu - 1) * mcu
        right = min(width, box.left + box.width + mcu)
        pixels = np.empty((box.height, right - left, channels), np.uint8)
        self._check(
            library.tj3SetCroppingRegion(handle, Region(left, box.top, right - left, box.height))
        )
        self._check(
            library.tj3Decompress8(
                handle, data, len(data), pixels.ctypes.data, 0, _PIXEL_FORMATS[channels][1]
            )
        )
        return pixels[:, box.left - left : box.left - left + box.width]

    def _check(self, failed: int) -> None:
        if failed:
            raise Refused(self._library.tj3GetErrorStr(self._handle).decode())


_decoders = threading.local()


def _decode_part(data: bytes, box: Box, shrink: int, channels: int) -> NDArray[np.uint8]:
    if not hasattr(_decoders, "one"):
        found = library()
        assert found is not None
        _decoders.one = _Decoder(found.loaded)
    try:
        return _decoders.one.decode(data, box, shrink, channels)
    except Refused:
        del _decoders.one  # of a damaged file it keeps tables, which the next would be refused for
        raise
