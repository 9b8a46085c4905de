"""A folder of images packed into shards once, in a cache: `data.images=FOLDER`.

The cache's folder is named by the images (their paths, sizes and times) and by how they are packed:
a folder that has changed is packed again, and what was packed before stays for the runs that use
it: until no start has used it for UNUSED_DAYS, and the folder is packed anew. It is written aside
and renamed, so it is complete or not there; a killed job resumes.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from rcmae.data.packing.encoding import Encoding
from rcmae.data.packing.folders import Walked, heic_hint, walked
from rcmae.data.packing.writer import PackingOptions, make_shards
from rcmae.errors import Refused, counted
from rcmae.process import cores

MARGIN = 256 / 224  # of the shorter side that is stored, over the network's
BY_ITSELF = 50_000  # images that one rank packs while others wait
BY_ONE = 500  # images that are not worth more processes
UNUSED_DAYS = 30  # after which what was packed of a folder before is removed, for a newer one
NAME = "images"  # what the shards' names begin with


class Packed(NamedTuple):
    """Shards of a folder of images."""

    shards: str  # their pattern
    note: str  # what was done, for people


def pack_once(images: str, cache: str | None, *, side: int, world: int = 1) -> Packed:
    """The shards of a folder of images, made where they are not in the cache.

    Args:
        images: the folder; sub-folders are classes.
        cache: the folder of caches; None: the user's.
        side: of the network's images, in pixels; larger images are stored smaller.
        world: ranks, of which the others wait.

    Raises:
        Refused: there are no images, they cannot be packed, or there are too many to wait for.
    """
    folder = Path(os.path.expanduser(images))
    size = round(side * MARGIN)
    if not folder.is_dir():
        raise Refused(f"{images} is not a folder; for a list or Parquet: rcmae shards make")
    try:
        found = walked(folder)
    except OSError as error:
        raise Refused(f"{images}: {error.strerror}") from error
    place = place_of(
        folder, found, size, Path(os.path.expanduser(cache)) if cache else user_cache()
    )
    pattern = f"{place}/{NAME}-*.tar"
    if place.is_dir():
        _touch(place)
        return Packed(pattern, f"data.images={images}: packed before, in {place}")
    if world > 1 and len(found.images) > BY_ITSELF:
        raise Refused(
            f"{len(found.images):,} images are not packed yet, and {world} ranks would wait for "
            f"it; pack them first: {command(images, size)}"
        )
    before = _packed_before(place)
    options = PackingOptions(name=NAME, images=Encoding(size), jobs=jobs_for(len(found.images)))
    with alone(place):
        if not place.is_dir():
            part = place.with_name(f"{place.name}.part")
            report = make_shards(folder, part, options)
            os.replace(part, place)
            left = len(report.rejected)
            classes = len(report.classes)
            what = f"{counted(report.samples, 'image')} of "
            what += counted(classes, "class", "classes") if classes else "no classes"
            what += f", {left:,} left out" if left else ""
            if hint := heic_hint(found.others):
                what += f"; {hint}"
        else:
            what = "by another job"
        _touch(place)
        kept = _without_unused(before)
    again = "it has changed, and was packed again" if before else "packed once"
    note = f"data.images={images}: {again}, into {place} ({what})"
    if kept:
        size_gb = sum(file.stat().st_size for old in kept for file in old.iterdir()) / 1e9
        note += (
            f"; what was packed of it before, {size_gb:.2g} GB, lies beside it for the runs that "
            f"use it, and goes {UNUSED_DAYS} days after the last start of one"
        )
    return Packed(pattern, note)


def _packed_before(place: Path) -> list[Path]:
    """What was packed of the same folder, when it was another."""
    same = place.name.rpartition("-")[0]
    found = sorted(place.parent.glob(f"{glob.escape(same)}-*"))
    return [old for old in found if old.is_dir() and old != place and old.suffix != ".part"]


def _touch(place: Path) -> None:
    """Note that a start uses it. The folder's own time: who may only read it changes nothing."""
    with suppress(OSError):
        os.utime(place)


def _without_unused(places: Sequence[Path]) -> list[Path]:
    """Remove what no start has used for long; what is left."""
    oldest = time.time() - 86400 * UNUSED_DAYS
    kept = []
    for place in places:
        if place.stat().st_mtime > oldest:
            kept.append(place)
        else:
            shutil.rmtree(place, ignore_errors=True)
    return kept


def command(images: str, size: int = 256) -> str:
    """What packs a folder by hand."""
    out = images.rstrip("/") + "-shards"
    return f"rcmae shards make {shlex.quote(images)} {shlex.quote(out)} --name train --size {size}"


def user_cache() -> Path:
    """The user's folder of packed images. Raises Refused: no home folder is known."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):
        raise Refused(
            "data.images are packed in the user's cache, and no home folder is known of this user: "
            "set HOME or XDG_CACHE_HOME, or give data.cache_dir"
        )
    return Path(home) / "rcmae" / "images"


def place_of(folder: Path, found: Walked, size: int, cache: Path) -> Path:
    """Where the shards of these very images lie, or will."""
    real = os.path.realpath(folder)
    listed = []
    for path in sorted(found.images):
        stat = os.stat(folder / path)
        listed.append((path, stat.st_size, stat.st_mtime_ns))
    where = _digest([real, size])
    return cache / f"{Path(real).name}-{where}-{_digest(listed)}"


def _digest(what: object) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]


def jobs_for(images: int) -> int:
    """Processes that pack so many images."""
    return 1 if images < BY_ONE else min(8, cores.usable())


@contextmanager
def alone(place: Path) -> Iterator[None]:
    """Wait until no other job packs the same images."""
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = place.with_name(f".{place.name}.lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    lock.unlink(missing_ok=True)
