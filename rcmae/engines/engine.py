"""What an engine is, and the plain one.

An engine owns the student, the teacher, the optimizer and every collective that moves gradients or
weights. The loop calls `backward` for each micro-batch, then `step`, then `update_teacher`, and
cannot tell engines apart. Losses handed to `backward` are this rank's share of the global loss:
gradients are *summed* over ranks and micro-batches.

`state()` gives the run's logical state as `Piece`s: runs of the flattened parameters, whatever the
sharding, so a checkpoint of one engine opens in any other. `LocalEngine` is one process, the oracle
of the tests and what a laptop
runs: weights, gradients and moments are one flat tensor a group, so a step is a handful of kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rcmae import dist
from rcmae.engines.optim import LARS, moments, param_groups
from rcmae.engines.teacher import Teacher, Telemetry
from rcmae.models.kernels import Source, adamw

KINDS = ("weight", "exp_avg", "exp_avg_sq", "teacher")  # the tensors that move, one set a parameter
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


Rule = Literal["adamw", "lars", "sgd"]


class StepStats(NamedTuple):
    """What `step` saw. `finite` is the same on all ranks; where it is False nothing was updated."""

    grad_norm: float  # global L2 norm before clipping
    finite: bool


@dataclass(frozen=True)
class Piece:
    """A contiguous run of one parameter that this rank holds: live fp32 views, all of the same
    length.
    """

    name: str  # as published
    start: int  # offset into the flattened parameter
    # kind -> 1-D; no "teacher" where there is none, or it lacks the parameter
    tensors: dict[str, Tensor]


@dataclass
class EngineState:
    """The logical state on this rank."""

    shapes: dict[str, tuple[int, ...]]  # of every parameter, in the model's order
    pieces: list[Piece]
    buffers: dict[str, Tensor]  # frozen tables, whole and the same on every rank
    replicated: bool  # every rank holds all of it
    optimizer_step: int
    teacher_updates: int


@dataclass(frozen=True)
class Settings:
    """Values an engine is made with."""

    precision: str = "fp32"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip_grad: float | None = None
    accumulation: int = 1  # micro-batches a step
    per_device: int = 1  # images a micro-batch
    optimizer: Source = "torch"
    rule: Rule = "adamw"
    # groups by layer, each slower than the one above it; None: encoder and decoder
    layer_decay: float | None = None
    teacher_accumulate: str = "fp32_shard"
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Engine(Protocol):
    """Moves the weights.

    Every method but `state` is collective: every rank calls, in the same order.
    """

    student: nn.Module  # call it; wrapped, one forward
    # frozen, sharded like the student; it may lack whole optimizer groups of the student's
    teacher: nn.Module | None

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this rank's share of the global loss.

        `last` micro-batch of the step reduces.
        """

    def step(self, *, lr: float, weight_decay: float, discard: bool = False) -> StepStats:
        """Finite check agreed by all ranks before any group moves, clip, update.

        `discard` drops the gradients.
        """

    def update_teacher(self, momentum: float, *, measure: bool = False) -> dict[str, float]:
        """Move the teacher's local shards.

        `measure` gives what it did (it waits for the device).
        """

    def state(self) -> EngineState:
        """Live views of the logical state."""

    def restored(self, *, optimizer_step: int, teacher_updates: int) -> None:
        """After the views of `state()` were written: bring compute copies and counters up to
        them.
        """


def global_norm(grads: Sequence[Tensor], *, sharded: bool, device: torch.device) -> Tensor:
    """L2 norm of all gradients as a float32 scalar on `device`. Collective when `sharded`: every
    rank calls.

    Not finite if any element on any rank is not: this is the verdict all ranks share before an
    update."""
    squares = torch.zeros((), dtype=torch.float32, device=device)
    if grads:
        norms = torch._foreach_norm(list(grads), 2, dtype=torch.float32)
        squares = torch.stack([norm.to(device) for norm in norms]).square().sum()
    return (dist.all_sum(squares) if sharded else squares).sqrt()


def set_rates(groups: Iterable[dict[str, Any]], *, lr: float, weight_decay: float) -> None:
    """The step's rates into an optimizer's groups; no-decay groups stay at 0."""
    for group in groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        group["weight_decay"] = 0.0 if group["name"].endswith("_no_decay") else weight_decay


def optimizer_for(
    groups: list[dict[str, Any]], settings: Settings, *, sharded: bool
) -> torch.optim.Optimizer:
    """The optimizer of the settings over an engine's groups.

    `sharded` where each rank holds a part of a tensor.
    """
    if settings.rule == "adamw":
        return adamw(groups, betas=settings.betas, kind=settings.optimizer)
    trust = 0.001 if settings.rule == "lars" else None
    return LARS(groups, trust=trust, all_sum=dist.all_sum if sharded else lambda values: values)


