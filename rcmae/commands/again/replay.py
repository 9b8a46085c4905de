"""Rerun a bad step on one process, from the checkpoint before it, with the same samples and masks.

    rcmae replay RUN/replay/step-00001234.json [--checkpoint FOLDER] [--allow-pipe] [--json]

The training's log is on stderr. Exit status: 0 the step goes bad here too, 1 it does not, 2 the
bundle or its checkpoint cannot be used.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rcmae.run.again.replay import Replayed

SHOWN = 10  # samples


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay and say what is seen; the exit status."""
    parser = argparse.ArgumentParser(
        prog="rcmae replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path, help="RUN/replay/step-XXXXXXXX.json")
    parser.add_argument("--checkpoint", type=Path, help="folder of the checkpoint, if it has moved")
    parser.add_argument(
        "--allow-pipe",
        action="store_true",
        help="run the commands (pipe:) by which its recipe reads data",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document")
    asked = parser.parse_args(arguments)

    from rcmae.checkpoint import CheckpointError
    from rcmae.errors import Refused
    from rcmae.run.loop.agreement import DataUnreadable

    try:
        with contextlib.redirect_stdout(sys.stderr):  # of the training; the answer is on stdout
            found = _replayed(asked.bundle, asked.checkpoint, allow_pipe=asked.allow_pipe)
    except (Refused, CheckpointError, DataUnreadable, OSError) as error:
        print(f"replay: {asked.bundle}: {error}", file=sys.stderr)
        return 2
    if asked.json:
        samples = [sample._asdict() for sample in found.samples]
        print(json.dumps({**found._asdict(), "samples": samples}))
    else:
        _show(found)
    return 0 if found.reproduced else 1


def _replayed(path: Path, checkpoint_folder: Path | None, *, allow_pipe: bool) -> Replayed:
    import tempfile

    from rcmae import dist, train
    from rcmae.errors import Refused
    from rcmae.run import preempt
    from rcmae.run.again.replay import read_bundle, recipe_of, replay
    from rcmae.tasks.registry import task_of

    if not path.is_file():
        raise Refused("there is no such file; bundles of bad steps are in RUN/replay")
    bundle = read_bundle(path)
    dist.start(required=False)
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(
            bundle, Path(folder) / "replay", checkpoint_folder, allow_pipe=allow_pipe
        )
        task = task_of(recipe)
        run = train.built(train.judged(recipe, task), task, preempt.StopRequest())
        return replay(run, bundle, train.fit)


def _show(found: Replayed) -> None:
    verdict = "goes bad here too" if found.reproduced else "does not go bad here"
    masks = "the same"
    if not found.same_masks:
        masks = "NOT the same: the shards or the package have changed"
    print(f"step {found.step}, replayed from step {found.from_step}: {verdict} ({found.said})")
    print(f"samples and masks are {masks}; the worst samples by their own loss:")
    for sample in found.samples[:SHOWN]:
        print(f"  {sample.loss:12.4g}  position {sample.position}  {sample.sample}")
