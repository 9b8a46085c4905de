"""End a training early, as a run of its own: the rate falls to its end from any kept checkpoint of
a training with schedule.shape=wsd (the trunk), which may still train and keeps every byte.

    rcmae cooldown runs/trunk@20000 --steps 4000
    torchrun --no-python rcmae cooldown runs/trunk@20000 --steps 4000 --shape 1-sqrt key=value ...

Weights, moments, teacher and place in the data are the checkpoint's, so the run is the one that had
been planned with so many steps. It lies in runs/trunk-20000+4000; the same command resumes it. Exit
status as of `rcmae train`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcmae.errors import Refused

if TYPE_CHECKING:
    from rcmae.checkpoint import Manifest
    from rcmae.config import Recipe

# frozen keys that make a cooldown of a trunk
CHANGED = ("epochs", "steps", "cooldown", "cooldown_steps", "cooldown_shape")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit status of this rank."""
    asked, settings = _parser().parse_known_args(arguments)
    try:
        given = command_line(asked.source, asked.steps, asked.shape, asked.dir)
        refuse_contradictions(given, settings)
    except Refused as error:
        if os.environ.get("RANK", "0") == "0":  # every rank sees the same
            print(f"rcmae: {error}", file=sys.stderr)
        return 2
    from rcmae.train import main as train

    return train([*given, *settings], prog="rcmae train")


def command_line(source: str, steps: int, shape: str | None, folder: Path | None) -> list[str]:
    """The arguments of `rcmae train` that train the cooldown: the trunk's recipe and what differs.

    Args:
        source: RUN@STEP.
        steps: of the cooldown.
        shape: of it; None: the trunk's own.
        folder: of the new run; None: beside the trunk's.

    Raises:
        Refused: there is no such checkpoint, or no cooldown can start from it; every reason.
    """
    run, at, number = source.rpartition("@")
    if not at or not number.isdecimal():
        raise Refused(f"{source!r} names no step: give RUN@STEP, such as runs/trunk@20000")
    if steps < 1:
        raise Refused(f"--steps {steps}: a cooldown has at least one step")
    manifest = kept(Path(run), int(number))
    recipe = recipe_of(manifest)
    if problems := trunk_problems(recipe, manifest):
        raise Refused(f"{manifest.path}: no cooldown can start here:\n" + "\n".join(problems))
    place = folder or Path(f"{run.rstrip('/')}-{manifest.step}+{steps}")
    if place.resolve() == Path(run).resolve():
        raise Refused(f"--dir {place} is the trunk's own folder; give another")
    options = recipe.schedule
    refuse_another(place, manifest, steps, shape or options.cooldown_shape)
    changed: dict[str, Any] = {
        "schedule.steps": manifest.step + steps,
        "schedule.epochs": None,
        "schedule.warmup_steps": options.warmup_steps,
        "schedule.warmup_epochs": options.warmup_epochs,
        "schedule.cooldown_steps": steps,
        "schedule.cooldown_shape": shape or options.cooldown_shape,
        "checkpoint.resume": manifest.path.resolve(),
        "checkpoint.allow": f"[{','.join(f'schedule.{key}' for key in CHANGED)}]",
        "run.dir": place,
        "run.name": place.name,
        "run.stop_after_steps": None,
    }
    words = [f"{key}={'null' if value is None else value}" for key, value in changed.items()]
    return [str(Path(run) / "recipe.yaml"), *words]


def refuse_contradictions(given: Sequence[str], settings: Sequence[str]) -> None:
    """Refuse keys of the schedule that the command's own options set to something else.

    Args:
        given: of `command_line`.
        settings: key=value that the user adds.

    Raises:
        Refused: some contradict, all of them with the option that says it.
    """
    options = {f"schedule.{key}": "--steps" for key in CHANGED}
    options["schedule.cooldown_shape"] = "--shape"
    ours = {word.partition("=")[0]: word.partition("=")[2] for word in given}
    problems = []
    for word in settings:
        key, _, value = word.partition("=")
        if key in options and ours.get(key) != value:
            problems.append(f"{word}: rcmae cooldown sets it by {options[key]}; leave {key} out")
    if problems:
        raise Refused("\n".join(problems))


