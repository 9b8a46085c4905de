"""Which shards a user names: paths, braces, globs, URLs, commands, lists of them, and mixtures."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from braceexpand import braceexpand

from rcmae.data import sources
from rcmae.data.sources import USUAL, Patience
from rcmae.errors import Refused

_NAMED = 20  # problems that a message lists before it counts the rest


class Weighted(Protocol):
    """A set of a mixture."""

    @property
    def shards(self) -> str | Sequence[str]:
        """Its patterns."""

    @property
    def weight(self) -> float:
        """What part of an epoch it makes, in proportion to the others."""


Patterns = str | Sequence[str] | Sequence[Weighted]


def expand(patterns: str | Sequence[str], *, even_empty: bool = False) -> list[str]:
    """The shards that a pattern or a list of them names: `train-{000000..000005}.tar`,
    `data/*.tar`, plain paths, URLs with either, `pipe:` commands with braces.

    Raises:
        ValueError: names each pattern that matches nothing and each shard that is missing, empty
            (unless `even_empty`), unreadable or named twice, all at once.
    """
    paths, problems = shards_named(patterns, even_empty=even_empty)
    refuse_shards([*problems, *named_twice(paths)])
    return paths


def flat(patterns: Patterns) -> list[str]:
    """The patterns of all sets, without their weights."""
    sets = (
        [patterns]
        if isinstance(patterns, str)
        else [one if isinstance(one, str) else one.shards for one in patterns]
    )
    return [pattern for one in sets for pattern in ([one] if isinstance(one, str) else one)]


def shards_named(
    patterns: Patterns, patience: Patience = USUAL, *, even_empty: bool = False
) -> tuple[list[str], list[str]]:
    """(the shards that patterns name, in order; what is wrong with them, a line each)."""
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


def named_twice(paths: Sequence[str]) -> list[str]:
    """A line for each shard that is named more than once."""
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


def refuse_shards(problems: Sequence[str]) -> None:
    """Raise Refused where there are problems; names the first of them."""
    if problems:
        rest = [f"... and {len(problems) - _NAMED} more"] if len(problems) > _NAMED else []
        raise Refused("\n".join(["shards that cannot be used:", *problems[:_NAMED], *rest]))
