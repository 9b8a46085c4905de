"""Train objectives by one recipe and judge them side by side, or judge runs that are finished: how
good, how costly, as mean and standard deviation over seeds.

    rcmae compare rcmae_cifar10_demo data.shards=... \\
        evaluate.train_shards=... evaluate.test_shards=... --seeds 0 1 2 --runs runs/compared
    rcmae compare runs/a runs/b runs/c --out compared

The first trains each objective, seed by seed, in RUNS/OBJECTIVE-sSEED. A finished run is not
trained again; a stopped one resumes. --no-training judges what is there. Network, masks, schedule
and momentum are the recipe's, the same for all objectives. The class head is four times as wide as
the encoder, as published for ViT-B. SupMAE and RC-SupMAE see the labels of the training images; the
others do not.

The second takes the folders of finished runs. Runs whose recipes differ in run.seed and data.seed
alone are one row. To train one of them: rcmae train RECIPE --seed N run.dir=...

Writes to --out: table.md, table.tex and curves.png, which has each term of the loss and each
evaluation over the steps, a line an objective.

Features: the mean of the patches of the whole image, of the student and, where there is one, of the
teacher; k-NN (20 neighbours) and logistic regression (L-BFGS on standardised features, as in rcmae
probes) on labelled shards. "random" is the network before training. Costs: a step of each objective
in turn, round after round, in this process: CPU seconds (other work on the machine does not count)
and bytes of live tensors. Exit status: 0 done; 1 a training failed; 2 the input is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rcmae.commands.arguments import add_json, told
from rcmae.errors import Refused, counted

if TYPE_CHECKING:
    from rcmae.config import Recipe
    from rcmae.evaluation.comparison.judging import Judging
    from rcmae.evaluation.comparison.runs import Group

    Compared: TypeAlias = tuple[list[Group], dict[str, Recipe], Judging]

OBJECTIVES = ("mae", "rcmae", "supmae", "rcsupmae", "bootmae")
ROUNDS = 20  # of the timing


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    asked = _parser().parse_intermixed_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    from rcmae.checkpoint import CheckpointError
    from rcmae.evaluation.comparison.runs import TrainingFailed

    try:
        document, written = _compared(asked, " ".join(["rcmae compare", *words]))
        is_told = told(document, asked.json)
    except (Refused, TrainingFailed, CheckpointError, OSError) as error:
        print(f"rcmae: {error}", file=sys.stderr)
        return 2 if isinstance(error, Refused) else 1
    if not is_told:
        print(written["table.md"].read_text(), end="")
    print(f"\nwritten: {', '.join(map(str, written.values()))}", file=sys.stderr)
    return 0


def _compared(asked: argparse.Namespace, command: str) -> tuple[dict[str, Any], dict[str, Path]]:
    """The document of all figures, after the trainings that are missing, and the files written."""
    import torch

    from rcmae.evaluation.comparison import judging
    from rcmae.planning.costs import costs
    from rcmae.planning.hardware import commit, hardware
    from rcmae.run.folder import versions

    if asked.rounds < 0:
        raise Refused(f"--rounds {asked.rounds} is below 0; 0 times no step")
    out = asked.out or asked.runs
    if (Path(asked.recipe) / "recipe.yaml").is_file():
        groups, recipes, judged = _of_folders(asked, out)
    else:
        groups, recipes, judged = _of_recipe(asked)
    if groups:
        _tell(f"judging {counted(sum(len(group.runs) for group in groups), 'run')}")
    rows = list(judging.rows_of(groups, judged))
    if asked.rounds:
        _tell(f"timing {counted(asked.rounds, 'step')} of each of {', '.join(recipes)}")
    document = {
        "tool": "compare_objectives",
        "commit": commit(),
        "versions": versions(),
        "command": command,
        "hardware": hardware(torch.device("cpu")),
        "neighbours": judging.NEIGHBOURS,
        "strength": judging.STRENGTH,
        "rows": rows,
        "costs": costs(recipes, asked.rounds) if asked.rounds else {},
    }
    return document, _write(document, groups, out)


def _of_recipe(asked: argparse.Namespace) -> Compared:
    """Objectives of one recipe: trained, then read. Raises Refused, TrainingFailed."""
    from rcmae import config
    from rcmae.data.index import ShardIndex
    from rcmae.data.patterns import flat
    from rcmae.evaluation.comparison.judging import Judging
    from rcmae.evaluation.comparison.runs import Comparison, train_all

    recipe = config.load(asked.recipe, asked.overrides)
    if not (recipe.evaluate.train_shards and recipe.evaluate.test_shards):
        raise Refused("give evaluate.train_shards and evaluate.test_shards, both labelled")
    compared = Comparison(
        recipe=asked.recipe,
        overrides=asked.overrides,
        objectives=asked.objectives,
        seeds=asked.seeds,
        runs=asked.runs,
        classes=1 + int(ShardIndex.open(recipe.data.shards).labels.max()),
    )
    if not asked.no_training:
        train_all(compared, _tell)
    recipes = {}
    for name in asked.objectives:
        given = [*compared.overrides_of(name), "engine.name=local", "engine.config=null"]
        recipes[name] = config.load(asked.recipe, given)
    train, test = flat(recipe.evaluate.train_shards), flat(recipe.evaluate.test_shards)
    return compared.groups(), recipes, Judging(train, test, asked.runs / "features")


def _of_folders(asked: argparse.Namespace, out: Path) -> Compared:
    """Runs that are there, grouped by recipe. Raises Refused."""
    from rcmae.evaluation.comparison.judging import judging_of
    from rcmae.evaluation.comparison.runs import grouped, on_one_process

    folders = [asked.recipe, *(word for word in asked.overrides if "=" not in word)]
    groups = grouped([Path(folder) for folder in folders])
    given = [word for word in asked.overrides if "=" in word]
    judged = judging_of(groups, given, out / "features", allow_pipe=asked.allow_pipe)
    recipes = {group.name: on_one_process(group.runs[0].recipe) for group in groups}
    return groups, recipes, judged


def _write(document: dict[str, Any], groups: Sequence[Group], out: Path) -> dict[str, Path]:
    """Write table and curves; the files by name. Raises OSError."""
    from rcmae.evaluation.comparison import curves, tables
    from rcmae.files import write_aside

    labelled = [group.name for group in groups if group.labelled]
    table = tables.table_of(document["rows"], document["costs"], labelled)
    written = {name: out / name for name in ("table.md", "table.tex", "curves.png")}
    out.mkdir(parents=True, exist_ok=True)
    write_aside(written["table.md"], tables.markdown(table) + "\n")
    write_aside(written["table.tex"], tables.latex(table) + "\n")
    curves.draw(groups, written["curves.png"])
    return written


def _tell(text: str) -> None:
    """A line of what goes on, beside the table."""
    print(text, file=sys.stderr, flush=True)


def _objective(name: str) -> str:
    if name not in OBJECTIVES and ":" not in name:
        raise argparse.ArgumentTypeError(
            f"{name!r} is not one of {', '.join(OBJECTIVES)}, nor MODULE:NAME of your own"
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
        metavar="RECIPE_OR_RUN",
        help="a YAML file or the name of a shipped recipe, with labelled evaluate.*_shards; or the "
        "folder of a finished run",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value|RUN",
        help="keys as rcmae train takes them, for all objectives; or more runs",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/compared"),
        metavar="FOLDER",
        help="folder of the runs (runs/compared)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder of table and curves (that of --runs)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="a training each (0 1 2)"
    )
    parser.add_argument(
        "--objectives",
        nargs="+",
        type=_objective,
        default=list(OBJECTIVES),
        metavar="NAME",
        help=f"of {', '.join(OBJECTIVES)} (all of them), or your own as MODULE:NAME",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=ROUNDS,
        help=f"timed steps of each objective ({ROUNDS}); 0: measure no costs",
    )
    parser.add_argument(
        "--no-training", action="store_true", help="train nothing; judge the finished runs"
    )
    parser.add_argument(
        "--allow-pipe", action="store_true", help="run the commands (pipe:) that runs' recipes name"
    )
    add_json(parser)
    return parser
