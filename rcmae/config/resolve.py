"""The numbers that follow from a recipe, the ranks and the data: derived once, here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from rcmae.config.recipe import Recipe, with_values
from rcmae.errors import Refused, counted


@dataclass(frozen=True)
class Resolved:
    """Numbers that follow from the recipe, the world and the data.

    Counts, unless a unit is named.
    """

    world: int
    images_per_step: int
    images_per_rank: int
    per_device: int
    accumulation: int
    canonical_streams: int
    shuffle_window: int  # samples that are permuted together: no more than a stream has
    samples_per_epoch: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: float
    lr: float

    def asdict(self) -> dict[str, Any]:
        """Plain numbers, for the log."""
        return asdict(self)


STREAMS = 256  # of a large set; so many ranks may read it
FEWEST_STREAMS = 16  # of a small one
SAMPLES_PER_STREAM = 512  # at least, where that leaves enough streams


def streams_for(recipe: Recipe, world: int, samples: int | None = None) -> int:
    """V: as the recipe says, else what the samples of an epoch fill, raised to a multiple of the
    world.

    Args:
        recipe: a checked recipe.
        world: ranks that train.
        samples: of an epoch; None: many.
    """
    if recipe.data.canonical_streams is not None:
        return recipe.data.canonical_streams
    filled = STREAMS if samples is None else samples // SAMPLES_PER_STREAM
    wanted = FEWEST_STREAMS
    while wanted < min(STREAMS, filled) and 2 * wanted <= filled:
        wanted *= 2
    return world * math.ceil(wanted / world)


def with_streams(recipe: Recipe, world: int, samples: int) -> Recipe:
    """The recipe with the number of its streams, for an epoch of so many samples."""
    return with_values(recipe, {"data.canonical_streams": streams_for(recipe, world, samples)})


def batch_problems(recipe: Recipe, world: int) -> list[str]:
    """What stands against this batch on this many ranks, one line a problem."""
    problems = []
    images = recipe.batch.images
    streams = streams_for(recipe, world)
    repeats = recipe.data.repeats
    if images % (world * repeats) and repeats > 1:
        problems.append(
            f"batch.images={images} is not divisible by {world} ranks x "
            f"data.repeats={repeats}; use "
            f"{max(1, images // (world * repeats)) * world * repeats}"
        )
    if images % world:
        unit = world * min(recipe.batch.per_device or 1, max(1, images // world))
        near = sorted({max(unit, images // unit * unit), (images // unit + 1) * unit})
        each = f" x {recipe.batch.per_device} per_device" if recipe.batch.per_device else ""
        problems.append(
            f"batch.images={images} is not divisible by {world} ranks{each}; use "
            f"{' or '.join(map(str, near))}"
        )
    if streams % world:
        near = sorted({max(world, streams // world * world), (streams // world + 1) * world})
        problems.append(
            f"data.canonical_streams={streams} is not divisible by {world} ranks; "
            f"use {' or '.join(map(str, near))}, or a number of ranks that divides it"
        )
    return problems


def engine_problems(recipe: Recipe, world: int) -> list[str]:
    """What the engine cannot do on this many ranks, one line a problem."""
    engine = recipe.engine
    shards = engine.shard_ranks
    problems = []
    if engine.name == "local" and world > 1:
        problems.append(
            f"engine.name=local is one process, not {world}; use ddp, deepspeed or fsdp2"
        )
    if shards is not None and engine.name in ("ddp", "fsdp2") and world % shards:
        fitting = [size for size in range(1, world + 1) if world % size == 0]
        near = min(fitting, key=lambda size: abs(size - shards))
        problems.append(
            f"engine.shard_ranks={shards} does not divide {world} ranks; use {near}, or leave it "
            "out"
        )
    return problems


def per_device(recipe: Recipe, world: int) -> int:
    """Images of a micro-batch of a rank: the largest divisor of its part of a step that the recipe
    allows.

    Raises:
        ValueError: that is less than data.repeats.
    """
    per_rank = recipe.batch.images // world
    repeats = recipe.data.repeats
    limit = min(recipe.batch.per_device or per_rank, per_rank)
    if limit < repeats:
        raise Refused(
            f"batch.per_device={limit} is less than data.repeats={repeats}, which belong "
            "together; raise it"
        )
    return next(
        size for size in range(limit, 0, -1) if per_rank % size == 0 and size % repeats == 0
    )


def precision_of(asked: str, bf16_units: bool) -> str:
    """The precision of a run: "bf16" or "fp32".

    Args:
        asked: engine.precision.
        bf16_units: whether every rank's device multiplies bf16 in hardware.
    """
    if asked != "auto":
        return asked
    return "bf16" if bf16_units else "fp32"


def with_precision(recipe: Recipe, bf16_units: bool) -> Recipe:
    """The recipe with `engine.precision=auto` replaced by what it means on such devices."""
    precision = precision_of(recipe.engine.precision, bf16_units)
    return with_values(recipe, {"engine.precision": precision})


def compiles(recipe: Recipe, *, cuda: bool, zero3: bool) -> bool:
    """Whether blocks are compiled: `engine.compile`, where auto means on GPUs, except under ZeRO-3,
    which hooks every module inside a block: a graph would end at each.

    Args:
        recipe: with its engine.
        cuda: whether every rank has a GPU.
        zero3: whether the engine is DeepSpeed's stage 3.
    """
    asked = recipe.engine.compile
    return (cuda and not zero3) if asked == "auto" else asked


def resolve(recipe: Recipe, *, world: int, samples_per_epoch: int) -> Resolved:
    """The derived numbers, once.

    Args:
        recipe: a checked recipe.
        world: ranks that train.
        samples_per_epoch: what the plan takes of an epoch, times data.repeats: a multiple of
            batch.images.

    Raises:
        ValueError: the batch does not divide, with the nearest that do.
    """
    problems = batch_problems(recipe, world)
    if problems:
        raise Refused("\n".join(problems))
    schedule = recipe.schedule
    images = recipe.batch.images
    steps_per_epoch = samples_per_epoch // images
    total = (
        schedule.steps
        if schedule.steps is not None
        else round((schedule.epochs or 0) * steps_per_epoch)
    )
    warmup = schedule.warmup_steps if schedule.warmup_steps is not None else 0.0
    if schedule.warmup_epochs is not None:
        warmup = schedule.warmup_epochs * steps_per_epoch
    if warmup >= total:
        key = "steps" if schedule.warmup_epochs is None else "epochs"
        most = counted(total, "step")
        raise Refused(
            f"schedule: the warm-up of {warmup:g} steps does not end before the last of {most}; "
            f"set schedule.warmup_{key} to less (0: none), or train longer"
        )
    lr = schedule.lr if schedule.lr is not None else (schedule.base_lr or 0.0) * images / 256
    per_rank = images // world
    size = per_device(recipe, world)
    samples = samples_per_epoch // recipe.data.repeats
    streams = streams_for(recipe, world, samples)
    return Resolved(
        world=world,
        images_per_step=images,
        images_per_rank=per_rank,
        per_device=size,
        accumulation=per_rank // size,
        canonical_streams=streams,
        shuffle_window=min(recipe.data.shuffle_window, math.ceil(samples / streams)),
        samples_per_epoch=samples_per_epoch,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        warmup_steps=warmup,
        lr=lr,
    )
