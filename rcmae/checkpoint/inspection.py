"""What lies in a run's `checkpoints/`, judged as a reader of the run would judge it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rcmae.checkpoint.lease import fence
from rcmae.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    checkpoint_folders,
    fenced_off,
    file_problem,
    read_manifest,
)
from rcmae.checkpoint.retention import doomed, drop
from rcmae.process import cores

COUNTERS = ("step", "images", "optimizer_step", "teacher_updates")
_WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "BF16": 2}  # bytes an element


@dataclass(frozen=True)
class Found:
    """A folder that calls itself a checkpoint, and what is wrong with it."""

    path: Path
    manifest: Manifest | None  # None where it cannot be read
    problems: list[str]

    @property
    def bytes(self) -> int:
        """Bytes of its files, by the manifest; 0 where that cannot be read."""
        if self.manifest is None:
            return 0
        return sum(about["bytes"] for about in self.manifest.files.values())

    @property
    def facts(self) -> dict[str, Any]:
        """Plain values, for JSON and for tables."""
        facts: dict[str, Any] = {
            "path": str(self.path),
            "valid": not self.problems,
            "problems": self.problems,
        }
        if self.manifest is None:
            return facts
        meta = self.manifest.meta
        recipe = meta["recipe"]
        return facts | {
            **{key: getattr(self.manifest, key) for key in COUNTERS},
            "generation": self.manifest.generation,
            "saved": os.stat(self.path / "manifest.json").st_mtime,
            "engine": recipe["engine"]["name"],
            "engine_config": recipe["engine"].get("config"),
            "precision": recipe["engine"]["precision"],
            "world": meta["sizes"]["world"],
            "objective": recipe["objective"]["name"],
            "model": recipe["model"]["name"],
            "data_fingerprint": meta["data_fingerprint"],
            "versions": meta["versions"],
            "bytes": self.bytes,
        }


def look_at(path: Path, *, every_byte: bool) -> Found:
    """Judge a checkpoint by manifest, lease and its files' sizes, or, with `every_byte`, their
    checksums.
    """
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return Found(path, None, [str(error)])
    names = sorted(manifest.files)
    if every_byte:
        with ThreadPoolExecutor(min(8, cores.usable())) as pool:
            judged = list(pool.map(lambda name: file_problem(manifest, name), names))
    else:
        judged = [size_problem(manifest, name) for name in names]
    problems = [problem for problem in judged if problem]
    if not fence(path.parent.parent).allows(manifest.generation, manifest.step):
        problems.append(fenced_off(manifest))
    return Found(path, manifest, problems)


def size_problem(manifest: Manifest, name: str) -> str | None:
    """What is wrong with a file, by its size alone."""
    path = manifest.path / name
    wanted = manifest.files[name]["bytes"]
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None if size == wanted else f"{path} has {size} bytes, the manifest says {wanted}"


class Kind(NamedTuple):
    """All tensors of one kind (weight, teacher, ...) of a checkpoint."""

    tensors: int
    elements: int
    dtypes: list[str]
    bytes: int


def kinds(manifest: Manifest) -> dict[str, Kind]:
    """How many tensors, elements and bytes of each kind."""
    table: dict[str, Kind] = {}
    for key, row in manifest.tensors.items():
        name = key.partition("/")[0]
        before = table.get(name, Kind(0, 0, [], 0))
        table[name] = Kind(
            tensors=before.tensors + 1,
            elements=before.elements + row.elements,
            dtypes=sorted({*before.dtypes, row.dtype}),
            bytes=before.bytes + row.elements * _WIDTHS[row.dtype],
        )
    return table


class Pruned(NamedTuple):
    """What a prune found and did."""

    rows: list[Found]  # all, newest first
    gone: list[Found]  # those deleted, or that would be


def prune_verified(
    source: Path, *, keep: int, keep_every: int | None = None, dry_run: bool = False
) -> Pruned:
    """Delete a run's old checkpoints after every byte of all was read, so that those that stay are
    known to be good. What is damaged and newer than what stays is left for someone to look at.

    Args:
        source: the run's folder, or its `checkpoints`.
        keep: how many of the newest valid ones stay.
        keep_every: steps; multiples stay too. None: as the run's recipe says.
        dry_run: delete nothing.

    Raises:
        Refused: there are no checkpoints.
        CheckpointError: none is valid; nothing is deleted.
    """
    folders = checkpoint_folders(source)
    rows = [look_at(path, every_byte=True) for path in reversed(folders)]
    valid = [row for row in rows if not row.problems]
    if not valid:
        raise CheckpointError(
            f"{folders[0].parent} has no valid checkpoint, so nothing is deleted: "
            f"{rows[0].problems[0]}"
        )
    if keep_every is None and valid[0].manifest is not None:
        keep_every = valid[0].manifest.meta["recipe"]["checkpoint"].get("keep_every")
    going = doomed(
        [row.path for row in rows],
        valid=[row.path for row in valid],
        keep=keep,
        keep_every=keep_every,
    )
    if not dry_run:
        for path in going:
            drop(path)
    return Pruned(rows, [row for row in rows if row.path in going])


def others_beside(root: Path, folders: Sequence[Path]) -> list[str]:
    """Names in `checkpoints/` that are not checkpoints of the run's."""
    known = {"LATEST", *(path.name for path in folders)}
    return sorted(path.name for path in root.iterdir() if path.name not in known)


def pointed_at(root: Path) -> str | None:
    """The name in LATEST, None where there is none."""
    try:
        return (root / "LATEST").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
