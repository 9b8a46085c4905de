"""Evaluate each checkpoint of a run as it is committed, from a separate job.

    rcmae follow RUN_DIR evaluate.train_shards=... evaluate.test_shards=... [key=value ...]

A pretraining gets k-NN (with evaluate.logistic=true logistic regression, too), a fine-tuning or a
probe the scores of its classifier. Results go to
RUN_DIR/evaluations; checkpoints that have one are skipped. Exit status: 0 the run is finished and
all its checkpoints are evaluated; 75 it is not (run this again); 2 the input is wrong; 1 anything
else.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rcmae.commands.arguments import above_zero, from_zero


class Asked(NamedTuple):
    """A command line that follows a run."""

    run: Path  # its folder
    overrides: list[str]  # key=value, over the run's recipe
    patience_s: float
    poll_s: float
    allow_pipe: bool = False  # run commands by which the run's recipe reads data


def parse(arguments: Sequence[str] | None, prog: str) -> Asked:
    """What a command line asks for.

    Args:
        arguments: None for those of this process.
        prog: the command as the user gave it.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="its run.dir")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="keys set over the run's recipe, such as evaluate.k=5",
    )
    parser.add_argument(
        "--patience-s",
        type=from_zero,
        default=900.0,
        help="give up after the run is silent for this many seconds (900)",
    )
    parser.add_argument(
        "--poll-s", type=above_zero, default=5.0, help="seconds between updates (5)"
    )
    parser.add_argument(
        "--allow-pipe",
        action="store_true",
        help="run the commands (pipe:) by which the run's recipe reads data; those that are given "
        "here run anyway",
    )
    return Asked(**vars(parser.parse_intermixed_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and follow; the exit status of this rank."""
    asked = parse(arguments, "rcmae follow")
    from rcmae.follow import run

    return run(asked)
