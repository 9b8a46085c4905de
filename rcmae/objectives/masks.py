"""The mask of a recipe's objective."""

from __future__ import annotations

from rcmae.config import Recipe
from rcmae.data.masking import BlockMask, Mask, RandomMask, SharedMask, visible_count


def make_mask(recipe: Recipe, grid: tuple[int, int]) -> Mask:
    """What of an image is seen, for a grid of patches.

    Raises:
        Refused: all or nothing is, or boxes do not fit.
    """
    asked = recipe.objective
    patches = grid[0] * grid[1]
    visible = visible_count(patches, asked.mask_ratio)
    mask: Mask = RandomMask(patches, visible)
    if asked.mask == "boxes":
        boxed = round(asked.box_ratio * patches)
        mask = BlockMask(grid, visible, boxed, asked.box_smallest, asked.box_largest)
    return SharedMask(mask, recipe.batch.images) if asked.mask_shared == "step" else mask
