"""How a pretraining is judged: k-NN of images and of pixels with labels, spectra and the loss on a
held set without."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from rcmae import dist
from rcmae.config import Recipe
from rcmae.data.dense.crops import Labels
from rcmae.data.dense.maps import MAX_CLASSES
from rcmae.data.masking import Mask
from rcmae.data.members.beyond import Numbering, beyond
from rcmae.data.sets import ClassList, Labelled, class_lists, met, unlike
from rcmae.errors import Refused
from rcmae.evaluation.dense.neighbours import (
    Look,
    Reading,
    fill_bank,
    judge_patches,
    patch_pixels,
    patches,
)
from rcmae.evaluation.dense.scores import Areas, classes_table, finite, named, scores_table
from rcmae.evaluation.features import Extractor, evaluating, features_of_both, pixels, pooled
from rcmae.evaluation.knn import knn_rows, knn_table
from rcmae.evaluation.logistic import logistic_rows
from rcmae.evaluation.unlabelled.held import Held, Looking, Losing, look_at_held
from rcmae.models.build import new_student, student_sizes
from rcmae.tasks.protocol import Data, Evaluated, Evaluating, EvaluationSet, Judgement, Score

TRAIN, TEST = "evaluate.train_shards", "evaluate.test_shards"
DENSE_TRAIN, DENSE_TEST = "evaluate.dense.train_shards", "evaluate.dense.test_shards"
HELD = "evaluate.held_shards"


def sets_of(recipe: Recipe) -> Iterator[EvaluationSet]:
    """The sets that there are, in one order."""
    options = recipe.evaluate
    if not options.every_steps:
        return
    if options.train_shards or options.test_shards:
        yield EvaluationSet(TRAIN, options.train_shards)
        yield EvaluationSet(TEST, options.test_shards)
    if options.dense.train_shards or options.dense.test_shards:
        for key, shards in (
            (DENSE_TRAIN, options.dense.train_shards),
            (DENSE_TEST, options.dense.test_shards),
        ):
            yield EvaluationSet(key, shards, labelled=False, needs=("map",))
    if options.held_shards and options.held_images:
        yield EvaluationSet(HELD, options.held_shards, labelled=False)


def places(recipe: Recipe) -> dict[str, int]:
    """Where each set is among those of the evaluation."""
    return {each.key: number for number, each in enumerate(sets_of(recipe))}


def judge_dense(recipe: Recipe, data: Data, names: tuple[str, ...] = ()) -> Judgement:
    """What stands against the sets of the dense k-NN, and their classes.

    Args:
        recipe: as it is asked for.
        data: its samples.
        names: in evaluate.dense.class_names.
    """
    judgement = Judgement()
    place = places(recipe)
    if DENSE_TRAIN not in place or not data.sets:
        return judgement
    train, test = (
        Labelled(key, data.sets[place[key]], data.set_classes[place[key]])
        for key in (DENSE_TRAIN, DENSE_TEST)
    )
    meeting = met(train, test)
    judgement.problems += meeting.problems
    judgement.warnings += meeting.warnings
    given = recipe.evaluate.dense.num_classes
    lists = [each.names for each in (*train.classes[:1], *test.classes[:1])]
    if names:
        mine = ClassList(f"evaluate.dense.class_names={recipe.evaluate.dense.class_names}", names)
        told = [unlike(mine, each) for each in train.classes[:1]]
        judgement.problems += [each for each in told if each]
        lists = [names]
        if given is not None and given != len(names):
            judgement.problems.append(
                f"evaluate.dense.num_classes={given}, but {len(names)} classes are named; leave it "
                "out"
            )
    if given is None and not lists:
        judgement.problems.append(
            "evaluate.dense.num_classes: give it, or evaluate.dense.class_names, or put "
            "classes.txt, a name a line, beside evaluate.dense.train_shards"
        )
    num_classes = given or max([0, *map(len, lists)])
    if num_classes > MAX_CLASSES:
        judgement.problems.append(
            f"evaluate.dense.num_classes={num_classes}: at most {MAX_CLASSES}"
        )
    rows, columns = student_sizes(recipe.model).grid
    patches = len(train.samples) * rows * columns
    if recipe.evaluate.dense.k > patches:
        judgement.problems.append(
            f"evaluate.dense.k={recipe.evaluate.dense.k} neighbours, and evaluate.dense."
            f"train_shards have {patches:,} patches; use fewer"
        )
    if num_classes:
        judgement.values["evaluate.dense.num_classes"] = num_classes
        numbering = Numbering(
            num_classes, recipe.evaluate.dense.map_zero == "none", "evaluate.dense"
        )
        for key in (DENSE_TRAIN, DENSE_TEST) if data.set_numbers else ():
            judgement.problems += beyond(key, data.set_numbers[place[key]], numbering)
    return judgement


def judged(context: Evaluating, mask: Mask) -> Evaluated:
    """What the features of student and teacher are worth. Collective: every rank calls.

    Args:
        context: of the evaluation.
        mask: that the loss on the held set is computed under.
    """
    options = context.recipe.evaluate
    place = places(context.recipe)
    networks = {"student": pooled(context.student, options.pool)}
    if context.teacher is not None:
        networks["teacher"] = pooled(context.teacher, options.pool)
    # first: a stop request that comes while neighbours are counted loses nothing
    number = place.get(HELD, place.get(TEST))
    held = None
    if number is not None and options.held_images:
        held = held_of(context, networks, mask, number)
    found = Evaluated({}, "", "", "")
    if TRAIN in place:
        found = neighbours(context, networks)
    if DENSE_TRAIN in place:
        found = with_dense(found, context)
    if held is not None:
        found = with_held(found, held)
    return found


def neighbours(context: Evaluating, trained: Mapping[str, Extractor]) -> Evaluated:
    """k-NN of these networks and of what does not train. Collective."""
    options = context.recipe.evaluate
    networks = dict(trained)
    if context.baselines:
        untrained = new_student(context.recipe).to(context.device)
        networks["random"] = pooled(untrained, options.pool)
        networks["pixels"] = pixels
    with evaluating(context.student, context.teacher):
        features = features_of_both(
            networks,
            context.batches(0),
            context.batches(1),
            device=context.device,
            normalise=context.normalise.images,
        )
    device = context.device
    rows = knn_rows(*features, k=options.k, device=device, temperature=options.temperature)
    linear = logistic_rows(*features, device=device) if options.logistic else {}
    scalars: dict[str, dict[str, float]] = {}
    for name, row in rows.items():
        scalars[f"knn_{name}"] = {f"k{k}": accuracy for k, accuracy in row.items()}
    if linear:
        scalars["logistic"] = linear
    return Evaluated(
        event={"knn": rows, "pool": options.pool, **({"logistic": linear} if linear else {})},
        table=knn_table(rows, linear),
        caption="k-NN, top-1 in %",
        says="k-NN at step {step}, top-1 in %",
        scalars=scalars,
        best={name: Score("knn", max(rows[name].values())) for name in trained},
    )


def held_of(
    context: Evaluating, networks: Mapping[str, Extractor], mask: Mask, number: int
) -> Held:
    """Effective ranks and loss on a set. Collective."""
    recipe = context.recipe
    looking = Looking(
        networks,
        context.normalise.images,
        context.device,
        mask=mask,
        teacher_masks=recipe.objective.teacher_sees == "different",
    )
    with evaluating(context.student, context.teacher):
        return look_at_held(
            context.batches(number, recipe.evaluate.held_images),
            looking,
            Losing(context.student, context.teacher, context.objective),
        )


def with_held(found: Evaluated, held: Held) -> Evaluated:
    """What an evaluation found, with what was found without labels."""
    about = {"images": held.images, "rankme": held.rankme, "lidar": held.lidar, **held.losses}
    return replace(
        found,
        event={**found.event, "held": about},
        table="\n".join(filter(None, [found.table, held.table()])),
        caption=found.caption or "without labels",
        says=found.says or "without labels, at step {step}",
        scalars={
            **found.scalars,
            "rankme": held.rankme,
            "lidar": held.lidar,
            "held": held.losses,
        },
        document={**(found.document or {}), "held": {**about, "singular_values": held.spectra}},
        effective_rank=held.rankme,
    )


def with_dense(found: Evaluated, context: Evaluating) -> Evaluated:
    """What an evaluation found, with what the dense k-NN finds. Collective."""
    began = time.monotonic()
    matrices = dense(context)
    areas = {name: Areas.of(matrix) for name, matrix in matrices.items()}
    numbers = {name: each.figures() for name, each in areas.items()}
    figures = {name: finite(row) for name, row in numbers.items()}
    names = named(dense_names(context) if dist.rank() == 0 else (), len(matrices["student"]))
    trained = [name for name in ("student", "teacher") if name in areas]
    told = {"networks": figures, "seconds": round(time.monotonic() - began, 1)}
    rows = {
        name: {**figures[name], "classes": classes_table(matrices[name], names)} for name in trained
    }
    return replace(
        found,
        event={**found.event, "dense": told},
        table="\n".join(filter(None, [found.table, scores_table(areas, ())])),
        caption=found.caption or "dense k-NN, in %",
        says=found.says or "dense k-NN at step {step}, in %",
        scalars={**found.scalars, **{f"dense_{name}": row for name, row in numbers.items()}},
        best=found.best or {name: Score("miou", numbers[name]["miou"]) for name in trained},
        document={**(found.document or {}), "dense": rows},
    )


def dense(context: Evaluating) -> dict[str, Tensor]:
    """The confusion matrix of the dense k-NN of each network. Collective."""
    recipe = context.recipe
    options, place = recipe.evaluate.dense, places(recipe)
    networks = {"student": patches(context.student)}
    if context.teacher is not None:
        networks["teacher"] = patches(context.teacher)
    sizes = student_sizes(recipe.model)
    if context.baselines:
        networks["random"] = patches(new_student(recipe).to(context.device))
        networks["pixels"] = patch_pixels(sizes.patch_size)
    reading = Reading(networks, recipe.evaluate.batch, context.normalise.images, context.device)
    assert options.num_classes is not None, "judged"
    labels = Labels(options.num_classes, options.map_zero == "none", "evaluate.dense")
    look = Look(
        recipe.model.image_hw,
        sizes.grid,
        labels,
        counted=True,
        in_channels=recipe.model.in_channels,
        max_pixels=recipe.data.max_pixels,
    )
    with evaluating(context.student, context.teacher):
        bank = fill_bank(
            reading,
            context.whole(place[DENSE_TRAIN], look, kinds=("map",)),
            size=options.bank,
            num_pictures=len(context.sets[place[DENSE_TRAIN]]),
            seed=recipe.run.seed,
        )
        return judge_patches(
            reading,
            bank,
            context.whole(place[DENSE_TEST], replace(look, counted=False), kinds=("map",)),
            grid=sizes.grid,
            k=options.k,
            temperature=options.temperature,
        )


def dense_names(context: Evaluating) -> tuple[str, ...]:
    """Names of the classes of the dense k-NN, where a file has some. Not collective."""
    if context.found is not None and context.found.dense_names:
        names: tuple[str, ...] = context.found.dense_names
        return names
    index = context.sets[places(context.recipe)[DENSE_TRAIN]]
    try:
        found = class_lists(index)
    except (Refused, OSError):  # gone meanwhile: it costs the names, not the evaluation
        return ()
    return found[0].names if found else ()
