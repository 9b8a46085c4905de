"""The segmenter of a recipe."""

from __future__ import annotations

import torch

from rcmae.config import Recipe
from rcmae.models import kernels
from rcmae.models.build import student_sizes
from rcmae.models.segmentation.backbone import Form, usual_levels
from rcmae.models.segmentation.segmenter import Heads, Segmenter


def levels_of(recipe: Recipe) -> tuple[int, ...]:
    """The blocks whose outputs make the pyramid."""
    given = recipe.segment.levels
    return tuple(given) if given is not None else usual_levels(student_sizes(recipe.model).depth)


def form_of(recipe: Recipe) -> Form:
    """The encoder of a recipe, beside its sizes."""
    options = recipe.segment
    if options.frozen:
        return Form((), False, False, recipe.model.qkv_bias)
    levels = () if options.head == "linear" else levels_of(recipe)
    return Form(
        levels,
        options.relative_positions,
        options.layer_scale,
        recipe.model.qkv_bias,
        options.drop_path,
    )


def heads_of(recipe: Recipe, num_classes: int) -> Heads:
    """The heads of a recipe."""
    options = recipe.segment
    return Heads(
        num_classes,
        kind=options.head,
        width=options.width,
        auxiliary=options.aux_weight > 0,
        dropout=options.dropout,
    )


def new_segmenter(recipe: Recipe, num_classes: int) -> Segmenter:
    """The network of a recipe with the weights of `run.seed`, the same on every rank."""
    model = Segmenter(
        student_sizes(recipe.model),
        form_of(recipe),
        heads_of(recipe, num_classes),
        kernels.layer_norm(recipe.engine.layer_norm),
    )
    model.draw_weights(torch.Generator().manual_seed(recipe.run.seed))
    return model


def meta_segmenter(recipe: Recipe, num_classes: int) -> Segmenter:
    """The network of a recipe, without values."""
    with torch.device("meta"):
        return Segmenter(
            student_sizes(recipe.model), form_of(recipe), heads_of(recipe, num_classes)
        )
