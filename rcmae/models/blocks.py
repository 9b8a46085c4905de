"""What a Vision Transformer is made of: a patch embedding for patches that are cut out already,
blocks whose last computes the tail of the tokens alone, and drop path that is keyed by sample.

Blocks compute as timm's do and name their parameters as timm does, but are not timm's: importing it
imports torchvision and torch's compiler, two seconds in each process of a training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcmae.data.draws import Purpose, uniform
from rcmae.errors import Refused
from rcmae.models import kernels
from rcmae.models.batchnorm import GlobalBatchNorm

# one bias for queries, keys and values; or none for the keys, as two parameters
QKVBias = Literal["qkv", "qv"]


class PatchProjection(nn.Conv2d):
    """The published patch embedding, for patches that are cut out already: a matrix product."""

    def forward(self, input: Tensor) -> Tensor:
        """Patches [B, n, C, p, p] to tokens [B, n, D], in the type of the weight."""
        return F.linear(input.flatten(2).to(self.weight.dtype), self.weight.flatten(1), self.bias)


class Attention(nn.Module):
    """Self-attention (Dosovitskiy et al., 2021, appendix A). Parameters are named as in timm."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise Refused(f"a width of {dim} is not divisible by {num_heads} heads")
        # fused_attn: see kernels.choose_attention
        self.num_heads = num_heads
        self.fused_attn = True
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, first_query: int = 0) -> Tensor:
        """Tokens [B, N, D] to [B, N - first_query, D]: keys and values of all, queries of the
        tail.
        """
        # the query projection of the few head tokens is wasted: slicing its weight would reach
        # around the engines that gather a parameter when its module is called
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        # [B, heads, N - first_query, d]
        mixed = kernels.attention(q[:, :, first_query:], k, v, fused=self.fused_attn)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class SplitBiasAttention(nn.Module):
    """Self-attention with a bias for queries and one for values; none for keys, where softmax
    cancels it.

    Parameters are named as in BEiT, BootMAE and MAE-priv.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        # fused_attn: see kernels.choose_attention
        self.num_heads = num_heads
        self.fused_attn = True
        # as published, of a dim that heads do not divide the rest is left out
        inner = dim // num_heads * num_heads
        self.q_bias = nn.Parameter(torch.zeros(inner))
        self.v_bias = nn.Parameter(torch.zeros(inner))
        self.qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.proj = nn.Linear(inner, dim)

    def forward(self, x: Tensor, first_query: int = 0) -> Tensor:
        """Tokens [B, N, D] to [B, N - first_query, D]: keys and values of all, queries of the
        tail.
        """
        # the biases are added beside the module, not given to its product: engines that gather a
        # parameter when its module is called have not gathered the weight here
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = (
            (self.qkv(x) + bias)
            .unflatten(2, (3, self.num_heads, -1))
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        mixed = kernels.attention(q[:, :, first_query:], k, v, fused=self.fused_attn)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them. Parameters are named as in timm."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, N, D] to tokens [B, N, D]."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Attention and an MLP, each normalised before and added. Parameters are named as in timm."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        norm: Callable[..., nn.Module],
        qkv_bias: QKVBias = "qkv",
    ) -> None:
        super().__init__()
        attention = Attention if qkv_bias == "qkv" else SplitBiasAttention
        self.norm1 = norm(dim)
        self.attn = attention(dim, num_heads)
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path1: nn.Module = nn.Identity()  # see put_drop_path
        self.drop_path2: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, N, D] to tokens [B, N, D]."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class LastBlock(Block):
    """A block with an answer for the tail of the tokens alone: keys and values of all, queries of
    the tail. A class of its own, so that it is compiled by itself.
    """

    def forward(self, x: Tensor, first_query: int = 0) -> Tensor:
        """Tokens [B, N, D] to tokens [B, N - first_query, D]."""
        tail = x[:, first_query:] + self.drop_path1(self.attn(self.norm1(x), first_query))
        return tail + self.drop_path2(self.mlp(self.norm2(tail)))


def class_head(width: int, hidden: int, num_classes: int) -> nn.Module:
    """SupMAE's classification head: two layers with a batch norm between them, or one layer
    where `hidden` is 0.
    """
    if not hidden:
        return nn.Linear(width, num_classes)
    return nn.Sequential(
        nn.Linear(width, hidden),
        GlobalBatchNorm(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, num_classes),
    )


class Draws:
    """Where the blocks of one network find the draws of the forward under way."""

    keep: Tensor | None = None  # [B, depth, 2] bool


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): leaves a residual branch of a sample out, and
    scales what stays.
    """

    def __init__(self, draws: Draws, block: int, branch: int, rate: float) -> None:
        super().__init__()
        self._draws = draws
        self._block = block
        self._branch = branch
        self._rate = rate

    @property
    def drops(self) -> bool:
        """Whether a branch is ever left out."""
        return self._rate > 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, N, D] of the branch, or zeros; also [B * n, ...], n windows of each image."""
        keep = self._draws.keep
        if keep is None or not self.training or self._rate == 0.0:
            return x
        scale = keep[:, self._block, self._branch].to(x.dtype) / (1.0 - self._rate)
        each = scale.repeat_interleave(len(x) // len(scale))
        return x * each.view(-1, *[1] * (x.ndim - 1))


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """The rate of each block: 0 at the first, growing linearly to `rate` at the last."""
    last = max(depth - 1, 1)
    return [rate * index / last for index in range(depth)]


def put_drop_path(blocks: Iterable[nn.Module], rates: Sequence[float]) -> Draws:
    """Drop path of these rates in both branches of blocks; where they find its draws."""
    draws = Draws()
    for index, (block, rate) in enumerate(zip(blocks, rates, strict=True)):
        for branch, name in enumerate(("drop_path1", "drop_path2")):
            setattr(block, name, DropPath(draws, index, branch, rate))
    return draws


def drop_path_draws(seed: int, positions: Sequence[int], rates: Sequence[float]) -> Tensor:
    """[B, depth, 2] bool, True = the branch stays: a function of the seed and each sample's
    position alone.
    """
    drop = torch.tensor(rates, dtype=torch.float64)[:, None].expand(-1, 2)
    draws = [
        uniform(seed, Purpose.DROP_PATH, position, count=2 * len(rates)) for position in positions
    ]
    return torch.stack([torch.from_numpy(row).view(-1, 2) >= drop for row in draws])


def sent(draws: Tensor, device: torch.device) -> Tensor:
    """What the host drew, where it is used. A GPU is not waited for: it copies from page-locked
    memory, behind what it is doing.
    """
    if device.type != "cuda":
        return draws.to(device)
    return draws.pin_memory().to(device, non_blocking=True)
