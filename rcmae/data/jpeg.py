"""JPEG to pixels: the part asked for, at full, half, quarter or eighth size, by libjpeg-turbo.

Where libjpeg-turbo 3 is found as a shared library (a release of the system or of conda, else that
of the `turbojpeg` wheel, which is a pre-release) only the part is transformed and converted, and
nothing below it is read; else simplejpeg, which brings its own, decodes the whole and the part is
cut out. The pixels are the same, so a run may go from one machine to the other. The one difference:
there, damage below the part goes unseen, but a missing end is seen everywhere. No maintained
binding that we know of offers parts: hence ctypes, on eight functions of a stable interface.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import logging
import os
import re
import threading
from collections.abc import Iterator
from functools import cache
from glob import escape, glob
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from rcmae.errors import Refused

_END = b"\xff\xd9"
_SCAN = 0xDA  # the marker that a scan begins with
_FRAMES = bytes((0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF))
# a marker and the length of its segment; not those that have none, and may stand within a scan
_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd8\xff])(..)", re.DOTALL)
_COLOURS = ("YCbCr", "Gray", "RGB")
# channels -> names of simplejpeg and of turbojpeg.h
_PIXEL_FORMATS = {3: ("RGB", 0), 1: ("GRAY", 6)}
# of turbojpeg.h, too
_INIT_DECOMPRESS = 1
_STOP_ON_WARNING = 0
_SUBSAMPLING = 4
_WIDTH = 5
# pixels; by chroma subsampling as numbered there: 444 422 420 grey 440 411 441
_MCU_WIDTHS = (8, 16, 16, 8, 8, 32, 8)
_VERSION = re.compile(rb"libjpeg-turbo version (\d+(?:\.\d+)+)")
_log = logging.getLogger(__name__)


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
    while (marker := _MARKER.search(data, at)) is not None and marker[1] != _END[1:]:
        kind, start = marker[1][0], marker.start(2)
        if kind in _FRAMES:
            # of one that is progressive each scan counts, whatever it has
            parts = data[start + 7] if kind in _FRAMES[:2] and len(data) > start + 7 else 0
        elif kind == _SCAN:
            found += 1
            if found == 1 and len(data) > start + 2 and data[start + 2] == parts:
                return 1  # decoders look for no other
            if found == 1 and data.count(bytes((0xFF, _SCAN)), start) < above:
                return 0
        at = start + max(2, int.from_bytes(marker[2], "big"))
    return found


def is_whole(data: bytes) -> bool:
    """Whether the end of a JPEG is there."""
    return data.endswith(_END)


def decodes_parts() -> bool:
    """Whether parts are decoded alone here; else the whole is, to the same pixels."""
    return library() is not None


def decode_box(data: bytes, box: Box, shrink: int = 1, channels: int = 3) -> NDArray[np.uint8]:
    """The pixels of a box of a plain JPEG, [box.height / shrink, box.width / shrink, channels].

    Args:
        data: the whole file.
        box: inside the image; all four numbers are multiples of `shrink`.
        shrink: 1, 2, 4 or 8.
        channels: 1 (grey) or 3 (RGB).

    Raises:
        ValueError: the bytes are damaged or cut short.
    """
    assert not any(number % shrink for number in box), (box, shrink)
    small = Box(*(number // shrink for number in box))
    if decodes_parts() and is_whole(data):
        return _decode_part(data, small, shrink, channels)
    return small.of(_decode_whole(data, shrink, channels))


def decode_cmyk(data: bytes) -> NDArray[np.uint8]:
    """The inks of a JPEG for print, [H, W, 4].

    Raises ValueError: the bytes are damaged or cut short.
    """
    return simplejpeg.decode_jpeg(data, "CMYK")


def _decode_whole(data: bytes, shrink: int, channels: int) -> NDArray[np.uint8]:
    if shrink == 1:
        return simplejpeg.decode_jpeg(data, _PIXEL_FORMATS[channels][0])
    height, width, _ = header(data)
    return simplejpeg.decode_jpeg(
        data,
        _PIXEL_FORMATS[channels][0],
        min_height=-(-height // shrink),
        min_width=-(-width // shrink),
        min_factor=shrink,
    )


class _Fraction(ctypes.Structure):
    _fields_ = (("num", ctypes.c_int), ("denom", ctypes.c_int))


class _Region(ctypes.Structure):
    _fields_ = (("x", ctypes.c_int), ("y", ctypes.c_int), ("w", ctypes.c_int), ("h", ctypes.c_int))


class Library(NamedTuple):
    """A turbojpeg library that has the functions of version 3."""

    loaded: ctypes.CDLL
    path: str
    version: tuple[int, ...]  # empty: it does not say
    wheel: bool  # of the package `turbojpeg`

    @property
    def told(self) -> str:
        """For people."""
        version = ".".join(map(str, self.version)) or "of unknown version"
        return f"libjpeg-turbo {version} ({self.path})"

    @property
    def released(self) -> bool:
        """Whether it is a release: 2.1.9x were the pre-releases of 3.0."""
        return self.version >= (3,)


@cache
def library() -> Library | None:
    """What decodes parts: the loader's or conda's libjpeg-turbo of version 3 or later, else that of
    the wheel; None where there is neither.
    """
    for name in _installed():
        found = _loaded(name, wheel=False)
        if found is not None and found.released:
            return found
    wheels = (_loaded(path, wheel=True) for path in _wheels())
    return next(filter(None, wheels), None)


def _installed() -> Iterator[str]:
    """The loader's own search, and the active environment of conda; no other place is believed."""
    if name := ctypes.util.find_library("turbojpeg"):
        yield name
    if prefix := os.environ.get("CONDA_PREFIX"):
        yield from sorted(glob(str(Path(escape(prefix)) / "lib" / "libturbojpeg.so*")))


