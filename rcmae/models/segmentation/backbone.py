"""A plain ViT that gives maps: outputs of four blocks, made into a pyramid (BEiT, appendix C)."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rcmae.models import kernels
from rcmae.models.batchnorm import GlobalBatchNorm
from rcmae.models.blocks import Draws, DropPath, QKVBias
from rcmae.models.patches import sincos_positions
from rcmae.models.segmentation.attention import RelativeAttention
from rcmae.models.sizes import NetworkSizes
from rcmae.process import extensions  # noqa: F401, it makes timm importable beside a CPU torch

from timm.models.beit import Block


def usual_levels(depth: int) -> tuple[int, ...]:
    """The blocks whose outputs are taken, where a recipe names none, as published: those at a
    third, a half, two thirds and the end (3, 5, 7, 11 of 12; 7, 11, 15, 23 of 24)."""
    return (depth // 3 - 1, depth // 2 - 1, 2 * depth // 3 - 1, depth - 1)


@dataclass(frozen=True)
class Form:
    """What a segmenter's encoder has beside its sizes."""

    levels: tuple[int, ...] = ()  # blocks whose outputs become the pyramid; none: normed tokens
    relative_positions: bool = True  # a learnt bias a pair of positions, in each block
    layer_scale: bool = True  # a learnt factor a channel on each branch, 1 at the start
    qkv_bias: QKVBias = "qkv"
    drop_path: float = 0.0  # rate at the last block; it grows from 0 at the first


class Backbone(nn.Module):
    """The encoder and its pyramid: strides of a quarter, a half, one and two patches.

    Weights are drawn by `Segmenter.draw_weights`.

    Args:
        sizes: of the encoder; the image is one crop.
        form: the rest of it.
        norm_layer: makes a layer norm of a given width; see `kernels.layer_norm`.
    """

    def __init__(
        self,
        sizes: NetworkSizes,
        form: Form,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        width, patch = sizes.embed_dim, sizes.patch_size
        norm = norm_layer or kernels.layer_norm()
        self.sizes = sizes
        self.grid = sizes.grid
        self.levels = form.levels
        self.class_tokens = sizes.class_tokens
        self.cls_token = nn.Parameter(torch.zeros(1, self.class_tokens, width))
        positions = sincos_positions(width, sizes.grid, prefix=self.class_tokens).float()
        self.pos_embed = nn.Parameter(positions[None])  # trained here
        projection = nn.Conv2d(sizes.in_channels, width, patch, stride=patch)
        self.patch_embed = nn.Sequential(OrderedDict(proj=projection))
        last = max(sizes.depth - 1, 1)
        self.drop_path_rates = [form.drop_path * index / last for index in range(sizes.depth)]
        self.draws = Draws()
        grid = sizes.grid if form.relative_positions else None
        self.blocks = nn.ModuleList()
        for index, rate in enumerate(self.drop_path_rates):
            block = Block(
                width,
                sizes.num_heads,
                mlp_ratio=sizes.mlp_ratio,
                norm_layer=norm,
                init_values=1.0 if form.layer_scale else None,
            )
            block.attn = RelativeAttention(width, sizes.num_heads, grid, form.qkv_bias)
            dropping = functools.partial(DropPath, self.draws, index)
            block.drop_path1, block.drop_path2 = dropping(0, rate), dropping(1, rate)
            self.blocks.append(block)
        if form.levels:
            self.fpn1 = nn.Sequential(
                _doubling(width), GlobalBatchNorm(width), nn.GELU(), _doubling(width)
            )
            self.fpn2 = nn.Sequential(_doubling(width))
            self.fpn4 = nn.MaxPool2d(2, 2)
        else:
            self.norm = norm(width)

    def tokens(self, images: Tensor) -> Tensor:
        """[B, class tokens + L, D] of normalised images, positions added."""
        x = self.patch_embed(images.to(self.pos_embed.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return x + self.pos_embed

    def outputs(self, images: Tensor) -> list[Tensor]:
        """Maps [B, D, rows, columns] of the blocks in `levels`, without a norm; or, where there are
        none, of the last block, normed."""
        x = self.tokens(images)
        found = {}
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.levels:
                found[index] = self._as_map(x)
        return [found[level] for level in self.levels] or [self._as_map(self.norm(x))]

    def pyramid(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps of one size to sides of 4, 2, 1 and 1/2 times it."""
        first, second, third, fourth = maps
        return [self.fpn1(first), self.fpn2(second), third, self.fpn4(fourth)]

    def forward(self, images: Tensor) -> list[Tensor]:
        """The pyramid of normalised images [B, C, H, W]; or the one map of normed tokens."""
        maps = self.outputs(images)
        return self.pyramid(maps) if self.levels else maps

    def _as_map(self, tokens: Tensor) -> Tensor:
        return tokens[:, self.class_tokens :].transpose(1, 2).unflatten(2, self.grid)


def _doubling(width: int) -> nn.Module:
    return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)
