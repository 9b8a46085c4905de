"""Means and deviations of pixels: whether they can belong to images here, whose pixels go from 0
to 1, and not from 0 to 255 as in other frameworks.

A wrong unit trains without a sign: the network sees next to nothing, and the loss looks good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rcmae.config.recipe import Recipe

_MOST_STD = 0.5  # that pixels in [0, 1] can have


def statistics_problems(recipe: Recipe) -> list[str]:
    """What is wrong with data.mean and data.std, a line each."""
    data, channels = recipe.data, recipe.model.in_channels
    problems = []
    if len(data.mean) != channels or len(data.std) != channels:
        problems.append(
            f"data.mean and data.std have {len(data.mean)} and {len(data.std)} values for "
            f"model.in_channels={channels}; give one a channel"
        )
    if not all(0 <= value <= 1 for value in data.mean):
        problems.append(
            f"data.mean: pixels go from 0 to 1 here, and so do their means, got {list(data.mean)}"
            f"{_divided('data.mean', data.mean)}"
        )
    if not all(0 < value <= 1 for value in data.std):
        problems.append(
            "data.std: values must be above 0 and at most 1, as pixels go from 0 to 1 here, got "
            f"{list(data.std)}{_divided('data.std', data.std)}"
        )
    return problems


def _divided(key: str, values: Sequence[float]) -> str:
    """The way out where values are of pixels from 0 to 255."""
    if not all(math.isfinite(value) and 0 <= value <= 255 for value in values):
        return ""
    if max(values) <= 1:  # a 0 among deviations
        return ""
    told = ",".join(f"{value / 255:.4g}" for value in values)
    return f"; these are for pixels from 0 to 255; divided by 255: {key}=[{told}]"


def statistics_doubts(recipe: Recipe) -> list[str]:
    """What can be meant, but seldom is."""
    data = recipe.data
    if normalises_nothing(recipe) or max(data.std, default=0.0) <= _MOST_STD:
        return []
    return [
        f"data.std={list(data.std)}: pixels from 0 to 1 never deviate by more than {_MOST_STD}; "
        "is this of other pixels?"
    ]


def normalises_nothing(recipe: Recipe) -> bool:
    """Whether images are left as they are, on purpose: mean 0, deviation 1."""
    return not any(recipe.data.mean) and all(value == 1 for value in recipe.data.std)


def first_batch_doubts(recipe: Recipe, mean: Sequence[float], std: Sequence[float]) -> list[str]:
    """What the first images say of data.mean and data.std.

    Args:
        recipe: whose statistics these are.
        mean, std: of each channel of the images, normalised.
    """
    if normalises_nothing(recipe):
        return []
    far = [
        channel
        for channel, (middle, deviation) in enumerate(zip(mean, std, strict=True))
        if not (abs(middle) <= 1.5 and 1 / 3 <= deviation <= 3)
    ]
    if not far:
        return []
    data = recipe.data
    own_mean = [each * by + at for each, by, at in zip(mean, data.std, data.mean, strict=True)]
    own_std = [each * by for each, by in zip(std, data.std, strict=True)]
    worst = far[0]
    return [
        f"the first images, normalised, have mean {mean[worst]:.2f} and deviation "
        f"{std[worst]:.2f} in channel {worst}, far from 0 and 1: data.mean and data.std are not "
        f"theirs; of these images they are data.mean=[{_listed(own_mean)}] "
        f"data.std=[{_listed(own_std)}]"
    ]


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:.3f}" for value in values)
