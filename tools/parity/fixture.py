"""A folder of recorded numbers: what it states, what was read of it, how comparisons went."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

PRECISIONS = {"float64": torch.float64, "float32": torch.float32}


class Unusable(ValueError):
    """The folder cannot be read as one of recorded numbers."""


class Limit(NamedTuple):
    """|difference| <= absolute + relative * largest magnitude recorded in that array."""

    absolute: float
    relative: float


EXACT = Limit(0.0, 0.0)


@dataclass
class Limits:
    """What a folder states for one precision."""

    loss: Limit
    activation: Limit
    gradient: Limit
    weight: Limit


@dataclass
class Row:
    """Comparisons of one kind in one precision."""

    precision: str
    what: str
    compared: int = 0
    worst: float = 0.0  # largest |difference|
    of_limit: float = 0.0  # largest share of a limit; above 1 fails
    failures: list[str] = field(default_factory=list)


class Fixture:
    """One folder: what it states, what was read of it, and how the comparisons went."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._tree = json.loads((path / "fixture.json").read_text())
            self.name: str = self._tree["fixture"]
            self.config: dict[str, Any] = self._tree["config"]
            self._values: dict[str, Any] = self._tree["values"]
            # formulas and notes
            self.words: list[str] = [*self._tree.get("formula", []), *self._tree.get("notes", [])]
            self._files: dict[str, Any] = self._tree["files"]
            self.other_files: dict[str, Any] = self._tree.get("other_files", {})
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise Unusable(f"no readable fixture.json: {error}") from error
        except (KeyError, TypeError) as error:
            raise Unusable(f"fixture.json is not of this format: it lacks {error}") from error
        self.rows: dict[tuple[str, str], Row] = {}
        self.left_out: dict[str, str] = {}
        self._read: set[str] = set()
        self._arrays: dict[str, dict[str, Tensor]] = {}
        self._load()

    def _load(self) -> None:
        for name, stated in self._files.items():
            path = self.path / name
            try:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                self._arrays[name] = load_file(path)
            except (OSError, SafetensorError) as error:
                raise Unusable(f"{name}: {error}") from error
            self.true(
                "sha256 of files",
                name,
                digest == stated["sha256"],
                "not the file that fixture.json describes",
            )

    def value(self, name: str) -> Any:
        """A recorded value; it counts as checked."""
        self._read.add(name)
        return self._values[name]["value"]

    def has(self, name: str) -> bool:
        """Whether a value was recorded."""
        return name in self._values

    def arrays(self, name: str) -> dict[str, Tensor]:
        """All arrays of a file; they count as checked."""
        self._read.update(f"{name}/{key}" for key in self._arrays[name])
        return self._arrays[name]

    def files(self, pattern: str) -> list[str]:
        """Names of the files that match a regular expression."""
        return [name for name in self._files if re.fullmatch(pattern, name)]

    def meaning(self, file: str) -> str:
        """What the folder says of a file."""
        return str(self._files[file].get("meaning", ""))

    def meaning_of(self, value: str) -> str:
        """What the folder says of a value."""
        return str(self._values[value].get("meaning", ""))

    def leave_out(self, name: str, reason: str) -> None:
        """Say that a value or an array has no counterpart here."""
        self._read.add(name)
        self.left_out[name] = reason

    def unread(self) -> list[str]:
        """Values and arrays that no check has looked at."""
        everything = [
            *self._values,
            *(f"{file}/{key}" for file, arrays in self._arrays.items() for key in arrays),
        ]
        return [name for name in everything if name not in self._read]

    def tolerance(self, precision: str) -> str:
        """The limits of a precision, in the folder's words."""
        return str(self._tree["tolerance"][precision])

    def limits(self, precision: str) -> Limits:
        """The limits of a precision, as numbers.

        Raises:
            Unusable: they are not worded as in any known folder.
        """
        text = self.tolerance(precision)
        if precision == "float64":
            stated = re.search(r"\|difference\| <= (\S+) \+ (\S+) \* largest magnitude", text)
            losses = re.search(r"losses relative (\d\S*?\d)\b", text)
            if stated:
                limit = Limit(float(stated[1]), float(stated[2]))
                return Limits(
                    _of_losses(float(losses[1])) if losses else limit, limit, limit, limit
                )
        elif stated := re.search(r"suggested limits (.*?)(?:\.(?:\s|$)|;|\(an ind|$)", text):
            numbers = [
                float(number) for number in re.findall(r"\d[\d.]*e-?\d+|\d+\.\d+", stated[1])
            ]
            if len(numbers) == 4:  # losses, activations and gradients relative, weights absolute
                loss, activation, gradient, weight = numbers
                return Limits(
                    _of_losses(loss),
                    Limit(0.0, activation),
                    Limit(0.0, gradient),
                    Limit(weight, 0.0),
                )
            if len(numbers) == 3:  # weights without and with the key third of qkv.bias, losses
                weight, _, loss = numbers
                limit = Limit(weight, 0.0)
                return Limits(_of_losses(loss), limit, limit, limit)
        raise Unusable(f"states no limits for {precision} that can be read: {text!r}")

    # comparisons

    def row(self, what: str, precision: str) -> Row:
        """Where comparisons of a kind are counted."""
        return self.rows.setdefault((what, precision), Row(precision, what))

    def true(self, what: str, name: str, holds: bool, otherwise: str, precision: str = "") -> None:
        """Count an exact comparison."""
        row = self.row(what, precision)
        row.compared += 1
        if not holds:
            row.failures.append(f"{name}: {otherwise}")

    def close(
        self, what: str, name: str, got: Any, want: Any, limit: Limit, precision: str = ""
    ) -> None:
        """Count a comparison of two arrays or numbers within a limit."""
        row = self.row(what, precision)
        row.compared += 1
        got, want = (
            torch.as_tensor(values, dtype=torch.float64).detach() for values in (got, want)
        )
        if got.shape != want.shape:
            row.failures.append(f"{name}: shape {list(got.shape)}, recorded {list(want.shape)}")
            return
        if not want.numel():
            return
        difference = (got - want).abs().max().item()
        allowed = limit.absolute + limit.relative * want.abs().max().item()
        within = difference <= allowed  # false for what is not a number
        if not within:
            row.failures.append(f"{name}: off by {difference:.3g}, limit {allowed:.3g}")
        if not math.isfinite(difference):
            difference = math.inf
        share = difference / allowed if allowed else 0.0 if within else math.inf
        row.worst = max(row.worst, difference)
        row.of_limit = max(row.of_limit, share)

    def same(self, what: str, name: str, got: Any, want: Any) -> None:
        """Count a comparison of numbers that do not depend on the precision."""
        relative = re.search(r"relative (\d\S*\d)", self.tolerance("float64"))
        if relative is None:
            raise Unusable(f"states no relative limit: {self.tolerance('float64')!r}")
        self.close(what, name, got, want, Limit(0.0, float(relative[1])), "float64")

    def all_close(
        self,
        what: str,
        got: Mapping[Any, Tensor],
        want: Mapping[Any, Tensor],
        limit: Limit,
        precision: str,
    ) -> None:
        """`close` for each name recorded."""
        for name, array in want.items():
            if name in got:
                self.close(what, name, got[name], array, limit, precision)
            else:
                self.true(what, name, False, "this package has nothing of that name", precision)


def _of_losses(relative: float) -> Limit:
    return Limit(relative**2, relative)  # a loss of 0 is a sum of squared roundings
