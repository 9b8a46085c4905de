"""What a rank was asked to do, by its command line alone."""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    """A command line that trains."""

    recipe: str  # a path, or the name of a shipped recipe
    overrides: tuple[str, ...] = ()  # key=value
    check: bool = False  # judge, say so, start nothing
    evaluate_only: bool = False  # judge the networks as they are, train nothing
