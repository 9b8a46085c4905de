"""Which samples there are, and who reads which of them when: an index over plain tar shards, and the plan. No torch.

The index knows for every image where its bytes lie in its tar, so training reads by offset and needs no tar library.
It is a file beside the shards (`index.json`, and a binary table that is mapped, not read), written by
tools/make_shards.py and tools/index_shards.py; for shards without one it is built in memory by reading their headers.
The plan is a pure function of (sample counts, seed, batch, streams, window): any position is reached without replaying
those before it. We do not shuffle through a buffer, whose state would have to be saved and would depend on the ranks.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import mmap
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

from rcmae.draws import Purpose, permutation, uniform

INDEX = "index.json"
FORMAT, VERSION = "rcmae shard index", 1
# One row a sample: where its image lies in the tar, its label (-100 = none), where its key lies in the shard's keys.
ROW = np.dtype([("offset", "<u8"), ("size", "<u4"), ("label", "<i4"), ("key", "<u4"), ("key_size", "<u2")])
NO_LABEL = -100
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "pbm", "pnm", "tif", "tiff", "gif")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
_NAMED = 20  # problems that a message lists before it counts the rest


# ---------------------------------------------------------------------------------------------------- the index


@dataclass(frozen=True)
class Shard:
    """One tar, and where its part of the index table lies: rows, then keys."""

    path: str
    size: int  # bytes of the tar when it was indexed
    samples: int
    fingerprint: str  # of name, size, count and table
    table: str | bytes  # the file that holds the part, or the part itself
    at: int = 0  # where the part begins
    length: int = 0  # bytes of the part

    @property
    def name(self) -> str:
        """The file name without `.tar`: the first half of a sample id."""
        return Path(self.path).name.removesuffix(".tar")

    @property
    def rows(self) -> NDArray[np.void]:
        """[samples] of ROW, a view of the table."""
        return np.frombuffer(self._buffer, ROW, self.samples, self.at)

    def key(self, row: int) -> str:
        """The WebDataset key of a sample."""
        start = self.at + ROW.itemsize * self.samples + int(self.rows["key"][row])
        return self._buffer[start : start + int(self.rows["key_size"][row])].decode("utf-8", "surrogateescape")

    @property
    def part(self) -> bytes:
        """A copy of this shard's part of the table."""
        return self._buffer[self.at : self.at + self.length]

    @property
    def _buffer(self) -> bytes | mmap.mmap:
        return self.table if isinstance(self.table, bytes) else _mapped(self.table)


@cache
def _mapped(path: str) -> mmap.mmap:
    # A table's name carries its content's hash, so a file that was mapped once never changes under its name.
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class Sample(NamedTuple):
    """What it takes to read a sample."""

    path: str
    id: str  # "shard/key"
    offset: int  # bytes from the start of the tar
    size: int
    label: int


