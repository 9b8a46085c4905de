"""The first steps of a run, trained again on one process from what its folder says: are losses,
data and versions the same?

Samples, crops and masks are a function of seed and position, so the same data give the same batches
on any number of ranks. Sums over ranks, other kernels and other devices round otherwise: numbers
are compared within a tolerance, and the largest difference is told.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rcmae import checkpoint, config
from rcmae.config import Recipe
from rcmae.config.trees import tree_of
from rcmae.errors import Refused, counted
from rcmae.files import json_lines
from rcmae.process import cores
from rcmae.run.again.replay import leave
from rcmae.run.announcing import device_name
from rcmae.run.build import Run
from rcmae.run.folder import versions
from rcmae.run.guard import NonFiniteLoss

# the largest relative difference of sums that were rounded otherwise, over a few tens of steps
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}
EXACT = ("lr", "momentum", "images_seen")  # functions of the step alone
_TINY = 1e-12  # below it a number is 0


class Original(NamedTuple):
    """What a run's folder says of its first steps."""

    folder: Path
    start: Mapping[str, Any]  # the event of its first start
    rows: Mapping[int, Mapping[str, Any]]  # step -> what was logged
    fingerprint: str | None  # of its data; None: nothing tells it any more


class Number(NamedTuple):
    """A number of a step, then and now."""

    step: int
    name: str
    then: float | None  # None: it was not finite
    now: float | None
    difference: float  # relative


class Reproduced(NamedTuple):
    """What came out."""

    numbers: list[Number]  # by step
    tolerance: float
    differs: list[str]  # what is not as it was and should be, a line each
    notes: list[str]  # what is otherwise by design, or cannot be told

    @property
    def is_same(self) -> bool:
        """Whether the steps are those of the run."""
        return not self.differs


def original(folder: Path, steps: int) -> Original:
    """A run's first steps.

    Raises:
        Refused: there is no run, or nothing of these steps was logged.
    """
    events = [
        event
        for event in json_lines(folder / "events.jsonl")
        if event.get("event") in ("start", "resume") and isinstance(event.get("step"), int)
    ]
    if not events or not (folder / "recipe.yaml").is_file():
        raise Refused(f"{folder} is not a run: it has no recipe.yaml, or no start in events.jsonl")
    first = events[0]
    rows = {}
    for row in json_lines(folder / "metrics.jsonl"):
        step = row.get("step")
        if isinstance(step, int) and first["step"] < step <= first["step"] + steps:
            rows[step] = row
    if not rows:
        raise Refused(
            f"{folder} logged none of its first {counted(steps, 'step')}; give more --steps, as "
            "many as its log.every_steps"
        )
    return Original(folder, first, rows, _fingerprint(folder, first))


