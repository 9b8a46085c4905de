"""The masked autoencoder: a Vision Transformer that sees some patches and a small decoder that predicts the others.

Everything happens in shuffled order: `ids_shuffle` [B, L] is a permutation of the patches whose first `num_visible` the
encoder sees. Only those are embedded; the decoder's tokens stand in the order [cls, visible, hidden] with positions
gathered to match, so hidden predictions are the tail and nothing is ever put back in place for training. The decoder's
last block asks queries for hidden tokens alone, because the loss reads no others.

Blocks are timm's and parameters carry the published names, so published weights load with `strict=True`. Positions are
fixed sin-cos tables (MAE, appendix A.1): float32 buffers at any compute type. Not done: learned or rotary positions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcmae import kernels  # first: it makes timm importable beside a CPU torch

from timm.models.vision_transformer import Block  # isort: skip

What = Literal["hidden", "all", "features"]

_DECODER = {"decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16}

# Encoders of ViT (Dosovitskiy et al.; tiny and small of DeiT) with the decoders of MAE and RC-MAE.
ARCHITECTURES: dict[str, dict[str, int]] = {
    "vit_tiny_patch16": {
        "patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3,
        "decoder_dim": 128, "decoder_depth": 2, "decoder_heads": 4,
    },
    "vit_small_patch16": {
        "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6,
        "decoder_dim": 256, "decoder_depth": 4, "decoder_heads": 8,
    },
    "vit_base_patch16": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, **_DECODER},
    "vit_large_patch16": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16, **_DECODER},
    "vit_huge_patch14": {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16, **_DECODER},
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- patches


def patch_grid(images: Tensor, patch_size: int) -> Tensor:
    """Images [B, C, H, W] cut into patches [B, H/p, W/p, C, p, p]: a view, nothing is copied."""
    return images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size)).permute(0, 2, 4, 1, 3, 5)


def patches_at(images: Tensor, patch_size: int, ids: Tensor) -> Tensor:
    """The patches [B, n, C, p, p] at raster indices `ids` [B, n]; the others are never touched."""
    grid = patch_grid(images, patch_size)
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    return grid[rows, ids // grid.shape[2], ids % grid.shape[2]]


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Images [B, C, H, W] as rows of pixels [B, L, p*p*C], in the published order (p_row, p_col, channel)."""
    return patch_grid(images, patch_size).permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int, image_size: tuple[int, int], in_channels: int) -> Tensor:
    """The images [B, C, H, W] whose `patchify` is `patches` [B, L, p*p*C]."""
    rows, columns = image_size[0] // patch_size, image_size[1] // patch_size
    grid = patches.unflatten(2, (patch_size, patch_size, in_channels)).unflatten(1, (rows, columns))
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def sincos_positions(dim: int, grid: tuple[int, int], *, cls_token: bool) -> Tensor:
    """The 2-D sin-cos table [rows, dim] in float64, raster order, after a row of zeros where `cls_token`.

    The first half of the columns encodes the patch's column, the second its row, each as sines then cosines of
    geometric frequencies 1 ... 1/10000.
    """
    quarter = dim // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (column, row)]  # each [L, dim/4]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return F.pad(table, (0, 0, 1, 0)) if cls_token else table


# -------------------------------------------------------------------------------------------------------------- blocks


class PatchProjection(nn.Conv2d):
    """The published patch embedding, for patches that are cut out already: its kernel meets each of them once."""

    def forward(self, input: Tensor) -> Tensor:
        """Patches [B, n, C, p, p] to tokens [B, n, D], in the type of the weight."""
        return F.linear(input.flatten(2).to(self.weight.dtype), self.weight.flatten(1), self.bias)


class LastBlock(Block):
    """timm's block, with an answer for the tail of the tokens alone: keys and values of all, queries of the tail."""

    def forward(self, x: Tensor, first_query: int = 0) -> Tensor:
        """Tokens [B, N, D] to tokens [B, N - first_query, D]."""
        attn, heads = self.attn, self.attn.num_heads
        # the query projection of the few head tokens is wasted: slicing its weight would reach around the engines
        # that gather a parameter when its module is called
        q, k, v = attn.qkv(self.norm1(x)).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = kernels.attention(q[:, :, first_query:], k, v, fused=attn.fused_attn)  # [B, heads, N - first_query, d]
        tail = x[:, first_query:] + self.drop_path1(self.ls1(attn.proj(mixed.transpose(1, 2).flatten(2))))
        return tail + self.drop_path2(self.ls2(self.mlp(self.norm2(tail))))


