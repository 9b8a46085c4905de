"""Files that are whole or not there, and records that survive a kill: one way to write and to read.

`aside` and `write_aside` write every file whose reader must never see half of it. `json_lines`
reads every file to which lines are appended: a kill or a full disk may have torn the last one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


@contextmanager
def aside(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of `path` when the block ends; not if it raises.

    Args:
        path: its folder exists.
        durable: flush the file and its folder to disk before returning, so that not even a power
            loss brings back the old one. False for what can be made again.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.aside")
    try:
        with scratch.open("wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        with suppress(OSError):
            scratch.unlink()
        raise
    if durable:
        flush_folder(path.parent)


def write_aside(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Put content in the place of a file, whole or not at all. Arguments and errors of `aside`."""
    with aside(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def flush_folder(path: Path) -> None:
    """Make the names in a folder survive a power loss. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def shipped(name: str) -> Path:
    """A folder that comes with the package: `ds_configs`, `slurm`, or `results` (measurements).

    In an installed package it lies within, in a checkout where the repository has it: setup.py
    says which is which.
    """
    package = Path(__file__).parent
    if (package / name).is_dir():
        return package / name
    return package.parent / ("tools/results" if name == "results" else name)


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, in order; none where there is no file.

    Left out: a last line without its end, and lines that are no JSON object (torn by a full disk, a
    kill or a power loss).

    Raises:
        OSError: the file is there and cannot be read.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            with suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict):
                    yield found
