"""Which samples there are, and who reads which of them when: an index over plain tar shards, and
the plan. No torch.

The index knows for every image where its bytes lie in its tar, so training reads by offset and
needs no tar library. It is a file beside the shards (`index.json`, and a binary table that is
mapped, not read), written by
tools/make_shards.py and tools/index_shards.py; for shards without one it is built in memory
by reading their headers.
Shards from elsewhere (rcmae/data/sources.py) are indexed alike, and their index may lie beside them
there. The plan is a pure function of (sample counts, seed, batch, streams, window): any position is
reached without replaying those before it. We do not shuffle through a buffer, whose state would
have to be saved and would depend on the ranks."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import tarfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

from rcmae.data import sources
from rcmae.data.draws import Purpose, permutation, uniform
from rcmae.data.sources import USUAL, Cache, Patience
from rcmae.data.workers import mapped
from rcmae.errors import Refused

INDEX = "index.json"
FORMAT, VERSION = "rcmae shard index", 1
# One row a sample: where its image lies in the tar, its label (-100 = none), where its key lies in
# the shard's keys.
ROW = np.dtype(
    [("offset", "<u8"), ("size", "<u4"), ("label", "<i4"), ("key", "<u4"), ("key_size", "<u2")]
)
NO_LABEL = -100
IMAGE_SUFFIXES = (
    "jpg",
    "jpeg",
    "png",
    "webp",
    "bmp",
    "ppm",
    "pgm",
    "pbm",
    "pnm",
    "tif",
    "tiff",
    "gif",
    "npy",
)
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
_MIXED = 3_000_000_000  # samples of a mixture's epoch: their square still fits into 64 bits
# of reading headers before other processes are started to help: that takes seconds itself
_ALONE_S = 2.0
_NAMED = 20  # problems that a message lists before it counts the rest


# ---------------------------------------------------------------------------------------- the index


@dataclass(frozen=True)
class Shard:
    """One tar, and where its part of the index table lies: rows, then keys."""

    path: str  # or URL, or `pipe:` command
    size: int  # bytes of the tar when it was indexed
    samples: int
    fingerprint: str  # of name, size, count and table
    table: str | bytes  # the file that holds the part, or the part itself
    at: int = 0  # where the part begins
    length: int = 0  # bytes of the part
    sha256: str = ""  # of the tar, where somebody has read all of it

    @property
    def name(self) -> str:
        """The file name without `.tar`: the first half of a sample id."""
        return sources.basename(self.path).removesuffix(".tar")

    @property
    def rows(self) -> NDArray[np.void]:
        """[samples] of ROW, a view of the table."""
        return np.frombuffer(self._buffer, ROW, self.samples, self.at)

    def key_at(self, at: int, length: int) -> str:
        """The WebDataset key that a row of the table says to lie there among the keys."""
        start = self.at + ROW.itemsize * self.samples + at
        return self._buffer[start : start + length].decode("utf-8", "surrogateescape")

    @property
    def part(self) -> bytes:
        """A copy of this shard's part of the table."""
        return self._buffer[self.at : self.at + self.length]

    @property
    def _buffer(self) -> bytes | mmap.mmap:
        return self.table if isinstance(self.table, bytes) else _mapped(self.table)


@cache
def _mapped(path: str) -> mmap.mmap:
    # A table's name carries its content's hash, so a file that was mapped once never changes under
    # its name.
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class Sample(NamedTuple):
    """What it takes to read a sample."""

    shard: Shard
    id: str  # "shard/key"
    offset: int  # bytes from the start of the tar
    size: int
    label: int

    @property
    def path(self) -> str:
        """Of its shard."""
        return self.shard.path


class Weighted(Protocol):
    """A set of a mixture."""

    @property
    def shards(self) -> str | Sequence[str]:
        """Its patterns."""

    @property
    def weight(self) -> float:
        """What part of an epoch it makes, in proportion to the others."""


