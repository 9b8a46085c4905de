"""YAML as plain values, refused where it is none or stands for too much.

Aliases of aliases make a line stand for more values than a memory holds."""

from __future__ import annotations

from typing import Any

import yaml

from rcmae.errors import Refused

MOST = 1_000_000  # values that a file may stand for


def tree_of(text: str) -> Any:
    """What a YAML text says.

    Raises:
        Refused: it is not YAML, is nested too deeply, contains itself or stands for too many
        values.
    """
    try:
        tree = yaml.safe_load(text)
        if _count(tree, {}) > MOST:
            raise Refused(f"its aliases stand for more than {MOST:,} values")
    except RecursionError as error:
        raise Refused("is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"is not YAML: {error}") from error
    return tree


def _count(tree: Any, counted: dict[int, int]) -> int:
    """Values of a tree, each alias as often as it stands there; `counted`: id -> values."""
    if not isinstance(tree, dict | list):
        return 1
    if id(tree) in counted:
        if counted[id(tree)] < 0:
            raise Refused("contains itself by an alias")
        return counted[id(tree)]
    counted[id(tree)] = -1
    children = list(tree.values()) if isinstance(tree, dict) else tree
    counted[id(tree)] = 1 + sum(_count(child, counted) for child in children)
    return counted[id(tree)]
