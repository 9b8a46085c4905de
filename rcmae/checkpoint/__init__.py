"""Checkpoints that are committed or never were, and that open under any engine and number of ranks.

`checkpoints/step-00001000/` holds one safetensors file a rank and `manifest.json`. The manifest
names every logical tensor (weight, moments, teacher of each parameter), and in which file each run
of its flattened elements lies, so a reader of any other cut takes just the bytes it needs. Files
are written into a fresh temporary folder and flushed; every rank reports size and checksum; only
then does rank 0 write the manifest and rename the folder. A folder without a manifest, or whose
files or manifest differ from their checksums, is not a checkpoint.

Not used: `torch.distributed.checkpoint`, whose metadata is a pickle. safetensors files and a JSON
manifest can be read by anyone and can run nothing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from rcmae import dist
from rcmae.checkpoint.lease import LeaseLost, fence
from rcmae.engines.engine import Engine, EngineState

FORMAT = 1
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; says which file, why, and the way out."""


@dataclass(frozen=True)
class Manifest:
    """What a committed checkpoint says of itself."""

    path: Path
    generation: int  # of its writer's lease
    step: int
    images: int  # samples consumed over all epochs: the whole state of the data
    optimizer_step: int
    teacher_updates: int
    meta: dict[str, Any]  # recipe, data fingerprint, versions, world, engine, ...
    files: dict[str, dict[str, Any]]  # name -> bytes, sha256
    # "kind/parameter" -> shape, dtype, runs of (file, start, length)
    tensors: dict[str, dict[str, Any]]


# --------------------------------------------------------------------------------------------- save


class Saved(NamedTuple):
    """A committed checkpoint."""

    step: int
    path: Path
    bytes: int
    # how long the training waited: for a save that was still under way, and for the copy
    stall_s: float
    # of that, for the save before: above 0 saves take longer than the steps between them
    waited_s: float
    seconds: float  # from the copy's begin to the commit


@dataclass(frozen=True)
class _Snapshot:
    """Everything a save needs, out of reach of the training."""

    step: int
    document: dict[str, Any]  # the manifest without files and tensors
    entries: list[tuple[str, int, Tensor]]  # kind/parameter, start, 1-D in host memory
    shapes: dict[str, tuple[int, ...]]


