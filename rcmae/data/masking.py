"""Which patches of an image the encoder sees: keyed per sample, the same number in every image.

A mask is an order of the patches (`ids_shuffle`) of which the first `num_visible` are seen. The
number is constant, because with one that varies per sample a mean over a rank's images would depend
on how many ranks there are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rcmae.data.draws import Purpose, permutation, uniform
from rcmae.errors import Refused


class Mask(Protocol):
    """What the stream asks of a mask: the same count for every image, and an order of the
    patches for each.
    """

    @property
    def num_patches(self) -> int:
        """Patches in an image, L."""

    @property
    def num_visible(self) -> int:
        """How many of them the encoder sees, between 1 and L - 1."""

    def ids(self, seed: int, position: int, draw: int = 0) -> NDArray[np.int64]:
        """[L] a permutation of the patches for this position; the first `num_visible` are seen."""


@dataclass(frozen=True)
class RandomMask:
    """Patches hidden uniformly at random (MAE, section 3)."""

    num_patches: int
    num_visible: int

    def __post_init__(self) -> None:
        if not 0 < self.num_visible < self.num_patches:
            raise Refused(
                f"{self.num_visible} visible patches of {self.num_patches}: at least one "
                "must be seen and one hidden;"
                " change objective.mask_ratio, model.image_size or model.patch_size"
            )

    def ids(self, seed: int, position: int, draw: int = 0) -> NDArray[np.int64]:
        """[L] a permutation of the patches for this position; the first `num_visible` are seen."""
        return random_ids(seed, position, self.num_patches, draw)


@dataclass(frozen=True)
class BlockMask:
    """Boxes of patches hidden first, then single ones at random up to the count (BEiT; BootMAE's
    code).

    A box has a number of patches drawn evenly between `smallest` and `largest` (or what is still to
    be hidden), and an aspect drawn log-evenly between 0.3 and 1 / 0.3; it is smaller than the grid,
    and is taken if it hides something new and not too much. The published code tries until exactly
    `num_boxed` are hidden, and so does this."""

    grid: tuple[int, int]  # patches, rows and columns
    num_visible: int
    num_boxed: int  # patches hidden by boxes
    smallest: int = 16  # patches of a box
    largest: int = 60

    def __post_init__(self) -> None:
        hidden = self.num_patches - self.num_visible
        problems = []
        if not 0 < self.num_visible < self.num_patches:
            problems.append(
                f"{self.num_visible} visible patches of {self.num_patches}; change "
                "objective.mask_ratio"
            )
        elif not 0 <= self.num_boxed <= hidden:
            problems.append(
                f"boxes hide {self.num_boxed} patches, but {hidden} are; lower objective.box_ratio"
            )
        if not 1 <= self.smallest <= self.largest or min(self.grid) < 2:
            problems.append(
                f"boxes of {self.smallest} to {self.largest} patches in a grid of {self.grid}: "
                "give objective.box_smallest <= box_largest, and an image of two patches a "
                "side or more"
            )
        if (
            not problems
            and self.num_boxed
            and self.smallest > (self.grid[0] - 1) * (self.grid[1] - 1)
        ):
            problems.append(
                f"boxes of {self.smallest} patches and more do not fit {self.grid}; lower "
                "box_smallest"
            )
        if problems:
            raise Refused("\n".join(problems))

    @property
    def num_patches(self) -> int:
        """Patches in an image, L."""
        return self.grid[0] * self.grid[1]

    def ids(self, seed: int, position: int, draw: int = 0) -> NDArray[np.int64]:
        """[L] a permutation of the patches for this position; the first `num_visible` are seen."""
        order = random_ids(seed, position, self.num_patches, draw)
        boxed = self.boxes(seed, position, draw).ravel()[order]
        return order[np.argsort(boxed, kind="stable")]

    def boxes(self, seed: int, position: int, draw: int = 0) -> NDArray[np.bool_]:
        """[rows, columns] True where a box hides the patch: `num_boxed` of them."""
        rows, columns = self.grid
        boxed = np.zeros(self.grid, bool)
        left = self.num_boxed
        for chunk in count():
            draws = uniform(
                seed, Purpose.MASK_BLOCKS, draw, position, chunk, count=4 * _TRIES
            ).reshape(-1, 4)
            for size, shape, down, across in draws.tolist():
                if left == 0:
                    return boxed
                area = self.smallest + size * (min(left, self.largest) - self.smallest)
                aspect = math.exp((2 * shape - 1) * math.log(_ASPECT))
                height = round(math.sqrt(area * aspect))
                width = round(math.sqrt(area / aspect))
                if not (0 < height < rows and 0 < width < columns):
                    continue
                top = int(down * (rows - height + 1))
                start = int(across * (columns - width + 1))
                box = boxed[top : top + height, start : start + width]
                new = box.size - int(box.sum())
                if 0 < new <= min(left, self.largest):
                    box[:] = True
                    left -= new
        raise AssertionError("count() ends never")


@dataclass(frozen=True)
class GridMask:
    """Square blocks of patches, each seen or hidden as one (Pixio, arXiv 2512.15715): what is
    hidden is larger than a patch, and harder to guess from its neighbours."""

    grid: tuple[int, int]  # patches, rows and columns
    block: int  # patches of a block's side; divides both
    blocks_visible: int

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise Refused("\n".join(problems))

    def _problems(self) -> list[str]:
        rows, columns = self.grid
        side = self.block
        if rows % side or columns % side:
            both = math.gcd(rows, columns)
            divisors = [each for each in range(1, both + 1) if both % each == 0]
            divisors = [each for each in divisors if each**2 < rows * columns]  # two blocks or more
            below = [divisor for divisor in divisors if divisor < side][-1:]
            above = [divisor for divisor in divisors if divisor > side][:1]
            sides = " or ".join(map(str, below + above))
            grids = " or ".join(f"{high}x{wide}" for high, wide in _multiples(self.grid, side))
            return [
                f"blocks of {side}x{side} patches do not fit a grid of {rows}x{columns}: use "
                f"objective.mask_grid={sides}, or a grid of {grids} patches by model.image_size"
            ]
        blocks = self.num_patches // side**2
        if not 0 < self.blocks_visible < blocks:
            return [
                f"{self.blocks_visible} visible blocks of {blocks}: at least one must be seen and "
                "one hidden; change objective.mask_ratio, objective.mask_grid or model.image_size"
            ]
        return []

    @property
    def num_patches(self) -> int:
        """Patches in an image, L."""
        return self.grid[0] * self.grid[1]

    @property
    def num_visible(self) -> int:
        """How many of them the encoder sees."""
        return self.blocks_visible * self.block**2

    def ids(self, seed: int, position: int, draw: int = 0) -> NDArray[np.int64]:
        """[L] a permutation of the patches for this position; the first `num_visible` are seen."""
        order = random_ids(seed, position, self.num_patches // self.block**2, draw)
        return patches_of_blocks(order, self.grid, self.block)


def _multiples(grid: tuple[int, int], side: int) -> list[tuple[int, int]]:
    """The grids nearest to one that blocks of this side fit: one not larger, one not smaller."""
    lower = [max(2 * side, length // side * side) for length in grid]
    upper = [max(2 * side, -(-length // side) * side) for length in grid]
    return sorted({(lower[0], lower[1]), (upper[0], upper[1])})


def patches_of_blocks(
    order: NDArray[np.int64], grid: tuple[int, int], block: int
) -> NDArray[np.int64]:
    """Blocks [..., n] by their patches [..., n * block^2]: block after block, each in raster
    order.

    Args:
        order: numbers of blocks, counted in raster order.
        grid: patches, rows and columns.
        block: patches of a block's side.
    """
    rows, columns = grid
    raster = np.arange(rows * columns).reshape(rows // block, block, columns // block, block)
    inside = raster.transpose(0, 2, 1, 3).reshape(-1, block**2)  # [blocks, patches of each]
    return inside[order].reshape(*order.shape[:-1], -1)


_TRIES = 64  # boxes drawn at once
_ASPECT = 0.3  # of the flattest box


@dataclass(frozen=True)
class SharedMask:
    """One mask for all the images of an optimizer step (MAE-priv's "batched shuffle"), on any
    number of ranks.
    """

    mask: Mask
    images: int  # of a step

    @property
    def num_patches(self) -> int:
        """Patches in an image, L."""
        return self.mask.num_patches

    @property
    def num_visible(self) -> int:
        """How many of them the encoder sees."""
        return self.mask.num_visible

    def ids(self, seed: int, position: int, draw: int = 0) -> NDArray[np.int64]:
        """[L] a permutation of the patches for this position's step."""
        return self.mask.ids(seed, position // self.images * self.images, draw)


@dataclass(frozen=True)
class NoMask:
    """Nothing hidden and nothing ordered: for what looks at whole images."""

    num_patches: int = 0
    num_visible: int = 0

    def ids(self, seed: int, position: int, draw: int = 0) -> NDArray[np.int64]:
        """[0] no order."""
        return np.zeros(0, np.int64)


def visible_count(num_patches: int, mask_ratio: float) -> int:
    """How many patches the encoder sees: the product truncated, as the published code has it."""
    if not 0.0 < mask_ratio < 1.0:
        raise Refused(f"mask_ratio={mask_ratio} must lie between 0 and 1, both excluded")
    return int(num_patches * (1 - mask_ratio))


def random_ids(seed: int, position: int, num_patches: int, draw: int = 0) -> NDArray[np.int64]:
    """[num_patches] a random order of the patches, a function of (seed, position, draw) alone."""
    return permutation(seed, Purpose.MASK, draw, position, count=num_patches)
