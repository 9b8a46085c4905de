"""Two checkpoints beside each other: counters, recipe, and every tensor in float64, whatever engine
and number of ranks saved them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rcmae.checkpoint.inspection import COUNTERS
from rcmae.checkpoint.manifest import Manifest
from rcmae.checkpoint.reader import whole_tensors
from rcmae.errors import Refused


@dataclass
class Difference:
    """Of one tensor, or of all of a kind."""

    name: str
    squares: float = 0.0  # sum of squared differences
    of_squares: float = 0.0  # sum of squares of the first
    max_abs: float = 0.0
    tensors: int = 0
    differing: int = 0

    def add(self, other: Difference) -> None:
        """Count another one in."""
        self.squares += other.squares
        self.of_squares += other.of_squares
        self.max_abs = max(self.max_abs, other.max_abs, key=_order)
        self.tensors += other.tensors
        self.differing += other.differing

    @property
    def relative(self) -> float:
        """L2 norm of the difference over that of the first: inf where that is 0, nan where a
        number is not finite.
        """
        if self.squares == 0 or math.isnan(self.squares):
            return self.squares
        return math.sqrt(self.squares / self.of_squares) if self.of_squares else math.inf

    @property
    def facts(self) -> dict[str, Any]:
        """Plain values; a number that JSON has no way to write is null."""
        measures = {"relative_l2": self.relative, "max_abs": self.max_abs}
        finite = {key: value if math.isfinite(value) else None for key, value in measures.items()}
        return {"name": self.name, **finite, "tensors": self.tensors, "differing": self.differing}


def _order(value: float) -> float:
    """Numbers that are none come last, as the worst."""
    return math.inf if math.isnan(value) else value


def difference(one: torch.Tensor, other: torch.Tensor, name: str) -> Difference:
    """Of two tensors [n] in float64. NaN on both sides at the same place is no difference."""
    same = (one == other) | (one.isnan() & other.isnan())
    gap = torch.where(same, 0.0, one - other)
    squares = float(gap.square().sum())
    largest = float(gap.abs().max())
    if not math.isfinite(squares):
        squares = largest = math.nan
    return Difference(
        name=name,
        squares=squares,
        of_squares=float(one.square().sum()),
        max_abs=largest,
        tensors=1,
        differing=int(bool(gap.count_nonzero())),
    )


@dataclass
class Comparison:
    """What differs between checkpoint A and checkpoint B."""

    counters: dict[str, tuple[int, int]] = field(default_factory=dict)
    recipe: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    tensors: list[Difference] = field(default_factory=list)  # the worst first
    kinds: dict[str, Difference] = field(default_factory=dict)  # all, also those that are equal

    def differs(self, tolerance: float = 0.0) -> bool:
        """Whether anything but the recipe does, a tensor by more than this relative L2."""
        beyond = any(not row.relative <= tolerance for row in self.tensors)
        others = self.counters or self.only_in_a or self.only_in_b or self.shapes
        return beyond or bool(others)


def compare(a: Manifest, b: Manifest, kind: str | None = None) -> Comparison:
    """Every tensor of both, or those of one kind, one at a time.

    Args:
        a, b: of verified checkpoints.
        kind: "weight", "teacher", "exp_avg", "exp_avg_sq" or "buffer".

    Raises:
        Refused: neither has tensors of this kind.
        CheckpointError, OSError: a tensor cannot be read.
    """
    names_a = {key for key in a.tensors if kind in (None, _kind_of(key))}
    names_b = {key for key in b.tensors if kind in (None, _kind_of(key))}
    if not names_a and not names_b:
        known = sorted({_kind_of(key) for key in (*a.tensors, *b.tensors)})
        raise Refused(f"--kind {kind}: neither has such tensors; there are {', '.join(known)}")
    result = Comparison(
        counters=_differing({key: (getattr(a, key), getattr(b, key)) for key in COUNTERS}),
        recipe=_recipes(a, b),
        only_in_a=sorted(names_a - names_b),
        only_in_b=sorted(names_b - names_a),
    )
    alike = []
    for key in a.tensors:
        if key not in names_a or key not in names_b:
            continue
        shapes = (a.tensors[key].shape, b.tensors[key].shape)
        if shapes[0] == shapes[1]:
            alike.append(key)
        else:
            result.shapes[key] = shapes
    of_a = whole_tensors(a, alike, torch.float64)
    of_b = whole_tensors(b, alike, torch.float64)
    for key, one, other in zip(alike, of_a, of_b, strict=True):
        found = difference(one, other, key)
        name = _kind_of(key)
        result.kinds.setdefault(name, Difference(name)).add(found)
        if found.differing:
            result.tensors.append(found)
    result.tensors.sort(
        key=lambda found: (_order(found.relative), _order(found.max_abs)), reverse=True
    )
    return result


def _kind_of(key: str) -> str:
    return key.partition("/")[0]


def _differing(pairs: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _recipes(a: Manifest, b: Manifest) -> dict[str, tuple[Any, Any]]:
    """Keys of the recipes that differ, with both values; None of one that has no such key."""
    leaves_a = dict(_leaves(a.meta["recipe"]))
    leaves_b = dict(_leaves(b.meta["recipe"]))
    keys = sorted(leaves_a.keys() | leaves_b.keys())
    return _differing({key: (leaves_a.get(key), leaves_b.get(key)) for key in keys})


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
