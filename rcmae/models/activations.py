"""What a training step keeps between its forward and its backward pass, part by part, by arithmetic
alone: blocks, decoder, head, loss.

Only sizes are read, of a model that may be on the meta device. tests/test_plan.py holds the sums to
what autograd saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from rcmae.models.bootmae import BootstrappedAutoencoder
from rcmae.models.build import Network
from rcmae.models.sizes import NetworkSizes
from rcmae.models.vit import MaskedAutoencoder

if TYPE_CHECKING:  # it imports timm, which costs seconds: for who classifies
    from rcmae.models.classifier import Classifier
    from rcmae.models.segmentation.backbone import Backbone

FP32 = 4  # bytes of a number
LOG_SUMS = 4  # bytes: fused attention keeps one fp32 number a query and head


@dataclass(frozen=True)
class Part:
    """A stretch of the student; bytes of one image."""

    name: str
    params: int
    saved: float  # from the forward to the backward pass
    passing: float  # more than that, while the backward pass is in it


class Computing(NamedTuple):
    """How a forward is computed."""

    precision: str = "bf16"  # or "fp32"
    checkpointing: str = "none"  # as in `kernels.checkpoint_blocks`
    # as in `kernels.attention`; what is not keeps the attention of each pair of tokens
    fused_attention: bool = True

    @property
    def width(self) -> int:
        """Bytes of a number."""
        return bytes_of(self.precision)


def activations(
    model: Network, *, num_visible: int, computing: Computing, teacher: bool
) -> list[Part]:
    """The student's parts in the order of the forward pass, the loss last.

    Args:
        model: any, also on the meta device: only its sizes are read.
        num_visible: patches that the encoder sees.
        computing: how.
        teacher: whether the loss has a term to a teacher's pixels.
    """
    sizes = model.sizes
    width = computing.width
    dim = sizes.embed_dim
    pixels = sizes.patch_size**2 * sizes.in_channels
    tokens = model.num_prefix + num_visible
    blocks = _Blocks(computing, sizes.mlp_ratio)
    named = ("cls_token", "reg_token", "pos_embed")
    embedding = Part(
        "embedding",
        params=_numel(model.patch_embed) + _named_numel(model, named),
        saved=num_visible * pixels * width,
        passing=(tokens + num_visible) * dim * width,
    )
    encoder = [
        blocks.part(f"block {i}", block, _Tokens(dim, sizes.num_heads, tokens, tokens))
        for i, block in enumerate(model.blocks)
    ]
    rest = _regressors if isinstance(model, BootstrappedAutoencoder) else _decoder
    return [embedding, *encoder, *rest(model, num_visible, blocks, teacher)]


def classifier_activations(
    model: Classifier | Backbone, sizes: NetworkSizes, *, computing: Computing
) -> list[Part]:
    """The parts of a classifier in the order of the forward pass, its head with the loss last.

    Args:
        model: any, also on the meta device.
        sizes: of its encoder.
        computing: how.
    """
    width = computing.width
    dim = sizes.embed_dim
    tokens = sizes.num_prefix + sizes.num_patches
    blocks = _Blocks(computing, sizes.mlp_ratio)
    at = _Tokens(dim, sizes.num_heads, tokens, tokens)
    encoder = [blocks.part(f"block {i}", block, at) for i, block in enumerate(model.blocks)]
    named = ("pos_embed", "cls_token", "reg_token", "patch_embed.")
    start = sum(param.numel() for name, param in model.named_parameters() if name.startswith(named))
    embedding = Part(
        "embedding",
        params=start,
        saved=sizes.num_patches * sizes.patch_pixels * width,
        passing=2 * tokens * dim * width,
    )
    head = Part(
        "head",
        params=_numel(model) - start - sum(part.params for part in encoder),
        saved=(tokens + 3) * dim * width,  # the last norm, and the pooled features
        passing=tokens * dim * width,
    )
    return [embedding, *encoder, head]


class _Tokens(NamedTuple):
    """What goes through a block."""

    dim: int
    heads: int
    keys: int  # tokens that are attended to
    queries: int  # tokens that the block answers for
    others: int = 0  # tokens of another stretch that it looks at, too
    other_dim: int = 0


@dataclass(frozen=True)
class _Blocks:
    """How blocks are computed."""

    computing: Computing
    mlp_ratio: float

    @property
    def width(self) -> int:
        """Bytes of a number."""
        return self.computing.width

    def part(self, name: str, block: nn.Module, at: _Tokens) -> Part:
        """A block with these tokens in it."""
        kept = self._kept(at)
        passing = self._gradients(at)
        if self.computing.checkpointing == "none":
            return Part(name, _numel(block), kept, passing)
        held = (
            0
            if self.computing.checkpointing == "fairscale_offload"
            else at.keys * at.dim * self.width
        )
        return Part(name, _numel(block), held, kept - held + passing)

    def _kept(self, at: _Tokens) -> float:
        # of a key: its input, its norm, q, k and v
        # of a query: attention, sum, its norm, the MLP before and after GELU
        numbers = (5 * at.keys + (3 + 2 * self.mlp_ratio) * at.queries) * at.dim
        statistics = at.heads * at.queries + 2 * at.keys + 2 * at.queries
        kept = numbers * self.width + FP32 * statistics
        if at.others:
            # of a query: a norm, q, attention, sum; of another: its norm, k and v
            numbers = 4 * at.queries * at.dim + at.others * (at.other_dim + 2 * at.dim)
            statistics = at.heads * at.queries + 2 * at.queries + 2 * at.others
            kept += numbers * self.width
            kept += FP32 * statistics
        if not self.computing.fused_attention:  # the matrix of attention, instead of its log-sums
            matrix = at.heads * at.queries * (at.keys + at.others) * self.width
            attentions = 2 if at.others else 1
            kept += matrix - LOG_SUMS * at.heads * at.queries * attentions
        return kept

    def _gradients(self, at: _Tokens) -> float:
        of_mlp = (1 + self.mlp_ratio) * at.queries * at.dim * self.width
        if self.computing.fused_attention:
            return of_mlp
        matrices = 2 * at.heads * at.queries * at.keys * self.width
        return max(of_mlp, matrices + at.queries * at.dim * self.width)


def _decoder(model: Network, num_visible: int, blocks: _Blocks, teacher: bool) -> list[Part]:
    """MAE's decoder and the loss."""
    assert isinstance(model, MaskedAutoencoder)
    sizes = model.sizes
    width = blocks.width
    visible = model.num_prefix + num_visible
    hidden = model.num_patches - num_visible
    tokens = model.decoder_prefix + model.num_patches
    own = ("mask_token", "decoder_pos_embed")
    dim = sizes.decoder_dim
    pixels = sizes.patch_size**2 * sizes.in_channels
    bridge = Part(
        "bridge",
        params=_numel(model.norm) + _numel(model.decoder_embed) + _named_numel(model, own),
        saved=2 * visible * sizes.embed_dim * width,
        passing=2 * tokens * dim * width,
    )
    decoder = []
    for i, block in enumerate(model.decoder_blocks):
        queries = hidden if i == len(model.decoder_blocks) - 1 else tokens
        at = _Tokens(dim, sizes.decoder_heads, tokens, queries)
        decoder.append(blocks.part(f"decoder block {i}", block, at))
    # what the last two keep is small
    heads = ("decoder_norm", "decoder_pred", "cls_head", "feature_head")
    head = Part(
        "head",
        params=sum(_numel(getattr(model, name)) for name in heads if hasattr(model, name)),
        saved=2 * hidden * dim * width,
        passing=hidden * (pixels + dim) * width,
    )
    return [bridge, *decoder, head, _pixel_loss(hidden * pixels, width, teacher)]


