"""Remote shards on this node's disk."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rcmae.data import sources
from rcmae.data.cache.files import (
    IN_THE_WAY,
    delete,
    is_abandoned,
    is_same,
    locked,
    note_digest,
    noted_digest,
    part_of,
    remove_if_same,
    wait_for,
)
from rcmae.data.sources import USUAL, Patience, SourceGone, Stored, basename, identity, redacted
from rcmae.errors import Refused

_log = logging.getLogger(__name__)


class CacheTooSmall(SourceGone):
    """The cache cannot hold what has to be in it."""


@dataclass(frozen=True)
class Cache:
    """Remote shards on this node's disk, for all processes that name the same folder, also
    of other jobs.

    A shard is there complete, verified, under a name made of hashes (so nothing that a URL says can
    lead out of the folder), or it is not there. Who needs one that is not there copies it, once on
    the node, into a file of its full size that it holds locked: the lock ends with its process, and
    what a killed one leaves is deleted by the next. Room is made before the copy begins: least
    recently used out first. Files in use may be deleted, as their readers have them open; so nobody
    waits for a reader, and the limit holds at every moment.

    Users may share a folder: files have the modes that the user's umask gives them, and what
    another user's file does not allow is passed over, with a copy of one's own."""

    folder: Path
    limit: int  # bytes
    patience: Patience = USUAL
    _places: dict[tuple[str, str], Path] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, folder: str | None, gigabytes: float, patience: Patience = USUAL) -> Cache:
        """The cache in a folder, by default one of this user's under $SLURM_TMPDIR or the temporary
        folder.

        Raises:
            Refused: the folder cannot be used.
        """
        place = folder or os.path.join(
            os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir(), f"rcmae-shards-{os.getuid()}"
        )
        path = Path(os.path.expanduser(place))
        try:
            path.mkdir(mode=0o700 if folder is None else 0o777, parents=True, exist_ok=True)
            if folder is None and path.stat().st_uid != os.getuid():
                raise PermissionError("it belongs to another user")
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise Refused(
                f"data.cache_dir={path} cannot be used ({error}); give another folder"
            ) from error
        return cls(path, int(gigabytes * 1e9), patience)

    def place(self, shard: Stored) -> Path:
        """Where a shard lies when it is there."""
        if (known := self._places.get((shard.path, shard.fingerprint))) is not None:
            return known
        name = hashlib.sha256(
            f"{identity(shard.path)}\n{shard.size}\n{shard.fingerprint}".encode()
        ).hexdigest()[:32]
        readable = re.sub(r"[^A-Za-z0-9_-]", "_", basename(shard.path).removesuffix(".tar"))[:80]
        return self._places.setdefault(
            (shard.path, shard.fingerprint), self.folder / f"{name}-{readable}.tar"
        )

    @contextlib.contextmanager
    def opened(self, shard: Stored) -> Iterator[int]:
        """A descriptor of a shard's file, copied first where it is not there. Keep it open for
        moments only.

        Raises:
            SourceGone, FileNotFoundError: it cannot be had.
            CacheTooSmall: it is larger than the limit.
        """
        file = self._ready(shard)
        if file is None:
            file = self._copied(shard)
        try:
            yield file
        finally:
            os.close(file)

    def fetch(self, shard: Stored) -> None:
        """Have a shard ready. Raises as `opened`."""
        with self.opened(shard):
            pass

    def renewed(self, shard: Stored, read: os.stat_result) -> bool:
        """Whether a copy that was read is another one now, or was damaged and has been deleted: a
        sample that it did not have may be read again.

        Hashes the copy. One without a known hash is deleted, as it may be damaged."""
        file = self._ready(shard)
        if file is None:
            return True
        with open(file, "rb") as copy:
            if not os.path.samestat(os.fstat(file), read):
                return True
            for place in self._places_of(shard):
                if not is_same(place, file):
                    continue
                wanted = shard.sha256 or noted_digest(place)
                if wanted and hashlib.file_digest(copy, "sha256").hexdigest() == wanted:
                    return False
                _log.warning(
                    "%s: its copy in the cache, %s, is damaged, or its hash unknown: copied again",
                    redacted(shard.path),
                    place,
                )
                return delete(place)
        return False

    def shards(self) -> list[tuple[float, int, Path]]:
        """(last used, bytes, path) of each shard that is there, least recently used first."""
        return sorted(self._entries(".tar"))

    def _entries(self, suffix: str) -> Iterator[tuple[float, int, Path]]:
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if re.fullmatch(r"\.?[0-9a-f]{32}-[A-Za-z0-9_-]*" + re.escape(suffix), entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        # just deleted or renamed by another process
                        stat = entry.stat(follow_symlinks=False)
                        yield stat.st_mtime, stat.st_size, Path(entry.path)

    def _places_of(self, shard: Stored) -> tuple[Path, Path]:
        """Where a shard lies for all users, and where for this one, if the other is of no use."""
        place = self.place(shard)
        return place, place.with_name(f"{place.stem}-u{os.getuid()}.tar")

    def _ready(self, shard: Stored) -> int | None:
        """A descriptor of a shard's file; None where there is none that this user can read."""
        for place in self._places_of(shard):
            try:
                file = self._descriptor(place, shard.size)
            except OSError as error:
                if error.errno not in IN_THE_WAY:
                    raise
                continue
            if file is not None:
                return file
        return None

    def _descriptor(self, place: Path, size: int) -> int | None:
        try:
            file = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        if os.fstat(file).st_size != size:  # somebody else's doing: we rename whole files only
            os.close(file)
            delete(place)
            return None
        with contextlib.suppress(OSError):  # it may be another user's
            os.utime(place)  # when it was last used
        return file

    def _copied(self, shard: Stored) -> int:
        """Copy a shard, or wait until another process has.

        Gives a descriptor, so that it can be read in any case.
        """
        place, own = self._places_of(shard)
        try:
            return self._copy(shard, place)
        except OSError as error:
            if error.errno not in IN_THE_WAY:
                raise
            wait_for(part_of(place))
            ready = self._ready(shard)
            return self._copy(shard, own) if ready is None else ready

    def _copy(self, shard: Stored, place: Path) -> int:
        """Copy a shard to a place, or wait until another process has. Raises PermissionError where
        files of another user are in the way.
        """
        part = part_of(place)
        while True:
            file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)  # whoever copies it has this lock
                if (ready := self._descriptor(place, shard.size)) is not None:
                    remove_if_same(part, file)
                    return ready
                if not is_same(part, file):
                    continue  # it failed there, or was evicted since
                try:
                    digest = self._filled(shard, part, file)
                    note_digest(place, digest)
                    os.utime(part)
                    os.rename(part, place)
                except BaseException:
                    remove_if_same(part, file)
                    raise
                return os.dup(file)
            finally:
                os.close(file)

    def _filled(self, shard: Stored, part: Path, file: int) -> str:
        """Copy a shard into its open file; its SHA-256. A full disk is met by deleting copies."""
        while True:
            try:
                self._make_room(shard, part, file)
                return self._fill(shard, file)
            except OSError as error:
                if error.errno not in sources.FULL:
                    raise
                os.ftruncate(file, 0)
                freed = self._evict(shard.size)
                if not freed:
                    raise OSError(
                        error.errno,
                        f"the cache {self.folder} cannot hold {redacted(shard.path)} "
                        f"({shard.size / 1e9:.3g} GB): {error.strerror}; make room there, or give "
                        "another data.cache_dir or less data.cache_gb",
                    ) from error
                _log.warning(
                    "the disk of the cache %s is full: %.3g GB of copies deleted",
                    self.folder,
                    freed / 1e9,
                )

    def _evict(self, size: int) -> int:
        """Delete copies that were not used for the longest, of so many bytes; how many it was."""
        freed = 0
        for _, each, place in self.shards():
            if freed < size and delete(place):
                freed += each
        return freed

    def _fill(self, shard: Stored, file: int) -> str:
        with open(os.dup(file), "r+b") as out:
            out.seek(0)
            # its hash, where it is known, tells more than what a store calls the version
            stamp = "" if shard.sha256 else shard.stamp
            digest = sources.copy(shard.path, out, self.patience, shard.size, stamp).sha256
            out.flush()
            os.fsync(out.fileno())
            if (size := os.fstat(out.fileno()).st_size) != shard.size:
                raise SourceGone(
                    f"{redacted(shard.path)}: has {size} bytes, {shard.size} when it was indexed"
                )
        if shard.sha256 and digest != shard.sha256:
            raise SourceGone(
                f"{redacted(shard.path)}: its bytes differ from the index (SHA-256 "
                f"{digest[:12]}, was "
                f"{shard.sha256[:12]}); copy it there again, or index it again"
            )
        return digest

    def _make_room(self, shard: Stored, mine: Path, file: int) -> None:
        """Give the file its full size, once the limit allows it."""
        if shard.size > self.limit:
            raise CacheTooSmall(
                f"{redacted(shard.path)} has {shard.size / 1e9:.3g} GB, the cache "
                f"{self.folder} may hold "
                f"{self.limit / 1e9:.3g}; raise data.cache_gb"
            )
        while True:
            with locked(self.folder):
                held = self.shards()
                used = sum(size for _, size, _ in held)
                copying = 0
                for _, size, part in self._entries(".part"):
                    if part != mine and not is_abandoned(part):
                        copying += size
                while held and used + copying + shard.size > self.limit:
                    _, size, oldest = held.pop(0)
                    if delete(oldest):
                        used -= size
                if used + copying + shard.size <= self.limit:
                    os.ftruncate(file, 0)
                    # counts from now on, though it takes no disk yet
                    os.ftruncate(file, shard.size)
                    return
            if used + shard.size > self.limit:
                raise CacheTooSmall(
                    f"the cache {self.folder} holds {used / 1e9:.3g} GB of other users that cannot "
                    "be deleted; raise data.cache_gb, or give another data.cache_dir"
                )
            time.sleep(0.05)  # others are copying: what they have copied can be deleted
