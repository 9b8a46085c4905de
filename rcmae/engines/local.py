"""The engine of one process, the oracle of the tests and what a laptop runs: weights, gradients and
moments are one flat tensor a group, so a step is a handful of kernels.

An update in bf16 moves 62 bytes a parameter: 6 for the gradient to fp32, 4 for its norm, 28 in
AdamW, 6 to round the masters, 12 in the teacher's average and 6 to round that (ddp: 4 more, into
DDP's buckets; clipping: 8). Not done: the last four as one compiled function, 40 in the place of
52. torch's fused and foreach kernels have no second output of another type, and Inductor contracts
products and sums by its own rules: nobody has shown on a GPU that it gives the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rcmae import dist
from rcmae.engines.flat import FlatGroups, held, views
from rcmae.engines.optim import prime, set_rates, step_of
from rcmae.engines.protocol import Copies, EngineSettings, EngineState, StepStats
from rcmae.engines.teacher import Teacher
from rcmae.engines.updates import (
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


class LocalEngine:
    """One process. Masters, gradients, moments and teacher are one flat fp32 tensor a group.

    In bf16 the model computes with bf16 views of a flat copy, rounded from the masters after each
    step, as DeepSpeed does; gradients of micro-batches are added up in fp32, from the tensors that
    autograd made.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, settings: EngineSettings
    ) -> None:
        self.student = student.to(settings.device)
        self.teacher = freeze(teacher)
        self._settings = settings
        self._flat = FlatGroups(student, settings)
        self._params = [param for params in self._flat.params for param in params]
        self._targets: list[Tensor] = []  # where the gradient of each parameter is summed
        for master, params in zip(self._flat.masters, self._flat.params, strict=True):
            master.grad = torch.zeros_like(master)
            self._targets += views(master.grad, params)
        self._adds_in_place = settings.precision == "fp32"
        if self._adds_in_place:
            for param, target in zip(self._params, self._targets, strict=True):
                param.grad = target
        self._is_first = True  # no micro-batch of the step is in the sums
        self._optimizer = optimizer_for(self._flat.optimizer_groups, settings, sharded=False)
        prime(self._optimizer, self._flat.masters, 0)
        self._ema: Teacher | None = None
        self._taught: list[int] = []  # groups that the teacher has
        if teacher is not None:
            self._taught, flats = self._flat.add_teacher(teacher.to(settings.device))
            self._ema = Teacher(
                [self._flat.masters[index].data for index in self._taught],
                flats,
                accumulate=settings.teacher_accumulate,
                statistics=statistics(student, teacher),
                seed=settings.seed,
            )
            self._ema.start_from_student()
        self.decides_on_device = decides(self._optimizer, self._ema)
        self._bad: Tensor | None = None  # 1.0 where the last step's gradient is not finite

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this share of the loss."""
        self._bad = None
        loss.backward()
        if not self._adds_in_place:
            self._collect()

    @torch.no_grad()
    def _collect(self) -> None:
        """A micro-batch's gradients into the sums; the first takes the place of the last step's."""
        targets = []
        sources = []
        for param, target in zip(self._params, self._targets, strict=True):
            if param.grad is not None:
                targets.append(target)
                sources.append(param.grad)
                param.grad = None  # autograd hands its own tensor over the next time
            elif self._is_first:  # the loss does not depend on it
                target.zero_()
        if self._is_first:
            torch._foreach_copy_(targets, sources)
        else:
            torch._foreach_add_(targets, sources)
        self._is_first = False

    def step(self, *, lr: float, weight_decay: float, discard: bool = False) -> StepStats:
        """Finite check, clip, update, round."""
        grads = [master.grad for master in self._flat.masters if master.grad is not None]
        norm = global_norm(grads, sharded=False, device=self._settings.device)
        stats = StepStats(norm)
        self._bad = is_bad(norm) if self.decides_on_device else None
        if not discard and (self.decides_on_device or stats.finite):
            clip(grads, norm, self._settings.clip_grad)
            set_rates(self._optimizer.param_groups, lr=lr, weight_decay=weight_decay)
            guarded_step(self._optimizer, self._bad)
            self._flat.round()
        self._is_first = True
        if self._adds_in_place:
            torch._foreach_zero_(grads)
        return stats

    def update_teacher(self, momentum: float, *, measure: bool = False) -> dict[str, float]:
        """Move the teacher."""
        bad = self._bad
        return update(self._ema, momentum, measure=measure, sharded=False, bad=bad)

    def take_back(self) -> None:
        """The teacher was not moved."""
        take_back(self._ema)

    def state(self) -> EngineState:
        """Live views: each parameter whole."""
        return EngineState(
            self._flat.shapes,
            self._flat.pieces(held(self._flat, self._optimizer, self._ema, self._taught)),
            dict(self.student.named_buffers()),
            Copies(dist.world(), dist.rank()),
            step_of(self._optimizer, self._flat.masters[0]),
            updates_of(self._ema),
        )

    def restored(self, *, optimizer_step: int, teacher_updates: int) -> None:
        """Compute copies and counters after a load."""
        prime(self._optimizer, self._flat.masters, optimizer_step)
        self._flat.round()
        restore_teacher(self._ema, teacher_updates)
