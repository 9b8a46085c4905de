#!/usr/bin/env python3
"""Make WebDataset shards, with their index, from a folder of images.

    python tools/make_shards.py IMAGES OUT [--name train] [--samples 1000] [--size 256] [--quality 90]
                                [--classes FILE] [--jobs N] [--overwrite] [--json]

IMAGES holds a sub-folder for each class, or images alone (no labels then). OUT gets NAME-000000.tar, ..., `index.json`
and, with classes, `classes.txt`: line i, counted from 0, is the class of label i (--classes takes such a file, so that
a validation set gets the training set's labels). Every image is decoded once; what cannot be is left out and listed.
The order is that of a hash of the path, so each shard mixes the classes. The same images and options give the same
bytes. --size makes images whose shorter side has more pixels than that smaller, as JPEG; all others go in as they are.
Exit status: 0 written; 2 the input cannot be used.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import simplejpeg
import torch
from rich.console import Console
from rich.progress import track

from rcmae.shards import IMAGE_SUFFIXES, ShardIndex, written_aside
from rcmae.transforms import BadImage, decode, resize

_KEY_BYTES = 90  # USTAR has 100 for a name


class Source(NamedTuple):
    """An image file and what it becomes."""

    path: str
    key: str
    label: int | None


class Rejected(NamedTuple):
    """An image that was left out."""

    path: str
    reason: str


class Written(NamedTuple):
    """A shard that was written."""

    path: str
    samples: int
    rejected: list[Rejected]


class Report(NamedTuple):
    """What make_shards made."""

    shards: list[str]
    samples: int
    bytes: int
    classes: list[str]  # empty: no labels
    rejected: list[Rejected]
    other_files: int  # files that no image suffix names: not looked at


def make_shards(
    images: str | Path,
    out: str | Path,
    *,
    name: str = "train",
    samples: int = 1000,
    size: int | None = None,
    quality: int = 90,
    classes: Sequence[str] | None = None,
    jobs: int = 1,
    overwrite: bool = False,
    progress: bool = False,
) -> Report:
    """Write the images of a folder as shards with their index and classes.

    Args:
        images: a folder of class folders, or of images.
        out: folder of the shards; made where it is not there.
        name: what their names begin with.
        samples: at most so many in a shard; all have equally many, to one.
        size: make images smaller whose shorter side has more pixels than this.
        quality: of the JPEG that these become.
        classes: names in the order of the labels; by default the class folders' in alphabetical order.
        jobs: processes.
        overwrite: replace shards of this name.
        progress: show a bar on standard error.

    Raises:
        ValueError: the folder holds no images, or images beside class folders, or folders of no known class; OUT has
            shards of this name or other classes; all images of a shard are unreadable.
    """
    images, out = Path(images), Path(out)
    sources, labels, other_files = find_images(images, classes)
    old = sorted(out.glob(f"{name}-*.tar"))
    if old and not overwrite:
        raise ValueError(f"{out} has {len(old)} shards named {name}-*.tar; take another --name, or --overwrite them")
    class_file, text = out / "classes.txt", "".join(f"{label}\n" for label in labels).encode()
    if labels and not overwrite and class_file.exists() and class_file.read_bytes() != text:
        raise ValueError(f"{class_file} names other classes; pass it as --classes, or --overwrite it")

    out.mkdir(parents=True, exist_ok=True)
    for torn in out.glob(f".{name}-*.tar.*"):
        torn.unlink()  # of a job that was killed
    count = -(-len(sources) // samples)
    cuts = [len(sources) * shard // count for shard in range(count + 1)]
    paths = [str(out / f"{name}-{shard:06d}.tar") for shard in range(count)]
    tasks = [(path, sources[first:stop]) for path, first, stop in zip(paths, cuts, cuts[1:], strict=False)]
    written = list(
        track(
            _each(partial(write_shard, size=size, quality=quality), tasks, jobs), "writing shards", total=count,
            console=Console(stderr=True), disable=not progress,
        )
    )  # fmt: skip
    for path in {*map(str, old)} - set(paths):
        Path(path).unlink()
    if labels:
        with written_aside(class_file) as file:
            file.write(text)
    ShardIndex.refresh(out, paths, rebuild=True, jobs=jobs)
    return Report(
        shards=paths,
        samples=sum(shard.samples for shard in written),
        bytes=sum(os.path.getsize(path) for path in paths),
        classes=labels,
        rejected=[reject for shard in written for reject in shard.rejected],
        other_files=other_files,
    )


def find_images(folder: Path, classes: Sequence[str] | None = None) -> tuple[list[Source], list[str], int]:
    """(the images of a folder in the order of their paths' hashes, the classes, how many files are no images)."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images")
    found: list[str] = []
    other_files = 0
    for top, _, names in os.walk(folder, followlinks=True):
        for file in names:
            path = os.path.relpath(os.path.join(top, file), folder)
            if file.rpartition(".")[2].lower() in IMAGE_SUFFIXES and not file.startswith("."):
                found.append(path)
            else:
                other_files += 1
    in_class = [path for path in found if os.sep in path]
    if not found:
        raise ValueError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)}) among {other_files} files")
    if in_class and len(in_class) < len(found):
        alone = len(found) - len(in_class)
        raise ValueError(f"{folder} holds {alone} images beside class folders; move them into one, or the folders away")
    folders = sorted({path.split(os.sep, 1)[0] for path in in_class})
    labels = list(classes) if classes is not None and folders else folders
    if unknown := sorted(set(folders) - set(labels)):
        raise ValueError(
            f"folders of {folder} that are no known class: {', '.join(unknown[:10])} ({len(unknown)} in all)"
        )
    number = {label: index for index, label in enumerate(labels)}
    hashes = {path: hashlib.sha256(os.fsencode(path)).hexdigest() for path in found}
    plain = {path: os.path.splitext(path)[0].replace(os.sep, "_").replace(".", "_") for path in found}
    times = Counter(plain.values())
    sources = []
    for path in sorted(found, key=hashes.__getitem__):
        key = plain[path]
        if times[key] > 1 or len(os.fsencode(key)) > _KEY_BYTES:
            key = os.fsdecode(os.fsencode(key)[: _KEY_BYTES - 17]) + "-" + hashes[path][:16]
        sources.append(Source(str(folder / path), key, number.get(path.split(os.sep, 1)[0]) if folders else None))
    return sources, labels, other_files


