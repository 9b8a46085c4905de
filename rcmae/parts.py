"""What a recipe names, made: networks, mask, objective, engine.

Each is a function of the recipe and its sizes.
"""

from __future__ import annotations

import copy
import difflib
import sys
from typing import Any

import torch
from torch import nn

from rcmae import config, dist, objectives
from rcmae.config import Recipe, Resolved
from rcmae.data.device_decode import DeviceDecoder, nvjpeg
from rcmae.data.masking import BlockMask, Mask, RandomMask, SharedMask, visible_count
from rcmae.data.sources import Patience
from rcmae.data.transforms import TrainTransform
from rcmae.engines.engine import Engine, LocalEngine, Settings
from rcmae.errors import Refused
from rcmae.models import kernels
from rcmae.models.bootmae import BootstrappedAutoencoder, Network
from rcmae.models.vit import ARCHITECTURES, MaskedAutoencoder, size_problems
from rcmae.objectives import Context, Objective


def patience(recipe: Recipe) -> Patience:
    """With shards from elsewhere."""
    return Patience(recipe.data.source_timeout_s, recipe.data.source_attempts)


def student_sizes(model: config.ModelOptions, *, regressors: bool = False) -> dict[str, int]:
    """The sizes of the student: the architecture's, with the recipe's over them.

    `regressors`: whether the decoder is BootMAE's, whose heads need not divide its width.

    Raises:
        ValueError: unknown architecture, or sizes that do not fit together, all named.
    """
    if model.name not in ARCHITECTURES:
        close = difflib.get_close_matches(model.name, ARCHITECTURES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(ARCHITECTURES)}"
        raise Refused(f"model.name: unknown architecture {model.name!r}; {hint}")
    sizes = {key: getattr(model, key) or value for key, value in ARCHITECTURES[model.name].items()}
    problems = size_problems(
        **sizes,
        image_size=model.image_hw,
        in_channels=model.in_channels,
        heads_divide=not regressors,
    )
    if problems:
        raise Refused("\n".join(f"model: {problem}" for problem in problems))
    return sizes


def device_decoder(recipe: Recipe) -> DeviceDecoder | None:
    """What decodes JPEGs on the GPU; None where data.decode, or what is missing on any rank, leaves
    it to the workers.

    Collective: every rank calls.
    """
    if recipe.data.decode == "cpu":
        return None
    decode, why = None, None
    try:
        decode = nvjpeg(dist.device(), recipe.model.in_channels)
    except (RuntimeError, ImportError, OSError) as error:
        why = str(error).splitlines()[0]
    missing = [f"rank {rank}: {text}" for rank, text in enumerate(dist.gather(why)) if text]
    if missing and recipe.data.decode == "gpu" and dist.rank() == 0:
        print(
            "warning: data.decode=gpu: the GPU decodes no JPEG here, the workers do "
            f"({missing[0]})",
            file=sys.stderr,
        )
    return None if missing or decode is None else DeviceDecoder(decode, dist.device())


def train_transform(recipe: Recipe) -> TrainTransform:
    """A random box of an image, flipped or not. Raises ValueError."""
    data = recipe.data
    return TrainTransform(
        recipe.model.image_hw,
        recipe.model.in_channels,
        data.crop_scale,
        data.crop_ratio,
        data.flip,
        data.decode_margin,
    )


def new_network(recipe: Recipe, *, norm: kernels.Source | None = None) -> Network:
    """The network of a recipe, with weights of no meaning.

    `norm`: whose layer norm, instead of the recipe's: where sizes alone matter, what it asks for
    need not be there.

    Raises:
        ValueError: as `student_sizes`, or the network's own.
    """
    model = recipe.model
    outputs = recipe.objective.student_outputs
    common: dict[str, Any] = {
        **student_sizes(model, regressors=has_regressors(recipe)),
        "image_size": model.image_hw,
        "in_channels": model.in_channels,
        "norm_layer": kernels.layer_norm(norm or recipe.engine.layer_norm),
        "predicts_features": "features" in outputs,
    }
    if has_regressors(recipe):
        return BootstrappedAutoencoder(
            **common, low_layer=model.low_layer, high_layer=model.high_layer
        )
    return MaskedAutoencoder(
        **common,
        cls_token=model.cls_token,
        qkv_bias=model.qkv_bias,
        positions=model.positions,
        decoder_cls=model.decoder_cls,
        pixel_order=model.pixel_order,
        num_classes=model.num_classes if "classes" in outputs else 0,
        class_hidden=model.class_hidden,
        class_pool=model.class_pool,
    )


