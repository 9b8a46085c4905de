"""Every sample of a set of shards, numbered: where its image lies, its label and its key. No torch.

The index knows for every image where its bytes lie in its tar, so training reads by offset and
needs no tar library. It is a file beside the shards (`index.json`, and a binary table that is
mapped, not read); for shards without one it is built in memory by reading their headers. Shards
that are remote (rcmae/data/sources) are indexed alike, and their index may lie beside them
there.

Tables carry hashes, which are compared before rows are used. Which index is believed of a shard:
rcmae/data/patterns.py."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rcmae.data import sources
from rcmae.data.patterns import (
    Indexed,
    Patterns,
    Search,
    refuse_shards,
    sets_named,
    unlike,
)
from rcmae.data.sources import USUAL, Patience
from rcmae.data.tars import (
    FIRST_DOT,
    NO_LABEL,
    Member,
    Note,
    Scan,
    Shard,
    entry_of,
    forget_table,
    is_no_tar,
    scan_all,
    shard_of,
    together,
)
from rcmae.errors import Refused
from rcmae.files import aside, patiently

INDEX = "index.json"
FORMAT = "rcmae shard index"
VERSION = 2  # 1 is read, too
_TABLE = re.compile(r"index-[\w-]+\.bin")
_log = logging.getLogger(__name__)


class Sample(NamedTuple):
    """What it takes to read a sample."""

    shard: Shard
    id: str  # "shard/key"
    offset: int  # bytes from the start of the tar
    size: int
    label: int
    checksum: int = -1  # as the header of the image's member has it; -1: not known (format 1)

    @property
    def path(self) -> str:
        """Path or URL of its shard."""
        return self.shard.path

    @property
    def key(self) -> str:
        """WebDataset's key: the name of its members without their suffixes."""
        return self.id.partition("/")[2]


