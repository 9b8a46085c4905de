"""Checkpoints that are committed or never were, and that open under any engine and number of ranks.

`checkpoints/step-00001000/` holds one safetensors file a rank and `manifest.json`. The manifest names every logical
tensor (weight, moments, teacher of each parameter), and in which file each run of its flattened elements lies, so a
reader of any other cut takes just the bytes it needs. Files are written into a fresh temporary folder and flushed;
every rank reports size and checksum; only then does rank 0 write the manifest and rename the folder. A folder without a
manifest, or whose files differ from it, is not a checkpoint.

Not used: `torch.distributed.checkpoint`, whose metadata is a pickle. safetensors files and a JSON manifest can be read
by anyone and can run nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rcmae import dist
from rcmae.engine import Engine, EngineState

FORMAT = 1
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; says which file, why, and the way out."""


@dataclass(frozen=True)
class Manifest:
    """What a committed checkpoint says of itself."""

    path: Path
    step: int
    images: int  # samples consumed over all epochs: the whole state of the data
    optimizer_step: int
    teacher_updates: int
    meta: dict[str, Any]  # recipe, data fingerprint, versions, world, engine, ...
    files: dict[str, dict[str, Any]]  # name -> bytes, sha256
    tensors: dict[str, dict[str, Any]]  # "kind/parameter" -> shape, dtype, runs of (file, start, length)


# ---------------------------------------------------------------------------------------------------------------- save


def save(
    root: Path, engine: Engine, *, step: int, images: int, meta: Mapping[str, Any], keep: int
) -> tuple[Path, int]:
    """Commit the run's state. Collective: every rank calls.

    Args:
        root: the run's `checkpoints` folder.
        engine: whose `state()` is saved.
        step: optimizer steps done.
        images: samples consumed.
        meta: plain values for the manifest.
        keep: how many of the newest checkpoints stay.

    Returns:
        the committed folder, and its bytes.

    Raises:
        CheckpointError: on every rank, if any could not write. What was committed before is untouched.
    """
    final = root / f"step-{step:08d}"
    aside = root / f".writing-{final.name}-{dist.from_first(secrets.token_hex(4))}"
    mine = f"rank-{dist.rank():05d}.safetensors"
    problem, written, state = None, {}, engine.state()
    if dist.rank() == 0:
        problem = _attempt(lambda: _fresh(root, aside))
    _all_well(problem, aside, step)
    entries = list(_entries(state))
    try:
        written = _write_safetensors(aside / mine, [(f"{key}@{start}", tensor) for key, start, tensor in entries])
    except OSError as error:
        problem = f"{mine}: {error.strerror or error}"
    _all_well(problem, aside, step)
    runs = [(key, start, tensor.numel(), _DTYPES[tensor.dtype]) for key, start, tensor in entries]
    reports = dist.gather((mine, written, runs))
    if dist.rank() == 0:
        document = {
            "format": FORMAT,
            "step": step,
            "images": images,
            "optimizer_step": state.optimizer_step,
            "teacher_updates": state.teacher_updates,
            "meta": dict(meta),
            "files": {name: about for name, about, _ in reports},
            "tensors": _table(state, reports),
        }
        problem = _attempt(lambda: _commit(root, aside, final, document, keep))
    _all_well(problem, aside, step)
    return final, dist.from_first(sum(about["bytes"] for _, about, _ in reports))


def _attempt(action: Any) -> str | None:
    try:
        action()
    except OSError as error:
        return f"{error.filename or ''}: {error.strerror or error}"
    return None


def _all_well(problem: str | None, aside: Path, step: int) -> None:
    problems = [f"rank {rank}: {text}" for rank, text in enumerate(dist.gather(problem)) if text]
    if problems:
        if dist.rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {step} was not written ({'; '.join(problems)}); earlier ones are untouched. "
            "Free space or mend the folder, and start the same command again"
        )


