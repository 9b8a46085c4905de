"""`rcmae train` and its relatives: their arguments, and a recipe that is wrong refused before torch
is imported.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rcmae.run.command import Command

if TYPE_CHECKING:
    from rcmae.run.preempt import StopRequest

LAUNCHER_S = 5.0  # that a launcher is given to end the ranks beside one that has failed
RECIPES = Path(__file__).parents[1] / "recipes"
ABOUT = {
    "train": "Pretrain by a recipe: masked autoencoding, with a teacher where the objective has "
    "one.",
    "finetune": "Fine-tune a pretrained encoder on labelled shards, by a recipe.",
    "probe": "Train a linear head on a frozen encoder, by a recipe.",
    "detect": "Train a detector of boxes and masks on annotated shards, and judge it, by a recipe.",
    "segment": "Train a segmenter, a class for each pixel, on shards with maps, by a recipe.",
}
HELP = """{about}

    rcmae {name} RECIPE [key=value ...]
        one process
    torchrun --no-python rcmae {name} RECIPE ...
        or srun rcmae {name}, or deepspeed --module rcmae.{name}

The same command on the same run.dir resumes from the newest complete checkpoint. Exit status: 0
finished; 75 stopped on request with a checkpoint committed (run it again); 2 the user's input is
wrong; 1 anything else.
"""


def train(arguments: Sequence[str] | None = None) -> int:
    """Pretrain; the exit status of this rank."""
    return _run("train", "pretrain", arguments)


def finetune(arguments: Sequence[str] | None = None) -> int:
    """Fine-tune; the exit status of this rank."""
    return _run("finetune", "finetune", arguments)


def probe(arguments: Sequence[str] | None = None) -> int:
    """Train a linear head; the exit status of this rank."""
    return _run("probe", "probe", arguments)


def detect(arguments: Sequence[str] | None = None) -> int:
    """Train a detector; the exit status of this rank."""
    return _run("detect", "detect", arguments)


def segment(arguments: Sequence[str] | None = None) -> int:
    """Train a segmenter; the exit status of this rank."""
    return _run("segment", "segment", arguments)


class _Parser(argparse.ArgumentParser):
    """Says of an option that is none how keys are given."""

    def error(self, message: str) -> NoReturn:
        """End the process as wrong input."""
        if "unrecognized arguments" in message:
            message += "; keys have no dashes: batch.images=64 (rcmae recipe --keys lists them)"
        super().error(message)


def _run(name: str, task: str, arguments: Sequence[str] | None) -> int:
    from rcmae.train import main as run  # it imports what is heavy once the recipe is right

    return run(arguments, task, prog=f"rcmae {name}")


def shipped(name: str) -> str:
    """The shipped recipes of a command, by their names."""
    tasks = ("finetune", "probe", "detect", "segment")
    names = [path.stem for path in sorted(RECIPES.glob("*.yaml"))]
    if name in tasks:
        mine = [each for each in names if each.startswith(name)]
    else:
        mine = [each for each in names if not each.startswith(tasks)]
    text = textwrap.fill(", ".join(mine), 96, initial_indent="  ", subsequent_indent="  ")
    return (
        f"shipped recipes (`rcmae recipe NAME` shows one, `rcmae recipe --keys` every key):\n{text}"
    )


def parse(arguments: Sequence[str] | None, prog: str) -> Command:
    """Recipe, overrides and options of a command line; takes what launchers add.

    Args:
        arguments: None for those of this process.
        prog: the command as the user gave it; its last word is its name.
    """
    name = prog.replace(".", " ").split()[-1]
    parser = _Parser(
        prog=prog,
        description=HELP.format(name=name, about=ABOUT[name]),
        epilog=shipped(name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="set a recipe key, such as batch.images=256",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--check",
        action="store_true",
        help="say whether the run can start, and print the recipe with all that follows from it",
    )
    only.add_argument(
        "--evaluate-only",
        action="store_true",
        help="evaluate the newest checkpoint of run.dir (or the first weights), and train nothing",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="set run.seed and data.seed; rcmae compare groups runs that differ in these alone",
    )
    parser.add_argument("--deepspeed", action="store_true", help="use the DeepSpeed engine")
    parser.add_argument(
        "--deepspeed_config", metavar="FILE", help="DeepSpeed's JSON; implies --deepspeed"
    )
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help="set by launchers; the environment is used"
    )
    args = parser.parse_intermixed_args(arguments)
    overrides = list(args.overrides)
    if args.seed is not None:
        overrides += _seeds(parser, args.seed, overrides)
    if args.deepspeed or args.deepspeed_config:
        overrides.append("engine.name=deepspeed")
    if args.deepspeed_config:
        overrides.append(f"engine.config={args.deepspeed_config}")
    return Command(
        args.recipe, tuple(overrides), check=args.check, evaluate_only=args.evaluate_only
    )


def refused(asked: Command, task: str, stop: StopRequest) -> bool:
    """Whether the recipe is wrong, which is then told on stderr: a matter of a moment, without
    torch. Where it is right, the process that readers are forked from begins to import.

    Of a process alone, and of ranks whose launcher ends them all with the first that fails: rank 0
    says it, and the others wait for their end. Elsewhere ranks look at a recipe together, and would
    wait for one that left.
    """
    from rcmae import config
    from rcmae.data.workers import serve_readers
    from rcmae.errors import Refused
    from rcmae.process import launchers, leaving

    rank = 0
    try:
        found = launchers.launched()
        if found.world > 1 and not launchers.ends_all(found):
            return False
        rank = found.rank
        recipe = config.load(asked.recipe, asked.overrides, task=task)
        if found.world == 1 and recipe.data.workers and not asked.check:
            serve_readers()
    except Refused as error:
        if rank > 0:
            return _is_ended(stop)
        leaving.tell_launcher(str(error))
        print(f"rcmae: {error}", file=sys.stderr)
        return True
    return False


def _is_ended(stop: StopRequest) -> bool:
    """Wait for the launcher to end this rank. False: it does not, so that rank 0 reads something
    else, and says what differs.
    """
    end = time.monotonic() + LAUNCHER_S
    while time.monotonic() < end:
        if stop.reason is not None:
            return True
        time.sleep(0.05)
    return False


def _seeds(parser: argparse.ArgumentParser, seed: int, overrides: Sequence[str]) -> tuple[str, str]:
    """What `--seed` sets; a key that is set twice ends the process as wrong input."""
    keys = ("run.seed", "data.seed")
    for item in overrides:
        if item.partition("=")[0] in keys:
            parser.error(f"--seed {seed} sets {' and '.join(keys)}; leave out {item} or --seed")
    return (f"run.seed={seed}", f"data.seed={seed}")