Patterns = str | Sequence[str] | Sequence[Weighted]


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
        # of a shard: name and rows, once they were used
        self._views: dict[int, tuple[str, NDArray[np.void]]] = {}

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
    ) -> ShardIndex:
        """The index of the shards that `patterns` name: from their folders or from `cache`, else
        built in memory.

        Args:
            patterns: what `expand` takes, or sets of a mixture, each of that.
            cache: folders in which `save` may have left an index of these shards, beside those next
                to them.
            jobs: processes that read tar headers where shards have no index.
            patience: with shards from elsewhere.
            scan: False refuses shards without an index instead of reading them.

        Raises:
            ValueError: names every pattern and shard that cannot be used.
        """
        sets = [(one.shards, one.weight) for one in patterns if not isinstance(one, str)]
        found = (
            [_find(shards, patience) for shards, _ in sets] if sets else [_find(patterns, patience)]
        )
        paths = [path for some, _ in found for path in some]
        problems = [*(problem for _, some in found for problem in some), *_named_twice(paths)]
        weights = [(len(some), weight) for (some, _), (_, weight) in zip(found, sets, strict=False)]
        known: dict[str, Shard] = {}
        caches = [cache] if isinstance(cache, str | Path) else cache
        folders, gone = (
            [*map(str, caches), *filter(None, map(sources.folder_of, paths))],
            set[str](),
        )
        for folder in dict.fromkeys(folders):
            try:
                if (index := cls._found(folder, patience)) is not None:
                    known = {sources.identity(shard.path): shard for shard in index.shards} | known
            except (ValueError, OSError) as error:
                problems.append(str(error))
                gone.add(folder)
        there: dict[str, int | OSError | None] = {
            path: _size(path) for path in paths if not sources.is_remote(path)
        }
        elsewhere = [
            path
            for path in paths
            if sources.is_remote(path) and sources.folder_of(path) not in gone
        ]
        there |= sources.sizes(elsewhere, patience)
        problems += [
            str(error)
            for path, error in there.items()
            if isinstance(error, OSError) and "://" in path
        ]
        short, shards = [], dict[str, Shard]()
        for path, size in there.items():
            shard = known.get(sources.identity(path))
            if shard is None:
                continue
            shards[path] = replace(shard, path=path)
            if not isinstance(size, int):
                continue
            if size > shard.size or (size < shard.size and sources.is_remote(path)):
                problems.append(
                    f"{sources.redacted(path)}: is not the file that the index beside it "
                    "describes; "
                    "run tools/index_shards.py --rebuild on it"
                )
            elif size < shard.size:
                short.append(path)
        unknown = [path for path in paths if path not in shards]
        problems += filter(None, map(_not_a_tar, unknown))
        if not scan:
            problems += [
                f"{sources.redacted(path)}: has no index; run tools/index_shards.py on it"
                for path in unknown
            ]
        _refuse(problems)
        fresh = cls.build(unknown, jobs=jobs, patience=patience).shards if unknown else ()
        built = dict(zip(unknown, fresh, strict=True))
        return cls([built.get(path) or shards[path] for path in paths], short, weights)

    @staticmethod
    def lies_in(folder: str, patience: Patience = USUAL) -> bool:
        """Whether a folder, here or elsewhere, has an index. Raises as `open`."""
        if "://" not in folder:
            return _ours(folder)
        try:  # its table, which may be large, is read once: by `open`
            return (
                FORMAT.encode() in (sources.small_file(f"{folder}/{INDEX}", patience) or b"")[:100]
            )
        except OSError as error:
            raise Refused(str(error)) from error

    @classmethod
    def _found(cls, folder: str, patience: Patience) -> ShardIndex | None:
        """The index in a folder, here or elsewhere, if there is one of this package."""
        if "://" not in folder:
            return cls.load(folder) if _ours(folder) else None
        head = sources.small_file(f"{folder}/{INDEX}", patience)
        if head is None or FORMAT.encode() not in head[:100]:
            return None
        try:
            described = json.loads(head)
            table = sources.small_file(f"{folder}/{described['table']}", patience) or b""
            return cls._described(described, folder, table, len(table))
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(f"{folder}/{INDEX}: cannot be used ({error}); write it anew") from error

    @classmethod
    def build(
        cls,
        paths: Sequence[str],
        *,
        jobs: int = 1,
        on_scan: Callable[[Scan], None] = lambda scan: None,
        patience: Patience = USUAL,
    ) -> ShardIndex:
        """The index of these tars from their headers alone, in memory; `on_scan` sees each shard's
        as it is done.

        Raises:
            ValueError: names every shard that is no tar, ends too early or holds no image.
        """
        shards, problems = [], []
        for scan in _scan_all(paths, jobs, patience):
            on_scan(scan)
            if scan.shard is None:
                problems.append(scan.problem)
            else:
                shards.append(scan.shard)
        _refuse(problems)
        return cls(shards)

    @classmethod
    def refresh(
        cls,
        folder: str | Path,
        paths: Sequence[str],
        *,
        rebuild: bool = False,
        jobs: int = 1,
        on_scan: Callable[[Scan], None] = lambda scan: None,
    ) -> ShardIndex:
        """Write the index of a folder so that it covers these shards of it, and give it.

        What it says of shards that still have their size (and of those elsewhere) is kept, of these
        ones too unless `rebuild`.

        Raises:
            ValueError: names every shard that cannot be used; the index is then what it was.
        """
        known: dict[str, Shard] = {}
        try:
            if _ours(folder):
                known = {sources.identity(shard.path): shard for shard in cls.load(folder).shards}
        except ValueError:
            if not rebuild:
                raise
        asked = {sources.identity(path): path for path in paths}
        kept = {
            path: shard
            for path, shard in known.items()
            if (sources.is_remote(path) or _size(path) == shard.size)
            and not (rebuild and path in asked)
        }
        missing = {path: where for path, where in asked.items() if path not in kept}
        built = cls.build(list(missing.values()), jobs=jobs, on_scan=on_scan)
        merged = kept | dict(zip(missing, built.shards, strict=True))
        index = cls([merged[path] for path in sorted(merged)])
        index.save(folder)
        return index

    @classmethod
    def load(cls, folder: str | Path) -> ShardIndex:
        """The index that `save` wrote into a folder. The shards themselves are not looked at.

        Raises:
            ValueError: the index is damaged or of another version.
        """
        path = Path(folder) / INDEX
        try:
            head = json.loads(path.read_text(encoding="utf-8"))
            table = path.parent / head["table"]
            return cls._described(head, str(path.parent), str(table), table.stat().st_size)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Refused(
                f"{path}: cannot be used ({error}); run tools/index_shards.py --rebuild"
            ) from error

    @classmethod
    def _described(
        cls, head: dict[str, Any], folder: str, table: str | bytes, size: int
    ) -> ShardIndex:
        """The index that a parsed index.json of a folder describes.

        Raises what damaged ones lead to.
        """
        if head["version"] != VERSION:
            raise Refused(f"version {head['version']}, this package reads {VERSION}")
        if size != head["bytes"]:
            raise Refused(f"{head['table']} has {size} bytes of {head['bytes']}")
        at, shards = 0, []
        for entry in head["shards"]:
            name, length = entry["name"], entry["table_bytes"]
            path = name if sources.is_remote(name) or os.path.isabs(name) else f"{folder}/{name}"
            shards.append(
                Shard(
                    path,
                    entry["bytes"],
                    entry["samples"],
                    entry["fingerprint"],
                    table,
                    at,
                    length,
                    entry.get("sha256", ""),
                )
            )
            at += length
        if at != head["bytes"] or cls(shards).fingerprint != head["fingerprint"]:
            raise Refused("its parts do not add up")
        return cls(shards)

    def save(self, folder: str | Path) -> Path:
        """Write the index into a folder, the shards' or another; a reader sees the old one or the
        new one.

        Raises:
            ValueError: an index.json of another program lies there.
        """
        folder = Path(folder)
        if (folder / INDEX).exists() and not _ours(folder):
            raise Refused(f"{folder / INDEX}: belongs to another program; move it away")
        folder.mkdir(parents=True, exist_ok=True)
        here = os.path.abspath(folder)

        def name(path: str) -> str:  # shards beside the index move with it
            path = sources.identity(path)
            if sources.is_remote(path):
                return path
            return os.path.basename(path) if os.path.dirname(path) == here else path

        table = f"index-{self.fingerprint[:16]}.bin"
        head = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "samples": len(self),
            "table": table,
            "bytes": sum(shard.length for shard in self.shards),
            "shards": [
                {
                    "name": name(shard.path),
                    "bytes": shard.size,
                    "samples": shard.samples,
                    "table_bytes": shard.length,
                    "fingerprint": shard.fingerprint,
                    **({"sha256": shard.sha256} if shard.sha256 else {}),
                }
                for shard in self.shards
            ],
        }
        with written_aside(folder / table) as file:
            file.writelines(shard.part for shard in self.shards)
        with written_aside(folder / INDEX) as file:
            file.write(json.dumps(head, indent=1).encode() + b"\n")
        for old in folder.glob("index-*.bin"):
            if old.name != table:
                old.unlink(missing_ok=True)  # who mapped it keeps it
        return folder / INDEX

    @cached_property
    def fingerprint(self) -> str:
        """What the numbers of the samples mean: names, sizes, counts and sample tables of the
        shards, in order.
        """
        mixture = [json.dumps(self.weights)] if self.weights else []
        return hashlib.sha256(
            "\n".join([*(shard.fingerprint for shard in self.shards), *mixture]).encode()
        ).hexdigest()

    @property
    def is_saved(self) -> bool:
        """Whether all of it lies in files, so that opening it again reads no tar."""
        return not any(isinstance(shard.table, bytes) for shard in self.shards)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> Sample:
        """The sample of a number."""
        which, row = self.place(number)
        shard = self.shards[which]
        view = self._views.get(which)
        if view is None:
            view = self._views[which] = (shard.name, shard.rows)
        name, rows = view
        offset, size, label, at, length = rows[row].item()
        return Sample(shard, f"{name}/{shard.key_at(at, length)}", offset, size, label)

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
        return np.concatenate([shard.rows["label"] for shard in self.shards]).astype(np.int64)


