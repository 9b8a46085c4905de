"""What a page shows of a run, out of its folder. Reads, writes nothing."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rcmae.data.sources import without_secrets
from rcmae.files import json_lines
from rcmae.run.records.shown import Figure, evaluations, figures, pictures, recipe_of
from rcmae.run.records.status import status

FOLLOWED = "evaluations"  # of `rcmae follow`, in the run's folder
_NO_CURVES = ("step", "time", "images_seen", "epoch")


class Curve(NamedTuple):
    """Numbers over steps."""

    steps: array[float]
    values: array[float]  # NaN: it was not finite


class Picture(NamedTuple):
    """A picture of a step."""

    name: str
    step: int
    path: Path


@dataclass(frozen=True)
class Seen:
    """A run, as its folder has it."""

    folder: Path
    name: str  # among the runs of the page no other has it
    recipe: Mapping[str, Any]  # resolved, without secrets
    status: Mapping[str, Any]
    curves: Mapping[str, Curve]  # key of metrics.jsonl -> its numbers
    judged: Mapping[int, Sequence[Figure]]  # step -> its evaluation
    document: Mapping[str, Any]  # of the last evaluation: classes, categories, ...
    best: Mapping[str, Mapping[str, float]]  # network -> its best score, and `step`
    pictures: Sequence[Picture]  # oldest first
    events: Sequence[Mapping[str, Any]]  # oldest first, without secrets

    @property
    def step(self) -> int:
        """That was done last."""
        return int(self.status["step"])

    def of(self, *kinds: str) -> list[Mapping[str, Any]]:
        """The events of these kinds, oldest first."""
        return [event for event in self.events if event["event"] in kinds]


def seen(folders: Sequence[Path], now: float | None = None, *, asks: bool = False) -> list[Seen]:
    """The runs in these folders.

    Args:
        folders: of the runs.
        now: the time, in seconds since 1970; None: that of the clock.
        asks: SLURM for the jobs of a run that does not train and is not finished.

    Raises:
        Refused: a folder has no run, or one that never began to train.
    """
    recipes = [recipe_of(folder) for folder in folders]
    names = _names(folders, recipes)
    runs = []
    for folder, name, recipe in zip(folders, names, recipes, strict=True):
        events = list(map(without_secrets, _events(folder)))
        judged = evaluations(folder / FOLLOWED) | evaluations(folder)
        run = Seen(
            folder=folder,
            name=name,
            recipe=recipe,
            status=status(folder, now, asks=asks),
            curves=curves_of(folder / "metrics.jsonl"),
            judged={step: figures(judged[step]) for step in sorted(judged)},
            document=_document(folder, max(judged, default=0)),
            best=_best(events),
            pictures=_pictures(folder),
            events=events,
        )
        runs.append(run)
    return runs


def _names(folders: Sequence[Path], recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The runs' names; where two have the same, their folders'; where these are the same, too,
    whole paths.
    """
    named = [str(recipe.get("run", {}).get("name") or "run") for recipe in recipes]
    for other in (named, [folder.resolve().name for folder in folders]):
        if len(set(other)) == len(other):
            return other
    return [str(folder) for folder in folders]


def curves_of(path: Path) -> dict[str, Curve]:
    """Key -> its numbers, in the order in which the file first has them; nested keys are joined by
    a slash.
    """
    found: dict[str, Curve] = {}
    for row in json_lines(path):
        step = row.get("step")
        if not isinstance(step, int):
            continue
        for key, value in _numbers(row):
            curve = found.setdefault(key, Curve(array("d"), array("d")))
            curve.steps.append(step)
            curve.values.append(value)
    if not any(key.startswith("teacher") for key in found):
        found.pop("momentum", None)  # of no teacher
    return found


def _numbers(row: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{before}{key}/")
        elif key in _NO_CURVES or isinstance(value, bool):
            continue
        elif isinstance(value, int | float):
            yield before + key, float(value)
        elif value is None:  # as JSON has what is not finite
            yield before + key, math.nan


def _events(folder: Path) -> Iterator[dict[str, Any]]:
    for event in json_lines(folder / "events.jsonl"):
        is_ours = isinstance(event.get("event"), str)
        if is_ours and isinstance(event.get("time"), int | float):
            yield event


def _document(folder: Path, step: int) -> Mapping[str, Any]:
    """What the evaluation of a step wrote beside its figures; empty where there is nothing."""
    for place in (folder, folder / FOLLOWED):
        try:
            found = json.loads((place / "evaluation" / f"step-{step:08d}.json").read_text())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(found, Mapping):
            return without_secrets(dict(found))
    return {}


def _best(events: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, float]]:
    """The best scores, as the last evaluation that has them tells."""
    for event in reversed(events):
        best = event.get("best")
        if event["event"] == "evaluate" and isinstance(best, Mapping):
            return {str(name): row for name, row in best.items() if isinstance(row, Mapping)}
    return {}


def _pictures(folder: Path) -> list[Picture]:
    found = []
    for place in (folder / FOLLOWED, folder):
        for step, drawn in pictures(place).items():
            found += [Picture(name, step, path) for name, path in drawn]
    return sorted(found, key=lambda picture: picture.step)


def device_hours(found: Mapping[str, Any]) -> float:
    """Hours of all ranks of all jobs, a device each, from a run's status."""
    jobs = found["jobs"]
    return float(sum((job["ended"] - job["began"]) * job["ranks"] for job in jobs)) / 3600
