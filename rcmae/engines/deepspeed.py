"""DeepSpeed: ZeRO stages 0 to 3 and optimizer offload, with a teacher that follows the stage.

DeepSpeed owns the partition, the collectives and the bf16 copies; this file only says where, at
each stage, the fp32 masters, the moments and the reduced gradients of this rank lie (the three
`_Stage` classes), and shards the teacher alike. The batch, clipping, precision and
optimizer come from the recipe; DeepSpeed's JSON holds what DeepSpeed alone owns, and a JSON that
says otherwise is refused.

Two corrections to what `deepspeed.initialize` leaves behind, both made in `_start`: in bf16 the
masters are copies of rounded weights, and stage 0 in bf16 has already taken one optimizer step.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import deepspeed
import deepspeed.ops.adam
import torch
from deepspeed.ops.op_builder import CPUAdamBuilder
from torch import Tensor, nn

from rcmae import dist
from rcmae.engines.deepspeed_config import handed_over
from rcmae.engines.flat import Cut, Gather, arrive_by_forward
from rcmae.engines.optim import moments, param_groups, prime, set_rates, step_of
from rcmae.engines.protocol import (
    DTYPES,
    Copies,
    EngineSettings,
    EngineState,
    Piece,
    StepStats,
)
from rcmae.engines.teacher import Teacher
from rcmae.engines.updates import (
    cast_params,
    freeze,
    global_norm,
    has_all,
    optimizer_for,
    restore_teacher,
    statistics,
    update,
    updates_of,
)
from rcmae.errors import Refused
from rcmae.process import building, compiler


class _Run(NamedTuple):
    """Elements of a parameter that lie together in one of this rank's masters."""

    name: str
    start: int  # in the flattened parameter
    master: int  # index
    at: int  # offset in that master
    length: int

    def of(self, flat: Tensor) -> Tensor:
        """These elements of a tensor that lies as the master does: a view."""
        return flat.view(-1)[self.at : self.at + self.length]


class _Stage(Protocol):
    """Where one ZeRO stage keeps this rank's part."""

    sharded: bool
    masters: list[Tensor]  # fp32, as the optimizer holds them

    def runs(self) -> list[_Run]:
        """Each parameter's run that this rank holds."""

    def grads(self) -> list[Tensor]:
        """Reduced gradients of this rank, after the last backward."""

    def refresh(self) -> None:
        """Compute copies up to the masters. Collective."""


class _Whole:
    """Stage 0: every rank holds everything."""

    sharded = False

    def __init__(self, engine: Any, names: Mapping[Tensor, str]) -> None:
        optimizer = engine.optimizer
        self.params = [
            p
            for group in getattr(optimizer, "fp16_groups", None) or _groups(optimizer)
            for p in group
        ]
        wrapped = hasattr(optimizer, "fp32_groups")  # in bf16
        fp32 = [p for group in optimizer.fp32_groups for p in group] if wrapped else []
        self.masters = fp32 or [p.data for p in self.params]
        self.keys = self.masters if wrapped else self.params
        self.names = [names[param] for param in self.params]

    def runs(self) -> list[_Run]:
        return [
            _Run(name, 0, i, 0, m.numel())
            for i, (name, m) in enumerate(zip(self.names, self.masters, strict=True))
        ]

    def grads(self) -> list[Tensor]:
        return [param.grad for param in self.params if param.grad is not None]

    def refresh(self) -> None:
        if self.masters[0].dtype != self.params[0].dtype:
            masters = [master.data for master in self.masters]
            torch._foreach_copy_([param.data for param in self.params], masters)