def write_shard(task: tuple[str, Sequence[Source]], size: int | None = None, quality: int = 90) -> Written:
    """Write a tar of the images that can be decoded. It is there whole or not at all."""
    path, sources = task
    count, rejected = 0, []
    with written_aside(Path(path)) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for source in sources:
            try:
                suffix, data = encoded(Path(source.path), size, quality)
            except (BadImage, OSError) as error:
                rejected.append(Rejected(source.path, str(error)))
                continue
            _add(tar, f"{source.key}.{suffix}", data)
            if source.label is not None:
                _add(tar, f"{source.key}.cls", str(source.label).encode())
            count += 1
        if not count:
            raise ValueError(
                f"none of the {len(sources)} images of {os.path.basename(path)} can be read,"
                f" such as {rejected[0].path}: {rejected[0].reason}"
            )
    return Written(path, count, rejected)


def encoded(path: Path, size: int | None, quality: int) -> tuple[str, bytes]:
    """(suffix, bytes) of an image: the file's own, or a smaller JPEG. Raises BadImage."""
    data = path.read_bytes()
    pixels = decode(data)
    rows, columns = pixels.shape[:2]
    if size is None or min(rows, columns) <= size:
        return path.suffix[1:].lower(), data
    factor = size / min(rows, columns)
    smaller = resize(pixels, (round(rows * factor), round(columns * factor)))
    return "jpg", simplejpeg.encode_jpeg(smaller.permute(1, 2, 0).contiguous().numpy(), quality, "RGB", "420")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # owner, group and time are 0
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _each(write: partial[Written], tasks: Iterable[tuple[str, Sequence[Source]]], jobs: int) -> Iterator[Written]:
    if jobs <= 1:
        yield from map(write, tasks)
        return
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch"])  # imported once for all processes
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(write, tasks)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("images", type=Path, metavar="IMAGES")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--name", default="train", help="what the shards' names begin with (default: %(default)s)")
    parser.add_argument("--samples", type=_positive, default=1000, help="most in a shard (default: %(default)s)")
    parser.add_argument("--size", type=_positive, help="pixels of the shorter side of images that have more")
    parser.add_argument("--quality", type=_positive, default=90, help="of the JPEG they become (default: %(default)s)")
    parser.add_argument("--classes", type=Path, help="file with a class on each line, in the order of the labels")
    parser.add_argument("--jobs", type=_positive, default=os.cpu_count() or 1, help="processes (default: the cores)")
    parser.add_argument("--overwrite", action="store_true", help="replace shards of this name")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    try:
        report = make_shards(
            options.images, options.out, name=options.name, samples=options.samples, size=options.size,
            quality=options.quality, classes=options.classes and options.classes.read_text("utf-8").splitlines(),
            jobs=options.jobs, overwrite=options.overwrite, progress=sys.stderr.isatty(),
        )  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(report._asdict() | {"rejected": [reject._asdict() for reject in report.rejected]}, indent=1))
        return 0
    print(
        f"{options.out}: {report.samples:,} images of {len(report.classes) or 'no'} classes"
        f" in {len(report.shards)} shards, {report.bytes / 1e6:,.1f} MB"
    )
    if report.other_files:
        print(f"  {report.other_files:,} other files were not looked at")
    for reject in report.rejected:
        print(f"  left out: {reject.path} ({reject.reason})")
    return 0


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
