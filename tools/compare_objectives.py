#!/usr/bin/env python3
"""MAE, RC-MAE and their relatives trained by one recipe for as many steps, judged side by side: how
good, how costly.

    python tools/compare_objectives.py rcmae_cifar10_demo data.shards=... \\
        evaluate.train_shards=... evaluate.test_shards=... --seeds 0 1 2 \\
        --runs runs/compared --json tools/results/objectives_cifar10.json

Trains each objective in turn, seed by seed, in RUNS/OBJECTIVE-sSEED; a run that is finished is
taken as it is, one that was stopped goes on. --no-training judges what is there. What a recipe says
beside objective and class head is the same for all: network, masks, schedule, momentum. The class
head is four times as wide as the encoder, as published for ViT-B. SupMAE and RC-SupMAE are told the
labels of the training images while they pretrain; the others are not.

Features: the mean of the patches of the whole image, of the student and, where there is one, of the
teacher; k-NN (20 neighbours) and logistic regression (L-BFGS on standardised features,
tools/probes.py) on the recipe's labelled shards. "random" is the network as it was drawn. Costs: in
this process, a step of each objective in turn, round after round, seconds of the processor (not of
the clock: other work on the machine does not count); bytes of live tensors. Exit status: 0 done; 1
a training failed; 2 the input is wrong.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml

from rcmae import config
from rcmae.checkpoint import CheckpointError
from rcmae.config import Recipe
from rcmae.data.index import ShardIndex
from rcmae.data.patterns import flat
from rcmae.engines.build import make_engine
from rcmae.errors import Refused
from rcmae.evaluation.knn import knn
from rcmae.evaluation.logistic import logistic
from rcmae.evaluation.probes import FeatureCache
from rcmae.models.build import new_student, new_teacher, student_sizes
from rcmae.models.classifier import Classifier
from rcmae.objectives import make_objective
from rcmae.planning.hardware import commit, hardware
from rcmae.planning.live import made_up_batch, measure
from rcmae.run.folder import versions
from rcmae.weights.encoder import load_encoder
from rcmae.weights.layouts import Which

OBJECTIVES = {
    "mae": ["objective.name=mae"],
    "rcmae": ["objective.name=rcmae"],
    "supmae": ["objective.name=supmae"],
    "rcsupmae": ["objective.name=rcmae", "objective.terms={class: 0.01}"],
    "bootmae": ["objective.name=bootmae"],
}
LABELLED = ("supmae", "rcsupmae")  # trained with labels
NEIGHBOURS, STRENGTH = 20, 0.01  # of k-NN; of the logistic regression, inverse of the penalty
ROUNDS = 20  # of the timing


def overrides_of(name: str, asked: argparse.Namespace) -> list[str]:
    """What an objective sets over the recipe."""
    given = [*asked.overrides, *OBJECTIVES[name]]
    if name in LABELLED:
        width = student_sizes(config.load(asked.recipe, given).model)["embed_dim"]
        given += [f"model.num_classes={asked.classes}", f"model.class_hidden={4 * width}"]
    return given


def folder(asked: argparse.Namespace, name: str, seed: int) -> Path:
    """Where a run lives."""
    return Path(asked.runs) / f"{name}-s{seed}"


def finished(run: Path) -> bool:
    """Whether a run came to its end."""
    try:
        return bool(json.loads((run / "outcome.json").read_text())["exit_status"] == 0)
    except (OSError, ValueError, KeyError):
        return False


def train_all(asked: argparse.Namespace) -> None:
    """Every run that is not finished, one after the other, seed by seed.

    Raises:
        RuntimeError: one failed.
    """
    for seed in asked.seeds:
        for name in asked.objectives:
            run = folder(asked, name, seed)
            if finished(run):
                continue
            log = run.with_suffix(".log")
            print(f"training {run}, which says so in {log}", file=sys.stderr, flush=True)
            given = [
                *overrides_of(name, asked),
                f"run.seed={seed}",
                f"data.seed={seed}",
                f"run.dir={run}",
            ]
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as out:
                command = [sys.executable, "-m", "rcmae.train", asked.recipe, *given]
                done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT)
            if done.returncode:
                raise RuntimeError(f"{run} ended with {done.returncode}; see {log}")


# ------------------------------------------------------------------------------------------- judged


def judged(model: Classifier, recipe: Recipe, cache: Path) -> dict[str, float]:
    """Top-1 in percent of an encoder's features."""
    features = FeatureCache(model, cache)
    train = features.features(flat(recipe.evaluate.train_shards))
    test = features.features(flat(recipe.evaluate.test_shards))
    classes = 1 + int(max(train.labels.max(), test.labels.max()))
    k = min(NEIGHBOURS, len(train.labels))
    return {
        "knn": knn(*train, *test, k=[k], num_classes=classes)[k],
        "logistic": logistic(*train, *test, strength=STRENGTH),
    }


