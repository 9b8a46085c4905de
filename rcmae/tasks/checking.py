"""An objective tried on a small network and random images, before a run is started with it.

What a loss of one's own gets wrong is seldom an error where it is wrong: a mean in the place of a
sum only makes its weight thousands of times smaller. `rcmae.check_objective("my_objectives:Mine",
visible_weight=0.2)` belongs into the tests of whoever writes one; a start of a run asks the same.
"""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rcmae.config import Recipe, load, with_values
from rcmae.data.batch import Batch
from rcmae.errors import Refused
from rcmae.models.build import new_student, new_teacher
from rcmae.objectives import make
from rcmae.objectives.masks import make_mask
from rcmae.objectives.protocol import Context, Objective

IMAGES = 4  # of which two halves are made
SMALL = {"embed_dim": 48, "depth": 1, "num_heads": 3}
SMALL_DECODER = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
TOLERANCE = 1e-3  # relative, of a sum in float32


class Tried(NamedTuple):
    """What became of it."""

    problems: list[str]  # a training with it would end
    doubts: list[str]  # it would train, but hardly as meant
    sums: dict[str, float]  # of the terms, over IMAGES random images
    counts: dict[str, float]


def check_objective(name: str, **options: Any) -> dict[str, float]:
    """The loss of each term (its sum by its count) of an objective on random images.

    Args:
        name: MODULE:NAME, or that of a shipped one.
        options: of it.

    Raises:
        Refused: what is wrong with it, everything at once: an exception inside, terms without a
            count, sums that are no float32 scalars or not finite, sums over all images that are not
            those of both halves, nothing that a gradient flows through.
    """
    words = [f"objective.name={name}"]
    if options:
        words.append(f"objective.options={json.dumps(options)}")
    tried = try_objective(load("rcmae_cifar10_demo", words))
    if wrong := [*tried.problems, *tried.doubts]:
        raise Refused("\n".join(wrong))
    return {term: tried.sums[term] / max(tried.counts[term], 1) for term in tried.sums}


def try_objective(recipe: Recipe) -> Tried:
    """Try the objective of a recipe on a small network with the recipe's images and patches. On the
    CPU, the same on every rank.
    """
    where = f"objective.name={recipe.objective.name}"
    sizes = {f"model.{key}": value for key, value in (SMALL | SMALL_DECODER).items()}
    small = with_values(recipe, {**sizes, "engine.layer_norm": "torch"})
    objective = make(recipe.objective, Context(epochs=1.0, steps=2))
    student = new_student(small).eval()  # batch norm over half of the images is another
    teacher = new_teacher(student, objective.teacher_outputs) if objective.needs_teacher else None
    if teacher is not None:
        with torch.no_grad():
            for param in teacher.parameters():
                param.mul_(1.1)  # so that there is something to agree about
    batch = _batch(small)
    try:
        half = IMAGES // 2
        parts = [batch, batch.part(slice(0, half)), batch.part(slice(half, IMAGES))]
        sums, *halves = [objective(student, teacher, each, 0.5) for each in parts]
        counts, *half_counts = [objective.counts(each) for each in parts]
    except Exception as error:  # anybody's code: whatever it raises
        return Tried([f"{where}: tried on random images, it raises {_where(error)}"], [], {}, {})
    problems = _shape_problems(objective, sums, counts)
    if problems:
        return Tried([f"{where}: {each}" for each in problems], [], {}, {})
    doubts = _doubts(objective, sums, halves, counts, half_counts)
    return Tried(
        [],
        [f"{where}: {each}" for each in doubts],
        {term: total.item() for term, total in sums.items()},
        dict(counts),
    )


def _batch(recipe: Recipe) -> Batch:
    generator = torch.Generator().manual_seed(0)
    height, width = recipe.model.image_hw
    images = torch.randn(IMAGES, recipe.model.in_channels, height, width, generator=generator)
    patch = new_student(recipe).sizes.patch_size
    mask = make_mask(recipe, (height // patch, width // patch))
    ids = torch.stack([torch.from_numpy(mask.ids(0, number)) for number in range(IMAGES)])
    sees_others = recipe.objective.teacher_sees == "different"
    others = [torch.from_numpy(mask.ids(0, number, 1)) for number in range(IMAGES)]
    return Batch(
        images=images,
        ids_shuffle=ids,
        num_visible=mask.num_visible,
        labels=torch.arange(IMAGES) % max(2, recipe.model.num_classes or 2),
        keys=tuple(f"random/{number}" for number in range(IMAGES)),
        positions=torch.arange(IMAGES),
        crops=torch.tensor([[0, 0, height, width, 0]] * IMAGES),
        teacher_ids=torch.stack(others) if sees_others else None,
    )


def _where(error: Exception) -> str:
    """What was raised, and in which line of whose file."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"


def _shape_problems(
    objective: Objective, sums: Mapping[str, Any], counts: Mapping[str, Any]
) -> list[str]:
    problems = []
    weights = objective.weights
    for what, found in (("sums", sums), ("counts", counts)):
        if found.keys() != weights.keys():
            problems.append(f"its {what} are of {sorted(found)}, its weights of {sorted(weights)}")
    for term, total in sums.items():
        if not isinstance(total, Tensor) or total.ndim:
            shape = list(total.shape) if isinstance(total, Tensor) else type(total).__name__
            problems.append(f"the term {term} gives {shape}; it must be a scalar, the sum")
        elif not math.isfinite(total.item()):
            problems.append(f"the term {term} is {total.item()} on random images")
    if not problems and not any(total.requires_grad for total in sums.values()):
        problems.append("no gradient reaches the student through any term")
    return problems


def _doubts(
    objective: Objective,
    sums: Mapping[str, Tensor],
    halves: list[dict[str, Tensor]],
    counts: Mapping[str, float],
    half_counts: list[dict[str, int]],
) -> list[str]:
    doubts = []
    for term in objective.weights:
        whole = sums[term].item()
        added = sum(half[term].item() for half in halves)
        if abs(whole - added) > TOLERANCE * max(abs(whole), abs(added)):
            doubts.append(
                f"the term {term} gives {whole:.4g} for {IMAGES} images and {added:.4g} for their "
                "halves together: it is divided by its count later, so give the sum, not a mean"
            )
        if counts[term] != sum(each[term] for each in half_counts):
            doubts.append(
                f"the term {term} counts {counts[term]} in {IMAGES} images, and "
                f"{' and '.join(str(each[term]) for each in half_counts)} in their halves"
            )
    return doubts
