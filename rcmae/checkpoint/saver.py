"""Commits checkpoints while the training continues: a step waits only for the copy to host memory.

Each rank writes its slices into one safetensors file of a fresh temporary folder, flushed to disk,
and reports size and checksum. Only when all have does rank 0 write the manifest and rename the
folder to its name; then LATEST is moved and old checkpoints are deleted. A kill between any two
calls leaves the checkpoints before it as they were.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
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
from torch import Tensor

from rcmae import dist
from rcmae.checkpoint.layout import Written, assembled, described, written
from rcmae.checkpoint.lease import LeaseLost
from rcmae.checkpoint.manifest import (
    DTYPES,
    FORMAT,
    CheckpointError,
    counts,
    read_manifest,
    sealed,
    step_name,
)
from rcmae.checkpoint.retention import Retention, dropped_name, point_at, remove
from rcmae.data.sources import holds_secret
from rcmae.engines.protocol import Engine, EngineState
from rcmae.files import flush_folder, write_aside

# a save under way: the writer's generation is in the name
_WRITING = re.compile(r"\.writing-step-\d{8}-(\d{8})-[0-9a-f]{8}")
_DROPPED = re.compile(r"\.dropped-step-\d{8}-[0-9a-f]{8}")


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


class Entry(NamedTuple):
    """A run of a logical tensor that this rank writes."""

    key: str  # kind/parameter
    start: int  # offset into the flattened tensor
    values: Tensor  # 1-D


@dataclass(frozen=True)
class _Snapshot:
    """Everything a save needs, out of reach of the training."""

    step: int
    document: dict[str, Any]  # the manifest without files and tensors
    entries: list[Entry]  # in host memory
    shapes: dict[str, tuple[int, ...]]


class _Report(NamedTuple):
    """What a rank wrote."""

    file: str
    about: dict[str, Any]  # bytes, sha256
    runs: Written


class Saver:
    """Commits checkpoints of a run, in a thread: the training waits for the copy to host memory
    alone.

    Collective in its making and in `save` and `wait`: every rank calls, in the same order.

    Args:
        root: the run's `checkpoints` folder.
        keep: how many of the newest valid checkpoints stay; two at least, so that a writer which
            lost the run and does not know it yet never deletes the one from which the next holder
            resumes.
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
        self._root = root
        self._retention = Retention(root, keep=max(keep, 2), keep_every=keep_every)
        self._generation = generation
        self._check_lease = check_lease
        self._background = background
        self.own_s = 0.0  # that the training waited in the last `save` for this rank alone
        self._writing_s = 0.0  # of the last file: what this rank did for it
        self._group = dist.own_group()
        self._thread: threading.Thread | None = None
        self._outcome: Saved | Exception | None = None
        # host memory of the last snapshot, used again on a GPU
        self._pinned: dict[str, Tensor] = {}

    def save(
        self, engine: Engine, *, step: int, images: int, meta: Mapping[str, Any]
    ) -> Saved | None:
        """Start to commit the run's state.

        Args:
            engine: whose `state()` is saved.
            step: optimizer steps done.
            images: samples consumed.
            meta: plain values for the manifest.

        Returns:
            what the save before it committed, if one was under way; without `background`, this one.

        Raises:
            CheckpointError: on every rank; a save could not be written. What was committed before
                is untouched.
            LeaseLost: on every rank; the run is another job's.
        """
        self.own_s = 0.0
        begin = time.monotonic()
        before = self._wait_for_own()
        waited = time.monotonic() - begin
        snapshot = self._snapshot(engine.state(), step, images, meta)
        stall = time.monotonic() - begin
        self.own_s += stall - waited

        def work() -> None:
            try:
                path, size = self._write(snapshot)
                seconds = time.monotonic() - begin - waited
                self._outcome = Saved(step, path, size, stall, waited, seconds)
            except Exception as error:  # handed over in wait()
                self._outcome = error

        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()
        return before if self._background else self._wait_for_own()

    def is_done(self) -> bool:
        """Whether a save was under way on this rank and has ended. Not collective; cheap."""
        return self._thread is not None and not self._thread.is_alive()

    def is_under_way(self) -> bool:
        """Whether a save is being written on this rank. Not collective; cheap."""
        return self._thread is not None and self._thread.is_alive()

    def ends_within(self, seconds: float) -> bool:
        """Wait so long at most for the save under way, if any; whether none is any more. Not
        collective.
        """
        if self._thread is not None:
            self._thread.join(seconds)
        return not self.is_under_way()

    def wait(self) -> Saved | None:
        """Wait for the save under way, if any, and give what it committed.

        Raises:
            CheckpointError, LeaseLost: on every rank; it was not written.
        """
        if self._thread is None:
            return None
        self._thread.join()
        outcome = self._outcome
        self._thread = None
        self._outcome = None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _wait_for_own(self) -> Saved | None:
        """As `wait`; of the wait, what this rank's own writing took is noted."""
        begin = time.monotonic()
        try:
            return self.wait()
        finally:
            self.own_s += min(time.monotonic() - begin, self._writing_s)

    # the copy

    def _snapshot(
        self, state: EngineState, step: int, images: int, meta: Mapping[str, Any]
    ) -> _Snapshot:
        entries = [
            entry._replace(values=self._in_host_memory(entry)) for entry in _entries_of(state)
        ]
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
        shapes = dict(state.shapes)
        for name, table in state.buffers.items():
            shapes[name] = tuple(table.shape)
        return _Snapshot(step, document, entries, shapes)

    def _in_host_memory(self, entry: Entry) -> Tensor:
        values = entry.values
        if not values.is_cuda:
            return values.detach().clone()
        name = f"{entry.key}@{entry.start}"
        if name not in self._pinned or self._pinned[name].shape != values.shape:
            self._pinned[name] = torch.empty_like(values, device="cpu", pin_memory=True)
        return self._pinned[name].copy_(values, non_blocking=True)

    # the commit, in the thread

    def _write(self, snapshot: _Snapshot) -> tuple[Path, int]:
        """Write and commit; the folder and its bytes. Collective, in the saver's own group."""
        final = self._root / step_name(snapshot.step)
        token = dist.from_first(secrets.token_hex(4), self._group)
        aside = self._root / f".writing-{final.name}-{self._generation:08d}-{token}"
        problem = _attempt(lambda: self._fresh(aside)) if dist.rank() == 0 else None
        self._all_well(problem, aside)
        reports = self._write_files(snapshot, aside)
        problem = None
        lost = None
        if dist.rank() == 0:
            tensors = assembled(snapshot.shapes, [report.runs for report in reports])
            files = {report.file: report.about for report in reports}
            document = {**snapshot.document, "files": files, **described(tensors)}
            try:
                problem = _attempt(lambda: self._commit(aside, final, document))
            except LeaseLost as error:
                lost = str(error)
                shutil.rmtree(aside, ignore_errors=True)
        size = sum(report.about["bytes"] for report in reports)
        lost, size = dist.from_first((lost, size), self._group)
        if lost:
            raise LeaseLost(lost)
        self._all_well(problem, aside)
        return final, size

    def _fresh(self, aside: Path) -> None:
        """Make the temporary folder, and clear away what killed jobs left."""
        self._root.mkdir(parents=True, exist_ok=True)
        for left in self._root.iterdir():
            writing = _WRITING.fullmatch(left.name)
            # a later generation's is being written: this job has lost the run
            is_old = writing is not None and int(writing[1]) <= self._generation
            if is_old or _DROPPED.fullmatch(left.name):
                remove(left)
        aside.mkdir()

    def _write_files(self, snapshot: _Snapshot, aside: Path) -> list[_Report]:
        """Write this rank's file; on rank 0 what every rank wrote. Collective.

        Raises:
            CheckpointError: on every rank, if any could not write.
        """
        mine = f"rank-{dist.rank():05d}.safetensors"
        problem = None
        about: dict[str, Any] = {}
        begin = time.monotonic()
        try:
            about = write_safetensors(aside / mine, snapshot.entries)
        except OSError as error:
            problem = f"{aside / mine}: {error.strerror or error}"
        self._writing_s = time.monotonic() - begin
        self._all_well(problem, aside)
        runs = [
            (entry.key, entry.start, entry.values.numel(), DTYPES[entry.values.dtype])
            for entry in snapshot.entries
        ]
        return dist.to_first(_Report(mine, about, written(runs)), self._group)

    def _all_well(self, problem: str | None, aside: Path) -> None:
        """Raise CheckpointError on all ranks if any has a problem. Collective."""
        told = enumerate(dist.gather(problem, self._group))
        problems = [f"rank {rank}: {text}" for rank, text in told if text]
        if not problems:
            return
        if dist.rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        name = aside.name.removeprefix(".writing-")[: len(step_name(0))]
        raise CheckpointError(
            f"{name} was not written ({'; '.join(problems)}); earlier checkpoints are untouched. "
            "Free space or fix the folder, and start the same command again"
        )

    def _commit(self, aside: Path, final: Path, document: Mapping[str, Any]) -> None:
        """Make the folder a checkpoint. A writer that was passed over may wake up between any two
        of these calls: what it renames readers ignore by its generation, and it deletes nothing
        that they use."""
        if counts(final) and read_manifest(final).files == document["files"]:
            shutil.rmtree(aside)  # committed by the try before this one, which failed after that
        else:
            private = holds_secret(document["meta"])
            write_aside(aside / "manifest.json", sealed(document), private=private)
            self._check_lease()
            if os.path.lexists(final):
                # damaged, or of a writer that had lost the run; a rename replaces no folder with
                # files
                self._set_aside(final)
            os.rename(aside, final)
        flush_folder(self._root)
        self._check_lease()
        point_at(final)
        self._retention.prune()

    def _set_aside(self, path: Path) -> None:
        """Take a folder of the same name away, unless readers use it: then another job has
        committed this step.
        """
        doomed = dropped_name(path)
        valid = counts(path)
        if not valid:
            os.rename(path, doomed)
            if valid := counts(doomed):  # it was exchanged for another after the look
                os.rename(doomed, path)
        if valid:
            self._check_lease()
            raise FileExistsError(
                errno.EEXIST, "there is another valid checkpoint of this step", str(path)
            )
        remove(doomed)


