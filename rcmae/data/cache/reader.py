"""Samples read by offset, wherever their shards lie."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rcmae.data import sources
from rcmae.data.cache.store import Cache
from rcmae.data.sources import Stored, is_remote
from rcmae.files import patiently

_OPEN_SHARDS = 128  # local files that a process keeps open; the usual limit is 1,024
_AT_ONCE = 16  # shards that are copied together


class Reader:
    """Reads parts of shards by offset, wherever these come from. Travels to another process with
    nothing open.

    Without a cache, remote shards are read sample by sample: for tools that need a few.
    """

    def __init__(self, cache: Cache | None = None) -> None:
        self.cache = cache
        self._open: OrderedDict[str, int] = OrderedDict()
        self._read_last: dict[str, os.stat_result] = {}  # path of a shard -> its copy
        self._sound: set[tuple[int, int]] = set()  # copies that have their hash

    def read(self, shard: Stored, offset: int, size: int) -> bytes:
        """`size` bytes, or as many as are there.

        A passing error of a file system is retried with the file opened again.

        Raises:
            OSError: the shard is gone or cannot be had.
        """
        return patiently(lambda: self._read(shard, offset, size), lambda: self._forget(shard.path))

    def _read(self, shard: Stored, offset: int, size: int) -> bytes:
        if is_remote(shard.path):
            if self.cache is None:
                return sources.part(shard.path, offset, size)
            with self.cache.opened(shard) as file:
                self._read_last[shard.path] = os.fstat(file)
                return sources.pread(file, size, offset)
        return sources.pread(self._local(shard.path), size, offset)

    def _forget(self, path: str) -> None:
        """Close a file, so that it is opened again."""
        file = self._open.pop(path, None)
        if file is not None:
            with contextlib.suppress(OSError):
                os.close(file)

    def renewed(self, shard: Stored) -> bool:
        """Whether a sample that was not right in a shard's copy may be read again: the copy was
        damaged, or another process has made a new one. Each copy is looked at once.

        Raises:
            OSError: the cache cannot be read.
        """
        read = self._read_last.get(shard.path)
        if self.cache is None or read is None or (read.st_dev, read.st_ino) in self._sound:
            return False
        if self.cache.renewed(shard, read):
            return True
        self._sound.add((read.st_dev, read.st_ino))
        return False

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