def recipe_of(
    found: Original, steps: int, place: Path, given: Sequence[str], *, allow_pipe: bool
) -> Recipe:
    """The recipe that trains the first steps on one process, and saves nothing.

    Args:
        found: the run.
        steps: how many.
        place: a folder for the files of these steps.
        given: key=value, such as where the data lie now.
        allow_pipe: whether commands in the recipe may run.

    Raises:
        Refused: the recipe cannot be used.
    """
    path = found.folder / "recipe.yaml"
    try:
        tree = tree_of(path.read_text())
        resume = tree["checkpoint"]["resume"]
        workers = int(tree["data"]["workers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} is no recipe of a run: {error!r}") from error
    if not allow_pipe:
        config.without_pipes(tree, str(path), [item.partition("=")[0] for item in given])
    begins_elsewhere = found.start["step"] > 0 and resume not in ("auto", "must", "never")
    values: dict[str, Any] = {
        "engine.name": "local",
        "engine.config": None,
        "data.workers": min(workers, cores.usable()),
        "evaluate.every_steps": None,
        "evaluate.picture_every_steps": None,
        "checkpoint.every_steps": None,
        "checkpoint.every_minutes": None,
        "checkpoint.resume": resume if begins_elsewhere else "never",
        "guard.action": "stop",
        "log.every_steps": 1,
        "log.tensorboard": False,
        "log.report": False,
        "log.trackers": [],
        "run.dir": str(place),
        "run.stop_after_steps": steps,
        "run.deadline_s": None,
    }
    sizes = found.start.get("sizes", {})
    if isinstance(sizes, Mapping) and "per_device" in sizes:
        values["batch.per_device"] = sizes["per_device"]  # micro-batches as they were
    words = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return config.load(str(path), [*words, *given])


def reproduce(
    run: Run,
    found: Original,
    fit: Callable[[Run], object],
    *,
    fingerprint: str,
    tolerance: float | None = None,
) -> Reproduced:
    """Train the steps and compare. One process.

    Args:
        run: made of `recipe_of`.
        found: the run that is compared with.
        fit: the training loop.
        fingerprint: of the data as they are now.
        tolerance: largest relative difference; None: that of the precision.

    Raises:
        DataUnreadable: the samples cannot be read.
    """
    differs = []
    try:
        fit(run)
    except NonFiniteLoss as error:
        differs.append(str(error).split(";")[0])
    finally:
        leave(run)
    precision = run.recipe.engine.precision
    allowed = TOLERANCES.get(precision, TOLERANCES["bf16"]) if tolerance is None else tolerance
    rows = {row["step"]: row for row in json_lines(run.recipe.run_dir / "metrics.jsonl")}
    numbers = list(compared(found.rows, rows))
    differs += too_far(numbers, allowed)
    lost = [step for step in found.rows if step not in rows]
    if lost:
        differs.append(f"{counted(len(lost), 'step')} did not come here, the first: {min(lost)}")
    told, notes = _surroundings(run, found, fingerprint)
    asked = run.recipe.run.stop_after_steps or 0
    if len(found.rows) < asked:
        notes.append(
            f"{counted(len(found.rows), 'step')} of the first {asked} compared: the run logged no "
            "others of them (log.every_steps)"
        )
    return Reproduced(numbers, allowed, [*differs, *told], notes)


def compared(
    then: Mapping[int, Mapping[str, Any]], now: Mapping[int, Mapping[str, Any]]
) -> list[Number]:
    """The numbers of the steps that both have: losses, gradient, rates."""
    found = []
    for step, row in sorted(then.items()):
        for name in row:
            is_number = name in ("loss", "grad_norm", *EXACT) or name.startswith("loss_")
            if is_number and name in now.get(step, {}):
                before, after = row[name], now[step][name]
                found.append(Number(step, name, before, after, _difference(before, after)))
    return found


def too_far(numbers: Sequence[Number], tolerance: float) -> list[str]:
    """A line for each name whose numbers differ by more than is allowed: where first."""
    lines = {}
    for each in numbers:
        allowed = _TINY if each.name in EXACT else tolerance
        if each.difference > allowed and each.name not in lines:
            lines[each.name] = (
                f"{each.name} at step {each.step}: {each.then} then, {each.now} now "
                f"(relative difference {each.difference:.2g}, allowed {allowed:.2g})"
            )
    return list(lines.values())


def _difference(then: float | None, now: float | None) -> float:
    if then is None or now is None:
        return 0.0 if then is now else math.inf
    return abs(now - then) / max(abs(then), abs(now), _TINY) if now != then else 0.0


def _fingerprint(folder: Path, start: Mapping[str, Any]) -> str | None:
    data = start.get("data")
    if isinstance(data, Mapping) and isinstance(data.get("fingerprint"), str):
        return str(data["fingerprint"])
    newest = checkpoint.newest_unverified(folder / "checkpoints")
    told = newest.meta.get("data_fingerprint") if newest is not None else None
    return str(told) if told else None


def _surroundings(run: Run, found: Original, fingerprint: str) -> tuple[list[str], list[str]]:
    """What of data and versions is not as it was, and what is to be known of the comparison."""
    differs, notes = [], []
    if found.fingerprint is None:
        notes.append("what data it was trained on is not known: no checkpoint is there any more")
    elif found.fingerprint != fingerprint:
        differs.append(
            f"the data: fingerprint {found.fingerprint[:12]} then, {fingerprint[:12]} now: names, "
            "sizes or samples of the shards differ"
        )
    before, after = found.start.get("versions", {}), versions()
    for name in dict.fromkeys([*before, *after]):
        if before.get(name) != after.get(name):
            notes.append(f"{name}: {before.get(name, 'none')} then, {after.get(name, 'none')} now")
    device = found.start.get("device")
    if device and device != device_name():
        notes.append(f"device: {device} then, {device_name()} now")
    world = int(found.start.get("sizes", {}).get("world", 1))
    engine = found.start.get("engine", {}).get("name", "local")
    if (world, engine) != (1, "local"):
        notes.append(f"{counted(world, 'rank')} by engine {engine} then, one process now")
    if world > 1 and "classes" in run.recipe.objective.student_outputs:
        notes.append("a batch norm in a head for classes saw more images at once then")
    return differs, notes
