"""What a committed checkpoint says of itself, and which checkpoints of a run count.

`manifest.json` names every logical tensor ("kind/parameter"), and in which file each run of its
flattened elements lies (`layout`), so that a reader of any other sharding takes just the bytes it
needs. It is sealed, in every format: its last key is a checksum of all the others. A folder without
a manifest, or whose files or manifest differ from their checksums, is no checkpoint.

Among what lies in `checkpoints/`, only folders named `step-` and eight digits are ours: a copy
`step-00000020.bak` is neither read nor deleted. Everything here is local: any one process may call.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rcmae.checkpoint.layout import Runs, Stored, understood
from rcmae.checkpoint.lease import Fence, fence
from rcmae.errors import Refused
from rcmae.files import patiently

FORMAT = 2  # 1 has an object a run
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}

_OURS = re.compile(r"step-(\d{8})")
_BLOCK = 1 << 22  # bytes read at a time
# what commands and a resume read of `meta`
_RECIPE = {
    "engine": ("name", "precision"),
    "objective": ("name",),
    "model": ("name", "image_size", "patch_size"),
    "checkpoint": (),
    "data": (),
}
_META = {"recipe": dict, "sizes": dict, "data_fingerprint": str, "guard": dict, "versions": dict}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; says which file, why, and the way out."""


class NewerFormat(CheckpointError, Refused):
    """A whole checkpoint of a newer rcmae: passing it over would train its steps again."""


# what half of a file, or one that somebody edited, does to whoever reads it
_UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


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
    tensors: dict[str, Stored]  # by "kind/parameter"

    @cached_property
    def names(self) -> list[str]:
        """Of its files, in the order in which layouts count them."""
        return sorted(self.files)

    def runs(self, key: str) -> Runs:
        """Where the elements of a tensor lie, from the first to the last."""
        layout = self.tensors[key].layout
        lengths = (layout.ends - layout.starts).tolist()
        files = [self.names[number] for number in layout.files.tolist()]
        return list(zip(files, layout.starts.tolist(), lengths, strict=True))


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
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in plain.items()]
    lines.append(f'"sha256": "{_seal(plain)}"')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _seal(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint's folder.

    Raises:
        NewerFormat: it is whole, and of a newer format.
        CheckpointError: there is none, or it cannot be understood.
    """
    file = path / "manifest.json"
    try:
        document = json.loads(patiently(file.read_text))
        if not isinstance(document, dict):
            raise TypeError("it is not a mapping")
        is_whole = document.pop("sha256", None) == _seal(document)
        if document["format"] > FORMAT:
            kind = NewerFormat if is_whole else CheckpointError
            raise kind(
                f"{file} is of format {document['format']}, this rcmae reads up to {FORMAT}: "
                "update rcmae"
            )
        if not is_whole:
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
            tensors=understood(document, sorted(document["files"])),
        )
        _check_contents(manifest)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} has no manifest.json: it was never committed") from error
    except CheckpointError:
        raise
    except _UNREADABLE as error:
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
    _check_meta(manifest.meta)
    if step_of(manifest.path) not in (None, manifest.step):
        raise ValueError(f"it is of step {manifest.step}: its folder was renamed")
    if not manifest.files:
        raise ValueError("it lists no files")
    for name, about in manifest.files.items():
        if Path(name).name != name:
            raise ValueError(f"{name!r} is not a file of the checkpoint's folder")
        if type(about["bytes"]) is not int or not isinstance(about["sha256"], str):
            raise TypeError(f"{name}: its size or checksum is none")
    for key, stored in manifest.tensors.items():
        if stored.dtype not in DTYPES.values():
            raise ValueError(f"{key} has dtype {stored.dtype!r}")


def _check_meta(meta: Mapping[str, Any]) -> None:
    """Refuse a `meta` without what every command reads of it. Raises ValueError or TypeError."""
    if not isinstance(meta, dict):
        raise TypeError("meta is not a mapping")
    for name, kind in _META.items():
        if not isinstance(meta.get(name), kind):
            raise TypeError(f"meta has no {name}")
    for section, keys in _RECIPE.items():
        found = meta["recipe"].get(section)
        missing = [key for key in keys if not isinstance(found, dict) or key not in found]
        if missing or not isinstance(found, dict):
            raise ValueError(f"the recipe in meta has no {section}.{'/'.join(missing)}")
    world = meta["sizes"].get("world")
    if type(world) is not int or world < 1:
        raise ValueError(f"meta has sizes.world={world!r}")


# ----------------------------------------------------------------------------------------- checking


def file_problem(manifest: Manifest, name: str) -> str | None:
    """What is wrong with one file of a checkpoint, by size and checksum; None if nothing."""
    path = manifest.path / name
    about = manifest.files[name]
    try:
        size = patiently(path.stat).st_size
        if size != about["bytes"]:
            return f"{path} has {size} bytes, the manifest says {about['bytes']}"
        digest = patiently(lambda: _digest_of(path))
    except OSError as error:
        return f"{path}: {error.strerror}"
    if digest != about["sha256"]:
        return f"{path} differs from its checksum in the manifest"
    return None


def _digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


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


def counts(path: Path, held: Fence | None = None) -> bool:
    """Whether readers would use this checkpoint, by its manifest, its writer's lease and its
    files' sizes.

    Args:
        path: its folder.
        held: the run's fence, if it is known.

    Raises:
        LeaseUnreadable: the file of the run's holder cannot be read.
    """
    held = held or fence(path.parent.parent)
    try:
        manifest = read_manifest(path)
        for name, about in manifest.files.items():
            if (path / name).stat().st_size != about["bytes"]:
                return False
    except (CheckpointError, OSError):
        return False
    return held.allows(manifest.generation, manifest.step)


def newest_unverified(root: Path) -> Manifest | None:
    """The newest checkpoint that counts by manifest, lease and sizes; its bytes are not read.

    Raises:
        NewerFormat: one that is newer is of a newer rcmae.
    """
    for path in reversed(step_folders(root)):
        if counts(path):
            return read_manifest(path)
        _refuse_newer(path)
    return None


def _refuse_newer(path: Path) -> None:
    """Raise NewerFormat if a folder that does not count is of a newer rcmae."""
    try:
        read_manifest(path)
    except NewerFormat:
        raise
    except CheckpointError:
        return


def newest(root: Path) -> tuple[Manifest | None, list[str]]:
    """The newest valid checkpoint of a run, all of its bytes verified, and what was wrong with
    newer ones.

    Raises:
        NewerFormat: one that is newer is of a newer rcmae.
    """
    passed_over: list[str] = []
    for path in reversed(step_folders(root)):
        try:
            manifest = open_verified(path)
        except NewerFormat:
            raise
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
    return f"{manifest.path}: its writer, start {manifest.generation} of the run, had lost the run"
