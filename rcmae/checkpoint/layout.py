"""Where the elements of each tensor lie among the files of a checkpoint.

A flattened tensor is cut into runs, laid end to end, each in one file. 1,024 ranks have a million
and a half of them, so they are arrays here and in the manifest: a layout is written as triples
(first file, number of files, elements in each), which stand for so many runs in files that follow
each other, and tensors that are cut alike (a weight, its moments, its average) share one.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Runs = list[tuple[str, int, int]]  # file, first element, number of elements


class Layout:
    """The runs of a flattened tensor, from its first element to its last.

    Args:
        files: of each run the number of its file, among the sorted names.
        lengths: of each run its elements.
    """

    def __init__(self, files: np.ndarray, lengths: np.ndarray) -> None:
        self.files = files
        self.ends = np.cumsum(lengths, dtype=np.int64)
        self.starts = self.ends - lengths

    def __len__(self) -> int:
        return len(self.files)

    @property
    def elements(self) -> int:
        """Of all runs."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def within(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(file, first element, end) of the runs that hold elements [start, stop)."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.starts, stop, side="left"))
        for run in range(first, last):
            yield int(self.files[run]), int(self.starts[run]), int(self.ends[run])

    def triples(self) -> list[int]:
        """As the manifest has it: first file, number of files, elements in each; and so on."""
        lengths = self.ends - self.starts
        if not len(lengths):
            return []
        breaks = (np.diff(self.files) != 1) | (np.diff(lengths) != 0)
        begins = np.concatenate([[0], np.flatnonzero(breaks) + 1])
        counts = np.diff(np.append(begins, len(lengths)))
        return np.stack([self.files[begins], counts, lengths[begins]], axis=1).ravel().tolist()


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint."""

    shape: list[int]
    dtype: str  # F32, BF16, ...
    layout: Layout

    @property
    def elements(self) -> int:
        """By its shape."""
        return math.prod(self.shape)


# ---------------------------------------------------------------------------------- in the manifest


def described(tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """The manifest's `layouts` and `tensors`: key -> type, shape, number of its layout."""
    layouts: dict[tuple[int, ...], int] = {}
    numbers: dict[int, int] = {}  # of a layout that is shared already, by its identity
    rows = {}
    for key, stored in tensors.items():
        number = numbers.get(id(stored.layout))
        if number is None:
            number = layouts.setdefault(tuple(stored.layout.triples()), len(layouts))
            numbers[id(stored.layout)] = number
        rows[key] = [stored.dtype, stored.shape, number]
    return {"layouts": [list(triples) for triples in layouts], "tensors": rows}


def understood(document: Mapping[str, Any], files: Sequence[str]) -> dict[str, Stored]:
    """The tensors of a manifest of any format that is read.

    Args:
        document: of it.
        files: its files' names, sorted.

    Raises:
        ValueError, TypeError, KeyError, OverflowError: it says what no save writes.
    """
    if document["format"] == 1:
        places = {name: number for number, name in enumerate(files)}
        old = document["tensors"].items()
        return {key: _of_objects(key, row, places) for key, row in old}
    layouts = [_of_triples(triples, len(files)) for triples in document["layouts"]]
    found = {}
    for key, (dtype, shape, number) in document["tensors"].items():
        if type(number) is not int or number < 0:
            raise ValueError(f"{key} has layout {number!r}")
        found[key] = _checked(key, Stored(shape, dtype, layouts[number]))
    return found


def _of_triples(triples: Sequence[int], num_files: int) -> Layout:
    if any(type(number) is not int or number < 0 for number in triples):
        raise ValueError(f"a layout has {triples[:9]!r}")
    table = np.array(triples, dtype=np.int64).reshape(-1, 3)
    first, counts, lengths = table.T
    if len(table) and int((first + counts).max()) > num_files:
        raise ValueError("a layout names a file that is not there")
    begins = np.cumsum(counts) - counts
    within = np.arange(int(counts.sum())) - np.repeat(begins, counts)
    return Layout(np.repeat(first, counts) + within, np.repeat(lengths, counts))


