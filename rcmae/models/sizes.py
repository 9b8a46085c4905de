"""Architectures by name, and which sizes of a network fit together."""

from __future__ import annotations

import math
from dataclasses import dataclass

_DECODER = {"decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16}

# Encoders of ViT (Dosovitskiy et al.; tiny and small of DeiT) with the decoders of MAE and RC-MAE.
ARCHITECTURES: dict[str, dict[str, int]] = {
    "vit_tiny_patch16": {
        "patch_size": 16,
        "embed_dim": 192,
        "depth": 12,
        "num_heads": 3,
        "decoder_dim": 128,
        "decoder_depth": 2,
        "decoder_heads": 4,
    },
    "vit_small_patch16": {
        "patch_size": 16,
        "embed_dim": 384,
        "depth": 12,
        "num_heads": 6,
        "decoder_dim": 256,
        "decoder_depth": 4,
        "decoder_heads": 8,
    },
    "vit_base_patch16": {
        "patch_size": 16,
        "embed_dim": 768,
        "depth": 12,
        "num_heads": 12,
        **_DECODER,
    },
    "vit_large_patch16": {
        "patch_size": 16,
        "embed_dim": 1024,
        "depth": 24,
        "num_heads": 16,
        **_DECODER,
    },
    "vit_huge_patch14": {
        "patch_size": 14,
        "embed_dim": 1280,
        "depth": 32,
        "num_heads": 16,
        **_DECODER,
    },
    # of MAE-priv; its 1.6 billion parameters are those of other people's ViT-G less the wider MLP
    "vit_giant_patch14": {
        "patch_size": 14,
        "embed_dim": 1664,
        "depth": 48,
        "num_heads": 16,
        "decoder_dim": 512,
        "decoder_depth": 8,
        "decoder_heads": 8,
    },
}


@dataclass(frozen=True)
class NetworkSizes:
    """Sizes of an encoder, and of the decoder that it is pretrained with."""

    image_size: tuple[int, int]  # (height, width) in pixels
    patch_size: int  # side in pixels; divides both
    in_channels: int
    embed_dim: int  # a multiple of 4, for positions, and of num_heads
    depth: int
    num_heads: int
    decoder_dim: int = 0  # alike; 0: there is no decoder
    decoder_depth: int = 0
    decoder_heads: int = 0
    mlp_ratio: float = 4.0  # width of the hidden layer of an MLP over that of its block
    class_tokens: int = 1  # before the patches; 0: none
    registers: int = 0  # after those: tokens that no feature and no decoder sees

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches."""
        return self.class_tokens + self.registers

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """Of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def patch_pixels(self) -> int:
        """Numbers that a patch has."""
        return self.patch_size**2 * self.in_channels


def size_problems(sizes: NetworkSizes, *, heads_divide: bool = True, stride: int = 1) -> list[str]:
    """What stands against these sizes of an encoder with a decoder, one line a problem, with the
    way out.

    `heads_divide`: whether the decoder's heads must divide its width (BootMAE's need not).
    `stride`: pixels that sides must also be multiples of; sizes that are suggested are.
    """
    counts = {
        "image height": sizes.image_size[0],
        "image width": sizes.image_size[1],
        "patch_size": sizes.patch_size,
        "in_channels": sizes.in_channels,
        "embed_dim": sizes.embed_dim,
        "depth": sizes.depth,
        "num_heads": sizes.num_heads,
        "decoder_dim": sizes.decoder_dim,
        "decoder_depth": sizes.decoder_depth,
        "decoder_heads": sizes.decoder_heads,
    }
    small = [f"{name}={count} must be at least 1" for name, count in counts.items() if count < 1]
    for name in ("class_tokens", "registers"):
        if getattr(sizes, name) < 0:
            small.append(f"{name}={getattr(sizes, name)} must be at least 0")
    if small:
        return small
    problems = _grid_problems(sizes, stride)
    problems += _width_problems("embed_dim", sizes.embed_dim, "num_heads", sizes.num_heads)
    heads = sizes.decoder_heads if heads_divide else 1
    problems += _width_problems("decoder_dim", sizes.decoder_dim, "decoder_heads", heads)
    if sizes.mlp_ratio <= 0:
        problems.append(f"mlp_ratio={sizes.mlp_ratio} must be above 0")
    return problems


def _grid_problems(sizes: NetworkSizes, stride: int) -> list[str]:
    """What keeps images from being split into patches."""
    problems = []
    patch = sizes.patch_size
    unit = math.lcm(patch, stride)
    for name, side in zip(("height", "width"), sizes.image_size, strict=True):
        if side % patch:
            near = [side // unit * unit, -(-side // unit) * unit]
            use = " or ".join(str(size) for size in near if size)
            problems.append(
                f"patch_size={patch} does not divide the image {name} {side}; use {use}"
            )
    if sizes.num_patches < 2 and not problems:
        problems.append(
            f"an image of {sizes.image_size} has one patch of {patch}; masking needs two or more"
        )
    return problems


def _width_problems(name: str, width: int, key: str, heads: int) -> list[str]:
    """What keeps a width from having heads and positions."""
    problems = []
    if width % heads:
        problems.append(f"{name}={width} is not divisible by {key}={heads}")
    if width % 4:
        problems.append(
            f"{name}={width} must be a multiple of 4, for sines and cosines of two axes"
        )
    return problems