def rows_of(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each network of each finished run, and for the random network of each seed."""
    for seed in asked.seeds:
        there = [name for name in asked.objectives if finished(folder(asked, name, seed))]
        for name in there:
            run = folder(asked, name, seed)
            recipe = config.stored(yaml.safe_load((run / "recipe.yaml").read_text()))
            networks: tuple[Which, ...] = ("student", "teacher")
            for network in networks[: 2 if recipe.objective.teacher_parts else 1]:
                model = load_encoder(run, network=network)
                steps = json.loads((run / "outcome.json").read_text())["step"]
                row = {"objective": name, "seed": seed, "network": network, "steps": steps}
                yield row | judged(model, recipe, Path(asked.runs) / "features")
            if name == there[0]:
                model.draw_weights(torch.Generator().manual_seed(seed))
                row = {"objective": "random", "seed": seed, "network": "student", "steps": 0}
                yield row | judged(model, recipe, Path(asked.runs) / "features")


# -------------------------------------------------------------------------------------------- costs


def costs(asked: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Of each objective: processor seconds of a step, and bytes of its state and, at the most,
    of a step above that.
    """
    recipes = {
        name: config.load(asked.recipe, overrides_of(name, asked)) for name in asked.objectives
    }
    found: dict[str, dict[str, float]] = {}
    steps = {}
    for name, recipe in recipes.items():
        recipe.engine.name, recipe.engine.config = "local", None
        bytes_ = measure(recipe)
        found[name] = {
            "state_bytes": bytes_["ready"],
            "step_bytes": bytes_["peak"] - bytes_["ready"],
        }
        steps[name] = step_of(recipe)
    seconds: dict[str, list[float]] = {name: [] for name in recipes}
    for _ in range(asked.rounds + 1):  # the first warms up
        for name, step in steps.items():
            begin = time.process_time()
            next(step)
            seconds[name].append(time.process_time() - begin)
    for name, all_ in seconds.items():
        low, middle, high = (
            statistics.quantiles(all_[1:], n=4) if asked.rounds > 1 else [all_[1]] * 3
        )
        found[name] |= {"cpu_s": middle, "cpu_s_q1": low, "cpu_s_q3": high}
    return found


def step_of(recipe: Recipe) -> Iterator[None]:
    """Training steps on noise, one at each call."""
    sizes = config.resolve(recipe, world=1, samples_per_epoch=recipe.batch.images)
    objective, student = make_objective(recipe, sizes), new_student(recipe)
    engine = make_engine(
        recipe, sizes, student, new_teacher(student, objective.teacher_outputs), {}
    )
    batch = made_up_batch(student, sizes.per_device, torch.device("cpu"))
    counts = objective.counts(batch)
    while True:
        for micro in range(sizes.accumulation):
            sums = objective(engine.student, engine.teacher, batch, 0.5)
            shares = [
                weight * sums[term] / max(counts[term], 1)
                for term, weight in objective.weights.items()
            ]
            engine.backward(torch.stack(shares).sum(), last=micro == sizes.accumulation - 1)
        engine.step(lr=1e-4, weight_decay=0.05)
        engine.update_teacher(0.99)
        yield


# --------------------------------------------------------------------------------------------- told


def spread(values: Sequence[float]) -> str:
    """Mean and all values."""
    if len(values) < 2:
        return " ".join(f"{value:.1f}" for value in values) or "-"
    return f"{statistics.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"


def table(told: dict[str, Any]) -> str:
    """The figures as Markdown: a row an objective, seeds in parentheses."""
    titles = (
        "objective",
        "labels",
        "k-NN, student",
        "k-NN, teacher",
        "linear, student",
        "linear, teacher",
        "s a step",
        "MiB a step",
    )
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in dict.fromkeys([*told["costs"], *(row["objective"] for row in told["rows"])]):
        cells = [
            spread(
                [
                    row[figure]
                    for row in told["rows"]
                    if (row["objective"], row["network"]) == (name, network)
                ]
            )
            for figure in ("knn", "logistic")
            for network in ("student", "teacher")
        ]
        paid = ["-", "-"]
        if cost := told["costs"].get(name):
            paid = [
                f"{cost['cpu_s']:.3f}",
                f"{(cost['state_bytes'] + cost['step_bytes']) / 2**20:.0f}",
            ]
        lines.append(
            f"| {name} | {'yes' if name in LABELLED else 'no'} | {' | '.join([*cells, *paid])} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
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
        help="as rcmae.train takes them, for all",
    )
    parser.add_argument("--runs", default="runs/compared", metavar="FOLDER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of the timing ({ROUNDS})")
    parser.add_argument(
        "--no-training", action="store_true", help="judge the runs that are finished"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    asked = parser.parse_intermixed_args(arguments)
    try:
        recipe = config.load(asked.recipe, asked.overrides)
        if not (recipe.evaluate.train_shards and recipe.evaluate.test_shards):
            raise Refused("give evaluate.train_shards and evaluate.test_shards, both labelled")
        asked.classes = 1 + int(ShardIndex.open(recipe.data.shards).labels.max())
        if asked.rounds < 1:
            raise Refused("--rounds wants 1 or more")
        if not asked.no_training:
            train_all(asked)
        words = sys.argv[1:] if arguments is None else arguments
        told = {
            "tool": "compare_objectives",
            "commit": commit(),
            "versions": versions(),
            "command": " ".join(["python tools/compare_objectives.py", *words]),
            "hardware": hardware(torch.device("cpu")),
            "neighbours": NEIGHBOURS,
            "strength": STRENGTH,
            "rows": list(rows_of(asked)),
            "costs": costs(asked),
        }
    except (ValueError, RuntimeError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    if asked.json is not None:
        asked.json.write_text(json.dumps(told, indent=1) + "\n")
    print(table(told))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
