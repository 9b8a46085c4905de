"""Braces in patterns: `train-{000000..000099}.tar`, `{a,b}/x.tar`, as a shell expands them.

They are counted before they are expanded: a line can name more shards than a memory holds."""

from __future__ import annotations

import re

from braceexpand import braceexpand

from rcmae.errors import Refused

MOST = 1_000_000  # shards of all patterns together
_NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.(-?\d+))?")


def expanded(pattern: str, most: int = MOST) -> list[str]:
    """What a pattern's braces stand for.

    Raises:
        Refused: they do not pair, are nested too deeply, or stand for more than `most`.
    """
    try:
        count = _count(pattern, most)
        if count > most:
            of_all = "" if most == MOST else " with those before"
            raise Refused(f"stands for more than {MOST:,} shards{of_all}; give fewer, larger ones")
        return list(braceexpand(pattern))
    except RecursionError as error:
        raise Refused("its braces are nested too deeply") from error
    except ValueError as error:
        if isinstance(error, Refused):
            raise
        raise Refused("unbalanced braces") from error


def _count(pattern: str, most: int) -> int:
    """How many strings a pattern stands for; where that is more than `most`, any such number."""
    total = 1
    at = 0
    while at < len(pattern) and total <= most:
        if pattern[at] == "\\":
            at += 2
        elif pattern[at] == "{" and (end := _closing(pattern, at)) is not None:
            total *= _of_group(pattern[at + 1 : end], most)
            at = end + 1
        else:
            at += 1
    return total


def _of_group(inside: str, most: int) -> int:
    parts = _parts(inside)
    if len(parts) > 1:
        return sum(_count(part, most) for part in parts)
    numbers = _NUMBERS.fullmatch(inside)
    letters = _LETTERS.fullmatch(inside)
    if numbers is None and letters is None:
        return _count(inside, most)  # its braces mean nothing
    first, last, step = numbers.groups() if numbers is not None else letters.groups()  # type: ignore[union-attr]
    if max(map(len, (first, last, step or ""))) > 18:
        return most + 1
    low, high = (int(first), int(last)) if numbers is not None else (ord(first), ord(last))
    return abs(high - low) // max(1, abs(int(step or 1))) + 1


def _closing(pattern: str, at: int) -> int | None:
    """Where the brace that is open there is closed."""
    depth = 0
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 1
        elif pattern[at] == "{":
            depth += 1
        elif pattern[at] == "}":
            depth -= 1
            if depth == 0:
                return at
        at += 1
    return None


def _parts(inside: str) -> list[str]:
    """What commas separate outside of inner braces."""
    parts = []
    depth = start = at = 0
    while at < len(inside):
        if inside[at] == "\\":
            at += 1
        elif inside[at] in "{}":
            depth += 1 if inside[at] == "{" else -1
        elif inside[at] == "," and not depth:
            parts.append(inside[start:at])
            start = at + 1
        at += 1
    return [*parts, inside[start:]]
