#!/usr/bin/env python3
"""Make WebDataset shards, with their index, from images in a folder, a list, Parquet files or other
tars.

    python tools/make_shards.py IMAGES [IMAGES ...] OUT [--name train] [--samples 1000] \\
        [--size 256] [--quality 90]
                                [--min-size N] [--classes FILE] [--jobs N] [--overwrite] [--json]

IMAGES is a folder with a sub-folder for each class, or with images alone (no labels then); or a
.csv or .tsv file with the columns `path` (from the file's folder) and, if wanted, `label`; or
.parquet files with a column `image` (bytes, or a struct with `bytes`) and, if wanted, `label`; or
.tar files, whose images and labels are laid out anew. OUT gets NAME-000000.tar, ..., `index.json`
and, with class names, `classes.txt`: line i, counted from 0, is the class of label i (--classes
takes such a file, so that a validation set gets the training set's labels). ImageNet-1k in one
command:

    python tools/make_shards.py ILSVRC2012/train shards --name train --size 256

Every image is decoded once; what cannot be is left out and listed, as are those whose shorter side
has fewer pixels than --min-size. The order is that of a hash of the name, so each shard mixes the
classes. The same images and options give the same bytes. --size makes images whose shorter side has
more pixels than that smaller, as JPEG; all others go in as they are. Images of any number of
channels are taken, as .npy or TIFF (which stay .npy or TIFF when made smaller). A job that was
killed or stopped goes on where it was when the same command is started again. Exit status: 0
written; 2 the input cannot be used; 130 stopped with Ctrl-C."""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import simplejpeg
import tifffile
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from rcmae.data.index import ShardIndex
from rcmae.data.patterns import expand
from rcmae.data.tars import IMAGE_SUFFIXES, NO_LABEL
from rcmae.data.transforms import NPY, TIFF, BadImage, channels_of, decode, resize
from rcmae.data.workers import fork_server, mapped
from rcmae.errors import Refused
from rcmae.files import aside

_KEY_BYTES = 90  # USTAR has 100 for a name
_NAMED = 5  # of many files that a message is about


