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
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from rcmae.data import sources
from rcmae.data.index import ShardIndex
from rcmae.data.members.registry import kinds
from rcmae.data.packing.coco import in_coco
from rcmae.data.packing.folders import (
    ALIASES,
    class_of,
    heic_hint,
    notes_of,
    walked,
    without_images,
)
from rcmae.data.packing.found import (
    NO_TARGETS,
    Found,
    Labelling,
    Named,
    Other,
    Source,
    Targets,
    some,
)
from rcmae.data.packing.labels import (
    Taken,
    column_of,
    in_order,
    order_doubt,
    read_labels,
    refuse_names,
)
from rcmae.data.packing.layouts import in_folders, layout_of
from rcmae.data.packing.members import files_beside
from rcmae.data.patterns import expand
from rcmae.data.sets import class_lists
from rcmae.data.tars import IMAGE_SUFFIXES, NO_LABEL
from rcmae.errors import Refused, counted
from rcmae.files import aside
from rcmae.process import cores

_KEY_BYTES = 90  # USTAR has 100 for a name
_ROWS = 256  # of a Parquet file that are in memory together


def find_images(
    inputs: Sequence[str], spool: Path, how: Labelling, targets: Targets = NO_TARGETS
) -> Found:
    """The images of some inputs of one kind.

    Args:
        inputs: a folder or a list; or several tars, or several Parquet files.
        spool: a file for the images of Parquet files or COCO's annotations, which are then read
            from it by offset.
        how: labels are meant.
        targets: maps and annotations, where they lie apart from the images.

    Raises:
        Refused: there are none, or the input is not of the form that it should have.
    """
    if targets.coco is not None or targets.maps is not None:
        return _with_targets(inputs, spool, targets)
    if len(inputs) == 1 and (layout := layout_of(Path(inputs[0]))) is not None:
        return layout.found(Path(inputs[0]), targets.split)
    if targets.split is not None:
        raise Refused("--split is of ADEChallengeData2016, Cityscapes or VOC; none of them is here")
    kinds = {Path(one).suffix.lower() for one in inputs}
    if kinds == {".parquet"}:
        return _in_parquet(inputs, spool, how)
    if len(inputs) == 1 and kinds <= {".csv", ".tsv"}:
        return _in_list(Path(inputs[0]), how)
    if how.column is not None:
        raise Refused("--label names a column of a .csv, .tsv or .parquet file")
    if kinds == {".tar"}:
        return _in_tars(inputs, how)
    if len(inputs) > 1:
        folders = all(Path(one).is_dir() for one in inputs)
        way = "; of images and their label maps: --images A --maps B" if folders else ""
        raise Refused(
            "several inputs are .tar or .parquet files, all of one kind; got "
            f"{', '.join(inputs[:5])}{way}"
        )
    return _in_folder(Path(inputs[0]), how.has_classes)


def _with_targets(inputs: Sequence[str], spool: Path, targets: Targets) -> Found:
    """Images in a folder, and their maps or annotations elsewhere. Raises Refused."""
    if targets.coco is not None and targets.maps is not None:
        raise Refused("give --coco or --maps, not both")
    if len(inputs) != 1 or not Path(inputs[0]).is_dir():
        what = "--coco" if targets.coco is not None else "--maps"
        gone = [one for one in inputs if not Path(one).exists()]
        why = f"; there is no {', '.join(gone[:5])}" if gone else ""
        raise Refused(f"{what} goes with one folder of images; got {', '.join(inputs[:5])}{why}")
    folder = Path(inputs[0])
    if targets.maps is not None:
        return in_folders(folder, Path(targets.maps))
    assert targets.coco is not None
    return in_coco(Path(targets.coco), folder, spool, keep_empty=targets.keep_empty)


