"""What a kind of members is asked for: how they are recognised, verified and packed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

# what `read_beside` gave; None: there is no such file
Beside = Any
# what members hold: name of a count -> of what -> how often. Those of a set are the sums.
Facts = Mapping[str, Counter[str]]


class MemberKind(Protocol):
    """One kind. An object without state: it is handed to other processes."""

    @property
    def name(self) -> str:
        """Lower case: map."""

    @property
    def suffix(self) -> str:
        """Of the members, without a dot before it: seg.png."""

    @property
    def beside(self) -> str | None:
        """The file beside the shards that says what their numbers mean."""

    def read_beside(self, text: str) -> Any:
        """What that file says. Raises ValueError."""

    def verify(self, data: bytes, size: tuple[int, int] | None, beside: Beside) -> Facts:
        """What a member holds, to be counted.

        Args:
            data: of the member.
            size: (height, width) of its image; None: not known, and not compared.
            beside: what `read_beside` gave of the set.

        Raises:
            BadImage: it cannot be used, or not with this image; says why.
        """

    def resized(self, data: bytes, old: tuple[int, int], new: tuple[int, int]) -> bytes:
        """The member beside its image at another size: (height, width) before and after.

        Raises:
            BadImage: as `verify`.
        """

    def report(self, facts: Facts, beside: Beside) -> list[str]:
        """What a set holds, a line each, for people."""


def added(facts: Facts, more: Facts) -> Facts:
    """The sum of what two members, or sets of members, hold."""
    names = dict.fromkeys([*facts, *more])
    none: Counter[str] = Counter()
    return {name: facts.get(name, none) + more.get(name, none) for name in names}
