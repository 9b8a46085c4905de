"""What a run's folder has for a tracker: its committed steps, each with all that belongs to it.

A step is shown when nothing can be added to it or taken back any more: a checkpoint was committed
after it; or it is the committed one itself, and the job has ended there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rcmae import checkpoint
from rcmae.files import json_lines, json_lines_back
from rcmae.run.records.shown import Figure, ended, evaluations, figures, pictures
from rcmae.run.records.status import status
from rcmae.run.trackers.protocol import How

_LEFT_OUT = ("step", "time")  # of a row: no curves


class Record(NamedTuple):
    """A step."""

    step: int
    time: float  # seconds since 1970
    scalars: dict[str, float]
    images: list[tuple[str, Path]]
    table: list[Figure]  # of an evaluation


def settled_step(run: Path) -> int:
    """The newest step that is shown; -1: none yet."""
    newest = checkpoint.newest_unverified(run / "checkpoints")
    if newest is None:
        return -1
    outcome = ended(run)
    if outcome is None or outcome.step != newest.step:
        return newest.step - 1
    # a job that finished has made what its checkpoint was committed without
    owes_evaluation = not newest.meta.get("evaluated", True) and outcome.status != "finished"
    return newest.step - owes_evaluation


def records(run: Path, after: int, upto: int) -> Iterator[Record]:
    """The steps after one and up to another that have something to show, in order."""
    judged = evaluations(run, after, upto)
    drawn = pictures(run, after, upto)
    rows = _rows(run, after, upto)
    for step in sorted({*rows, *judged, *drawn}):
        row = rows.get(step, {})
        event = judged.get(step, {})
        left_out = _LEFT_OUT if _has_teacher(row) else (*_LEFT_OUT, "momentum")
        numbers = {
            f"train/{name}": float(value)
            for name, value in row.items()
            if isinstance(value, int | float) and name not in left_out
        }
        table = figures(event)
        numbers |= {f"{group}/{name}": value for group, name, value in table}
        time_s = float(row.get("time") or event.get("time") or 0.0)
        yield Record(step, time_s, numbers, drawn.get(step, []), table)


def _has_teacher(row: Mapping[str, Any]) -> bool:
    return any(name.startswith("teacher") for name in row)


def summary_of(run: Path) -> dict[str, Any]:
    """Where the run stands, its goodput, and its best networks."""
    found = status(run, asks=False)
    kept = ("state", "step", "epoch", "goodput", "wall_s", "ranks", "undone_steps")
    values = {name: found[name] for name in kept if found.get(name) is not None}
    values |= {
        f"seconds/{kind.replace(' ', '_')}": value for kind, value in found["seconds"].items()
    }
    for event in json_lines(run / "events.jsonl"):
        if event.get("event") == "evaluate" and isinstance(event.get("best"), dict):
            values |= _flat({"best": event["best"]})
    return {name: _short(value) for name, value in values.items()}


def _short(value: Any) -> Any:
    """A number in six digits: it is there to be read."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def how_it_stands(run: Path) -> How:
    """Whether the run trains, or how its last job ended."""
    state = str(status(run, asks=False)["state"])
    if state == "finished":
        return "finished"
    if state == "training":
        return "training"
    outcome = ended(run)
    return "failed" if outcome is not None and outcome.status == "failed" else "stopped"


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
