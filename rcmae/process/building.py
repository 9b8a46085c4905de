"""C++ that torch compiles at its first use, DeepSpeed's optimizer on the host: who compiles it.

The process that first makes the file `lock` in a build's folder compiles; the others wait until it
is gone. torch's does not say who made it: where that process was killed, all later ones wait for
ever. Here it says so. A lock whose process ran on this very host and is gone is taken away; of any
other, whose process may live where it cannot be seen from here, a wait says what is known, and ends
after half an hour with the way out.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from rcmae.errors import Refused
from rcmae.process import waits
from rcmae.process.alive import boot, died_here

GIVES_UP_S = 1800.0  # a build takes a minute
_LOOKS_EACH_S = 0.1


class Maker(NamedTuple):
    """The process that made a lock."""

    host: str
    boot: str
    pid: int


class BuilderGone(RuntimeError):
    """The process that compiled was killed; a new start compiles."""


class Baton:
    """A build's turn; in the place of torch's `FileBaton`, whose methods these are.

    Args:
        lock_file_path: the file that is there while one compiles.
    """

    def __init__(self, lock_file_path: str, *_: Any, **__: Any) -> None:
        self._path = Path(lock_file_path)
        self._file: TextIO | None = None  # of the lock, open while this process compiles

    def try_acquire(self) -> bool:
        """Whether this process compiles now."""
        clear(self._path)
        try:
            self._file = self._path.open("x")
        except FileExistsError:
            return False
        waits.last_word(self._leave)
        json.dump(Maker(socket.gethostname(), boot(), os.getpid()), self._file)
        self._file.flush()
        return True

    def wait(self) -> None:
        """Wait until another process has compiled.

        Raises:
            BuilderGone: it was killed meanwhile.
            Refused: its lock is there for so long that nobody compiles any more.
        """
        with waits.waiting(lambda: about(self._path), breaks=False, saved=True):
            while self._path.exists():
                maker = _left_by(self._path)
                if maker is not None:
                    raise BuilderGone(
                        f"process {maker.pid}, which compiled in {self._path.parent}, was ended; "
                        "start again"
                    )
                if _is_forsaken(self._path):
                    raise Refused(about(self._path))
                time.sleep(_LOOKS_EACH_S)

    def release(self) -> None:
        """This process has compiled."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._path.unlink(missing_ok=True)

    def _leave(self) -> None:
        """What is to be done where the process is ended meanwhile."""
        if self._file is not None:
            _end_ninja()
            self.release()


@contextlib.contextmanager
def batons() -> Iterator[None]:
    """Inside, what torch compiles takes its turn by `Baton`."""
    from torch.utils import cpp_extension

    theirs = cpp_extension.FileBaton
    cpp_extension.FileBaton = Baton  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        cpp_extension.FileBaton = theirs  # type: ignore[misc]


def clear(path: Path) -> None:
    """Take a lock away whose process ran on this host and is gone, once what it started is gone,
    too. One process after the other: what the next finds there is not the lock that it read of.
    """
    if _left_by(path) is None:
        return
    what = f"the end of what a killed process began to compile in {path.parent}"
    with waits.waiting(what, breaks=False, saved=True):
        while _left_by(path) and _works_in(path.parent):
            time.sleep(_LOOKS_EACH_S)
    # a file system that knows no such turns keeps its lock, of which a wait will tell
    with contextlib.suppress(OSError), path.with_name("lock.turn").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        maker = _left_by(path)
        if maker is not None:
            path.unlink()
            text = f"rcmae: {path} was left by process {maker.pid}, which is gone: taken away"
            print(text, file=sys.stderr, flush=True)


def _left_by(path: Path) -> Maker | None:
    """The process that made a lock, where it is gone from this host."""
    maker = maker_of(path)
    return maker if maker is not None and died_here(*maker) else None


def _is_forsaken(path: Path) -> bool:
    """Whether a lock is too old and no process has it open; not where it goes away meanwhile."""
    is_old = age_s(path) > GIVES_UP_S and not opened_by(path)
    return is_old and age_s(path) > GIVES_UP_S


def _works_in(folder: Path) -> bool:
    """Whether a process of this host has a folder as its own, as a compiler that torch starts."""
    for each in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if os.readlink(each) == str(folder.resolve()):
                return True
    return False


def maker_of(path: Path) -> Maker | None:
    """Who made a lock; None where it does not say: torch's own do not."""
    try:
        host, its_boot, pid = json.loads(path.read_text())
    except (OSError, ValueError, TypeError):
        return None
    return Maker(str(host), str(its_boot), pid) if type(pid) is int and pid > 0 else None


def about(path: Path) -> str:
    """A lock, what is known of its process, and the way out."""
    maker = maker_of(path)
    holders = opened_by(path)
    if maker is not None:
        who = f"process {maker.pid} of host {maker.host} compiles"
    elif holders:
        who = f"process {holders[0]} of this host compiles"
    else:
        who = "another process compiles, none that can be seen from this host"
    return (
        f"{path}: {who}, since {age_s(path):.0f} s; where it is known to be dead, remove that file "
        "and start again, or name another TORCH_EXTENSIONS_DIR"
    )


def age_s(path: Path) -> float:
    """Seconds since a lock was made; 0 where it is gone."""
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return 0.0


def opened_by(path: Path) -> list[int]:
    """Processes of this host that have a file open, as far as this user sees them."""
    found = []
    for each in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(each) == str(path.resolve()):
                found.append(int(each.parts[2]))
    return found


def _end_ninja() -> None:
    """End what this process compiles by: it would write on into the folder of the next."""
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == "ninja":
                    os.kill(int(pid), signal.SIGTERM)
