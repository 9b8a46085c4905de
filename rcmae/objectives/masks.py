"""The mask of a recipe's objective."""

from __future__ import annotations

from rcmae.config import ObjectiveOptions, Recipe
from rcmae.data.masking import BlockMask, GridMask, Mask, RandomMask, SharedMask, visible_count


def make_mask(recipe: Recipe, grid: tuple[int, int]) -> Mask:
    """What of an image is seen, for a grid of patches.

    Raises:
        Refused: all or nothing is, or boxes or blocks do not fit.
    """
    asked = recipe.objective
    mask = _mask_of(asked, grid)
    return SharedMask(mask, recipe.batch.images) if asked.mask_shared == "step" else mask


def _mask_of(asked: ObjectiveOptions, grid: tuple[int, int]) -> Mask:
    patches = grid[0] * grid[1]
    if asked.mask == "grid":
        blocks = patches // asked.mask_grid**2  # whole ones; a grid that has others is refused
        return GridMask(grid, asked.mask_grid, visible_count(blocks, asked.mask_ratio))
    visible = visible_count(patches, asked.mask_ratio)
    if asked.mask == "boxes":
        boxed = round(asked.box_ratio * patches)
        return BlockMask(grid, visible, boxed, asked.box_smallest, asked.box_largest)
    return RandomMask(patches, visible)
