"""What a committed checkpoint says of itself, and which checkpoints of a run count.

`manifest.json` names every logical tensor ("kind/parameter"), and in which file each run of its
flattened elements lies, so that a reader of any other sharding takes just the bytes it needs. It is
sealed: its last key is a checksum of all the others. A folder without a manifest, or whose files or
manifest differ from their checksums, is no checkpoint.

Among what lies in `checkpoints/`, only folders named `step-` and eight digits are ours: a copy
`step-00000020.bak` is neither read nor deleted. Everything here is local: any one process may call.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rcmae.checkpoint.lease import fence
from rcmae.errors import Refused

FORMAT = 1
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}

_OURS = re.compile(r"step-(\d{8})")
_BLOCK = 1 << 22  # bytes read at a time


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


# -------------------------------------------------------------------------------- folders and names


def step_name(step: int) -> str:
    """The name of a step's folder among the checkpoints."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step of a checkpoint's folder by its name; None where the name is not one of ours."""
    found = _OURS.fullmatch(path.name)
    return int(found[1]) if found else None


def step_folders(root: Path) -> list[Path]:
    """The folders in `checkpoints/` that are ours by their names, oldest first.

    Whether they are valid is not looked at. Empty where there is no such folder.
    """
    try:
        found = [path for path in root.iterdir() if step_of(path) is not None]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(path for path in found if path.is_dir())


# ----------------------------------------------------------------------------------------- manifest


def sealed(document: Mapping[str, Any]) -> str:
    """A manifest's text, closed by a checksum of all the rest: a flipped digit in a run would
    load other weights.
    """
    plain = json.loads(json.dumps(document))
    return json.dumps({**plain, "sha256": _seal(plain)}, indent=1)


def _seal(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint's folder.

    Raises:
        CheckpointError: there is none, it is of a newer format, or it cannot be understood.
    """
    file = path / "manifest.json"
    try:
        document = json.loads(file.read_text())
        if not isinstance(document, dict):
            raise TypeError("it is no mapping")
        if document["format"] > FORMAT:
            raise CheckpointError(
                f"{file} is of format {document['format']}, this rcmae reads up to {FORMAT}: "
                "update rcmae"
            )
        if document.pop("sha256") != _seal(document):
            raise CheckpointError(f"{file} differs from its own checksum")
        manifest = Manifest(
            path=path,
            generation=document["generation"],
            step=document["step"],
            images=document["images"],
            optimizer_step=document["optimizer_step"],
            teacher_updates=document["teacher_updates"],
            meta=document["meta"],
            files=document["files"],
            tensors=document["tensors"],
        )
        _check_contents(manifest)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} has no manifest.json: it was never committed") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error!r}") from error
    return manifest


def _check_contents(manifest: Manifest) -> None:
    """Refuse what a right checksum does not exclude: a manifest that lies.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it says what no save writes.
    """
    counts = ("generation", "step", "images", "optimizer_step", "teacher_updates")
    for name in counts:
        value = getattr(manifest, name)
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} is {value!r}")
    if not isinstance(manifest.meta, dict):
        raise TypeError("meta is no mapping")
    if not manifest.files:
        raise ValueError("it lists no files")
    for name, about in manifest.files.items():
        if Path(name).name != name:
            raise ValueError(f"{name!r} is no file of the checkpoint's folder")
        if type(about["bytes"]) is not int or not isinstance(about["sha256"], str):
            raise TypeError(f"{name}: its size or checksum is none")
    for key, row in manifest.tensors.items():
        _check_runs(key, row, manifest.files)


