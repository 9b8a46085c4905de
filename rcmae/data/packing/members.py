"""What the maps and annotations of shards hold, counted: pixels of a class, boxes of a category."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rcmae.data import sources
from rcmae.data.cache import Reader
from rcmae.data.index import ShardIndex
from rcmae.data.members.kinds import Facts, MemberKind, added
from rcmae.data.members.reading import member_bytes
from rcmae.data.members.registry import kinds, register
from rcmae.data.sources import USUAL
from rcmae.data.tars import Shard
from rcmae.data.transforms import BadImage
from rcmae.data.workers import fork_server, mapped
from rcmae.errors import Refused


class Held(NamedTuple):
    """What the members of one kind hold."""

    samples: int  # that have one
    facts: Facts


class Counted(NamedTuple):
    """What the members of a shard hold."""

    held: dict[str, Held]  # by kind
    bad: list[tuple[str, int, str]]  # key, byte and what is wrong with a member


def together(parts: Sequence[Mapping[str, Held]]) -> dict[str, Held]:
    """What several shards hold."""
    found: dict[str, Held] = {}
    for part in parts:
        for kind, held in part.items():
            before = found.get(kind, Held(0, {}))
            facts = added(before.facts, held.facts)
            found[kind] = Held(before.samples + held.samples, facts)
    return found


def verified_members(
    content: Mapping[str, bytes], size: tuple[int, int] | None, beside: Mapping[str, Any]
) -> dict[str, Facts]:
    """Kind -> what the member of a sample holds.

    Args:
        content: suffix -> bytes of each member of the sample.
        size: (height, width) of its image; None: not known.
        beside: as `beside_of` gave it.

    Raises:
        BadImage: one of them cannot be used.
    """
    found = {}
    for kind in kinds().values():
        if kind.suffix in content:
            # where samples have labels, the classes are theirs
            theirs = kind.beside == "classes.txt" and "cls" in content
            about = None if theirs else beside.get(kind.name)
            found[kind.name] = kind.verify(content[kind.suffix], size, about)
    return found


def beside_of(folder: str) -> dict[str, Any]:
    """Kind -> what the file beside shards says that belongs to it. What is not there is left out.

    Raises:
        Refused: such a file cannot be read as one.
    """
    found = {}
    for kind in kinds().values():
        if kind.beside is None or not folder:
            continue
        where = f"{folder}/{kind.beside}"
        content: bytes | None
        try:
            if "://" in folder:
                content = sources.small_file(where, USUAL)
            else:
                content = Path(where).read_bytes()
        except OSError:
            continue
        try:
            if content is not None:
                found[kind.name] = kind.read_beside(content.decode("utf-8-sig"))
        except ValueError as error:
            raise Refused(f"{sources.redacted(where)}: cannot be used ({error})") from error
    return found


def files_beside(folders: Collection[str], which: Collection[str]) -> dict[str, bytes]:
    """Name -> content of the files that say what the numbers of some kinds of members mean, where
    these folders agree.
    """
    found = {}
    for kind in kinds().values():
        if kind.name not in which or kind.beside is None:
            continue
        places = [Path(folder) / kind.beside for folder in folders if "://" not in folder]
        contents = {place.read_bytes() for place in places if place.is_file()}
        if len(contents) == 1:
            found[kind.beside] = contents.pop()
    return found


def told(held: Mapping[str, Held], samples: int, beside: Mapping[str, Any]) -> dict[str, Any]:
    """What the members of a set hold, as plain values, with lines for people.

    `samples`: of the set."""
    found = {}
    for kind in kinds().values():
        if kind.name not in held:
            continue
        has, facts = held[kind.name]
        lines = [f"{has:,} of {samples:,} samples have a .{kind.suffix} ({kind.name})"]
        lines += kind.report(facts, beside.get(kind.name))
        counts = {name: dict(sorted(counter.items())) for name, counter in facts.items()}
        found[kind.name] = {"samples": has, **counts, "lines": lines}
    return found


# --------------------------------------------------------------------- by the index, without images


def counted(index: ShardIndex, jobs: int) -> list[Counted]:
    """What the members of each shard hold, read by the index; no image is."""
    one = partial(_count, more=registered())
    parts = [(shard, beside_of(sources.folder_of(shard.path))) for shard in index.shards]
    if jobs <= 1 or len(parts) <= 1:
        return [one(part) for part in parts]
    limit = partial(torch.set_num_threads, 1)
    return list(mapped(one, parts, jobs, fork_server("torch"), limit))


def registered() -> tuple[MemberKind, ...]:
    """Kinds of tasks from outside, for another process."""
    return tuple(kinds().values())[2:]


def _count(part: tuple[Shard, Mapping[str, Any]], more: Sequence[MemberKind] = ()) -> Counted:
    for kind in more:
        register(kind)
    shard, beside = part
    index = ShardIndex([shard])
    found: dict[str, Held] = {}
    bad: list[tuple[str, int, str]] = []
    reader = Reader()
    labelled = shard.having("label")
    for kind in kinds().values():
        has = shard.having(kind.name)
        for number in has.nonzero()[0].tolist():
            sample = index[number]
            try:
                data = member_bytes(reader, index, number, [kind.name])[kind.name]
                content = {kind.suffix: data} | ({"cls": b""} if labelled[number] else {})
                facts = verified_members(content, None, beside)[kind.name]
                found = together([found, {kind.name: Held(1, facts)}])
            except BadImage as error:
                bad.append((sample.key, sample.offset, str(error)))
    return Counted(found, bad)