def _in_folder(folder: Path, has_classes: bool) -> Found:
    if not folder.is_dir():
        raise Refused(
            f"{folder} is not a folder of images, nor a .csv, .tsv, .parquet or .tar file"
        )
    found = walked(folder)
    if not found.images:
        hint = heic_hint(found.others)
        raise Refused(
            f"{folder} holds no image ({', '.join([*IMAGE_SUFFIXES, *ALIASES])}) among "
            f"{counted(len(found.others), 'file')}{f'; {hint}' if hint else ''}"
        )
    alone = sum(os.sep not in path for path in found.images)
    if 0 < alone < len(found.images):
        loose = counted(alone, "image")
        raise Refused(
            f"{folder} holds {loose} beside class folders; move them into one, or the folders away"
        )
    notes = notes_of(found)
    if not alone:
        empty = without_images(folder, found)
        if empty and not has_classes:
            raise Refused(
                f"{folder} has class folders without an image: {some(empty, len(empty))}; as they "
                "would shift the labels of others, add images, move them away, or name all "
                "classes with --classes"
            )
        if empty:
            notes.append(f"class folders without an image: {some(empty, len(empty))}")
        if doubt := order_doubt(in_order(map(class_of, found.images))):
            notes += [] if has_classes else [doubt]
    images = []
    for path in found.images:
        images.append(Named(path, class_of(path) or None, str(folder / path)))
    return Found(images, found.others, notes)


def _in_list(path: Path, how: Labelling) -> Found:
    rows, lines, columns = _rows_of(path)
    try:
        where = column_of("path", columns)
        if where is None:
            raise Refused(
                "needs a first line with the columns path and, optionally, label; then an image a "
                f"line; it has {', '.join(map(repr, columns)) or 'none'}"
            )
        column = label_column(columns, how)
        taken = Taken([None] * len(rows), no_labels(columns, how))
        if column is not None:
            cells = [row[column] for row in rows]
            taken = read_labels(
                column,
                cells,
                lambda row: f"line {lines[row]}",
                gaps=how.gaps,
                has_classes=how.has_classes,
            )
    except Refused as error:
        raise Refused(f"{path}: {error}") from error
    empty = [str(line) for line, row in zip(lines, rows, strict=True) if not row[where]]
    if empty:
        raise Refused(
            f"{path} has {len(empty)} lines with an empty path: line {some(empty, len(empty))}"
        )
    images = []
    gone = []
    maps = column_of("map", columns)
    for row, line, number in zip(rows, lines, taken.labels, strict=True):
        file = path.parent / row[where]
        files = [(row[where], file)]
        others: tuple[Other, ...] = ()
        if maps is not None:
            others = (Other("map", str(path.parent / row[maps])),)
            files.append((row[maps] or "an empty map", path.parent / row[maps]))
        gone += [f"{name} (line {line})" for name, each in files if not each.is_file()]
        images.append(Named(row[where], number, str(file), others=others))
    if gone:
        raise Refused(
            f"{path} names {counted(len(gone), 'file')} not there: {some(gone, len(gone))}"
        )
    _refuse_links(path, images)
    return Found(images, notes=[taken.told])


def label_column(names: Sequence[str], how: Labelling) -> str | None:
    """The column of labels; None: there is none. Raises as `column_of`."""
    if how.column == "none":
        return None
    return column_of("label", names, how.column, likely=True)


def no_labels(columns: Sequence[str], how: Labelling) -> str:
    """What is said where no column has labels."""
    if how.column == "none":
        return "images without labels, as requested"
    names = ", ".join(map(repr, columns))
    return f"no column label among {names}: images without labels (--label COLUMN names another)"


def _refuse_links(path: Path, images: Sequence[Named]) -> None:
    """Raise Refused where lines of a list name one file under several names."""
    folder_of = cache(os.path.realpath)
    met: dict[str, str] = {}
    twice = []
    for image in images:
        head, tail = os.path.split(image.path)
        real = os.path.join(folder_of(head), tail)
        if os.path.islink(real):
            real = os.path.realpath(real)
        first = met.setdefault(real, image.name)
        if first != image.name:
            twice.append(f"{image.name} is {first}")
    if twice:
        count = counted(len(twice), "image")
        raise Refused(f"{path} names {count} more than once: {some(twice, len(twice))}")


