"""What a run's folder has for people, wherever it is shown: recipe, end, evaluations, pictures.

Without torch: whoever shows a run may do so beside a training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rcmae.config.trees import tree_of
from rcmae.data.sources import without_secrets
from rcmae.errors import Refused
from rcmae.files import json_lines

# pictures/NAME-00000010.png
_PICTURE = re.compile(r"(?P<name>.+)-(?P<step>\d{8})\.png")
# of an evaluation's event that has no `scalars`, as up to 0.1.0: what has its figures
_FIGURES = ("knn", "scores", "segmentation", "detection")

Step = int


class Finished(NamedTuple):
    """Where the job that ended last left the run."""

    step: int
    status: str  # finished, failed, refused, stopped


class Figure(NamedTuple):
    """A number of an evaluation."""

    group: str  # what it is of: a network, or a kind of evaluation and a network
    name: str
    value: float


def recipe_of(run: Path) -> dict[str, Any]:
    """The resolved recipe, without secrets.

    Raises:
        Refused: there is no run in this folder.
    """
    try:
        tree = tree_of((run / "recipe.yaml").read_text())
        return dict(without_secrets(tree))
    except (OSError, ValueError, TypeError) as error:
        raise Refused(f"{run}: no run is there ({error})") from error


def ended(run: Path) -> Finished | None:
    """How the last job ended; None: it has not, or was killed."""
    try:
        found = json.loads((run / "outcome.json").read_text())
        return Finished(int(found["step"]), str(found["status"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def evaluations(run: Path, after: int = -1, upto: int | None = None) -> dict[Step, dict[str, Any]]:
    """Step -> its evaluation; of one that was made twice the last."""
    found = {}
    for event in json_lines(run / "events.jsonl"):
        step = event.get("step")
        if event.get("event") != "evaluate" or not isinstance(step, int):
            continue
        if after < step and (upto is None or step <= upto):
            found[step] = event
    return found


def pictures(
    run: Path, after: int = -1, upto: int | None = None
) -> dict[Step, list[tuple[str, Path]]]:
    """Step -> its pictures: (name, file)."""
    found: dict[Step, list[tuple[str, Path]]] = {}
    for path in sorted((run / "pictures").glob("*.png")):
        named = _PICTURE.fullmatch(path.name)
        if named is None:
            continue
        step = int(named["step"])
        if after < step and (upto is None or step <= upto):
            name = "reconstruction" if named["name"] == "step" else named["name"]
            found.setdefault(step, []).append((name, path))
    return found


def figures(event: Mapping[str, Any]) -> list[Figure]:
    """The numbers of an evaluation's event."""
    scalars = event.get("scalars")
    if isinstance(scalars, Mapping):
        return list(_figures("", scalars))
    found = []
    for kind in _FIGURES:
        tree = event.get(kind)
        if isinstance(tree, Mapping):
            found += [each for each in _figures(kind, tree) if each.name != "images"]
    return found


def _figures(group: str, tree: Mapping[str, Any]) -> Iterator[Figure]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _figures(f"{group}_{name}" if group else str(name), value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            named = f"k{name}" if str(name).isdecimal() else str(name)
            yield Figure(group, named, float(value))