# --------------------------------------------------------------------------------------------------------------- model


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder of MAE and RC-MAE. Weights are drawn at construction from a fixed seed.

    Parameters may be cast to a lower type: images are cast to theirs, predictions come in it, and the position tables
    stay float32.

    Args:
        image_size: (height, width) in pixels.
        patch_size: side of a patch in pixels; divides both.
        in_channels: of the images.
        embed_dim: width of the encoder; a multiple of 4 (positions) and of num_heads.
        depth: blocks of the encoder.
        num_heads: of its attention.
        decoder_dim: width of the decoder; a multiple of 4 and of decoder_heads.
        decoder_depth: blocks of the decoder, at least 1.
        decoder_heads: of its attention.
        mlp_ratio: width of the hidden layer of an MLP over that of its block.
        norm_layer: makes a layer norm of a given width; see `kernels.layer_norm`.

    Raises:
        ValueError: sizes that do not fit, all of them at once.
    """

    pos_embed: Tensor  # [1, 1 + L, D]
    decoder_pos_embed: Tensor  # [1, 1 + L, decoder_dim]

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        patch_size: int,
        in_channels: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        decoder_dim: int,
        decoder_depth: int,
        decoder_heads: int,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.sizes: dict[str, Any] = {
            "image_size": image_size, "patch_size": patch_size, "in_channels": in_channels, "embed_dim": embed_dim,
            "depth": depth, "num_heads": num_heads, "decoder_dim": decoder_dim, "decoder_depth": decoder_depth,
            "decoder_heads": decoder_heads, "mlp_ratio": mlp_ratio,
        }  # fmt: skip
        if problems := size_problems(**self.sizes):
            raise ValueError("\n".join(problems))
        self.image_size, self.patch_size = image_size, patch_size
        self.in_channels, self.embed_dim = in_channels, embed_dim
        grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.num_patches = grid[0] * grid[1]
        norm = norm_layer or kernels.layer_norm()

        def block(kind: type[Block], width: int, heads: int) -> Block:
            return kind(width, heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm)

        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        for name, width in (("pos_embed", embed_dim), ("decoder_pos_embed", decoder_dim)):
            self.register_buffer(name, sincos_positions(width, grid, cls_token=True).float()[None])
        # one child, so that its parameters are called patch_embed.proj.*
        projection = PatchProjection(in_channels, embed_dim, patch_size, stride=patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=projection))
        self.blocks = nn.ModuleList(block(Block, embed_dim, num_heads) for _ in range(depth))
        self.norm = norm(embed_dim)
        self.decoder_embed = nn.Linear(embed_dim, decoder_dim)
        kinds = [Block] * (decoder_depth - 1) + [LastBlock]
        self.decoder_blocks = nn.ModuleList(block(kind, decoder_dim, decoder_heads) for kind in kinds)
        self.decoder_norm = norm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, patch_size**2 * in_channels)
        self.init_weights(torch.Generator().manual_seed(0))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw all weights (MAE, appendix A.1): Xavier uniform matrices, the patch embedding as one; biases 0, norms 1;
        tokens normal with deviation 0.02. A function of the generator's state and the sizes alone."""
        for name, param in self.named_parameters():
            if name in ("cls_token", "mask_token"):
                param.normal_(std=0.02, generator=generator)
            elif param.ndim > 1:
                nn.init.xavier_uniform_(param.flatten(1), generator=generator)
            else:
                param.fill_(0.0 if name.endswith(".bias") else 1.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedAutoencoder:
        """Casts and moves of the module (`.to`, `.bfloat16`), except that position tables never lose precision."""
        tables = {name: getattr(self, name) for name in ("pos_embed", "decoder_pos_embed")}
        super()._apply(fn, recurse)
        for name, table in tables.items():
            if getattr(self, name).dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, table.to(getattr(self, name).device))
        return self

    def forward(
        self, images: Tensor, ids_shuffle: Tensor | None = None, num_visible: int | None = None, what: What = "hidden"
    ) -> Tensor:
        """Predictions, or features.

        Args:
            images: [B, C, H, W] normalised.
            ids_shuffle: [B, L] int64 permutations of the patches; the first `num_visible` are seen. Not for features.
            num_visible: between 1 and L - 1.
            what: "hidden" gives [B, L - num_visible, p*p*C] in the order of `ids_shuffle[:, num_visible:]`, the
                training path; "all" gives [B, L, p*p*C] in raster order, for pictures; "features" gives the encoder's
                normalised tokens [B, 1 + L, D] of the whole image, cls first.

        Raises:
            ValueError: another `what`, or no valid mask where one is needed.
        """
        if what == "features":
            return self.encode(images)
        if what not in ("hidden", "all"):
            raise ValueError(f"what={what!r}: known are hidden, all and features")
        if ids_shuffle is None or num_visible is None or not 0 < num_visible < self.num_patches:
            raise ValueError(
                f"what={what!r} needs ids_shuffle and num_visible from 1 to {self.num_patches - 1}, got {num_visible}"
            )
        latent = self.encode(images, ids_shuffle[:, :num_visible])
        if what == "hidden":
            return self.decode(latent, ids_shuffle, first=1 + num_visible)
        pred = self.decode(latent, ids_shuffle, first=1)  # in shuffled order
        return pred.take_along_dim(ids_shuffle.argsort(dim=1)[:, :, None], dim=1)

    def encode(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """Normalised tokens [B, 1 + n, D], cls first, of the patches `ids` [B, n]; of all in raster order without."""
        if ids is None:
            x = self.patch_embed(patch_grid(images, self.patch_size).flatten(1, 2))
            positions = self.pos_embed[:, 1:]
        else:
            x = self.patch_embed(patches_at(images, self.patch_size, ids))  # [B, n, D]
            positions = F.embedding(ids + 1, self.pos_embed[0])
        x = (x + positions).to(x.dtype)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).to(x.dtype)
        x = torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, latent: Tensor, ids_shuffle: Tensor, *, first: int) -> Tensor:
        """Predictions [B, 1 + L - first, p*p*C] of the tokens from `first` on, in the order [cls, *ids_shuffle].

        Args:
            latent: [B, 1 + num_visible, D] of `encode`.
            ids_shuffle: [B, L].
            first: 1 for all patches, 1 + num_visible for the hidden ones.
        """
        x = self.decoder_embed(latent)
        num_hidden = 1 + self.num_patches - x.shape[1]
        x = torch.cat([x, self.mask_token.to(x.dtype).expand(len(x), num_hidden, -1)], dim=1)
        positions = F.embedding(F.pad(ids_shuffle + 1, (1, 0)), self.decoder_pos_embed[0])  # row 0 is that of cls
        x = (x + positions).to(x.dtype)  # [B, 1 + L, decoder_dim]
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        x = self.decoder_blocks[-1](x, first)
        return self.decoder_pred(self.decoder_norm(x))


