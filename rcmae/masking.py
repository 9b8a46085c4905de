"""Which patches of an image the encoder sees: keyed per sample, the same number in every image.

A mask is an order of the patches (`ids_shuffle`) of which the first `num_visible` are seen. The number is constant,
because with one that varies per sample a mean over a rank's images would depend on how many ranks there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rcmae.draws import Purpose, permutation


class Mask(Protocol):
    """What the stream asks of a mask: the same count for every image, and an order of the patches for each."""

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
            raise ValueError(
                f"{self.num_visible} visible patches of {self.num_patches}: at least one must be seen and one hidden;"
                " change objective.mask_ratio, model.image_size or model.patch_size"
            )

    def ids(self, seed: int, position: int, draw: int = 0) -> NDArray[np.int64]:
        """[L] a permutation of the patches for this position; the first `num_visible` are seen."""
        return random_ids(seed, position, self.num_patches, draw)


def visible_count(num_patches: int, mask_ratio: float) -> int:
    """How many patches the encoder sees: the product truncated, as the published code has it."""
    if not 0.0 < mask_ratio < 1.0:
        raise ValueError(f"mask_ratio={mask_ratio} must lie between 0 and 1, both excluded")
    return int(num_patches * (1 - mask_ratio))


def random_ids(seed: int, position: int, num_patches: int, draw: int = 0) -> NDArray[np.int64]:
    """[num_patches] a random order of the patches, a function of (seed, position, draw) alone."""
    return permutation(seed, Purpose.MASK, draw, position, count=num_patches)
