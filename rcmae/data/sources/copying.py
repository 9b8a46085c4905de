"""The bytes of remote shards: copied whole, or a part of them.

What a URL gives is one version of a file, or an error: a file that is replaced while it is copied
is no mixture of both."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, Protocol

from rcmae.data.sources import asking
from rcmae.data.sources.asking import (
    CHANGED,
    USUAL,
    Patience,
    SourceGone,
    Stat,
    asked_stat,
    client_of,
    is_other,
    persist,
    stat_of,
    within,
)
from rcmae.data.sources.names import PIPE
from rcmae.data.sources.secrets import redacted


class Stored(Protocol):
    """What it takes to know a shard when one has it."""

    @property
    def path(self) -> str:
        """Path, URL or `pipe:` command."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def sha256(self) -> str:
        """Of the bytes; empty where it is not known."""

    @property
    def stamp(self) -> str:
        """Of its version (`Stat`); empty where it is not known."""

    @property
    def fingerprint(self) -> str:
        """What the index says of it, hashed."""


class Copied(NamedTuple):
    """What was copied."""

    sha256: str
    stamp: str  # of its version (`Stat`)


def copy(
    path: str,
    file: BinaryIO,
    patience: Patience = USUAL,
    size: int | None = None,
    stamp: str = "",
) -> Copied:
    """Write the bytes of a remote shard into an open file.

    A drop costs the piece that was under way, not what came before it; a command is restarted.

    Args:
        path: URL or command.
        file: empty, at its start.
        patience: with each piece.
        size: bytes that there must be, where it is known.
        stamp: of the version that is wanted (`Stat`); empty: whatever is there.

    Raises:
        SourceGone: it cannot be had, is another version, or changes meanwhile.
        FileNotFoundError: as it says.
    """
    if path.startswith(PIPE):
        ran = persist(path, patience, lambda: _run(path, file, patience.timeout_s, size))
        return Copied(ran, "")

    def look() -> Stat:
        found = asked_stat(path, patience)
        if None not in (found.size, size) and found.size != size:
            raise EOFError(f"it has {found.size} bytes, {size} when it was indexed")
        return found

    begin = persist(path, patience, look)
    if is_other(begin.stamp, stamp):
        raise SourceGone(f"{redacted(path)}: is not what was indexed ({begin.stamp}, was {stamp})")
    digest = hashlib.sha256()
    at = 0
    end = size if size is not None else begin.size
    while end is None or at < end:
        piece = _piece(path, at, end, patience, begin.stamp)
        file.write(piece)
        digest.update(piece)
        at += len(piece)
        end = at if end is None else end
    if at > asking.PIECE:  # one request gives one version
        _refuse_changed(path, file, begin, patience)
    return Copied(digest.hexdigest(), begin.stamp)


def _refuse_changed(path: str, file: BinaryIO, begin: Stat, patience: Patience) -> None:
    """Raise SourceGone where a file that was copied in pieces is another one now.

    A server may ignore conditions, so the version is read again; where it has none, the
    first piece is."""
    client_of(path)[0].invalidate_cache()  # some remember what they were told before
    after = stat_of(path, patience)
    is_changed = is_other(after.stamp, begin.stamp) or after.size != begin.size
    if not is_changed and not (after.stamp and begin.stamp) and begin.size is not None:
        again = _piece(path, 0, begin.size, patience)
        file.seek(0)
        is_changed = file.read(len(again)) != again
        file.seek(0, os.SEEK_END)
    if is_changed:
        raise SourceGone(f"{redacted(path)}: {CHANGED}")


def _condition(url: str, stamp: str) -> dict[str, Any]:
    """Options of a request that a server refuses (412) once the file is another; empty where that
    cannot be asked. A weak tag never matches there.
    """
    kind, _, value = stamp.partition(" ")
    if not url.startswith(("http://", "https://")):
        return {}
    if kind == "etag" and value.startswith('"'):
        return {"headers": {"If-Match": value}}
    if kind == "modified" and value.endswith("GMT"):
        return {"headers": {"If-Unmodified-Since": value}}
    return {}


def _piece(url: str, start: int, end: int | None, patience: Patience, stamp: str = "") -> bytes:
    """The next bytes of a file: a piece of them, up to its end.

    All from there on where the server knows no ranges.
    """
    client, path = client_of(url)
    options = _condition(url, stamp)

    def ask() -> bytes:
        if end is None:
            return within(client, patience.timeout_s, client.cat_file, path, **options)
        stop = min(start + asking.PIECE, end)
        data = within(
            client, patience.timeout_s, client.cat_file, path, start=start, end=stop, **options
        )
        if len(data) == end and (start, stop) != (0, end):
            return data[start:]
        if len(data) != stop - start:
            raise EOFError(f"{len(data)} bytes came of {stop - start}")
        return data

    return persist(url, patience, ask)


def _run(pipe: str, file: BinaryIO, timeout_s: float, size: int | None) -> str:
    """Write what a command prints into a file; gives its SHA-256.

    Raises OSError where it fails or stalls.
    """
    file.seek(0)
    digest = hashlib.sha256()
    came = 0
    with subprocess.Popen(
        pipe.removeprefix(PIPE),
        shell=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            while True:
                if not select.select([process.stdout], [], [], timeout_s)[0]:
                    raise TimeoutError(f"the command said nothing for {timeout_s:g} s")
                data = os.read(process.stdout.fileno(), 2**20)
                if not data:
                    break
                file.write(data)
                digest.update(data)
                came += len(data)
                if size is not None and came > size:
                    raise EOFError(f"the command gave more than the {size} bytes that there were")
            status = process.wait(timeout_s)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if status:
        raise OSError(f"the command ended with status {status} after {came} bytes")
    if size is not None and came != size:
        raise EOFError(f"the command gave {came} bytes of {size}")
    file.truncate()  # an earlier attempt may have given more
    return digest.hexdigest()


def part(path: str, offset: int, size: int, patience: Patience = USUAL) -> bytes:
    """`size` bytes of a remote shard, or as many as are there, without a cache: for a look
    at a few samples.

    Raises:
        SourceGone, FileNotFoundError: as they say.
    """
    if path.startswith(PIPE):
        with fetched(path, patience) as (file, _):
            return pread(file.fileno(), size, offset)
    client, inside = client_of(path)

    def ask() -> bytes:
        data = within(
            client, patience.timeout_s, client.cat_file, inside, start=offset, end=offset + size
        )
        return data if len(data) <= size else data[offset : offset + size]

    return persist(path, patience, ask)


@contextlib.contextmanager
def fetched(path: str, patience: Patience = USUAL) -> Iterator[tuple[BinaryIO, Copied]]:
    """(an open file with the bytes of a remote shard, what was copied), for as long as the
    block runs.

    Raises:
        SourceGone, FileNotFoundError: as `copy`.
    """
    with tempfile.TemporaryFile(prefix="rcmae-") as file:
        copied = copy(path, file, patience)
        file.flush()
        file.seek(0)
        yield file, copied


def pread(file: int, size: int, offset: int) -> bytes:
    """`size` bytes of an open file, or as many as are there."""
    data = os.pread(file, size, offset)
    while 0 < len(data) < size:  # a read may stop early, and at 2 GB does
        more = os.pread(file, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
