"""Files of a cache that users may share: locks, copies under way, and what is noted of copies.

Another user's file may not allow what one's own does: that is passed over, where it can be."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

# what it is called that a file is another user's, a folder or a link
IN_THE_WAY = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENOTEMPTY, errno.EEXIST)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else counts or makes room while the block runs."""
    for name in (".lock", f".lock-u{os.getuid()}"):
        try:
            try:
                lock = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except PermissionError:  # another user's: to read it will do
                lock = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in IN_THE_WAY:
                raise
            continue
        break
    else:
        raise PermissionError(errno.EACCES, f"{folder}: its lock cannot be opened")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def part_of(place: Path) -> Path:
    """What a copy is called while it is made."""
    return place.with_name(f".{place.name.removesuffix('.tar')}.part")


def wait_for(part: Path) -> None:
    """Wait until another user, whose file cannot be written, has made a copy or failed."""
    with contextlib.suppress(OSError):
        file = os.open(part, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        finally:
            os.close(file)


def note_digest(place: Path, digest: str) -> None:
    """Write beside a copy what its SHA-256 is."""
    with contextlib.suppress(PermissionError):
        place.with_suffix(".sha256").write_text(digest)


def noted_digest(place: Path) -> str:
    """The SHA-256 that a copy had when it was made; empty where it is not known."""
    try:
        return place.with_suffix(".sha256").read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def delete(place: Path) -> bool:
    """Delete a copy and what is noted of it; whether it is gone."""
    try:
        place.unlink(missing_ok=True)
        place.with_suffix(".sha256").unlink(missing_ok=True)
    except OSError:  # another user's
        return not place.exists()
    return True


def is_abandoned(part: Path) -> bool:
    """Delete what a killed process left of a copy; whether it was such."""
    try:
        file = os.open(part, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in IN_THE_WAY:
            raise
        return True  # nobody can say: it takes as much of the disk as it takes
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_if_same(part, file)
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True


def is_same(path: Path, file: int) -> bool:
    """Whether an open file is the one that a path names."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(file))
    except FileNotFoundError:
        return False


def remove_if_same(path: Path, file: int) -> None:
    """Delete what a path names if it is an open file."""
    if is_same(path, file):
        with contextlib.suppress(PermissionError, IsADirectoryError):  # another user's, or none
            path.unlink(missing_ok=True)
