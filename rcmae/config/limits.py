"""Values of a recipe that no training could work with, found before anything does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rcmae.config.recipe import Recipe

_LARGEST_SEED = 2**64 - 1
_LARGEST = 2**53  # a count; every language and file reads it as it is
_LARGEST_FLOAT = 1e15
_LARGEST_TIME = 1e8  # three years of seconds: clocks and sockets take no more
_SHORTEST_TIMEOUT = 0.1  # seconds: the machine itself is late by more
# Of networks and pictures: no machine builds larger ones, and sizes in bytes must fit 64 bits.
_LARGEST_SIZE = 2**20
_MOST_BLOCKS = 10_000
_BLOCKS = ("model.depth", "model.decoder_depth")
_SIZES = (
    *("segment.crop", "segment.width", "segment.num_classes", "evaluate.picture_images"),
    *("detect.window", "detect.pretrain_size", "detect.channels", "detect.box_width"),
    *("detect.num_classes", "classify.num_classes"),
)
_LAST_POSITION = 2**62  # of a sample, over all epochs
# of a number that says "never" by being infinite
_ENDLESS = ("data.decode_margin",)


def limit_problems(recipe: Recipe) -> list[str]:
    """Lines `key: what is wrong` for each number beyond its limits."""
    problems = [
        f"{key}: {problem}, got {_short(value)}"
        for key, value in _numbers(recipe.model_dump(), "")
        if (problem := _problem(key, value))
    ]
    steps = recipe.schedule.steps
    if not problems and steps is not None and steps * recipe.batch.images > _LAST_POSITION:
        problems.append(
            f"schedule.steps={steps} of batch.images={recipe.batch.images} are more than 2^62 "
            "samples; give fewer"
        )
    return problems


def truth_problems(given: Any, taken: Any, key: str = "") -> list[str]:
    """Lines for each `true` or `false` where a recipe has a number: it would be 1 or 0.

    Args:
        given: as the recipe has it.
        taken: as it was understood.
        key: of both.
    """
    if isinstance(given, dict) and isinstance(taken, dict):
        problems = []
        for name, value in given.items():
            problems += truth_problems(value, taken.get(name), f"{key}.{name}" if key else name)
        return problems
    if isinstance(given, list) and isinstance(taken, list | tuple) and len(given) == len(taken):
        pairs = zip(given, taken, strict=True)
        return [told for one, other in pairs for told in truth_problems(one, other, key)]
    if isinstance(given, bool) and isinstance(taken, int | float) and not isinstance(taken, bool):
        return [f"{key}: wants a number, got {str(given).lower()}"]
    return []


def text_problems(tree: Any, key: str = "") -> list[str]:
    """Lines for each text with a zero byte: no path, name or command has one."""
    if isinstance(tree, dict):
        problems = []
        for name, value in tree.items():
            problems += text_problems(value, f"{key}.{name}" if key else str(name))
        return problems
    if isinstance(tree, list):
        return [told for value in tree for told in text_problems(value, key)]
    if isinstance(tree, str) and "\0" in tree:
        return [f"{key}: has a zero byte in it"]
    return []


def _numbers(tree: Any, key: str) -> Iterator[tuple[str, int | float]]:
    """Each number with its key; of a list all have the list's."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _numbers(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _numbers(value, key)
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield key, tree


def _problem(key: str, value: int | float) -> str | None:
    if isinstance(value, float):
        if math.isnan(value) or (math.isinf(value) and key not in _ENDLESS):
            return "must be a finite number"
        if abs(value) > _LARGEST_FLOAT and key not in _ENDLESS:
            return "must be less than 10^15"
    elif key.endswith("seed"):
        return "must be less than 2^64" if value > _LARGEST_SEED else None
    elif abs(value) > _LARGEST:
        return "must be at most 2^53"
    elif key in _BLOCKS and value > _MOST_BLOCKS:
        return f"must be at most {_MOST_BLOCKS:,}"
    elif (key in _SIZES or key.startswith("model.")) and value > _LARGEST_SIZE:
        return "must be at most 2^20"
    if key.endswith("timeout_s") and value < _SHORTEST_TIMEOUT:
        return f"must be at least {_SHORTEST_TIMEOUT} seconds"
    if key.endswith("_s") and value > _LARGEST_TIME:
        return "must be at most 10^8 seconds"
    if key in ("data.cache_gb", "schedule.epochs", "checkpoint.every_minutes") and value > 1e9:
        return "must be at most 10^9"
    return None


def _short(value: int | float) -> str:
    try:
        text = str(value)
    except ValueError:  # Python writes no number of thousands of digits
        text = hex(value) if isinstance(value, int) else "a number"
    return text if len(text) <= 40 else f"{text[:37]}... ({len(text)} digits)"