def _fresh(root: Path, aside: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for left in (*root.glob(".writing-*"), *root.glob(".replaced-*")):  # of jobs that were killed while they wrote
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir()


def _entries(state: EngineState) -> Iterator[tuple[str, int, Tensor]]:
    """(kind/parameter, start, 1-D tensor) that this rank writes; of what every rank holds, each writes a share."""
    for piece in state.pieces:
        for kind, tensor in piece.tensors.items():
            low, high = 0, tensor.numel()
            if state.replicated:
                low, high = (tensor.numel() * (dist.rank() + i) // dist.world() for i in (0, 1))
            if high > low:
                yield f"{kind}/{piece.name}", piece.start + low, tensor[low:high]
    if dist.rank() == 0:
        for name, table in state.buffers.items():
            yield f"buffer/{name}", 0, table.flatten()


def _table(state: EngineState, reports: Sequence[tuple[str, dict[str, Any], list[Any]]]) -> dict[str, dict[str, Any]]:
    shapes = {**state.shapes, **{name: tuple(table.shape) for name, table in state.buffers.items()}}
    table: dict[str, dict[str, Any]] = {}
    for file, _, runs in reports:
        for key, start, length, dtype in runs:
            row = table.setdefault(key, {"shape": list(shapes[key.partition("/")[2]]), "dtype": dtype, "runs": []})
            row["runs"].append([file, start, length])
    for key, row in table.items():
        row["runs"].sort(key=lambda run: run[1])
        covered = 0
        for _, start, length in row["runs"]:
            assert start == covered, f"{key}: a run starts at {start}, the ones before end at {covered}"
            covered += length
        assert covered == math.prod(row["shape"]), f"{key}: {covered} elements of {row['shape']}"
    return table


def _write_safetensors(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
    """Stream 1-D tensors into a safetensors file, flushed to disk; its bytes and sha256.

    Written here because the library's writer first copies every tensor into one Python object; the checksum is taken
    of what goes by.
    """
    header: dict[str, Any] = {}
    offset = 0
    for key, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        where = [offset, offset + size]
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": where}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for block in (struct.pack("<Q", len(text)), text):
            file.write(block)
            digest.update(block)
        for _, tensor in tensors:
            raw = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
            file.write(raw)
            digest.update(raw)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": 8 + len(text) + offset, "sha256": digest.hexdigest()}


def _commit(root: Path, aside: Path, final: Path, document: Mapping[str, Any], keep: int) -> None:
    _write_text(aside / "manifest.json", json.dumps(document, indent=1))
    _flush_folder(aside)
    replaced = aside.with_name(aside.name.replace(".writing-", ".replaced-"))
    if final.exists():  # a damaged one, or one of a run that went back and came here again
        os.rename(final, replaced)
    os.rename(aside, final)
    shutil.rmtree(replaced, ignore_errors=True)
    _flush_folder(root)
    _write_text(root / "LATEST.new", final.name + "\n")
    os.replace(root / "LATEST.new", root / "LATEST")
    _flush_folder(root)
    older = sorted(path for path in root.glob("step-*") if path != final)
    for path in older[: max(0, len(older) - (keep - 1))]:
        shutil.rmtree(path)


def _write_text(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------------------------- read


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint's folder.

    Raises:
        CheckpointError: there is none, or it cannot be understood.
    """
    file = path / "manifest.json"
    try:
        document = json.loads(file.read_text())
        if document["format"] > FORMAT:
            found = document["format"]
            raise CheckpointError(f"{file} is of format {found}, this rcmae reads up to {FORMAT}: update rcmae")
        keys = ("step", "images", "optimizer_step", "teacher_updates", "meta", "files", "tensors")
        return Manifest(path=path, **{key: document[key] for key in keys})
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} has no manifest.json: it was never committed") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error!r}") from error


def file_problem(manifest: Manifest, name: str) -> str | None:
    """What is wrong with one file of a checkpoint, by size and checksum; None if nothing."""
    path, about = manifest.path / name, manifest.files[name]
    try:
        size = path.stat().st_size
        if size != about["bytes"]:
            return f"{path} has {size} bytes, the manifest says {about['bytes']}"
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None if digest.hexdigest() == about["sha256"] else f"{path} differs from its checksum in the manifest"


def open_verified(path: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all as written. Collective: every rank checks a share of them.

    Raises:
        CheckpointError: on every rank, with what is wrong.
    """
    manifest, problem = None, None
    try:
        manifest = read_manifest(path)
        names = sorted(manifest.files)[dist.rank() :: dist.world()]
        problem = next((text for text in (file_problem(manifest, name) for name in names) if text), None)
    except CheckpointError as error:
        problem = str(error)
    problems = sorted({text for text in dist.gather(problem) if text})
    if problems or manifest is None:
        raise CheckpointError("; ".join(problems))
    return manifest


def newest(root: Path) -> tuple[Manifest | None, list[str]]:
    """The newest valid checkpoint of a run, and what was wrong with newer ones. Collective: every rank calls."""
    passed_over: list[str] = []
    for name in dist.from_first(sorted((path.name for path in root.glob("step-*")), reverse=True)):
        try:
            return open_verified(root / name), passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    return None, passed_over


@torch.no_grad()
def load(manifest: Manifest, engine: Engine) -> None:
    """Bring a checkpoint's state into an engine of any kind. Collective: every rank calls, and reads only its slices.

    Raises:
        CheckpointError: the checkpoint lacks a tensor or has another shape for it.
    """
    state = engine.state()
    problems = [
        f"{key} is {tuple(manifest.tensors[key]['shape'])} in the checkpoint, {shape} in the model"
        if key in manifest.tensors
        else f"{key} is not in the checkpoint"
        for key, shape in ((f"weight/{name}", shape) for name, shape in state.shapes.items())
        if key not in manifest.tensors or tuple(manifest.tensors[key]["shape"]) != shape
    ]
    if problems:
        raise CheckpointError(f"{manifest.path} does not fit the model: " + "; ".join(problems[:5]))
    with _Reader(manifest) as reader:
        for piece in state.pieces:
            for kind, tensor in piece.tensors.items():
                reader.read(f"{kind}/{piece.name}", piece.start, tensor)
    engine.restored(optimizer_step=manifest.optimizer_step, teacher_updates=manifest.teacher_updates)


def tensor_of(manifest: Manifest, key: str) -> Tensor:
    """One whole logical tensor, such as "teacher/blocks.0.norm1.weight", in its shape. One process."""
    row = manifest.tensors[key]
    out = torch.empty(math.prod(row["shape"]), dtype=next(t for t, name in _DTYPES.items() if name == row["dtype"]))
    with _Reader(manifest) as reader:
        reader.read(key, 0, out)
    return out.view(row["shape"])


class _Reader:
    """Open files of a checkpoint, read by runs."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._open: dict[str, Any] = {}

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.__exit__(None, None, None)

    def read(self, key: str, start: int, out: Tensor) -> None:
        """Elements [start, start + len(out)) of a flattened tensor into `out`, cast to its type."""
        if key not in self._manifest.tensors:
            raise CheckpointError(f"{self._manifest.path} has no {key}")
        stop, filled = start + out.numel(), 0
        for file, first, length in self._manifest.tensors[key]["runs"]:
            low, high = max(start, first), min(stop, first + length)
            if low < high:
                if file not in self._open:
                    self._open[file] = safe_open(self._manifest.path / file, framework="pt").__enter__()
                run = self._open[file].get_slice(f"{key}@{first}")[low - first : high - first]
                out[low - start : high - start].copy_(run)
                filled += high - low
        assert filled == out.numel(), f"{key}: {filled} of {out.numel()} elements found"
