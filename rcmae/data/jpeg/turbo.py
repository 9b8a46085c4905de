"""libjpeg-turbo 3 as a shared library: where it is, and its functions.

No maintained binding that we know of offers parts of images or restart markers: hence ctypes, on a
few functions of a stable interface.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from functools import cache
from glob import escape, glob
from pathlib import Path
from typing import NamedTuple

_VERSION = re.compile(rb"libjpeg-turbo version (\d+(?:\.\d+)+)")
_log = logging.getLogger(__name__)


class Fraction(ctypes.Structure):
    """A scale of the image."""

    _fields_ = (("num", ctypes.c_int), ("denom", ctypes.c_int))


class Region(ctypes.Structure):
    """A part of an image, in pixels."""

    _fields_ = (("x", ctypes.c_int), ("y", ctypes.c_int), ("w", ctypes.c_int), ("h", ctypes.c_int))


class Transform(ctypes.Structure):
    """What becomes of the coefficients; all zero: they stay as they are."""

    _fields_ = (
        ("region", Region),
        ("operation", ctypes.c_int),
        ("options", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("filter", ctypes.c_void_p),
    )


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
    brought = (_loaded(path, wheel=True) for path in wheels())
    return next(filter(None, brought), None)


def _installed() -> Iterator[str]:
    """The loader's own search, and the active environment of conda; no other place is believed."""
    if name := ctypes.util.find_library("turbojpeg"):
        yield name
    if prefix := os.environ.get("CONDA_PREFIX"):
        yield from sorted(glob(str(Path(escape(prefix)) / "lib" / "libturbojpeg.so*")))


def wheels() -> list[str]:
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
    loaded.tj3Init.argtypes = [number]
    loaded.tj3Init.restype = handle
    loaded.tj3Destroy.argtypes = [handle]
    loaded.tj3Set.argtypes = [handle, number, number]
    loaded.tj3Get.argtypes = [handle, number]
    loaded.tj3DecompressHeader.argtypes = [handle, *data]
    loaded.tj3SetScalingFactor.argtypes = [handle, Fraction]
    loaded.tj3SetCroppingRegion.argtypes = [handle, Region]
    loaded.tj3Decompress8.argtypes = [handle, *data, ctypes.c_void_p, number, number]
    addresses, sizes = ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t)
    transforms = ctypes.POINTER(Transform)
    loaded.tj3Transform.argtypes = [handle, *data, number, addresses, sizes, transforms]
    loaded.tj3Free.argtypes = [handle]
    loaded.tj3GetErrorStr.argtypes = [handle]
    loaded.tj3GetErrorStr.restype = ctypes.c_char_p
