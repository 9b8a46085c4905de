"""What a check of a node finds: green, yellow or red, with the way out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

COLOURS = ("green", "yellow", "red")  # from good to bad


class Finding(NamedTuple):
    """What one check saw."""

    check: str
    colour: str
    found: str
    way_out: str = ""


class OnRanks(NamedTuple):
    """A finding and the ranks that have it."""

    finding: Finding
    ranks: list[int]


def merged(found: Sequence[Sequence[Finding]]) -> list[OnRanks]:
    """One row for what several ranks found alike; numbers in it may differ.

    `found`: of each rank.
    """
    rows: dict[tuple[str, ...], OnRanks] = {}
    for rank, findings in enumerate(found):
        for finding in findings:
            text = re.sub(r"[\d.,]+", "#", finding.found)
            key: tuple[str, ...] = (finding.check, finding.colour, text)
            if key in rows and rows[key].ranks[-1] == rank:  # two GPUs, two folders of one rank
                key = (*key, finding.found)
            rows.setdefault(key, OnRanks(finding, [])).ranks.append(rank)
    return list(rows.values())
