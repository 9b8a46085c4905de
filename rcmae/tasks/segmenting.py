"""What a segmentation asks before it starts: classes, weights to start from, sizes that fit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from rcmae.config import Recipe
from rcmae.data.dense.crops import Augment, Crops, Labels
from rcmae.data.dense.maps import MAX_CLASSES
from rcmae.data.members.beyond import Numbering, beyond
from rcmae.data.sets import ClassList, names_given, unlike
from rcmae.errors import Refused
from rcmae.models.build import student_sizes
from rcmae.models.fitting import Fit
from rcmae.models.segmentation.build import levels_of, meta_segmenter
from rcmae.models.segmentation.fitting import fit_encoder
from rcmae.models.segmentation.segmenter import Segmenter
from rcmae.tasks import start
from rcmae.tasks.classify import same_source
from rcmae.tasks.following import sizes_told
from rcmae.tasks.protocol import Data, Judgement, Saved
from rcmae.weights.reading import NetworkWeights
from rcmae.weights.segmenters import read_start
from rcmae.weights.starting import function_problems, start_notes

USUAL_CLASSES = 150  # for a plan made before the classes are known: ADE20K's
LEVELS = 4  # of the pyramid


class Found(NamedTuple):
    """What rank 0 read for a segmentation."""

    init: str | None  # where its weights are, for good: a checkpoint, not the run it is of
    weights: NetworkWeights | None  # their shapes
    class_names: tuple[str, ...]


def look_at_classes(recipe: Recipe, saved: Saved | None) -> Found:
    """The names of the classes, and the weights to start from. One process.

    Raises:
        Refused: they cannot be read.
    """
    options = recipe.segment
    init = options.init
    if saved is not None and saved.is_own:
        before = saved.meta["recipe"].get("segment", {}).get("init")
        init = before if init is None or same_source(init, before) else init
    elif init is not None:
        init = str(start.newest_of(Path(init)))
    weights = None
    if init is not None and (options.frozen or saved is None):
        weights = start.look_at(
            "segment.init", init, options.network, first="teacher", read=read_start
        )
    return Found(init, weights, names_given("segment.class_names", options.class_names))


def judge_segmentation(recipe: Recipe, found: Found | None, data: Data) -> Judgement:
    """What stands against these classes, weights and sizes; fills in what follows."""
    judgement = Judgement()
    if found is not None:
        judgement.values["segment.init"] = found.init
    num_classes = judge_names(recipe, found, data, judgement)
    judgement.problems += level_problems(recipe)
    if num_classes is None or judgement.problems:
        return judgement
    judgement.values["segment.num_classes"] = num_classes
    numbering = Numbering(num_classes, recipe.segment.map_zero == "none", "segment")
    judgement.problems += beyond("data.shards", data.numbers, numbering)
    for numbers in data.set_numbers:
        judgement.problems += beyond("evaluate.test_shards", numbers, numbering)
    problems, notes = fit(recipe, found, num_classes)
    judgement.problems += problems
    judgement.notes += notes
    return judgement


def judge_names(
    recipe: Recipe, found: Found | None, data: Data, judgement: Judgement
) -> int | None:
    """The number of classes; adds what stands against the names. None: not known."""
    options = recipe.segment
    given = found.class_names if found is not None else ()
    beside = data.classes[:1]
    if given:
        mine = ClassList(f"segment.class_names={options.class_names}", given)
        told = [unlike(mine, each) for each in beside]
        judgement.problems += [each for each in told if each]
    elif beside and "://" not in beside[0].where:
        judgement.values["segment.class_names"] = beside[0].where
    for tested in (each for lists in data.set_classes for each in lists):
        for each in beside:
            if told_of := unlike(each, tested):
                judgement.problems.append(f"evaluate.test_shards: {told_of}")
    names = given or (beside[0].names if beside else ())
    num_classes = options.num_classes or len(names) or None
    if num_classes is None and data.train is None:  # the shards are a problem already
        return None
    if num_classes is None:
        judgement.problems.append(
            "segment.num_classes: give it, or segment.class_names, or put classes.txt, a name a "
            "line, beside data.shards"
        )
    elif names and num_classes != len(names):
        judgement.problems.append(
            f"segment.num_classes={num_classes}, but {len(names)} classes are named; leave it out"
        )
    elif num_classes > MAX_CLASSES:
        judgement.problems.append(
            f"segment.num_classes={num_classes}: at most {MAX_CLASSES:,} classes are trained"
        )
    return num_classes


def level_problems(recipe: Recipe) -> list[str]:
    """Levels that make no pyramid, and a crop too small for one."""
    try:
        sizes = student_sizes(recipe.model)
    except Refused:  # said with the sizes
        return []
    if recipe.segment.head == "linear":
        return []
    problems = []
    levels = levels_of(recipe)
    rising = all(one < other for one, other in pairwise(levels))
    inside = all(0 <= level < sizes.depth for level in levels)
    if len(levels) != LEVELS or not rising or not inside:
        problems.append(
            f"segment.levels={list(levels)}: wants {LEVELS} blocks in ascending order, from 0 to "
            f"{sizes.depth - 1} of {recipe.model.name}"
        )
    if min(sizes.grid) < 2:
        height, width = sizes.image_size
        problems.append(
            f"segment.crop of {height}x{width} has a grid of {sizes.grid[0]}x{sizes.grid[1]} "
            "patches; the pyramid halves it: use two patches or more a side"
        )
    return problems


def fit(recipe: Recipe, found: Found | None, num_classes: int) -> tuple[list[str], list[str]]:
    """What keeps the weights from fitting the network, by their shapes and what lies beside them;
    and what is taken of them.
    """
    if recipe.segment.frozen and recipe.segment.init is None:
        return ["segment.frozen: a probe needs an encoder; give segment.init"], []
    if found is None or found.weights is None:
        return [], []
    source = found.weights
    where = f"segment.init={recipe.segment.init}"
    try:
        fitted = fit_encoder(meta_segmenter(recipe, num_classes), source.weights, source.grid)
    except Refused as error:
        way = sizes_told(source, recipe.task.name)
        return [f"{where} with model.name={recipe.model.name}: {error}{way}"], []
    sizes = student_sizes(recipe.model)
    problems = [f"{where}: {problem}" for problem in function_problems(source, sizes)]
    return problems, start_notes(source, sizes, fitted.table().strip(), where)


def start_weights(model: Segmenter, recipe: Recipe) -> Fit | None:
    """Put the weights of `segment.init` into the encoder; None where it names none. Collective.

    Raises:
        Refused: on every rank; they cannot be read.
    """
    init = recipe.segment.init
    if init is None:
        return None
    source = start.read_together(
        "segment.init", init, recipe.segment.network, first="teacher", read=read_start
    )
    return fit_encoder(model, source.weights, source.grid)


def crops_of(recipe: Recipe) -> Crops:
    """How training sees an image with its map."""
    options = recipe.segment
    return Crops(
        recipe.model.image_hw,
        labels_of(recipe),
        Augment(
            scale=options.scale,
            max_class_share=options.max_class_share,
            flip=recipe.data.flip,
            distort=options.distort,
            antialias=options.resize == "antialias",
        ),
        in_channels=recipe.model.in_channels,
        max_pixels=recipe.data.max_pixels,
    )


def labels_of(recipe: Recipe) -> Labels:
    """How maps are read."""
    options = recipe.segment
    return Labels(options.num_classes or USUAL_CLASSES, options.map_zero == "none")