class _Partitioned:
    """Stages 1 and 2: a group lies end to end, padded, sharded in equal parts.

    Every rank computes with the whole.
    """

    sharded = True

    def __init__(self, engine: Any, names: Mapping[Tensor, str]) -> None:
        self.optimizer = optimizer = engine.optimizer
        # its bf16 optimizer of stage 1
        self.accumulates_fp32 = hasattr(optimizer, "fp32_groups_flat_partition")
        if self.accumulates_fp32:
            self.masters = list(optimizer.fp32_groups_flat_partition)
            self.groups = optimizer.bf16_groups
            self.flats = optimizer.bf16_groups_flat
        else:
            self.masters = list(optimizer.single_partition_of_fp32_groups)
            self.groups = optimizer.round_robin_bit16_groups
            self.flats = optimizer.bit16_groups_flat
        self.keys = self.masters
        self.names = names

    def runs(self) -> list[_Run]:
        found = []
        for index, group in enumerate(self.groups):
            for param in group:
                held = param._hp_mapping
                if held is not None:
                    mine = held.lp_fragment_address
                    at = held.hp_fragment_address.start
                    found.append(_Run(self.names[param], mine.start, index, at, mine.numel))
        return found

    def grads(self) -> list[Tensor]:
        if self.accumulates_fp32:
            return list(self.optimizer.fp32_groups_gradient_flat_partition)
        if self.optimizer.cpu_offload:
            return [master.grad for master in self.masters if master.grad is not None]
        return [grad for group in self.optimizer.averaged_gradients.values() for grad in group]

    def refresh(self) -> None:
        self.optimizer.update_lp_params()