def open_bytes(index: ShardIndex, *, streams: int, window: int, nodes: int) -> int:
    """Bytes of the shards that a node reads at the same time, on average: of each of its streams a
    window and a shard (of a mixture a shard of each set).

    It is what a cache has to hold for no shard to be copied twice in a pass.
    """
    sizes, samples = (
        np.array([shard.size for shard in index.shards]),
        min(window, math.ceil(len(index) / streams)),
    )
    sets = index.weights or [(len(sizes), 1.0)]
    weight, each, first = sum(weight for _, weight in sets), 0.0, 0
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


def _ours(folder: str | Path) -> bool:
    """Whether the index.json of a folder, where there is one, is of this package."""
    try:
        with open(os.path.join(folder, INDEX), "rb") as file:
            return FORMAT.encode() in file.read(100)
    except FileNotFoundError:
        return False


def expand(patterns: str | Sequence[str], *, even_empty: bool = False) -> list[str]:
    """The shards that a pattern or a list of them names: `train-{000000..000005}.tar`,
    `data/*.tar`, plain paths, URLs with either, `pipe:` commands with braces.

    Raises:
        ValueError: names each pattern that matches nothing and each shard that is missing, empty
            (unless `even_empty`), unreadable or named twice, all at once.
    """
    paths, problems = _find(patterns, even_empty=even_empty)
    _refuse([*problems, *_named_twice(paths)])
    return paths


