"""A Vision Transformer that classifies, by the published names: what fine-tuning trains and what
probes and users read.

It is timm's own model, so whatever knows timm knows it (`forward_features`,
`forward_intermediates`, `get_intermediate_layers`, `feature_info`). Two things are ours. Drop path
takes its draws from the caller, keyed by sample, so that a training does not depend on ranks,
resumes or recomputed activations. And weights of another grid, class count or family are fitted by
name, with a table of what matched; positions are trained here (MAE, appendix A.1), starting from
the interpolated table of the pretraining."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcmae.data.batch import Batch
from rcmae.data.draws import Purpose, uniform
from rcmae.errors import Refused
from rcmae.models import kernels  # first: it makes timm importable beside a CPU torch
from rcmae.models.batchnorm import GlobalBatchNorm
from rcmae.models.patches import sincos_positions
from rcmae.models.protocol import Place, layer_of, part_of
from rcmae.models.sizes import NetworkSizes

from timm.models.vision_transformer import VisionTransformer

Pool = Literal["cls", "mean"]
HEAD_STD = 2e-5  # of a fresh head's weights: fine-tuning starts from equal scores
NEW = ("head.", "fc_norm.")  # what a classifier has and a pretrained encoder lacks


class _Draws:
    """Where the blocks of one model find the draws of the forward under way."""

    keep: Tensor | None = None  # [B, depth, 2] bool


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): leaves a residual branch of a sample out, and
    scales what stays.
    """

    def __init__(self, draws: _Draws, block: int, branch: int, rate: float) -> None:
        super().__init__()
        self._draws = draws
        self._block = block
        self._branch = branch
        self._rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, N, D] of the branch, or zeros."""
        keep = self._draws.keep
        if keep is None or not self.training or self._rate == 0.0:
            return x
        scale = keep[:, self._block, self._branch].to(x.dtype) / (1.0 - self._rate)
        return x * scale[:, None, None]


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
        self._draws = _Draws()
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


# ---------------------------------------------------------------------------------- fitting weights


def resample_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A position table [1, 1 + rows * columns, D] for another grid: the class token's row (if there
    is one) stays, the others are interpolated bicubically between patch centres (MAE, appendix
    A.1)."""
    if old == new:
        return table
    first = table.shape[1] - old[0] * old[1]
    patches = table[:, first:].unflatten(1, old).permute(0, 3, 1, 2)  # [1, D, rows, columns]
    patches = F.interpolate(patches, size=new, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :first], patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def only_pretraining(name: str) -> bool:
    """Whether a weight of this published name is of no use to a classifier."""
    try:
        return part_of(name) != "encoder"
    except LookupError:  # a classifier's own, or nobody's
        return False


@dataclass(frozen=True)
class Fit:
    """Which weights of a file went into a model."""

    matched: tuple[str, ...]
    fresh: tuple[str, ...]  # the model's own that the file has not: drawn anew
    unused: tuple[str, ...]  # the file's that the model has no place for
    resampled: tuple[tuple[int, int], tuple[int, int]] | None  # positions: from grid, to grid

    def table(self) -> str:
        """What matched, as lines of text."""
        lines = [f"{len(self.matched)} weights and tables taken"]
        if self.resampled:
            (rows, columns), (to_rows, to_columns) = self.resampled
            lines.append(
                f"positions interpolated from a grid of {rows}x{columns} to {to_rows}x{to_columns}"
            )
        for what, names in (("drawn anew", self.fresh), ("left in the file", self.unused)):
            if names:
                kinds = sorted({name.split(".")[0] for name in names})
                lines.append(f"{len(names)} {what}: {', '.join(kinds)}")
        return "\n".join(f"  {line}" for line in lines)


