"""What lies where in a tar: its members grouped into samples, read from the headers alone.

A shard's part of an index is a table of rows, one a sample, and the samples' keys. Images are then
read by offset, without a tar library."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import tarfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rcmae.data import sources
from rcmae.data.sources import USUAL, Patience
from rcmae.data.workers import mapped

# One row a sample: where its image lies in the tar, its label (-100 = none), where its key lies in
# the shard's keys.
ROW = np.dtype(
    [("offset", "<u8"), ("size", "<u4"), ("label", "<i4"), ("key", "<u4"), ("key_size", "<u2")]
)
NO_LABEL = -100
IMAGE_SUFFIXES = (
    "jpg",
    "jpeg",
    "png",
    "webp",
    "bmp",
    "ppm",
    "pgm",
    "pbm",
    "pnm",
    "tif",
    "tiff",
    "gif",
    "npy",
)
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
# of reading headers before other processes are started to help: that takes seconds itself
_ALONE_S = 2.0


@dataclass(frozen=True)
class Shard:
    """One tar, and where its part of the index table lies: rows, then keys."""

    path: str  # or URL, or `pipe:` command
    size: int  # bytes of the tar when it was indexed
    samples: int
    fingerprint: str  # of name, size, count and table
    table: str | bytes  # the file that holds the part, or the part itself
    at: int = 0  # where the part begins
    length: int = 0  # bytes of the part
    sha256: str = ""  # of the tar, where somebody has read all of it

    @property
    def name(self) -> str:
        """The file name without `.tar`: the first half of a sample id."""
        return sources.basename(self.path).removesuffix(".tar")

    @property
    def rows(self) -> NDArray[np.void]:
        """[samples] of ROW, a view of the table."""
        return np.frombuffer(self._buffer, ROW, self.samples, self.at)

    def key_at(self, at: int, length: int) -> str:
        """The WebDataset key that a row of the table says to lie there among the keys."""
        start = self.at + ROW.itemsize * self.samples + at
        return self._buffer[start : start + length].decode("utf-8", "surrogateescape")

    @property
    def part(self) -> bytes:
        """A copy of this shard's part of the table."""
        return self._buffer[self.at : self.at + self.length]

    @property
    def _buffer(self) -> bytes | mmap.mmap:
        return self.table if isinstance(self.table, bytes) else _mapped(self.table)


@cache
def _mapped(path: str) -> mmap.mmap:
    # A table's name carries its content's hash, so a file that was mapped once never changes under
    # its name.
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class Scan(NamedTuple):
    """What reading a tar's headers gave: a shard or a problem."""

    path: str
    shard: Shard | None = None
    problem: str = ""
    without_image: int = 0  # samples (groups of members with one key) without an image: left out
    bad_labels: int = 0  # samples whose .cls holds no class number: they count as unlabelled


def scan_all(paths: Sequence[str], jobs: int, patience: Patience) -> Iterator[Scan]:
    """`scan` of each tar, in their order; other processes help where it takes seconds."""
    one = partial(scan, patience=patience)
    began, left = time.monotonic(), deque(paths)
    while left and (jobs <= 1 or len(left) == 1 or time.monotonic() - began < _ALONE_S):
        yield one(left.popleft())
    if not left:
        return
    # Not from the fork server: whoever uses it first decides what it has imported, and the stream
    # wants torch there.
    yield from mapped(one, left, min(jobs, len(left)), get_context("spawn"))


def scan(path: str, patience: Patience = USUAL) -> Scan:
    """Read the headers of a tar (USTAR, GNU and PAX) and group its members into samples as
    WebDataset does.

    A key is the member's path up to the first dot of its base name; neighbours with one key are one
    sample. Its image is the member with the plainest image suffix, its label the number in `.cls`.
    A tar from elsewhere is copied whole to do so, and hashed.
    """
    try:
        if not sources.is_remote(path):
            with open(path, "rb") as file:
                return _scan(path, file, "")
        with sources.fetched(path, patience) as (file, digest):
            return _scan(path, file, digest)
    except (tarfile.TarError, OSError) as error:
        told = (
            str(error)
            if isinstance(error, sources.SourceGone | FileNotFoundError) and error.errno is None
            else ""
        )
        return Scan(path, problem=told or f"{sources.redacted(path)}: is no complete tar ({error})")


def _scan(path: str, file: BinaryIO, sha256: str) -> Scan:
    rows: list[tuple[int, int, int, int, int]] = []
    keys: list[bytes] = []
    names: list[str] = []  # the first few, for the message when no sample is found
    without_image = bad_labels = key_at = 0
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for key, members in groups(tar):
            names += [member.name for member in members.values()][: max(0, 3 - len(names))]
            suffix = image_suffix(members)
            if suffix is None:
                without_image += 1
                continue
            label = NO_LABEL
            if (cls := members.get("cls")) is not None:
                try:
                    label = int(os.pread(file.fileno(), min(cls.size, 32), cls.offset_data))
                except ValueError:
                    bad_labels += 1
            image, raw_key = members[suffix], key.encode("utf-8", "surrogateescape")
            rows.append((image.offset_data, image.size, label, key_at, len(raw_key)))
            keys.append(raw_key)
            key_at += len(raw_key)
        if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
            # tarfile takes one cut between members, or in a header, as whole
            raise tarfile.ReadError("no end mark")
        size = os.fstat(file.fileno()).st_size
    if not rows:
        shown = ", ".join(names) or "none"
        return Scan(
            path, problem=f"{sources.redacted(path)}: holds no image (its first members: {shown})"
        )
    part = np.array(rows, ROW).tobytes() + b"".join(keys)
    print_of = hashlib.sha256(
        json.dumps([sources.basename(path), size, len(rows)]).encode() + part
    ).hexdigest()
    where = path if sources.is_remote(path) else os.path.abspath(path)
    shard = Shard(where, size, len(rows), print_of, part, 0, len(part), sha256)
    return Scan(path, shard, "", without_image, bad_labels)


def groups(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """(key, suffix -> member) of each sample of an open tar, in its order.

    Links, folders and devices are left out.
    """
    current: str | None = None
    members: dict[str, tarfile.TarInfo] = {}
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # a shard may have millions: tarfile would keep them all
        match = re.match(r"((?:.*/|)[^.]+)[.]([^/]*)$", member.name, re.DOTALL)
        if match is None or not member.isreg() or member.issparse():
            continue
        key, suffix = match.group(1), match.group(2).lower()
        if key != current:
            if members:
                yield str(current), members
            current, members = key, {}
        members.setdefault(suffix, member)
    if members:
        yield str(current), members


def image_suffix(members: Iterable[str]) -> str | None:
    """The suffix of the member that is a sample's image, if it has one."""
    images = [suffix for suffix in members if suffix.rpartition(".")[2] in IMAGE_SUFFIXES]
    # "jpg" before "mask.png" and before an array; else the first
    return min(images, key=lambda suffix: (suffix.endswith("npy"), suffix.count(".")), default=None)


def not_a_tar(path: str) -> str | None:
    """Why a file here cannot be a tar that is read by offset, by its first bytes; else None."""
    if sources.is_remote(path):
        return None
    try:
        with open(path, "rb") as file:
            block = file.read(tarfile.BLOCKSIZE)
    except OSError as error:
        # absent: _not_a_shard has said it
        return None if not os.path.isfile(path) else f"{path}: {error.strerror}"
    if block.startswith(_COMPRESSED):
        return f"{path}: is compressed; images are read by offset, so unpack it to a plain tar"
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return (
            None
            if not block
            else f"{path}: is not a tar file"
            if any(block)
            else f"{path}: holds no files"
        )
    return None
