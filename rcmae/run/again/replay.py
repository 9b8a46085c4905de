"""A step that went bad, run again on one process: from the checkpoint before it, with the very
samples and masks.

A bundle (`RUN/replay/step-00001234.json`, see `guard`) has the recipe, the checkpoint and every
sample with its position and mask; positions and the recipe's seeds are the random keys.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rcmae import checkpoint, config
from rcmae.config import Recipe
from rcmae.data.batch import Batch
from rcmae.errors import Refused
from rcmae.evaluation.features import evaluating
from rcmae.run.build import Run
from rcmae.run.guard import NonFiniteLoss


class Bundle(NamedTuple):
    """What was written of a bad step."""

    step: int  # optimizer steps done before it
    data_step: int  # the same in the stream
    checkpoint: str | None  # folder of the newest one before it
    recipe: dict[str, Any]
    masks: dict[int, list[int]]  # position -> visible patches, in order


class Sample(NamedTuple):
    """A sample of the step, with its own loss."""

    position: int
    sample: str  # its key
    loss: float


class Replayed(NamedTuple):
    """What was seen at the step."""

    step: int  # where the replay ended
    from_step: int  # of the checkpoint
    reproduced: bool  # the step goes bad here, too
    said: str
    same_masks: bool
    samples: list[Sample]  # of the step, the worst first; empty where it was not reached


def read_bundle(path: Path) -> Bundle:
    """The bundle in a file.

    Raises:
        Refused: it is none.
    """
    try:
        document = json.loads(path.read_text())
        masks: dict[int, list[int]] = {}
        for rank in document["ranks"]:
            for micro in rank:
                masks |= dict(zip(micro["positions"], micro["masks"], strict=True))
        return Bundle(
            step=document["step"],
            data_step=document["data_step"],
            checkpoint=document["checkpoint"],
            recipe=document["recipe"],
            masks=masks,
        )
    except OSError as error:
        raise Refused(str(error)) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(f"it is not a bundle of a bad step: {error!r}") from error


def recipe_of(
    bundle: Bundle,
    folder: Path,
    checkpoint_folder: Path | None = None,
    *,
    allow_pipe: bool = False,
) -> Recipe:
    """The recipe that trains from the checkpoint to the step, on one process, and no further.

    Args:
        bundle: of the step.
        folder: for the files of the replay.
        checkpoint_folder: where the checkpoint lies now; None: where it was, or, without one, the
            run's beginning.
        allow_pipe: whether commands in its recipe may run.

    Raises:
        Refused: the checkpoint is not there any more, or the recipe has commands.
    """
    if not allow_pipe:
        config.without_pipes(bundle.recipe, "its recipe")
    start = checkpoint_folder or (Path(bundle.checkpoint) if bundle.checkpoint else None)
    try:
        from_step = checkpoint.read_manifest(start).step if start else 0
    except checkpoint.CheckpointError as error:
        raise Refused(f"{error}; give the checkpoint's folder: --checkpoint") from error
    changes: dict[str, dict[str, Any]] = {
        "engine": {"name": "local", "config": None},
        "data": {"workers": 0},
        "evaluate": {"every_steps": None, "picture_every_steps": None},
        "checkpoint": {
            "every_steps": None,
            "every_minutes": None,
            "resume": str(start) if start else "never",
        },
        "guard": {"action": "stop"},
        "log": {"tensorboard": False, "report": False, "trackers": ()},
        "run": {"dir": str(folder), "stop_after_steps": bundle.step - from_step + 1},
    }
    try:
        tree = {key: dict(section) for key, section in bundle.recipe.items()}
        for key, section in changes.items():
            tree[key] |= section
        return config.stored(tree)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"its recipe cannot be used: {error}") from error


def replay(run: Run, bundle: Bundle, fit: Callable[[Run], object]) -> Replayed:
    """Train to the step of a bundle, and say what is seen there. One process.

    Args:
        run: made of `recipe_of` the bundle.
        bundle: of the step.
        fit: the training loop.

    Raises:
        DataUnreadable: the samples cannot be read.
    """
    progress = run.parts.progress
    from_step = progress.step
    progress.data_step = bundle.data_step - (bundle.step - from_step)
    reproduced = False
    said = "the step ends well here"
    try:
        fit(run)
    except NonFiniteLoss as error:
        reproduced = progress.step == bundle.step
        said = str(error).split(";")[0]
    samples: list[Sample] = []
    same_masks = True
    if progress.step == bundle.step:
        samples, same_masks = _samples_of_the_step(run, bundle.masks)
    leave(run)
    return Replayed(progress.step, from_step, reproduced, said, same_masks, samples)


def leave(run: Run) -> None:
    """Close a run that is thrown away."""
    run.log.close()
    run.parts.batches.stream.close()
    run.presence.leave()
    if run.lease is not None:
        run.lease.release()


def _samples_of_the_step(run: Run, masks: Mapping[int, list[int]]) -> tuple[list[Sample], bool]:
    """Each sample with its own loss, the worst first, and whether its masks are those of the
    bundle.
    """
    found = []
    same = True
    steps = run.parts.batches.stream.steps(run.parts.progress.data_step)
    for micro in run.task.pair(run.recipe, list(next(steps))):
        for index in range(len(micro)):
            one = micro.part(slice(index, index + 1))
            position = int(one.positions[0])
            same &= one.ids_shuffle[0, : one.num_visible].tolist() == masks.get(position)
            found.append(Sample(position, one.keys[0], _loss(run, one)))
    found.sort(key=lambda sample: (math.isfinite(sample.loss), -sample.loss))
    return found, same


def _loss(run: Run, one: Batch) -> float:
    """The loss of a batch of one image."""
    engine = run.parts.engine
    objective = run.parts.objective
    with evaluating(engine.student, engine.teacher):
        # a batch norm has no statistics of one image
        sums = objective(engine.student, engine.teacher, run.parts.batches.ready(one), 0.0)
    counts = objective.counts(one)
    shares = [
        weight * sums[term].item() / max(counts[term], 1)
        for term, weight in objective.weights.items()
    ]
    return sum(shares)
