"""Blocks compiled by torch.compile: a graph for each kind of block and shape, none of them again.

With a symbolic length torch would serve 50 and 197 tokens by one slower graph, and code that is
called with more shapes than `recompile_limit` goes eager in silence. So each shape has a copy of
the block's code of its own, compiled with static sizes. Student and teacher share the copies; what
has a backward pass and what has none are two graphs, since torch guards on it. Evaluations compute
eagerly (`eagerly`): their batches come in many sizes, few times each.

A compilation that fails is told once (`drain_news`), and all blocks go on eagerly.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rcmae.models.protocol import blocks_of

MOST = 64  # graphs of one kind of block: a training whose shapes never end goes eager beyond
CACHE = "TORCHINDUCTOR_CACHE_DIR"


class _Process:
    """What holds for all compiled blocks of this process."""

    eager = 0  # contexts that ask for it
    news: list[str] = []  # noqa: RUF012, one list, that of the process
    folder: str | None = None  # what CACHE was set to here


class _Shared:
    """What the blocks that were compiled together have in common."""

    is_off = False  # a compilation failed, or shapes did not end


class _Key(NamedTuple):
    """What a graph is for."""

    inputs: tuple[Any, ...]  # shape and type of each tensor, the others as they are
    has_backward: bool
    block: int | None  # of blocks that drop paths: rate and place are constants in a graph


class Compiled:
    """The forward of one kind of block: called as the function is, with the block first."""

    def __init__(self, forward: types.FunctionType, shared: _Shared) -> None:
        self._forward = forward
        self._shared = shared
        self._graphs: dict[_Key, Callable[..., Tensor]] = {}

    def __deepcopy__(self, memo: object) -> Compiled:
        return self  # as a function is: a copied block goes into the same graphs

    def __call__(self, block: nn.Module, *inputs: Any) -> Tensor:
        """What the block makes of its inputs."""
        if self._shared.is_off or _Process.eager:
            return self._forward(block, *inputs)
        key = _Key(
            tuple(map(_told, inputs)),
            torch.is_grad_enabled(),
            id(block) if _drops(block) else None,
        )
        graph = self._graphs.get(key)
        if graph is not None:
            return graph(block, *inputs)
        if len(self._graphs) >= MOST:
            text = f"{MOST} graphs of {self._forward.__qualname__} are compiled and shapes go on"
            return self._give_up(text, block, inputs)
        return self._first(key, block, inputs)

    def _first(self, key: _Key, block: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
        from torch._dynamo.exc import TorchDynamoException  # a second: only where it compiles
        from torch._functorch import config as lowering

        graph = torch.compile(_copied(self._forward, len(self._graphs)), dynamic=False)
        try:
            # else the backward pass compiles in the first `backward`, where nothing can go back
            with lowering.patch(force_non_lazy_backward_lowering=True):
                out: Tensor = graph(block, *inputs)
        except TorchDynamoException as error:
            return self._give_up(_in_short(error), block, inputs)
        self._graphs[key] = graph
        return out

    def _give_up(self, why: str, block: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
        self._shared.is_off = True
        _Process.news.append(
            f"torch.compile: {why}; blocks compute eagerly from here on: slower, the same results "
            "up to rounding. engine.compile=false leaves it out"
        )
        return self._forward(block, *inputs)


def compile_blocks(*models: nn.Module | None) -> None:
    """torch.compile the forward of each block of these models, in place.

    Blocks of one kind and shape share their graphs over all the models, and what an engine hooks to
    a block stays outside of them. Together with `kernels.checkpoint_blocks`, in either order, what
    is computed again is compiled too. A deep copy computes with its own weights.
    """
    shared = _Shared()
    kinds: dict[type[nn.Module], Compiled] = {}
    for block in [block for model in models if model is not None for block in blocks_of(model)]:
        kind = type(block)
        if kind not in kinds:
            assert isinstance(kind.forward, types.FunctionType)
            kinds[kind] = Compiled(kind.forward, shared)
        # checkpoint_blocks: a partial over (forward, block, ...)
        wrapped: Any = vars(block).get("forward")
        if wrapped is None:
            block.forward = functools.partial(kinds[kind], block)
        else:
            block.forward = functools.partial(
                wrapped.func, kinds[kind], *wrapped.args[1:], **wrapped.keywords
            )


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Blocks compute without their graphs inside."""
    _Process.eager += 1
    try:
        yield
    finally:
        _Process.eager -= 1


def drain_news() -> list[str]:
    """What failed on this rank since the last call, for the run's log."""
    news, _Process.news = _Process.news, []
    return news


def keep_in(folder: Path) -> None:
    """Keep what is compiled in this folder, where the next start finds it, unless the environment
    names another that is one. Triton's kernels go there, too.
    """
    named = os.environ.get(CACHE)
    if named not in (None, _Process.folder):
        try:
            os.makedirs(named, exist_ok=True)  # torch does, while it is imported
            return
        except OSError as error:
            _Process.news.append(
                f"{CACHE}={named} cannot be used ({error.strerror}): what is compiled is kept in "
                f"{folder}; unset it, or name a folder"
            )
    os.environ[CACHE] = _Process.folder = str(folder.absolute())


def folder() -> Path:
    """Where what is compiled and measured is kept."""
    return Path(os.environ.get(CACHE) or tempfile.gettempdir())


def _told(value: Any) -> Any:
    return (value.shape, value.dtype) if isinstance(value, Tensor) else value


def _drops(block: nn.Module) -> bool:
    return any(getattr(module, "drops", False) for module in block.children())


def _copied(function: types.FunctionType, number: int) -> types.FunctionType:
    """The function with code of its own: torch counts and keeps graphs by the code."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{number}")
    copy = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__qualname__ = function.__qualname__
    return copy


def _in_short(error: Exception) -> str:
    """What broke, without torch's advice: the first line names the step, the second the reason."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = " ".join([line for line in lines if line][:2])
    return f"{type(error).__name__}: {told[:300]}"
