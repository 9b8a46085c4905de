"""Shards from elsewhere on this node's disk, and reading samples by offset wherever they lie."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import math
import os
import re
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rcmae.data import sources
from rcmae.data.index import ShardIndex
from rcmae.data.sources import (
    USUAL,
    Patience,
    SourceGone,
    Stored,
    basename,
    identity,
    is_remote,
    redacted,
)
from rcmae.errors import Refused

_OPEN_SHARDS = 128  # local files that a process keeps open; the usual limit is 1,024
_AT_ONCE = 16  # shards that are copied together
# A file system on a network loses a server for a moment, or a file's handle; a disk a sector.
_PASSING = (errno.EIO, errno.ESTALE)
_PAUSES_S = (0.2, 1.0, 3.0)  # before each further attempt at a local file


class CacheTooSmall(SourceGone):
    """The cache cannot hold what has to be in it."""


@dataclass(frozen=True)
class Cache:
    """Shards from elsewhere on this node's disk, for all processes that name the same folder, also
    of other jobs.

    A shard is there whole, verified, under a name made of hashes (so nothing that a URL says can
    lead out of the folder), or it is not there. Who needs one that is not there copies it, once on
    the node, into a file of its full size that it holds locked: the lock ends with its process, and
    what a killed one leaves is deleted by the next. Room is made before the copy begins: least
    recently used out first. Files in use may be deleted, as their readers have them open; so nobody
    waits for a reader, and the limit holds at every moment."""

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
        path = Path(place).expanduser()
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder is None and path.stat().st_uid != os.getuid():
                raise PermissionError("it belongs to somebody else")
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
        place = self.place(shard)
        file = self._descriptor(place, shard.size)
        if file is None:
            file = self._copy(shard, place)
        try:
            yield file
        finally:
            os.close(file)

    def fetch(self, shard: Stored) -> None:
        """Have a shard ready. Raises as `opened`."""
        with self.opened(shard):
            pass

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

    def _descriptor(self, place: Path, size: int) -> int | None:
        try:
            file = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        if os.fstat(file).st_size != size:  # somebody else's doing: we rename whole files only
            os.close(file)
            place.unlink(missing_ok=True)
            return None
        with contextlib.suppress(FileNotFoundError):
            os.utime(place)  # when it was last used
        return file

    def _copy(self, shard: Stored, place: Path) -> int:
        """Copy a shard, or wait until another process has.

        Gives a descriptor, so that it can be read in any case.
        """
        part = place.with_name(f".{place.name.removesuffix('.tar')}.part")
        while True:
            file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)  # whoever copies it has this lock
                if (ready := self._descriptor(place, shard.size)) is not None:
                    _remove_if_same(part, file)
                    return ready
                if not _is_same(part, file):
                    continue  # it failed there, or was evicted since
                try:
                    self._make_room(shard, part, file)
                    self._fill(shard, file)
                    os.utime(part)
                    os.rename(part, place)
                except BaseException:
                    _remove_if_same(part, file)
                    raise
                return os.dup(file)
            finally:
                os.close(file)

    def _fill(self, shard: Stored, file: int) -> None:
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
                f"{redacted(shard.path)}: its bytes are not those of the index (SHA-256 "
                f"{digest[:12]}, was "
                f"{shard.sha256[:12]}); copy it there again, or index it again"
            )

    def _make_room(self, shard: Stored, mine: Path, file: int) -> None:
        """Give the file its full size, once the limit allows it."""
        if shard.size > self.limit:
            raise CacheTooSmall(
                f"{redacted(shard.path)} has {shard.size / 1e9:.3g} GB, the cache "
                f"{self.folder} may hold "
                f"{self.limit / 1e9:.3g}; raise data.cache_gb"
            )
        while True:
            with open(self.folder / ".lock", "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                held = self.shards()
                used = sum(size for _, size, _ in held)
                for _, size, part in self._entries(".part"):
                    if part != mine and not _is_abandoned(part):
                        used += size
                while held and used + shard.size > self.limit:
                    _, size, oldest = held.pop(0)
                    oldest.unlink(missing_ok=True)
                    used -= size
                if used + shard.size <= self.limit:
                    os.ftruncate(file, 0)
                    # counts from now on, though it takes no disk yet
                    os.ftruncate(file, shard.size)
                    return
            time.sleep(0.05)  # others are copying: what they have copied can be deleted


def _is_abandoned(part: Path) -> bool:
    """Delete what a killed process left of a copy; whether it was such."""
    try:
        file = os.open(part, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove_if_same(part, file)
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True


def _is_same(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(file))
    except FileNotFoundError:
        return False


def _remove_if_same(path: Path, file: int) -> None:
    if _is_same(path, file):
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------ reading


class Reader:
    """Reads parts of shards by offset, wherever these come from. Travels to another process with
    nothing open.

    Without a cache what lies elsewhere is asked for sample by sample: for tools that look at a few.
    """

    def __init__(self, cache: Cache | None = None) -> None:
        self.cache = cache
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, shard: Stored, offset: int, size: int) -> bytes:
        """`size` bytes, or as many as are there.

        What passes on a file system is tried again, in a file that is opened anew.

        Raises:
            OSError: the shard is gone or cannot be had.
        """
        for pause_s in (*_PAUSES_S, None):
            try:
                return self._read(shard, offset, size)
            except OSError as error:
                if pause_s is None or error.errno not in _PASSING:
                    raise
                self._forget(shard.path)
                time.sleep(pause_s)
        raise AssertionError("the last attempt raises")

    def _read(self, shard: Stored, offset: int, size: int) -> bytes:
        if is_remote(shard.path):
            if self.cache is None:
                return sources.part(shard.path, offset, size)
            with self.cache.opened(shard) as file:
                return sources.pread(file, size, offset)
        return sources.pread(self._local(shard.path), size, offset)

    def _forget(self, path: str) -> None:
        """Close a file, so that it is opened anew."""
        file = self._open.pop(path, None)
        if file is not None:
            with contextlib.suppress(OSError):
                os.close(file)

    def prepare(self, shards: Sequence[Stored]) -> None:
        """Copy these shards into the cache, several at once. Raises as `Cache.opened`."""
        missing = [shard for shard in shards if is_remote(shard.path)]
        if self.cache is None or not missing:
            return
        missing = [shard for shard in missing if not self.cache.place(shard).exists()]
        if len(missing) == 1:
            self.cache.fetch(missing[0])
        elif missing:
            with ThreadPoolExecutor(min(len(missing), _AT_ONCE)) as pool:
                list(pool.map(self.cache.fetch, missing))

    def _local(self, path: str) -> int:
        file = self._open.get(path)
        if file is None:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) >= _OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = file
        self._open.move_to_end(path)
        return file

    def __reduce__(self) -> tuple[type[Reader], tuple[Cache | None]]:
        return Reader, (self.cache,)

    def __del__(self) -> None:
        for file in self._open.values():
            os.close(file)


# ---------------------------------------------------------------------------------- its size


def open_bytes(index: ShardIndex, *, streams: int, window: int, nodes: int) -> int:
    """Bytes of the shards that a node reads at the same time, on average: of each of its streams a
    window and a shard (of a mixture a shard of each set).

    It is what a cache has to hold for no shard to be copied twice in a pass.
    """
    sizes = np.array([shard.size for shard in index.shards])
    samples = min(window, math.ceil(len(index) / streams))
    sets = index.weights or [(len(sizes), 1.0)]
    weight = sum(weight for _, weight in sets)
    each = 0.0
    first = 0
    for count, share in sets:
        mine = slice(first, first + count)
        each += (
            samples * share / weight * sizes[mine].sum() / index.counts[mine].sum()
            + sizes[mine].max()
        )
        first += count
    return min(int(sizes.sum()), math.ceil(math.ceil(streams / nodes) * each))


def cache_problem(
    index: ShardIndex, *, streams: int, window: int, nodes: int, world: int, limit: int
) -> str | None:
    """Why a node's cache of `limit` bytes is too small for this order, with settings that would
    fit; None if it is not.

    Args:
        index: the shards.
        streams, window: data.canonical_streams and data.shuffle_window.
        nodes, world: of the run; the ranks must divide the streams.
        limit: bytes.
    """

    def needed(streams: int, window: int) -> int:
        return open_bytes(index, streams=streams, window=window, nodes=nodes)

    if (
        not any(sources.is_remote(shard.path) for shard in index.shards)
        or needed(streams, window) <= limit
    ):
        return None
    ways = [f"data.cache_gb={math.ceil(needed(streams, window) / 1e8) / 10:g}"]
    halves = [window >> shift for shift in range(1, 7)]
    ways += [
        f"data.shuffle_window={half}"
        for half in halves
        if half >= 64 and needed(streams, half) <= limit
    ][:1]
    halves = [
        streams >> shift
        for shift in range(1, 12)
        if (streams >> shift) % world == 0 < streams >> shift
    ]
    ways += [f"data.canonical_streams={half}" for half in halves if needed(half, window) <= limit][
        :1
    ]
    return (
        f"data.cache_gb={limit / 1e9:g} is less than the {needed(streams, window) / 1e9:.3g} "
        "GB of shards that a node "
        f"reads at once ({math.ceil(streams / nodes)} streams x (a window of {window} "
        "samples + a shard)); "
        f"use {' or '.join(ways)}, or smaller shards"
    )


def node_cache(
    indexes: Iterable[ShardIndex],
    folder: str | None = None,
    gigabytes: float = 100.0,
    patience: Patience = USUAL,
) -> Cache | None:
    """This node's cache for their shards, where any lies elsewhere.

    Arguments and errors as `Cache.of` has them.
    """
    if not any(sources.is_remote(shard.path) for index in indexes for shard in index.shards):
        return None
    return Cache.of(folder, gigabytes, patience)