def has_regressors(recipe: Recipe) -> bool:
    """Whether the network is BootMAE's."""
    return recipe.decoder == "bootmae"


def new_student(recipe: Recipe) -> Network:
    """The student with the weights of `run.seed`, the same on every rank."""
    network = new_network(recipe)
    network.init_weights(torch.Generator().manual_seed(recipe.run.seed))
    return network


def new_teacher(student: Network, objective: Objective) -> Network | None:
    """A copy of the student's parts that the objective asks a teacher for.

    None where it asks for nothing.
    """
    if not objective.needs_teacher:
        return None
    teacher = copy.deepcopy(student)
    teacher.keep(objective.teacher_outputs)
    return teacher


def make_mask(recipe: Recipe, grid: tuple[int, int]) -> Mask:
    """What of an image is seen, for a grid of patches.

    Raises:
        ValueError: all or nothing is, or boxes do not fit.
    """
    objective, patches = recipe.objective, grid[0] * grid[1]
    visible = visible_count(patches, objective.mask_ratio)
    mask: Mask = RandomMask(patches, visible)
    if objective.mask == "boxes":
        boxed = round(objective.box_ratio * patches)
        mask = BlockMask(grid, visible, boxed, objective.box_smallest, objective.box_largest)
    return SharedMask(mask, recipe.batch.images) if objective.mask_shared == "step" else mask


def make_objective(recipe: Recipe, sizes: Resolved) -> Objective:
    """The objective of a recipe: the named one, and the terms added to it. Raises Refused."""
    epochs = sizes.total_steps / sizes.steps_per_epoch
    return objectives.make(recipe.objective, Context(epochs=epochs, steps=sizes.total_steps))


def step_flops(student: Network, objective: Objective, num_visible: int) -> float:
    """Floating-point operations of a step for one image: three forward passes of the student,
    one of the teacher.
    """
    total = 3 * student.flops(num_visible)
    if "pixels" in objective.teacher_outputs:
        total += student.flops(num_visible)
    if "tokens" in objective.teacher_outputs:
        total += student.encoder_flops(student.num_patches)
    return total


def engine_settings(recipe: Recipe, sizes: Resolved) -> Settings:
    """The values an engine is made with."""
    classifies = recipe.objective.name in config.CLASSIFYING
    return Settings(
        precision=recipe.engine.precision,
        betas=recipe.schedule.betas,
        weight_decay=recipe.schedule.weight_decay,
        clip_grad=recipe.schedule.clip_grad,
        accumulation=sizes.accumulation,
        per_device=sizes.per_device,
        optimizer=recipe.engine.optimizer,
        rule=recipe.classify.rule if classifies else "adamw",
        layer_decay=recipe.classify.layer_decay if classifies else None,
        teacher_accumulate=recipe.teacher.accumulate,
        seed=recipe.run.seed,
        device=dist.device(),
    )


def make_engine(
    recipe: Recipe,
    sizes: Resolved,
    student: nn.Module,
    teacher: nn.Module | None,
    engine_config: dict[str, Any],
) -> Engine:
    """The engine of a recipe, around the student and the teacher. Collective: every rank calls."""
    for model in filter(None, (student, teacher)):
        kernels.choose_attention(model, dist.device(), recipe.engine.precision)
        if recipe.engine.compile:
            kernels.compile_blocks(model)
    kernels.checkpoint_blocks(student, recipe.engine.activation_checkpointing)
    settings = engine_settings(recipe, sizes)
    if recipe.engine.name == "deepspeed":
        from rcmae.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(student, teacher, settings, config=engine_config)
    if recipe.engine.name == "fsdp2":
        from rcmae.engines.fsdp2 import FSDP2Engine

        return FSDP2Engine(student, teacher, settings)
    return LocalEngine(student, teacher, settings)
