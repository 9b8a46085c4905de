"""What engines share of an update: the verdict on gradients, the optimizer, the teacher's move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from rcmae import dist
from rcmae.engines.optim import LARS
from rcmae.engines.protocol import EngineSettings
from rcmae.engines.teacher import Teacher, Telemetry
from rcmae.models.kernels import adamw
from rcmae.models.protocol import running_buffers
from rcmae.process import compiler


def global_norm(
    grads: Sequence[Tensor],
    *,
    sharded: bool,
    device: torch.device,
    group: torch_dist.ProcessGroup | None = None,
) -> Tensor:
    """L2 norm of all gradients as a float32 scalar on `device`. Collective when `sharded`: every
    rank calls; `group` are the ranks that share them, None: all.

    Not finite if any element on any rank is not: this is the verdict all ranks share before an
    update."""
    squares = torch.zeros((), dtype=torch.float32, device=device)
    if grads:
        norms = torch._foreach_norm(list(grads), 2, dtype=torch.float32)
        squares = torch.stack([norm.to(device) for norm in norms]).square().sum()
    return (dist.all_sum(squares, group) if sharded else squares).sqrt()


def optimizer_for(
    groups: list[dict[str, Any]],
    settings: EngineSettings,
    *,
    sharded: bool,
    group: torch_dist.ProcessGroup | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of the settings over an engine's groups.

    `sharded` where each rank of `group` (None: of all) holds a part of a tensor.
    """
    compiler.spare_optimizers()
    if settings.rule == "adamw":
        optimizer = adamw(groups, betas=settings.betas, kind=settings.optimizer)
        compiler.spare_step(optimizer)
        return optimizer
    trust = 0.001 if settings.rule == "lars" else None

    def all_sum(values: Tensor) -> Tensor:
        return dist.all_sum(values, group) if sharded else values

    return LARS(groups, trust=trust, all_sum=all_sum)


def read_telemetry(found: Telemetry, *, sharded: bool) -> dict[str, float]:
    """Telemetry of all ranks' shards as numbers. Collective when `sharded`: every rank calls."""
    sums = torch.stack([found.difference_sq, found.weight_sq, found.moved, found.elements])
    difference, weight, moved, elements = (dist.all_sum(sums) if sharded else sums).tolist()
    return {
        # relative L2, student to teacher
        "teacher_distance": (difference / max(weight, 1e-30)) ** 0.5,
        # share of the copy's elements that the update changed
        "teacher_moved": moved / max(elements, 1.0),
        "teacher_update_s": found.seconds,
    }


def freeze(teacher: nn.Module | None) -> nn.Module | None:
    """The teacher without gradients."""
    return teacher.requires_grad_(False) if teacher is not None else None


def has_all(theirs: Mapping[str, object], names: Sequence[str]) -> bool:
    """Whether a teacher has an optimizer group.

    It has all of a group or nothing of it: groups are sharded as one.
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


def update(
    ema: Teacher | None,
    momentum: float,
    *,
    measure: bool,
    sharded: bool,
    bad: Tensor | None = None,
) -> dict[str, float]:
    """One EMA update, measured or not; nothing where there is no teacher, or `bad` is 1.0.

    Collective: every rank calls.
    """
    if ema is None:
        return {}
    if measure:
        return read_telemetry(ema.measured_update(momentum), sharded=sharded)
    ema.update(momentum, unless=bad)
    return {}


def take_back(ema: Teacher | None) -> None:
    """Count the last update of a teacher back, which the device left out."""
    if ema is not None:
        ema.updates -= 1


def updates_of(ema: Teacher | None) -> int:
    """How often the teacher was updated."""
    return ema.updates if ema is not None else 0


def statistics(student: nn.Module, teacher: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The student's running buffers, each with that of the teacher, where it has it."""
    ours = dict(student.named_buffers())
    theirs = dict(teacher.named_buffers())
    return [(ours[name], theirs[name]) for name in running_buffers(student) if name in theirs]


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


def decides(optimizer: torch.optim.Optimizer, ema: Teacher | None) -> bool:
    """Whether the device can leave an update out by itself: torch's fused AdamW can. Running
    statistics that a teacher takes over are left to the host.
    """
    is_fused = isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]
    return bool(is_fused) and not (ema is not None and ema.has_statistics)


def guarded_step(optimizer: torch.optim.Optimizer, bad: Tensor | None) -> None:
    """An update, which the device leaves out, its count included, where `bad` is 1.0."""
    if bad is not None:
        setattr(optimizer, "found_inf", bad)  # noqa: B010, torch's fused kernels look for it
    optimizer.step()


def is_bad(norm: Tensor) -> Tensor:
    """1.0 where a norm is not finite, else 0.0, on its device: no wait."""
    return norm.isfinite().logical_not().to(torch.float32)