def flat(patterns: Patterns) -> list[str]:
    """The patterns of all sets, without their weights."""
    sets = (
        [patterns]
        if isinstance(patterns, str)
        else [one if isinstance(one, str) else one.shards for one in patterns]
    )
    return [pattern for one in sets for pattern in ([one] if isinstance(one, str) else one)]


@contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes its name when it is complete: it is there whole or not at
    all.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _find(
    patterns: Patterns, patience: Patience = USUAL, *, even_empty: bool = False
) -> tuple[list[str], list[str]]:
    paths: list[str] = []
    problems: list[str] = []
    for pattern in flat(patterns):
        try:
            pieces = list(
                braceexpand(pattern if sources.is_remote(pattern) else os.path.expanduser(pattern))
            )
        except ValueError:
            problems.append(f"{sources.redacted(pattern)}: its braces do not pair")
            continue
        for piece in pieces:
            try:
                found = sources.find(piece, patience)
            except (ValueError, OSError) as error:
                problems.append(f"{sources.redacted(piece)}: {error}")
                continue
            if not found:
                of = f" (of {sources.redacted(pattern)})" if piece != pattern else ""
                problems.append(f"{sources.redacted(piece)}: matches nothing{of}")
            paths += found
    if not paths and not problems:
        problems.append(
            "no shards are named; give data.shards a pattern, such as "
            "data/train-{000000..000099}.tar"
        )
    problems += filter(
        None, (_not_a_shard(path, even_empty=even_empty) for path in dict.fromkeys(paths))
    )
    return paths, problems