def _wheels() -> list[str]:
    """Libraries that the package `turbojpeg` brings. It is not imported."""
    wheel = importlib.util.find_spec("turbojpeg")
    if wheel is None or not wheel.origin:
        return []
    beside = Path(wheel.origin).parent / "turbojpeg.libs"
    return sorted(glob(str(Path(escape(str(beside))) / "libturbojpeg*.so*")))


class _Symbol(ctypes.Structure):
    """Of dladdr: where a function was loaded from."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _loaded(name: str, *, wheel: bool) -> Library | None:
    """A library of a name or path; None where it cannot be loaded or is of version 2."""
    try:
        loaded = ctypes.CDLL(name)
        _declare(loaded)
        path = _path_of(loaded) or name
        return Library(loaded, path, _version_in(path), wheel)
    except (OSError, AttributeError) as error:  # version 2 has no tj3 functions
        _log.debug("%s: %s", name, error)
        return None


def _path_of(loaded: ctypes.CDLL) -> str:
    symbol = _Symbol()
    found = ctypes.CDLL(None).dladdr(loaded.tj3Init, ctypes.byref(symbol))
    return os.fsdecode(symbol.file) if found and symbol.file else ""


def _version_in(path: str) -> tuple[int, ...]:
    """The version that a library's messages name: no function gives it."""
    said = _VERSION.search(Path(path).read_bytes())
    return tuple(map(int, said[1].split(b"."))) if said else ()


def _declare(loaded: ctypes.CDLL) -> None:
    """Types of the functions that are called. Raises AttributeError."""
    handle, number = ctypes.c_void_p, ctypes.c_int
    data = (ctypes.c_char_p, ctypes.c_size_t)
    loaded.tj3Init.restype = handle
    loaded.tj3Destroy.argtypes = [handle]
    loaded.tj3Set.argtypes = [handle, number, number]
    loaded.tj3Get.argtypes = [handle, number]
    loaded.tj3DecompressHeader.argtypes = [handle, *data]
    loaded.tj3SetScalingFactor.argtypes = [handle, _Fraction]
    loaded.tj3SetCroppingRegion.argtypes = [handle, _Region]
    loaded.tj3Decompress8.argtypes = [handle, *data, ctypes.c_void_p, number, number]
    loaded.tj3GetErrorStr.argtypes = [handle]
    loaded.tj3GetErrorStr.restype = ctypes.c_char_p


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
        self._check(library.tj3SetCroppingRegion(handle, _Region(0, 0, 0, 0)))  # of the last image
        self._check(library.tj3DecompressHeader(handle, data, len(data)))
        self._check(library.tj3SetScalingFactor(handle, _Fraction(1, shrink)))
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
            library.tj3SetCroppingRegion(handle, _Region(left, box.top, right - left, box.height))
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
    return _decoders.one.decode(data, box, shrink, channels)
