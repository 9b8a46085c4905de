"""MAE, RC-MAE and their relatives trained by one recipe for as many steps, judged side by side: how
good, how costly.

    rcmae compare rcmae_cifar10_demo data.shards=... \\
        evaluate.train_shards=... evaluate.test_shards=... --seeds 0 1 2 \\
        --runs runs/compared --json compared.json

Trains each objective in turn, seed by seed, in RUNS/OBJECTIVE-sSEED; a run that is finished is
taken as it is, one that was stopped goes on. --no-training judges what is there. What a recipe says
beside objective and class head is the same for all: network, masks, schedule, momentum. The class
head is four times as wide as the encoder, as published for ViT-B. SupMAE and RC-SupMAE are told the
labels of the training images while they pretrain; the others are not.

Features: the mean of the patches of the whole image, of the student and, where there is one, of the
teacher; k-NN (20 neighbours) and logistic regression (L-BFGS on standardised features, as rcmae
probes has them) on the recipe's labelled shards. "random" is the network as it was drawn. Costs: in
this process, a step of each objective in turn, round after round, seconds of the processor (not of
the clock: other work on the machine does not count); bytes of live tensors. Exit status: 0 done; 1
a training failed; 2 the input is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rcmae.errors import Refused

OBJECTIVES = ("mae", "rcmae", "supmae", "rcsupmae", "bootmae")
ROUNDS = 20  # of the timing


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    asked = _parser().parse_intermixed_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    from rcmae.checkpoint import CheckpointError
    from rcmae.evaluation.comparison import TrainingFailed, markdown
    from rcmae.files import write_aside

    try:
        told = _compared(asked, " ".join(["rcmae compare", *words]))
        if asked.json is not None:
            write_aside(asked.json, json.dumps(told, indent=1) + "\n")
    except (Refused, TrainingFailed, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, Refused) else 1
    print(markdown(told["rows"], told["costs"]))
    return 0


def _compared(asked: argparse.Namespace, command: str) -> dict[str, Any]:
    """The document of all figures, after the trainings that are wanting."""
    import torch

    from rcmae import config
    from rcmae.data.index import ShardIndex
    from rcmae.evaluation import comparison
    from rcmae.planning.costs import costs
    from rcmae.planning.hardware import commit, hardware
    from rcmae.run.folder import versions

    recipe = config.load(asked.recipe, asked.overrides)
    if not (recipe.evaluate.train_shards and recipe.evaluate.test_shards):
        raise Refused("give evaluate.train_shards and evaluate.test_shards, both labelled")
    if asked.rounds < 1:
        raise Refused("--rounds wants 1 or more")
    compared = comparison.Comparison(
        recipe=asked.recipe,
        overrides=asked.overrides,
        objectives=asked.objectives,
        seeds=asked.seeds,
        runs=asked.runs,
        classes=1 + int(ShardIndex.open(recipe.data.shards).labels.max()),
    )
    if not asked.no_training:
        comparison.train_all(compared, lambda text: print(text, file=sys.stderr, flush=True))
    here = ["engine.name=local", "engine.config=null"]
    recipes = {}
    for name in asked.objectives:
        recipes[name] = config.load(asked.recipe, [*compared.overrides_of(name), *here])
    return {
        "tool": "compare_objectives",
        "commit": commit(),
        "versions": versions(),
        "command": command,
        "hardware": hardware(torch.device("cpu")),
        "neighbours": comparison.NEIGHBOURS,
        "strength": comparison.STRENGTH,
        "rows": list(comparison.rows_of(compared)),
        "costs": costs(recipes, asked.rounds),
    }


def _objective(name: str) -> str:
    if name not in OBJECTIVES and ":" not in name:
        raise argparse.ArgumentTypeError(
            f"{name!r} is none of {', '.join(OBJECTIVES)}, and no MODULE:NAME of your own"
        )
    return name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rcmae compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "recipe",
        help="a YAML file, or the name of a shipped recipe; with labelled evaluate.*_shards",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="as rcmae train takes them, for all",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/compared"), metavar="FOLDER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--objectives",
        nargs="+",
        type=_objective,
        default=list(OBJECTIVES),
        metavar="NAME",
        help=f"of {', '.join(OBJECTIVES)} (all of them), or your own as MODULE:NAME",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of the timing ({ROUNDS})")
    parser.add_argument(
        "--no-training", action="store_true", help="judge the runs that are finished"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return parser
