"""Weights of a pretraining, of another grid, or of a segmenter, fitted to one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rcmae.errors import Refused
from rcmae.models.fitting import Fit, name_problems, only_pretraining, resample_positions
from rcmae.models.fitting import shape_problems as shape_problems_of
from rcmae.models.segmentation.segmenter import Segmenter

# ends of names that a pretraining has not: they stay at their start
NEW = ("gamma_1", "gamma_2", "relative_position_bias_table", "num_batches_tracked")
COUNTER = "num_batches_tracked"  # of a batch norm; published files are read without
PYRAMID = ("fpn1.", "fpn2.")
HEADS = ("decode_head.", "auxiliary_head.")
INDEX = ".relative_position_index"  # of published files: it follows from the grid


@torch.no_grad()
def fit_encoder(
    model: Segmenter, weights: Mapping[str, Tensor], grid: tuple[int, int] | None = None
) -> Fit:
    """Put an encoder's weights, by their published names, into a segmenter's backbone; those of a
    whole segmenter into its pyramid and heads, too. Names in the result are the backbone's and the
    heads'.

    Args:
        model: of the same architecture and patch size; any crop.
        weights: with or without a decoder, which is left. A head of another kind or width is left,
            too, and so is the last layer of one of other classes.
        grid: rows and columns of patches of its position table; None: a square one.

    Raises:
        Refused: as `fitting.fit_weights`. The model is untouched.
    """
    backbone = model.backbone
    wanted = backbone.state_dict()
    found = {name.removeprefix("backbone."): value for name, value in weights.items()}
    if "blocks.0.attn.q_bias" in wanted:
        found = split_bias(found)
    usable = {
        name: value
        for name, value in found.items()
        if not only_pretraining(name) and not _is_left(name, wanted)
    }
    old, problems = _grid_of(model, usable, grid)
    if old is not None:
        usable["pos_embed"] = resample_positions(usable["pos_embed"], old, backbone.grid)
    lacking = {name: value for name, value in wanted.items() if not _is_new(name, usable)}
    problems += name_problems(usable, lacking, ())
    problems += shape_problems_of(usable, wanted)
    if problems:
        raise Refused("; ".join(problems))
    backbone.load_state_dict({**wanted, **usable})
    heads = {name: value for name, value in model.state_dict().items() if name.startswith(HEADS)}
    taken = heads_that_fit(heads, found)
    model.load_state_dict({**model.state_dict(), **taken})
    fresh = [name for name in wanted if name not in usable]
    if any(name.startswith(HEADS) for name in found):  # else they are all new, and nobody wonders
        fresh += [name for name in heads if name not in taken and not name.endswith(COUNTER)]
    usable |= taken
    return Fit(
        matched=tuple(sorted(usable)),
        fresh=tuple(sorted(fresh)),
        unused=tuple(sorted(name for name in found if name not in usable)),
        resampled=None if old is None else (old, backbone.grid),
    )


def heads_that_fit(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the heads that a file has, head by head: all but the last layer or none; and the
    last layer where it tells as many classes apart.

    Args:
        wanted: those of the model's heads.
        found: of the file.
    """
    taken: dict[str, Tensor] = {}
    for head in HEADS:
        mine, theirs = (
            {name: value.shape for name, value in state.items() if name.startswith(head)}
            for state in (wanted, found)
        )
        last = f"{head}conv_seg."
        inner = {name for name in mine if not name.startswith(last) and not name.endswith(COUNTER)}
        others = {name for name in theirs if not name.startswith(last)}
        if not theirs or inner != others or any(mine[name] != theirs[name] for name in inner):
            continue
        ends = [name for name in mine if name.startswith(last)]
        if all(mine[name] == theirs.get(name) for name in ends):
            inner |= set(ends)
        taken |= {name: found[name] for name in inner}
    return taken


def split_bias(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with each bias of queries, keys and values as two: softmax does not see the
    keys'."""
    found = {}
    for name, value in weights.items():
        if name.endswith("attn.qkv.bias"):
            place = name.removesuffix("qkv.bias")
            found[f"{place}q_bias"], _, found[f"{place}v_bias"] = value.chunk(3)
        else:
            found[name] = value
    return found


def _is_left(name: str, wanted: Mapping[str, Tensor]) -> bool:
    """Whether an encoder's weight has no place here on purpose."""
    if name.endswith(INDEX):
        return True
    return name.startswith(("norm.", "fc_norm.", "head.", *HEADS)) and name not in wanted


def _is_new(name: str, found: Mapping[str, Tensor]) -> bool:
    """Whether a weight of the backbone's may be missing: it stays as it is."""
    return name not in found and (name.endswith(NEW) or name.startswith((*PYRAMID, "cls_token")))


def _grid_of(
    model: Segmenter, found: dict[str, Tensor], grid: tuple[int, int] | None
) -> tuple[tuple[int, int] | None, list[str]]:
    """The grid of the position table, where it is another than the model's, and what is wrong; a
    table without class tokens' rows gets some of zeros."""
    table = found.get("pos_embed")
    ours = model.backbone.pos_embed
    if table is None or table.ndim != 3 or table.shape[2] != ours.shape[2]:
        return None, []
    prefix = model.backbone.class_tokens
    if "cls_token" not in found:
        found["pos_embed"] = table = torch.nn.functional.pad(table, (0, 0, prefix, 0))
    elif found["cls_token"].shape[1] != prefix:
        return None, []  # told by its shape
    patches = table.shape[1] - prefix
    rows, columns = grid or (math.isqrt(patches), math.isqrt(patches))
    if rows * columns != patches:
        return None, [f"pos_embed has {patches} patches, which are no {rows}x{columns} grid"]
    return (None if (rows, columns) == model.backbone.grid else (rows, columns)), []
