"""Run a step that went bad again, on one process: from the checkpoint before it, with the very
samples and masks.

    python tools/replay.py RUN/replay/step-00001234.json [--checkpoint FOLDER] [--json]

Exit status: 0 the step goes bad here too, 1 it does not, 2 the bundle or its checkpoint cannot be
used."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rcmae import config, dist, train
from rcmae.evaluation.features import evaluating
from rcmae.run import preempt
from rcmae.run.build import Run
from rcmae.run.guard import NonFiniteLoss
from rcmae.tasks.registry import task_of


def replay(document: dict[str, Any], checkpoint_path: str | None, folder: Path) -> dict[str, Any]:
    """Train from the checkpoint to the step of a bundle, and say what is seen there.

    Args:
        document: the bundle.
        checkpoint_path: where its checkpoint lies now; None for where it was, or for the run's
            beginning.
        folder: for the files of this run.

    Raises:
        ValueError: the data or the checkpoint are not there any more.
    """
    recipe = config.stored(document["recipe"])
    recipe.engine.name, recipe.engine.config = "local", None
    recipe.run.dir, recipe.data.workers, recipe.log.tensorboard = str(folder), 0, False
    recipe.evaluate.every_steps = recipe.evaluate.picture_every_steps = None
    recipe.checkpoint.every_steps = recipe.checkpoint.every_minutes = None
    recipe.guard.action, recipe.run.stop_after_steps = "stop", None
    path = checkpoint_path or document["checkpoint"]
    recipe.checkpoint.resume = path or "never"
    run = train.ready(recipe, preempt.StopRequest(), task_of(recipe))
    progress = run.parts.progress
    with run.log:
        progress.data_step = document["data_step"] - (document["step"] - progress.step)
        run.recipe.run.stop_after_steps = document["step"] - progress.step + 1
        begin, reproduced, said = progress.step, False, "the step ends well here"
        try:
            train.fit(run)
        except NonFiniteLoss as error:
            reproduced, said = progress.step == document["step"], str(error).split(";")[0]
        samples, same = look_at(run, document) if progress.step == document["step"] else ([], True)
    run.parts.batches.stream.close()
    if run.lease:
        run.lease.release()
    return {
        "step": progress.step,
        "from_step": begin,
        "reproduced": reproduced,
        "said": said,
        "same_masks": same,
        "samples": samples,
    }


def look_at(run: Run, document: dict[str, Any]) -> tuple[list[dict[str, Any]], bool]:
    """Each sample's own loss at the step, worst first, and whether its masks are those of the
    bundle.
    """
    masks = {
        position: mask
        for rank in document["ranks"]
        for micro in rank
        for position, mask in zip(micro["positions"], micro["masks"], strict=True)
    }
    rows, same = [], True
    engine, objective = run.parts.engine, run.parts.objective
    stream = run.parts.batches.stream
    for micro in run.task.pair(run.recipe, next(stream.steps(run.parts.progress.data_step))):
        for index in range(len(micro)):
            one = micro.part(slice(index, index + 1))
            position = int(one.positions[0])
            same &= one.ids_shuffle[0, : one.num_visible].tolist() == masks.get(position)
            with evaluating(engine.student, engine.teacher):
                # a batch norm has no statistics of one image
                sums = objective(engine.student, engine.teacher, run.parts.batches.ready(one), 0.0)
            counts = objective.counts(one)
            weights = objective.weights.items()
            loss = sum(
                weight * sums[term].item() / max(counts[term], 1) for term, weight in weights
            )
            rows.append({"position": position, "sample": one.keys[0], "loss": loss})
    return sorted(rows, key=lambda row: (math.isfinite(row["loss"]), -row["loss"])), same


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description="Run a step that went bad again, on one process.")
    parser.add_argument("bundle", type=Path, help="RUN/replay/step-XXXXXXXX.json")
    parser.add_argument("--checkpoint", help="the checkpoint's folder, where it has moved")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    args = parser.parse_args(argv)
    dist.start(required=False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = replay(
                json.loads(args.bundle.read_text()), args.checkpoint, Path(folder) / "replay"
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        print(f"replay: {args.bundle}: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(found))
    else:
        verdict = "goes bad here too" if found["reproduced"] else "does not go bad here"
        masks = (
            "the same"
            if found["same_masks"]
            else "NOT the same: the shards or the package have changed"
        )
        print(
            f"step {found['step']}, replayed from step {found['from_step']}: {verdict} "
            f"({found['said']})"
        )
        print(f"samples and masks are {masks}; the worst samples by their own loss:")
        for row in found["samples"][:10]:
            print(f"  {row['loss']:12.4g}  position {row['position']}  {row['sample']}")
    return 0 if found["reproduced"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
