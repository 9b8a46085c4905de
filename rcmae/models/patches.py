"""Images as patches and back, and where patches are: the sin-cos tables of their positions."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Positions = Literal["column_first", "row_first"]


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
    rows = image_size[0] // patch_size
    columns = image_size[1] // patch_size
    grid = patches.unflatten(2, (patch_size, patch_size, in_channels)).unflatten(1, (rows, columns))
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def sincos_positions(
    dim: int, grid: tuple[int, int], *, prefix: int, order: Positions = "column_first"
) -> Tensor:
    """The 2-D sin-cos table [rows, dim] in float64, raster order, after `prefix` rows of
    zeros, those of class tokens.

    The first half of the columns encodes the patch's column, the second its row, each as sines then
    cosines of geometric frequencies 1 ... 1/10000. "row_first" has it the other way round (MoCo v3,
    BootMAE, MAE-priv) and is computed in float32, as those tables were: rounded from float64, up to
    half of their numbers are others by a unit in the last place or more."""
    if torch.get_default_device().type == "meta":
        # its shape alone: for the sums torch would import its compiler
        return torch.empty(grid[0] * grid[1] + prefix, dim, dtype=torch.float64)
    dtype = torch.float64 if order == "column_first" else torch.float32
    share = torch.arange(dim // 4, dtype=dtype) / (dim // 4)
    frequencies = 10000.0**-share if order == "column_first" else 1.0 / 10000.0**share
    row, column = torch.meshgrid(*(torch.arange(side, dtype=dtype) for side in grid), indexing="ij")
    axes = (column, row) if order == "column_first" else (row, column)
    angles = [axis.reshape(-1, 1) * frequencies for axis in axes]  # each [L, dim/4]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return F.pad(table.double(), (0, 0, prefix, 0))


def is_sincos(table: Tensor, grid: tuple[int, int]) -> bool:
    """Whether a table [1, c + rows * columns, dim] is one of sines, but for its rounding."""
    dim = table.shape[2]
    prefix = table.shape[1] - grid[0] * grid[1]
    if dim % 4 or prefix < 0:
        return False
    kinds = [sincos_positions(dim, grid, prefix=prefix, order=each) for each in get_args(Positions)]
    return any(bool((table[0].double() - kind).abs().max() < 1e-4) for kind in kinds)


def sincos_grid(table: Tensor, prefix: int) -> tuple[int, int] | None:
    """Rows and columns of the patches of a table [1, prefix + L, dim] of sines; None where it is
    none, or of another network.
    """
    patches = table.shape[1] - prefix
    if patches < 1 or table.shape[2] < 4:
        return None
    sides = [side for side in range(1, patches + 1) if patches % side == 0]
    sides.sort(key=lambda rows: abs(rows * rows - patches))  # a square first
    number = torch.arange(patches)
    first = table[0, prefix:, 0].double()  # the sine of the column, or of the row
    for rows in sides:
        columns = patches // rows
        axes = (number % columns, number // columns)
        alike = any(bool((first - axis.double().sin()).abs().max() < 1e-4) for axis in axes)
        if alike and is_sincos(table, (rows, columns)):
            return rows, columns
    return None