class _Sharded:
    """Stage 3: each parameter is padded and sharded in equal parts.

    A whole one exists only while it computes.
    """

    sharded = True

    def __init__(self, engine: Any, names: Mapping[Tensor, str]) -> None:
        self.optimizer = optimizer = engine.optimizer
        self.keys = self.masters = list(optimizer.fp32_partitioned_groups_flat)
        self.params: dict[str, Any] = {name: param for param, name in names.items()}

    def places(self) -> dict[str, tuple[int, int, int]]:
        """(index in masters, offset, padded length) of each parameter."""
        where = self.optimizer.grad_position
        return {
            name: where[self.optimizer.get_param_id(param)] for name, param in self.params.items()
        }

    def runs(self) -> list[_Run]:
        found = []
        for name, (index, at, padded) in self.places().items():
            start = dist.rank() * padded
            length = min(padded, self.params[name].ds_numel - start)
            if length > 0:
                found.append(_Run(name, start, index, at, length))
        return found

    def grads(self) -> list[Tensor]:
        if self.optimizer.offload_optimizer:
            return [master.grad for master in self.masters if master.grad is not None]
        return [grad for group in self.optimizer.averaged_gradients.values() for grad in group]

    def refresh(self) -> None:
        self.optimizer._partition_all_parameters()
        for index in range(len(self.masters)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(index)
        kept = self.optimizer.persistent_parameters  # small ones stay whole on every rank
        if kept:
            kept[0].all_gather(kept)


class DeepSpeedEngine:
    """A student wrapped by DeepSpeed and its teacher, at any ZeRO stage."""

    decides_on_device = False

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        settings: EngineSettings,
        *,
        config: Mapping[str, Any],
    ) -> None:
        _prepare_deepspeed()
        self._settings = settings
        self._dtype = DTYPES[settings.precision]
        zero = config.get("zero_optimization", {})
        stage = int(zero.get("stage", 0))
        offload = (zero.get("offload_optimizer") or {}).get("device", "none") == "cpu"
        self._shapes = {name: tuple(param.shape) for name, param in student.named_parameters()}
        initial = {name: param.detach().cpu().clone() for name, param in student.named_parameters()}
        names: dict[Tensor, str] = {param: name for name, param in student.named_parameters()}
        groups = param_groups(student, settings.weight_decay, settings.layer_decay)
        if offload:
            _build_adam()
            optimizer: Any = deepspeed.ops.adam.DeepSpeedCPUAdam(
                groups, lr=0.0, betas=settings.betas, adamw_mode=True
            )
        else:
            optimizer = optimizer_for(groups, settings, sharded=stage > 0)
        self.student, *_ = deepspeed.initialize(
            model=student,
            optimizer=optimizer,
            config=handed_over(config, self._settings),
            dist_init_required=False,
        )
        place = _Sharded if stage == 3 else _Partitioned if stage else _Whole
        self._stage: Any = place(self.student, names)
        self._adam = getattr(self.student.optimizer, "optimizer", self.student.optimizer)
        self._start(initial)
        self.teacher = freeze(teacher)
        self._ema = self._add_teacher(teacher, config) if teacher is not None else None

    @torch.no_grad()
    def _start(self, initial: Mapping[str, Tensor]) -> None:
        for run in self._stage.runs():
            values = initial[run.name].flatten()[run.start : run.start + run.length]
            run.of(self._stage.masters[run.master].data).copy_(values)
        prime(self._adam, self._stage.keys, 0, zero=True)
        self._stage.refresh()

    _teacher_keys: list[Any]  # what the teacher has: indices of masters or groups; at stage 3 names

    def _add_teacher(self, teacher: nn.Module, config: Mapping[str, Any]) -> Teacher:
        device = self._settings.device
        stored = [master.data for master in self._stage.masters]
        publication = None
        cast_params(teacher.to(device), self._dtype)
        if isinstance(self._stage, _Whole):
            theirs = dict(teacher.named_parameters())
            self._teacher_keys = [
                index for index, name in enumerate(self._stage.names) if name in theirs
            ]
            masters = [stored[index] for index in self._teacher_keys]
            copies = [theirs[self._stage.names[index]].data for index in self._teacher_keys]
        elif isinstance(self._stage, _Partitioned):
            self._teacher_keys = _groups_of_teacher(teacher, self._stage)
            masters = [stored[index] for index in self._teacher_keys]
            copies, publication = _whole_copies(
                teacher, self._stage, self._teacher_keys, self._dtype
            )
        else:
            self.teacher = _shard_teacher(teacher, handed_over(config, self._settings))
            sharded: dict[str, Any] = dict(teacher.named_parameters())
            places = {
                name: place for name, place in self._stage.places().items() if name in sharded
            }
            self._teacher_keys = list(places)
            masters = [stored[index].narrow(0, at, size) for index, at, size in places.values()]
            copies = [sharded[name].ds_tensor.data[: places[name][2]] for name in places]
        ema = Teacher(
            masters,
            copies,
            accumulate=self._settings.teacher_accumulate,
            publication=publication,
            statistics=statistics(self.student.module, teacher),
            seed=self._settings.seed,
            offset=dist.rank() if self._stage.sharded else 0,
        )
        ema.start_from_student()
        return ema

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient.

        DeepSpeed averages over ranks, so the share is scaled up to make that a sum.
        """
        self.student.set_gradient_accumulation_boundary(last)
        self.student.backward(loss * dist.world(), scale_wrt_gas=False)
        if not last:
            self.student.step()  # counts the micro-batch; nothing moves before the boundary

    def step(self, *, lr: float, weight_decay: float, discard: bool = False) -> StepStats:
        """Finite check agreed by all ranks, then DeepSpeed's clip and update."""
        # its own check is off in fp32, and stages 1 and 2 update group by group: look before it
        # starts
        norm = global_norm(
            self._stage.grads(), sharded=self._stage.sharded, device=self._settings.device
        )
        stats = StepStats(norm)
        if stats.finite and not discard:  # waits for the device, once a step
            set_rates(self._adam.param_groups, lr=lr, weight_decay=weight_decay)
            self.student.step()
        else:
            self._discard()
        return stats

    def _discard(self) -> None:
        """Throw this step's gradients away: DeepSpeed does so with what is not finite, so the
        first one is made so.
        """
        optimizer = self.student.optimizer
        for grad in self._stage.grads()[:1]:
            grad.fill_(math.nan)
        if optimizer is self._adam:
            # stage 0 in fp32: nothing of DeepSpeed's stands between it and the update
            self.student.zero_grad()
            return
        checks = getattr(optimizer, "check_grad_overflow", None)
        optimizer.check_grad_overflow = True
        self.student.step()  # updates nothing and empties its buffers
        optimizer.check_grad_overflow = checks

    def update_teacher(self, momentum: float, *, measure: bool = False) -> dict[str, float]:
        """Move the teacher's shards, as the stage cuts them."""
        return update(self._ema, momentum, measure=measure, sharded=self._stage.sharded)

    def take_back(self) -> None:
        """Nothing is: the host decided before anything was counted."""

    def state(self) -> EngineState:
        """Live views of this rank's part."""
        runs = self._stage.runs()
        averages = self._teacher_views(runs)
        pieces = []
        for run in runs:
            moved = self._adam.state[self._stage.keys[run.master]]
            flats = {"weight": self._stage.masters[run.master].data}
            flats |= {key: moved[key] for key in moments(self._adam)}
            tensors = {kind: run.of(flat) for kind, flat in flats.items()}
            if run.name in averages:
                tensors["teacher"] = averages[run.name]
            pieces.append(Piece(run.name, run.start, tensors))
        tables = dict(self.student.module.named_buffers())
        step = step_of(self._adam, self._stage.keys[0])
        copies = Copies() if self._stage.sharded else Copies(dist.world(), dist.rank())
        return EngineState(self._shapes, pieces, tables, copies, step, updates_of(self._ema))

    def _teacher_views(self, runs: Sequence[_Run]) -> dict[str, Tensor]:
        if self._ema is None:
            return {}
        self._ema.settle()  # who asks may write
        if isinstance(self._stage, _Sharded):  # one accumulator a parameter, not one a group
            held = dict(zip(self._teacher_keys, self._ema.accumulators, strict=True))
            return {run.name: held[run.name][: run.length] for run in runs if run.name in held}
        accumulators = dict(zip(self._teacher_keys, self._ema.accumulators, strict=True))
        return {
            run.name: run.of(accumulators[run.master]) for run in runs if run.master in accumulators
        }

    def restored(self, *, optimizer_step: int, teacher_updates: int) -> None:
        """Compute copies and counters after a load."""
        prime(self._adam, self._stage.keys, optimizer_step)
        self._stage.refresh()
        restore_teacher(self._ema, teacher_updates)


