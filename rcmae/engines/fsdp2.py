"""FSDP2: each block of student and teacher is sharded over the ranks, and gathered to compute.

Masters are the fp32 shards that `fully_shard` keeps; with bf16 it gathers them rounded and reduces
gradients in fp32. The teacher is a second sharded module of the compute type; its accumulators are
local tensors, sharded alike, so an update is one `lerp` a rank and no communication. Shards may lie
on a few neighbouring ranks (of a node), and copies of them on the others (HSDP): gathers then stay
among neighbours, and the reduced gradients are summed over the copies.

A student whose gathered weights are small (`keeps_gathered`) is gathered once a micro-batch, by its
forward pass, and a larger one again by its backward pass. The gather of the next block begins
before the one that computes, in both passes of the student. Not in the teacher's, nor in an
evaluation: these may leave blocks out, which would keep what was gathered for them when it is old.
"""

from __future__ import annotations

import itertools
import warnings

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rcmae import dist
from rcmae.engines.optim import moments, param_groups, prime, set_rates, step_of
from rcmae.engines.protocol import (
    DTYPES,
    Copies,
    EngineSettings,
    EngineState,
    Piece,
    StepStats,
    keeps_gathered,
)
from rcmae.engines.teacher import Teacher
from rcmae.engines.updates import (
    cast_params,
    clip,
    decides,
    freeze,
    global_norm,
    guarded_step,
    is_bad,
    optimizer_for,
    restore_teacher,
    statistics,
    take_back,
    update,
    updates_of,
)
from rcmae.models.protocol import blocks_of, other_units


class FSDP2Engine:
    """PyTorch's fully sharded data parallel engine, second generation.

    Args:
        student, teacher, settings: as of every engine.
        shards: neighbouring ranks that share a copy of everything; it divides the ranks. None: all.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        settings: EngineSettings,
        *,
        shards: int | None = None,
    ) -> None:
        # a linear layer's output is a view of a matrix product's; nothing here writes into a
        # prediction
        warnings.filterwarnings(
            "ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning
        )
        self._settings = settings
        dtype = DTYPES[settings.precision]
        self._shapes = {name: tuple(param.shape) for name, param in student.named_parameters()}
        self._shards = shards or dist.world()
        mesh = dist.mesh(self._shards)
        self._group = mesh.get_group("shards")
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        self.student = student.to(settings.device)
        count = sum(param.numel() for param in student.parameters())
        self._root = _shard(student, mesh, policy)
        _look_ahead(student, self._root, keeps=keeps_gathered(count, settings.precision))
        groups = param_groups(student, settings.weight_decay, settings.layer_decay)
        self._optimizer = optimizer_for(groups, settings, sharded=True, group=self._group)
        prime(self._optimizer, student.parameters(), 0)
        self.teacher = freeze(teacher)
        self._ema: Teacher | None = None
        if teacher is not None:
            cast_params(teacher.to(settings.device), dtype)
            _shard(teacher, mesh, MixedPrecisionPolicy(cast_forward_inputs=False))
            theirs = dict(teacher.named_parameters())
            self._teacher_keys = [name for name in self._shapes if name in theirs]
            self._ema = Teacher(
                _local(student, self._teacher_keys),
                _local(teacher, self._teacher_keys),
                accumulate=settings.teacher_accumulate,
                statistics=statistics(student, teacher),
                seed=settings.seed,
                offset=dist.rank() % self._shards,
            )
            self._ema.start_from_student()
        self.decides_on_device = decides(self._optimizer, self._ema)
        self._bad: Tensor | None = None  # 1.0 where the last step's gradient is not finite

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient; only the last micro-batch reduces.

        FSDP2 averages: the share is scaled to make it a sum.
        """
        self._bad = None
        self._root.set_requires_gradient_sync(last)
        (loss * dist.world()).backward()

    def step(self, *, lr: float, weight_decay: float, discard: bool = False) -> StepStats:
        """Finite check agreed by all ranks, clip, update."""
        grads = [
            _shard_of(param.grad) for param in self.student.parameters() if param.grad is not None
        ]
        norm = global_norm(grads, sharded=True, device=self._settings.device, group=self._group)
        stats = StepStats(norm)
        self._bad = is_bad(norm) if self.decides_on_device else None
        if not discard and (self.decides_on_device or stats.finite):
            clip(grads, norm, self._settings.clip_grad)
            set_rates(self._optimizer.param_groups, lr=lr, weight_decay=weight_decay)
            guarded_step(self._optimizer, self._bad)
        self._optimizer.zero_grad(set_to_none=True)
        return stats

    def update_teacher(self, momentum: float, *, measure: bool = False) -> dict[str, float]:
        """Move the teacher's shards."""
        bad = self._bad
        return update(self._ema, momentum, measure=measure, sharded=True, bad=bad)

    def take_back(self) -> None:
        """The teacher was not moved."""
        take_back(self._ema)

    def state(self) -> EngineState:
        """Live views: this rank's rows of each parameter."""
        pieces = []
        averages = (
            dict(zip(self._teacher_keys, self._ema.accumulators, strict=True))
            if self._ema is not None
            else {}
        )
        for name, param in self.student.named_parameters():
            local = _shard_of(param)
            rows = param.shape[0]
            moved = self._optimizer.state[param]
            tensors = {"weight": local} | {
                key: _shard_of(moved[key]) for key in moments(self._optimizer)
            }
            if name in averages:
                tensors["teacher"] = averages[name]
            if local.numel():
                part = dist.rank() % self._shards
                first_row = min(part * -(-rows // self._shards), rows)  # as torch.chunk
                start = first_row * (param.numel() // rows)
                pieces.append(
                    Piece(name, start, {kind: tensor.view(-1) for kind, tensor in tensors.items()})
                )
        step = step_of(self._optimizer, next(iter(self.student.parameters())))
        return EngineState(
            self._shapes,
            pieces,
            dict(self.student.named_buffers()),
            Copies(dist.world() // self._shards, dist.rank() // self._shards),
            step,
            updates_of(self._ema),
        )

    def restored(self, *, optimizer_step: int, teacher_updates: int) -> None:
        """Counters and the teacher's copies after a load."""
        prime(self._optimizer, self.student.parameters(), optimizer_step)
        restore_teacher(self._ema, teacher_updates)


def _shard(
    model: nn.Module, mesh: torch.distributed.DeviceMesh, policy: MixedPrecisionPolicy
) -> FSDPModule:
    for part in (*blocks_of(model), *other_units(model)):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    # the root keeps its parameters gathered after a forward by default: a teacher, which never runs
    # backward, would then compute with old weights for good
    return fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def _look_ahead(student: nn.Module, root: FSDPModule, *, keeps: bool) -> None:
    """Before each forward pass: gather the next block early, and keep blocks gathered, where a
    backward pass follows.
    """
    blocks = blocks_of(student)
    was: list[bool] = []  # of the pass before

    def prepare(*_: object) -> None:
        trains = torch.is_grad_enabled()
        if was == [trains]:
            return
        was[:] = [trains]
        for block, following in itertools.pairwise(blocks):
            assert isinstance(block, FSDPModule)
            assert isinstance(following, FSDPModule)
            block.set_modules_to_forward_prefetch([following] if trains else [])
        if keeps:
            root.set_reshard_after_forward(not trains)

    student.register_forward_pre_hook(prepare, prepend=True)


def _shard_of(tensor: Tensor | None) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor._local_tensor


def _local(model: nn.Module, names: list[str]) -> list[Tensor]:
    return [_shard_of(model.get_parameter(name)) for name in names]
