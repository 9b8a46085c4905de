"""The engine of one process, the oracle of the tests and what a laptop runs: weights, gradients and
moments are one flat tensor a group, so a step is a handful of kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rcmae.engines.optim import moments, param_groups, prime, set_rates, step_of
from rcmae.engines.protocol import DTYPES, EngineSettings, EngineState, Piece, StepStats
from rcmae.engines.teacher import Teacher
from rcmae.engines.updates import (
    clip,
    freeze,
    global_norm,
    has_all,
    optimizer_for,
    restore_teacher,
    statistics,
    update,
    updates_of,
    verdict,
)


class LocalEngine:
    """One process. Masters, gradients, moments and teacher are one flat fp32 tensor a group.

    In bf16 the model computes with bf16 views of a flat copy, rounded from the masters after each
    step, as DeepSpeed does; gradients of micro-batches are added up in fp32.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, settings: EngineSettings
    ) -> None:
        self.student = student.to(settings.device)
        self.teacher = freeze(teacher)
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
                # autograd adds in place
                param.data = part
                param.grad = part_grad
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
            self._teacher_keys = [
                index for index, names in enumerate(self._names) if has_all(theirs, names)
            ]
            flats = [self._copies[index].clone() for index in self._teacher_keys]
            for index, flat in zip(self._teacher_keys, flats, strict=True):
                for name, part in zip(
                    self._names[index], _views(flat, self._params[index]), strict=True
                ):
                    theirs[name].data = part
            self._ema = Teacher(
                [self._masters[index].data for index in self._teacher_keys],
                flats,
                accumulate=settings.teacher_accumulate,
                statistics=statistics(student, teacher),
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
            if self._ema is not None and index in self._teacher_keys:
                flats["teacher"] = self._ema.accumulators[self._teacher_keys.index(index)]
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


def _flatten(params: Sequence[Tensor]) -> Tensor:
    return torch.cat([param.detach().float().flatten() for param in params])


def _views(flat: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([param.numel() for param in params])
    return [part.view(param.shape) for part, param in zip(parts, params, strict=True)]
