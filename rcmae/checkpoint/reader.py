"""A checkpoint's tensors, read by runs: each reader takes the bytes of its own slices alone.

`Reader` and `tensor_of` are local. What training's own restore calls is collective, and says so in
its name: ranks share out the checksums and agree on one checkpoint, or all raise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import safe_open
from torch import Tensor

from rcmae import dist
from rcmae.checkpoint.lease import fence
from rcmae.checkpoint.manifest import (
    DTYPES,
    CheckpointError,
    Manifest,
    NewerFormat,
    fenced_off,
    file_problem,
    read_manifest,
    step_folders,
)
from rcmae.engines.protocol import Engine
from rcmae.errors import Refused

_T = TypeVar("_T")

# ----------------------------------------------------------------------------------------- together


def open_verified_together(path: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all as written.

    Collective: every rank calls, and checks a share of the files.

    Raises:
        CheckpointError: on every rank, with what is wrong; NewerFormat: it is of a newer rcmae.
    """
    manifest = None
    problem = None
    is_newer = False
    try:
        manifest = read_manifest(path)
        mine = sorted(manifest.files)[dist.rank() :: dist.world()]
        found = (file_problem(manifest, name) for name in mine)
        problem = next((text for text in found if text), None)
    except CheckpointError as error:
        problem = str(error)
        is_newer = isinstance(error, NewerFormat)
    told = dist.gather((problem, is_newer))
    problems = sorted({text for text, _ in told if text})
    if problems or manifest is None:
        kind = NewerFormat if any(newer for _, newer in told) else CheckpointError
        raise kind("; ".join(problems))
    return manifest


def newest_together(root: Path) -> tuple[Manifest | None, list[str]]:
    """The newest valid checkpoint of a run, and what was wrong with newer ones.

    Collective: every rank calls. Rank 0 says which there are: another node may see a new one a
    moment later.

    Raises:
        Refused, CheckpointError: on every rank; rank 0 cannot read the folder or the leases, or one
            that is newer is of a newer rcmae.
    """
    passed_over: list[str] = []
    for name in seen_by_first(lambda: [path.name for path in reversed(step_folders(root))]):
        try:
            manifest = open_verified_together(root / name)
        except NewerFormat:
            raise
        except CheckpointError as error:
            passed_over.append(str(error))
            continue
        held = seen_by_first(lambda: fence(root.parent))
        if held.allows(manifest.generation, manifest.step):
            return manifest, passed_over
        passed_over.append(fenced_off(manifest))
    return None, passed_over


def seen_by_first(look: Callable[[], _T]) -> _T:
    """What rank 0 sees on a disk, on every rank; it alone looks. Collective: every rank calls.

    Raises:
        Refused, CheckpointError: on every rank; it cannot be used, or not be read.
    """
    found: _T | None = None
    refused = None
    unreadable = None
    if dist.rank() == 0:
        try:
            found = look()
        except Refused as error:
            refused = str(error)
        except OSError as error:
            unreadable = str(error)
    found, refused, unreadable = dist.from_first((found, refused, unreadable))
    if refused:
        raise Refused(refused)
    if unreadable:
        raise CheckpointError(unreadable)
    return cast(_T, found)


@torch.no_grad()
def load(manifest: Manifest, engine: Engine) -> None:
    """Bring a checkpoint's state into an engine of any kind.

    Collective: every rank calls, and reads only its slices.

    Raises:
        CheckpointError: the checkpoint lacks a tensor or has another shape for it.
    """
    state = engine.state()
    problems = []
    for name, shape in state.shapes.items():
        row = manifest.tensors.get(f"weight/{name}")
        if row is None:
            problems.append(f"weight/{name} is not in the checkpoint")
        elif tuple(row.shape) != shape:
            saved = tuple(row.shape)
            problems.append(f"weight/{name} is {saved} in the checkpoint, {shape} in the model")
    if problems:
        raise CheckpointError(f"{manifest.path} does not fit the model: " + "; ".join(problems[:5]))
    with Reader(manifest) as reader:
        for piece in state.pieces:
            for kind, tensor in piece.tensors.items():
                reader.read(f"{kind}/{piece.name}", piece.start, tensor)
        for name, table in state.buffers.items():
            # position tables are as they were; running statistics are not
            row = manifest.tensors.get(f"buffer/{name}")
            if row is not None and row.shape == list(table.shape):
                reader.read(f"buffer/{name}", 0, table.view(-1))
    engine.restored(
        optimizer_step=manifest.optimizer_step, teacher_updates=manifest.teacher_updates
    )


# -------------------------------------------------------------------------------------- one process


def tensor_of(manifest: Manifest, key: str) -> Tensor:
    """One whole logical tensor, such as "teacher/blocks.0.norm1.weight", in its shape.

    Raises:
        CheckpointError: there is no such tensor.
    """
    row = manifest.tensors.get(key)
    if row is None:
        raise CheckpointError(f"{manifest.path} has no {key}")
    dtype = next(dtype for dtype, name in DTYPES.items() if name == row.dtype)
    out = torch.empty(row.elements, dtype=dtype)
    with Reader(manifest) as reader:
        reader.read(key, 0, out)
    return out.view(row.shape)


def whole_tensors(manifest: Manifest, keys: Iterable[str], dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensors of these keys, such as "teacher/norm.bias", flattened.

    Each is good until the next is asked for. Opens each file once, unlike `tensor_of`.
    """
    counts = [(key, manifest.tensors[key].elements) for key in keys]
    # of all of them in turn
    memory = torch.empty(max((count for _, count in counts), default=0), dtype=dtype)
    with Reader(manifest) as reader:
        for key, count in counts:
            reader.read(key, 0, memory[:count])
            yield memory[:count]


class Reader:
    """The files of a checkpoint, each opened once, for reading any slice of any tensor."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._open: dict[str, Any] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.__exit__(None, None, None)

    def read(self, key: str, start: int, out: Tensor) -> None:
        """Elements [start, start + len(out)) of a flattened tensor into `out`, cast to its type.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if key not in self._manifest.tensors:
            raise CheckpointError(f"{self._manifest.path} has no {key}")
        stop = start + out.numel()
        filled = 0
        for number, first, end in self._manifest.tensors[key].layout.within(start, stop):
            low = max(start, first)
            high = min(stop, end)
            if low < high:
                file = self._file(self._manifest.names[number])
                run = file.get_slice(f"{key}@{first}")[low - first : high - first]
                out[low - start : high - start].copy_(run)
                filled += high - low
        assert filled == out.numel(), f"{key}: {filled} of {out.numel()} elements found"

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self._manifest.path / name, framework="pt").__enter__()
        return self._open[name]