def _pixel_loss(values: int, width: int, teacher: bool) -> Part:
    # kept in fp32: the target, and the predictions, which in bf16 each term widens for itself;
    # passing: those in bf16, and a term's temporaries
    if width == FP32:
        widened = 2 if teacher else 1
        narrow = 0
    else:
        widened = 3 if teacher else 1
        narrow = 2 if teacher else 1
    return Part("loss", 0, values * FP32 * (1 + widened), values * (8 + narrow * width))


def _regressors(model: Network, num_visible: int, blocks: _Blocks, teacher: bool) -> list[Part]:
    """BootMAE's two regressors and the loss, patches weighted as published."""
    assert isinstance(model, BootstrappedAutoencoder)
    sizes = model.sizes
    width = blocks.width
    visible = 1 + num_visible
    hidden = model.num_patches - num_visible
    dim = sizes.embed_dim
    pixels = sizes.patch_size**2 * sizes.in_channels
    parts = [Part("bridge", _numel(model.norm), 2 * visible * dim * width, visible * dim * width)]
    of_pixels = _Regressor("pixels", "", sizes.decoder_dim, pixels)
    of_features = _Regressor("features", "_1", dim, dim)
    for regressor in (of_pixels, of_features):
        parts += _regressor(model, regressor, hidden, blocks)
    # kept in fp32: differences, and of features also what their norm was given;
    # passing: predictions, targets, temporaries
    narrow = 0 if width == FP32 else width
    kept = hidden * pixels * FP32
    most = hidden * pixels * (8 + narrow)
    if hasattr(model, "lm_head_1"):
        kept += 2 * hidden * dim * FP32
        most = max(most, hidden * dim * (12 + narrow))
    return [*parts, Part("loss", 0, kept, most)]