def prime(
    optimizer: torch.optim.Optimizer, params: Iterable[Tensor], step: int, *, zero: bool = False
) -> None:
    """Give each of the optimizer's fp32 tensors its state, zero where there was none, and set its
    step.

    Optimizers make their state at the first update; a checkpoint needs to know where it lies before
    that. `zero` also empties moments that exist: some engines take a first step of their own while
    they are set up."""
    group = optimizer.param_groups[0]
    for each in optimizer.param_groups:
        if "step" in each:  # apex counts by group
            each["step"] = step
    for param in params:
        state = optimizer.state[param]
        for key in moments(optimizer):
            if key not in state:
                state[key] = torch.zeros_like(param, requires_grad=False)
            elif zero:
                state[key].zero_()
        if isinstance(state.get("step"), Tensor):
            state["step"].fill_(step)
        elif "step" in state or not isinstance(optimizer, torch.optim.AdamW):
            state["step"] = step
        else:
            device = (
                param.device
                if group.get("fused") or group.get("capturable")
                else torch.device("cpu")
            )
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)


def step_of(optimizer: torch.optim.Optimizer, param: Tensor) -> int:
    """How many updates the optimizer has made."""
    return int(optimizer.param_groups[0].get("step", optimizer.state[param].get("step", 0)))


def read_telemetry(seen: Telemetry, *, sharded: bool) -> dict[str, float]:
    """Telemetry of all ranks' shards as numbers. Collective when `sharded`: every rank calls."""
    sums = torch.stack([seen.difference_sq, seen.weight_sq, seen.moved, seen.elements])
    difference, weight, moved, elements = (dist.all_sum(sums) if sharded else sums).tolist()
    return {
        # relative L2, student to teacher
        "teacher_distance": (difference / max(weight, 1e-30)) ** 0.5,
        # share of the copy's elements that the update changed
        "teacher_moved": moved / max(elements, 1.0),
        "teacher_update_s": seen.seconds,
    }


def freeze(teacher: nn.Module | None) -> nn.Module | None:
    """The teacher without gradients."""
    return teacher.requires_grad_(False) if teacher is not None else None


def has_all(theirs: Mapping[str, object], names: Sequence[str]) -> bool:
    """Whether a teacher has an optimizer group.

    It has all of a group or nothing of it: groups are cut as one.
    """
    found = [name in theirs for name in names]
    assert all(found) or not any(found), (
        f"a teacher has {sum(found)} of {len(found)} parameters of a group"
    )
    return all(found)


