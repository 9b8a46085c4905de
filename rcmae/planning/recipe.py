"""A recipe before its data is there: shipped ones leave the shards to the command line."""

from __future__ import annotations

from collections.abc import Sequence

from rcmae import config
from rcmae.config import Recipe
from rcmae.config.trees import tree_of
from rcmae.errors import Refused

NO_SHARDS = "shards-are-not-given.tar"  # stands for the shards of a recipe that names none


def load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe; where neither it nor the overrides name shards, with NO_SHARDS in their place.

    Raises:
        Refused: every problem.
    """
    path = config.recipe_path(name)
    try:
        tree = tree_of(path.read_text()) or {}
    except UnicodeDecodeError as error:
        raise Refused(f"{path} is not YAML: {error}") from error
    except Refused as error:
        raise Refused(f"{path} {error}") from error
    section = tree.get("data") if isinstance(tree, dict) else None
    by_images = any(item.startswith("data.images=") for item in overrides)
    in_file = not by_images and isinstance(section, dict) and bool(section.get("shards"))
    in_overrides = any(item.startswith("data.shards=") for item in overrides)
    if in_file or in_overrides:
        return config.load(name, overrides)
    rest = [item for item in overrides if not item.startswith("data.images=")]  # not packed yet
    return config.load(name, [f"data.shards={NO_SHARDS}", *rest])
