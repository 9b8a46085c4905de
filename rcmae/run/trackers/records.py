"""What a run's folder has for a tracker: its committed steps, each with all that belongs to it.

A step is shown when nothing can be added to it or taken back any more: a checkpoint was committed
after it; or it is the committed one itself, and the job has ended there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rcmae import checkpoint
from rcmae.data.sources import without_secrets
from rcmae.errors import Refused
from rcmae.files import json_lines, json_lines_back
from rcmae.run.records.status import status

# pictures/NAME-00000010.png
_PICTURE = re.compile(r"(?P<name>.+)-(?P<step>\d{8})\.png")
_LEFT_OUT = ("step", "time")  # of a row: no curves


class Record(NamedTuple):
    """A step."""

    step: int
    time: float  # seconds since 1970
    scalars: dict[str, float]
    images: list[tuple[str, Path]]
    table: list[tuple[str, str, float]]  # of an evaluation: (network or group, metric, value)


class Finished(NamedTuple):
    """Where the job that ended last left the run."""

    step: int
    status: str  # finished, failed, refused, stopped


def recipe_of(run: Path) -> dict[str, Any]:
    """The resolved recipe, without secrets.

    Raises:
        Refused: there is no run in this folder.
    """
    try:
        tree = yaml.safe_load((run / "recipe.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise Refused(f"{run}: no run is there ({error})") from error
    return dict(without_secrets(tree))


def ended(run: Path) -> Finished | None:
    """How the last job ended; None: it has not, or was killed."""
    try:
        found = json.loads((run / "outcome.json").read_text())
        return Finished(int(found["step"]), str(found["status"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def settled_step(run: Path) -> int:
    """The newest step that is shown; -1: none yet."""
    newest = checkpoint.newest_unverified(run / "checkpoints")
    if newest is None:
        return -1
    outcome = ended(run)
    is_over = outcome is not None and outcome.step == newest.step
    owes_evaluation = not newest.meta.get("evaluated", True)
    if is_over and not owes_evaluation:
        return newest.step
    return newest.step - 1


def records(run: Path, after: int, upto: int) -> Iterator[Record]:
    """The steps after one and up to another that have something to show, in order."""
    evaluations = _evaluations(run, after, upto)
    pictures = _pictures(run, after, upto)
    rows = _rows(run, after, upto)
    for step in sorted({*rows, *evaluations, *pictures}):
        row = rows.get(step, {})
        event = evaluations.get(step, {})
        numbers = {
            f"train/{name}": float(value)
            for name, value in row.items()
            if isinstance(value, int | float) and name not in _LEFT_OUT
        }
        table = _table(event)
        numbers |= {f"{group}/{name}": value for group, name, value in table}
        time_s = float(row.get("time") or event.get("time") or 0.0)
        yield Record(step, time_s, numbers, pictures.get(step, []), table)


def summary_of(run: Path) -> dict[str, Any]:
    """Where the run stands, its goodput, and its best networks."""
    found = status(run, asks=False)
    kept = ("state", "step", "epoch", "goodput", "wall_s", "ranks", "undone_steps")
    values = {name: found[name] for name in kept if found.get(name) is not None}
    values |= {f"seconds/{kind}": value for kind, value in found["seconds"].items()}
    for event in json_lines(run / "events.jsonl"):
        if event.get("event") == "evaluate" and isinstance(event.get("best"), dict):
            values |= _flat({"best": event["best"]})
    return values


def _rows(run: Path, after: int, upto: int) -> dict[int, dict[str, Any]]:
    """Step -> its line of metrics.jsonl, whose steps ascend: read from its end."""
    found = {}
    for row in json_lines_back(run / "metrics.jsonl"):
        step = row.get("step")
        if not isinstance(step, int):
            continue
        if step <= after:
            break
        if step <= upto:
            found[step] = row
    return found


def _evaluations(run: Path, after: int, upto: int) -> dict[int, dict[str, Any]]:
    """Step -> its evaluation; of one that was made twice the last."""
    found = {}
    for event in json_lines(run / "events.jsonl"):
        step = event.get("step")
        if event.get("event") == "evaluate" and isinstance(step, int) and after < step <= upto:
            found[step] = event
    return found


def _pictures(run: Path, after: int, upto: int) -> dict[int, list[tuple[str, Path]]]:
    found: dict[int, list[tuple[str, Path]]] = {}
    for path in sorted((run / "pictures").glob("*.png")):
        named = _PICTURE.fullmatch(path.name)
        if named is not None and after < int(named["step"]) <= upto:
            name = "reconstruction" if named["name"] == "step" else named["name"]
            found.setdefault(int(named["step"]), []).append((name, path))
    return found


def _table(event: dict[str, Any]) -> list[tuple[str, str, float]]:
    rows = []
    for group, values in event.get("scalars", {}).items():
        for name, value in values.items():
            if isinstance(value, int | float):
                rows.append((str(group), str(name), float(value)))
    return rows


def _flat(tree: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by a slash."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{before}{key}"
        if isinstance(value, dict):
            found |= _flat(value, f"{name}/")
        elif isinstance(value, int | float | str):
            found[name] = value
    return found