class ShardIndex:
    """Every sample of a list of shards, numbered from 0 in the order of the list.

    It is small to hand to another process: tables that lie in files travel by name and are mapped there.
    """

    def __init__(self, shards: Sequence[Shard], short: Sequence[str] = ()) -> None:
        self.shards = tuple(shards)
        self.short = tuple(short)  # shards with fewer bytes than they were indexed with: their last samples are bad
        self.counts = np.array([shard.samples for shard in self.shards], np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])

    @classmethod
    def open(cls, patterns: str | Sequence[str], *, cache: str | Path | None = None, jobs: int = 1) -> ShardIndex:
        """The index of the shards that `patterns` name: from their folders or from `cache`, else built in memory.

        Args:
            patterns: what `expand` takes.
            cache: a folder in which `save` may have left an index of these shards, beside those next to them.
            jobs: processes that read tar headers where shards have no index.

        Raises:
            ValueError: names every pattern and shard that cannot be used.
        """
        paths, problems = _find(patterns)
        known: dict[str, Shard] = {}
        for folder in dict.fromkeys([*([cache] if cache else []), *(os.path.dirname(path) or "." for path in paths)]):
            try:
                if _ours(folder):
                    known |= {os.path.abspath(shard.path): shard for shard in cls.load(folder).shards}
            except ValueError as error:
                problems.append(str(error))
        short, stale = [], []
        for path in paths:
            if (shard := known.get(os.path.abspath(path))) is not None:
                size = os.path.getsize(path)
                if size > shard.size:
                    stale.append(path)
                elif size < shard.size:
                    short.append(path)
        problems += [
            f"{path}: is not the file that the index beside it describes; run tools/index_shards.py --rebuild on it"
            for path in stale
        ]
        unknown = [path for path in paths if os.path.abspath(path) not in known]
        problems += filter(None, map(_not_a_tar, unknown))
        _refuse(problems)
        built = dict(zip(unknown, cls.build(unknown, jobs=jobs).shards, strict=True)) if unknown else {}
        return cls([built.get(path) or known[os.path.abspath(path)] for path in paths], short)

    @classmethod
    def build(
        cls, paths: Sequence[str], *, jobs: int = 1, on_scan: Callable[[Scan], None] = lambda scan: None
    ) -> ShardIndex:
        """The index of these tars from their headers alone, in memory; `on_scan` sees each shard's as it is done.

        Raises:
            ValueError: names every shard that is no tar, ends too early or holds no image.
        """
        shards, problems = [], []
        for scan in _scan_all(paths, jobs):
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

        What it says of shards that still have their size is kept, of these ones too unless `rebuild`.

        Raises:
            ValueError: names every shard that cannot be used; the index is then what it was.
        """
        known: dict[str, Shard] = {}
        try:
            if _ours(folder):
                known = {os.path.abspath(shard.path): shard for shard in cls.load(folder).shards}
        except ValueError:
            if not rebuild:
                raise
        asked = dict.fromkeys(map(os.path.abspath, paths))
        kept = {
            path: shard
            for path, shard in known.items()
            if os.path.isfile(path) and os.path.getsize(path) == shard.size and not (rebuild and path in asked)
        }
        built = cls.build([path for path in asked if path not in kept], jobs=jobs, on_scan=on_scan)
        merged = kept | {shard.path: shard for shard in built.shards}
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
            if head["version"] != VERSION:
                raise ValueError(f"version {head['version']}, this package reads {VERSION}")
            table = path.parent / head["table"]
            if (size := table.stat().st_size) != head["bytes"]:
                raise ValueError(f"{table.name} has {size} bytes of {head['bytes']}")
            at, shards = 0, []
            for entry in head["shards"]:
                location = str(path.parent / entry["name"])
                length = entry["table_bytes"]
                shards.append(
                    Shard(location, entry["bytes"], entry["samples"], entry["fingerprint"], str(table), at, length)
                )
                at += length
            if at != head["bytes"] or cls(shards).fingerprint != head["fingerprint"]:
                raise ValueError("its parts do not add up")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: cannot be used ({error}); run tools/index_shards.py --rebuild") from error
        return cls(shards)

    def save(self, folder: str | Path) -> Path:
        """Write the index into a folder, the shards' or another; a reader sees the old one or the new one.

        Raises:
            ValueError: an index.json of another program lies there.
        """
        folder = Path(folder)
        if (folder / INDEX).exists() and not _ours(folder):
            raise ValueError(f"{folder / INDEX}: belongs to another program; move it away")
        folder.mkdir(parents=True, exist_ok=True)
        here = os.path.abspath(folder)

        def name(path: str) -> str:  # shards beside the index move with it
            path = os.path.abspath(path)
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
        """What the numbers of the samples mean: names, sizes, counts and sample tables of the shards, in order."""
        return hashlib.sha256("\n".join(shard.fingerprint for shard in self.shards).encode()).hexdigest()

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
        entry = shard.rows[row]
        key = f"{shard.name}/{shard.key(row)}"
        return Sample(shard.path, key, int(entry["offset"]), int(entry["size"]), int(entry["label"]))

    def place(self, number: int) -> tuple[int, int]:
        """(number of the shard, row in it) of a sample."""
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return shard, number - int(self._starts[shard])

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """[samples] the label of each, NO_LABEL where it has none. Reads the whole table."""
        return np.concatenate([shard.rows["label"] for shard in self.shards]).astype(np.int64)


def _ours(folder: str | Path) -> bool:
    """Whether the index.json of a folder, where there is one, is of this package."""
    try:
        with open(os.path.join(folder, INDEX), "rb") as file:
            return FORMAT.encode() in file.read(100)
    except FileNotFoundError:
        return False


def expand(patterns: str | Sequence[str]) -> list[str]:
    """The shard paths that a pattern or a list of them names: `train-{000000..000005}.tar`, `data/*.tar`, plain paths.

    Raises:
        ValueError: names each pattern that matches nothing and each shard that is missing, empty, unreadable or named
            twice, all at once.
    """
    paths, problems = _find(patterns)
    _refuse(problems)
    return paths


@contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes its name when it is complete: it is there whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _find(patterns: str | Sequence[str]) -> tuple[list[str], list[str]]:
    paths: list[str] = []
    problems: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if "://" in pattern or pattern.startswith("pipe:"):
            problems.append(f"{pattern}: shards are read from a file system; copy them there or mount their store")
            continue
        try:
            pieces = list(braceexpand(os.path.expanduser(pattern)))
        except ValueError:
            problems.append(f"{pattern}: its braces do not pair")
            continue
        for piece in pieces:
            found = sorted(glob.glob(piece)) if glob.has_magic(piece) and not os.path.exists(piece) else [piece]
            if not found:
                problems.append(f"{piece}: matches nothing" + (f" (of {pattern})" if piece != pattern else ""))
            paths += found
    if not paths and not problems:
        problems.append("no shards are named; give data.shards a pattern, such as data/train-{000000..000099}.tar")
    problems += filter(None, map(_not_a_shard, dict.fromkeys(paths)))
    problems += [f"{path}: is named {count} times" for path, count in Counter(paths).items() if count > 1]
    return paths, problems


def _not_a_shard(path: str) -> str | None:
    try:
        if os.path.isdir(path):
            return f"{path}: is a folder; name the shards in it, such as {path.rstrip('/')}/*.tar"
        if os.stat(path).st_size == 0:
            return f"{path}: is empty"
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None if os.access(path, os.R_OK) else f"{path}: is not readable"


def _not_a_tar(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            block = file.read(tarfile.BLOCKSIZE)
    except OSError as error:
        return None if not os.path.isfile(path) else f"{path}: {error.strerror}"  # absent: _not_a_shard has said it
    if block.startswith(_COMPRESSED):
        return f"{path}: is compressed; images are read by offset, so unpack it to a plain tar"
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None if not block else f"{path}: is not a tar file" if any(block) else f"{path}: holds no files"
    return None


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        rest = [f"... and {len(problems) - _NAMED} more"] if len(problems) > _NAMED else []
        raise ValueError("\n".join(["shards that cannot be used:", *problems[:_NAMED], *rest]))


class Scan(NamedTuple):
    """What reading a tar's headers gave: a shard or a problem."""

    path: str
    shard: Shard | None = None
    problem: str = ""
    without_image: int = 0  # samples (groups of members with one key) without an image: left out
    bad_labels: int = 0  # samples whose .cls holds no class number: they count as unlabelled