class _Regressor(NamedTuple):
    """One of BootMAE's two."""

    name: str
    suffix: str  # of its modules' names
    width: int
    outputs: int  # numbers that it predicts of a patch


def _regressor(
    model: BootstrappedAutoencoder, of: _Regressor, hidden: int, blocks: _Blocks
) -> list[Part]:
    named = dict(model.named_children())
    if f"decode_blocks{of.suffix}" not in named:
        return []
    sizes = model.sizes
    width = blocks.width
    tokens = 1 + model.num_patches
    visible = tokens - hidden
    mask_token = getattr(model, f"mask_token{of.suffix}")
    start = Part(
        f"start of {of.name}",
        params=_numel(named[f"down{of.suffix}"]) + mask_token.numel(),
        saved=0.0,
        passing=2 * tokens * of.width * width,
    )
    inner = []
    own_blocks = list(named[f"decode_blocks{of.suffix}"].children())
    for i, block in enumerate(own_blocks):
        queries = hidden if i == len(own_blocks) - 1 else tokens
        at = _Tokens(of.width, sizes.decoder_heads, tokens, queries, visible, sizes.embed_dim)
        inner.append(blocks.part(f"{of.name} block {i}", block, at))
    head = Part(
        f"head of {of.name}",
        params=_numel(named[f"decode_norm{of.suffix}"]) + _numel(named[f"lm_head{of.suffix}"]),
        saved=2 * hidden * of.width * width,
        passing=hidden * (of.outputs + of.width) * width,
    )
    return [start, *inner, head]


def inference_bytes(
    sizes: NetworkSizes, *, num_visible: int, precision: str, decodes: bool = True
) -> float:
    """Bytes of one image at the height of a forward pass without gradients: inside an MLP."""
    widest = (sizes.num_prefix + num_visible) * sizes.embed_dim
    if decodes:
        widest = max(widest, (sizes.class_tokens + sizes.num_patches) * sizes.decoder_dim)
    return (2 + 2 * sizes.mlp_ratio) * widest * bytes_of(precision)


def bytes_of(precision: str) -> int:
    """Bytes of a number that is computed with."""
    return {"bf16": 2, "fp32": FP32}[precision]


def _numel(module: torch.nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def _named_numel(module: torch.nn.Module, names: tuple[str, ...]) -> int:
    """Elements of a module's own parameters of these names, those that it has."""
    own = dict(module.named_parameters(recurse=False))
    return sum(own[name].numel() for name in names if name in own)
