"""What a recipe names as MODULE:NAME, found: an objective of this package, or one of somebody
else's module on Python's path or in the current folder."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from typing import Any

from rcmae.errors import Refused


def is_plugin(name: str) -> bool:
    """Whether a name is MODULE:NAME, not the name of something that is shipped."""
    return ":" in name


def find(name: str, *, key: str) -> Any:
    """What MODULE:NAME names. The current folder is searched after Python's path.

    Args:
        name: such as `my_objectives:Absolute`.
        key: the recipe's key that has it, for the message.

    Raises:
        Refused: there is no such module, it does not import, or it has no such name.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise Refused(f"{key}={name}: write MODULE:NAME, such as my_objectives:Absolute")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # `rcmae train` starts without it, `python -m` with it
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise Refused(f"{key}={name}: {module_name} does not import: {error}") from error
        raise Refused(
            f"{key}={name}: no module {error.name!r} on Python's path or in {os.getcwd()}; "
            "install it, or set PYTHONPATH"
        ) from error
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        raise Refused(f"{key}={name}: {module_name} does not import: {told}") from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise Refused(
            f"{key}={name}: {module_name} ({getattr(module, '__file__', 'built in')}) has no "
            f"{attribute!r}{hint}"
        ) from error
