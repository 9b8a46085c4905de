"""A shard's part of an index, made from the headers of its tar."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import BinaryIO, NamedTuple

import numpy as np

from rcmae.data import sources
from rcmae.data.sources import USUAL, Patience
from rcmae.data.tars.headers import BLOCK, BrokenTar, not_a_tar
from rcmae.data.tars.kinds import (
    ADDED,
    KIND_OF_SUFFIX,
    KINDS,
    add_kinds,
    added_kinds,
)
from rcmae.data.tars.samples import (
    FIRST_DOT,
    LOST,
    Contents,
    Note,
    Place,
    image_suffix,
)
from rcmae.data.tars.shard import HEADED, MEMBER, NO_LABEL, ROW, Shard, TablePart, hashes
from rcmae.data.workers import mapped
from rcmae.files import patiently

# of reading headers before other processes are started to help: that takes seconds itself
_ALONE_S = 2.0
# editors put a byte order mark first, data frames write whole numbers as 3.0
_NUMBER = re.compile(rb"(?:\xef\xbb\xbf)?\s*([+-]?[0-9]{1,10})(?:\.0{0,20})?\s*")
_LABEL_BYTES = 4096  # of a .cls: more is not a number
_LARGEST = 2**32 - 1  # bytes of an image, and of all keys of a tar
_LONGEST_KEY = 2**16 - 1


class Scan(NamedTuple):
    """What reading a tar's headers gave: a shard or a problem."""

    path: str
    shard: Shard | None = None
    problem: str = ""
    notes: tuple[Note, ...] = ()  # what is to be said of it

    @property
    def without_image(self) -> int:
        """Samples (groups of members with one key) without an image: left out."""
        return self._count("without_image")

    @property
    def bad_labels(self) -> int:
        """Samples whose .cls holds no class number: they count as unlabelled."""
        return self._count("bad_labels")

    def _count(self, what: str) -> int:
        return sum(note.number for note in self.notes if note.what == what)


def scan_all(
    paths: Sequence[str], jobs: int, patience: Patience, rules: Mapping[str, str]
) -> Iterator[Scan]:
    """`scan` of each tar, in their order; other processes help where it takes seconds.

    `rules`: path -> rule of keys, of shards that have another one than WebDataset's."""
    one = partial(_scan_by, patience=patience, rules=rules, kinds=added_kinds())
    began = time.monotonic()
    left = deque(paths)
    while left and (jobs <= 1 or len(left) == 1 or time.monotonic() - began < _ALONE_S):
        yield one(left.popleft())
    if not left:
        return
    # Not from the fork server: whoever uses it first decides what it has imported, and the stream
    # wants torch there.
    yield from mapped(one, left, min(jobs, len(left)), get_context("spawn"))


def _scan_by(
    path: str, patience: Patience, rules: Mapping[str, str], kinds: dict[str, str]
) -> Scan:
    add_kinds(kinds)
    return scan(path, patience, rules.get(path, FIRST_DOT))


def scan(path: str, patience: Patience = USUAL, rule: str = FIRST_DOT) -> Scan:
    """Read the headers of a tar and group its members into samples.

    A key is the member's path up to the first dot of its base name (or what `rule` says);
    neighbours with one key are one sample. Its image is the member with the plainest image suffix,
    its label the number in `.cls`. A remote tar is copied and hashed for it.
    """
    shown = sources.redacted(path)
    try:
        if not sources.is_remote(path):
            return patiently(lambda: _scan_here(path, rule))
        with sources.fetched(path, patience) as (file, copied):
            return _scan(path, file, copied.sha256, copied.stamp, rule)
    except BrokenTar as error:
        return Scan(path, problem=f"{shown}: is not a complete tar ({error})")
    except OSError as error:
        if isinstance(error, sources.SourceGone | FileNotFoundError) and error.errno is None:
            return Scan(path, problem=str(error))
        return Scan(path, problem=f"{shown}: cannot be read ({error})")


def _scan_here(path: str, rule: str) -> Scan:
    with open(path, "rb") as file:
        return _scan(path, file, "", sources.stamp_of(os.fstat(file.fileno())), rule)