def _groups(optimizer: torch.optim.Optimizer) -> list[list[Tensor]]:
    return [group["params"] for group in optimizer.param_groups]


def _groups_of_teacher(teacher: nn.Module, stage: _Partitioned) -> list[int]:
    """Indices of the optimizer groups that the teacher has."""
    theirs = dict(teacher.named_parameters())
    found = []
    for index, group in enumerate(stage.groups):
        if has_all(theirs, [stage.names[param] for param in group]):
            found.append(index)
    return found


def _whole_copies(
    teacher: nn.Module, stage: _Partitioned, groups: Sequence[int], dtype: torch.dtype
) -> tuple[list[Tensor], Gather]:
    """Teacher parameters as views of one flat tensor a group.

    This rank's shards of those, and what gathers them.
    """
    theirs = dict(teacher.named_parameters())
    flats = [torch.zeros_like(stage.flats[index], dtype=dtype) for index in groups]
    for group, flat in zip((stage.groups[index] for index in groups), flats, strict=True):
        offset = 0
        for param in group:
            name = stage.names[param]
            size = math.prod(param.shape)
            theirs[name].data = flat[offset : offset + size].view(param.shape)
            offset += size
    gather = Gather(flats, Cut(dist.rank(), dist.world()))
    arrive_by_forward(teacher, gather)
    return gather.shards, gather


def _shard_teacher(teacher: nn.Module, config: dict[str, Any]) -> nn.Module:
    """A frozen module, sharded as ZeRO-3 shards the student."""
    zero = {
        key: value
        for key, value in config["zero_optimization"].items()
        if not key.startswith("offload")
    }
    # a parameter kept whole would keep its old values for good
    zero["stage3_param_persistence_threshold"] = 0
    engine, *_ = deepspeed.initialize(
        model=teacher, config={**config, "zero_optimization": zero}, dist_init_required=False
    )
    return engine


def _build_adam() -> None:
    """Compile DeepSpeed's optimizer on the host, if nobody has. Collective: every rank calls.

    Raises:
        Refused: on every rank; one waits for a build that nobody makes any more.
    """
    problem = None
    try:
        with building.batons():
            CPUAdamBuilder().load()
    except Refused as error:
        problem = str(error)
    for told in dist.gather(problem):
        if told is not None:
            raise Refused(told)


def _prepare_deepspeed() -> None:
    """Quiet its log, and keep it from compiling a shared-memory collective for CPU runs (a
    compiler is not a given).
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # its own call
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor.*deprecated", FutureWarning)
    import deepspeed.ops

    with compiler.left_out():  # initialize imports it, for its name
        import deepspeed.runtime.zero.muon.muon_optimizer

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