def _attempt(action: Callable[[], object]) -> str | None:
    """What the disk said against an action; None if nothing."""
    try:
        action()
    except OSError as error:
        return f"{error.filename or ''}: {error.strerror or error}"
    return None


def _entries_of(state: EngineState) -> Iterator[Entry]:
    """What this rank writes. Of what several ranks hold, each writes a share."""
    for piece in state.pieces:
        for kind, tensor in piece.tensors.items():
            low = tensor.numel() * state.copies.mine // state.copies.of
            high = tensor.numel() * (state.copies.mine + 1) // state.copies.of
            if high > low:
                yield Entry(f"{kind}/{piece.name}", piece.start + low, tensor[low:high])
    if dist.rank() == 0:
        for name, table in state.buffers.items():
            yield Entry(f"buffer/{name}", 0, table.flatten())


def write_safetensors(path: Path, entries: Sequence[Entry]) -> dict[str, Any]:
    """Stream 1-D tensors into a safetensors file, flushed to disk; its bytes and sha256.

    Written here because the library's writer first copies every tensor into one Python object; the
    checksum is taken of what goes by.
    """
    header: dict[str, Any] = {}
    offset = 0
    for key, start, values in entries:
        end = offset + values.numel() * values.element_size()
        header[f"{key}@{start}"] = {
            "dtype": DTYPES[values.dtype],
            "shape": [values.numel()],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for block in (struct.pack("<Q", len(text)), text):
            file.write(block)
            digest.update(block)
        for _, _, values in entries:
            raw = values.detach().cpu().contiguous().view(torch.uint8).numpy().data
            file.write(raw)
            digest.update(raw)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": 8 + len(text) + offset, "sha256": digest.hexdigest()}
