"""What fine-tuning and probing share: labels, weights to start from, scores on the test set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rcmae import dist
from rcmae.config import Recipe
from rcmae.data.augment import Mixing
from rcmae.data.index import ShardIndex
from rcmae.data.sets import ClassList, Labelled, class_problems, met, moved, names_given
from rcmae.data.stream import refuse_unlabelled
from rcmae.errors import Refused
from rcmae.evaluation.confusion import confusion_picture
from rcmae.evaluation.features import evaluating
from rcmae.evaluation.scores import Scores, classify, scores_table
from rcmae.models import kernels
from rcmae.models.build import classifier_sizes
from rcmae.models.classifier import Classifier
from rcmae.models.fitting import fit_weights
from rcmae.tasks import start
from rcmae.tasks.following import sizes_told
from rcmae.tasks.protocol import Data, Ended, Evaluated, Evaluating, EvaluationSet, Judgement, Saved
from rcmae.weights.reading import NetworkWeights
from rcmae.weights.starting import function_problems, start_notes

USUAL_CLASSES = 1000  # for a plan made before the labels are seen


class Found(NamedTuple):
    """What rank 0 read for a task that classifies."""

    init: str | None  # where its weights are, for good: a checkpoint, not the run it is of
    weights: NetworkWeights | None  # their shapes
    class_names: tuple[str, ...]


def look_at_classes(recipe: Recipe, saved: Saved | None, *, always: bool) -> Found:
    """The names of the classes, and the weights to start from. One process.

    Args:
        always: whether a run that resumes reads its first weights, too (a probe's encoder).

    Raises:
        Refused: they cannot be read.
    """
    options = recipe.classify
    init = options.init
    if saved is not None and saved.is_own:
        before = saved.meta["recipe"].get("classify", {}).get("init")
        init = before if init is None or same_source(init, before) else init
    elif init is not None:
        init = str(start.newest_of(Path(init)))
    weights = None
    if init is not None and (always or saved is None):
        weights = start.look_at("classify.init", init, options.network, first="teacher")
    return Found(init, weights, names_given("classify.class_names", options.class_names))


def same_source(asked: str, chosen: str | None) -> bool:
    """Whether an earlier job's choice is a checkpoint of the run that is asked for now."""
    if chosen is None:
        return False
    return asked == chosen or Path(chosen).parent == Path(asked) / "checkpoints"


def judge_classes(
    recipe: Recipe, found: Found | None, data: Data, saved: Saved | None, world: int
) -> Judgement:
    """What stands against these labels; fills in the weights' place and the number of classes."""
    judgement = Judgement()
    if found is not None:
        judgement.values["classify.init"] = found.init
    index = data.train
    if index is None:
        return judgement
    try:
        refuse_unlabelled(index)
    except Refused as error:
        judgement.problems.append(f"data.shards: {error}")
        return judgement
    num_classes = recipe.classify.num_classes
    if num_classes is None and saved is not None and saved.is_own:
        num_classes = saved.meta["recipe"].get("classify", {}).get("num_classes")
    if num_classes is None:
        num_classes = 1 + int(index.labels.max())
    judgement.values["classify.num_classes"] = num_classes
    judgement.problems += label_problems(num_classes, index, data.sets)
    judge_sets(recipe, found, data, judgement)
    per_rank = recipe.batch.images // recipe.data.repeats // world
    if mixing_of(recipe).is_on and per_rank % 2:
        judgement.problems.append(
            f"batch.images={recipe.batch.images} over {world} ranks is an odd number of samples, "
            "and images are mixed in pairs of a rank; use an even number a rank, or "
            "classify.mixup=0 classify.cutmix=0"
        )
    return judgement


def judge_sets(recipe: Recipe, found: Found | None, data: Data, judgement: Judgement) -> None:
    """Add what stands against judging a classifier of data.shards on the test set, and whether
    names of classes are theirs; fills in their file.
    """
    assert data.train is not None
    train = Labelled("data.shards", data.train, data.classes)
    judgement.problems += class_problems([train])
    for index, classes in zip(data.sets, data.set_classes, strict=False):
        meeting = met(train, Labelled("evaluate.test_shards", index, classes))
        judgement.problems += [told for told in meeting.problems if told not in judgement.problems]
        judgement.warnings += meeting.warnings
    if found is not None and found.class_names:
        given = ClassList(str(recipe.classify.class_names), tuple(found.class_names))
        for beside in data.classes[:1]:
            if told := moved(beside, given):
                judgement.problems.append(f"classify.class_names: {told}")
    elif data.classes and "://" not in data.classes[0].where:
        judgement.values["classify.class_names"] = data.classes[0].where


def label_problems(num_classes: int, train: ShardIndex, sets: Sequence[ShardIndex]) -> list[str]:
    """Labels that lie outside the classes, and classes that only the test set has."""
    problems = []
    present = set(train.labels.tolist())
    named = [("data.shards", train), *(("evaluate.test_shards", each) for each in sets)]
    for name, index in named:
        labels = set(index.labels.tolist())
        outside = sorted(label for label in labels if not 0 <= label < num_classes)
        if outside:
            problems.append(
                f"{name}: labels {shown(outside)} lie outside classify.num_classes={num_classes} "
                f"(0 to {num_classes - 1}); set it, or give other shards"
            )
        new = sorted(labels - present - set(outside))
        if new:
            count = sum(index.labels.tolist().count(label) for label in new[:50])
            problems.append(
                f"{name}: classes {shown(new)} ({count} images) are none of data.shards', so "
                "nothing can learn them; give test shards of the same classes"
            )
    return problems


def shown(numbers: Sequence[int]) -> str:
    """The first of some numbers."""
    return ", ".join(map(str, numbers[:10])) + " ..." * (len(numbers) > 10)


def test_set(recipe: Recipe) -> Sequence[EvaluationSet]:
    """What an evaluation reads."""
    if not recipe.evaluate.every_steps:
        return []
    return [EvaluationSet("evaluate.test_shards", recipe.evaluate.test_shards)]


def mixing_of(recipe: Recipe) -> Mixing:
    """Mixup and CutMix of a recipe."""
    options = recipe.classify
    return Mixing(options.mixup, options.cutmix, options.mix_probability, options.mix_switch)


def new_classifier(recipe: Recipe, num_classes: int) -> Classifier:
    """The classifier of a recipe with the weights of `run.seed`, the same on every rank."""
    model = Classifier(
        classifier_sizes(recipe.model),
        num_classes=num_classes,
        pool=recipe.classify.pool,
        drop_path=recipe.classify.drop_path,
        norm_layer=kernels.layer_norm(recipe.engine.layer_norm),
    )
    model.draw_weights(torch.Generator().manual_seed(recipe.run.seed))
    return model


def fit(recipe: Recipe, found: Found | None, num_classes: int) -> tuple[list[str], list[str]]:
    """What keeps the weights from fitting the classifier, by their shapes and what lies beside
    them; and what is taken of them, for a new run.
    """
    try:
        sizes = classifier_sizes(recipe.model)
        with torch.device("meta"):
            model = Classifier(sizes, num_classes=num_classes, pool=recipe.classify.pool)
    except Refused as error:
        return [str(error)], []
    if found is None or found.weights is None:
        return [], []
    source = found.weights
    where = f"classify.init={recipe.classify.init}"
    try:
        fitted = fit_weights(model, source.weights, source.grid)
    except Refused as error:
        way = sizes_told(source, recipe.task.name)
        return [f"{where} with model.name={recipe.model.name}: {error}{way}"], []
    problems = [f"{where}: {problem}" for problem in function_problems(source, sizes)]
    return problems, start_notes(source, sizes, fitted.table().strip(), where)


def start_weights(model: Classifier, recipe: Recipe) -> str:
    """Put the weights of `classify.init` into the model; a table of what was taken. Collective.

    Raises:
        Refused: on every rank; they cannot be read.
    """
    init = recipe.classify.init
    if init is None:
        return "weights of run.seed: classify.init names none"
    network = recipe.classify.network
    source = start.read_together("classify.init", init, network, first="teacher")
    fit = fit_weights(model, source.weights, source.grid)
    return f"{source.about}\n{fit.table()}"


def judged(context: Evaluating, networks: Mapping[str, Callable[[Tensor], Tensor]]) -> Evaluated:
    """How good classifiers are on the test set. Collective: every rank calls.

    Args:
        networks: name -> normalised images to scores; "student" is among them.
    """
    recipe = context.recipe
    num_classes = recipe.classify.num_classes
    assert num_classes is not None
    rows = {}
    with evaluating(context.student, context.teacher):
        for name, network in networks.items():
            rows[name] = classify(
                network,
                context.batches(0),
                num_classes=num_classes,
                device=context.device,
                normalise=context.normalise.images,
            )
    figures = {name: row.figures() for name, row in rows.items()}
    scalars = {}
    for name, row in figures.items():
        scalars[f"scores_{name}"] = {key: value for key, value in row.items() if key != "images"}
    images = rows["student"].images
    names = context.found.class_names if context.found else ()
    first = dist.rank() == 0
    return Evaluated(
        event={"scores": figures},
        table=scores_table(rows),
        caption=f"of {images:,} test images, in %",
        says=f"step {{step}}, {figures['student']['images']} images of the test set",
        scalars=scalars,
        document=document_of(rows, names) if first else None,
        pictures=confusions_of(rows, names, context.step) if first else {},
    )


def document_of(rows: Mapping[str, Scores], names: Sequence[str]) -> dict[str, Any]:
    """The table of classes of each network, for JSON."""
    networks = {}
    for name, row in rows.items():
        networks[name] = {
            **row.figures(),
            "classes": row.classes(names),
            "confused": row.confused(),
        }
    return {"networks": networks}


def confusions_of(
    rows: Mapping[str, Scores], names: Sequence[str], step: int
) -> dict[str, np.ndarray]:
    """What was taken for what, a picture of each network."""
    pictures = {}
    for name, row in rows.items():
        title = f"{name}, step {step}: {row.top1:.1f} % of {row.images:,} test images right"
        pictures[f"confusion-{name}"] = confusion_picture(row.confusion, names, title=title)
    return pictures


def whole_hints(ended: Ended) -> list[tuple[str, str]]:
    """What to do with a classifier that is trained."""
    if not ended.is_done:
        return []
    return [
        (
            "the classifier, for timm (or --format hf)",
            f"rcmae export {ended.place} --format timm --out {ended.file('.safetensors')}",
        )
    ]
