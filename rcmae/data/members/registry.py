"""The kinds of members, in one table. A task from outside adds its own with `register`.

kind        suffix     beside the shards
map         .seg.png   classes.txt
annotation  .json      categories.json
"""

from __future__ import annotations

from rcmae.data.members.annotations import Annotations
from rcmae.data.members.kinds import MemberKind
from rcmae.data.members.maps import Maps
from rcmae.data.tars import add_kind

_KINDS: dict[str, MemberKind] = {}  # that were registered, by their names


def register(kind: MemberKind) -> None:
    """Add a kind of members: from then on an index says where they lie."""
    add_kind(kind.name, kind.suffix)
    _KINDS[kind.name] = kind


def kinds() -> dict[str, MemberKind]:
    """Name -> kind, of this package and of those that were registered."""
    ours: list[MemberKind] = [Maps(), Annotations()]
    return {kind.name: kind for kind in ours} | _KINDS
