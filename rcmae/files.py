"""Files that are whole or not there, and records that survive a kill: one way to write and to read.

`aside` and `write_aside` write every file whose reader must never see half of it. `Lines` appends
to a file of lines and outlives a full disk; `json_lines` reads it, `json_lines_back` from its end:
a kill may have torn the last one. `patiently` reads over what passes on a network's file system.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any, TypeVar

_BLOCK = 1 << 16  # bytes read at a time
# A file system on a network loses a server for a moment, or a file's handle; a disk a sector.
_PASSING = (errno.EIO, errno.ESTALE)
_PAUSES_S = (0.2, 1.0, 3.0)  # before each further attempt
_T = TypeVar("_T")


def patiently(read: Callable[[], _T], forget: Callable[[], object] = lambda: None) -> _T:
    """What a reading of files gives, which may be done again: what passes is tried again.

    Args:
        read: opens, and reads.
        forget: closes what was opened, before the next attempt.

    Raises:
        OSError: it cannot be read.
    """
    for pause_s in (*_PAUSES_S, None):
        try:
            return read()
        except OSError as error:
            if pause_s is None or error.errno not in _PASSING:
                raise
            forget()
            time.sleep(pause_s)
    raise AssertionError("the last attempt raises")


@contextmanager
def aside(path: Path, *, durable: bool = True, private: bool = False) -> Iterator[IO[bytes]]:
    """A file to write, which replaces `path` when the block ends; not if it raises.

    Args:
        path: its folder exists.
        durable: flush the file and its folder to disk before returning, so that not even a power
            loss brings back the old one. False for what can be made again.
        private: only its owner may read it (mode 0600).

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        with open(path, "wb") as device:  # /dev/null, a pipe: written to, and never replaced
            yield device
        return
    scratch = path.with_name(f".{path.name}.{os.getpid()}.aside")
    try:
        with open(scratch, "wb", opener=_for_owner if private else None) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException as error:
        with suppress(OSError):
            scratch.unlink()
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)  # a write does not say where
        raise
    if durable:
        flush_folder(path.parent)


def _for_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def write_aside(
    path: Path, content: str | bytes, *, durable: bool = True, private: bool = False
) -> None:
    """Replace a file's content, whole or not at all. Arguments and errors of `aside`."""
    with aside(path, durable=durable, private=private) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def leaving_nothing(scratch: Path, error: type[Exception]) -> Iterator[None]:
    """Where the block raises this error, neither its scratch file stays nor what folders were made
    for it; folders that have something else in them do.
    """
    made = [folder for folder in scratch.parents if not folder.exists()]  # the deepest first
    try:
        yield
    except error:
        with suppress(OSError):
            scratch.unlink()
            for folder in made:
                folder.rmdir()
        raise


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

    Left out: a last line without its end, and lines that are not JSON objects (torn by a full disk,
    a kill or a power loss).

    Raises:
        OSError: the file is there and cannot be read.
    """
    try:
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return
    with file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            with suppress(ValueError, RecursionError):
                found = json.loads(line)
                if isinstance(found, dict):
                    yield found


def json_lines_back(path: Path) -> Iterator[dict[str, Any]]:
    """The same objects, the last one first: who wants the end of a long file reads only that."""
    for line in _lines_back(path):
        with suppress(ValueError, RecursionError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found


def _lines_back(path: Path) -> Iterator[bytes]:
    """The whole lines of a file, without their ends, the last one first."""
    try:
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return
    with file:
        at = file.seek(0, os.SEEK_END)
        later = b""  # the beginning of what was read: the end of a line that begins before it
        is_whole = False  # a line end has been seen: what comes before it are whole lines
        while at > 0:
            size = min(_BLOCK, at)
            at = file.seek(at - size)
            head, *lines = (file.read(size) + later).split(b"\n")
            if lines and not is_whole:
                lines.pop()  # behind the last line end
                is_whole = True
            yield from reversed(lines)
            later = head
        if is_whole:
            yield later


class Lines:
    """A file that grows by whole lines. What its disk does not take waits in memory, and goes with
    the next line: a full disk is never a reason to stop. One process writes.

    A file that somebody deleted is started again; one that was replaced is another job's, and left.

    Args:
        path: the file; made with its folder if it is not there.
        most: lines that wait at most, the newest.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, *, most: int = 100_000) -> None:
        self.path = path
        self.problem: str | None = None  # what the disk said, until all lines are written
        self._waiting: deque[bytes] = deque(maxlen=most)
        self._file = self._open()

    @property
    def waiting(self) -> int:
        """Lines that are not written yet."""
        return len(self._waiting)

    def write(self, line: str) -> None:
        """Append a line, given without its end. Raises nothing."""
        self._waiting.append(line.encode() + b"\n")
        try:
            is_gone = self._file.closed or not self.path.exists()
            if is_gone:
                self._file.close()
                self._file = self._open()
            self._write_waiting()
            self.problem = f"{self.path} was deleted, and is started again" if is_gone else None
        except OSError as error:
            self.problem = f"{self.path}: {error.strerror or error}"

    def sync(self) -> None:
        """Put the lines on the disk, as far as it takes them."""
        with suppress(OSError, ValueError):  # it could not be opened again
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finish the file. A second call does nothing."""
        if not self._file.closed:
            with suppress(OSError):
                self._write_waiting()
            self.sync()
            self._file.close()

    def _open(self) -> FileIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return FileIO(self.path, "a")

    def _write_waiting(self) -> None:
        while self._waiting:
            line = self._waiting[0]
            end = os.fstat(self._file.fileno()).st_size
            # one write: a kill tears at most this line
            if self._file.write(line) != len(line):
                self._file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            self._waiting.popleft()
