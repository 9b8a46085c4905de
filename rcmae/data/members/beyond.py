"""Maps with numbers that the classes do not reach, found before anything is trained: a few maps of
each set are read at the start."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import numpy as np

from rcmae.data.cache import Reader
from rcmae.data.index import ShardIndex
from rcmae.data.members.maps import decode_map, no_label
from rcmae.data.members.reading import member_bytes
from rcmae.data.transforms import BadImage

LOOKED_AT = 8  # maps of a set


class Highest(NamedTuple):
    """The largest class in a map."""

    id: str  # "shard/key"
    number: int


class Numbering(NamedTuple):
    """How a recipe numbers the classes of maps."""

    num_classes: int
    zero_is_none: bool
    section: str  # of the recipe: segment, evaluate.dense

    @property
    def last(self) -> int:
        """The largest number that a map may have."""
        return self.num_classes - 1 + int(self.zero_is_none)


def highest_numbers(index: ShardIndex) -> tuple[Highest, ...]:
    """Of a few maps, evenly spread over a set. What cannot be read or has no label is passed over:
    a training counts it, and an evaluation names it.
    """
    reader = Reader()
    found = []
    for number in np.unique(np.linspace(0, len(index) - 1, LOOKED_AT).astype(int)).tolist():
        with contextlib.suppress(BadImage, OSError):
            numbers = decode_map(member_bytes(reader, index, number, ["map"])["map"])
            labels = numbers[numbers != no_label(numbers)]
            if labels.size:
                found.append(Highest(index[number].id, int(labels.max())))
    return tuple(found)


def beyond(key: str, highest: tuple[Highest, ...], numbering: Numbering) -> list[str]:
    """What is wrong with the maps of a set: a line where all that were looked at have larger
    numbers than there are classes. One that has is a bad sample, like any other.

    Args:
        key: of the set in the recipe.
        highest: of some of its maps.
        numbering: what they may have.
    """
    least = min(highest, key=lambda each: each.number, default=None)
    if least is None or least.number <= numbering.last:
        return []
    most = max(each.number for each in highest)
    section = numbering.section
    hint = ""
    if most == numbering.num_classes and not numbering.zero_is_none:
        hint = f"; if zero is no label, set {section}.map_zero=none"
    return [
        f"{key}: each of the {len(highest)} maps looked at has numbers beyond {numbering.last}, "
        f"the last that {section}.num_classes={numbering.num_classes} allows; they run to {most} "
        f"({least.id} to {least.number}): give the classes of these maps, or other shards{hint}"
    ]