def _check_runs(key: str, row: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Refuse a tensor whose runs do not lie end to end, once each, from its first element to its
    last. Raises ValueError, KeyError or TypeError.
    """
    if row["dtype"] not in DTYPES.values():
        raise ValueError(f"{key} has dtype {row['dtype']!r}")
    if any(type(size) is not int or size < 0 for size in row["shape"]):
        raise ValueError(f"{key} has shape {row['shape']!r}")
    covered = 0
    for file, start, length in row["runs"]:
        if file not in files:
            raise ValueError(f"{key}: {file!r} is not among the files")
        if start != covered or type(length) is not int or length < 0:
            raise ValueError(f"{key}: a run starts at {start}, the ones before end at {covered}")
        covered += length
    if covered != math.prod(row["shape"]):
        raise ValueError(f"{key}: {covered} elements for a shape of {row['shape']}")


# ----------------------------------------------------------------------------------------- checking


def file_problem(manifest: Manifest, name: str) -> str | None:
    """What is wrong with one file of a checkpoint, by size and checksum; None if nothing."""
    path = manifest.path / name
    about = manifest.files[name]
    digest = hashlib.sha256()
    try:
        size = path.stat().st_size
        if size != about["bytes"]:
            return f"{path} has {size} bytes, the manifest says {about['bytes']}"
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        return f"{path}: {error.strerror}"
    if digest.hexdigest() != about["sha256"]:
        return f"{path} differs from its checksum in the manifest"
    return None


def open_verified(path: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all as written.

    Reads all of its bytes; `open_verified_together` shares that out over the ranks.

    Raises:
        CheckpointError: with what is wrong.
    """
    manifest = read_manifest(path)
    for name in sorted(manifest.files):
        if problem := file_problem(manifest, name):
            raise CheckpointError(problem)
    return manifest


def counts(path: Path) -> bool:
    """Whether readers would use this checkpoint, by its manifest, its writer's lease and its
    files' sizes.
    """
    try:
        manifest = read_manifest(path)
        for name, about in manifest.files.items():
            if (path / name).stat().st_size != about["bytes"]:
                return False
        return fence(path.parent.parent).allows(manifest.generation, manifest.step)
    except (CheckpointError, OSError):
        return False


def newest_unverified(root: Path) -> Manifest | None:
    """The newest checkpoint that counts by manifest, lease and sizes; its bytes are not read."""
    for path in reversed(step_folders(root)):
        if counts(path):
            return read_manifest(path)
    return None


def newest(root: Path) -> tuple[Manifest | None, list[str]]:
    """The newest valid checkpoint of a run, all of its bytes verified, and what was wrong with
    newer ones.
    """
    passed_over: list[str] = []
    for path in reversed(step_folders(root)):
        try:
            manifest = open_verified(path)
        except CheckpointError as error:
            passed_over.append(str(error))
            continue
        if fence(root.parent).allows(manifest.generation, manifest.step):
            return manifest, passed_over
        passed_over.append(fenced_off(manifest))
    return None, passed_over


def checkpoint_folders(path: Path) -> list[Path]:
    """The checkpoints that a path names, oldest first, whatever their state: one's folder names
    itself, a run's all.

    Raises:
        Refused: there is none.
    """
    is_one = path.is_dir() and step_of(path) is not None
    if is_one or (path / "manifest.json").exists():
        return [path]
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = step_folders(root)
    if not found:
        what = "no such file or folder" if not path.is_dir() else "no checkpoint in this folder"
        raise Refused(
            f"{path}: {what}; give a run's, or one such as runs/NAME/checkpoints/step-00001000"
        )
    return found


def find_checkpoint(path: Path) -> tuple[Manifest, list[str]]:
    """The checkpoint that a path names, verified: a checkpoint's folder, or a run's for its newest
    valid one.

    Returns:
        its manifest, and what was wrong with newer ones of the run.

    Raises:
        Refused: there is no checkpoint.
        CheckpointError: none is valid.
    """
    folders = checkpoint_folders(path)
    if folders == [path]:
        return open_verified(path), []
    root = folders[0].parent
    found, passed_over = newest(root)
    if found is None:
        raise none_valid(root, passed_over)
    return found, passed_over


def none_valid(root: Path, passed_over: list[str]) -> CheckpointError:
    """What to raise where checkpoints are and none can be used."""
    reasons = "; ".join(passed_over)
    return CheckpointError(f"{root} has no valid checkpoint: {reasons}; restore one")


def fenced_off(manifest: Manifest) -> str:
    """Why a checkpoint that a lease's fence does not allow is passed over."""
    return f"{manifest.path}: its writer, generation {manifest.generation}, had lost the run"