def size_problems(
    *,
    image_size: tuple[int, int],
    patch_size: int,
    in_channels: int,
    embed_dim: int,
    depth: int,
    num_heads: int,
    decoder_dim: int,
    decoder_depth: int,
    decoder_heads: int,
    mlp_ratio: float = 4.0,
) -> list[str]:
    """What stands against these sizes of a model, one line a problem, with the way out."""
    counts = {
        "image height": image_size[0], "image width": image_size[1], "patch_size": patch_size,
        "in_channels": in_channels, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads,
        "decoder_dim": decoder_dim, "decoder_depth": decoder_depth, "decoder_heads": decoder_heads,
    }  # fmt: skip
    if problems := [f"{name}={count} must be at least 1" for name, count in counts.items() if count < 1]:
        return problems
    for name, side in (("height", image_size[0]), ("width", image_size[1])):
        if side % patch_size:
            near = [size for size in (side // patch_size * patch_size, -(-side // patch_size) * patch_size) if size]
            problems.append(
                f"patch_size={patch_size} does not divide the image {name} {side}; use {' or '.join(map(str, near))}"
            )
    if image_size[0] // patch_size * (image_size[1] // patch_size) < 2 and not problems:
        problems.append(f"an image of {image_size} has one patch of {patch_size}; masking needs two or more")
    for name, width, key, heads in (
        ("embed_dim", embed_dim, "num_heads", num_heads),
        ("decoder_dim", decoder_dim, "decoder_heads", decoder_heads),
    ):
        if width % heads:
            problems.append(f"{name}={width} is not divisible by {key}={heads}")
        if width % 4:
            problems.append(f"{name}={width} must be a multiple of 4, for sines and cosines of two axes")
    if mlp_ratio <= 0:
        problems.append(f"mlp_ratio={mlp_ratio} must be above 0")
    return problems


# --------------------------------------------------------------------------------------------------------------- flops


def flops_per_image(
    *,
    image_size: tuple[int, int],
    patch_size: int,
    in_channels: int,
    embed_dim: int,
    depth: int,
    num_heads: int,
    decoder_dim: int,
    decoder_depth: int,
    decoder_heads: int,
    mlp_ratio: float = 4.0,
    num_visible: int,
    hidden_only: bool = True,
) -> float:
    """Floating-point operations of one image's forward pass: matrix products alone, a multiply-add counted as 2.

    A step is 3 times that (the backward pass has twice as many), 4 times with a teacher (RC-MAE).

    Args:
        image_size: as the other sizes, those of `MaskedAutoencoder`; numbers of heads do not matter.
        num_visible: patches that the encoder sees.
        hidden_only: the training path of this package. Otherwise what the published code computes, the figure to
            compare models by: every patch embedded, every token through the last block and predicted.
    """
    patches = (image_size[0] // patch_size) * (image_size[1] // patch_size)
    pixels = patch_size**2 * in_channels
    seen, tokens = 1 + num_visible, 1 + patches
    asked = patches - num_visible if hidden_only else tokens

    def block(width: int, keys: int, queries: int) -> float:
        projections = 6 * width**2 * keys + 2 * width**2 * queries  # qkv of all, output of those asked
        return projections + 4 * queries * keys * width + 4 * mlp_ratio * width**2 * queries

    embed = 2 * pixels * embed_dim * (num_visible if hidden_only else patches)
    encoder = embed + depth * block(embed_dim, seen, seen)
    decoder = 2 * embed_dim * decoder_dim * seen + (decoder_depth - 1) * block(decoder_dim, tokens, tokens)
    return encoder + decoder + block(decoder_dim, tokens, asked) + 2 * decoder_dim * pixels * asked
