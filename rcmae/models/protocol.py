"""What a network says of itself: what its forward gives, to which part each parameter belongs, and
where its blocks are. Engines, optimizers and the planner ask this and look at no name.

A network around another (a segmenter around a ViT, `backbone.blocks.3.norm1.weight`) answers with
what its own child says of the rest of the name."""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple, Protocol, get_args

from torch import Tensor, nn

# What a forward gives by name:
#   pixels      [B, L - num_visible, p*p*C] predictions of the hidden patches, as `patchify` orders,
#               in the order of `ids_shuffle[:, num_visible:]`
#   all_pixels  [B, L, p*p*C] predictions of all patches, the visible ones too, in raster order
#   features    [B, L - num_visible, D] predictions of the hidden patches' tokens
#   classes     [B, num_classes] logits
#   tokens      [B, L, D] of the whole image, out of the last block and before the norm: what
#               features are to predict
#   class_tokens  [B, c, D] of the whole image, out of the last block and before the norm
#   encoded     [B, 1 + L, D] normalised tokens of the whole image, cls first: what evaluations read
Output = Literal["pixels", "all_pixels", "features", "classes", "tokens", "class_tokens", "encoded"]
OUTPUTS = get_args(Output)
Outputs = dict[str, Tensor]
OF_WHOLE_IMAGES = {"tokens", "class_tokens", "encoded"}  # outputs that need no mask

PARTS = ("encoder", "decoder", "head")  # in the order of their optimizer groups
# Beginnings of the published names of weights and tables, of all networks that pretrain. Heads are
# what no teacher has.
PUBLISHED = {
    "encoder": ("cls_token", "reg_token", "pos_embed", "patch_embed.", "blocks.", "norm."),
    "decoder": ("decoder", "decode_", "mask_token", "de_pos_embed", "down", "lm_head"),
    "head": ("cls_head.", "feature_head."),
}
TABLES = ("pos_embed", "decoder_pos_embed", "de_pos_embed")  # of positions, fixed or learned
EMBEDDING = ("cls_token", "reg_token", "pos_embed", "patch_embed.")


class Place(NamedTuple):
    """Where a parameter is in its network."""

    part: str  # one of PARTS: a teacher has whole parts of the student
    layer: int  # 0: the embedding; then a block each; then what follows the last
    decays: bool  # by the weight decay


class Trainable(Protocol):
    """A network that engines can train; also an `nn.Module`."""

    @property
    def num_layers(self) -> int:
        """How many layers its parameters are in: the embedding, the blocks, what follows."""

    def place_of(self, name: str) -> Place:
        """Where the parameter of this name is. Raises LookupError: the network has none such."""

    def all_blocks(self) -> list[nn.Module]:
        """What is sharded, compiled and computed again as one: blocks in the order of the forward,
        each with its attention as `attn` (and `c_attn`); none where it has none.
        """


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a `Trainable`."""
    network: Any = model  # torch types any attribute of a module as a tensor or a module
    blocks: list[nn.Module] = network.all_blocks()
    return blocks


def other_units(model: nn.Module) -> list[nn.Module]:
    """What of a `Trainable` is sharded as one beside its blocks: large heads, each called as a
    module. It may have `other_units`; most have none.
    """
    network: Any = model
    return network.other_units() if hasattr(network, "other_units") else []


def graph_changes(model: nn.Module) -> bool:
    """Whether which parameters a loss depends on changes from batch to batch: `graph_changes` of a
    `Trainable` whose heads may have nothing to learn from in a batch.
    """
    return bool(getattr(model, "graph_changes", False))


def running_buffers(model: nn.Module) -> list[str]:
    """Names of the buffers that training changes: statistics that run along (batch norm's), the
    same on every rank. All other buffers are tables, which nothing changes.

    A checkpoint carries both kinds; an average takes the student's running ones at each update.
    """
    found = []
    for prefix, module in model.named_modules():
        if getattr(module, "track_running_stats", False):
            place = f"{prefix}." if prefix else ""
            found += [f"{place}{name}" for name, _ in module.named_buffers(recurse=False)]
    return found


def part_of(name: str) -> str:
    """The part of a pretraining network that a weight or table of this published name is in.

    Raises:
        LookupError: none.
    """
    for part, beginnings in PUBLISHED.items():
        if name.startswith(beginnings):
            return part
    raise LookupError(f"no part of a network has a parameter called {name}")


def layer_of(name: str, depth: int) -> int:
    """The layer of a parameter of this published name, of an encoder of `depth` blocks."""
    if block := re.match(r"blocks\.(\d+)\.", name):
        return 1 + int(block[1])
    return 0 if name.startswith(EMBEDDING) else 1 + depth
