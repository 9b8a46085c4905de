"""Weights of another grid, class count or family, fitted to a classifier."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from rcmae.errors import Refused
from rcmae.models.protocol import part_of

if TYPE_CHECKING:  # it imports timm, which costs seconds: for who classifies
    from rcmae.models.classifier import Classifier

NEW = ("head.", "fc_norm.")  # what a classifier has and a pretrained encoder lacks


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
    fresh: tuple[str, ...]  # the model's own that the file has not: newly initialised
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
        for what, names in (("newly initialised", self.fresh), ("left in the file", self.unused)):
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
        Refused: it is of another architecture or patch size, lacks weights of the encoder or has
            unknown ones; everything at once. The model is untouched.
    """
    wanted = model.state_dict()
    found = {name: value for name, value in weights.items() if not only_pretraining(name)}
    has_token = "cls_token" in found or "pos_embed" not in found
    fresh_token = model.class_tokens > 0 and not has_token
    if fresh_token:
        found["pos_embed"] = F.pad(found["pos_embed"], (0, 0, model.class_tokens, 0))
    old, problems = _grid_of(model, found, grid)
    if old is not None:
        found["pos_embed"] = resample_positions(found["pos_embed"], old, model.grid)
    for name in _without_a_place(found, wanted):
        del found[name]
    new = (*NEW, "cls_token") if fresh_token else NEW
    problems += name_problems(found, wanted, new)
    problems += shape_problems(found, wanted)
    if problems:
        raise Refused("; ".join(problems))
    model.load_state_dict({**wanted, **found})
    fresh = [name for name in wanted if name not in found]
    unused = [name for name in weights if name not in found]
    return Fit(
        matched=tuple(sorted(found)),
        fresh=tuple(fresh),
        unused=tuple(sorted(unused)),
        resampled=None if old is None else (old, model.grid),
    )


def _grid_of(
    model: Classifier, found: Mapping[str, Tensor], grid: tuple[int, int] | None
) -> tuple[tuple[int, int] | None, list[str]]:
    """The grid of the position table, where it is another than the model's, and what is wrong."""
    table = found.get("pos_embed")
    if table is None or table.shape[2:] != model.pos_embed.shape[2:]:
        return None, []
    patches = table.shape[1] - model.class_tokens
    side = math.isqrt(patches)
    rows, columns = grid or (side, side)
    if rows * columns != patches:
        return None, [f"pos_embed has {patches} patches, which are no {rows}x{columns} grid"]
    return (None if (rows, columns) == model.grid else (rows, columns)), []


def _without_a_place(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """A head of another number of classes; and the encoder's norm, where a mean has its own."""
    head = [name for name in found if name.startswith("head.")]
    if all(name in wanted and found[name].shape == wanted[name].shape for name in head):
        head = []
    norm = [name for name in found if name.startswith("norm.") and name not in wanted]
    return head + norm


def name_problems(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], new: tuple[str, ...]
) -> list[str]:
    """Weights that are not there, but for new ones, and weights that nothing uses."""
    lacking = [name for name in wanted if name not in found and not name.startswith(new)]
    unknown = [name for name in found if name not in wanted]
    problems = []
    for what, names in (("lacks", lacking), ("has unknown", unknown)):
        if names:
            problems.append(f"{what} {', '.join(names[:5])}{_and_more(names)}")
    return problems


def shape_problems(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Weights of another shape than the model's, and what to set."""
    shared = [name for name in found if name in wanted]
    differing = [name for name in shared if found[name].shape != wanted[name].shape]
    if not differing:
        return []
    problems = []
    name = "patch_embed.proj.weight"
    if name in differing and found[name].shape[2:] != wanted[name].shape[2:]:
        problems.append(
            f"it has patches of {found[name].shape[3]} pixels, the model {wanted[name].shape[3]}"
        )
    shapes = [f"{name} {_by(found[name])} instead of {_by(wanted[name])}" for name in differing[:5]]
    problems.append(
        f"has {', '.join(shapes)}{_and_more(differing)}: set model.name (or embed_dim, depth, "
        "num_heads), image_size, patch_size and class_tokens to those of the weights"
    )
    return problems


def _and_more(names: Sequence[str]) -> str:
    """How many there are after the first five."""
    return f" and {len(names) - 5} more" if len(names) > 5 else ""


def _by(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