def _scan_all(paths: Sequence[str], jobs: int) -> Iterator[Scan]:
    if jobs <= 1 or len(paths) <= 1:
        yield from map(scan, paths)
        return
    # Not from the fork server: whoever uses it first decides what it has imported, and the stream wants torch there.
    with ProcessPoolExecutor(min(jobs, len(paths)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(scan, paths)


def scan(path: str) -> Scan:
    """Read the headers of a tar (USTAR, GNU and PAX) and group its members into samples as WebDataset does.

    A key is the member's path up to the first dot of its base name; neighbours with one key are one sample. Its image
    is the member with the plainest image suffix, its label the number in `.cls`.
    """
    rows: list[tuple[int, int, int, int, int]] = []
    keys: list[bytes] = []
    names: list[str] = []  # the first few, for the message when no sample is found
    without_image = bad_labels = key_at = 0
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for key, members in _groups(tar):
                names += [member.name for member in members.values()][: max(0, 3 - len(names))]
                suffix = _image_suffix(members)
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
                raise tarfile.ReadError(
                    "no end mark"
                )  # tarfile takes one cut between members, or in a header, as whole
            size = os.fstat(file.fileno()).st_size
    except (tarfile.TarError, OSError) as error:
        return Scan(path, problem=f"{path}: is no complete tar ({error})")
    if not rows:
        return Scan(path, problem=f"{path}: holds no image (its first members: {', '.join(names) or 'none'})")
    part = np.array(rows, ROW).tobytes() + b"".join(keys)
    print_of = hashlib.sha256(json.dumps([os.path.basename(path), size, len(rows)]).encode() + part).hexdigest()
    shard = Shard(os.path.abspath(path), size, len(rows), print_of, part, 0, len(part))
    return Scan(path, shard, "", without_image, bad_labels)


def _groups(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
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


def _image_suffix(members: Iterable[str]) -> str | None:
    images = [suffix for suffix in members if suffix.rpartition(".")[2] in IMAGE_SUFFIXES]
    return min(images, key=lambda suffix: suffix.count("."), default=None)  # "jpg" before "mask.png"; else the first


# ---------------------------------------------------------------------------------------------------- the plan


class Requests(NamedTuple):
    """What a rank reads, in order of position."""

    positions: NDArray[np.int64]  # [n] absolute position in the run: keys the crop and the mask
    samples: NDArray[np.int64]  # [n] number of the sample in the index


@dataclass(frozen=True, eq=False)
class Plan:
    """Which sample stands at which absolute position of a run.

    A pass is a seeded order of the shards laid in a circle and entered at a seeded point. An epoch is the largest
    multiple of `images` that a pass holds (what is left over is another part each time); with `epoch_samples` it is
    that many samples of passes laid end to end, nothing left over. It is cut into `streams` contiguous streams, a
    stream into blocks of `window` samples, each in an order of its own. Position g of an epoch is item g // streams of
    stream g % streams. A rank reads the positions g % world == rank, so `world` has to divide `streams` and `images`.
    """

    counts: NDArray[np.int64]  # [shards] samples of each
    seed: int
    images: int  # samples of an optimizer step over all ranks
    streams: int
    window: int
    epoch_samples: int | None = None
    _passes: dict[int, tuple[NDArray[np.int64], NDArray[np.int64], int]] = field(default_factory=dict, repr=False)
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
                f"batch.images={self.images} is more than the {available} samples of an epoch; use fewer,"
                f" or set data.epoch_samples (at least {self.images}) so that several passes make an epoch"
            )
        elif self.epoch_samples is not None and self.epoch_samples < self.images:
            problems.append(
                f"data.epoch_samples={self.epoch_samples} is less than batch.images={self.images}: no step fits in it"
            )
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def samples_per_epoch(self) -> int:
        """Samples of an epoch, a multiple of `images`."""
        return self.steps_per_epoch * self.images

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return (self.epoch_samples or self._pass_samples) // self.images

    def requests(self, first: int, stop: int, rank: int = 0, world: int = 1) -> Requests:
        """What `rank` of `world` reads of the absolute positions first ... stop - 1, in order of position.

        Raises:
            ValueError: `world` does not divide the batch and the streams.
        """
        if self.images % world or self.streams % world:
            raise ValueError(
                f"{world} ranks must divide batch.images={self.images} and data.canonical_streams={self.streams};"
                f" use multiples of {world}, or another number of ranks"
            )
        positions = np.arange(first + (rank - first) % world, stop, world, dtype=np.int64)
        laid = self._laid(positions)
        samples = np.empty_like(positions)
        for which in np.unique(laid // self._pass_samples).tolist():
            chosen = laid // self._pass_samples == which
            samples[chosen] = self._pass_sample(which, laid[chosen] % self._pass_samples)
        return Requests(positions, samples)

    def substitutes(self, position: int, sample: int) -> Iterator[int]:
        """What to try in place of an unreadable sample: its shard from there on, all round, then the next shards."""
        which = int(self._laid(np.array([position]))[0]) // self._pass_samples
        order, _, _ = self._pass(which)
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        start, count = int(self._starts[shard]), int(self.counts[shard])
        yield from range(sample + 1, start + count)
        yield from range(start, sample)
        place = int(np.flatnonzero(order == shard)[0])
        for following in np.roll(order, -place)[1:].tolist():
            start = int(self._starts[following])
            yield from range(start, start + int(self.counts[following]))

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum(self.counts) - self.counts

    @cached_property
    def _pass_samples(self) -> int:
        return int(self.counts.sum())

    def _laid(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n] where the positions lie in the passes laid end to end: pass x its samples + place in it."""
        per_epoch = self.samples_per_epoch
        epochs, within = np.divmod(positions, per_epoch)
        items, streams = np.divmod(within, self.streams)
        short, longer = divmod(per_epoch, self.streams)  # the first `longer` streams have one sample more
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
        laid = starts + blocks * self.window + places
        return laid + epochs * (per_epoch if self.epoch_samples is not None else self._pass_samples)

    def _block(self, epoch: int, stream: int, block: int, size: int) -> NDArray[np.int64]:
        key = (epoch, stream, block)
        if key not in self._blocks:
            while len(self._blocks) >= 2 * self.streams:  # the open blocks and as many of the last ones
                del self._blocks[next(iter(self._blocks))]
            self._blocks[key] = permutation(self.seed, Purpose.BLOCK, *key, count=size)
        return self._blocks[key]

    def _pass(self, which: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """(order of the shards, [shards] where each ends in it, where the circle is entered)."""
        if which not in self._passes:
            # The streams of an epoch stand in all its passes at once.
            while len(self._passes) >= 2 + self.samples_per_epoch // self._pass_samples:
                del self._passes[next(iter(self._passes))]
            order = permutation(self.seed, Purpose.SHARDS, which, count=len(self.counts))
            turn = math.floor(uniform(self.seed, Purpose.ROTATION, which, count=1)[0] * self._pass_samples)
            self._passes[which] = (order, np.cumsum(self.counts[order]), turn)
        return self._passes[which]

    def _pass_sample(self, which: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        order, ends, turn = self._pass(which)
        places = (places + turn) % self._pass_samples
        slots = np.searchsorted(ends, places, side="right")
        shards = order[slots]
        rows = places - (ends[slots] - self.counts[shards])
        return self._starts[shards] + rows