def _named_twice(paths: Sequence[str]) -> list[str]:
    times = Counter(map(sources.identity, paths))
    named = {sources.identity(path): path for path in paths}
    return [
        f"{sources.redacted(named[path])}: is named {count} times"
        for path, count in times.items()
        if count > 1
    ]


def _not_a_shard(path: str, *, even_empty: bool) -> str | None:
    if sources.is_remote(path):
        return None  # asked for with all others: sources.sizes
    try:
        if os.path.isdir(path):
            return f"{path}: is a folder; name the shards in it, such as {path.rstrip('/')}/*.tar"
        if os.stat(path).st_size == 0 and not even_empty:
            return f"{path}: is empty"
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None if os.access(path, os.R_OK) else f"{path}: is not readable"


def _size(path: str) -> int | None:
    """Bytes of a file here; None where there is none: _not_a_shard has said it."""
    try:
        return os.path.getsize(path)
    except OSError:
        return None


def _not_a_tar(path: str) -> str | None:
    if sources.is_remote(path):
        return None
    try:
        with open(path, "rb") as file:
            block = file.read(tarfile.BLOCKSIZE)
    except OSError as error:
        # absent: _not_a_shard has said it
        return None if not os.path.isfile(path) else f"{path}: {error.strerror}"
    if block.startswith(_COMPRESSED):
        return f"{path}: is compressed; images are read by offset, so unpack it to a plain tar"
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return (
            None
            if not block
            else f"{path}: is not a tar file"
            if any(block)
            else f"{path}: holds no files"
        )
    return None


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        rest = [f"... and {len(problems) - _NAMED} more"] if len(problems) > _NAMED else []
        raise Refused("\n".join(["shards that cannot be used:", *problems[:_NAMED], *rest]))


class Scan(NamedTuple):
    """What reading a tar's headers gave: a shard or a problem."""

    path: str
    shard: Shard | None = None
    problem: str = ""
    without_image: int = 0  # samples (groups of members with one key) without an image: left out
    bad_labels: int = 0  # samples whose .cls holds no class number: they count as unlabelled


def _scan_all(paths: Sequence[str], jobs: int, patience: Patience) -> Iterator[Scan]:
    one = partial(scan, patience=patience)
    began, left = time.monotonic(), deque(paths)
    while left and (jobs <= 1 or len(left) == 1 or time.monotonic() - began < _ALONE_S):
        yield one(left.popleft())
    if not left:
        return
    # Not from the fork server: whoever uses it first decides what it has imported, and the stream
    # wants torch there.
    yield from mapped(one, left, min(jobs, len(left)), get_context("spawn"))


def scan(path: str, patience: Patience = USUAL) -> Scan:
    """Read the headers of a tar (USTAR, GNU and PAX) and group its members into samples as
    WebDataset does.

    A key is the member's path up to the first dot of its base name; neighbours with one key are one
    sample. Its image is the member with the plainest image suffix, its label the number in `.cls`.
    A tar from elsewhere is copied whole to do so, and hashed.
    """
    try:
        if not sources.is_remote(path):
            with open(path, "rb") as file:
                return _scan(path, file, "")
        with sources.fetched(path, patience) as (file, digest):
            return _scan(path, file, digest)
    except (tarfile.TarError, OSError) as error:
        told = (
            str(error)
            if isinstance(error, sources.SourceGone | FileNotFoundError) and error.errno is None
            else ""
        )
        return Scan(path, problem=told or f"{sources.redacted(path)}: is no complete tar ({error})")


