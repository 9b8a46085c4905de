"""Train the first steps of a run again, on one process from the run's own folder, and compare
losses, data and versions.

    rcmae reproduce RUN [--steps 20] [key=value ...]

key=value sets recipe keys, such as data.shards=... where the data were moved. Nothing is written
into RUN; the training's log is on stderr. Exit status: 0 the steps are the run's, within the
tolerance; 1 they are not, and what differs is said; 2 there is no such run, or its recipe or data
cannot be used.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rcmae.commands.arguments import from_zero

if TYPE_CHECKING:
    from rcmae.run.again.reproduce import Number, Reproduced

SHOWN = 40  # steps


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, compare and say it; the exit status."""
    asked = _parser().parse_intermixed_args(arguments)

    from rcmae.checkpoint import CheckpointError
    from rcmae.errors import Refused
    from rcmae.run.loop.agreement import DataUnreadable

    try:
        with contextlib.redirect_stdout(sys.stderr):  # of the training; the answer is on stdout
            found = _reproduced(asked)
    except (Refused, CheckpointError, DataUnreadable, OSError) as error:
        print(f"rcmae: {asked.run}: {error}", file=sys.stderr)
        return 2
    if asked.json:
        numbers = [number._asdict() for number in found.numbers]
        print(json.dumps({**found._asdict(), "numbers": numbers, "same": found.is_same}))
    else:
        _show(found)
    return 0 if found.is_same else 1


def _reproduced(asked: argparse.Namespace) -> Reproduced:
    import tempfile

    from rcmae import dist, train
    from rcmae.run import preempt
    from rcmae.run.again.reproduce import original, recipe_of, reproduce
    from rcmae.tasks.registry import task_of

    found = original(asked.run, asked.steps)
    dist.start(required=False)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "again"
        recipe = recipe_of(found, asked.steps, place, asked.given, allow_pipe=asked.allow_pipe)
        task = task_of(recipe)
        verdict = train.judged(recipe, task)
        run = train.built(verdict, task, preempt.StopRequest())
        assert verdict.data.train is not None
        fingerprint = verdict.data.train.fingerprint
        return reproduce(run, found, train.fit, fingerprint=fingerprint, tolerance=asked.tolerance)


def _show(found: Reproduced) -> None:
    losses = [number for number in found.numbers if number.name == "loss"]
    print(f"{'step':>8} {'loss then':>14} {'loss now':>14} {'difference':>11}")
    for number in losses[:SHOWN]:
        values = f"{_told(number.then)} {_told(number.now)}"
        print(f"{number.step:>8} {values} {number.difference:>11.2g}")
    if len(losses) > SHOWN:
        print(f"{'...':>8} and {len(losses) - SHOWN} more")
    print("largest relative differences:")
    for name in dict.fromkeys(number.name for number in found.numbers):
        worst = _worst(found, name)
        print(f"  {name:<24} {worst.difference:.2g} at step {worst.step}")
    for note in found.notes:
        print(f"note: {note}")
    for line in found.differs:
        print(f"differs: {line}")
    said = "the steps are the run's" if found.is_same else "the steps are NOT the run's"
    print(f"{said}, within a tolerance of {found.tolerance:.2g}")


def _worst(found: Reproduced, name: str) -> Number:
    mine = [number for number in found.numbers if number.name == name]
    return max(mine, key=lambda number: number.difference)


def _told(value: float | None) -> str:
    return f"{'not finite':>14}" if value is None else f"{value:>14.8f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rcmae reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="its run.dir")
    parser.add_argument("given", nargs="*", default=[], metavar="key=value", help="of the recipe")
    parser.add_argument("--steps", type=_positive, default=20, help="how many (default 20)")
    parser.add_argument(
        "--tolerance",
        type=from_zero,
        help="largest relative difference of losses and gradient; default: 1e-4 in fp32, 0.02 in "
        "bf16",
    )
    parser.add_argument(
        "--allow-pipe",
        action="store_true",
        help="run the commands (pipe:) by which its recipe reads data",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
