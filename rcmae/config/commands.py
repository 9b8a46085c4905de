"""Commands in a recipe that came with a file: `pipe:` runs whatever it says, so that of a run's
folder, a checkpoint or a bundle, which may be anybody's, it runs only where that is allowed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from rcmae.errors import Refused

_PIPE = "pipe:"


def sources_in(tree: Any, key: str = "") -> dict[str, str]:
    """The commands in a recipe's tree, by their keys."""
    if isinstance(tree, str):
        return {key: tree} if tree.lstrip().startswith(_PIPE) else {}
    found: dict[str, str] = {}
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            found |= sources_in(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list | tuple):
        for value in tree:
            found |= sources_in(value, key)
    return found


def without_pipes(tree: Any, where: str, given: Collection[str] = ()) -> None:
    """Refuse a recipe that came with a file and has commands.

    Args:
        tree: the recipe's, or any other of names of data.
        where: the file.
        given: keys that the command line gives.

    Raises:
        Refused: it has some, under keys that are not given.
    """
    found = [key for key in sources_in(tree) if not any(_within(key, each) for each in given)]
    if found:
        raise Refused(
            f"{where}: {', '.join(found)} runs a command (pipe:), and a command that comes with a "
            "file runs only with --allow-pipe; look at it first, or name the data yourself"
        )


def _within(key: str, outer: str) -> bool:
    return key == outer or key.startswith(f"{outer}.")
