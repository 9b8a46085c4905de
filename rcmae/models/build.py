"""The network of a recipe."""

from __future__ import annotations

import copy
import difflib
from dataclasses import replace

import torch

from rcmae.config import ModelOptions, Recipe
from rcmae.errors import Refused
from rcmae.models import kernels
from rcmae.models.bootmae import BootstrappedAutoencoder
from rcmae.models.sizes import ARCHITECTURES, NetworkSizes, size_problems
from rcmae.models.vit import Heads, MaskedAutoencoder, StochasticDepth

Network = MaskedAutoencoder | BootstrappedAutoencoder  # what pretrains


def student_sizes(
    model: ModelOptions, *, heads_divide: bool = True, stride: int = 1
) -> NetworkSizes:
    """The sizes of the student: the architecture's, with the recipe's over them.

    Args:
        model: the recipe's section.
        heads_divide: whether the decoder's heads must divide its width; BootMAE's need not.
        stride: pixels that the task's sides are multiples of, for what a message suggests.

    Raises:
        Refused: unknown architecture, or sizes that do not fit together, all named.
    """
    if model.name not in ARCHITECTURES:
        close = difflib.get_close_matches(model.name, ARCHITECTURES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(ARCHITECTURES)}"
        raise Refused(f"model.name: unknown architecture {model.name!r}; {hint}")
    named = ARCHITECTURES[model.name]
    sizes = NetworkSizes(
        image_size=model.image_hw,
        in_channels=model.in_channels,
        class_tokens=model.class_tokens if model.cls_token else 0,
        registers=model.registers,
        **{key: getattr(model, key) or value for key, value in named.items()},
    )
    problems = size_problems(sizes, heads_divide=heads_divide, stride=stride)
    if problems:
        raise Refused("\n".join(f"model: {problem}" for problem in problems))
    return sizes


def classifier_sizes(model: ModelOptions) -> NetworkSizes:
    """The sizes of a classifier: it has a class token of its own where the encoder had none.

    Raises Refused.
    """
    sizes = student_sizes(model)
    return replace(sizes, class_tokens=max(1, sizes.class_tokens))


def new_network(recipe: Recipe, *, norm: kernels.Source | None = None) -> Network:
    """The network of a recipe, with weights of no meaning.

    Args:
        recipe: its sections model and objective, and engine.layer_norm.
        norm: whose layer norm, instead of the recipe's: where sizes alone matter, what it asks for
            need not be there.

    Raises:
        Refused: as `student_sizes`, or the network's own.
    """
    model = recipe.model
    outputs = recipe.objective.student_outputs
    regressors = recipe.decoder == "bootmae"
    sizes = student_sizes(model, heads_divide=not regressors)
    norm_layer = kernels.layer_norm(norm or recipe.engine.layer_norm)
    if regressors:
        return BootstrappedAutoencoder(
            sizes,
            norm_layer=norm_layer,
            low_layer=model.low_layer,
            high_layer=model.high_layer,
            predicts_features="features" in outputs,
        )
    heads = Heads(
        num_classes=model.num_classes if "classes" in outputs else 0,
        class_hidden=model.class_hidden,
        class_pool=model.class_pool,
        predicts_features="features" in outputs,
    )
    return MaskedAutoencoder(
        sizes,
        norm_layer=norm_layer,
        qkv_bias=model.qkv_bias,
        positions="learned" if model.position_table == "learned" else model.positions,
        drop_path=StochasticDepth(model.drop_path, recipe.run.seed),
        decoder_cls=model.decoder_cls,
        pixel_order=model.pixel_order,
        heads=heads,
    )


def new_student(recipe: Recipe) -> Network:
    """The student with the weights of `run.seed`, the same on every rank."""
    network = new_network(recipe)
    network.init_weights(torch.Generator().manual_seed(recipe.run.seed))
    return network


def new_teacher(student: Network, outputs: tuple[str, ...]) -> Network | None:
    """A copy of the student's parts that give these outputs; None where there are none."""
    if not outputs:
        return None
    teacher = copy.deepcopy(student)
    teacher.keep(outputs)
    return teacher