def _scan(path: str, file: BinaryIO, sha256: str) -> Scan:
    rows: list[tuple[int, int, int, int, int]] = []
    keys: list[bytes] = []
    names: list[str] = []  # the first few, for the message when no sample is found
    without_image = bad_labels = key_at = 0
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for key, members in groups(tar):
            names += [member.name for member in members.values()][: max(0, 3 - len(names))]
            suffix = image_suffix(members)
            if suffix is None:
                without_image += 1
                continue
            label = NO_LABEL
            if (cls := members.get("cls")) is not None:
                try:
                    label = int(os.pread(file.fileno(), min(cls.size, 32), cls.offset_data))
                except ValueError:
                    bad_labels += 1
            image, raw_key = members[suffix], key.encode("utf-8", "surrogateescape")
            rows.append((image.offset_data, image.size, label, key_at, len(raw_key)))
            keys.append(raw_key)
            key_at += len(raw_key)
        if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
            # tarfile takes one cut between members, or in a header, as whole
            raise tarfile.ReadError("no end mark")
        size = os.fstat(file.fileno()).st_size
    if not rows:
        shown = ", ".join(names) or "none"
        return Scan(
            path, problem=f"{sources.redacted(path)}: holds no image (its first members: {shown})"
        )
    part = np.array(rows, ROW).tobytes() + b"".join(keys)
    print_of = hashlib.sha256(
        json.dumps([sources.basename(path), size, len(rows)]).encode() + part
    ).hexdigest()
    where = path if sources.is_remote(path) else os.path.abspath(path)
    shard = Shard(where, size, len(rows), print_of, part, 0, len(part), sha256)
    return Scan(path, shard, "", without_image, bad_labels)


