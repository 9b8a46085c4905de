"""Attention with a learnt bias for each relative position, as BEiT, BootMAE and MAE fine-tune dense
predictions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rcmae.models import kernels
from rcmae.models.blocks import QKVBias


def relative_bias(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """What is added to the attention of each pair of tokens: [heads, 1 + L, 1 + L].

    Row i, column j of two patches is the table's row (yi - yj + rows - 1) * (2 columns - 1) + (xi -
    xj + columns - 1). Of its last three rows the first is the class token's row, the second its
    column, the third what it has with itself (BEiT). Made of views, without an index: the gradient
    of an indexed table is added up in no fixed order on a GPU.

    Args:
        table: [(2 rows - 1) * (2 columns - 1) + 3, heads].
        grid: rows and columns of patches.
    """
    rows, columns = grid
    patches = table[:-3].unflatten(0, (2 * rows - 1, 2 * columns - 1))
    # [yi, xi, heads, rows - 1 - yj, columns - 1 - xj]
    shifted = patches.unfold(0, rows, 1).unfold(1, columns, 1).flip(3, 4)
    pairs = shifted.permute(2, 0, 1, 3, 4).flatten(3, 4).flatten(1, 2)  # [heads, L, L]
    of_row, of_column, of_itself = table[-3:].unsqueeze(2).unsqueeze(3)  # [heads, 1, 1] each
    count = rows * columns
    first = torch.cat([of_itself, of_row.expand(-1, 1, count)], dim=2)
    others = torch.cat([of_column.expand(-1, count, 1), pairs], dim=2)
    return torch.cat([first, others], dim=1)


class RelativeAttention(nn.Module):
    """Self-attention of a grid of patches behind a class token.

    Args:
        dim: of the tokens.
        num_heads: divides it.
        grid: rows and columns of patches; None: no bias of positions.
        qkv_bias: "qkv" one bias (MAE's weights), "qv" none for the keys (BootMAE's, BEiT's).
    """

    def __init__(
        self, dim: int, num_heads: int, grid: tuple[int, int] | None, qkv_bias: QKVBias
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.fused_attn = True  # see kernels.choose_attention
        self.grid = grid
        self.splits_bias = qkv_bias == "qv"
        if self.splits_bias:
            self.q_bias = nn.Parameter(torch.zeros(dim))
            self.v_bias = nn.Parameter(torch.zeros(dim))
        if grid is not None:
            size = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
            self.relative_position_bias_table = nn.Parameter(torch.zeros(size, num_heads))
        self.qkv = nn.Linear(dim, 3 * dim, bias=not self.splits_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        """Tokens [B, 1 + L, D] to the same."""
        qkv = self.qkv(x)
        if self.splits_bias:  # beside the product: engines gather the weight when qkv is called
            zeros = torch.zeros_like(self.q_bias)
            qkv = qkv + torch.cat([self.q_bias, zeros, self.v_bias])
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = None
        if self.grid is not None:
            bias = relative_bias(self.relative_position_bias_table, self.grid).to(q.dtype)
        mixed = kernels.attention(q, k, v, fused=self.fused_attn, bias=bias)
        return self.proj(mixed.transpose(1, 2).flatten(2))