class ShardIndex:
    """Every sample of a list of shards, numbered from 0 in the order of the list.

    It is small to hand to another process: tables that lie in files travel by name and are mapped
    there."""

    def __init__(
        self,
        shards: Sequence[Shard],
        short: Sequence[str] = (),
        weights: Sequence[tuple[int, float]] = (),
    ) -> None:
        self.shards = tuple(shards)
        # of a mixture's sets: (shards, weight) of each, in order; else empty
        self.weights = tuple(weights)
        # shards with fewer bytes than they were indexed with: their last samples are bad
        self.short = tuple(short)
        self.counts = np.array([shard.samples for shard in self.shards], np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])
        self._views: dict[int, _View] = {}  # of the shards that were used

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_views": {}}

    @classmethod
    def open(
        cls,
        patterns: Patterns,
        *,
        cache: str | Path | Sequence[str | Path] = (),
        jobs: int = 1,
        patience: Patience = USUAL,
        scan: bool = True,
        needs: Collection[str] = (),
        on_scan: Callable[[Scan], None] = lambda scan: None,
    ) -> ShardIndex:
        """The index of the shards that `patterns` name: from their folders or from `cache`, else
        built in memory.

        Args:
            patterns: what `expand` takes, or sets of a mixture, each of that.
            cache: folders in which `save` may have left an index of these shards, beside those next
                to them.
            jobs: processes that read tar headers where shards have no index.
            patience: with remote shards.
            scan: False reads no headers: it refuses shards without an index, and believes what an
                index says of shards that were written since.
            needs: kinds of members (tars.KINDS) whose places the index has to know.
            on_scan: sees each shard's headers as they are read.

        Raises:
            Refused: names every pattern and shard that cannot be used.
        """
        paths, problems, weights = sets_named(patterns, patience)
        caches = [cache] if isinstance(cache, str | Path) else cache
        search = Search(paths, [str(folder) for folder in caches], _indexed, patience)
        picks = {path: search.pick(path, needs) for path in paths}
        known = {
            path: pick.shard
            for path, pick in picks.items()
            if pick.shard is not None and (pick.is_sure or not scan)
        }
        unread = [path for path in paths if path not in known]
        problems += search.problems
        problems += filter(None, map(is_no_tar, unread))
        if not scan:
            for path in unread:
                problems.append(
                    f"{sources.redacted(path)}: has no index; run {sources.indexing(path)}"
                )
        refuse_shards(problems)
        if unread:
            rules = {path: shard.rule for path in unread if (shard := picks[path].shard)}
            built = cls.build(
                unread, jobs=jobs, patience=patience, rules=rules, on_scan=on_scan
            ).shards
            for path, shard in zip(unread, built, strict=True):
                before = picks[path].shard
                problems += [] if before is None else unlike(before, shard)
                known[path] = shard
        refuse_shards(problems)
        return cls([known[path] for path in paths], search.short, weights)

    @staticmethod
    def lies_in(folder: str, patience: Patience = USUAL) -> bool:
        """Whether a folder, local or remote, has an index. Raises as `open`."""
        if "://" not in folder:
            return is_ours(folder)
        try:  # its table, which may be large, is read once: by `open`
            head = sources.small_file(f"{folder}/{INDEX}", patience) or b""
        except OSError as error:
            raise Refused(str(error)) from error
        return FORMAT.encode() in head[:100]

    @classmethod
    def found_in(cls, folder: str, patience: Patience = USUAL) -> ShardIndex | None:
        """The index in a folder, local or remote, if there is one of this package.

        Raises:
            Refused: the index is damaged, or newer than this package.
            OSError: it may be there, but cannot be had.
        """
        if "://" not in folder:
            return cls.load(folder) if is_ours(folder) else None
        text = sources.small_file(f"{folder}/{INDEX}", patience)
        if text is None or FORMAT.encode() not in text[:100]:
            return None
        head = _head(text, f"{folder}/{INDEX}")
        table = sources.small_file(f"{folder}/{head['table']}", patience) or b""
        index = _described(cls, head, folder, table)
        for shard in index.shards:
            shard.check_table()
        return index

    @classmethod
    def build(
        cls,
        paths: Sequence[str],
        *,
        jobs: int = 1,
        on_scan: Callable[[Scan], None] = lambda scan: None,
        patience: Patience = USUAL,
        rules: Mapping[str, str] | None = None,
    ) -> ShardIndex:
        """The index of these tars from their headers alone, in memory.

        Args:
            paths: of the tars.
            jobs: processes.
            on_scan: sees each shard's as it is done.
            patience: with remote shards.
            rules: path -> where keys end (tars.RULES), of shards that have another rule than
                WebDataset's.

        Raises:
            Refused: names every shard that is not a tar, ends too early or holds no image.
        """
        shards = []
        problems = []
        others = {path: rule for path, rule in (rules or {}).items() if rule != FIRST_DOT}
        for scan in scan_all(paths, jobs, patience, others):
            on_scan(scan)
            if scan.shard is None:
                problems.append(scan.problem)
            else:
                shards.append(scan.shard)
        refuse_shards(problems)
        return cls(shards)

    @classmethod
    def load(cls, folder: str | Path) -> ShardIndex:
        """The index that `save` wrote into a folder. The shards themselves are not looked at, and
        the table is checked where it is first used.

        Raises:
            Refused: the index is damaged, or newer than this package.
        """
        path = Path(folder) / INDEX
        try:
            text = patiently(path.read_bytes)
        except OSError as error:
            raise Refused(f"{path}: cannot be used ({error.strerror})") from error
        head = _head(text, str(path))
        return _described(cls, head, str(folder), str(path.parent / head["table"]))

    def save(self, folder: str | Path) -> Path:
        """Write the index into a folder, the shards' or another; a reader sees the old one or the
        new one.

        Raises:
            Refused: an index.json of another program lies there.
        """
        folder = Path(folder)
        if (folder / INDEX).exists() and not is_ours(folder):
            raise Refused(f"{folder / INDEX}: belongs to another program; move it away")
        folder.mkdir(parents=True, exist_ok=True)
        here = os.path.abspath(folder)

        def name(path: str) -> str:  # shards beside the index move with it
            path = sources.identity(path)
            if sources.is_remote(path):
                return path
            return os.path.basename(path) if os.path.dirname(path) == here else path

        digests = [shard.digest or shard.fingerprint for shard in self.shards]
        content = hashlib.sha256("\n".join(digests).encode()).hexdigest()
        table = f"index-{content[:16]}.bin"
        entries = [entry_of(shard, name(shard.path)) for shard in self.shards]
        head = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": ShardIndex(self.shards).fingerprint,  # of a mixture: without its weights
            "samples": len(self),
            "table": table,
            "bytes": sum(shard.kept.length for shard in self.shards),
            "shards": entries,
        }
        with aside(folder / table) as file:
            file.writelines(shard.part for shard in self.shards)
        forget_table(str(folder / table))  # one of this name that was damaged may be open
        with aside(folder / INDEX, private=sources.holds_secret(entries)) as file:
            file.write(json.dumps(head, indent=1).encode() + b"\n")
        for old in folder.glob("index-*.bin"):
            if old.name != table:
                old.unlink(missing_ok=True)  # who mapped it keeps it
        return folder / INDEX

    @cached_property
    def fingerprint(self) -> str:
        """What the numbers of the samples mean: names, sizes, counts, offsets, labels and keys of
        the shards, in order. Times, checksums and other members are not in it.
        """
        mixture = [json.dumps(self.weights)] if self.weights else []
        return hashlib.sha256(
            "\n".join([*(shard.fingerprint for shard in self.shards), *mixture]).encode()
        ).hexdigest()

    @property
    def notes(self) -> list[Note]:
        """What of the tars is not used and why; nothing for indexes of before."""
        return together((shard.name, note) for shard in self.shards for note in shard.notes)

    def tell_unused(self) -> None:
        """Log what of the tars is not used and why."""
        for note in self.notes:
            _log.warning("shards: %s", note)

    @property
    def is_saved(self) -> bool:
        """Whether all of it lies in files, so that opening it again reads no tar."""
        return not any(isinstance(shard.kept.table, bytes) for shard in self.shards)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> Sample:
        """The sample of a number."""
        which, row = self.place(number)
        shard = self.shards[which]
        name, rows, headed = self._views.get(which) or self._view(which)
        offset, size, label, at, length = rows[row].item()
        label = label if label >= 0 else NO_LABEL
        checksum = -1 if headed is None else int(headed[row]["checksum"])
        key = shard.key_at(at, length)
        return Sample(shard, f"{name}/{key}", offset, size, label, checksum)

    def _view(self, which: int) -> _View:
        shard = self.shards[which]
        if isinstance(shard.kept.table, str):
            shard.check_table()
        view = self._views[which] = _View(shard.name, shard.rows, shard.headed)
        return view

    def members(self, number: int) -> list[Member]:
        """Where the members of a sample lie, its image first; in format 1 the image alone."""
        which, row = self.place(number)
        return self.shards[which].members_of(row)

    def without(self, kind: str) -> NDArray[np.int64]:
        """The numbers of the samples that have no member of a kind. Reads the whole table."""
        for which in range(len(self.shards)):
            self._views.get(which) or self._view(which)  # whether the table is sound
        has = [shard.having(kind) for shard in self.shards]
        return np.flatnonzero(~np.concatenate(has))

    def shards_of(self, numbers: NDArray[np.int64]) -> list[int]:
        """The numbers of the shards that hold these samples, each once, in the order in which
        they are met.
        """
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        return list(dict.fromkeys(shards.tolist()))

    def place(self, number: int) -> tuple[int, int]:
        """(number of the shard, row in it) of a sample."""
        shard = int(self._starts.searchsorted(number, side="right")) - 1
        return shard, number - int(self._starts[shard])

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """[samples] the label of each, NO_LABEL where it has none. Reads the whole table."""
        views = [self._views.get(which) or self._view(which) for which in range(len(self.shards))]
        labels = np.concatenate([view.rows["label"] for view in views]).astype(np.int64)
        return np.where(labels < 0, NO_LABEL, labels)


