"""The images of a folder, class folders or not: each once, whatever links lead to it.

Folders that systems, shares and editors leave behind are not read: as classes they would move
the labels of all others.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

# JPEGs have more names in folders than in tars, where they are .jpg
from rcmae.data.tars import IMAGE_SUFFIXES
from rcmae.errors import Refused, counted

ALIASES = {"jfif": "jpg", "jpe": "jpg"}  # suffix of a file -> that in a tar
_SYSTEM = {
    "__macosx",
    "__pycache__",
    "@eadir",
    "@recycle",
    "@recently-snapshot",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "recycler",
    "lost+found",
    "found.000",
    "system volume information",
    "network trash folder",
    "temporary items",
    "~snapshot",
    "_gsdata_",
    "recycled",
    "@tmp",
    "#tmp",
    "@sharebin",
}
_PHONES = (".heic", ".heif")  # images that are not read
_NAMED = 5  # of many folders that a message is about


@dataclass
class Walked:
    """What lies in a folder. Paths are relative to it."""

    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # files that no image suffix names
    skipped: list[str] = field(default_factory=list)  # hidden and system folders
    links: list[str] = field(default_factory=list)  # to what is read already


def walked(top: Path) -> Walked:
    """The images of a folder and of those in it.

    Raises:
        Refused: by links, one image is in two classes.
        OSError: a folder cannot be read.
    """
    found = Walked()
    root = os.path.realpath(top)
    read = {root}  # real paths of folders
    images: dict[str, str] = {}  # real path -> path
    to_folders: deque[str] = deque()  # links, which come after what is not a link
    to_images: list[str] = []
    coming = deque([""])
    while coming or to_folders:
        if not coming:
            path = to_folders.popleft()
            real = os.path.realpath(top / path)
            if real in read or root.startswith(real.rstrip(os.sep) + os.sep):
                found.links.append(path)
                continue
            read.add(real)
            coming.append(path)
        where = coming.popleft()
        here = os.path.realpath(top / where)
        for entry in sorted(os.scandir(top / where), key=lambda entry: entry.name):
            path = os.path.join(where, entry.name)
            if entry.is_dir():
                if is_hidden(entry.name):
                    found.skipped.append(path)
                elif entry.is_symlink():
                    to_folders.append(path)
                elif os.path.join(here, entry.name) in read:
                    found.links.append(path)  # the folder, which a link led to before
                else:
                    read.add(os.path.join(here, entry.name))
                    coming.append(path)
            elif not _is_image(entry.name) or not (entry.is_symlink() or entry.is_file()):
                # a pipe or a socket would be waited for
                found.others.append(path)
            elif entry.is_symlink():
                to_images.append(path)
            else:
                images[os.path.join(here, entry.name)] = path
    for path in to_images:
        first = images.setdefault(os.path.realpath(top / path), path)
        if first == path:
            continue
        if class_of(first) != class_of(path):
            raise Refused(f"{top}: {path} is a link to {first}, of another class; keep one of them")
        found.links.append(path)
    found.images = list(images.values())
    return found


def class_of(path: str) -> str:
    """The first folder of a path; empty where there is none."""
    head, separator, _ = path.partition(os.sep)
    return head if separator else ""


def is_hidden(name: str) -> bool:
    """Whether a folder of this name is no part of a data set."""
    return name.startswith(".") or name.lower() in _SYSTEM


def _is_image(name: str) -> bool:
    suffix = name.rpartition(".")[2].lower()
    return (suffix in IMAGE_SUFFIXES or suffix in ALIASES) and not name.startswith(".")


def without_images(top: Path, found: Walked) -> list[str]:
    """Class folders of which no image is read, each with what is there instead."""
    classes = {class_of(path) for path in found.images}
    told = []
    for entry in sorted(os.scandir(top), key=lambda entry: entry.name):
        if not entry.is_dir() or is_hidden(entry.name) or entry.name in classes:
            continue
        inside = [path for path in found.others if class_of(path) == entry.name]
        suffixes = sorted({os.path.splitext(path)[1].lower() or "no suffix" for path in inside})
        why = "is empty"
        if entry.name in found.links:
            why = "is a link to a folder that is read already"
        elif inside:
            why = f"{counted(len(inside), 'file')}: {', '.join(suffixes[:_NAMED])}"
        told.append(f"{entry.name} ({why})")
    return told


def heic_hint(others: Iterable[str]) -> str | None:
    """What to do with the photographs of a phone among these files; None where there are none."""
    count = sum(path.lower().endswith(_PHONES) for path in others)
    if not count:
        return None
    return (
        f"{counted(count, 'photograph')} in HEIC {'is' if count == 1 else 'are'} not read: make "
        "JPEGs of them first (with pillow-heif, Pillow opens them; on an iPhone: Settings, Camera, "
        "Formats, Most Compatible)"
    )


def notes_of(found: Walked) -> list[str]:
    """What a user should know of how a folder was read, a line each."""
    notes = []
    if found.skipped:
        notes.append(f"{_some(found.skipped)}: hidden and system folders, not read")
    if found.links:
        notes.append(f"{_some(found.links)}: links to what is read already, passed over")
    if hint := heic_hint(found.others):
        notes.append(hint)
    return notes


def _some(paths: list[str]) -> str:
    shown = ", ".join(sorted(paths)[:_NAMED])
    return shown + (f" and {len(paths) - _NAMED:,} more" if len(paths) > _NAMED else "")
