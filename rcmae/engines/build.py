"""The engine of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rcmae import config, dist
from rcmae.config import Recipe, Resolved
from rcmae.engines.local import LocalEngine
from rcmae.engines.protocol import Engine, EngineSettings, Optimizing
from rcmae.models import kernels
from rcmae.models.tuning import attention, compiling

ADAMW = Optimizing()  # one learning rate for all layers


def engine_settings(
    recipe: Recipe, sizes: Resolved, optimizing: Optimizing = ADAMW
) -> EngineSettings:
    """The values an engine is made with."""
    return EngineSettings(
        precision=recipe.engine.precision,
        betas=recipe.schedule.betas,
        weight_decay=recipe.schedule.weight_decay,
        clip_grad=recipe.schedule.clip_grad,
        accumulation=sizes.accumulation,
        per_device=sizes.per_device,
        optimizer=recipe.engine.optimizer,
        rule=optimizing.rule,
        layer_decay=optimizing.layer_decay,
        teacher_accumulate=recipe.teacher.accumulate,
        seed=recipe.run.seed,
        device=dist.device(),
    )


def waited_for(engine_config: Mapping[str, Any]) -> str:
    """The engine as something that is waited for, and why that may take long."""
    if "offload_optimizer" in engine_config.get("zero_optimization", {}):
        return "the engine: DeepSpeed builds its C++ optimizer at its first use, about a minute"
    return "the engine"


def _is_zero3(engine_config: Mapping[str, Any]) -> bool:
    return engine_config.get("zero_optimization", {}).get("stage") == 3


def make_engine(
    recipe: Recipe,
    sizes: Resolved,
    student: nn.Module,
    teacher: nn.Module | None,
    engine_config: dict[str, Any],
    optimizing: Optimizing = ADAMW,
) -> Engine:
    """The engine of a recipe, around the student and the teacher. Collective: every rank calls."""
    if dist.device().type == "cuda":
        attention.leave_out_cudnn()
        if recipe.engine.tf32:
            torch.set_float32_matmul_precision("high")
    for model in filter(None, (student, teacher)):
        kernels.choose_attention(model, dist.device(), recipe.engine.precision)
    if config.compiles(recipe, cuda=dist.device().type == "cuda", zero3=_is_zero3(engine_config)):
        compiling.compile_blocks(student, teacher)
    kernels.checkpoint_blocks(student, recipe.engine.activation_checkpointing)
    settings = engine_settings(recipe, sizes, optimizing)
    shards = recipe.engine.shard_ranks
    if recipe.engine.name == "deepspeed":
        from rcmae.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(student, teacher, settings, config=engine_config)
    if recipe.engine.name == "fsdp2":
        from rcmae.engines.fsdp2 import FSDP2Engine

        return FSDP2Engine(student, teacher, settings, shards=shards)
    if recipe.engine.name == "ddp":
        from rcmae.engines.ddp import DDPEngine

        return DDPEngine(student, teacher, settings, shards=shards or 1)
    return LocalEngine(student, teacher, settings)
