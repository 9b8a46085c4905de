"""What an engine is.

An engine owns the student, the teacher, the optimizer and every collective that moves gradients or
weights. The loop calls `backward` for each micro-batch, then `step`, then `update_teacher`, and
cannot tell engines apart. Losses handed to `backward` are this rank's share of the global loss:
gradients are *summed* over ranks and micro-batches.

`state()` gives the run's logical state as `Piece`s: runs of the flattened parameters, whatever the
sharding, so a checkpoint of one engine opens in any other."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rcmae.models.kernels import Source

KINDS = ("weight", "exp_avg", "exp_avg_sq", "teacher")  # the tensors that move, one set a parameter
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


Rule = Literal["adamw", "lars", "sgd"]


class StepStats:
    """What `step` saw, on its way from the device: who asks waits for it, which costs nothing once
    the device is a step further.

    Args:
        norm: global L2 norm before clipping, the same on all ranks.
    """

    def __init__(self, norm: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._norm = norm.detach()
        if norm.is_cuda:
            self._norm = torch.empty_like(norm, device="cpu", pin_memory=True)
            self._norm.copy_(norm.detach(), non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    @property
    def grad_norm(self) -> float:
        """Global L2 norm before clipping."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._norm.numpy())

    @property
    def finite(self) -> bool:
        """Whether it is; the same on all ranks. Where it is not nothing was updated."""
        return math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class Piece:
    """A contiguous run of one parameter that this rank holds: live fp32 views, all of the same
    length.
    """

    name: str  # as published
    start: int  # offset into the flattened parameter
    # kind -> 1-D; no "teacher" where there is none, or it lacks the parameter
    tensors: dict[str, Tensor]


class Copies(NamedTuple):
    """How often the ranks hold the same pieces: each writes its share of what all of them hold."""

    of: int = 1
    mine: int = 0  # which of them this rank has


@dataclass
class EngineState:
    """The logical state on this rank."""

    shapes: dict[str, tuple[int, ...]]  # of every parameter, in the model's order
    pieces: list[Piece]
    buffers: dict[str, Tensor]  # frozen tables, whole and the same on every rank
    copies: Copies
    optimizer_step: int
    teacher_updates: int


class Optimizing(NamedTuple):
    """How a task's weights are moved."""

    rule: Rule = "adamw"
    layer_decay: float | None = None  # learning rate of a layer over that of the one above it


KEPT_BYTES = 2 * 2**30  # of FSDP2's weights that stay gathered from a forward to its backward pass


def keeps_gathered(elements: int, precision: str) -> bool:
    """Whether under FSDP2 a student of so many weights stays gathered between its passes."""
    return elements * DTYPES[precision].itemsize <= KEPT_BYTES


@dataclass(frozen=True)
class EngineSettings:
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
    # whether the device itself leaves out an update whose gradient is not finite, and the move of
    # the teacher after it: then nobody has to wait for the verdict before the next step's backward
    decides_on_device: bool

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this rank's share of the global loss.

        `last` micro-batch of the step reduces.
        """

    def step(self, *, lr: float, weight_decay: float, discard: bool = False) -> StepStats:
        """Finite check agreed by all ranks before any group moves, clip, update.

        `discard` drops the gradients. Where the device decides it does not wait.
        """

    def update_teacher(self, momentum: float, *, measure: bool = False) -> dict[str, float]:
        """Move the teacher's local shards.

        `measure` gives what it did (it waits for the device).
        """

    def take_back(self) -> None:
        """Take back what the host counted of the last `step` and `update_teacher`, of which the
        device left out both.
        """

    def state(self) -> EngineState:
        """Live views of the logical state."""

    def restored(self, *, optimizer_step: int, teacher_updates: int) -> None:
        """After the views of `state()` were written: bring compute copies and counters up to
        them.
        """
