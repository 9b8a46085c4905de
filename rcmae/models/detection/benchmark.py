"""The backbone of "Benchmarking Detection Transfer Learning with Vision Transformers" (Li et al.,
2021), which RC-MAE's table of COCO was made with.

Blocks come in four sections; all but the last of each attend within windows. Each section's
tokens go through an adapter into a feature pyramid (Lin et al., 2017), whose batch norms are over
the images that all ranks take at once. Relative positions are one table for all windowed blocks and
one for all global ones. Names are the published ones: `bottom_up.*`, `fpn_*`.

Absolute positions are fixed at the canvas's grid. The published table has its halves swapped
against MAE's; ours has not, unless `positions` is "row_first".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rcmae.models import kernels
from rcmae.models.blocks import Draws, DropPath, drop_path_rates
from rcmae.models.detection.layers import NormedConv, patch_embedding
from rcmae.models.detection.sizes import BackboneSizes
from rcmae.models.detection.vitdet import halved
from rcmae.models.patches import sincos_positions
from rcmae.process import extensions  # noqa: F401, it makes timm importable beside a CPU torch

from timm.models.vision_transformer import Block
from timm.models.vision_transformer_sam import window_partition, window_unpartition

SECTIONS = 4
BAND = 2**24  # numbers of a bias at most: 32 MB of bf16


class RelativeBias(nn.Module):
    """A learned bias for each head and each offset between two patches of a grid."""

    def __init__(self, grid: tuple[int, int], heads: int) -> None:
        super().__init__()
        self.grid = grid
        height, width = grid
        rows = (2 * height - 1) * (2 * width - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))

    def forward(self) -> Tensor:
        """[heads, 2 rows - 1, 2 columns - 1], for `bias_of`."""
        height, width = self.grid
        table = self.relative_position_bias_table.unflatten(0, (2 * height - 1, 2 * width - 1))
        return table.permute(2, 0, 1).contiguous()


def bias_of(offsets: Tensor, rows: range) -> Tensor:
    """[heads, len(rows) * columns, L] what is added to the logits of the queries in some rows of
    the grid, and all keys: of (yi, xi) and (yj, xj) it is that of the offset (yi - yj, xi - xj).

    Made of views, without an index: that of a canvas of 1024 pixels has 134 MB, and the gradient
    of an indexed table is added up in no fixed order on a GPU.

    Args:
        offsets: [heads, 2 height - 1, 2 width - 1].
        rows: of the queries.
    """
    height, width = ((side + 1) // 2 for side in offsets.shape[1:])
    seen = offsets[:, rows.start : rows.stop + height - 1]
    shifted = seen.unfold(1, height, 1).unfold(2, width, 1)  # [heads, rows, width, height, width]
    return shifted.flip(3, 4).flatten(3, 4).flatten(1, 2)


class BiasedAttention(nn.Module):
    """Self-attention of a grid of patches whose logits get a bias.

    The matrix of a large grid is not formed (12 x 4096 x 4096 at 1024 pixels): rows of queries are
    taken a band at a time, and a band's bias is made again in the backward pass. The bias has a
    number for each offset and is of no low rank, so it cannot ride along as channels of queries
    and keys, as `windows.WideAttention`'s does.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.fused_attn = True  # see kernels.choose_attention
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Tokens [B, L, D] of a grid to the same; offsets: [heads, 2 rows - 1, 2 columns - 1]."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        offsets = offsets.to(q.dtype)
        height, width = ((side + 1) // 2 for side in offsets.shape[1:])
        each = max(1, BAND // (self.num_heads * width * x.shape[1]))  # rows of a band
        bands = [range(top, min(top + each, height)) for top in range(0, height, each)]
        parts = []
        for rows in bands:
            some = q[:, :, rows.start * width : rows.stop * width]
            if len(bands) > 1 and torch.is_grad_enabled():
                part = checkpoint(
                    self._mixed,
                    *(some, k, v, offsets, rows),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                part = self._mixed(some, k, v, offsets, rows)
            parts.append(part)
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        found: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return found

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, rows: range) -> Tensor:
        """[B, heads, n, d] of the n queries in some rows."""
        bias = bias_of(offsets, rows)
        if self.fused_attn:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
        return logits.softmax(dim=-1) @ v


class BiasedBlock(Block):
    """timm's block around an attention with a bias."""

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Tokens [B, L, D] of a grid to the same; offsets: as `BiasedAttention` takes them."""
        x = x + self.drop_path1(self.attn(self.norm1(x), offsets))
        found: Tensor = x + self.drop_path2(self.mlp(self.norm2(x)))
        return found


class SectionedViT(nn.Module):
    """A plain ViT of four sections, and an adapter for each."""

    pos_embed: Tensor  # [1, L, D]

    def __init__(self, sizes: BackboneSizes, draws: Draws) -> None:
        super().__init__()
        vit = sizes.vit
        width = vit.embed_dim
        self._window = sizes.window
        self._grid = vit.grid
        self.patch_embed = patch_embedding(vit.in_channels, width, vit.patch_size)
        table = sincos_positions(width, vit.grid, prefix=0, order=sizes.positions)
        self.register_buffer("pos_embed", table.float()[None])
        self.blocks = nn.ModuleList(
            BiasedBlock(
                width,
                vit.num_heads,
                mlp_ratio=vit.mlp_ratio,
                qkv_bias=True,
                norm_layer=kernels.layer_norm(),
            )
            for _ in range(vit.depth)
        )
        for number, (block, rate) in enumerate(
            zip(self.blocks, drop_path_rates(sizes.drop_path, vit.depth), strict=True)
        ):
            block.attn = BiasedAttention(width, vit.num_heads)
            for branch, name in enumerate(("drop_path1", "drop_path2")):
                setattr(block, name, DropPath(draws, number, branch, rate))
        self.ms_adaptor = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(width, width, 2, stride=2),
                    nn.GroupNorm(sizes.groups, width),
                    nn.GELU(),
                    nn.ConvTranspose2d(width, width, 2, stride=2),
                ),
                nn.ConvTranspose2d(width, width, 2, stride=2),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )
        self.windowed_rel_pos_bias = RelativeBias((sizes.window, sizes.window), vit.num_heads)
        self.global_rel_pos_bias = RelativeBias(vit.grid, vit.num_heads)

    def forward(self, images: Tensor) -> list[Tensor]:
        """What each adapter gives: [B, D, h, w] at strides of 4, 8, 16 and 32 patches of 16."""
        x = self.patch_embed(images).permute(0, 2, 3, 1)  # [B, rows, columns, D]
        x = (x + self.pos_embed.unflatten(1, self._grid)).to(x.dtype)
        within = self.windowed_rel_pos_bias()
        everywhere = self.global_rel_pos_bias()
        each = len(self.blocks) // SECTIONS
        found = []
        for section, adapter in enumerate(self.ms_adaptor):
            blocks = self.blocks[section * each : (section + 1) * each]
            x, padded = window_partition(x, self._window)
            tokens = x.flatten(1, 2)
            for block in blocks[:-1]:
                tokens = block(tokens, within)
            tokens = tokens.unflatten(1, (self._window, self._window))
            x = window_unpartition(tokens, self._window, self._grid, padded)
            x = blocks[-1](x.flatten(1, 2), everywhere).unflatten(1, self._grid)
            found.append(adapter(x.permute(0, 3, 1, 2)))
        return found


class Pyramid(nn.Module):
    """Levels p2 to p6: the four adapters' maps, each with what is coarser added from above.

    Args:
        sizes: of the ViT and the pyramid.
        draws: where drop path finds its draws.
    """

    def __init__(self, sizes: BackboneSizes, draws: Draws) -> None:
        super().__init__()
        self.bottom_up = SectionedViT(sizes, draws)
        for level in range(2, 2 + SECTIONS):
            lateral = NormedConv(sizes.vit.embed_dim, sizes.channels, 1, "BN")
            setattr(self, f"fpn_lateral{level}", lateral)
            output = NormedConv(sizes.channels, sizes.channels, 3, "BN")
            setattr(self, f"fpn_output{level}", output)

    @property
    def vit(self) -> SectionedViT:
        """The ViT, whose blocks engines shard."""
        return self.bottom_up

    def forward(self, images: Tensor) -> list[Tensor]:
        """Levels [B, C, h, w], p2 to p6, of normalised images [B, C, H, W]."""
        adapted = self.bottom_up(images)
        levels: list[Tensor] = []
        above: Tensor | None = None
        for number in range(SECTIONS - 1, -1, -1):
            lateral = getattr(self, f"fpn_lateral{number + 2}")(adapted[number])
            if above is not None:
                lateral = lateral + F.interpolate(above, scale_factor=2, mode="nearest")
            above = lateral
            levels.insert(0, getattr(self, f"fpn_output{number + 2}")(lateral))
        return [*levels, halved(levels[-1])]