def cast_params(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters alone: frozen tables stay fp32 at any precision."""
    for param in module.parameters():
        param.data = param.data.to(dtype)


class LocalEngine:
    """One process. Masters, gradients, moments and teacher are one flat fp32 tensor a group.

    In bf16 the model computes with bf16 views of a flat copy, rounded from the masters after each
    step, as DeepSpeed does; gradients of micro-batches are added up in fp32.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None, settings: Settings) -> None:
        self.student, self.teacher = student.to(settings.device), freeze(teacher)
        self._settings = settings
        dtype = DTYPES[settings.precision]
        groups = param_groups(student, settings.weight_decay, settings.layer_decay)
        self._names = [list(group["param_names"]) for group in groups]
        self._params = [list(group["params"]) for group in groups]
        self._shapes = {name: tuple(param.shape) for name, param in student.named_parameters()}
        self._masters = [nn.Parameter(_flatten(params)) for params in self._params]
        self._copies = [
            m.data if dtype == torch.float32 else m.data.to(dtype) for m in self._masters
        ]
        self._grads = [torch.zeros_like(copy) for copy in self._copies]
        for params, copy, grad in zip(self._params, self._copies, self._grads, strict=True):
            for param, part, part_grad in zip(
                params, _views(copy, params), _views(grad, params), strict=True
            ):
                param.data, param.grad = part, part_grad  # autograd adds in place
        for master, grad in zip(self._masters, self._grads, strict=True):
            master.grad = grad if dtype == torch.float32 else torch.zeros_like(master)
        self._optimizer = optimizer_for(
            [
                {**g, "params": [m], "param_names": [g["name"]]}
                for g, m in zip(groups, self._masters, strict=True)
            ],
            settings,
            sharded=False,
        )
        prime(self._optimizer, self._masters, 0)
        self._ema: Teacher | None = None
        if teacher is not None:
            teacher.to(settings.device)
            theirs = dict(teacher.named_parameters())
            self._taught = [
                index for index, names in enumerate(self._names) if has_all(theirs, names)
            ]
            flats = [self._copies[index].clone() for index in self._taught]
            for index, flat in zip(self._taught, flats, strict=True):
                for name, part in zip(
                    self._names[index], _views(flat, self._params[index]), strict=True
                ):
                    theirs[name].data = part
            self._ema = Teacher(
                [self._masters[index].data for index in self._taught],
                flats,
                accumulate=settings.teacher_accumulate,
                seed=settings.seed,
            )
            self._ema.start_from_student()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this share of the loss."""
        loss.backward()
        if self._settings.precision != "fp32":
            for master, grad in zip(self._masters, self._grads, strict=True):
                assert master.grad is not None
                master.grad.add_(grad)
                grad.zero_()

    def step(self, *, lr: float, weight_decay: float, discard: bool = False) -> StepStats:
        """Finite check, clip, update, round."""
        grads = [master.grad for master in self._masters if master.grad is not None]
        norm = global_norm(grads, sharded=False, device=self._settings.device)
        stats = verdict(norm)
        if stats.finite and not discard:
            clip(grads, norm, self._settings.clip_grad)
            set_rates(self._optimizer.param_groups, lr=lr, weight_decay=weight_decay)
            self._optimizer.step()
            self._round()
        torch._foreach_zero_(grads)
        return stats

    @torch.no_grad()
    def _round(self) -> None:
        if self._settings.precision != "fp32":
            torch._foreach_copy_(self._copies, [master.data for master in self._masters])

    def update_teacher(self, momentum: float, *, measure: bool = False) -> dict[str, float]:
        """Move the teacher."""
        return update(self._ema, momentum, measure=measure, sharded=False)

    def state(self) -> EngineState:
        """Live views: each parameter whole."""
        pieces = []
        for index, (names, params) in enumerate(zip(self._names, self._params, strict=True)):
            state = self._optimizer.state[self._masters[index]]
            flats = {"weight": self._masters[index].data}
            flats |= {key: state[key] for key in moments(self._optimizer)}
            if self._ema is not None and index in self._taught:
                flats["teacher"] = self._ema.accumulators[self._taught.index(index)]
            offset = 0
            for name, param in zip(names, params, strict=True):
                size = param.numel()
                pieces.append(
                    Piece(
                        name,
                        0,
                        {kind: flat[offset : offset + size] for kind, flat in flats.items()},
                    )
                )
                offset += size
        step = step_of(self._optimizer, self._masters[0])
        return EngineState(
            self._shapes,
            pieces,
            dict(self.student.named_buffers()),
            True,
            step,
            updates_of(self._ema),
        )

    def restored(self, *, optimizer_step: int, teacher_updates: int) -> None:
        """Compute copies and counters after a load."""
        prime(self._optimizer, self._masters, optimizer_step)
        self._round()
        restore_teacher(self._ema, teacher_updates)


def update(
    ema: Teacher | None, momentum: float, *, measure: bool, sharded: bool
) -> dict[str, float]:
    """One EMA update, measured or not; nothing where there is no teacher.

    Collective: every rank calls.
    """
    if ema is None:
        return {}
    if measure:
        return read_telemetry(ema.measured_update(momentum), sharded=sharded)
    ema.update(momentum)
    return {}


def updates_of(ema: Teacher | None) -> int:
    """How often the teacher was updated."""
    return ema.updates if ema is not None else 0


def restore_teacher(ema: Teacher | None, updates: int) -> None:
    """Copies and counter of a teacher whose accumulators were written.

    Collective: every rank calls.
    """
    if ema is not None:
        ema.updates = updates
        ema.round()


def clip(grads: Sequence[Tensor], norm: Tensor, limit: float | None) -> None:
    """Scale gradients so that their global norm is at most `limit`.

    On the device, without a wait.
    """
    if limit is not None and grads:
        torch._foreach_mul_(list(grads), (limit / (norm + 1e-6)).clamp(max=1.0))


def verdict(norm: Tensor) -> StepStats:
    """The norm as a number, and whether the update may run.

    Waits for the device, once a step: the price of never updating on numbers gone bad.
    """
    value = norm.item()
    return StepStats(grad_norm=value, finite=math.isfinite(value))


def _flatten(params: Sequence[Tensor]) -> Tensor:
    return torch.cat([param.detach().float().flatten() for param in params])


def _views(flat: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([param.numel() for param in params])
    return [part.view(param.shape) for part, param in zip(parts, params, strict=True)]
