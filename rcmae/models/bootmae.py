"""BootMAE's network: an encoder of the visible patches, and a regressor each for pixels and for
features.

A regressor (Dong et al., ECCV 2022, section 3.3) is fed the encoder's output for the visible
patches and mask tokens with positions for the hidden ones; each of its blocks looks back at a layer
of the encoder by cross-attention, the pixels' at a low one and the features' at a high one, so that
the encoder's output need not carry what those know.

As in `vit`, everything stands in the order [cls, visible, hidden], which attention does not see,
and the last block of a regressor answers for hidden tokens alone. Parameters carry the published
names."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcmae.errors import Refused
from rcmae.models import kernels
from rcmae.models.blocks import Mlp, SplitBiasAttention
from rcmae.models.flops import block_flops
from rcmae.models.patches import sincos_positions
from rcmae.models.protocol import OF_WHOLE_IMAGES, Output, Outputs
from rcmae.models.sizes import NetworkSizes, size_problems
from rcmae.models.vit import Encoder


class CrossAttention(nn.Module):
    """Attention of tokens to those of another width, with a bias for queries and one for values."""

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.fused_attn = True
        inner = dim // num_heads * num_heads  # as in SplitBiasAttention
        self.q_bias = nn.Parameter(torch.zeros(inner))
        self.v_bias = nn.Parameter(torch.zeros(inner))
        self.q = nn.Linear(dim, inner, bias=False)
        self.kv = nn.Linear(context_dim, 2 * inner, bias=False)
        self.proj = nn.Linear(inner, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Tokens [B, N, dim] and [B, M, context_dim] to [B, N, dim]."""
        bias = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
        q = (self.q(x) + self.q_bias).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = (
            (self.kv(context) + bias)
            .unflatten(2, (2, self.num_heads, -1))
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        return self.proj(
            kernels.attention(q, k, v, fused=self.fused_attn).transpose(1, 2).flatten(2)
        )


class RegressorBlock(nn.Module):
    """Self-attention, cross-attention to a layer of the encoder, MLP.

    Each normalised before and added.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        norm: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        self.norm1 = norm(dim)
        self.attn = SplitBiasAttention(dim, num_heads)
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.norm3 = norm(dim)
        self.norm4 = norm(context_dim)
        self.c_attn = CrossAttention(dim, context_dim, num_heads)

    def forward(self, x: Tensor, context: Tensor, first_query: int = 0) -> Tensor:
        """Tokens [B, N, dim] to [B, N - first_query, dim]."""
        x = x[:, first_query:] + self.attn(self.norm1(x), first_query)
        x = x + self.c_attn(self.norm3(x), self.norm4(context))
        return x + self.mlp(self.norm2(x))


class PixelHead(nn.ConvTranspose2d):
    """The published head, a transposed convolution whose windows do not overlap: a product for
    each token.
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Tokens [B, n, d] to pixels [B, n, p*p*C], in the order of `patchify`."""
        weight = self.weight.permute(2, 3, 1, 0).flatten(0, 2)  # [p*p*C, d]
        assert self.bias is not None
        return F.linear(input, weight, self.bias.repeat(len(weight) // len(self.bias)))


class BootstrappedAutoencoder(Encoder):
    """Encoder and regressors. Weights are drawn at construction from a fixed seed.

    Args:
        sizes: of the encoder and of each regressor. `decoder_dim` is the width of that of pixels;
            that of features is as wide as the encoder.
        norm_layer: that of `Encoder`.
        low_layer: block whose output the regressor of pixels looks at, from 0.
        high_layer: the same for that of features; None: the last.
        predicts_features: whether there is a regressor of features.

    Raises:
        Refused: sizes that do not fit, all of them at once.
    """

    de_pos_embed: Tensor  # [1, 1 + L, decoder_dim]
    undecayed = ("cls_token",)  # as published

    def __init__(
        self,
        sizes: NetworkSizes,
        *,
        norm_layer: Callable[..., nn.Module] | None = None,
        low_layer: int = 0,
        high_layer: int | None = None,
        predicts_features: bool = True,
    ) -> None:
        high_layer = sizes.depth - 1 if high_layer is None else high_layer
        problems = size_problems(sizes, heads_divide=False)
        width = sizes.decoder_dim
        if width < sizes.decoder_heads:
            problems.append(f"decoder_dim={width} is less than decoder_heads={sizes.decoder_heads}")
        if not 0 <= low_layer < sizes.depth or not 0 <= high_layer < sizes.depth:
            problems.append(
                f"layers {low_layer} and {high_layer} must be among the encoder's 0 to "
                f"{sizes.depth - 1}"
            )
        if problems:
            raise Refused("\n".join(problems))
        super().__init__(sizes, norm_layer=norm_layer, qkv_bias="qv", positions="row_first")
        self.layers = (low_layer, high_layer)
        norm = norm_layer or kernels.layer_norm()

        def blocks(width: int) -> nn.ModuleList:
            return nn.ModuleList(
                RegressorBlock(
                    width,
                    sizes.embed_dim,
                    sizes.decoder_heads,
                    mlp_ratio=sizes.mlp_ratio,
                    norm=norm,
                )
                for _ in range(sizes.decoder_depth)
            )

        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        table = sincos_positions(width, self.grid, prefix=1, order="row_first")
        self.register_buffer("de_pos_embed", table.float()[None])
        self.decode_blocks = blocks(width)
        self.decode_norm = norm(width)
        self.down = nn.Linear(sizes.embed_dim, width)
        self.lm_head = nn.Module()
        patch = sizes.patch_size
        self.lm_head.proj = PixelHead(width, sizes.in_channels, patch, stride=patch)
        if predicts_features:
            self.mask_token_1 = nn.Parameter(torch.empty(1, 1, sizes.embed_dim))
            self.decode_blocks_1 = blocks(sizes.embed_dim)
            self.down_1 = nn.Linear(sizes.embed_dim, sizes.embed_dim)
            self.decode_norm_1 = norm(sizes.embed_dim)
            self.lm_head_1 = nn.Linear(sizes.embed_dim, sizes.embed_dim)
        self.init_weights(torch.Generator().manual_seed(0))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw all weights as the published code does: Xavier uniform matrices, of queries, keys
        and values each by itself; the patch embedding as a matrix; biases 0, norms 1; the cls token
        normal with deviation 1e-6, mask tokens with 0.02 cut off there; the head of the pixels as
        torch draws a transposed convolution."""
        for name, param in self.named_parameters():
            if param.is_meta:
                continue  # sizes alone; torch would import its compiler for the draws
            if name == "cls_token":
                param.normal_(std=1e-6, generator=generator)
            elif name.startswith("mask_token"):
                nn.init.trunc_normal_(param, std=0.02, a=-0.02, b=0.02, generator=generator)
            elif name.startswith("lm_head.proj."):
                bound = 1.0 / math.sqrt(self.in_channels * self.patch_size**2)
                param.uniform_(-bound, bound, generator=generator)
            elif name.endswith("qkv.weight"):
                bound = math.sqrt(6.0 / (param.shape[0] // 3 + param.shape[1]))
                param.uniform_(-bound, bound, generator=generator)
            elif param.ndim > 1:
                nn.init.xavier_uniform_(param.flatten(1), generator=generator)
            else:
                param.fill_(0.0 if name.endswith("bias") else 1.0)

    def keep(self, outputs: Sequence[str]) -> None:
        """Drop, for good, all parts but those that these of a teacher's outputs need: "tokens"
        need the encoder.
        """
        if not {"pixels", "all_pixels"} & set(outputs):
            self.drop("decoder")

    def all_blocks(self) -> list[nn.Module]:
        """The encoder's, then those of each regressor."""
        regressors = [getattr(self, name, ()) for name in ("decode_blocks", "decode_blocks_1")]
        return [*self.blocks, *itertools.chain(*regressors)]

    def forward(
        self,
        images: Tensor,
        ids_shuffle: Tensor | None = None,
        num_visible: int | None = None,
        outputs: tuple[Output, ...] = ("pixels",),
    ) -> Outputs:
        """The outputs that are asked for, by name; as `MaskedAutoencoder.forward`.

        Raises:
            Refused: no valid mask where one is needed.
        """
        found = self.outputs_without_mask(images, outputs)
        if OF_WHOLE_IMAGES.issuperset(outputs):
            return found
        ids_shuffle, num_visible = self.check_mask(ids_shuffle, num_visible)
        x = self.embed(images, ids_shuffle[:, :num_visible])
        layers = []
        for block in self.blocks:
            x = block(x)
            layers.append(x)
        latent = self.norm(x)
        low, high = (layers[layer] for layer in self.layers)
        first = 1 + num_visible
        if "all_pixels" in outputs:
            pred = self.regress_pixels(latent, low, ids_shuffle, 1)  # in shuffled order
            found["all_pixels"] = pred.take_along_dim(ids_shuffle.argsort(dim=1)[:, :, None], dim=1)
            found["pixels"] = pred[:, num_visible:]
        else:
            found["pixels"] = self.regress_pixels(latent, low, ids_shuffle, first)
        if "features" in outputs:
            found["features"] = self.regress_features(latent, high, ids_shuffle, first)
        return found

    def flops(self, num_visible: int) -> float:
        """Floating-point operations of one image's training forward.

        Counted as in `vit.flops_per_image`.
        """
        seen = 1 + num_visible
        tokens = 1 + self.num_patches
        hidden = self.num_patches - num_visible
        total = self.encoder_flops(num_visible)
        pixels = self.patch_size**2 * self.in_channels
        regressors = [(self.sizes.decoder_dim, pixels)]
        if hasattr(self, "lm_head_1"):
            regressors.append((self.embed_dim, self.embed_dim))
        for width, outputs in regressors:
            total += 2 * self.embed_dim * width * seen + 2 * width * outputs * hidden
            for queries in [tokens] * (len(self.decode_blocks) - 1) + [hidden]:
                # the layer that it looks at gives keys and values
                crossed = (
                    4 * width**2 * queries
                    + 4 * self.embed_dim * width * seen
                    + 4 * queries * seen * width
                )
                total += block_flops(width, tokens, queries, self.mlp_ratio) + crossed
        return total

    def regress_pixels(
        self, latent: Tensor, low: Tensor, ids_shuffle: Tensor, first: int
    ) -> Tensor:
        """Pixels [B, 1 + L - first, p*p*C] of the tokens from `first` on, in the order [cls,
        *ids_shuffle].
        """
        x = self._filled(self.down(latent), self.mask_token, self.de_pos_embed, ids_shuffle)
        for block in self.decode_blocks[:-1]:
            x = block(x, low)
        head = self.lm_head.proj
        assert isinstance(head, PixelHead)
        pixels: Tensor = head(self.decode_norm(self.decode_blocks[-1](x, low, first)))
        return pixels

    def regress_features(
        self, latent: Tensor, high: Tensor, ids_shuffle: Tensor, first: int
    ) -> Tensor:
        """Features [B, 1 + L - first, D] of the tokens from `first` on, in the order [cls,
        *ids_shuffle].
        """
        x = self._filled(self.down_1(latent), self.mask_token_1, self.pos_embed, ids_shuffle)
        for block in self.decode_blocks_1[:-1]:
            x = block(x, high)
        return self.lm_head_1(self.decode_norm_1(self.decode_blocks_1[-1](x, high, first)))

    def _filled(self, x: Tensor, mask_token: Tensor, table: Tensor, ids_shuffle: Tensor) -> Tensor:
        """Tokens [B, 1 + L, d]: those of the encoder, without positions, and mask tokens with
        theirs.
        """
        num_visible = x.shape[1] - 1
        positions = F.embedding(ids_shuffle[:, num_visible:] + 1, table[0])
        return torch.cat([x, (mask_token + positions).to(x.dtype)], dim=1)
