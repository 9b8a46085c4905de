"""The network that is trained: an encoder with its pyramid, a head, and one beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rcmae.data.draws import Purpose, uniform
from rcmae.models.blocks import drop_path_draws
from rcmae.models.protocol import Place, layer_of
from rcmae.models.segmentation.backbone import Backbone, Form
from rcmae.models.segmentation.heads import (
    AUXILIARY_LEVEL,
    AUXILIARY_WIDTH,
    POOL_SCALES,
    FCNHead,
    LinearHead,
    UPerHead,
)
from rcmae.models.sizes import NetworkSizes

PYRAMID = ("fpn1.", "fpn2.")  # of the backbone: new in segmentation, as the heads are
HEAD_STD = 0.01  # of a classifying layer's weights, as mmsegmentation draws them


@dataclass(frozen=True)
class Heads:
    """What reads classes off the encoder."""

    num_classes: int
    kind: str = "uper"  # or "linear"
    width: int | None = None  # of UPerNet; None: the encoder's
    auxiliary: bool = True  # whether UPerNet has the head beside it
    auxiliary_width: int = AUXILIARY_WIDTH
    dropout: float = 0.1  # of whole channels, before each last layer
    scales: tuple[int, ...] = POOL_SCALES


class Keep(NamedTuple):
    """What stays of a forward's random losses, drawn for each sample; None: everything."""

    paths: Tensor | None = None  # [B, depth, 2] bool: residual branches
    decode: Tensor | None = None  # [B, width] bool: channels of the head
    auxiliary: Tensor | None = None  # the same of the head beside it