def refuse_another(place: Path, manifest: Manifest, steps: int, shape: str) -> None:
    """Refuse a folder with a run that is not this cooldown: it would be trained further instead.

    Raises:
        Refused: there is such a run, with what it is.
    """
    import pydantic

    from rcmae.config import stored
    from rcmae.config.trees import tree_of

    file = place / "recipe.yaml"
    if not file.is_file():
        return
    try:
        there = stored(tree_of(file.read_text()), imports=False)
    except (OSError, ValueError, TypeError, pydantic.ValidationError) as error:
        raise Refused(f"{file} cannot be read; give another --dir: {error}") from error
    begun = Path(str(there.checkpoint.resume))
    length, curve = there.schedule.cooldown_steps, there.schedule.cooldown_shape
    same = begun.parts[-3:] == manifest.path.resolve().parts[-3:]  # of a trunk that moved, too
    if same and (length, curve) == (steps, shape) and there.schedule.steps == manifest.step + steps:
        return
    is_cooldown = begun.parent.name == "checkpoints" and length is not None
    what = f"a {curve} cooldown of {length} steps from {begun}" if is_cooldown else "another run"
    raise Refused(
        f"{place} has {what}, not this {shape} one of {steps} steps from {manifest.path}; give "
        "another --dir"
    )


def kept(run: Path, step: int) -> Manifest:
    """The trunk's checkpoint of a step.

    Raises:
        Refused: there is none, or it is no checkpoint of this package.
    """
    from rcmae import checkpoint

    root = run / "checkpoints"
    if not (run / "recipe.yaml").is_file():
        raise Refused(f"{run} is no run's folder: it has no recipe.yaml")
    folder = root / checkpoint.step_name(step)
    if not folder.is_dir():
        steps = map(checkpoint.step_of, checkpoint.step_folders(root))
        there = [number for number in steps if number is not None]
        listed = ", ".join(map(str, there)) or "none"
        reached, total = _reached(run, there)
        why = "it was pruned, or never saved"
        if step > reached:
            why = f"the trunk is at step {reached}" + (f" of {total}" if total else "")
        raise Refused(
            f"{run} has no checkpoint of step {step}: {why}. Kept: {listed}; "
            "checkpoint.keep_every keeps one of every so many steps"
        )
    try:
        return checkpoint.open_verified(folder)
    except checkpoint.CheckpointError as error:
        raise Refused(f"{folder}: {error}") from error


def _reached(run: Path, saved: Sequence[int]) -> tuple[int, int | None]:
    """The step that a run is at and its last; of a folder without records its newest checkpoint."""
    from rcmae.run.records.status import status

    try:
        told = status(run, asks=False)
    except Refused:
        return max(saved, default=0), None
    return max(told["step"], *saved, 0), told["total_steps"]


def recipe_of(manifest: Manifest) -> Recipe:
    """The recipe that a checkpoint was trained by. Raises Refused: it cannot be read."""
    import pydantic

    from rcmae.config import stored

    try:
        return stored(manifest.meta["recipe"])
    except (KeyError, pydantic.ValidationError) as error:
        raise Refused(f"{manifest.path}: its recipe cannot be read: {error}") from error


def trunk_problems(recipe: Recipe, manifest: Manifest) -> list[str]:
    """What of a training until this checkpoint has depended on when it ends, a line each."""
    from rcmae.config import ties_to_the_end

    problems = []
    options = recipe.schedule
    if recipe.task.name != "pretrain":
        problems.append(f"task.name={recipe.task.name}: only pretrainings have cooldowns")
    if options.shape != "wsd":
        problems.append(
            f"schedule.shape={options.shape}: the rate has fallen towards the trunk's own end; "
            "train the trunk with schedule.shape=wsd"
        )
    else:
        problems += _place_problems(recipe, manifest.step, manifest.meta["sizes"])
    problems += ties_to_the_end(recipe)
    return problems


def _place_problems(recipe: Recipe, step: int, sizes: Mapping[str, Any]) -> list[str]:
    """A checkpoint inside the warm-up, or inside the trunk's own cooldown."""
    options = recipe.schedule
    total, warmup = sizes["total_steps"], sizes["warmup_steps"]
    before = warmup if options.warmup is None else 0.0
    own = options.cooldown_steps or options.cooldown * (total - before)
    if step < warmup:
        return [f"step {step} lies in the warm-up of {warmup:g} steps; take a later one"]
    if step > total - own:
        return [
            f"step {step} lies in the trunk's own cooldown, which began at step {total - own:g}; "
            "take an earlier one"
        ]
    return []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rcmae cooldown",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="rcmae cooldown RUN@STEP --steps N [--shape SHAPE] [--dir FOLDER] [key=value ...]",
    )
    parser.add_argument("source", metavar="RUN@STEP")
    parser.add_argument("--steps", type=int, required=True, metavar="N", help="of the cooldown")
    parser.add_argument("--shape", choices=("linear", "1-sqrt"), help="default: the trunk's")
    parser.add_argument("--dir", type=Path, metavar="FOLDER", help="default: RUN-STEP+N")
    return parser
