"""Every byte of a shard set looked at: what is in it, what is wrong with it, and a clean copy.

A tar is read to its end, compared with its index, each image decoded strictly. Damage that leaves a
valid image cannot be seen: other colours in a JPEG, other pixels in a file without a checksum.
Nothing is ever unpacked, so no name in a tar can lead anywhere."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from rcmae.data import sources
from rcmae.data.index import ShardIndex
from rcmae.data.jpeg import has_restarts
from rcmae.data.members.kinds import Facts, MemberKind
from rcmae.data.members.registry import kinds, register
from rcmae.data.packing.indexing import refresh
from rcmae.data.packing.members import (
    Held,
    beside_of,
    counted,
    files_beside,
    registered,
    verified_members,
)
from rcmae.data.packing.members import together as together_held
from rcmae.data.packing.members import told as told_of
from rcmae.data.packing.writer import add
from rcmae.data.patterns import expand
from rcmae.data.tars import (
    FIRST_DOT,
    HEADER,
    LOST,
    NO_LABEL,
    BrokenTar,
    Contents,
    Note,
    Place,
    Shard,
    image_suffix,
    label_in,
    not_a_tar,
    together,
)
from rcmae.data.transforms import BadImage, channels_of, decode
from rcmae.data.workers import fork_server, mapped
from rcmae.errors import Refused
from rcmae.files import aside, write_aside

# what of a tar makes it a damaged one; a sample without an image is named by itself, and a file
# without a suffix does no harm
_FLAWS = tuple(what for what in LOST if what not in ("without_image", "unnamed"))
# (shards, how many) -> the same shards, shown as they come
Progress = Callable[[Iterable["Checked"], int], Iterable["Checked"]]


class Rejected(NamedTuple):
    """A sample that should not be trained on."""

    key: str
    offset: int  # bytes from the start of the tar; -1: of the tar as a whole
    reason: str


class Good(NamedTuple):
    """A sample that decodes."""

    key: str
    offset: int
    label: int


class Checked(NamedTuple):
    """What reading a shard to its end gave."""

    path: str
    bytes: int
    sha256: str
    samples: int  # good ones
    rejected: list[Rejected]
    classes: dict[int, int]  # label -> samples
    sides: dict[int, int]  # shorter side in pixels -> samples
    channels: dict[int, int]  # of an image -> samples
    restarts: int  # samples whose image has restart markers
    good: list[Good]
    held: dict[str, Held]  # kind -> what the members of the good ones hold
    notes: tuple[Note, ...] = ()  # what of the tar is not used, and what is peculiar about it
    is_written: bool = True  # False: a copy would have lost what the notes tell, so there is none


class Sample(NamedTuple):
    """A sample of an open tar that decodes."""

    key: str
    members: dict[str, bytes]  # suffix -> content
    label: int
    side: int
    channels: int
    offset: int  # of its image
    facts: dict[str, Facts]  # kind -> what a map or an annotation holds
    has_restarts: bool  # restart markers, by which a crop is cut out before it is decoded


# ------------------------------------------------------------------------------------------ a shard


def samples_of(
    file: BinaryIO,
    contents: Contents,
    reject: Callable[[Rejected], None],
    beside: Mapping[str, Any],
) -> Iterator[Sample]:
    """The samples of an open tar whose images, maps and annotations can be used.

    All others go to `reject`, also what breaks the tar off. `beside`: as `beside_of` gives it.
    """
    met: set[str] = set()
    key = None
    try:
        for key, members in contents:
            sample = _sample(file, key, members, reject, beside)
            if sample is None:
                continue
            if key in met:
                reject(Rejected(key, sample.offset, "its key is there before in this shard"))
                continue
            met.add(key)
            yield sample
        if key is None:
            reject(Rejected("", -1, "the tar holds no files"))
    except (BrokenTar, OSError) as error:
        why = not_a_tar(os.pread(file.fileno(), HEADER, 0))
        reject(Rejected("", -1, f"it {why}" if why else f"the tar breaks off: {error}"))


def _sample(
    file: BinaryIO,
    key: str,
    members: dict[str, Place],
    reject: Callable[[Rejected], None],
    beside: Mapping[str, Any],
) -> Sample | None:
    suffix = image_suffix(members)
    if suffix is None:
        reject(Rejected(key, next(iter(members.values())).offset, "it has no image"))
        return None
    at = members[suffix].offset
    try:
        content = {name: _content(file, f"{key}.{name}", place) for name, place in members.items()}
        pixels = decode(content[suffix], channels_of(content[suffix]), strict=True)
        facts = verified_members(content, pixels.shape[:2], beside)
    except BadImage as error:
        reject(Rejected(key, at, str(error)))
        return None
    label = label_in(content.get("cls", b""))
    if label is None and "cls" in content:
        reject(Rejected(key, at, f"its .cls holds {content['cls'][:20]!r}, no number of a class"))
    label = NO_LABEL if label is None else label
    return Sample(
        key,
        content,
        label,
        min(pixels.shape[:2]),
        pixels.shape[2],
        at,
        facts,
        has_restarts(content[suffix]),
    )


def _content(file: BinaryIO, name: str, place: Place) -> bytes:
    there = max(0, os.fstat(file.fileno()).st_size - place.offset)
    if there < place.size:
        raise BadImage(f"only {there} of the {place.size} bytes of {name} are there")
    return sources.pread(file.fileno(), place.size, place.offset)


@contextlib.contextmanager
def opened(path: str) -> Iterator[tuple[BinaryIO, str]]:
    """(an open file with a shard's bytes, their SHA-256)."""
    if sources.is_remote(path):
        with sources.fetched(path) as (file, copied):
            yield file, copied.sha256
        return
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        yield file, digest


class Copying(NamedTuple):
    """What a clean copy is to be."""

    out: Path | None = None  # folder of the copy; None: there is to be none
    drops: bool = False  # write one, too, that lacks what is not understood


NO_COPY = Copying()


def check(
    path: str,
    rules: Mapping[str, str] = MappingProxyType({}),
    copying: Copying = NO_COPY,
    added: Sequence[MemberKind] = (),
) -> Checked:
    """Read a shard to its end, and write its good samples under its name if that is asked for.

    Args:
        path: of the shard.
        rules: path -> where keys end, of shards that have another rule than WebDataset's.
        copying: whether to.
        added: kinds of members that were registered, for another process.
    """
    for kind in added:
        register(kind)
    beside = beside_of(sources.folder_of(path))
    held: dict[str, Held] = {}
    rejected: list[Rejected] = []
    good: list[Sample] = []
    with opened(path) as (file, digest), contextlib.ExitStack() as stack:
        tar = None
        contents = Contents(file.fileno(), rules.get(path, FIRST_DOT)).surveyed()
        out = copying.out
        if out is not None and not copying.drops and would_lose(contents):
            out = None
        if out is not None:
            written = stack.enter_context(aside(out / sources.basename(path)))
            tar = stack.enter_context(
                tarfile.open(fileobj=written, mode="w", format=tarfile.PAX_FORMAT)
            )
        for sample in samples_of(file, contents, rejected.append, beside):
            if tar is not None:
                for suffix, data in sample.members.items():
                    add(tar, f"{sample.key}.{suffix}", data)
            one = {kind: Held(1, facts) for kind, facts in sample.facts.items()}
            held = together_held([held, one])
            good.append(sample._replace(members={}, facts={}))
        size = os.fstat(file.fileno()).st_size
    sides = Counter(sample.side for sample in good)
    channels = Counter(sample.channels for sample in good)
    return Checked(
        path=path,
        bytes=size,
        sha256=digest,
        samples=len(good),
        rejected=rejected,
        classes=dict(Counter(sample.label for sample in good)),
        sides=dict(sides),
        channels=dict(channels),
        restarts=sum(sample.has_restarts for sample in good),
        good=[Good(sample.key, sample.offset, sample.label) for sample in good],
        held=held,
        notes=tuple(contents.notes),
        is_written=out is copying.out,
    )


def would_lose(contents: Contents) -> bool:
    """Whether a copy of a tar's samples would lose what is not understood of it."""
    with contextlib.suppress(BrokenTar):
        for _ in contents:
            pass
    return any(note.what in LOST for note in contents.notes)


def check_all(
    paths: Sequence[str], jobs: int, rules: Mapping[str, str], copying: Copying = NO_COPY
) -> Iterator[Checked]:
    """`check` of each shard, in their order, by so many processes."""
    one = partial(check, rules=rules, copying=copying, added=registered())
    if jobs <= 1 or len(paths) <= 1:
        yield from map(one, paths)
        return
    yield from mapped(one, paths, jobs, fork_server("torch"), partial(torch.set_num_threads, 1))


# -------------------------------------------------------------------------------------------- a set


def verified(patterns: Sequence[str], jobs: int, progress: Progress) -> dict[str, Any]:
    """What is in shards and what is wrong with them, as plain values.

    Raises:
        Refused: a pattern names nothing, or a shard is not there.
    """
    paths = expand(patterns, even_empty=True)
    known = indexed(paths)
    return verdict(progress(check_all(paths, jobs, rules_of(known)), len(paths)), known)


def repaired(
    patterns: Sequence[str], copying: Copying, jobs: int, progress: Progress
) -> dict[str, Any]:
    """Write the good samples of shards into another folder, with an index; tells what `verified`
    does, the fingerprint of the copy, the shards that have no good sample, and those that were not
    written because a copy would have lost what is not understood of them.

    Raises:
        Refused: as `verified`, or the folder has a shard of one of the names.
    """
    paths = expand(patterns, even_empty=True)
    out = copying.out
    assert out is not None
    out.mkdir(parents=True, exist_ok=True)
    there = [path for path in paths if (out / sources.basename(path)).exists()]
    if there:
        raise Refused(f"{out} has {sources.basename(there[0])} already; give an empty folder")
    known = indexed(paths)
    rules = rules_of(known)
    told = verdict(progress(check_all(paths, jobs, rules, copying), len(paths)), known)
    written = [row for row in told["shards"] if row["shard"] not in told["not_written"]]
    names = {sources.basename(row["shard"]): row["samples"] for row in written}
    told["left_out"] = [name for name, count in names.items() if not count]
    for name in told["left_out"]:
        (out / name).unlink()
    _copy_beside(paths, out)
    clean = [str(out / name) for name, count in names.items() if count]
    if clean:
        named = {sources.basename(path): rule for path, rule in rules.items()}
        kept = {path: named[name] for path in clean if (name := os.path.basename(path)) in named}
        told["fingerprint"] = refresh(out, clean, rules=kept).fingerprint
    return told


def _copy_beside(paths: Sequence[str], out: Path) -> None:
    """Put the files that say what numbers mean beside a copy, where all shards come with one."""
    folders = {sources.folder_of(path) for path in paths}
    for name, content in files_beside(folders, kinds()).items():
        if not (out / name).exists():
            write_aside(out / name, content)


def indexed(paths: Sequence[str]) -> dict[str, Shard]:
    """Path -> what the indexes beside the shards say of it."""
    here = [path for path in paths if not sources.is_remote(path)]
    found: dict[str, Shard] = {}
    for folder in dict.fromkeys(map(sources.folder_of, here)):
        with contextlib.suppress(Refused):
            for shard in ShardIndex.load(folder).shards:
                found[sources.identity(shard.path)] = shard
    known = {path: found.get(sources.identity(path)) for path in paths}
    return {path: shard for path, shard in known.items() if shard is not None}


def rules_of(known: Mapping[str, Shard]) -> dict[str, str]:
    """Path -> where its keys end, as its index has it, where that is not WebDataset's rule."""
    return {path: shard.rule for path, shard in known.items() if shard.rule != FIRST_DOT}


def unlike_index(found: Checked, known: Shard) -> Iterator[str]:
    """In what a shard is not the one that was indexed."""
    if known.sha256 and known.sha256 != found.sha256:
        yield "its bytes are not those that were indexed"
    try:
        known.check_table()
    except Refused as error:
        yield str(error)
        return
    rows = known.rows
    offsets = set(rows["offset"].tolist())
    good = {sample.offset for sample in found.good}
    gone = len(offsets - good - {reject.offset for reject in found.rejected})
    if gone or good - offsets:
        yield (
            f"its index names {len(offsets)} samples: {gone} of them were not found, and "
            f"{len(good - offsets)} were "
            f"that it does not name; get the tar again, or run {sources.indexing(known.path)}"
        )
    says: dict[int, set[tuple[str, int]]] = {}  # links give an image to several samples
    for offset, _, label, at, length in rows.tolist():
        says.setdefault(offset, set()).add((known.key_at(at, length), label))
    other = 0
    for key, offset, label in found.good:
        other += offset in says and (key, label) not in says[offset]
    if other:
        yield (
            f"its index gives {other} samples another key or label; run "
            f"{sources.indexing(known.path)}"
        )


def verdict(shards: Iterable[Checked], known: dict[str, Shard]) -> dict[str, Any]:
    """Everything about a set, for people and programs."""
    classes: Counter[int] = Counter()
    sides: Counter[int] = Counter()
    channels: Counter[int] = Counter()
    restarts = 0
    where: dict[str, list[str]] = {}
    rows: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    notes: list[tuple[str, Note]] = []
    not_written = []
    held: list[dict[str, Held]] = []
    beside: dict[str, Any] = {}
    for shard in shards:
        held.append(shard.held)
        beside |= beside_of(sources.folder_of(shard.path))
        classes.update(shard.classes)
        sides.update(shard.sides)
        channels.update(shard.channels)
        restarts += shard.restarts
        name = sources.basename(shard.path)
        for key, _, _ in shard.good:
            where.setdefault(key, []).append(name)
        bad = list(shard.rejected)
        bad += [Rejected("", -1, str(note)) for note in shard.notes if note.what in _FLAWS]
        notes += [(name.removesuffix(".tar"), note) for note in shard.notes]
        if not shard.is_written:
            not_written.append(sources.redacted(shard.path))
        if shard.path in known:
            bad += [Rejected("", -1, why) for why in unlike_index(shard, known[shard.path])]
        rejected += [{**reject._asdict(), "shard": name} for reject in bad]
        rows.append(
            {
                "shard": sources.redacted(shard.path),
                "bytes": shard.bytes,
                "sha256": shard.sha256,
                "samples": shard.samples,
                "rejected": len(bad),
            }
        )
    samples = sum(row["samples"] for row in rows)
    size = sum(row["bytes"] for row in rows)
    twice = {key: names for key, names in where.items() if len(names) > 1}
    return {
        "shards": rows,
        "samples": samples,
        "bytes": size,
        "rejected": rejected,
        "notes": [note._asdict() | {"text": str(note)} for note in together(notes)],
        "not_written": not_written,
        "keys_in_several_shards": twice,
        "classes": _sorted(classes),
        "shorter_sides": _sorted(sides),
        "channels": _sorted(channels),
        "restart_markers": restarts,
        "members": told_of(together_held(held), samples, beside),
    }


def _sorted(counts: Counter[int]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(counts.items())}


def described(patterns: Sequence[str], jobs: int = 1) -> dict[str, Any]:
    """What the index says of shards, and what their maps and annotations hold, as plain values.
    No image is read.
    """
    index = ShardIndex.open(patterns)
    counts = counted(index, jobs)
    beside: dict[str, Any] = {}
    for shard in index.shards:
        beside |= beside_of(sources.folder_of(shard.path))
    bad = [
        {"key": key, "offset": at, "reason": why, "shard": f"{shard.name}.tar"}
        for shard, count in zip(index.shards, counts, strict=True)
        for key, at, why in count.bad
    ]
    sizes = np.concatenate([shard.rows["size"] for shard in index.shards]).astype(np.int64)
    rows = [
        {
            "shard": sources.redacted(shard.path),
            "bytes": shard.size,
            "samples": shard.samples,
            "sha256": shard.sha256,
        }
        for shard in index.shards
    ]
    return {
        "shards": rows,
        "samples": len(index),
        "bytes": sum(shard.size for shard in index.shards),
        "fingerprint": index.fingerprint,
        "classes": _sorted(Counter(index.labels.tolist())),
        "image_bytes": {
            "least": int(sizes.min()),
            "median": int(np.median(sizes)),
            "most": int(sizes.max()),
        },
        "short": list(index.short),
        "rejected": bad,
        "members": told_of(together_held([each.held for each in counts]), len(index), beside),
    }
