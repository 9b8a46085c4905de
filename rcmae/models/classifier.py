"""A Vision Transformer that classifies, by the published names: what fine-tuning trains and what
probes and users read.

It is timm's own model, so whatever knows timm knows it (`forward_features`,
`forward_intermediates`, `get_intermediate_layers`, `feature_info`). Drop path is ours: it takes its
draws from the caller, keyed by sample, so that a training does not depend on ranks, resumes or
recomputed activations. Positions are trained here (MAE, appendix A.1); `fitting` starts them from
the interpolated table of the pretraining."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from rcmae.data.draws import Purpose, uniform
from rcmae.models import kernels
from rcmae.models.batchnorm import GlobalBatchNorm
from rcmae.models.fitting import NEW
from rcmae.models.patches import sincos_positions
from rcmae.models.protocol import Place, layer_of, part_of
from rcmae.models.sizes import NetworkSizes
from rcmae.process import extensions  # noqa: F401, it makes timm importable beside a CPU torch

from timm.models.vision_transformer import VisionTransformer

Pool = Literal["cls", "mean"]
HEAD_STD = 2e-5  # of a fresh head's weights: fine-tuning starts from equal scores


class Draws:
    """Where the blocks of one model find the draws of the forward under way."""

    keep: Tensor | None = None  # [B, depth, 2] bool


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): leaves a residual branch of a sample out, and
    scales what stays.
    """

    def __init__(self, draws: Draws, block: int, branch: int, rate: float) -> None:
        super().__init__()
        self._draws = draws
        self._block = block
        self._branch = branch
        self._rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, N, D] of the branch, or zeros; also [B * n, ...], n windows of each image."""
        keep = self._draws.keep
        if keep is None or not self.training or self._rate == 0.0:
            return x
        scale = keep[:, self._block, self._branch].to(x.dtype) / (1.0 - self._rate)
        each = scale.repeat_interleave(len(x) // len(scale))
        return x * each.view(-1, *[1] * (x.ndim - 1))


class Classifier(VisionTransformer):
    """timm's ViT. Weights are drawn at construction from a fixed seed, the encoder's as at the
    start of a pretraining.

    Args:
        sizes: of the encoder.
        num_classes: 0 for none: scores are then the pooled features.
        pool: "cls" takes the class token after the encoder's norm, "mean" the mean of the patches
            of the last block, then a norm of its own (`fc_norm`).
        drop_path: rate at the last block; it grows linearly from 0 at the first.
        norm_layer: makes a layer norm of a given width; see `kernels.layer_norm`.
        class_token: whether there is one. Without, pool "cls" takes the mean of the patches after
            the encoder's norm.
    """

    def __init__(
        self,
        sizes: NetworkSizes,
        *,
        num_classes: int,
        pool: Pool = "mean",
        drop_path: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        class_token: bool = True,
    ) -> None:
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
        last = max(sizes.depth - 1, 1)
        self.drop_path_rates = [drop_path * index / last for index in range(sizes.depth)]
        self._draws = Draws()
        for index, (block, rate) in enumerate(zip(self.blocks, self.drop_path_rates, strict=True)):
            for branch, name in enumerate(("drop_path1", "drop_path2")):
                setattr(block, name, DropPath(self._draws, index, branch, rate))
        self.draw_weights(torch.Generator().manual_seed(0))

    @torch.no_grad()
    def draw_weights(self, generator: torch.Generator) -> None:
        """Draw all weights: the encoder's as `MaskedAutoencoder.init_weights`, positions
        sin-cos, the head near 0.
        """
        for name, param in self.named_parameters():
            if param.is_meta:
                continue  # sizes alone; torch would import its compiler for the draws
            if name == "pos_embed":
                param.copy_(
                    sincos_positions(param.shape[2], self.grid, cls_token=self.has_class_token)[
                        None
                    ]
                )
            elif name == "cls_token":
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
        """Tokens [B, 1 + L, D] of normalised images, cls first; after the norm if pool is "cls"."""
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
        decays = self.get_parameter(name).ndim > 1 and name not in ("cls_token", "pos_embed")
        return Place(part, layer_of(name, len(self.blocks)), decays)

    def all_blocks(self) -> list[nn.Module]:
        """The encoder's."""
        return list(self.blocks)


def drop_path_draws(seed: int, positions: Sequence[int], rates: Sequence[float]) -> Tensor:
    """[B, depth, 2] bool, True = the branch stays: a function of the seed and each sample's
    position alone.
    """
    drop = torch.tensor(rates, dtype=torch.float64)[:, None].expand(-1, 2)
    draws = [
        uniform(seed, Purpose.DROP_PATH, position, count=2 * len(rates)) for position in positions
    ]
    return torch.stack([torch.from_numpy(row).view(-1, 2) >= drop for row in draws])


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
