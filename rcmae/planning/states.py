"""What an engine keeps on a rank's device beside activations, and what it adds at the moments of a
step: formulas of bytes for each placement.

They follow from how the engines work (torch 2.13, DeepSpeed 0.19). `memory.footprint` walks through
a step with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from rcmae.engines.ddp import BUCKET_MB
from rcmae.engines.optim import param_groups
from rcmae.engines.protocol import keeps_gathered
from rcmae.engines.teacher import TeacherBytes, teacher_bytes
from rcmae.models.activations import FP32, bytes_of

PLACEMENTS = ("local", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2")
_FLUSH = 500_000_000  # elements of DeepSpeed's all-reduce at stage 0, and of its default buckets
_LIVE = 1_000_000_000  # parameters that its stage 3 keeps gathered by default: all of a ViT
_PERSISTENT = 100_000  # parameters up to this size stay whole in stage 3 by default


@dataclass(frozen=True)
class MemorySettings:
    """What decides a rank's memory beside the model."""

    placement: str  # one of PLACEMENTS
    precision: str = "bf16"
    world: int = 1
    per_device: int = 1  # images of a micro-batch
    accumulation: int = 1  # micro-batches of a step
    ahead: int = 1  # micro-batches of images that are on the device before their turn
    accumulate: str = "fp32_shard"  # the teacher's, as in `teacher.Teacher`
    deepspeed: Mapping[str, Any] = field(default_factory=dict)  # its JSON
    shard_ranks: int | None = None  # as in the recipe

    @property
    def sharing(self) -> int:
        """Ranks that share what is sharded."""
        return self.shard_ranks or (1 if self.placement == "ddp" else self.world)

    @property
    def teacher_arrives(self) -> bool:
        """Whether a whole teacher is gathered beside the student's forward pass."""
        return self.placement in ("zero1", "zero2") or (
            self.placement == "ddp" and self.sharing > 1
        )


def states(model: nn.Module, settings: MemorySettings) -> dict[str, int]:
    """Elements: `whole` of the model, `shard` of this rank, `group` the largest optimizer
    group's part of that.
    """
    groups = [_shapes(group) for group in param_groups(model, 0.0)]

    def held(of: Sequence[Sequence[Sequence[int]]]) -> int:
        return _bytes_of_teacher(settings, of, "bf16", "fp32_shard").accumulator // FP32

    return {
        "whole": _elements(groups),
        "shard": held(groups),
        "group": max(held([group]) for group in groups),
    }


def teacher_groups(model: nn.Module, parts: Sequence[str]) -> list[list[tuple[int, ...]]]:
    """Shapes of the optimizer groups that a teacher of these parts has, for
    `teacher.teacher_bytes`.
    """
    return [
        _shapes(group)
        for group in param_groups(model, 0.0)
        if group["name"].partition("_")[0] in parts
    ]


def _shapes(group: Mapping[str, Any]) -> list[tuple[int, ...]]:
    return [tuple(param.shape) for param in group["params"]]


def checkpoint_bytes(model: nn.Module, *, teacher: Sequence[str]) -> int:
    """Bytes of a checkpoint's tensors: weight, two moments and teacher of each parameter in fp32,
    and the tables.

    `teacher`: the parts that it has.
    """
    params = 3 * sum(param.numel() for param in model.parameters())
    params += _elements(teacher_groups(model, teacher))
    tables = sum(table.numel() * table.element_size() for table in model.buffers())
    return FP32 * params + tables


def _elements(groups: Sequence[Sequence[Sequence[int]]]) -> int:
    return sum(math.prod(shape) for shapes in groups for shape in shapes)


def _bytes_of_teacher(
    settings: MemorySettings,
    groups: Sequence[Sequence[Sequence[int]]],
    precision: str,
    accumulate: str,
) -> TeacherBytes:
    return teacher_bytes(
        settings.placement,
        groups,
        rank=0,
        world=settings.sharing,
        precision=precision,
        accumulate=accumulate,
    )


# ------------------------------------------------------------------------------------------ engines


@dataclass(frozen=True)
class Gathered:
    """Parameters of other ranks, while they are here; bytes."""

    student: float = 0.0  # whole, from its forward to the end of its backward pass
    teacher: float = 0.0  # whole, in its forward pass
    # for each parameter of the part that computes, and of the next, whose shards arrive
    part: float = 0.0
    kept: float = 0.0  # for each parameter of a part, from its forward to its backward pass


@dataclass(frozen=True)
class Gradients:
    """Gradients as a backward pass makes them; bytes."""

    part: float = 0.0  # for each parameter of the part that a backward pass is in
    leaving: float = 0.0  # for each of the part that it has just been in: on their way
    grown: float = 0.0  # that a backward pass builds up
    carried: float = 0.0  # that lie there from the first of several micro-batches on
    regrown: float = 0.0  # and that the later ones add to them