class Segmenter(nn.Module):
    """Images to logits of each place, by the published names.

    Weights are drawn at construction from a fixed seed.

    Args:
        sizes: of the encoder; the image is one crop.
        form: of the encoder; with levels for UPerNet, without for a linear head.
        heads: what reads classes.
        norm_layer: makes a layer norm of a given width.
    """

    def __init__(
        self,
        sizes: NetworkSizes,
        form: Form,
        heads: Heads,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = Backbone(sizes, form, norm_layer)
        self.decode_head, auxiliary = _heads(sizes.embed_dim, heads)
        if auxiliary is not None:
            self.auxiliary_head = auxiliary
        self.draw_weights(torch.Generator().manual_seed(0))

    @property
    def drop_path_rates(self) -> list[float]:
        """Of each block."""
        return self.backbone.drop_path_rates

    @torch.no_grad()
    def draw_weights(self, generator: torch.Generator) -> None:
        """Draw all weights: matrices and convolutions Xavier uniform, tokens and last layers near
        0; layer scales, position biases and positions stay at their start."""
        for name, param in self.named_parameters():
            leaf = name.rpartition(".")[2]
            if leaf in ("pos_embed", "relative_position_bias_table", "gamma_1", "gamma_2"):
                continue
            if leaf == "cls_token":
                param.normal_(std=0.02, generator=generator)
            elif name.endswith("conv_seg.weight"):
                param.normal_(std=HEAD_STD, generator=generator)
            elif param.ndim > 1:
                nn.init.xavier_uniform_(param.flatten(1), generator=generator)
            else:
                param.fill_(0.0 if leaf.endswith("bias") else 1.0)

    def forward(self, images: Tensor, keep: Keep | None = None) -> list[Tensor]:
        """Logits [B, classes, h, w] of the head, and for a loss those of the head beside it.

        Args:
            images: [B, C, H, W] normalised, of one crop's size.
            keep: what stays, also of a step that is replayed; None of one that is judged.
        """
        for_loss = self.training or keep is not None
        keep = keep or Keep()
        self.backbone.draws.keep = keep.paths
        maps = self.backbone(images)
        found = [self.decode_head(maps, keep.decode)]
        if for_loss and hasattr(self, "auxiliary_head"):
            found.append(self.auxiliary_head(maps[AUXILIARY_LEVEL], keep.auxiliary))
        return found

    @property
    def num_layers(self) -> int:
        """The embedding, a layer a block, and what follows."""
        return len(self.backbone.blocks) + 2

    def place_of(self, name: str) -> Place:
        """Where a parameter is. Those of one dimension do not decay; tokens, positions and tables
        of position biases do, as published."""
        part, _, rest = name.partition(".")
        decays = self.get_parameter(name).ndim > 1
        if part != "backbone" or rest.startswith(PYRAMID):
            return Place("head", self.num_layers - 1, decays)
        return Place("encoder", layer_of(rest, len(self.backbone.blocks)), decays)

    def all_blocks(self) -> list[nn.Module]:
        """The encoder's."""
        return list(self.backbone.blocks)

    def other_units(self) -> list[nn.Module]:
        """What is sharded as one beside the blocks: two thirds of the weights are here."""
        named = ("fpn1", "fpn2")
        found = [getattr(self.backbone, name) for name in named if hasattr(self.backbone, name)]
        found.append(self.decode_head)
        return [*found, self.auxiliary_head] if hasattr(self, "auxiliary_head") else found


class DenseProbe(nn.Module):
    """A linear head alone, of an encoder that stands beside it and does not move."""

    num_layers = 2
    drop_path_rates: tuple[float, ...] = ()

    def __init__(self, channels: int, heads: Heads) -> None:
        super().__init__()
        self.decode_head = LinearHead(channels, heads.num_classes, dropout=heads.dropout)
        last = self.decode_head.conv_seg
        nn.init.normal_(last.weight, std=HEAD_STD, generator=torch.Generator().manual_seed(0))
        assert last.bias is not None
        nn.init.zeros_(last.bias)

    def forward(self, maps: Sequence[Tensor], keep: Keep | None = None) -> list[Tensor]:
        """Logits [B, classes, rows, columns] of the encoder's one map."""
        return [self.decode_head(maps, (keep or Keep()).decode)]

    def place_of(self, name: str) -> Place:
        """Where a parameter is: in the head, after whatever gives the maps."""
        return Place("head", 1, decays=self.get_parameter(name).ndim > 1)

    def all_blocks(self) -> list[nn.Module]:
        """None."""
        return []


def _heads(channels: int, heads: Heads) -> tuple[nn.Module, nn.Module | None]:
    """The head, and the one beside it."""
    if heads.kind == "linear":
        return LinearHead(channels, heads.num_classes, dropout=heads.dropout), None
    width = heads.width or channels
    main = UPerHead(channels, width, heads.num_classes, dropout=heads.dropout, scales=heads.scales)
    if not heads.auxiliary:
        return main, None
    beside = FCNHead(channels, heads.auxiliary_width, heads.num_classes, dropout=heads.dropout)
    return main, beside


def drawn(network: nn.Module, seed: int, positions: Sequence[int]) -> Keep:
    """What stays of each sample's branches and channels: a function of the seed and the sample's
    position alone.

    Args:
        network: a `Segmenter` or a `DenseProbe`.
        seed: of the run.
        positions: of the samples.
    """
    assert isinstance(network, Segmenter | DenseProbe)
    rates = network.drop_path_rates
    paths = drop_path_draws(seed, positions, rates) if any(rates) else None
    beside = getattr(network, "auxiliary_head", None)
    return Keep(
        paths,
        _channels(network.decode_head, seed, positions, which=0),
        _channels(beside, seed, positions, which=1),
    )


def _channels(
    head: nn.Module | None, seed: int, positions: Sequence[int], *, which: int
) -> Tensor | None:
    """[B, width] bool of a head's channels; None where it drops none."""
    if not isinstance(head, UPerHead | FCNHead | LinearHead) or head.dropout == 0.0:
        return None
    rows = [
        uniform(seed, Purpose.DROPOUT, which, position, count=head.width) >= head.dropout
        for position in positions
    ]
    return torch.stack([torch.from_numpy(row) for row in rows])