class Source(NamedTuple):
    """An image, a file or a part of one, and what it becomes."""

    path: str
    key: str
    label: int | None
    offset: int = 0
    size: int = -1  # bytes; -1: to the end of the file
    name: str = ""  # what messages call it, where that is not the path

    def read(self) -> bytes:
        """Its bytes."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Named(NamedTuple):
    """An image that was found, before it has a key and a number for its class."""

    name: str  # decides its place in the order
    label: str | int | None
    path: str
    offset: int = 0
    size: int = -1


class Found(NamedTuple):
    """All images of an input."""

    images: list[Named]
    others: Sequence[str] = ()  # files that no image suffix names: not looked at


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
    such_as: list[str]  # a few of them
    kept: int  # shards that a job before had written


def make_shards(
    images: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    name: str = "train",
    samples: int = 1000,
    size: int | None = None,
    quality: int = 90,
    min_size: int = 1,
    classes: Sequence[str] | None = None,
    jobs: int = 1,
    overwrite: bool = False,
    progress: bool = False,
) -> Report:
    """Write images as shards with their index and classes.

    Args:
        images: a folder of class folders, or of images; a list; Parquet files; tars. Or several of
            one kind.
        out: folder of the shards; made where it is not there.
        name: what their names begin with.
        samples: at most so many in a shard; all have equally many, to one.
        size: make images smaller whose shorter side has more pixels than this.
        quality: of the JPEG that these become.
        min_size: leave out images whose shorter side has fewer pixels.
        classes: names in the order of the labels; by default the class folders' in alphabetical
            order.
        jobs: processes.
        overwrite: replace shards of this name.
        progress: show a bar on standard error.

    Raises:
        ValueError: the folder holds no images, or images beside class folders, or folders of no
            known class; OUT has shards of this name or other classes; all images of a shard are
            unreadable.
    """
    inputs = [str(images)] if isinstance(images, str | Path) else [str(one) for one in images]
    out = Path(out)
    spool = out / f".{name}.spool"
    found = find_images(inputs, spool)
    sources, labels = keyed(found.images, classes, " ".join(inputs))
    old = sorted(out.glob(f"{name}-*.tar"))
    count = -(-len(sources) // samples)
    cuts = [len(sources) * shard // count for shard in range(count + 1)]
    paths = [str(out / f"{name}-{shard:06d}.tar") for shard in range(count)]
    tasks = [
        (path, sources[first:stop])
        for path, first, stop in zip(paths, cuts, cuts[1:], strict=False)
    ]
    job = Job(
        out / f".{name}.progress",
        {
            "images": _digest(sources),
            "classes": _digest(labels),
            "samples": samples,
            "size": size,
            "quality": quality,
            "min-size": min_size,
        },
    )
    if old and not overwrite and job.done is None:
        unfinished = (
            f" of a job that did not end, {job.unlike}; the command of that job goes on"
            if job.unlike
            else ""
        )
        raise Refused(
            f"{out} has {len(old)} shards named {name}-*.tar{unfinished}; take another "
            "--name, or --overwrite them"
        )
    class_file, text = out / "classes.txt", "".join(f"{label}\n" for label in labels).encode()
    if labels and not overwrite and class_file.exists() and class_file.read_bytes() != text:
        raise Refused(f"{class_file} names other classes; pass it as --classes, or --overwrite it")

    out.mkdir(parents=True, exist_ok=True)
    for torn in out.glob(f".{name}-*.tar.*"):
        torn.unlink()  # of a job that was killed
    done = {path: each for path, each in (job.done or {}).items() if os.path.isfile(path)}
    missing = [task for task in tasks if task[0] not in done]
    write = partial(write_shard, size=size, quality=quality, min_size=min_size)
    shown = track(
        _each(write, missing, jobs),
        "writing shards",
        total=len(missing),
        console=Console(stderr=True),
        disable=not progress,
    )
    job.begin(done.values())
    try:
        for each in shown:
            job.note(each)
            done[each.path] = each
    except ValueError:
        if not done:
            job.end()  # nothing to go on with
        raise
    written = [done[path] for path in paths]
    for path in {*map(str, old)} - set(paths):
        Path(path).unlink()
    if labels:
        with aside(class_file) as file:
            file.write(text)
    ShardIndex.refresh(out, paths, rebuild=True, jobs=jobs)
    job.end()
    spool.unlink(missing_ok=True)
    return Report(
        shards=paths,
        samples=sum(shard.samples for shard in written),
        bytes=sum(os.path.getsize(path) for path in paths),
        classes=labels,
        rejected=[reject for shard in written for reject in shard.rejected],
        other_files=len(found.others),
        such_as=sorted(found.others)[:_NAMED],
        kept=count - len(missing),
    )


class Job:
    """What a job has written so far, in a file beside the shards: started again with the same
    input, it goes on.
    """

    def __init__(self, path: Path, what: dict[str, Any]) -> None:
        self._path, self._what = path, what
        # of a job before that was to do the same; None: there was none
        self.done: dict[str, Written] | None = None
        self.unlike = ""  # how a job before that did not end differs from this one
        try:
            head, *lines = path.read_text().splitlines(keepends=True)
            before = json.loads(head)
            rows = [json.loads(line) for line in lines if line.endswith("\n")]
        except (OSError, ValueError):
            return
        if before == what:
            self.done = {
                row[0]: Written(row[0], row[1], [Rejected(*reject) for reject in row[2]])
                for row in rows
            }
        elif isinstance(before, dict):
            self.unlike = ", ".join(
                _unlike(key, before.get(key), value)
                for key, value in what.items()
                if before.get(key) != value
            )

    def begin(self, done: Iterable[Written]) -> None:
        """Say what the job is, and what is done of it."""
        with aside(self._path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in (self._what, *done)).encode())

    def note(self, written: Written) -> None:
        """A shard more is there."""
        with self._path.open("a") as file:
            file.write(json.dumps(written) + "\n")

    def end(self) -> None:
        """All is there."""
        self._path.unlink(missing_ok=True)


def _unlike(key: str, before: Any, now: Any) -> str:
    if key in ("images", "classes"):
        return f"with other {key}"
    return " instead of ".join(
        f"--{key}={value}" if value is not None else f"no --{key}" for value in (before, now)
    )


def _digest(what: object) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def find_images(inputs: Sequence[str], spool: Path) -> Found:
    """The images of some inputs of one kind; those of Parquet files are put into `spool` to be read
    by offset.

    Raises:
        ValueError: there are none, or the input is not of the form that it should have.
    """
    kinds = {Path(one).suffix.lower() for one in inputs}
    if len(kinds) == 1 and kinds <= {".tar"}:
        return _in_tars(inputs)
    if len(kinds) == 1 and kinds <= {".parquet"}:
        return _in_parquet(inputs, spool)
    if len(inputs) > 1:
        raise Refused(
            "several inputs are .tar or .parquet files, all of one kind; got "
            f"{', '.join(inputs[:5])}"
        )
    if kinds <= {".csv", ".tsv"}:
        return _in_list(Path(inputs[0]))
    return _in_folder(Path(inputs[0]))


def _in_folder(folder: Path) -> Found:
    if not folder.is_dir():
        raise Refused(
            f"{folder} is not a folder of images, nor a .csv, .tsv, .parquet or .tar file"
        )
    found: list[str] = []
    others: list[str] = []
    for top, _, names in os.walk(folder, followlinks=True):
        for file in names:
            path = os.path.relpath(os.path.join(top, file), folder)
            is_image = file.rpartition(".")[2].lower() in IMAGE_SUFFIXES and not file.startswith(
                "."
            )
            (found if is_image else others).append(path)
    in_class = [path for path in found if os.sep in path]
    if not found:
        raise Refused(
            f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)}) among {len(others)} files"
        )
    if in_class and len(in_class) < len(found):
        alone = len(found) - len(in_class)
        raise Refused(
            f"{folder} holds {alone} images beside class folders; move them into one, or the "
            "folders away"
        )
    label = (lambda path: path.split(os.sep, 1)[0]) if in_class else (lambda path: None)
    return Found([Named(path, label(path), str(folder / path)) for path in found], others)


def _in_list(path: Path) -> Found:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            rows, at = [], []
            for row in lines:
                rows.append(row)
                at.append(lines.line_num)
            columns = lines.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Refused(f"{path} cannot be read as a list ({error})") from error
    if not rows or "path" not in columns:
        raise Refused(
            f"{path}: wants a first line with the columns path and, if wanted, label; then "
            "an image a line"
        )
    if empty := [str(line) for line, row in zip(at, rows, strict=True) if not row["path"]]:
        raise Refused(
            f"{path} has {len(empty)} lines with an empty path: line {_some(empty, len(empty))}"
        )
    if gone := [
        f"{row['path']} (line {line})"
        for line, row in zip(at, rows, strict=True)
        if not (path.parent / row["path"]).is_file()
    ]:
        raise Refused(
            f"{path} names {len(gone)} files that are not there: {_some(gone, len(gone))}"
        )
    labels = [row.get("label") for row in rows]
    if any(label in (None, "") for label in labels):
        if any(labels):
            raise Refused(
                f"{path}: {sum(not label for label in labels)} of {len(rows)} lines have no label"
            )
        labels = [None] * len(rows)
    numbers = all(label is not None and label.isdecimal() for label in labels)
    return Found(
        [
            Named(
                row["path"],
                int(label) if numbers and label else label,
                str(path.parent / row["path"]),
            )
            for row, label in zip(rows, labels, strict=True)
        ]
    )


def _in_tars(patterns: Sequence[str]) -> Found:
    index = ShardIndex.open(expand(patterns), jobs=min(8, os.cpu_count() or 1))
    found = []
    for number in range(len(index)):
        sample = index[number]
        label = None if sample.label == NO_LABEL else sample.label
        found.append(Named(sample.id, label, sample.path, sample.offset, sample.size))
    return Found(found)


def _in_parquet(paths: Sequence[str], spool: Path) -> Found:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise Refused("Parquet files are read with pyarrow: pip install pyarrow") from error
    spool.parent.mkdir(parents=True, exist_ok=True)
    found = []
    with aside(spool) as out:
        for path in paths:
            try:
                table = parquet.ParquetFile(path)
                columns = [name for name in ("image", "label") if name in table.schema_arrow.names]
                if "image" not in columns:
                    raise Refused(f"no column image; it has {', '.join(table.schema_arrow.names)}")
                row = 0
                for batch in table.iter_batches(batch_size=256, columns=columns):
                    labels = (
                        batch.column("label").to_pylist()
                        if "label" in columns
                        else [None] * batch.num_rows
                    )
                    for image, label in zip(batch.column("image").to_pylist(), labels, strict=True):
                        data = image.get("bytes") if isinstance(image, dict) else image
                        if not isinstance(data, bytes):
                            raise Refused(f"row {row} of the column image holds no bytes")
                        found.append(
                            Named(
                                f"{Path(path).stem}/{row:09d}",
                                label,
                                str(spool),
                                out.tell(),
                                len(data),
                            )
                        )
                        out.write(data)
                        row += 1
            except (OSError, ArrowException, ValueError) as error:
                raise Refused(f"{path} cannot be used ({error})") from error
    return Found(found)


def keyed(
    images: Sequence[Named], classes: Sequence[str] | None, what: str
) -> tuple[list[Source], list[str]]:
    """(the images in the order of their names' hashes, the names of the classes if they have
    names).
    """
    names = sorted({image.label for image in images if isinstance(image.label, str)})
    labels = list(classes) if classes is not None and names else names
    if unknown := sorted(set(names) - set(labels)):
        raise Refused(
            f"folders of {what} that are no known class: {', '.join(unknown[:10])} "
            f"({len(unknown)} in all)"
        )
    number: dict[str | int | None, int] = {label: index for index, label in enumerate(labels)}
    hashes = {image.name: hashlib.sha256(os.fsencode(image.name)).hexdigest() for image in images}
    if len(hashes) < len(images):
        twice = Counter(image.name for image in images).most_common(1)[0][0]
        raise Refused(
            f"{what} names {len(images) - len(hashes)} images more than once, such as {twice}"
        )
    plain = {image.name: _plain(image) for image in images}
    times = Counter(plain.values())
    sources = []
    for image in sorted(images, key=lambda image: hashes[image.name]):
        key = plain[image.name]
        if times[key] > 1 or len(os.fsencode(key)) > _KEY_BYTES:
            key = os.fsdecode(os.fsencode(key)[: _KEY_BYTES - 17]) + "-" + hashes[image.name][:16]
        label = number.get(image.label, image.label if isinstance(image.label, int) else None)
        whole = image.size < 0
        sources.append(
            Source(image.path, key, label, image.offset, image.size, "" if whole else image.name)
        )
    return sources, labels


def _plain(image: Named) -> str:
    name = os.path.splitext(image.name)[0] if image.size < 0 else image.name.rpartition("/")[2]
    if image.path.endswith(".spool"):
        name = image.name
    return name.lstrip("./").replace(os.sep, "_").replace(".", "_")


def write_shard(
    task: tuple[str, Sequence[Source]],
    size: int | None = None,
    quality: int = 90,
    min_size: int = 1,
) -> Written:
    """Write a tar of the images that can be decoded. It is there whole or not at all."""
    path, sources = task
    count, rejected = 0, []
    with (
        aside(Path(path)) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for source in sources:
            try:
                suffix, data = encoded(source, size, quality, min_size)
            except (BadImage, OSError) as error:
                rejected.append(Rejected(source.name or source.path, str(error)))
                continue
            _add(tar, f"{source.key}.{suffix}", data)
            if source.label is not None:
                _add(tar, f"{source.key}.cls", str(source.label).encode())
            count += 1
        if not count:
            raise Refused(
                f"none of the {len(sources)} images of {os.path.basename(path)} can be read,"
                f" such as {rejected[0].path}: {rejected[0].reason}"
            )
    return Written(path, count, rejected)


def encoded(source: Source, size: int | None, quality: int, min_size: int) -> tuple[str, bytes]:
    """(suffix, bytes) of an image: its own, or a smaller JPEG. Raises BadImage."""
    data = source.read()
    pixels = decode(data, channels_of(data))
    rows, columns, channels = pixels.shape
    if min(rows, columns) < min_size:
        raise BadImage(f"its shorter side has {min(rows, columns)} pixels, --min-size={min_size}")
    if size is None or min(rows, columns) <= size:
        return Path(source.path).suffix[1:].lower() if source.size < 0 else kind_of(data), data
    factor = size / min(rows, columns)
    smaller = (
        resize(pixels, (round(rows * factor), round(columns * factor)))
        .permute(1, 2, 0)
        .contiguous()
        .numpy()
    )
    if data.startswith(NPY):
        file = io.BytesIO()
        np.save(file, smaller)
        return "npy", file.getvalue()
    if channels != 3:
        file = io.BytesIO()
        tifffile.imwrite(
            file,
            smaller,
            photometric="rgb" if channels == 4 else "minisblack",
            planarconfig="contig",
        )
        return "tif", file.getvalue()
    return "jpg", simplejpeg.encode_jpeg(smaller, quality, "RGB", "420")


def kind_of(data: bytes) -> str:
    """The suffix of an encoded image."""
    if data.startswith(NPY):
        return "npy"
    if data[:4] in TIFF:
        return "tif"  # Pillow does not know all of them
    with Image.open(io.BytesIO(data)) as image:
        name = (image.format or "jpeg").lower()
    return {"jpeg": "jpg", "mpo": "jpg"}.get(name, name if name in IMAGE_SUFFIXES else "png")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # owner, group and time are 0
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _each(
    write: partial[Written], tasks: Iterable[tuple[str, Sequence[Source]]], jobs: int
) -> Iterator[Written]:
    if jobs <= 1:
        yield from map(write, tasks)
        return
    yield from mapped(write, tasks, jobs, fork_server("torch"), partial(torch.set_num_threads, 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Images are left as they are, but for --size; those that cannot be decoded are left "
        "out and listed. "
        "A job that was killed or stopped goes on where it was when the same command is "
        "started again.",
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGES",
        help="a folder with a sub-folder for each class, or with images alone; or a .csv or .tsv "
        "file with the columns"
        " path (from that file's folder) and, if wanted, label; or .parquet files with the "
        "columns image and, if"
        " wanted, label; or .tar files, to be merged and laid out anew",
    )
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="folder of the shards, their index.json and classes.txt; made if need be",
    )
    parser.add_argument(
        "--name", default="train", help="what the shards' names begin with (default: %(default)s)"
    )
    parser.add_argument(
        "--samples", type=_positive, default=1000, help="most in a shard (default: %(default)s)"
    )
    parser.add_argument(
        "--size", type=_positive, help="shorter side, in pixels, of images that have more"
    )
    parser.add_argument(
        "--quality",
        type=_positive,
        default=90,
        help="of the JPEG they become (default: %(default)s)",
    )
    parser.add_argument(
        "--min-size", type=_positive, default=1, help="leave out images with fewer pixels a side"
    )
    parser.add_argument(
        "--classes", type=Path, help="file with a class on each line, in the order of the labels"
    )
    parser.add_argument(
        "--jobs", type=_positive, default=os.cpu_count() or 1, help="processes (default: the cores)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace shards of this name")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    try:
        report = make_shards(
            options.images,
            options.out,
            name=options.name,
            samples=options.samples,
            size=options.size,
            quality=options.quality,
            min_size=options.min_size,
            classes=options.classes and options.classes.read_text("utf-8").splitlines(),
            jobs=options.jobs,
            overwrite=options.overwrite,
            progress=sys.stderr.isatty(),
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    if options.json:
        print(
            json.dumps(
                report._asdict() | {"rejected": [reject._asdict() for reject in report.rejected]},
                indent=1,
            )
        )
        return 0
    print(
        f"{options.out}: {report.samples:,} images of {len(report.classes) or 'no'} classes"
        f" in {len(report.shards)} shards, {report.bytes / 1e6:,.1f} MB"
    )
    if report.kept:
        print(f"  {report.kept:,} shards were there from a job that did not end")
    if report.other_files:
        print(
            f"  {report.other_files:,} other files were not looked at: "
            f"{_some(report.such_as, report.other_files)}"
        )
    for reject in report.rejected:
        print(f"  left out: {reject.path} ({reject.reason})")
    return 0


def _some(names: Sequence[str], of: int) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:_NAMED]) + (f" and {of - _NAMED:,} more" if of > _NAMED else "")


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
