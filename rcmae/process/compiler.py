"""torch.compile's machinery stays unimported where nothing is compiled: it costs each process of a
training more than a second before its first step.

torch imports it in places that have nothing to compile: methods mark themselves at their first call
as not to be traced, an optimizer's step breaks a graph that it is not in. Here none of them is ever
called in a compiled region. Where the machinery is there already, nothing is touched. Not done for
FSDP2, whose every hook asks it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Iterator
from unittest.mock import patch

import torch


def spare_optimizers() -> None:
    """Let torch's optimizers be made and saved without it."""
    if _is_imported():
        return
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        method = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if method is not None and not hasattr(method, "__dynamo_disable"):
            setattr(method, "__dynamo_disable", method)


def spare_step(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer of torch's step without it. Hooks of the step are not called."""
    if _is_imported() or not type(optimizer).__module__.startswith("torch.optim."):
        return
    step = torch.no_grad()(inspect.unwrap(type(optimizer).step))
    setattr(optimizer, "step", functools.partial(step, optimizer))  # noqa: B010, for mypy


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """What is decorated with torch.compile inside is left as it is: for imports of modules that
    compile functions which are not used here.
    """
    with patch.object(torch, "compile", _as_it_is):
        yield


def _is_imported() -> bool:
    return "torch._dynamo" in sys.modules


def _as_it_is(function: object = None, **_: object) -> object:
    return _as_it_is if function is None else function