def groups(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """(key, suffix -> member) of each sample of an open tar, in its order.

    Links, folders and devices are left out.
    """
    current: str | None = None
    members: dict[str, tarfile.TarInfo] = {}
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # a shard may have millions: tarfile would keep them all
        match = re.match(r"((?:.*/|)[^.]+)[.]([^/]*)$", member.name, re.DOTALL)
        if match is None or not member.isreg() or member.issparse():
            continue
        key, suffix = match.group(1), match.group(2).lower()
        if key != current:
            if members:
                yield str(current), members
            current, members = key, {}
        members.setdefault(suffix, member)
    if members:
        yield str(current), members


def image_suffix(members: Iterable[str]) -> str | None:
    """The suffix of the member that is a sample's image, if it has one."""
    images = [suffix for suffix in members if suffix.rpartition(".")[2] in IMAGE_SUFFIXES]
    # "jpg" before "mask.png" and before an array; else the first
    return min(images, key=lambda suffix: (suffix.endswith("npy"), suffix.count(".")), default=None)


# ----------------------------------------------------------------------------------------- the plan


class Requests(NamedTuple):
    """What a rank reads, in order of position."""

    positions: NDArray[np.int64]  # [n] absolute position in the run: keys the crop and the mask
    samples: NDArray[np.int64]  # [n] number of the sample in the index


@dataclass(frozen=True, eq=False)
class Plan:
    """Which sample stands at which absolute position of a run.

    A pass is a seeded order of the shards laid in a circle and entered at a seeded point. An epoch
    is the largest multiple of `images` that a pass holds (what is left over is another part each
    time); with `epoch_samples` it is that many samples of passes laid end to end, nothing left
    over. It is cut into `streams` contiguous streams, a stream into blocks of `window` samples,
    each in an order of its own. Position g of an epoch is item g // streams of stream g % streams.
    A rank reads the positions g % world == rank, so `world` has to divide `streams` and `images`.

    A mixture's sets are dealt out evenly along the epoch, each in proportion to its weight, so
    every block of every stream has its part of each; the passes of each set are its own, laid end
    to end over all epochs."""

    counts: NDArray[np.int64]  # [shards] samples of each
    seed: int
    images: int  # samples of an optimizer step over all ranks
    streams: int
    window: int
    epoch_samples: int | None = None
    # of a mixture: (shards, weight) of each set, in their order
    weights: tuple[tuple[int, float], ...] = ()
    _passes: dict[tuple[int, int], tuple[NDArray[np.int64], NDArray[np.int64], int]] = field(
        default_factory=dict, repr=False
    )
    _blocks: dict[tuple[int, int, int], NDArray[np.int64]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        available, problems = self._pass_samples, []
        for key, value in (
            ("batch.images", self.images),
            ("data.canonical_streams", self.streams),
            ("data.shuffle_window", self.window),
        ):
            if value < 1:
                problems.append(f"{key}={value} must be at least 1")
        if available == 0:
            problems.append("the shards hold no samples")
        elif self.epoch_samples is None and available < self.images:
            problems.append(
                f"batch.images={self.images} is more than the {available} samples of an "
                "epoch; use fewer,"
                f" or set data.epoch_samples (at least {self.images}) so that several passes "
                "make an epoch"
            )
        elif self.epoch_samples is not None and self.epoch_samples < self.images:
            problems.append(
                f"data.epoch_samples={self.epoch_samples} is less than "
                f"batch.images={self.images}: no step fits in it"
            )
        elif self.weights and (self.epoch_samples or available) > _MIXED:
            problems.append(
                f"an epoch of a mixture has at most {_MIXED:,} samples; set data.epoch_samples "
                "to less"
            )
        if problems:
            raise Refused("\n".join(problems))
        for number, (part, (_, weight)) in enumerate(zip(self._parts, self.weights, strict=False)):
            if part.samples == 0 or part.share == 0:
                what = (
                    "holds no samples"
                    if part.samples == 0
                    else f"with weight {weight:g} has no sample in an epoch"
                )
                problems.append(f"data.shards: set {number} {what}; leave it out, or give it more")
        if problems:
            raise Refused("\n".join(problems))

    @property
    def samples_per_epoch(self) -> int:
        """Samples of an epoch, a multiple of `images`."""
        return self.steps_per_epoch * self.images

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return (self.epoch_samples or self._pass_samples) // self.images

    def requests(self, first: int, stop: int, rank: int = 0, world: int = 1) -> Requests:
        """What `rank` of `world` reads of the absolute positions first ... stop - 1, in order of
        position.

        Raises:
            ValueError: `world` does not divide the batch and the streams.
        """
        if self.images % world or self.streams % world:
            raise Refused(
                f"{world} ranks must divide batch.images={self.images} and "
                f"data.canonical_streams={self.streams};"
                f" use multiples of {world}, or another number of ranks"
            )
        positions = np.arange(first + (rank - first) % world, stop, world, dtype=np.int64)
        samples = np.empty_like(positions)
        parts, places = self._dealt(positions)
        for number, part in enumerate(self._parts):
            chosen = np.flatnonzero(parts == number)
            passes, within = np.divmod(places[chosen], max(part.samples, 1))
            for which in np.unique(passes).tolist():
                mine = passes == which
                samples[chosen[mine]] = self._pass_sample(number, which, within[mine])
        return Requests(positions, samples)

    def substitutes(self, position: int, sample: int) -> Iterator[int]:
        """What to try in place of an unreadable sample: its shard from there on, all round, then
        the next shards.
        """
        (number,), (place,) = self._dealt(np.array([position], np.int64))
        order, _, _ = self._pass(int(number), int(place) // self._parts[number].samples)
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        start, count = int(self._starts[shard]), int(self.counts[shard])
        yield from range(sample + 1, start + count)
        yield from range(start, sample)
        turn = int(np.flatnonzero(order == shard)[0])
        for following in np.roll(order, -turn)[1:].tolist():
            start = int(self._starts[following])
            yield from range(start, start + int(self.counts[following]))

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum(self.counts) - self.counts

    @cached_property
    def _pass_samples(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def _parts(self) -> list[_Part]:
        epoch, ends = self.samples_per_epoch, np.cumsum([0, *self.counts]).tolist()
        if not self.weights:
            moves = epoch if self.epoch_samples is not None else self._pass_samples
            return [_Part(0, len(self.counts), self._pass_samples, epoch, moves)]
        whole = sum(weight for _, weight in self.weights)
        exact = [epoch * weight / whole for _, weight in self.weights]
        shares = [math.floor(share) for share in exact]
        # the largest remainders
        rest = sorted(range(len(exact)), key=lambda number: shares[number] - exact[number])
        for number in rest[: epoch - sum(shares)]:
            shares[number] += 1
        parts, first = [], 0
        for (count, _), share in zip(self.weights, shares, strict=True):
            parts.append(
                _Part(first, first + count, ends[first + count] - ends[first], share, share)
            )
            first += count
        return parts

    def _dealt(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """([n] the set that stands at each position, [n] its place in the set's passes laid end to
        end).

        Of the first p samples of an epoch floor(p x A / B) are of the first sets, where these have
        A samples of the B that they have with the next set: so counts are exact, and never more
        than one off in between."""
        epochs, rank = self._laid(positions)
        number = np.zeros_like(positions)
        ends = np.cumsum([part.share for part in self._parts]).tolist()
        undecided = np.ones(len(positions), bool)
        for last in range(len(self._parts) - 1, 0, -1):
            below = rank * ends[last - 1] // ends[last]
            above = (rank + 1) * ends[last - 1] // ends[last] == below
            number[undecided & above] = last
            rank = np.where(undecided, np.where(above, rank - below, below), rank)
            undecided &= ~above
        moves = np.array([part.moves for part in self._parts])
        return number, rank + epochs * moves[number]

    def _laid(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """([n] the epoch of each position, [n] where it lies in the epoch before blocks are
        shuffled).
        """
        per_epoch = self.samples_per_epoch
        epochs, within = np.divmod(positions, per_epoch)
        items, streams = np.divmod(within, self.streams)
        # the first `longer` streams have one sample more
        short, longer = divmod(per_epoch, self.streams)
        starts = streams * short + np.minimum(streams, longer)
        lengths = short + (streams < longer)
        blocks, places = np.divmod(items, self.window)
        ends = np.minimum((blocks + 1) * self.window, lengths)

        # Samples of one block stand together, so that each block's order is made once.
        grouped = np.lexsort((blocks, streams, epochs))
        changes = np.flatnonzero(
            np.diff(epochs[grouped], prepend=-1)
            | np.diff(streams[grouped], prepend=-1)
            | np.diff(blocks[grouped], prepend=-1)
        )
        for group in np.split(grouped, changes[1:]):
            if group.size:
                one = group[0]
                epoch, stream, block = int(epochs[one]), int(streams[one]), int(blocks[one])
                size = int(ends[one]) - block * self.window
                places[group] = self._block(epoch, stream, block, size)[places[group]]
        return epochs, starts + blocks * self.window + places

    def _block(self, epoch: int, stream: int, block: int, size: int) -> NDArray[np.int64]:
        key = (epoch, stream, block)
        if key not in self._blocks:
            while len(self._blocks) >= 2 * self.streams:
                # the open blocks and as many of the last ones
                del self._blocks[next(iter(self._blocks))]
            self._blocks[key] = permutation(self.seed, Purpose.BLOCK, *key, count=size)
        return self._blocks[key]

    def _pass(self, number: int, which: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """(order of a set's shards, [shards] where each ends in it, where the circle is
        entered).
        """
        if (number, which) not in self._passes:
            # The streams of an epoch stand in all its passes at once.
            kept = sum(2 + part.share // max(part.samples, 1) for part in self._parts)
            while len(self._passes) >= kept:
                del self._passes[next(iter(self._passes))]
            part = self._parts[number]
            order = part.first + permutation(
                self.seed, Purpose.SHARDS, which, number, count=part.stop - part.first
            )
            turn = math.floor(
                uniform(self.seed, Purpose.ROTATION, which, number, count=1)[0] * part.samples
            )
            self._passes[number, which] = (order, np.cumsum(self.counts[order]), turn)
        return self._passes[number, which]

    def _pass_sample(self, number: int, which: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        order, ends, turn = self._pass(number, which)
        places = (places + turn) % self._parts[number].samples
        slots = np.searchsorted(ends, places, side="right")
        shards = order[slots]
        rows = places - (ends[slots] - self.counts[shards])
        return self._starts[shards] + rows


class _Part(NamedTuple):
    """A set of a mixture; the only one where there is none."""

    first: int  # of its shards
    stop: int
    samples: int  # of a pass
    share: int  # samples of an epoch
    moves: int  # samples of its passes that an epoch goes through or leaves out
