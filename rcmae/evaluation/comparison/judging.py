"""How good the encoders of compared runs are: k-NN and logistic regression on their features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rcmae import config
from rcmae.data.patterns import flat
from rcmae.errors import Refused
from rcmae.evaluation.comparison.runs import Group, Run
from rcmae.evaluation.knn import knn
from rcmae.evaluation.logistic import logistic
from rcmae.evaluation.probes import FeatureCache
from rcmae.models.classifier import Classifier
from rcmae.weights.encoder import load_encoder
from rcmae.weights.layouts import Which

NEIGHBOURS = 20  # of k-NN
STRENGTH = 0.01  # of the logistic regression, inverse of the penalty


class Judging(NamedTuple):
    """On which labelled images encoders are judged."""

    train: Sequence[str]  # patterns of shards
    test: Sequence[str]
    cache: Path  # a folder for features


def judging_of(
    groups: Sequence[Group], given: Sequence[str], cache: Path, *, allow_pipe: bool
) -> Judging:
    """The labelled shards that the runs' recipes name, or those of the command line.

    Args:
        groups: the runs.
        given: evaluate.train_shards=..., evaluate.test_shards=... of the command line.
        cache: a folder for features.
        allow_pipe: whether a command (pipe:) of a recipe may run.

    Raises:
        Refused: there are none, or runs name different ones.
    """
    keys = dict(item.partition("=")[::2] for item in given)
    unknown = sorted(set(keys) - {"evaluate.train_shards", "evaluate.test_shards"})
    if unknown:
        raise Refused(
            f"{', '.join(unknown)}: finished runs take evaluate.train_shards and "
            "evaluate.test_shards alone"
        )
    found: dict[str, Judging] = {}
    for run in [run for group in groups for run in group.runs]:
        own = {
            "evaluate.train_shards": run.recipe.evaluate.train_shards,
            "evaluate.test_shards": run.recipe.evaluate.test_shards,
        }
        if not allow_pipe:
            config.without_pipes(own, str(run.folder / "recipe.yaml"), keys)
        train, test = [flat(shards) for shards in (own | keys).values()]
        if train and test:
            found.setdefault(str((train, test)), Judging(train, test, cache))
    if len(found) != 1:
        which = "different" if found else "no"
        raise Refused(
            f"the runs' recipes name {which} labelled shards; give "
            "evaluate.train_shards=... evaluate.test_shards=..."
        )
    return next(iter(found.values()))


def rows_of(groups: Sequence[Group], judging: Judging) -> Iterator[dict[str, Any]]:
    """A row for each network of each run, and for the random network of each seed.

    Raises:
        Refused: a run cannot be judged.
        CheckpointError: a checkpoint is damaged.
    """
    seeds = dict.fromkeys(run.seed for group in groups for run in group.runs)
    for seed in seeds:
        has_random = False
        for group in groups:
            for run in group.runs:
                if run.seed != seed:
                    continue
                yield from _of_run(group.name, run, judging)
                if not has_random:
                    yield _of_random(run, judging)
                    has_random = True


def _of_run(name: str, run: Run, judging: Judging) -> Iterator[dict[str, Any]]:
    has_teacher = bool(run.recipe.objective.teacher_outputs)
    networks: tuple[Which, ...] = ("student", "teacher") if has_teacher else ("student",)
    for network in networks:
        row = {"objective": name, "seed": run.seed, "network": network, "steps": run.steps}
        yield row | judged(load_encoder(run.folder, network=network), judging)


def _of_random(run: Run, judging: Judging) -> dict[str, Any]:
    model = load_encoder(run.folder)
    model.draw_weights(torch.Generator().manual_seed(run.seed))
    row = {"objective": "random", "seed": run.seed, "network": "student", "steps": 0}
    return row | judged(model, judging)


def judged(model: Classifier, judging: Judging) -> dict[str, float]:
    """Top-1 in percent of an encoder's features."""
    features = FeatureCache(model, judging.cache)
    train = features.features(judging.train)
    test = features.features(judging.test)
    classes = 1 + int(max(train.labels.max(), test.labels.max()))
    k = min(NEIGHBOURS, len(train.labels))
    return {
        "knn": knn(*train, *test, k=[k], num_classes=classes)[k],
        "logistic": logistic(*train, *test, strength=STRENGTH),
    }
