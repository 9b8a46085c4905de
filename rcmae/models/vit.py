"""The masked autoencoder: a Vision Transformer that sees some patches and a small decoder that
predicts the others.

Everything happens in shuffled order: `ids_shuffle` [B, L] is a permutation of the patches whose
first `num_visible` the encoder sees. Only those are embedded; the decoder's tokens stand in the
order [cls, visible, hidden] with positions gathered to match, so hidden predictions are the tail
and nothing is ever put back in place for training. The decoder's last block asks queries for hidden
tokens alone, because the loss reads no others.

Blocks are timm's and parameters carry the published names, so published weights load with
`strict=True`. Positions are fixed sin-cos tables (MAE, appendix A.1): float32 buffers at any
compute type. Not done: learned or rotary positions.

A network gives what an objective asks for in one forward: pixels, classes, features (`Outputs`).
`Encoder` is what all networks share, and all that is left of a teacher which gives features alone;
published names forbid a child of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcmae.errors import Refused
from rcmae.models import kernels  # first: it makes timm importable beside a CPU torch
from rcmae.models.batchnorm import GlobalBatchNorm

from timm.models.vision_transformer import Block

What = Literal["hidden", "all", "features"]
# one bias for queries, keys and values; or none for the keys, as two parameters
QKVBias = Literal["qkv", "qv"]
Positions = Literal["column_first", "row_first"]
PixelOrder = Literal["hwc", "chw"]

# What a forward gives by name:
#   pixels    [B, L - num_visible, p*p*C] predictions of the hidden patches, as `patchify` orders
#   features  [B, L - num_visible, D] predictions of the hidden patches' tokens
#   classes   [B, num_classes] logits
#   tokens    [B, L, D] of the whole image, out of the last block and before the norm: what
#             features are to predict
Outputs = dict[str, Tensor]

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


# ------------------------------------------------------------------------------------------ patches


def patch_grid(images: Tensor, patch_size: int) -> Tensor:
    """Images [B, C, H, W] cut into patches [B, H/p, W/p, C, p, p]: a view, nothing is copied."""
    return (
        images.unflatten(3, (-1, patch_size))
        .unflatten(2, (-1, patch_size))
        .permute(0, 2, 4, 1, 3, 5)
    )


def patches_at(images: Tensor, patch_size: int, ids: Tensor) -> Tensor:
    """The patches [B, n, C, p, p] at raster indices `ids` [B, n]; the others are never touched."""
    grid = patch_grid(images, patch_size)
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    return grid[rows, ids // grid.shape[2], ids % grid.shape[2]]


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Images [B, C, H, W] as rows of pixels [B, L, p*p*C], in the published order (p_row, p_col,
    channel).
    """
    return patch_grid(images, patch_size).permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2)


def unpatchify(
    patches: Tensor, patch_size: int, image_size: tuple[int, int], in_channels: int
) -> Tensor:
    """The images [B, C, H, W] whose `patchify` is `patches` [B, L, p*p*C]."""
    rows, columns = image_size[0] // patch_size, image_size[1] // patch_size
    grid = patches.unflatten(2, (patch_size, patch_size, in_channels)).unflatten(1, (rows, columns))
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def sincos_positions(
    dim: int, grid: tuple[int, int], *, cls_token: bool, order: Positions = "column_first"
) -> Tensor:
    """The 2-D sin-cos table [rows, dim] in float64, raster order, after a row of zeros where
    `cls_token`.

    The first half of the columns encodes the patch's column, the second its row, each as sines then
    cosines of geometric frequencies 1 ... 1/10000. "row_first" has it the other way round (MoCo v3,
    BootMAE, MAE-priv)."""
    quarter = dim // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(
        *(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij"
    )
    axes = (column, row) if order == "column_first" else (row, column)
    angles = [axis.reshape(-1, 1) * frequencies for axis in axes]  # each [L, dim/4]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return F.pad(table, (0, 0, 1, 0)) if cls_token else table


# ------------------------------------------------------------------------------------------- blocks


class PatchProjection(nn.Conv2d):
    """The published patch embedding, for patches that are cut out already: its kernel meets each
    of them once.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Patches [B, n, C, p, p] to tokens [B, n, D], in the type of the weight."""
        return F.linear(input.flatten(2).to(self.weight.dtype), self.weight.flatten(1), self.bias)


