"""The coefficients of a JPEG coded anew, with or without restart markers: no pixel changes.

By libjpeg-turbo 3.1 or later where it is found as a shared library, else by the program jpegtran of
any libjpeg-turbo, which systems have in a package of its own (Debian: libjpeg-turbo-progs). It
takes a process for each file, which is nothing beside what making shards costs.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from functools import cache, partial

from rcmae.data.jpeg.turbo import Transform, library
from rcmae.errors import Refused

# (file, MCUs between two markers; 0: none) -> file
Recode = Callable[[bytes, int], bytes]
PROGRAM = "jpegtran"
INSTALL = (
    "install the package libjpeg-turbo-progs (Debian, Ubuntu) or libjpeg-turbo-utils (Fedora), or "
    "conda install libjpeg-turbo"
)
_ADDS = (3, 1)  # version of the library
_LONGEST_S = 60.0  # for one file
# of turbojpeg.h
_INIT_TRANSFORM = 2
_STOP_ON_WARNING, _OPTIMIZE, _RESTART_BLOCKS = 0, 11, 18


def recoder() -> Recode:
    """What codes a file anew: sequential, in one scan, with the best tables, and with markers. It
    raises ValueError where the bytes are damaged.

    Raises:
        Refused: neither the library nor the program is here; says what to install.
    """
    found = _found()
    if found is None:
        raise Refused(
            f"restart markers are added by {PROGRAM} or by libjpeg-turbo 3.1 or later, and neither "
            f"is here: {INSTALL}"
        )
    return found


@cache
def _found() -> Recode | None:
    turbo = library()
    if turbo is not None and turbo.version >= _ADDS:
        return partial(_by_library, turbo.loaded)
    program = shutil.which(PROGRAM)
    return partial(_by_program, program) if program else None


def _by_library(turbo: ctypes.CDLL, data: bytes, interval: int) -> bytes:
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


def _by_program(program: str, data: bytes, interval: int) -> bytes:
    command = [program, "-copy", "all", "-optimize"]
    if interval:
        command += ["-restart", f"{interval}B"]
    try:
        done = subprocess.run(
            command, input=data, capture_output=True, check=False, timeout=_LONGEST_S
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"{PROGRAM} took over {_LONGEST_S:.0f} s") from None
    if done.returncode:  # warnings count, as of the library
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(said[-1] if said else f"{PROGRAM} ended with {done.returncode}")
    return done.stdout
