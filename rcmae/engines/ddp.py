"""DDP: every rank computes with all weights; torch's reducer sums gradients while a backward pass
runs.

Weights, masters and moments are flat tensors a group, as in the local engine, so the host has
little to do beside launching the networks' kernels. Gradients travel in the compute type, in
buckets; autograd's own tensors go into a bucket in one pass (torch 2.13). Where `shards` is above
1, fp32 masters, moments and the teacher's average are cut over as many neighbouring ranks, and the
rounded weights are gathered again beside what follows (ZeRO-1, within a node if you like).

Not done: a reduce-scatter in the place of DDP's all-reduce, which would halve the traffic of
gradients: the reducer has none.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rcmae import dist
from rcmae.engines.flat import (
    Cut,
    FlatGroups,
    Gather,
    Run,
    arrive_by_forward,
    held,
    views,
)
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
from rcmae.models.protocol import graph_changes

BUCKET_MB = 50.0  # of gradients that are sent as one


class DDPEngine:
    """PyTorch's DistributedDataParallel around flat groups.

    Args:
        student, teacher, settings: as of every engine.
        shards: ranks that share the masters, the moments and the teacher's average; it divides the
            ranks. 1: each rank has all.
        bucket_mb: MiB of a bucket of gradients.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        settings: EngineSettings,
        *,
        shards: int = 1,
        bucket_mb: float = BUCKET_MB,
    ) -> None:
        self._settings = settings
        self._cut = Cut.of_ranks(shards)
        self._plain = student.to(settings.device)
        self._flat = FlatGroups(student, settings, self._cut)
        self._sharded = shards > 1
        self._optimizer = optimizer_for(
            self._flat.optimizer_groups, settings, sharded=self._sharded, group=self._cut.group
        )
        prime(self._optimizer, self._flat.masters, 0)
        for master in self._flat.masters:
            master.grad = torch.zeros_like(master)
        self._reduced = _reduced(self._flat)
        self._sums = _Sums(self._flat, settings)
        self._weights = self._gather(self._flat.copies, student)
        self._wrapped = _wrap(student, settings, bucket_mb)
        self.student: nn.Module = self._wrapped
        self._expect(0)
        self.teacher = freeze(teacher)
        self._taught: list[int] = []  # groups that the teacher has
        self._ema = self._add_teacher(teacher) if teacher is not None else None
        self.decides_on_device = decides(self._optimizer, self._ema)
        self._bad: Tensor | None = None  # 1.0 where the last step's gradient is not finite

    def _gather(self, flats: list[Tensor], network: nn.Module) -> Gather | None:
        """What brings the shards of a network's weights together, before its next forward."""
        if self._cut.parts == 1:
            return None
        gather = Gather(flats, self._cut)
        arrive_by_forward(network, gather)
        return gather

    def _add_teacher(self, teacher: nn.Module) -> Teacher:
        settings = self._settings
        self._taught, flats = self._flat.add_teacher(teacher.to(settings.device))
        ema = Teacher(
            [self._flat.masters[index].data for index in self._taught],
            [self._cut.of(flat) for flat in flats],
            accumulate=settings.teacher_accumulate,
            publication=self._gather(flats, teacher),
            statistics=statistics(self._plain, teacher),
            seed=settings.seed,
            offset=self._cut.part,
        )
        ema.start_from_student()
        return ema

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient; the last micro-batch's backward reduces the sum."""
        assert last == self._wrapped.require_backward_grad_sync, "micro-batches are not as told"
        if last:
            self._sums.hand_over()
        self._bad = None
        loss.backward()
        if not last:
            self._sums.take()
        self._expect(0 if last else self._micro + 1)

    def _expect(self, micro: int) -> None:
        """What `no_sync` does. DDP decides in a forward pass whether its backward pass reduces, so
        the next micro-batch's number is noted before it begins.
        """
        self._micro = micro
        is_last = micro == self._settings.accumulation - 1
        self._wrapped.require_backward_grad_sync = is_last

    def step(self, *, lr: float, weight_decay: float, discard: bool = False) -> StepStats:
        """Finite check, clip, update, round."""
        grads = self._collected()
        # without shards the ranks have the same sums, so they find the same norm
        norm = global_norm(
            grads, sharded=self._sharded, device=self._settings.device, group=self._cut.group
        )
        stats = StepStats(norm)
        self._bad = is_bad(norm) if self.decides_on_device else None
        if not discard and (self.decides_on_device or stats.finite):
            clip(grads, norm, self._settings.clip_grad)
            set_rates(self._optimizer.param_groups, lr=lr, weight_decay=weight_decay)
            self._settle()
            guarded_step(self._optimizer, self._bad)
            self._publish()
        self._sums.begin()
        return stats

    @torch.no_grad()
    def _collected(self) -> list[Tensor]:
        """The reduced gradients of this rank's masters, out of DDP's buckets, in fp32."""
        targets = []
        sources = []
        for target, param, run in self._reduced:
            grad = param.grad
            if grad is None:  # the loss does not depend on it
                target.zero_()
                continue
            whole = run.length == grad.numel()
            targets.append(target)
            sources.append(grad if whole else grad.view(-1).narrow(0, run.start, run.length))
        torch._foreach_copy_(targets, sources)
        return [master.grad for master in self._flat.masters if master.grad is not None]

    def _settle(self) -> None:
        """Wait for weights that are under way: a shard may be a view of where they arrive."""
        if self._weights is not None:
            self._weights.wait()

    def _publish(self) -> None:
        """The masters into what every rank computes with. Collective."""
        self._flat.round()
        if self._weights is not None:
            self._weights.begin()

    def update_teacher(self, momentum: float, *, measure: bool = False) -> dict[str, float]:
        """Move the teacher."""
        return update(self._ema, momentum, measure=measure, sharded=self._sharded, bad=self._bad)

    def take_back(self) -> None:
        """The teacher was not moved."""
        take_back(self._ema)

    def state(self) -> EngineState:
        """Live views: of each parameter what this rank keeps."""
        self._settle()
        if self._ema is not None:
            self._ema.settle()  # who asks may write
        return EngineState(
            self._flat.shapes,
            self._flat.pieces(held(self._flat, self._optimizer, self._ema, self._taught)),
            dict(self._plain.named_buffers()),
            Copies(dist.world() // self._cut.parts, dist.rank() // self._cut.parts),
            step_of(self._optimizer, self._flat.masters[0]),
            updates_of(self._ema),
        )

    def restored(self, *, optimizer_step: int, teacher_updates: int) -> None:
        """Compute copies and counters after a load."""
        prime(self._optimizer, self._flat.masters, optimizer_step)
        self._publish()
        restore_teacher(self._ema, teacher_updates)


class _Target(NamedTuple):
    """Where a parameter's gradient goes."""

    grad: Tensor  # a view of a master's gradient; of the parameter's shape where it is whole
    param: nn.Parameter
    run: Run


def _reduced(flat: FlatGroups) -> list[_Target]:
    """Where the reduced gradients of what this rank keeps go."""
    found = []
    for run in flat.runs():
        param = flat.params[run.group][run.param]
        grad = flat.masters[run.group].grad
        assert grad is not None
        target = run.of(grad)
        if run.length == param.numel():
            target = target.view(param.shape)
        found.append(_Target(target, param, run))
    return found


class _Sums:
    """Gradients of this rank's micro-batches before the last.

    In fp32 autograd adds them up. In bf16 it would round each sum, so they are added up in fp32 and
    rounded once, where the last joins them.
    """

    def __init__(self, flat: FlatGroups, settings: EngineSettings) -> None:
        self._params = [param for params in flat.params for param in params]
        self._views: list[Tensor] = []
        self._grads: list[Tensor] = []
        self._totals: list[Tensor] = []
        if settings.accumulation > 1 and settings.precision != "fp32":
            self._grads = [torch.zeros_like(copy) for copy in flat.copies]
            self._totals = [torch.zeros_like(grad, dtype=torch.float32) for grad in self._grads]
            for params, grad in zip(flat.params, self._grads, strict=True):
                self._views += views(grad, params)
        self.begin()

    def begin(self) -> None:
        """Forget what is there: a step begins."""
        if not self._grads:
            for param in self._params:
                param.grad = None  # autograd hands its own tensor over: nothing is added
            return
        torch._foreach_zero_(self._grads)
        torch._foreach_zero_(self._totals)
        for param, view in zip(self._params, self._views, strict=True):
            param.grad = view  # autograd adds in place

    def take(self) -> None:
        """Add a micro-batch's."""
        for total, grad in zip(self._totals, self._grads, strict=True):
            total.add_(grad)
        if self._grads:
            torch._foreach_zero_(self._grads)

    def hand_over(self) -> None:
        """What the last micro-batch is added to."""
        if self._grads:
            torch._foreach_copy_(self._grads, self._totals)


def _wrap(
    student: nn.Module, settings: EngineSettings, bucket_mb: float
) -> DistributedDataParallel:
    """The student with torch's reducer. Collective: every rank calls."""
    # A graph that is the same at each step is looked through once. Not with several micro-batches:
    # torch 2.13 then aborts in the first step, or sums wrongly from the second on. The other way it
    # warns once that all parameters were used.
    static = settings.accumulation == 1 and not graph_changes(student)
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    # running statistics are the same on all ranks already; its name since torch 2.13
    no_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {no_buffers: False}
    if "batched_grad_copy" in known:
        options["batched_grad_copy"] = True  # a bucket's gradients in one pass
    # blocks are compiled one by one: there is no graph over several buckets to be split
    torch._dynamo.config.optimize_ddp = False
    wrapped = DistributedDataParallel(
        student,
        bucket_cap_mb=bucket_mb,
        find_unused_parameters=not static,
        gradient_as_bucket_view=True,
        static_graph=static,
        init_sync=False,  # weights are the same function of the seed or of a file on all ranks
        **options,
    )
    # torch looks at a hook's annotations, which are texts here
    wrapped.register_comm_hook(None, lambda _, bucket: _sum(bucket))
    return wrapped


def _sum(bucket: torch_dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A bucket summed over the ranks; torch's own hook divides by them."""
    work = torch_dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])
