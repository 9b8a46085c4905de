"""Which checkpoints stay: the newest valid ones, and one of every so many steps for good.

A folder is deleted by taking its name away first, so that a kill leaves no half of it. Only folders
named `step-` and eight digits are ever touched.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from rcmae.checkpoint.lease import Fence, LeaseUnreadable, fence
from rcmae.checkpoint.manifest import counts, step_folders, step_name, step_of
from rcmae.files import write_aside

# LATEST as a killed writer left it: as today's code writes it aside, and as 0.1.0 did
_POINTING = re.compile(r"\.LATEST\.\d+\.aside|LATEST\.new")

_LOOKED_AT_AGAIN = 3  # of the newest valid ones, at each prune: a damaged one must not count


class Retention:
    """Deletes a run's old checkpoints, save after save. One process calls.

    It remembers which ones were valid, and does not look at those that stay for good, so that a run
    that keeps hundreds reads a few manifests at each save.

    Args:
        root: the run's `checkpoints` folder.
        keep: how many of the newest valid ones stay, one at least.
        keep_every: those of every so many steps stay for good.
    """

    def __init__(self, root: Path, *, keep: int, keep_every: int | None = None) -> None:
        self._root = root
        self._keep = max(keep, 1)
        self._keep_every = keep_every
        self._valid: set[tuple[str, int, int]] = set()  # name, inode and time of folders

    def prune(self) -> list[Path]:
        """Delete old checkpoints, never one of the `keep` newest that are valid by manifest, lease
        and sizes.

        Returns:
            what was deleted.
        """
        newest_first = step_folders(self._root)[::-1]
        try:
            held = fence(self._root.parent)
        except LeaseUnreadable:
            return []  # nobody knows which count: the next prune may
        valid: list[Path] = []
        for path in newest_first:
            again = len(valid) < _LOOKED_AT_AGAIN
            # hundreds may stay for good: a run does not read them all to know that
            stays = not again and len(valid) >= self._keep and for_good(path, self._keep_every)
            if stays or self._is_valid(path, held, again=again):
                valid.append(path)
        gone = doomed(newest_first, valid=valid, keep=self._keep, keep_every=self._keep_every)
        for path in gone:
            drop(path)
        return gone

    def _is_valid(self, path: Path, held: Fence, *, again: bool) -> bool:
        try:
            about = path.stat()
        except OSError:
            return False
        known = (path.name, about.st_ino, about.st_mtime_ns)
        if known in self._valid and not again:
            return True
        self._valid.discard(known)
        if not counts(path, held):
            return False
        self._valid.add(known)
        return True


def doomed(
    newest_first: Sequence[Path], *, valid: Sequence[Path], keep: int, keep_every: int | None
) -> list[Path]:
    """Which of a run's checkpoints may go.

    Args:
        newest_first: all of them.
        valid: those that a resume could start from, in the same order.
        keep: how many of the newest valid ones stay.
        keep_every: those of every so many steps stay, too.
    """
    stay = set(valid[:keep]) | {path for path in valid if for_good(path, keep_every)}
    if not stay:
        return []
    oldest = min(stay)
    # a damaged one that is newer than what stays is left for whoever wants to know
    return [path for path in newest_first if path not in stay and (path in valid or path < oldest)]


def for_good(path: Path, keep_every: int | None) -> bool:
    """Whether a checkpoint is of a step that stays."""
    step = step_of(path)
    return step is not None and keep_every is not None and step % keep_every == 0


def prune(root: Path, *, keep: int, keep_every: int | None = None) -> list[Path]:
    """Delete old checkpoints once; see `Retention`. One process calls.

    Returns:
        what was deleted.
    """
    return Retention(root, keep=keep, keep_every=keep_every).prune()


def drop(path: Path) -> None:
    """Take a checkpoint's folder away: first its name, so that a kill leaves no half of it."""
    aside = dropped_name(path)
    with contextlib.suppress(FileNotFoundError):  # someone prunes by hand meanwhile
        os.rename(path, aside)
    remove(aside)


def dropped_name(path: Path) -> Path:
    """A free name beside a folder, for what is about to be deleted."""
    return path.with_name(f".dropped-{path.name}-{secrets.token_hex(4)}")


def remove(path: Path) -> None:
    """Delete a folder with all in it, or a link or file; what refuses stays."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def point_at(final: Path) -> None:
    """Have LATEST name a checkpoint."""
    write_aside(final.with_name("LATEST"), final.name + "\n")


def start_from(root: Path, step: int) -> list[Path]:
    """Make a step's checkpoint the newest, as if just saved; -1: none is. One process calls, under
    the lease.

    Those beyond it were passed over: they are kept as `passed-over-step-...`, for whoever wants to
    know, so that the run can commit those steps again.

    Returns:
        what was renamed.
    """
    moved = []
    for path in step_folders(root):
        its_step = step_of(path)
        if its_step is not None and its_step > step:
            name = f"passed-over-{path.name}-{secrets.token_hex(4)}"
            moved.append(path.rename(path.with_name(name)))
    for left in root.iterdir():
        if _POINTING.fullmatch(left.name):
            remove(left)
    final = root / step_name(step)
    if step >= 0 and final.exists():
        point_at(final)  # a kill may have come between the commit and this
    else:
        (root / "LATEST").unlink(missing_ok=True)
    return moved
