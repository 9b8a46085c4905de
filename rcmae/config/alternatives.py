"""Keys of which a recipe has one: a key on the command line replaces the recipe's alternative.

`schedule.steps=50` over a recipe of 100 epochs means 50 steps. Only what the recipe's file says
gives way; two of a pair on one command line are refused as ever.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

PAIRS = (
    ("data.shards", "data.images"),
    ("schedule.epochs", "schedule.steps"),
    ("schedule.warmup_epochs", "schedule.warmup_steps"),
    ("schedule.base_lr", "schedule.lr"),
)


def give_way(tree: dict[str, Any], given: Collection[str], usual: Mapping[str, Any]) -> None:
    """Leave out what the file says and the command line says otherwise.

    Args:
        tree: the recipe, with what the command line sets in it.
        given: `section.key` that the command line sets.
        usual: `schedule` as the file has it.
    """
    keep_warmup_share(tree, given)
    shorten_warmup(tree, given, usual)
    for pair in PAIRS:
        for key, other in (pair, pair[::-1]):
            if key in given and other not in given and value_of(tree, key) is not None:
                drop(tree, other)
    other_engine = "engine.name" in given and value_of(tree, "engine.name") != "deepspeed"
    if other_engine and "engine.config" not in given:
        drop(tree, "engine.config")  # DeepSpeed's


def keep_warmup_share(tree: dict[str, Any], given: Collection[str]) -> None:
    """Where the command line gives the length in the other unit, and no warm-up: the warm-up of the
    file stays the same part of the training.
    """
    for unit, other in (("steps", "epochs"), ("epochs", "steps")):
        length, theirs, warmup = f"schedule.{unit}", f"schedule.{other}", f"schedule.warmup_{other}"
        mine = f"schedule.warmup_{unit}"
        if length not in given or {theirs, warmup, mine} & set(given):
            continue
        numbers = [value_of(tree, key) for key in (length, theirs, warmup)]
        if not all(type(number) in (int, float) for number in numbers) or not numbers[1]:
            continue  # refused by their types, or there is no warm-up
        share = numbers[0] * numbers[2] / numbers[1]
        if not math.isfinite(share):
            continue  # refused by their size
        drop(tree, warmup)
        tree["schedule"][mine[len("schedule.") :]] = round(share) if unit == "steps" else share


def shorten_warmup(tree: dict[str, Any], given: Collection[str], usual: Mapping[str, Any]) -> None:
    """Where the command line gives a length that the file's warm-up does not end before: the
    warm-up is the same part of the training as in the file.
    """
    for unit in ("steps", "epochs"):
        length, warmup = f"schedule.{unit}", f"schedule.warmup_{unit}"
        if length not in given or {"schedule.warmup_steps", "schedule.warmup_epochs"} & set(given):
            continue
        numbers = [value_of(tree, length), value_of(tree, warmup), usual.get(unit)]
        if not all(type(number) in (int, float) and number > 0 for number in numbers):
            continue
        now, old, before = numbers
        if old < now or old >= before:
            continue
        share = now * old / before
        if math.isfinite(share):
            tree["schedule"][f"warmup_{unit}"] = round(share) if unit == "steps" else share


def value_of(tree: dict[str, Any], key: str) -> Any:
    """The value of `section.key`, None where there is none."""
    section, _, name = key.partition(".")
    values = tree.get(section)
    return values.get(name) if isinstance(values, dict) else None


def drop(tree: dict[str, Any], key: str) -> None:
    """Leave a key out."""
    section, _, name = key.partition(".")
    values = tree.get(section)
    if isinstance(values, dict):
        values.pop(name, None)
