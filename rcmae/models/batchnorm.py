"""Batch normalisation over the images of all ranks, and over all positions of their maps, on CPU
and GPU alike.

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
    each; of maps also over all places, as `nn.BatchNorm2d`, with as many maps as each rank has.

    Collective in training, forwards and backwards: every rank calls. Statistics are float32
    (float64 for a float64 model) whatever the model computes in; running ones move only by what is
    finite, so that a step that is skipped for its NaNs leaves them as they were.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """[B, C] or [B, C, H, W] to the same, of the same type.

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
        if x.ndim == 4:
            assert weight is not None, "with maps there is an affine part"
            maps, mean, unbiased = _OfMaps.apply(input, weight, bias, self.eps)
            self._track(mean, unbiased)
            found: Tensor = maps
            return found
        count = len(x) * dist.world()  # as many on each rank
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

    def _check_input_dim(self, input: Tensor) -> None:
        """Maps, too."""

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


class _OfMaps(torch.autograd.Function):
    """Maps [B, C, H, W] normalised by each channel's mean and variance over all ranks; and the mean
    and the unbiased variance, which are not numbers where all ranks together have less than two
    places. Ranks may have maps of other numbers, or none.

    Keeps its input alone for the backward pass, as torch's own does: what autograd would keep of
    the arithmetic is three times as much, in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = maps.to(weight.dtype)
        # filled on the device: a copy from the host would wait for it
        places = x.new_full((1,), x.numel() // x.shape[1], dtype=torch.float64)
        totals = dist.all_sum(torch.cat([x.sum(dim=(0, 2, 3)).double(), places]))
        count = totals[-1]
        some = count.clamp(min=1)
        mean = (totals[:-1] / some).to(x.dtype)
        centred = x - _a_channel(mean)
        squares = dist.all_sum(centred.square().sum(dim=(0, 2, 3)))
        variance = (squares / some).to(x.dtype)
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(maps, weight, mean, scale, some)
        unbiased = (squares / (count - 1)).to(x.dtype)
        seen = torch.where(count > 1, mean, torch.nan).to(x.dtype)
        ctx.mark_non_differentiable(seen, unbiased)
        normalised = centred * _a_channel(scale * weight) + _a_channel(bias)
        return normalised.to(maps.dtype), seen, unbiased

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight, mean, scale, count = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        plain = (maps.to(weight.dtype) - _a_channel(mean)) * _a_channel(scale)
        of_bias = grad.sum(dim=(0, 2, 3))
        of_weight = (grad * plain).sum(dim=(0, 2, 3))
        both = dist.all_sum(torch.stack([of_bias, of_weight])) / count
        both = both.to(weight.dtype)
        moved = grad - _a_channel(both[0]) - plain * _a_channel(both[1])
        of_maps = moved * _a_channel(weight * scale)
        return of_maps.to(maps.dtype), of_weight, of_bias, None


def _a_channel(values: Tensor) -> Tensor:
    """A number a channel [C], to be met by maps."""
    return values[:, None, None]


def _all_sum(values: Tensor) -> Tensor:
    return values if dist.world() == 1 else _AllSum.apply(values)