class Saver:
    """Commits checkpoints of a run, in a thread: the training waits for the copy to host memory
    alone.

    Collective in its making and in every method but `is_done`: every rank calls, in the same order.

    Args:
        root: the run's `checkpoints` folder.
        keep: how many of the newest valid checkpoints stay; two at least, so that a writer which
            lost the run and does not know it yet never deletes the one from which the next holder
            goes on.
        keep_every: a checkpoint of every so many steps stays for good.
        generation: of the lease, for the manifests.
        check_lease: raises LeaseLost when the run is another job's; called just before a commit, on
            rank 0.
        background: False waits for each commit.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        keep_every: int | None = None,
        generation: int = 1,
        check_lease: Callable[[], None] = lambda: None,
        background: bool = True,
    ) -> None:
        self._root, self._keep, self._keep_every = root, max(keep, 2), keep_every
        self._generation, self._check_lease, self._background = generation, check_lease, background
        self._group = dist.own_group()
        self._thread: threading.Thread | None = None
        self._outcome: Saved | Exception | None = None
        # host memory of the last snapshot, used again on a GPU
        self._pinned: dict[str, Tensor] = {}

    def save(
        self, engine: Engine, *, step: int, images: int, meta: Mapping[str, Any]
    ) -> Saved | None:
        """Start to commit the run's state; the save before it, if one was under way.

        Args:
            engine: whose `state()` is saved.
            step: optimizer steps done.
            images: samples consumed.
            meta: plain values for the manifest.

        Raises:
            CheckpointError: on every rank; a save could not be written. What was committed before
                is untouched.
            LeaseLost: on every rank; the run is another job's.
        """
        begin = time.monotonic()
        before = self.wait()
        waited = time.monotonic() - begin
        snapshot = self._snapshot(engine.state(), step, images, meta)
        stall = time.monotonic() - begin

        def work() -> None:
            try:
                path, size = self._write(snapshot)
                self._outcome = Saved(
                    step, path, size, stall, waited, time.monotonic() - begin - waited
                )
            except Exception as error:  # handed over in wait()
                self._outcome = error

        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()
        return before if self._background else self.wait()

    def is_done(self) -> bool:
        """Whether a save was under way on this rank and has ended. Not collective; cheap."""
        return self._thread is not None and not self._thread.is_alive()

    def wait(self) -> Saved | None:
        """Wait for the save under way, if any, and give what it committed.

        Raises:
            CheckpointError, LeaseLost: on every rank; it was not written.
        """
        if self._thread is None:
            return None
        self._thread.join()
        outcome, self._thread, self._outcome = self._outcome, None, None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _snapshot(
        self, state: EngineState, step: int, images: int, meta: Mapping[str, Any]
    ) -> _Snapshot:
        entries = []
        for key, start, tensor in _entries(state):
            if tensor.is_cuda:
                name = f"{key}@{start}"
                if name not in self._pinned or self._pinned[name].shape != tensor.shape:
                    self._pinned[name] = torch.empty_like(tensor, device="cpu", pin_memory=True)
                entries.append((key, start, self._pinned[name].copy_(tensor, non_blocking=True)))
            else:
                entries.append((key, start, tensor.detach().clone()))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        document = {
            "format": FORMAT,
            "generation": self._generation,
            "step": step,
            "images": images,
            "optimizer_step": state.optimizer_step,
            "teacher_updates": state.teacher_updates,
            "meta": dict(meta),
        }
        shapes = {
            **state.shapes,
            **{name: tuple(table.shape) for name, table in state.buffers.items()},
        }
        return _Snapshot(step, document, entries, shapes)

    def _write(self, snapshot: _Snapshot) -> tuple[Path, int]:
        final = self._root / f"step-{snapshot.step:08d}"
        token = dist.from_first(secrets.token_hex(4), self._group)
        aside = self._root / f".writing-{final.name}-{self._generation:08d}-{token}"
        mine, problem, written = f"rank-{dist.rank():05d}.safetensors", None, {}
        if dist.rank() == 0:
            problem = _attempt(lambda: self._fresh(aside))
        self._all_well(problem, aside)
        named = [(f"{key}@{start}", tensor) for key, start, tensor in snapshot.entries]
        try:
            written = _write_safetensors(aside / mine, named)
        except OSError as error:
            problem = f"{aside / mine}: {error.strerror or error}"
        self._all_well(problem, aside)
        runs = [
            (key, start, tensor.numel(), _DTYPES[tensor.dtype])
            for key, start, tensor in snapshot.entries
        ]
        reports = dist.gather((mine, written, runs), self._group)
        lost = None
        if dist.rank() == 0:
            files = {name: about for name, about, _ in reports}
            document = {
                **snapshot.document,
                "files": files,
                "tensors": _table(snapshot.shapes, reports),
            }
            try:
                problem = _attempt(lambda: self._commit(aside, final, document))
            except LeaseLost as error:
                lost = str(error)
                shutil.rmtree(aside, ignore_errors=True)
        lost = dist.from_first(lost, self._group)
        if lost:
            raise LeaseLost(lost)
        self._all_well(problem, aside)
        return final, sum(about["bytes"] for _, about, _ in reports)

    def _fresh(self, aside: Path) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        for left in self._root.glob(".dropped-*"):  # of jobs that were killed meanwhile
            shutil.rmtree(left, ignore_errors=True)
        for left in self._root.glob(".writing-*"):
            *_, generation, _ = left.name.split("-")
            if int(generation) <= self._generation:
                # a later one's is being written: this job has lost the run
                shutil.rmtree(left, ignore_errors=True)
        aside.mkdir()

    def _all_well(self, problem: str | None, aside: Path) -> None:
        problems = [
            f"rank {rank}: {text}"
            for rank, text in enumerate(dist.gather(problem, self._group))
            if text
        ]
        if problems:
            if dist.rank() == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise CheckpointError(
                f"{aside.name.removeprefix('.writing-')[:13]} was not written "
                f"({'; '.join(problems)}); earlier "
                "checkpoints are untouched. Free space or mend the folder, and start the "
                "same command again"
            )

    def _commit(self, aside: Path, final: Path, document: Mapping[str, Any]) -> None:
        """Make the folder a checkpoint. A writer that was passed over may wake up between any two
        of these calls: what it renames readers ignore by its generation, and it deletes nothing
        that they use."""
        if _counts(final) and read_manifest(final).files == document["files"]:
            shutil.rmtree(aside)  # committed by the try before this one, which failed after that
        else:
            _write_text(aside / "manifest.json", sealed(document))
            _flush_folder(aside)
            self._check_lease()
            if final.exists():
                # damaged, or of a writer that had lost the run; a rename replaces no folder with
                # files
                self._set_aside(final)
            os.rename(aside, final)
        _flush_folder(self._root)
        self._check_lease()
        _point_at(final)
        prune(self._root, keep=self._keep, keep_every=self._keep_every)

    def _set_aside(self, path: Path) -> None:
        """Take a folder of the same name away, unless readers use it: then another job has
        committed this step.
        """
        doomed = path.with_name(f".dropped-{path.name}-{secrets.token_hex(4)}")
        valid = _counts(path)
        if not valid:
            os.rename(path, doomed)
            if valid := _counts(doomed):  # it was exchanged for another after the look
                os.rename(doomed, path)
        if valid:
            self._check_lease()
            raise FileExistsError(
                errno.EEXIST, "there is another valid checkpoint of this step", str(path)
            )
        shutil.rmtree(doomed, ignore_errors=True)


def prune(root: Path, *, keep: int, keep_every: int | None = None) -> list[Path]:
    """Delete old checkpoints, never one of the `keep` newest that are valid by manifest and sizes.
    One process calls.

    Returns:
        what was deleted.
    """
    newest_first = sorted(root.glob("step-*"), reverse=True)
    valid = [path for path in newest_first if _counts(path)]
    stay = set(valid[: max(keep, 1)])
    stay |= {
        path
        for path in valid
        if keep_every and int(path.name.removeprefix("step-")) % keep_every == 0
    }
    oldest = min(stay, default=None)
    old = [path for path in newest_first if oldest is not None and path < oldest]
    gone = [path for path in newest_first if path not in stay and (path in valid or path in old)]
    for path in gone:
        _drop(path)
    return gone


def _counts(path: Path) -> bool:
    """Whether readers would use this checkpoint, by its manifest, its writer's lease and its
    files' sizes.
    """
    try:
        manifest = read_manifest(path)
        sizes = all(
            (path / name).stat().st_size == about["bytes"] for name, about in manifest.files.items()
        )
        return sizes and fence(path.parent.parent).allows(manifest.generation, manifest.step)
    except (CheckpointError, OSError):
        return False


def _drop(path: Path) -> None:
    """Take a checkpoint's folder away: first its name, so that a kill leaves no half of it."""
    doomed = path.with_name(f".dropped-{path.name}-{secrets.token_hex(4)}")
    with contextlib.suppress(FileNotFoundError):  # someone prunes by hand meanwhile
        os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _attempt(action: Callable[[], object]) -> str | None:
    try:
        action()
    except OSError as error:
        return f"{error.filename or ''}: {error.strerror or error}"
    return None