class SplitBiasAttention(nn.Module):
    """Self-attention whose queries and values have a bias each, and whose keys, to which a bias is
    nothing, none.

    Parameters are named as in BEiT, BootMAE and MAE-priv.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        # fused_attn: see kernels.choose_attention
        self.num_heads, self.fused_attn = num_heads, True
        # as published, of a dim that heads do not divide the rest is left out
        inner = dim // num_heads * num_heads
        self.q_bias = nn.Parameter(torch.zeros(inner))
        self.v_bias = nn.Parameter(torch.zeros(inner))
        self.qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.proj = nn.Linear(inner, dim)

    def forward(self, x: Tensor, first_query: int = 0, **_: None) -> Tensor:
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


class LastBlock(Block):
    """timm's block, with an answer for the tail of the tokens alone: keys and values of all,
    queries of the tail.
    """

    def forward(self, x: Tensor, first_query: int = 0) -> Tensor:
        """Tokens [B, N, D] to tokens [B, N - first_query, D]."""
        if isinstance(self.attn, SplitBiasAttention):
            tail = x[:, first_query:] + self.attn(self.norm1(x), first_query)
            return tail + self.mlp(self.norm2(tail))
        attn, heads = self.attn, self.attn.num_heads
        # the query projection of the few head tokens is wasted: slicing its weight would reach
        # around the engines that gather a parameter when its module is called
        q, k, v = (
            attn.qkv(self.norm1(x)).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        )
        # [B, heads, N - first_query, d]
        mixed = kernels.attention(q[:, :, first_query:], k, v, fused=attn.fused_attn)
        tail = x[:, first_query:] + self.drop_path1(
            self.ls1(attn.proj(mixed.transpose(1, 2).flatten(2)))
        )
        return tail + self.drop_path2(self.ls2(self.mlp(self.norm2(tail))))


# -------------------------------------------------------------------------------------------- model


def make_block(
    kind: type[Block],
    width: int,
    heads: int,
    *,
    mlp_ratio: float,
    norm: Callable[..., nn.Module],
    qkv_bias: QKVBias,
) -> Block:
    """A block of a width."""
    block = kind(width, heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm)
    if qkv_bias == "qv":
        block.attn = SplitBiasAttention(width, heads)
    return block


class Encoder(nn.Module):
    """A Vision Transformer without a head: what networks that pretrain share, and all that some
    teachers are.

    Parameters may be cast to a lower type: images are cast to theirs, and position tables stay
    float32.

    Args:
        image_size: (height, width) in pixels.
        patch_size: side of a patch in pixels; divides both.
        in_channels: of the images.
        embed_dim: width; a multiple of 4 (positions) and of num_heads.
        depth: blocks.
        num_heads: of the attention.
        mlp_ratio: width of the hidden layer of an MLP over that of its block.
        norm_layer: makes a layer norm of a given width; see `kernels.layer_norm`.
        cls_token: whether one goes before the patches.
        qkv_bias: of the attention.
        positions: order of the table's halves.
    """

    pos_embed: Tensor  # [1, c + L, D]; c: 1 with a cls token, else 0
    TABLES: ClassVar[tuple[str, ...]] = ("pos_embed",)  # buffers that never lose precision

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        patch_size: int,
        in_channels: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        cls_token: bool = True,
        qkv_bias: QKVBias = "qkv",
        positions: Positions = "column_first",
    ) -> None:
        super().__init__()
        self.image_size, self.patch_size = image_size, patch_size
        self.in_channels, self.embed_dim = in_channels, embed_dim
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.num_patches = self.grid[0] * self.grid[1]
        # num_prefix: tokens before the patches
        self.num_prefix, self.mlp_ratio = int(cls_token), mlp_ratio
        norm = norm_layer or kernels.layer_norm()
        if cls_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        table = sincos_positions(embed_dim, self.grid, cls_token=cls_token, order=positions)
        self.register_buffer("pos_embed", table.float()[None])
        # one child, so that its parameters are called patch_embed.proj.*
        projection = PatchProjection(in_channels, embed_dim, patch_size, stride=patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=projection))
        self.blocks = nn.ModuleList(
            make_block(
                Block, embed_dim, num_heads, mlp_ratio=mlp_ratio, norm=norm, qkv_bias=qkv_bias
            )
            for _ in range(depth)
        )
        self.norm = norm(embed_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Encoder:
        """Casts and moves of the module (`.to`, `.bfloat16`), except that position tables never
        lose precision.
        """
        tables = {name: getattr(self, name) for name in self.TABLES if hasattr(self, name)}
        super()._apply(fn, recurse)
        for name, table in tables.items():
            if getattr(self, name).dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, table.to(getattr(self, name).device))
        return self

    def embed(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """Tokens [B, c + n, D] of the patches `ids` [B, n], positions added.

        Of all in raster order without.
        """
        if ids is None:
            x = self.patch_embed(patch_grid(images, self.patch_size).flatten(1, 2))
            positions = self.pos_embed[:, self.num_prefix :]
        else:
            x = self.patch_embed(patches_at(images, self.patch_size, ids))  # [B, n, D]
            positions = F.embedding(ids + self.num_prefix, self.pos_embed[0])
        x = (x + positions).to(x.dtype)
        if not self.num_prefix:
            return x
        cls_token = (self.cls_token + self.pos_embed[:, :1]).to(x.dtype)
        return torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)

    def encode(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """Normalised tokens [B, c + n, D], cls first, of the patches `ids` [B, n].

        Of all in raster order without.
        """
        x = self.embed(images, ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def whole(self, images: Tensor) -> Tensor:
        """Tokens [B, L, D] of all patches in raster order, out of the last block, before the
        norm.
        """
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return x[:, self.num_prefix :]

    def encoder_flops(self, num_patches: int) -> float:
        """Floating-point operations of one image's way through the encoder.

        Counted as in `flops_per_image`.
        """
        seen, pixels = self.num_prefix + num_patches, self.patch_size**2 * self.in_channels
        return 2 * pixels * self.embed_dim * num_patches + len(self.blocks) * block_flops(
            self.embed_dim, seen, seen, self.mlp_ratio
        )

    def pooled(self, images: Tensor) -> Tensor:
        """What evaluations read: normalised tokens [B, 1 + L, D] of the whole image, cls first.

        Without a cls token the mean over the patches stands in its place.
        """
        x = self.encode(images)
        return x if self.num_prefix else torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)


class MaskedAutoencoder(Encoder):
    """Encoder and decoder of MAE and RC-MAE, with the options of MAE-priv and heads for more
    targets.

    Weights are drawn at construction from a fixed seed.

    Args:
        image_size: as `patch_size`, `in_channels`, `embed_dim`, `depth`, `num_heads`, `mlp_ratio`,
            `norm_layer`, `cls_token`, `qkv_bias` and `positions` those of `Encoder`.
        decoder_dim: width of the decoder; a multiple of 4 and of decoder_heads.
        decoder_depth: blocks of the decoder, at least 1.
        decoder_heads: of its attention.
        decoder_cls: whether the cls token goes through the decoder, too (MAE; MAE-priv leaves it
            out).
        pixel_order: how the weights of the prediction count a patch's pixels: channels last (MAE)
            or first. What comes out is always in the order of `patchify`.
        num_classes: of the classification branch on the visible tokens (SupMAE, section 3); 0:
            none.
        class_hidden: width of its hidden layer, which a batch norm over all ranks follows; 0: one
            linear layer.
        class_pool: what it reads: the mean of the visible patches, or the cls token.
        predicts_features: whether the decoder has a second, linear head for an encoder's tokens.

    Raises:
        ValueError: sizes that do not fit, all of them at once.
    """

    decoder_pos_embed: Tensor  # [1, c + L, decoder_dim]
    TABLES = ("pos_embed", "decoder_pos_embed")

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
        cls_token: bool = True,
        qkv_bias: QKVBias = "qkv",
        positions: Positions = "column_first",
        decoder_cls: bool = True,
        pixel_order: PixelOrder = "hwc",
        num_classes: int = 0,
        class_hidden: int = 0,
        class_pool: Literal["mean", "cls"] = "mean",
        predicts_features: bool = False,
    ) -> None:
        sizes: dict[str, Any] = {
            "image_size": image_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "decoder_dim": decoder_dim,
            "decoder_depth": decoder_depth,
            "decoder_heads": decoder_heads,
            "mlp_ratio": mlp_ratio,
        }
        if problems := size_problems(**sizes):
            raise Refused("\n".join(problems))
        super().__init__(
            image_size=image_size,
            patch_size=patch_size,
            in_channels=in_channels,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            norm_layer=norm_layer,
            cls_token=cls_token,
            qkv_bias=qkv_bias,
            positions=positions,
        )
        self.sizes, self.pixel_order, self.class_pool = sizes, pixel_order, class_pool
        norm = norm_layer or kernels.layer_norm()
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        # tokens that the decoder does not get
        self.num_dropped = self.num_prefix if not decoder_cls else 0
        self.decoder_prefix = self.num_prefix - self.num_dropped
        table = sincos_positions(
            decoder_dim, self.grid, cls_token=self.decoder_prefix > 0, order=positions
        )
        self.register_buffer("decoder_pos_embed", table.float()[None])
        self.decoder_embed = nn.Linear(embed_dim, decoder_dim)
        kinds = [Block] * (decoder_depth - 1) + [LastBlock]
        self.decoder_blocks = nn.ModuleList(
            make_block(
                kind, decoder_dim, decoder_heads, mlp_ratio=mlp_ratio, norm=norm, qkv_bias=qkv_bias
            )
            for kind in kinds
        )
        self.decoder_norm = norm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, patch_size**2 * in_channels)
        if num_classes:
            self.cls_head = class_head(embed_dim, class_hidden, num_classes)
        if predicts_features:
            self.feature_head = nn.Linear(decoder_dim, embed_dim)
        self.init_weights(torch.Generator().manual_seed(0))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw all weights (MAE, appendix A.1): Xavier uniform matrices, the patch embedding as
        one; biases 0, norms 1; tokens normal with deviation 0.02. A function of the generator's
        state and the sizes alone."""
        for name, param in self.named_parameters():
            if name in ("cls_token", "mask_token"):
                param.normal_(std=0.02, generator=generator)
            elif param.ndim > 1:
                nn.init.xavier_uniform_(param.flatten(1), generator=generator)
            else:
                param.fill_(0.0 if name.endswith("bias") else 1.0)

    def keep(self, outputs: Sequence[str]) -> None:
        """Drop, for good, all parts but those that these of a teacher's outputs need: "pixels",
        "tokens".
        """
        decoder = (
            "mask_token",
            "decoder_embed",
            "decoder_blocks",
            "decoder_norm",
            "decoder_pred",
            "decoder_pos_embed",
        )
        for name in ("cls_head", "feature_head", *(() if "pixels" in outputs else decoder)):
            if hasattr(self, name):
                delattr(self, name)

    def forward(
        self,
        images: Tensor,
        ids_shuffle: Tensor | None = None,
        num_visible: int | None = None,
        what: What | tuple[str, ...] = "hidden",
    ) -> Any:
        """Predictions, or features.

        Args:
            images: [B, C, H, W] normalised.
            ids_shuffle: [B, L] int64 permutations of the patches; the first `num_visible` are seen.
                Not for features.
            num_visible: between 1 and L - 1.
            what: "hidden" gives [B, L - num_visible, p*p*C] in the order of `ids_shuffle[:,
                num_visible:]`, the training path; "all" gives [B, L, p*p*C] in raster order, for
                pictures; "features" gives the encoder's normalised tokens [B, 1 + L, D] of the
                whole image, cls first. A tuple of names gives `Outputs`.

        Raises:
            ValueError: another `what`, or no valid mask where one is needed.
        """
        if what == "features":
            return self.pooled(images)
        if what == ("tokens",):
            return {"tokens": self.whole(images)}
        if what not in ("hidden", "all") and not isinstance(what, tuple):
            raise Refused(
                f"what={what!r}: known are hidden, all and features, or a tuple of outputs"
            )
        if ids_shuffle is None or num_visible is None or not 0 < num_visible < self.num_patches:
            raise Refused(
                f"what={what!r} needs ids_shuffle and num_visible from 1 to "
                f"{self.num_patches - 1}, got {num_visible}"
            )
        latent = self.encode(images, ids_shuffle[:, :num_visible])
        if what == "hidden":
            return self.pixels(self.decode(latent, ids_shuffle, first=num_visible))
        if what == "all":
            pred = self.pixels(self.decode(latent, ids_shuffle, first=0))  # in shuffled order
            return pred.take_along_dim(ids_shuffle.argsort(dim=1)[:, :, None], dim=1)
        found: Outputs = {}
        if "tokens" in what:
            found["tokens"] = self.whole(images)
        if "pixels" in what or "features" in what:
            x = self.decode(latent, ids_shuffle, first=num_visible)
            found["pixels"] = self.pixels(x)
            if "features" in what:
                found["features"] = self.feature_head(x)
        if "classes" in what:
            seen = (
                latent[:, 0]
                if self.class_pool == "cls"
                else latent[:, self.num_prefix :].mean(dim=1)
            )
            found["classes"] = self.cls_head(seen)
        return found

    def flops(self, num_visible: int) -> float:
        """Floating-point operations of one image's training forward.

        Counted as in `flops_per_image`.
        """
        return flops_per_image(**self.sizes, num_visible=num_visible)

    def decode(self, latent: Tensor, ids_shuffle: Tensor, *, first: int) -> Tensor:
        """Normalised tokens [B, L - first, decoder_dim] of the patches from `first` on, in the
        order of `ids_shuffle`.

        Args:
            latent: [B, c + num_visible, D] of `encode`.
            ids_shuffle: [B, L].
            first: 0 for all patches, num_visible for the hidden ones.
        """
        x = self.decoder_embed(latent[:, self.num_dropped :])
        prefix = self.decoder_prefix
        num_hidden = prefix + self.num_patches - x.shape[1]
        x = torch.cat([x, self.mask_token.to(x.dtype).expand(len(x), num_hidden, -1)], dim=1)
        rows = F.pad(ids_shuffle + 1, (1, 0)) if prefix else ids_shuffle  # row 0 is that of cls
        # [B, c + L, decoder_dim]
        x = (x + F.embedding(rows, self.decoder_pos_embed[0])).to(x.dtype)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        return self.decoder_norm(self.decoder_blocks[-1](x, prefix + first))

    def pixels(self, x: Tensor) -> Tensor:
        """Predictions [B, n, p*p*C], in the order of `patchify`, of the decoder's normalised
        tokens [B, n, d].
        """
        pred = self.decoder_pred(x)
        if self.pixel_order == "hwc":
            return pred
        return pred.unflatten(2, (self.in_channels, -1)).transpose(2, 3).flatten(2)


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
    heads_divide: bool = True,
) -> list[str]:
    """What stands against these sizes of a model, one line a problem, with the way out.

    `heads_divide`: whether the decoder's heads must divide its width (BootMAE's need not).
    """
    counts = {
        "image height": image_size[0],
        "image width": image_size[1],
        "patch_size": patch_size,
        "in_channels": in_channels,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "decoder_dim": decoder_dim,
        "decoder_depth": decoder_depth,
        "decoder_heads": decoder_heads,
    }
    if problems := [
        f"{name}={count} must be at least 1" for name, count in counts.items() if count < 1
    ]:
        return problems
    for name, side in (("height", image_size[0]), ("width", image_size[1])):
        if side % patch_size:
            near = [
                size
                for size in (side // patch_size * patch_size, -(-side // patch_size) * patch_size)
                if size
            ]
            problems.append(
                f"patch_size={patch_size} does not divide the image {name} {side}; use "
                f"{' or '.join(map(str, near))}"
            )
    if image_size[0] // patch_size * (image_size[1] // patch_size) < 2 and not problems:
        problems.append(
            f"an image of {image_size} has one patch of {patch_size}; masking needs two or more"
        )
    for name, width, key, heads in (
        ("embed_dim", embed_dim, "num_heads", num_heads),
        ("decoder_dim", decoder_dim, "decoder_heads", decoder_heads),
    ):
        if width % heads and (heads_divide or key != "decoder_heads"):
            problems.append(f"{name}={width} is not divisible by {key}={heads}")
        if width % 4:
            problems.append(
                f"{name}={width} must be a multiple of 4, for sines and cosines of two axes"
            )
    if mlp_ratio <= 0:
        problems.append(f"mlp_ratio={mlp_ratio} must be above 0")
    return problems


# -------------------------------------------------------------------------------------------- flops


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
    """Floating-point operations of one image's forward pass: matrix products alone, a multiply-add
    counted as 2.

    A step is 3 times that (the backward pass has twice as many), 4 times with a teacher (RC-MAE).

    Args:
        image_size: as the other sizes, those of `MaskedAutoencoder`; numbers of heads do not
            matter.
        num_visible: patches that the encoder sees.
        hidden_only: the training path of this package. Otherwise what the published code computes,
            the figure to compare models by: every patch embedded, every token through the last
            block and predicted.
    """
    patches = (image_size[0] // patch_size) * (image_size[1] // patch_size)
    pixels = patch_size**2 * in_channels
    seen, tokens = 1 + num_visible, 1 + patches
    asked = patches - num_visible if hidden_only else tokens

    def block(width: int, keys: int, queries: int) -> float:
        return block_flops(width, keys, queries, mlp_ratio)

    embed = 2 * pixels * embed_dim * (num_visible if hidden_only else patches)
    encoder = embed + depth * block(embed_dim, seen, seen)
    decoder = 2 * embed_dim * decoder_dim * seen + (decoder_depth - 1) * block(
        decoder_dim, tokens, tokens
    )
    return encoder + decoder + block(decoder_dim, tokens, asked) + 2 * decoder_dim * pixels * asked


def block_flops(width: int, keys: int, queries: int, mlp_ratio: float) -> float:
    """Floating-point operations of a block for one image, of `keys` tokens that answers for
    `queries` of them.
    """
    projections = 6 * width**2 * keys + 2 * width**2 * queries  # qkv of all, output of those asked
    return projections + 4 * queries * keys * width + 4 * mlp_ratio * width**2 * queries
