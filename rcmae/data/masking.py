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
