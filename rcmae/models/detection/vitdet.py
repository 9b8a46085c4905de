"""ViTDet's backbone (Li et al., 2022): a plain ViT with windows, a pyramid from its last tokens.

Tokens stay [B, H, W, D]; there is no class token and no last norm. Names are the published ones:
`net.*` the ViT, `simfp_{2,3,4,5}.*` the pyramid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcmae.models.blocks import Draws
from rcmae.models.detection.boxes import widened
from rcmae.models.detection.layers import NormedConv, patch_embedding
from rcmae.models.detection.sizes import BackboneSizes
from rcmae.models.detection.windows import window_blocks
from rcmae.models.fitting import resample_positions
from rcmae.models.patches import sincos_positions
from rcmae.process import extensions  # noqa: F401, it makes timm importable beside a CPU torch

from timm.layers import LayerNorm2d


class WindowedViT(nn.Module):
    """A plain ViT on a canvas of any grid, its positions those of pretraining, interpolated."""

    def __init__(self, sizes: BackboneSizes, draws: Draws) -> None:
        super().__init__()
        vit = sizes.vit
        self._table = sizes.table
        table = sincos_positions(vit.embed_dim, sizes.table, prefix=1)
        self.pos_embed = nn.Parameter(table.float()[None])  # row 0, of a class token, plays no part
        self.patch_embed = patch_embedding(vit.in_channels, vit.embed_dim, vit.patch_size)
        self.blocks = nn.ModuleList(window_blocks(sizes, draws))

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """[1, H, W, D] at a grid."""
        table = resample_positions(widened(self.pos_embed), self._table, grid)
        return table[:, 1:].unflatten(1, grid)

    def embed(self, images: Tensor) -> Tensor:
        """Tokens [B, H, W, D], positions not yet added."""
        tokens: Tensor = self.patch_embed(images)
        return tokens.permute(0, 2, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Tokens [B, H, W, D] of the last block."""
        x = self.embed(images)
        x = (x + self.positions((x.shape[1], x.shape[2]))).to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return x


class SimplePyramid(nn.Module):
    """Levels p2 to p6 from the last tokens alone: up by transposed convolutions, down by pooling.

    Args:
        sizes: of the ViT and the pyramid.
        draws: where drop path finds its draws.
    """

    def __init__(self, sizes: BackboneSizes, draws: Draws) -> None:
        super().__init__()
        width = sizes.vit.embed_dim
        channels = sizes.channels
        self.net = WindowedViT(sizes, draws)
        self.simfp_2 = nn.Sequential(
            nn.ConvTranspose2d(width, width // 2, 2, stride=2),
            LayerNorm2d(width // 2, eps=1e-6),
            nn.GELU(),
            nn.ConvTranspose2d(width // 2, width // 4, 2, stride=2),
            *_to_level(width // 4, channels),
        )
        self.simfp_3 = nn.Sequential(
            nn.ConvTranspose2d(width, width // 2, 2, stride=2), *_to_level(width // 2, channels)
        )
        self.simfp_4 = nn.Sequential(*_to_level(width, channels))
        self.simfp_5 = nn.Sequential(nn.MaxPool2d(2, stride=2), *_to_level(width, channels))

    @property
    def vit(self) -> WindowedViT:
        """The ViT, whose blocks engines shard."""
        return self.net

    def forward(self, images: Tensor) -> list[Tensor]:
        """Levels [B, C, h, w], p2 to p6, of normalised images [B, C, H, W]."""
        tokens = self.net(images).permute(0, 3, 1, 2)
        levels = [
            level(tokens) for level in (self.simfp_2, self.simfp_3, self.simfp_4, self.simfp_5)
        ]
        return [*levels, halved(levels[-1])]


def _to_level(inputs: int, channels: int) -> list[nn.Module]:
    """What each level ends with."""
    return [NormedConv(inputs, channels, 1, "LN"), NormedConv(channels, channels, 3, "LN")]


def halved(level: Tensor) -> Tensor:
    """Every second pixel of every second row: the coarsest level, for large anchors."""
    return F.max_pool2d(level, 1, stride=2)


def positions_for(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A table [1, c + L, D] of pretraining as `net.pos_embed` has it: of another grid, with a row
    before it for a class token.
    """
    resampled = resample_positions(table, old, new)
    if resampled.shape[1] == new[0] * new[1]:
        resampled = F.pad(resampled, (0, 0, 1, 0))
    return torch.cat([resampled[:, :1], resampled[:, -new[0] * new[1] :]], dim=1)
