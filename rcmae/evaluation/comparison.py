"""Objectives trained by one recipe for as many steps, judged side by side.

What a recipe says beside objective and class head is the same for all: network, masks, schedule,
momentum. The class head is four times as wide as the encoder, as published for ViT-B."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
import yaml

from rcmae import config
from rcmae.config import Recipe
from rcmae.data.patterns import flat
from rcmae.errors import Refused
from rcmae.evaluation.knn import knn
from rcmae.evaluation.logistic import logistic
from rcmae.evaluation.probes import FeatureCache
from rcmae.models.build import student_sizes
from rcmae.models.classifier import Classifier
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
NEIGHBOURS = 20  # of k-NN
STRENGTH = 0.01  # of the logistic regression, inverse of the penalty


class TrainingFailed(RuntimeError):
    """A training ended with an error; says which, and where it tells why."""


@dataclass(frozen=True)
class Comparison:
    """What is compared."""

    recipe: str  # a file, or the name of a shipped one
    overrides: Sequence[str]  # key=value, for all
    objectives: Sequence[str]  # some of OBJECTIVES, or MODULE:NAME with its default options
    seeds: Sequence[int]
    runs: Path  # the folder of the runs
    classes: int  # of the training images

    def overrides_of(self, name: str) -> list[str]:
        """What the recipe gets for an objective. Raises Refused."""
        given = [*self.overrides, *OBJECTIVES.get(name, [f"objective.name={name}"])]
        if name in LABELLED:
            width = student_sizes(config.load(self.recipe, given).model).embed_dim
            given += [f"model.num_classes={self.classes}", f"model.class_hidden={4 * width}"]
        return given

    def folder(self, name: str, seed: int) -> Path:
        """Where a run lives."""
        return self.runs / f"{name.replace(':', '.')}-s{seed}"


def is_finished(run: Path) -> bool:
    """Whether a run came to its end."""
    return _outcome(run).get("exit_status") == 0


def _outcome(run: Path) -> dict[str, Any]:
    try:
        found = json.loads((run / "outcome.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def train_all(compared: Comparison, tell: Callable[[str], None] = lambda text: None) -> None:
    """Every run that is not finished, one after the other, seed by seed.

    Raises:
        Refused: a recipe is wrong.
        TrainingFailed: one failed.
    """
    for seed in compared.seeds:
        for name in compared.objectives:
            run = compared.folder(name, seed)
            if is_finished(run):
                continue
            log = run.with_name(f"{run.name}.log")
            tell(f"training {run}, which says so in {log}")
            own = [f"run.seed={seed}", f"data.seed={seed}", f"run.dir={run}"]
            words = [compared.recipe, *compared.overrides_of(name), *own]
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as out:
                command = [sys.executable, "-m", "rcmae.train", *words]
                done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT)
            if done.returncode:
                raise TrainingFailed(f"{run} ended with {done.returncode}; see {log}")


# ------------------------------------------------------------------------------------------- judged


def rows_of(compared: Comparison) -> Iterator[dict[str, Any]]:
    """A row for each network of each finished run, and for the random network of each seed.

    Raises:
        Refused: a run cannot be judged.
        CheckpointError: a checkpoint is damaged.
    """
    for seed in compared.seeds:
        there = [name for name in compared.objectives if is_finished(compared.folder(name, seed))]
        for name in there:
            run = compared.folder(name, seed)
            recipe = _recipe_of(run)
            networks: tuple[Which, ...] = ("student",)
            if recipe.objective.teacher_outputs:
                networks = ("student", "teacher")
            for network in networks:
                model = load_encoder(run, network=network)
                row = {"objective": name, "seed": seed, "network": network}
                row["steps"] = _outcome(run)["step"]
                yield row | judged(model, recipe, compared.runs / "features")
            if name == there[0]:
                model.draw_weights(torch.Generator().manual_seed(seed))
                row = {"objective": "random", "seed": seed, "network": "student", "steps": 0}
                yield row | judged(model, recipe, compared.runs / "features")


def _recipe_of(run: Path) -> Recipe:
    try:
        return config.stored(yaml.safe_load((run / "recipe.yaml").read_text()))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, pydantic.ValidationError) as error:
        raise Refused(f"{run} is no run's folder: {error}") from error


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


# --------------------------------------------------------------------------------------------- told


def markdown(rows: Sequence[Mapping[str, Any]], costs: Mapping[str, Mapping[str, float]]) -> str:
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
    for name in dict.fromkeys([*costs, *(row["objective"] for row in rows)]):
        of_objective = [row for row in rows if row["objective"] == name]
        cells = [name, "yes" if name in LABELLED else "no"]
        for figure in ("knn", "logistic"):
            for network in ("student", "teacher"):
                values = [row[figure] for row in of_objective if row["network"] == network]
                cells.append(_spread(values))
        cells += _paid(costs.get(name))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    """Mean and all values."""
    each = [f"{value:.1f}" for value in values]
    if len(values) < 2:
        return " ".join(each) or "-"
    return f"{statistics.mean(values):.1f} ({', '.join(each)})"


def _paid(cost: Mapping[str, float] | None) -> list[str]:
    """Seconds and MiB of a step."""
    if cost is None:
        return ["-", "-"]
    mebibytes = (cost["state_bytes"] + cost["step_bytes"]) / 2**20
    return [f"{cost['cpu_s']:.3f}", f"{mebibytes:.0f}"]
