"""The page: one HTML file with its style, its pictures and its curves in it.

Nothing in it runs and nothing is fetched: a policy in the page forbids both, so that not even a
name that holds HTML could. The template escapes whatever it is given.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from rcmae import __version__
from rcmae.data.sources import redacted
from rcmae.errors import counted
from rcmae.files import write_aside
from rcmae.run.records.status import KINDS, PRODUCTIVE
from rcmae.run.report.axes import duration, told
from rcmae.run.report.curves import groups, marks
from rcmae.run.report.happened import bad_samples, clock, notices, timeline
from rcmae.run.report.images import Strip, strips
from rcmae.run.report.judged import Part, Table, history, last_evaluation
from rcmae.run.report.reading import Seen, device_hours, seen
from rcmae.run.report.recipes import as_yaml, between, changes

FILE = "report.html"  # in the run's folder
METRICS = {"knn": "k-NN", "miou": "mIoU", "box_ap": "box AP", "top1": "top-1"}


class Written(NamedTuple):
    """A page that was written."""

    path: Path
    bytes: int
    runs: list[str]  # their names


class Tile(NamedTuple):
    """A figure at the top."""

    name: str
    value: str
    more: str = ""


class Spent(NamedTuple):
    """A kind of time that a run took."""

    kind: str
    seconds: float
    share: float  # of all, 0 to 1


@dataclass(frozen=True)
class Chapter:
    """What the page tells of one run."""

    run: Seen
    number: int  # of its colour
    about: str  # what is trained, in a line
    tiles: list[Tile]
    judged: list[Part]
    history: Table
    pictures: list[Strip]
    spent: list[Spent]
    jobs: Table
    base: str
    changes: Sequence[Any]
    whole: str  # the recipe as YAML


def write(
    folders: Sequence[Path], out: Path, now: float | None = None, *, asks: bool = False
) -> Written:
    """Write the page of these runs.

    Args:
        folders: of the runs.
        out: the file, replaced whole or not at all.
        now: the time, in seconds since 1970; None: that of the clock.
        asks: SLURM for the jobs of a run that does not train and is not finished.

    Raises:
        Refused: a folder has no run, or one that never began to train.
        OSError: it cannot be read or written.
    """
    runs = seen(folders, now, asks=asks)
    text = page(runs, time.time() if now is None else now)
    write_aside(out, text, durable=False)
    return Written(out, len(text.encode()), [run.name for run in runs])


def page(runs: Sequence[Seen], now: float) -> str:
    """The page's HTML."""
    drawn = strips(runs)
    chapters = [
        _chapter(run, number, pictures)
        for number, (run, pictures) in enumerate(zip(runs, drawn, strict=True))
    ]
    return _template().render(
        title=", ".join(run.name for run in runs),
        chapters=chapters,
        tiles=list(dict.fromkeys(tile.name for each in chapters for tile in each.tiles)),
        groups=groups(runs),
        marks=marks(runs),
        between=between(runs) if len(runs) > 1 else [],
        made=clock(now),
        version=__version__,
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"told": told, "duration": duration, "clock": clock}
    environment.globals |= {
        "notices": notices,
        "timeline": timeline,
        "bad_samples": bad_samples,
    }
    return environment.get_template("page.html")


def _chapter(run: Seen, number: int, pictures: list[Strip]) -> Chapter:
    base, differing = changes(run.recipe)
    return Chapter(
        run=run,
        number=number,
        about=_about(run.recipe),
        tiles=_tiles(run),
        judged=last_evaluation(run),
        history=history(run),
        pictures=pictures,
        spent=_spent(run),
        jobs=_jobs(run),
        base=base,
        changes=differing,
        whole=as_yaml(run.recipe),
    )


# ------------------------------------------------------------------------------------------ figures


def _about(recipe: Mapping[str, Any]) -> str:
    """What is trained, on how large images, by which engine."""
    told_of: dict[str, Any] = {}
    for section in ("task", "objective", "model", "engine", "batch"):
        found = recipe.get(section)
        if isinstance(found, Mapping):
            told_of |= {f"{section}.{key}": value for key, value in found.items()}
    task, objective = told_of.get("task.name", "pretrain"), told_of.get("objective.name")
    what = f"{task} by {objective}" if objective != task else str(task)
    size = told_of.get("model.image_size")
    sides = "x".join(map(str, size)) if isinstance(size, list) else size
    return (
        f"{what}, {told_of.get('model.name')} on images of {sides} pixels, "
        f"{told_of.get('batch.images')} a step, engine {told_of.get('engine.name')}, "
        f"{told_of.get('engine.precision')}"
    )


def _tiles(run: Seen) -> list[Tile]:
    status = run.status
    total = int(status["total_steps"])
    share = f"{run.step / total:.0%} of {total:,}" if total else ""
    left = status["hours_to_go"]
    tiles = [Tile("step", f"{run.step:,}", share)]
    if status["loss"] is not None:
        tiles.append(Tile("loss", told(status["loss"])))
    for network, row in sorted(run.best.items()):
        metric = next((name for name in row if name != "step"), None)
        if metric is not None:
            named = METRICS.get(metric, metric.replace("_", " "))
            unit = " %" if metric in METRICS else ""
            at = f"at step {told(row.get('step', 0))}"
            tiles.append(Tile(f"best {named}, {network}", f"{told(row[metric])}{unit}", at))
    if status["images_per_s"] is not None:
        ranks = counted(int(status["ranks"]), "rank")
        tiles.append(Tile("images a second", told(round(status["images_per_s"], 1)), ranks))
    since = f"of {duration(status['wall_s'])} since the first start"
    tiles.append(Tile("goodput", f"{status['goodput']:.1%}", since))
    if left is not None and status["state"] == "training":
        tiles.append(Tile("to go", duration(3600 * left)))
    tiles.append(Tile("device hours", f"{device_hours(status):,.2f}", "of all jobs and ranks"))
    return tiles


def _spent(run: Seen) -> list[Spent]:
    seconds: Mapping[str, float] = run.status["seconds"]
    wall = max(float(run.status["wall_s"]), 1e-9)
    return [Spent(kind, seconds[kind], min(1.0, seconds[kind] / wall)) for kind in KINDS]


def _jobs(run: Seen) -> Table:
    columns = ["start", "began", "ranks", "steps", "lasted", "goodput", "how it ended"]
    rows = []
    for number, job in enumerate(run.status["jobs"], 1):
        lasted = max(job["ended"] - job["began"], 1e-9)
        good = sum(job["seconds"][kind] for kind in PRODUCTIVE) / lasted
        rows.append(
            [
                f"{number} (job {job['job']})" if job["job"] else str(number),
                clock(job["began"]),
                str(job["ranks"]),
                f"{job['first_step']:,} to {job['last_step']:,}",
                duration(lasted),
                f"{good:.1%}",
                redacted(str(job["how"])),
            ]
        )
    return Table(columns, rows)
