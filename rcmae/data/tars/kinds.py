"""Kinds of members: which suffix each has, and its number in index tables.

What is done with the members of a kind is in rcmae/data/members/registry.py, where a task from
outside adds one."""

from __future__ import annotations

import re
from collections.abc import Iterable

# what the members of a sample are; their places in this list are in tables: add at its end only
KINDS = ("image", "label", "map", "annotation")
KIND_OF_SUFFIX = {"cls": "label", "seg.png": "map", "json": "annotation"}
# a kind that was added has this number or a higher one in a table, by its place in its shard's list
ADDED = 128
_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_SUFFIX = re.compile(r"[a-z0-9_-]+([.][a-z0-9_-]+)*")


def add_kind(name: str, suffix: str) -> None:
    """Make known that members of a suffix are of a kind. The same again changes nothing."""
    assert _NAME.fullmatch(name), f"a kind's name is lower case: {name!r}"
    assert _SUFFIX.fullmatch(suffix), f"a suffix is lower case and has no dot before it: {suffix!r}"
    known = KIND_OF_SUFFIX.setdefault(suffix, name)
    assert known == name, f".{suffix} is {known} already"
    assert suffix == suffix_of(name), f"{name} has .{suffix_of(name)} already"


def suffix_of(kind: str) -> str:
    """The suffix of the members of a kind, such as seg.png."""
    return next(suffix for suffix, of in KIND_OF_SUFFIX.items() if of == kind)


def added_kinds() -> dict[str, str]:
    """Name -> suffix of the kinds that are not of this package, in the order of their names."""
    return {kind: suffix_of(kind) for kind in sorted({*KIND_OF_SUFFIX.values()} - {*KINDS})}


def add_kinds(kinds: dict[str, str]) -> None:
    """`add_kind` each: name -> suffix. For another process."""
    for name, suffix in kinds.items():
        add_kind(name, suffix)


def dotted(suffixes: Iterable[str]) -> str:
    """A regular expression for the suffixes that have a dot in them; empty where there is none."""
    return "".join(f"{re.escape(suffix)}|" for suffix in sorted(suffixes) if "." in suffix)
