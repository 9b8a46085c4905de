"""Blocks of a plain ViT for large images: timm's, with what it lacks.

A block's tokens stay [B, H, W, D]. Windowed blocks attend within windows, the others globally;
each has its decomposed relative positions. Global attention never forms the matrix of them: rows
and columns ride along as more channels of queries and keys, whose product is the biased logit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rcmae.models import kernels
from rcmae.models.blocks import Draws, DropPath, drop_path_rates
from rcmae.models.detection.sizes import BackboneSizes
from rcmae.process import extensions  # noqa: F401, it makes timm importable beside a CPU torch

from timm.models.vision_transformer_sam import Attention, Block, get_rel_pos


class WideAttention(Attention):
    """timm's attention with decomposed relative positions, in one fused product.

    The logit of a query and a key is scale q k + q R_h + q R_w (Li et al., 2022). With
    q' = [scale q, q R_h of each row, q R_w of each column] and k' = [k, one at its row, one at its
    column] it is q' k'.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, H, W, D] to the same."""
        if not self.fused_attn:
            mixed: Tensor = super().forward(x)
            return mixed
        batch, height, width, dim = x.shape
        q, k, v = (
            self.qkv(x.flatten(1, 2))
            .unflatten(2, (3, self.num_heads, -1))
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        grid = q.unflatten(2, (height, width))  # [B, heads, H, W, d]
        down = get_rel_pos(height, height, self.rel_pos_h).to(q.dtype)  # [H, H, d]
        along = get_rel_pos(width, width, self.rel_pos_w).to(q.dtype)
        rows = torch.einsum("bnhwc,hkc->bnhwk", grid, down).flatten(2, 3)
        columns = torch.einsum("bnhwc,wkc->bnhwk", grid, along).flatten(2, 3)
        places = torch.cat(
            [
                torch.eye(height, dtype=k.dtype, device=k.device).repeat_interleave(width, 0),
                torch.eye(width, dtype=k.dtype, device=k.device).repeat(height, 1),
            ],
            dim=1,
        )  # [H * W, H + W]
        spare = -(q.shape[3] + height + width) % 8  # fused kernels want a multiple of 8
        queries = F.pad(torch.cat([q * self.scale, rows, columns], dim=3), (0, spare))
        keys = torch.cat([k, places.expand(*k.shape[:2], -1, -1)], dim=3)
        keys = F.pad(keys, (0, spare))
        values = F.pad(v, (0, queries.shape[3] - v.shape[3]))  # and all of one width
        mixed = F.scaled_dot_product_attention(queries, keys, values, scale=1.0)
        joined = mixed[..., : v.shape[3]].transpose(1, 2).reshape(batch, height, width, dim)
        out: Tensor = self.proj(joined)
        return out


def window_blocks(sizes: BackboneSizes, draws: Draws) -> list[Block]:
    """The blocks of a ViT, named and built as ViTDet's; drop path takes its draws from `draws`."""
    vit = sizes.vit
    rates = drop_path_rates(sizes.drop_path, vit.depth)
    blocks = []
    for number in range(vit.depth):
        block = Block(
            vit.embed_dim,
            vit.num_heads,
            mlp_ratio=vit.mlp_ratio,
            norm_layer=kernels.layer_norm(),
            use_rel_pos=True,
            window_size=sizes.window if number in sizes.windowed else 0,
            input_size=vit.grid,
        )
        if number not in sizes.windowed:
            block.attn = WideAttention(
                vit.embed_dim, vit.num_heads, use_rel_pos=True, input_size=vit.grid
            )
        for branch, name in enumerate(("drop_path1", "drop_path2")):
            setattr(block, name, DropPath(draws, number, branch, rates[number]))
        blocks.append(block)
    return blocks