def _entries(state: EngineState) -> Iterator[tuple[str, int, Tensor]]:
    """(kind/parameter, start, 1-D tensor) that this rank writes.

    Of what every rank holds, each writes a share.
    """
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


def _table(
    shapes: Mapping[str, tuple[int, ...]], reports: Sequence[tuple[str, dict[str, Any], list[Any]]]
) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for file, _, runs in reports:
        for key, start, length, dtype in runs:
            row = table.setdefault(
                key, {"shape": list(shapes[key.partition("/")[2]]), "dtype": dtype, "runs": []}
            )
            row["runs"].append([file, start, length])
    for key, row in table.items():
        row["runs"].sort(key=lambda run: run[1])
        covered = 0
        for _, start, length in row["runs"]:
            assert start == covered, (
                f"{key}: a run starts at {start}, the ones before end at {covered}"
            )
            covered += length
        assert covered == math.prod(row["shape"]), f"{key}: {covered} elements of {row['shape']}"
    return table


def _write_safetensors(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
    """Stream 1-D tensors into a safetensors file, flushed to disk; its bytes and sha256.

    Written here because the library's writer first copies every tensor into one Python object; the
    checksum is taken of what goes by.
    """
    header: dict[str, Any] = {}
    offset = 0
    for key, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        where = [offset, offset + size]
        header[key] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": [tensor.numel()],
            "data_offsets": where,
        }
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


def sealed(document: Mapping[str, Any]) -> str:
    """A manifest's text, closed by a checksum of all the rest: a flipped digit in a run would
    load other weights.
    """
    plain = json.loads(json.dumps(document))
    return json.dumps({**plain, "sha256": _seal(plain)}, indent=1)