@dataclass(frozen=True)
class Buckets:
    """Where gradients are collected for a collective."""

    bytes: float = 0.0  # while a backward pass runs
    flushed: float = 0.0  # bytes of copies of a full bucket, for each element
    elements: int = 0  # of a bucket; 0: they are not counted one by one


@dataclass(frozen=True)
class EngineBytes:
    """Bytes that an engine takes, apart from activations."""

    resident: dict[str, float]
    gathered: Gathered = Gathered()
    gradients: Gradients = Gradients()
    buckets: Buckets = Buckets()
    reducing: float = 0.0  # copies at the end of a backward pass, beside all gradients
    updating: float = 0.0  # gradients and copies in the optimizer's step
    publishing: float = 0.0  # in the teacher's update
    host: float = 0.0


class _States:
    """Sizes of the states of a model under an engine: what the engines' formulas are made of."""

    def __init__(self, model: nn.Module, teacher: Sequence[str], settings: MemorySettings) -> None:
        count = states(model, settings)
        self.whole = count["whole"]  # elements
        self.shard = count["shard"]
        self.group = count["group"]
        self.sizes = [param.numel() for param in model.parameters()]
        self.width = bytes_of(settings.precision)
        self.master = (2 + 4 if settings.precision == "bf16" else 4) * self.whole  # and a copy
        groups = teacher_groups(model, teacher)
        self.teacher = _elements(groups)
        kept = _bytes_of_teacher(settings, groups, settings.precision, settings.accumulate)
        self.copy = kept.copy if teacher else 0  # bytes
        self.accumulator = kept.accumulator if teacher else 0
        # a logged step keeps the old copy
        sharded = _bytes_of_teacher(settings, groups, "bf16", "fp32_shard").accumulator
        self.publishing = float(self.width * sharded // FP32)

    def resident(
        self, weights: float, gradients: float, moments: float, buffers: float = 0.0
    ) -> dict[str, float]:
        """Bytes that are always there, by what they are; the teacher's all on the device."""
        return {
            "weights": weights,
            "gradients": gradients,
            "moments": moments,
            "teacher": self.copy + self.accumulator * 1.0,
            "communication": buffers,
        }


class _Zero:
    """What DeepSpeed's JSON says that decides memory."""

    def __init__(self, settings: MemorySettings, width: int) -> None:
        zero = settings.deepspeed.get("zero_optimization", {})
        types = settings.deepspeed.get("data_types", {})
        self.bucket = int(zero.get("reduce_bucket_size", _FLUSH))
        self.overlap = bool(zero.get("overlap_comm", settings.placement == "zero3"))
        self.contiguous = bool(zero.get("contiguous_gradients", True))
        self.persistent = int(zero.get("stage3_param_persistence_threshold", _PERSISTENT))
        self.live = int(zero.get("stage3_max_live_parameters", _LIVE))
        # bytes of a gradient where micro-batches are summed
        self.summed = 4 if types.get("grad_accum_dtype") == "fp32" else width
        offload = (zero.get("offload_optimizer") or {}).get("device", "none") == "cpu"
        self.on_device = 0.0 if offload else 1.0  # share of master weights and moments

    def host(self, size: _States) -> float:
        """Bytes of host memory: master weights, moments, gradients, the teacher's accumulator."""
        on_host = 1.0 - self.on_device
        return (4.0 * size.shard + 8 * size.shard + 4 * size.shard + size.accumulator) * on_host

    def resident(
        self, size: _States, weights: float, gradients: float, buffers: float = 0.0
    ) -> dict[str, float]:
        """Bytes that are always on the device."""
        found = size.resident(weights, gradients, 8 * size.shard * self.on_device, buffers)
        found["teacher"] = size.copy + size.accumulator * self.on_device
        return found


def engine_bytes(model: nn.Module, teacher: Sequence[str], settings: MemorySettings) -> EngineBytes:
    """What the engine of these settings takes; `teacher`: the parts that an average has."""
    size = _States(model, teacher, settings)
    if settings.placement == "local":
        return _local(size)
    if settings.placement == "ddp":
        return _ddp(size, settings)
    if settings.placement == "zero0":
        return _zero0(size)
    if settings.placement == "fsdp2":
        return _fsdp2(size, settings)
    zero = _Zero(settings, size.width)
    if settings.placement == "zero3":
        return _zero3(size, zero)
    if settings.placement == "zero2":
        return _zero2(size, zero)
    if settings.precision == "bf16" and zero.summed == 4:
        return _zero1_bf16(size, zero)
    return _zero1(size, zero)


def _local(size: _States) -> EngineBytes:
    # in fp32 autograd adds to the sums; in bf16 its own tensors live until a backward pass is over
    bf16 = size.width < FP32
    grown = float(size.width * size.whole) if bf16 else 0.0
    return EngineBytes(
        size.resident(size.master, 4.0 * size.whole, 8 * size.whole),
        gradients=Gradients(grown=grown, regrown=grown),
        buckets=Buckets(bytes=0.0 if bf16 else size.width * max(size.sizes)),
        publishing=size.publishing,
    )


def _ddp(size: _States, settings: MemorySettings) -> EngineBytes:
    # DDP's buckets have all gradients, the masters' are apart. Autograd's own tensors of a bucket
    # live until it is full. Micro-batches before the last are summed by autograd in fp32; in bf16
    # beside it, in fp32, and what autograd adds to is not handed over bucket by bucket.
    bf16 = size.width < FP32
    several = settings.accumulation > 1
    weights = (size.width * size.whole if bf16 else 0) + 4.0 * (size.shard if bf16 else size.whole)
    gradients = size.width * size.whole + 4.0 * size.shard
    if several and bf16:
        gradients += (size.width + 4) * size.whole
    sharded = settings.sharing > 1
    bucket = min(float(size.width * size.whole), BUCKET_MB * 2**20)
    return EngineBytes(
        size.resident(weights, gradients, 8 * size.shard),
        gradients=Gradients(
            grown=bucket,
            carried=float(size.width * size.whole) if several and not bf16 else 0.0,
        ),
        updating=float(size.width * size.shard) if sharded else 0.0,  # on their way
        publishing=size.publishing * (2 if sharded else 1),
    )


def _zero0(size: _States) -> EngineBytes:
    gradients = size.width * size.whole
    return EngineBytes(
        size.resident(size.master, 0.0, 8 * size.whole),
        gradients=Gradients(grown=gradients, carried=gradients),
        reducing=size.width * min(size.whole, _FLUSH),
        updating=size.master,
        publishing=size.publishing,
    )


def _fsdp2(size: _States, settings: MemorySettings) -> EngineBytes:
    # A block's shards arrive in one buffer, from which they are copied out; its gradients leave as
    # the fp32 input of a reduce-scatter, which lies there until the next one's. In all
    # micro-batches but the last, without a reduce-scatter, they stay whole.
    return EngineBytes(
        size.resident(4 * size.shard, 0.0, 8 * size.shard),
        gathered=Gathered(
            part=size.width,
            kept=size.width if keeps_gathered(sum(size.sizes), settings.precision) else 0.0,
        ),
        gradients=Gradients(
            part=size.width, leaving=4, grown=4 * size.shard, carried=4 * size.whole
        ),
        updating=4 * size.shard,
        publishing=size.publishing,
    )


def _zero1_bf16(size: _States, zero: _Zero) -> EngineBytes:
    # DeepSpeed's BF16_Optimizer: whole fp32 gradients
    return EngineBytes(
        zero.resident(size, 2 * size.whole + 4.0 * size.shard, 4 * size.whole),
        gradients=Gradients(grown=2 * size.whole, carried=2 * size.whole),
        reducing=(4 + 2) * min(size.whole, _FLUSH),
        updating=2 * size.whole,
        publishing=size.publishing * 2,  # the shard on its way, too
        host=zero.host(size),
    )


def _zero1(size: _States, zero: _Zero) -> EngineBytes:
    gradients = size.width * size.whole
    summed = zero.summed * size.shard
    return EngineBytes(
        zero.resident(size, gradients + 4.0 * size.shard * zero.on_device, 0.0),
        gradients=Gradients(grown=gradients, carried=gradients),
        buckets=Buckets(bytes=size.width * zero.bucket * (2 if zero.overlap else 1)),
        reducing=summed,
        updating=summed + 4 * size.group,
        publishing=size.publishing * 2,
        host=zero.host(size),
    )


def _zero2(size: _States, zero: _Zero) -> EngineBytes:
    summed = float(zero.summed * size.shard * zero.on_device)
    largest = max(size.sizes)
    apart = zero.summed != size.width  # straight into the fp32 partition
    return EngineBytes(
        zero.resident(size, size.width * size.whole + 4.0 * size.shard * zero.on_device, 0.0),
        gradients=Gradients(grown=summed, carried=summed, regrown=0.0 if apart else summed),
        buckets=Buckets(
            bytes=size.width * zero.bucket * (2 if zero.overlap else 1) + size.width * largest,
            flushed=4,
            elements=zero.bucket,
        ),
        updating=summed + (8 * largest if apart else 4 * size.group),
        publishing=size.publishing * 2,
        host=zero.host(size),
    )


def _zero3(size: _States, zero: _Zero) -> EngineBytes:
    # these stay whole on every rank
    persistent = sum(numel for numel in size.sizes if numel <= zero.persistent)
    gathered = size.width * min(size.whole, zero.live)
    weights = size.width * (size.shard + persistent) + 4.0 * size.shard * zero.on_device
    return EngineBytes(
        zero.resident(
            size,
            weights,
            zero.summed * size.shard * zero.on_device,
            size.width * zero.bucket if zero.contiguous else 0.0,
        ),
        gathered=Gathered(
            student=gathered - size.width * persistent,
            teacher=min(gathered, float(size.width * size.teacher)),
        ),
        buckets=Buckets(
            flushed=size.width if zero.contiguous else 2 * size.width, elements=zero.bucket
        ),
        updating=4 * size.group,
        publishing=size.publishing,
        host=zero.host(size),
    )