class _View(NamedTuple):
    """What is used of a shard for each of its samples."""

    name: str
    rows: NDArray[np.void]
    headed: NDArray[np.void] | None


def _indexed(folder: str, patience: Patience) -> Indexed | None:
    """What an index in a folder says, if there is one. Raises as `ShardIndex.found_in`."""
    index = ShardIndex.found_in(folder, patience)
    if index is None:
        return None
    written_ns = 0
    if "://" not in folder:
        with contextlib.suppress(OSError):
            written_ns = os.stat(os.path.join(folder, INDEX)).st_mtime_ns
    return Indexed(index.shards, written_ns)


def is_ours(folder: str | Path) -> bool:
    """Whether the index.json of a folder, where there is one, is of this package."""
    try:
        with patiently(lambda: open(os.path.join(folder, INDEX), "rb")) as file:
            return FORMAT.encode() in patiently(lambda: os.pread(file.fileno(), 100, 0))
    except (FileNotFoundError, NotADirectoryError):
        return False


# --------------------------------------------------------------------------------------- the format


def _head(text: bytes, path: str) -> dict[str, Any]:
    """A parsed index.json. Raises Refused."""
    try:
        head = json.loads(text)
        if not isinstance(head, dict):
            raise Refused("it is not a mapping")
        version = head.get("version")
        if isinstance(version, int) and version > VERSION:
            raise Refused(
                f"{path}: is of index format {version}, this rcmae reads 1 to {VERSION}; use a "
                "newer rcmae, or rebuild the index with rcmae shards index --rebuild"
            )
        if isinstance(version, bool) or version not in (1, VERSION):
            raise Refused(f"version {version!r}")
        if not isinstance(head.get("table"), str) or not _TABLE.fullmatch(head["table"]):
            raise Refused(f"table {head.get('table')!r} is not the name of a table")
        if not isinstance(head.get("shards"), list):
            raise Refused("it lists no shards")
    except (ValueError, RecursionError) as error:
        if isinstance(error, Refused) and str(error).startswith(path):
            raise
        raise Refused(
            f"{path}: cannot be used ({error}); run rcmae shards index --rebuild"
        ) from error
    return head


def _described(
    kind: type[ShardIndex], head: dict[str, Any], folder: str, table: str | bytes
) -> ShardIndex:
    """The index that a parsed index.json of a folder describes. Raises Refused."""
    try:
        size = len(table) if isinstance(table, bytes) else os.path.getsize(table)
        if size != head.get("bytes"):
            raise Refused(f"{head['table']} has {size} bytes of {head.get('bytes')}")
        at = 0
        shards = []
        for entry in head["shards"]:
            shard = shard_of(entry, folder, table, at)
            at += shard.kept.length
            if at > size:
                raise Refused("its parts do not add up")
            shards.append(shard)
        index = kind(shards)
        if at != size or index.fingerprint != head.get("fingerprint"):
            raise Refused("its parts do not add up")
    except (Refused, OSError) as error:
        raise Refused(
            f"{folder}/{INDEX}: cannot be used ({error}); run rcmae shards index --rebuild"
        ) from error
    return index