def _seal(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _point_at(final: Path) -> None:
    """Have LATEST name a checkpoint."""
    aside = final.with_name("LATEST.new")
    _write_text(aside, final.name + "\n")
    os.replace(aside, final.with_name("LATEST"))
    _flush_folder(final.parent)


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


# --------------------------------------------------------------------------------------------- read


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
            raise CheckpointError(
                f"{file} is of format {found}, this rcmae reads up to {FORMAT}: update rcmae"
            )
        if document.pop("sha256") != _seal(document):
            raise CheckpointError(f"{file} differs from its own checksum")
        keys = (
            "generation",
            "step",
            "images",
            "optimizer_step",
            "teacher_updates",
            "meta",
            "files",
            "tensors",
        )
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
    return (
        None
        if digest.hexdigest() == about["sha256"]
        else f"{path} differs from its checksum in the manifest"
    )


def open_verified(path: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all as written. Collective: every rank checks a
    share of them.

    Raises:
        CheckpointError: on every rank, with what is wrong.
    """
    manifest, problem = None, None
    try:
        manifest = read_manifest(path)
        names = sorted(manifest.files)[dist.rank() :: dist.world()]
        problem = next(
            (text for text in (file_problem(manifest, name) for name in names) if text), None
        )
    except CheckpointError as error:
        problem = str(error)
    problems = sorted({text for text in dist.gather(problem) if text})
    if problems or manifest is None:
        raise CheckpointError("; ".join(problems))
    return manifest


def newest_unverified(root: Path) -> Manifest | None:
    """The newest checkpoint that counts by manifest and sizes; its bytes are not looked at.

    Any process may call.
    """
    path = next((path for path in sorted(root.glob("step-*"), reverse=True) if _counts(path)), None)
    return read_manifest(path) if path else None


def newest(root: Path) -> tuple[Manifest | None, list[str]]:
    """The newest valid checkpoint of a run, and what was wrong with newer ones.

    Collective: every rank calls.
    """
    passed_over: list[str] = []
    for name in dist.from_first(sorted((path.name for path in root.glob("step-*")), reverse=True)):
        try:
            manifest = open_verified(root / name)
        except CheckpointError as error:
            passed_over.append(str(error))
            continue
        if dist.from_first(fence(root.parent).allows(manifest.generation, manifest.step)):
            return manifest, passed_over
        passed_over.append(
            f"{manifest.path}: its writer, generation {manifest.generation}, had lost the run"
        )
    return None, passed_over


def start_from(root: Path, step: int) -> list[Path]:
    """Make a step's checkpoint the newest, as if just saved; -1: none is. One process calls, under
    the lease.

    Those beyond it were passed over: they are kept as `passed-over-step-...`, for whoever wants to
    know, so that the run can commit those steps anew.

    Returns:
        what was renamed.
    """
    moved = []
    for path in sorted(root.glob("step-*")):
        if int(path.name.removeprefix("step-")) > step:
            moved.append(
                path.rename(path.with_name(f"passed-over-{path.name}-{secrets.token_hex(4)}"))
            )
    final = root / f"step-{step:08d}"
    if final.exists():
        _point_at(final)  # a kill may have come between the commit and this
    else:
        (root / "LATEST").unlink(missing_ok=True)
    return moved


@torch.no_grad()
def load(manifest: Manifest, engine: Engine) -> None:
    """Bring a checkpoint's state into an engine of any kind. Collective: every rank calls, and
    reads only its slices.

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
    with Reader(manifest) as reader:
        for piece in state.pieces:
            for kind, tensor in piece.tensors.items():
                reader.read(f"{kind}/{piece.name}", piece.start, tensor)
        for name, table in state.buffers.items():
            # position tables are as they were; running statistics are not
            row = manifest.tensors.get(f"buffer/{name}")
            if row is not None and row["shape"] == list(table.shape):
                reader.read(f"buffer/{name}", 0, table.view(-1))
    engine.restored(
        optimizer_step=manifest.optimizer_step, teacher_updates=manifest.teacher_updates
    )


def tensor_of(manifest: Manifest, key: str) -> Tensor:
    """One whole logical tensor, such as "teacher/blocks.0.norm1.weight", in its shape.

    One process.
    """
    row = manifest.tensors[key]
    out = torch.empty(
        math.prod(row["shape"]),
        dtype=next(t for t, name in _DTYPES.items() if name == row["dtype"]),
    )
    with Reader(manifest) as reader:
        reader.read(key, 0, out)
    return out.view(row["shape"])


class Reader:
    """Open files of a checkpoint, read by runs."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._open: dict[str, Any] = {}

    def __enter__(self) -> Reader:
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
                    self._open[file] = safe_open(
                        self._manifest.path / file, framework="pt"
                    ).__enter__()
                run = self._open[file].get_slice(f"{key}@{first}")[low - first : high - first]
                out[low - start : high - start].copy_(run)
                filled += high - low
        assert filled == out.numel(), f"{key}: {filled} of {out.numel()} elements found"
