"""Batch normalisation over the images of all ranks, on CPU and GPU alike.

torch's SyncBatchNorm is the same on GPUs and refuses CPUs, where a run of the same recipe must give
the same numbers.

What a batch is: the *global micro-batch*, the images that all ranks take at once. Statistics that
waited for a whole accumulated step would need its forward passes twice; so a step of several
micro-batches normalises each by its own images and moves the running statistics as often. That is
another training than one of a single micro-batch (not an unsafe one: every rank computes the same),
and the loop holds the global micro-batch fixed over a run's jobs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcmae import dist
from rcmae.errors import Refused


class GlobalBatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` whose statistics in training are over the rows of all ranks, as many on
    each.

    Collective in training, forwards and backwards: every rank calls. Statistics are float32
    (float64 for a float64 model) whatever the model computes in; running ones move only by what is
    finite, so that a step that is skipped for its NaNs leaves them as they were.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """[B, C] to [B, C], of the same type.

        In evaluation by the running statistics, without a collective.
        """
        x = input if input.dtype == torch.float64 else input.float()
        weight, bias = (
            None if each is None else each.to(x.dtype) for each in (self.weight, self.bias)
        )
        if not self.training:
            mean = self.running_mean.to(x.dtype)
            variance = self.running_var.to(x.dtype)
            return F.batch_norm(x, mean, variance, weight, bias, eps=self.eps).to(input.dtype)
        count = len(x) * dist.world()
        if count < 2:
            raise Refused(
                "a batch norm needs two images or more at once; raise batch.images or "
                "batch.per_device"
            )
        mean = _all_sum(x.sum(dim=0)) / count
        centred = x - mean
        variance = _all_sum(centred.square().sum(dim=0)) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        normalised = centred * torch.rsqrt(variance + self.eps)
        if weight is not None and bias is not None:
            normalised = normalised * weight + bias
        return normalised.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.momentum is not None
        finite = (mean + variance).isfinite().all()
        for running, seen in ((self.running_mean, mean), (self.running_var, variance)):
            running.copy_(
                torch.where(finite, running.lerp(seen.to(running.dtype), self.momentum), running)
            )
        self.num_batches_tracked.add_(finite)

    def _apply(self, fn: Any, recurse: bool = True) -> GlobalBatchNorm:
        """Casts and moves of the module, except that running statistics never lose precision."""
        before = (self.running_mean, self.running_var)
        super()._apply(fn, recurse)
        if self.running_mean.dtype in (torch.bfloat16, torch.float16):
            device = self.running_mean.device
            self.running_mean, self.running_var = (table.to(device) for table in before)
        return self


class _AllSum(torch.autograd.Function):
    """The sum over ranks; what each rank's loss asks of it comes back as a sum, too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return dist.all_sum(values.contiguous().clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return dist.all_sum(grad.contiguous().clone())


def _all_sum(values: Tensor) -> Tensor:
    return values if dist.world() == 1 else _AllSum.apply(values)