@torch.no_grad()
def fit_weights(
    model: Classifier, weights: Mapping[str, Tensor], grid: tuple[int, int] | None = None
) -> Fit:
    """Put weights of published names, pretrained or fine-tuned, into a classifier.

    Args:
        model: of the same architecture and patch size; any image size and number of classes.
        weights: an encoder, with or without a decoder or a head. A head of another number of
            classes is left out. One that was trained without a class token gets the model's own,
            without a position.
        grid: rows and columns of patches of its position table; None for a square one.

    Raises:
        ValueError: it is of another architecture or patch size, lacks weights of the encoder or has
            unknown ones; everything at once. The model is untouched.
    """
    wanted = model.state_dict()
    found = {name: value for name, value in weights.items() if not only_pretraining(name)}
    first = model.num_prefix_tokens
    fresh_token = bool(first) and "cls_token" not in found and "pos_embed" in found
    if fresh_token:
        found["pos_embed"] = F.pad(found["pos_embed"], (0, 0, 1, 0))
    unused = {name for name in weights if name not in found}
    resampled = None
    problems = []
    table = found.get("pos_embed")
    if table is not None and table.shape[2:] == wanted["pos_embed"].shape[2:]:
        patches = table.shape[1] - first
        side = math.isqrt(patches)
        old = grid or (side, side)
        if old[0] * old[1] != patches:
            problems.append(f"pos_embed has {patches} patches, which are no {old[0]}x{old[1]} grid")
        elif old != model.grid:
            found["pos_embed"] = resample_positions(table, old, model.grid)
            resampled = (old, model.grid)
    head = [name for name in found if name.startswith("head.")]
    if any(name not in wanted or found[name].shape != wanted[name].shape for name in head):
        unused |= set(head)
        found = {name: value for name, value in found.items() if name not in head}
    # a mean has a norm of its own
    norm = {name for name in found if name.startswith("norm.") and name not in wanted}
    unused |= norm
    found = {name: value for name, value in found.items() if name not in norm}
    new = (*NEW, "cls_token") if fresh_token else NEW
    lacking = [name for name in wanted if name not in found and not name.startswith(new)]
    unknown = [name for name in found if name not in wanted]
    for what, names in (("lacks", lacking), ("has unknown", unknown)):
        if names:
            problems.append(
                f"{what} {', '.join(names[:5])}" + f" and {len(names) - 5} more" * (len(names) > 5)
            )
    differing = [
        name for name in found if name in wanted and found[name].shape != wanted[name].shape
    ]
    if differing:
        name = "patch_embed.proj.weight"
        if name in differing and found[name].shape[2:] != wanted[name].shape[2:]:
            problems.append(
                f"it has patches of {found[name].shape[3]} pixels, the model "
                f"{wanted[name].shape[3]}"
            )
        shapes = [
            f"{name} {_by(found[name])} instead of {_by(wanted[name])}" for name in differing[:5]
        ]
        problems.append(
            f"has {', '.join(shapes)}"
            + f" and {len(differing) - 5} more" * (len(differing) > 5)
            + ": set model.name (or embed_dim, depth, num_heads), image_size and patch_size to "
            "those of the weights"
        )
    if problems:
        raise Refused("; ".join(problems))
    model.load_state_dict({**wanted, **found})
    fresh = tuple(name for name in wanted if name not in found)
    return Fit(tuple(sorted(found)), fresh, tuple(sorted(unused)), resampled)


def _by(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


# ----------------------------------------------------------------------------------------- the task


@dataclass(frozen=True)
class Classification:
    """Cross-entropy with smoothed labels, or with the targets of mixed images.

    Args:
        smoothing: share of a target that is spread over all classes.
        seed: of drop path.
        keeps_average: whether the engine is to keep a moving average of the classifier, as its
            teacher.
    """

    smoothing: float = 0.0
    seed: int = 0
    keeps_average: bool = False
    weights: dict[str, float] = field(default_factory=lambda: {"classification": 1.0}, init=False)
    teacher_outputs: tuple[str, ...] = field(default=(), init=False)

    @property
    def needs_teacher(self) -> bool:
        """Whether there is an average."""
        return self.keeps_average

    def counts(self, batch: Batch) -> dict[str, int]:
        """Images of the micro-batch."""
        return {"classification": len(batch)}

    def __call__(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, progress: float
    ) -> dict[str, Tensor]:
        """Sum over the images; `teacher` and `progress` play no part."""
        rates = _classifier_of(student).drop_path_rates
        keep = None
        if any(rates):
            keep = drop_path_draws(self.seed, batch.positions.tolist(), rates).to(
                batch.images.device
            )
        return {"classification": cross_entropy(student(batch.images, keep), batch, self.smoothing)}


def _classifier_of(wrapper: nn.Module) -> Any:
    """The model inside an engine's wrapper."""
    return wrapper if hasattr(wrapper, "drop_path_rates") else wrapper.module


def cross_entropy(scores: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """Sum over the images, in float32 (float64 for float64 scores).

    Args:
        scores: [B, classes].
        batch: with targets [B, classes], or labels [B].
        smoothing: (1 - s) of a target is its label's, s is spread over all classes; targets are
            smooth already.
    """
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if batch.targets is not None:
        return F.cross_entropy(scores, batch.targets.to(scores.dtype), reduction="sum")
    assert batch.labels is not None
    return F.cross_entropy(scores, batch.labels, reduction="sum", label_smoothing=smoothing)


# ------------------------------------------------------------------------------------- linear probe


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


@dataclass(frozen=True)
class Probing:
    """Cross-entropy of a head on what a frozen encoder makes of the images.

    Args:
        encoder: images [B, C, H, W] -> features [B, D], in evaluation mode, not moved by any
            engine.
    """

    encoder: Callable[[Tensor], Tensor]
    weights: dict[str, float] = field(default_factory=lambda: {"classification": 1.0}, init=False)
    teacher_outputs: tuple[str, ...] = field(default=(), init=False)
    needs_teacher: bool = field(default=False, init=False)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Images of the micro-batch."""
        return {"classification": len(batch)}

    def __call__(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, progress: float
    ) -> dict[str, Tensor]:
        """Sum over the images; `teacher` and `progress` play no part."""
        with torch.no_grad():
            features = self.encoder(batch.images)
        return {"classification": cross_entropy(student(features), batch, 0.0)}