def _of_objects(key: str, row: Mapping[str, Any], places: Mapping[str, int]) -> Stored:
    """A tensor as format 1 has it, with an object a run."""
    covered = 0
    for file, start, length in row["runs"]:
        if file not in places:
            raise ValueError(f"{key}: {file!r} is not among the files")
        if start != covered or type(length) is not int or length < 0:
            raise ValueError(f"{key}: a run starts at {start}, the ones before end at {covered}")
        covered += length
    files = np.array([places[file] for file, _, _ in row["runs"]], dtype=np.int64)
    lengths = np.array([length for _, _, length in row["runs"]], dtype=np.int64)
    return _checked(key, Stored(row["shape"], row["dtype"], Layout(files, lengths)))


def _checked(key: str, stored: Stored) -> Stored:
    """The tensor, if its runs hold what its shape says. Raises ValueError or TypeError."""
    if any(type(size) is not int or size < 0 for size in stored.shape):
        raise ValueError(f"{key} has shape {stored.shape!r}")
    if stored.layout.elements != stored.elements:
        raise ValueError(f"{key}: {stored.layout.elements} elements for {stored.shape}")
    return stored


# -------------------------------------------------------------------------------- while it is saved


class Written(NamedTuple):
    """The runs that one rank wrote into its file, small enough to be sent to another."""

    keys: bytes  # of each run its tensor, compressed text
    starts: np.ndarray
    lengths: np.ndarray
    dtypes: tuple[str, ...]


def written(runs: Sequence[tuple[str, int, int, str]]) -> Written:
    """Of (key, start, length, dtype) of each run."""
    return Written(
        keys=zlib.compress("\n".join(key for key, _, _, _ in runs).encode(), 1),
        starts=np.array([start for _, start, _, _ in runs], dtype=np.int64),
        lengths=np.array([length for _, _, length, _ in runs], dtype=np.int64),
        dtypes=tuple(dtype for _, _, _, dtype in runs),
    )


def assembled(
    shapes: Mapping[str, tuple[int, ...]], reports: Sequence[Written]
) -> dict[str, Stored]:
    """All tensors, from what each file holds.

    Args:
        shapes: by the names behind the kind.
        reports: of each file, in the order of their sorted names.
    """
    numbers: dict[str, int] = {}  # key -> its number, in the order of their first runs
    dtypes: dict[str, str] = {}
    known: dict[bytes, np.ndarray] = {}  # most ranks hold a part of every tensor
    tensor = []
    for report in reports:
        if report.keys not in known:
            text = zlib.decompress(report.keys).decode()
            keys = text.split("\n") if text else []
            found = [numbers.setdefault(key, len(numbers)) for key in keys]
            known[report.keys] = np.array(found, dtype=np.int64)
            dtypes |= dict(zip(keys, report.dtypes, strict=True))
        tensor.append(known[report.keys])
    counts = [len(report.starts) for report in reports]
    tensors = np.concatenate(tensor)
    files = np.repeat(np.arange(len(reports)), counts)
    starts = np.concatenate([report.starts for report in reports])
    lengths = np.concatenate([report.lengths for report in reports])
    order = np.lexsort((lengths, starts, tensors))  # an empty run before the one that begins there
    tensors, files, starts, lengths = (
        values[order] for values in (tensors, files, starts, lengths)
    )
    bounds = np.searchsorted(tensors, np.arange(len(numbers) + 1))
    shared: dict[tuple[bytes, bytes], Layout] = {}
    table = {}
    for key, number in numbers.items():
        mine = slice(bounds[number], bounds[number + 1])
        cut = (files[mine].tobytes(), lengths[mine].tobytes())
        layout = shared.setdefault(cut, Layout(files[mine], lengths[mine]))
        stored = Stored(list(shapes[key.partition("/")[2]]), dtypes[key], layout)
        assert np.array_equal(layout.starts, starts[mine]), f"{key}: its runs leave gaps or overlap"
        assert layout.elements == stored.elements, f"{key}: {layout.elements} of {stored.shape}"
        table[key] = stored
    return table