def _rows_of(path: Path) -> tuple[list[dict[str, str]], list[int], list[str]]:
    """(the rows of a list; the line of each in its file; the names of the columns)."""
    rows: list[dict[str, str]] = []
    lines: list[int] = []
    try:
        # spreadsheets begin a file with a byte order mark, and people put a space behind a comma
        with path.open(newline="", encoding="utf-8-sig") as file:
            delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
            reader = csv.DictReader(file, delimiter=delimiter, skipinitialspace=True)
            for row in reader:
                if None in row:
                    raise Refused(f"{path}: line {reader.line_num} has more cells than the first")
                rows.append(row)
                lines.append(reader.line_num)
            columns = list(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Refused(f"{path} cannot be read as a list ({error})") from error
    if not rows:
        raise Refused(
            f"{path}: needs a first line with the columns path and, optionally, label; then "
            "an image a line"
        )
    return rows, lines, columns


def _in_tars(patterns: Sequence[str], how: Labelling) -> Found:
    wanted = list(kinds())
    index = ShardIndex.open(expand(patterns), jobs=min(8, cores.usable()), needs=wanted)
    index.tell_unused()
    found = []
    met: set[str] = set()
    for number in range(len(index)):
        sample = index[number]
        label = None if sample.label == NO_LABEL else sample.label
        others = tuple(
            Other(member.kind, sample.path, member.offset, member.size)
            for member in index.members(number)
            if member.kind in wanted
        )
        met |= {other.kind for other in others}
        found.append(Named(sample.id, label, sample.path, sample.offset, sample.size, others))
    folders = {sources.folder_of(shard.path) for shard in index.shards}
    files = files_beside(folders, met)
    labels = [image.label for image in found if isinstance(image.label, int)]
    if not labels or how.has_classes or "map" in met:  # of maps: files_beside has them
        return Found(found, files=files)
    names, notes = _names_beside(index, max(labels))
    return Found(found, notes=notes, classes=names, files=files)


def _names_beside(index: ShardIndex, most: int) -> tuple[Sequence[str] | None, list[str]]:
    """Names of the classes beside tars, and what is to be told. `most`: the largest label."""
    lists = {each.names for each in class_lists(index)}
    names = lists.pop() if len(lists) == 1 else ()
    if len(names) > most:
        return names, []
    why = "are of other classes" if lists or names else "have no classes.txt beside them"
    return None, [f"labels up to {most}, without names: the tars {why}; --classes FILE gives them"]


def _in_parquet(paths: Sequence[str], spool: Path, how: Labelling) -> Found:
    try:
        from pyarrow import ArrowException
    except ImportError as error:
        raise Refused("Parquet files are read with pyarrow: pip install pyarrow") from error
    spool.parent.mkdir(parents=True, exist_ok=True)
    names = _names_of(paths)
    found: list[Named] = []
    cells: list[Any] = []
    columns: dict[str | None, str] = {}  # column of labels -> the first file that has it
    others: Sequence[str] = ()  # all columns
    with aside(spool) as out:
        for path in paths:
            try:
                table = parquet_of(path, how)
                columns.setdefault(table.label, path)
                others = table.file.schema_arrow.names
                for row, (image, cell) in enumerate(table.rows()):
                    data = image.get("bytes") if isinstance(image, dict) else image
                    if not isinstance(data, bytes):
                        raise Refused(f"row {row} of the column image holds no bytes")
                    name = f"{names[path]}/{row:09d}"
                    found.append(Named(name, None, str(spool), out.tell(), len(data)))
                    cells.append(cell)
                    out.write(data)
            except (OSError, ArrowException, Refused) as error:
                raise Refused(f"{path} cannot be used ({error})") from error
    if len(columns) > 1:
        told = ", ".join(f"{column!r} in {path}" for column, path in columns.items())
        raise Refused(f"labels are in other columns of the files: {told}; pack them apart")
    column = next(iter(columns), None)
    if column is None:
        return Found(found, notes=[no_labels(others, how)])
    taken = read_labels(
        column,
        cells,
        lambda row: f"row {found[row].name}",
        gaps=how.gaps,
        has_classes=how.has_classes,
    )
    images = [
        image._replace(label=number) for image, number in zip(found, taken.labels, strict=True)
    ]
    return Found(images, notes=[taken.told])


def _names_of(paths: Sequence[str]) -> dict[str, str]:
    """Path -> a name of each Parquet file: its own, with as many folders as tell them apart.

    Raises:
        Refused: a file is there twice.
    """
    real: dict[str, str] = {}
    for path in paths:
        first = real.setdefault(os.path.realpath(path), path)
        if first is not path:
            raise Refused(f"{path} is {first}, named twice")
    whole = {path: Path(os.path.abspath(path)).with_suffix("").parts for path in paths}
    for count in range(1, 1 + max(map(len, whole.values()))):
        names = {path: "/".join(parts[-count:]).lstrip("/") for path, parts in whole.items()}
        if len({*names.values()}) == len(names):
            break
    return names


class ParquetTable(NamedTuple):
    """A Parquet file of images."""

    file: Any  # pyarrow's
    label: str | None  # the column of labels

    def rows(self) -> Iterator[tuple[Any, Any]]:
        """The image and the label of each row. Raises OSError, ArrowException."""
        columns = ["image", *([] if self.label is None else [self.label])]
        for batch in self.file.iter_batches(batch_size=_ROWS, columns=columns):
            labels = [None] * batch.num_rows
            if self.label is not None:
                labels = batch.column(self.label).to_pylist()
            yield from zip(batch.column("image").to_pylist(), labels, strict=True)


def parquet_of(path: str, how: Labelling) -> ParquetTable:
    """A Parquet file, opened, and which of its columns has the labels.

    Raises:
        Refused: it has no images, or it is not clear where the labels are.
        OSError, ArrowException: it cannot be read.
    """
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    names = file.schema_arrow.names
    if "image" not in names:
        raise Refused(f"no column image; it has {', '.join(names)}")
    return ParquetTable(file, label_column(names, how))


def held_out(images: Sequence[Named], share: float, what: str) -> set[tuple[str, int]]:
    """Path and offset of the images that a draw by their names holds out: an image stays on its
    side whatever comes beside it.

    Raises:
        Refused: all are held out, or none is.
    """
    held = {(image.path, image.offset) for image in images if _draw(image.name) < share}
    if not held or len(held) == len(images):
        raise Refused(
            f"--hold-out {share:g} of the {counted(len(images), 'image')} of {what} would hold out "
            f"{len(held)}; give {'a larger' if not held else 'a smaller'} share, or more images"
        )
    return held


def _draw(name: str) -> float:
    """From 0 to 1, by the name alone; another number than that of the order."""
    digest = hashlib.sha256(b"hold out:" + os.fsencode(name)).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def ordered(
    images: Sequence[Named], classes: Sequence[str] | None, what: str
) -> tuple[list[Source], list[str]]:
    """(the images in the order of their names' hashes, the names of the classes if they have
    names).

    Args:
        images: each with a name of its own.
        classes: names in the order of the labels; None: as `in_order`.
        what: what messages call the input.

    Raises:
        Refused: a name is there twice, or a class is none of `classes`.
    """
    names = in_order(image.label for image in images if isinstance(image.label, str))
    labels = names if classes is None else list(classes)
    refuse_names(labels, "--classes" if classes is not None else what)
    unknown = sorted(set(names) - set(labels))
    if unknown:
        raise Refused(
            f"folders of {what} that are not known classes: {', '.join(unknown[:10])} "
            f"({len(unknown)} in all)"
        )
    highest = max((image.label for image in images if isinstance(image.label, int)), default=-1)
    if classes is not None and highest >= len(labels):
        raise Refused(f"{what} has the label {highest}, --classes names only {len(labels)} classes")
    if not names and highest < 0:
        labels = []  # nothing is labelled
    number_of = {label: number for number, label in enumerate(labels)}
    hashes = {image.name: hashlib.sha256(os.fsencode(image.name)).hexdigest() for image in images}
    if len(hashes) < len(images):
        twice = Counter(image.name for image in images).most_common(1)[0][0]
        count = counted(len(images) - len(hashes), "image")
        raise Refused(f"{what} names {count} more than once, such as {twice}")
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
        sources.append(
            Source(image.path, key, label, image.offset, image.size, called, image.others)
        )
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
