"""What the commands that train by a recipe have in common: their arguments, and a recipe that is
wrong refused before torch is imported.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from rcmae.run.command import Command


def parse(arguments: Sequence[str] | None, prog: str, about: str = "Train by a recipe.") -> Command:
    """Recipe and overrides of a command line; takes what launchers add.

    Args:
        arguments: None for those of this process.
        prog: the command as the user gave it.
        about: the first lines of its help.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="set a recipe key, such as batch.images=256",
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
    if args.deepspeed or args.deepspeed_config:
        overrides.append("engine.name=deepspeed")
    if args.deepspeed_config:
        overrides.append(f"engine.config={args.deepspeed_config}")
    return Command(args.recipe, tuple(overrides))


def refused(asked: Command, task: str) -> bool:
    """Whether the recipe is wrong, which is then told on stderr: a matter of a moment, without
    torch.

    Only of a process alone: ranks look at a recipe together, and would wait for one that left.
    """
    from rcmae import config
    from rcmae.errors import Refused

    if any(key in os.environ for key in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS")):
        return False
    try:
        config.load(asked.recipe, asked.overrides, task=task)
    except Refused as error:
        print(f"rcmae: {error}", file=sys.stderr)
        return True
    return False