def _scan(path: str, file: BinaryIO, sha256: str, stamp: str, rule: str) -> Scan:
    shown = sources.redacted(path)
    if (why := not_a_tar(os.pread(file.fileno(), BLOCK, 0))) is not None:
        return Scan(path, problem=f"{shown}: {why}")
    contents = Contents(file.fileno(), rule)
    table = _read(contents, file.fileno())
    if contents.needs_survey:
        contents = contents.surveyed()
        table = _read(contents, file.fileno())
    notes = tuple(contents.notes)
    if not table.rows:
        names = [f"{name!r:.100}".strip("'") for name in contents.first_names]
        reasons = [str(note) for note in notes if note.what != "without_image"]
        said = [", ".join(names) or "none", *reasons]
        problem = f"{shown}: holds no image (its first members: {'; '.join(said)})"
        return Scan(path, problem=problem, notes=notes)
    where = path if sources.is_remote(path) else os.path.abspath(path)
    about = Shard(
        path=where,
        size=os.fstat(file.fileno()).st_size,
        samples=len(table.rows),
        fingerprint="",
        kept=TablePart(b""),
        sha256=sha256,
        stamp=stamp,
        kinds=(*KINDS, *added_kinds()),
        rule=rule,
        notes=tuple(note for note in notes if note.what in LOST),
    )
    return Scan(path, table.shard(about), "", notes)


def _read(contents: Contents, file: int) -> _Table:
    table = _Table()
    for key, members in contents:
        suffix = image_suffix(members)
        if suffix is None:
            continue
        raw_key = key.encode("utf-8", "surrogateescape")
        if members[suffix].size > _LARGEST or len(raw_key) > _LONGEST_KEY:
            contents.notes.add("too_large", key)
            continue
        label = NO_LABEL
        if (place := members.get("cls")) is not None:
            found = label_in(os.pread(file, min(place.size, _LABEL_BYTES), place.offset))
            if found is None:
                contents.notes.add("bad_labels", key)
            elif found < 0:
                contents.notes.add("negative_labels", key)
            label = NO_LABEL if found is None else found
        table.add(raw_key, label, suffix, members)
    return table


def label_in(text: bytes) -> int | None:
    """The number of a class in a `.cls`; None where it holds none that a table has room for."""
    match = _NUMBER.fullmatch(text)
    number = int(match[1]) if match else 2**31
    return number if -(2**31) <= number < 2**31 else None


class _Table:
    """A shard's part of an index table, while its tar is read."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, int, int, int]] = []
        self._keys: list[bytes] = []
        self._key_at = 0
        self._headed: list[tuple[int, int, int]] = []
        self._members: list[tuple[int, int, int, int]] = []
        self._number_of = {kind: number for number, kind in enumerate(KINDS)}
        self._number_of |= {kind: ADDED + place for place, kind in enumerate(added_kinds())}

    def add(self, key: bytes, label: int, image_suffix: str, members: dict[str, Place]) -> None:
        """A sample, whose members are named by their suffixes."""
        image = members[image_suffix]
        self.rows.append((image.offset, image.size, label, self._key_at, len(key)))
        self._keys.append(key)
        self._key_at += len(key)
        if self._key_at > _LARGEST:
            raise BrokenTar("its keys have more than 4 GiB together")
        first = len(self._members)
        for suffix, member in members.items():
            kind = KIND_OF_SUFFIX.get(suffix)
            if kind is not None and suffix != image_suffix:
                number = self._number_of[kind]
                self._members.append((number, member.offset, member.size, member.checksum))
        self._headed.append((image.checksum, first, len(self._members) - first))

    def shard(self, about: Shard) -> Shard:
        """The shard that was read, with its table in memory."""
        rows_and_keys = np.array(self.rows, ROW).tobytes() + b"".join(self._keys)
        members = np.array(self._headed, HEADED).tobytes()
        members += np.array(self._members, MEMBER).tobytes()
        part = rows_and_keys + members
        shard = replace(about, kept=TablePart(part, 0, len(part)), others=len(self._members))
        fingerprint, digest = hashes(shard, rows_and_keys, members)
        return replace(shard, fingerprint=fingerprint, digest=digest)


def is_no_tar(path: str) -> str | None:
    """Why a file here cannot be a tar that is read by offset, by its first bytes; else None."""
    if sources.is_remote(path):
        return None
    try:
        with open(path, "rb") as file:
            why = not_a_tar(file.read(BLOCK))
    except OSError as error:
        # absent: it is said where patterns are expanded
        return None if not os.path.isfile(path) else f"{path}: {error.strerror}"
    return None if why is None else f"{path}: {why}"
