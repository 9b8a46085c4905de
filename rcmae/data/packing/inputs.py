"""Where images to be packed come from: class folders, lists, Parquet files, other tars.

Each kind gives the same: images with a name and a label, found but not read. `ordered` gives them
their keys and numbers of classes, in an order that mixes the classes: that of a hash of the name.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rcmae import cores
from rcmae.data.index import ShardIndex
from rcmae.data.patterns import expand
from rcmae.data.tars import IMAGE_SUFFIXES, NO_LABEL
from rcmae.errors import Refused
from rcmae.files import aside

_KEY_BYTES = 90  # USTAR has 100 for a name
_NAMED = 5  # of many files that a message is about
_ROWS = 256  # of a Parquet file that are in memory together


class Source(NamedTuple):
    """An image, a file or a part of one, and what it becomes."""

    path: str
    key: str
    label: int | None
    offset: int = 0
    size: int = -1  # bytes; -1: to the end of the file
    name: str = ""  # what messages call it, where that is not the path

    def read(self) -> bytes:
        """The encoded image. Raises OSError."""
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


def some(names: Sequence[str], of: int) -> str:
    """The first few of `of` names, and how many more there are."""
    more = f" and {of - _NAMED:,} more" if of > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def find_images(inputs: Sequence[str], spool: Path) -> Found:
    """The images of some inputs of one kind.

    Args:
        inputs: a folder or a list; or several tars, or several Parquet files.
        spool: a file for the images of Parquet files, which are then read from it by offset.

    Raises:
        Refused: there are none, or the input is not of the form that it should have.
    """
    kinds = {Path(one).suffix.lower() for one in inputs}
    if kinds == {".tar"}:
        return _in_tars(inputs)
    if kinds == {".parquet"}:
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
            suffix = file.rpartition(".")[2].lower()
            is_image = suffix in IMAGE_SUFFIXES and not file.startswith(".")
            (found if is_image else others).append(path)
    if not found:
        raise Refused(
            f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)}) among {len(others)} files"
        )
    alone = sum(os.sep not in path for path in found)
    if 0 < alone < len(found):
        raise Refused(
            f"{folder} holds {alone} images beside class folders; move them into one, or the "
            "folders away"
        )
    images = []
    for path in found:
        label = None if alone else path.split(os.sep, 1)[0]
        images.append(Named(path, label, str(folder / path)))
    return Found(images, others)


def _in_list(path: Path) -> Found:
    rows, lines = _rows_of(path)
    labels = [row.get("label") for row in rows]
    if any(label in (None, "") for label in labels):
        if any(labels):
            raise Refused(
                f"{path}: {sum(not label for label in labels)} of {len(rows)} lines have no label"
            )
        labels = [None] * len(rows)
    are_numbers = all(label is not None and label.isdecimal() for label in labels)
    images = []
    gone = []
    for row, line, label in zip(rows, lines, labels, strict=True):
        file = path.parent / row["path"]
        if not file.is_file():
            gone.append(f"{row['path']} (line {line})")
        number = int(label) if are_numbers and label else label
        images.append(Named(row["path"], number, str(file)))
    if gone:
        raise Refused(f"{path} names {len(gone)} files that are not there: {some(gone, len(gone))}")
    return Found(images)


def _rows_of(path: Path) -> tuple[list[dict[str, str]], list[int]]:
    """(the rows of a list, each with a path; the line of each in its file)."""
    rows: list[dict[str, str]] = []
    lines: list[int] = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
            reader = csv.DictReader(file, delimiter=delimiter)
            for row in reader:
                rows.append(row)
                lines.append(reader.line_num)
            columns = reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Refused(f"{path} cannot be read as a list ({error})") from error
    if not rows or "path" not in columns:
        raise Refused(
            f"{path}: wants a first line with the columns path and, if wanted, label; then "
            "an image a line"
        )
    empty = [str(line) for line, row in zip(lines, rows, strict=True) if not row["path"]]
    if empty:
        raise Refused(
            f"{path} has {len(empty)} lines with an empty path: line {some(empty, len(empty))}"
        )
    return rows, lines


def _in_tars(patterns: Sequence[str]) -> Found:
    index = ShardIndex.open(expand(patterns), jobs=min(8, cores.usable()))
    found = []
    for number in range(len(index)):
        sample = index[number]
        label = None if sample.label == NO_LABEL else sample.label
        found.append(Named(sample.id, label, sample.path, sample.offset, sample.size))
    return Found(found)


def _in_parquet(paths: Sequence[str], spool: Path) -> Found:
    try:
        from pyarrow import ArrowException
    except ImportError as error:
        raise Refused("Parquet files are read with pyarrow: pip install pyarrow") from error
    spool.parent.mkdir(parents=True, exist_ok=True)
    found: list[Named] = []
    with aside(spool) as out:
        for path in paths:
            try:
                for row, (image, label) in enumerate(_rows_of_parquet(path)):
                    data = image.get("bytes") if isinstance(image, dict) else image
                    if not isinstance(data, bytes):
                        raise Refused(f"row {row} of the column image holds no bytes")
                    name = f"{Path(path).stem}/{row:09d}"
                    found.append(Named(name, label, str(spool), out.tell(), len(data)))
                    out.write(data)
            except (OSError, ArrowException, Refused) as error:
                raise Refused(f"{path} cannot be used ({error})") from error
    return Found(found)


def _rows_of_parquet(path: str) -> Iterator[tuple[Any, Any]]:
    """The image and the label of each row of a file. Raises Refused, OSError, ArrowException."""
    from pyarrow import parquet

    table = parquet.ParquetFile(path)
    names = table.schema_arrow.names
    columns = [name for name in ("image", "label") if name in names]
    if "image" not in columns:
        raise Refused(f"no column image; it has {', '.join(names)}")
    for batch in table.iter_batches(batch_size=_ROWS, columns=columns):
        labels = [None] * batch.num_rows
        if "label" in columns:
            labels = batch.column("label").to_pylist()
        yield from zip(batch.column("image").to_pylist(), labels, strict=True)


def ordered(
    images: Sequence[Named], classes: Sequence[str] | None, what: str
) -> tuple[list[Source], list[str]]:
    """(the images in the order of their names' hashes, the names of the classes if they have
    names).

    Args:
        images: each with a name of its own.
        classes: names in the order of the labels; None: in alphabetical order.
        what: what messages call the input.

    Raises:
        Refused: a name is there twice, or a class is none of `classes`.
    """
    names = sorted({image.label for image in images if isinstance(image.label, str)})
    labels = list(classes) if classes is not None and names else names
    unknown = sorted(set(names) - set(labels))
    if unknown:
        raise Refused(
            f"folders of {what} that are no known class: {', '.join(unknown[:10])} "
            f"({len(unknown)} in all)"
        )
    number_of = {label: number for number, label in enumerate(labels)}
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
        number = number_of[image.label] if isinstance(image.label, str) else image.label
        label = number if isinstance(number, int) else None
        called = "" if image.size < 0 else image.name
        sources.append(Source(image.path, key, label, image.offset, image.size, called))
    return sources, labels


def _plain(image: Named) -> str:
    """A key that can stand in a tar, made of the name; others may have the same."""
    if image.size < 0:
        name = os.path.splitext(image.name)[0]
    elif image.path.endswith(".spool"):
        name = image.name
    else:
        name = image.name.rpartition("/")[2]
    return name.lstrip("./").replace(os.sep, "_").replace(".", "_")
