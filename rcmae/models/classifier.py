"""A Vision Transformer that classifies, by the published names: what fine-tuning trains and what
probes and users read.

It is timm's own model, so code for timm works with it (`forward_features`,
`forward_intermediates`, `get_intermediate_layers`, `feature_info`). Drop path is ours: it takes its
draws from the caller, keyed by sample, so that a training does not depend on ranks, resumes or
recomputed activations. Positions are trained here (MAE, appendix A.1); `fitting` starts them from
the interpolated table of the pretraining."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from rcmae.models import kernels
from rcmae.models.batchnorm import GlobalBatchNorm
from rcmae.models.blocks import drop_path_rates, put_drop_path
from rcmae.models.fitting import NEW
from rcmae.models.patches import sincos_positions
from rcmae.models.protocol import Place, layer_of, part_of
from rcmae.models.sizes import NetworkSizes
from rcmae.process import extensions  # noqa: F401, it makes timm importable beside a CPU torch

from timm.models.vision_transformer import VisionTransformer

Pool = Literal["cls", "mean"]
UNDECAYED = ("cls_token", "reg_token", "pos_embed")
HEAD_STD = 2e-5  # of a fresh head's weights: fine-tuning starts from equal scores


class Classifier(VisionTransformer):
    """timm's ViT. Weights are drawn at construction from a fixed seed, the encoder's as at the
    start of a pretraining.

    Args:
        sizes: of the encoder.
        num_classes: 0 for none: scores are then the pooled features.
        pool: "cls" takes the class token after the encoder's norm, "mean" the mean of the patches
            of the last block, then a norm of its own (`fc_norm`). Of several class tokens, the
            mean. Without any, "cls" takes the mean of the patches after the encoder's norm.
        drop_path: rate at the last block; it grows linearly from 0 at the first.
        norm_layer: makes a layer norm of a given width; see `kernels.layer_norm`.
    """

    def __init__(
        self,
        sizes: NetworkSizes,
        *,
        num_classes: int,
        pool: Pool = "mean",
        drop_path: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        class_token = sizes.class_tokens > 0
        super().__init__(
            img_size=sizes.image_size,
            patch_size=sizes.patch_size,
            in_chans=sizes.in_channels,
            num_classes=num_classes,
            global_pool="token" if pool == "cls" and class_token else "avg",
            fc_norm=pool == "mean",
            embed_dim=sizes.embed_dim,
            depth=sizes.depth,
            num_heads=sizes.num_heads,
            mlp_ratio=sizes.mlp_ratio,
            qkv_bias=True,
            class_token=class_token,
            norm_layer=norm_layer or kernels.layer_norm(),
            weight_init="skip",
        )
        self.grid = sizes.grid
        self.class_tokens = sizes.class_tokens
        if sizes.class_tokens > 1 or sizes.registers:
            self._add_tokens(sizes)
        self.drop_path_rates = drop_path_rates(drop_path, sizes.depth)
        self._draws = put_drop_path(self.blocks, self.drop_path_rates)
        self.draw_weights(torch.Generator().manual_seed(0))

    def _add_tokens(self, sizes: NetworkSizes) -> None:
        """Tokens that timm's model has not: more class tokens than one, in one parameter, and
        registers without a position.
        """
        width = sizes.embed_dim
        if sizes.class_tokens:
            self.cls_token = nn.Parameter(torch.empty(1, sizes.class_tokens, width))
        if sizes.registers:
            self.reg_token = nn.Parameter(torch.empty(1, sizes.registers, width))
        self.pos_embed = nn.Parameter(torch.empty(1, sizes.class_tokens + sizes.num_patches, width))
        self.num_prefix_tokens = sizes.num_prefix
        self.num_reg_tokens = sizes.registers

    def _pos_embed(self, x: Tensor) -> Tensor:
        """timm's: patches [B, L, D] to tokens [B, c + r + L, D], positions added."""
        if self.num_prefix_tokens <= 1 and self.reg_token is None:
            tokens: Tensor = super()._pos_embed(x)
            return tokens
        first = self.class_tokens
        before = [] if self.cls_token is None else [self.cls_token + self.pos_embed[:, :first]]
        if self.reg_token is not None:
            before.append(self.reg_token)
        expanded = [each.expand(len(x), -1, -1) for each in before]
        return torch.cat([*expanded, x + self.pos_embed[:, first:]], dim=1)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """timm's: the features [B, D] of tokens; of several class tokens, the mean."""
        if (pool_type or self.global_pool) == "token" and self.class_tokens > 1:
            return x[:, : self.class_tokens].mean(dim=1)
        pooled: Tensor = super().pool(x, pool_type)
        return pooled

    @torch.no_grad()
    def draw_weights(self, generator: torch.Generator) -> None:
        """Draw all weights: the encoder's as `MaskedAutoencoder.init_weights`, positions
        sin-cos, the head near 0.
        """
        for name, param in self.named_parameters():
            if param.is_meta:
                continue  # sizes alone; torch would import its compiler for the draws
            if name == "pos_embed":
                table = sincos_positions(param.shape[2], self.grid, prefix=self.class_tokens)
                param.copy_(table[None])
            elif name in ("cls_token", "reg_token"):
                param.normal_(std=0.02, generator=generator)
            elif name == "head.weight":
                nn.init.trunc_normal_(param, std=HEAD_STD, a=-2.0, b=2.0, generator=generator)
            elif param.ndim > 1:
                nn.init.xavier_uniform_(param.flatten(1), generator=generator)
            else:
                param.fill_(0.0 if name.endswith(".bias") else 1.0)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Scores [B, num_classes] of normalised images [B, C, H, W].

        Args:
            images: cast to the type of the weights.
            keep: [B, depth, 2] bool, which residual branches of each sample stay, as
                `drop_path_draws` gives them; None drops nothing.
        """
        self._draws.keep = keep
        return self.forward_head(self.forward_features(images.to(self.pos_embed.dtype)))

    def encoded(self, images: Tensor) -> Tensor:
        """Tokens [B, c + r + L, D] of normalised images, class tokens first; after the norm if pool
        is "cls".
        """
        self._draws.keep = None
        tokens: Tensor = self.forward_features(images.to(self.pos_embed.dtype))
        return tokens

    @property
    def num_layers(self) -> int:
        """The embedding, a layer a block, and what follows."""
        return len(self.blocks) + 2

    def place_of(self, name: str) -> Place:
        """Where a parameter is; 1-D ones, the class token and positions do not decay."""
        part = "head" if name.startswith(NEW) else part_of(name)
        decays = self.get_parameter(name).ndim > 1 and name not in UNDECAYED
        return Place(part, layer_of(name, len(self.blocks)), decays)

    def all_blocks(self) -> list[nn.Module]:
        """The encoder's."""
        return list(self.blocks)


def probe_head(width: int, num_classes: int) -> nn.Module:
    """What a linear probe trains (MAE, appendix A.1): a batch norm without an affine part (`0.`),
    whose statistics are of all ranks' images, and a linear layer (`1.`), its weights near 0."""
    norm = GlobalBatchNorm(width, eps=1e-6, affine=False)
    linear = nn.Linear(width, num_classes)
    nn.init.trunc_normal_(linear.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(linear.bias)
    return ProbeHead(norm, linear)


class ProbeHead(nn.Sequential):
    """Features [B, D] to scores, the linear layer in its own type."""

    num_layers = 2

    def place_of(self, name: str) -> Place:
        """Where a parameter is: in the head, after whatever gives the features."""
        return Place("head", 1, decays=self.get_parameter(name).ndim > 1)

    def all_blocks(self) -> list[nn.Module]:
        """None."""
        return []

    def forward(self, input: Tensor) -> Tensor:
        """Scores [B, classes]."""
        norm, linear = self
        return linear(norm(input).to(linear.weight.dtype))
