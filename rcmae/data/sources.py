"""Where shards come from: this machine's file systems, any URL that fsspec knows, and the output of
a command.

A shard that lies on a file system is read where it lies, by offset. One from elsewhere (`https://`,
`s3://`, `gs://`, ..., or `pipe:COMMAND` as webdataset has it) is first copied whole into a cache on
the node's disk, which all processes of the node share, and read from there: shards are made to be
read whole, and a store sees one reader a node. Clients find their credentials in their usual places
(environment, ~/.aws, metadata service); nothing here shows a URL's password or query. A `pipe:`
command is the user's own, run by the shell word for word; none is ever put together here.

Long for a module: names, questions and copies share one way to wait and to fail."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import logging
import os
import random
import re
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

from fsspec.core import url_to_fs

from rcmae.config import Recipe
from rcmae.errors import Refused

PIPE = "pipe:"
PIECE = 8 * 2**20  # bytes of a request; each is tried again by itself
_LONGEST_PAUSE_S = 30.0
_SILENT_ATTEMPTS = 3  # a hiccup is nobody's news; then who waits is told why, once
_log = logging.getLogger(__name__)
_AT_ONCE = 16  # requests for sizes under way together
_PASSWORD = re.compile(r"(://)[^/@\s]*:[^/@\s]*@")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s'\"<>)\]]+", re.IGNORECASE)
_PRECONDITION_FAILED = 412  # HTTP
_CHANGED = "changed while it was copied; start again, and index it again if it has changed for good"
_T = TypeVar("_T")


class SourceGone(OSError):
    """A shard that lies elsewhere cannot be had.

    The message says which, what was tried and what came of it.
    """


class AccessDenied(SourceGone):
    """A source does not give it to this user; or, as some stores say it, has no such file."""


class Patience(NamedTuple):
    """How long a source may take, and how often it may fail."""

    timeout_s: float = 60.0  # of a request, or without a byte from a command
    # that fail one after the other; pauses between them double, from half a second to half a minute
    attempts: int = 8
    pause_s: float = 0.5


USUAL = Patience()


def patience(recipe: Recipe) -> Patience:
    """With shards from elsewhere, as a recipe has it."""
    return Patience(recipe.data.source_timeout_s, recipe.data.source_attempts)


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


# -------------------------------------------------------------------------------------------- names


def is_remote(path: str) -> bool:
    """Whether a shard is copied into the cache to be read."""
    return path.startswith(PIPE) or "://" in path


def local(path: str) -> str:
    """A `file://` URL as a path; all else as it is."""
    return path.removeprefix("file://") if path.startswith("file://") else path


def redacted(text: str) -> str:
    """A text without the passwords and queries of the URLs in it, and a command without its
    words.
    """
    if text.startswith(PIPE):
        return f"{PIPE}{text.removeprefix(PIPE).split(maxsplit=1)[0]} ... ({basename(text)})"

    def shown(url: re.Match[str]) -> str:
        plain, *query = re.split(r"[?#]", url.group(), maxsplit=1)
        return _PASSWORD.sub(r"\1***@", plain) + ("?..." if query else "")

    return _URL.sub(shown, text)


def indexing(path: str) -> str:
    """The command that indexes a shard again, as messages name it."""
    out = " --out FOLDER" if is_remote(path) else ""
    return f"rcmae shards index {redacted(path)}{out} --rebuild"


def identity(path: str) -> str:
    """What tells a shard from others wherever it is named: absolute path, or URL without
    password and query.
    """
    if path.startswith(PIPE):
        return path
    return (
        _PASSWORD.sub(r"\1", re.split(r"[?#]", path, maxsplit=1)[0])
        if "://" in path
        else os.path.abspath(path)
    )


def basename(path: str) -> str:
    """The file name of a shard.

    Of a command the last word that names a tar, else a name made of its hash.
    """
    if path.startswith(PIPE):
        tars = re.findall(r"[^\s/\"'=?&]+\.tar\b", path)
        return tars[-1] if tars else f"pipe-{hashlib.sha256(path.encode()).hexdigest()[:12]}.tar"
    return identity(path).rstrip("/").rpartition("/")[2]


def folder_of(path: str) -> str:
    """The folder that a shard lies in; empty for a command."""
    if path.startswith(PIPE):
        return ""
    return identity(path).rpartition("/")[0] if "://" in path else os.path.dirname(path) or "."


def find(pattern: str, patience: Patience = USUAL) -> list[str]:
    """The shards that a path, URL or glob of either names, sorted; a command is itself.

    Raises:
        Refused: the URL holds a password, or its client is not installed.
        OSError: the store cannot be asked.
    """
    pattern = local(pattern)
    if pattern.startswith(PIPE):
        if not pattern.removeprefix(PIPE).strip():
            raise Refused("a command belongs after it, such as pipe:cat data/train-000000.tar")
        return [pattern]
    if "://" not in pattern:
        return (
            sorted(glob.glob(pattern))
            if glob.has_magic(pattern) and not os.path.exists(pattern)
            else [pattern]
        )
    if _PASSWORD.search(pattern):
        raise Refused(
            "its URL holds a password; leave it to the client's own settings, such as ~/.netrc "
            "or ~/.aws"
        )
    client, path = _client(pattern)
    if "*" not in re.split(r"[?#]", pattern, maxsplit=1)[0]:
        return [pattern]
    found = _persist(
        pattern, patience, lambda: _within(client, patience.timeout_s, client.glob, path)
    )
    return sorted(client.unstrip_protocol(each) for each in found)


def _client(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path there.

    Raises ValueError where its package is not installed.
    """
    try:
        client, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise Refused(f"no client for it ({redacted(str(error))})") from error
    return client, path


# ----------------------------------------------------------------------------- asking with patience


def _persist(path: str, patience: Patience, ask: Callable[[], _T]) -> _T:
    """What `ask` gives, tried again while it fails and there is hope.

    Raises:
        SourceGone: it failed for good, or `attempts` times in a row.
        FileNotFoundError: there is no such shard.
    """
    begin = time.monotonic()
    for attempt in range(1, patience.attempts + 1):
        try:
            return ask()
        except MemoryError:
            raise
        except Exception as error:  # clients raise what they like
            cause = error.__cause__ if isinstance(error, FileNotFoundError | TimeoutError) else None
            text = redacted(str(cause or error)) or type(cause or error).__name__
            status = _status(error)
            if _is_missing(error, status):
                raise FileNotFoundError(f"{redacted(path)}: there is no such file") from None
            if status == _PRECONDITION_FAILED:
                raise SourceGone(f"{redacted(path)}: {_CHANGED}") from None
            hopeless = status is not None and 400 <= status < 500 and status not in (408, 425, 429)
            if (
                hopeless
                or isinstance(error, PermissionError)
                or "Credential" in type(error).__name__
            ):
                raise AccessDenied(f"{redacted(path)}: is refused ({text})") from None
            if attempt == patience.attempts:
                raise SourceGone(
                    f"{redacted(path)}: stays away: {attempt} attempts in a row failed in "
                    f"{time.monotonic() - begin:.0f} s, the last with: {text}"
                ) from None
            if attempt == _SILENT_ATTEMPTS:
                _log.warning(
                    "%s: no answer yet (%s); attempt %d of %d is next",
                    redacted(path),
                    text,
                    attempt + 1,
                    patience.attempts,
                )
            pause = min(patience.pause_s * 2 ** (attempt - 1), _LONGEST_PAUSE_S)
            time.sleep(
                max(pause * random.uniform(0.5, 1.0), min(_asked_pause(error), _LONGEST_PAUSE_S))
            )
    raise AssertionError("at least one attempt is made")


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, where there is one; fsspec wraps it."""
    while error is not None:
        status = getattr(error, "status", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def _is_missing(error: BaseException, status: int | None) -> bool:
    """Whether a source says that it has no such file.

    Fsspec says so too of a server that did not answer.
    """
    if status is not None:
        return status in (404, 410)
    cause = error.__cause__
    unanswered = isinstance(cause, TimeoutError | ConnectionError) or type(
        cause
    ).__module__.startswith("aiohttp")
    return isinstance(error, FileNotFoundError) and not unanswered


def _asked_pause(error: BaseException) -> float:
    """Seconds that a server asks its clients to wait."""
    try:
        return float((getattr(error, "headers", None) or {}).get("Retry-After", 0))
    except (ValueError, AttributeError):
        return 0.0


def _within(
    client: Any, timeout_s: float, call: Callable[..., _T], *args: Any, **options: Any
) -> _T:
    """A call of a client, ended after so many seconds. Raises TimeoutError."""
    if client.async_impl:
        return call(*args, timeout=timeout_s, **options)
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(call, *args, **options).result(timeout_s)
    finally:
        pool.shutdown(wait=False)


class Stat(NamedTuple):
    """What tells a file from its next version without reading it."""

    size: int | None  # bytes; None where it is not told
    # when it was written, or what its store calls this version: "mtime NANOSECONDS", "etag TAG" or
    # "modified DATE"; empty where it is not told
    stamp: str


def stamp_of(stat: os.stat_result) -> str:
    """The stamp of a file here."""
    return f"mtime {stat.st_mtime_ns}"


def stat_here(path: str) -> Stat | None:
    """Size and stamp of a file here; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return Stat(found.st_size, stamp_of(found))


def stat_of(path: str, patience: Patience = USUAL) -> Stat:
    """Size and stamp of a shard at a URL; of a command neither is known.

    Raises:
        SourceGone, FileNotFoundError: as it says.
    """
    if path.startswith(PIPE):
        return Stat(None, "")
    return _persist(path, patience, lambda: _asked_stat(path, patience))


def _asked_stat(url: str, patience: Patience) -> Stat:
    client, path = _client(url)
    info = _within(client, patience.timeout_s, client.info, path)
    return Stat(info["size"], _stamp(info))


def _stamp(info: dict[str, Any]) -> str:
    """What a client of fsspec tells of a version: each store has names of its own."""
    known = {key.lower().replace("-", "").replace("_", ""): value for key, value in info.items()}
    if known.get("etag"):
        return f"etag {known['etag']}"
    modified = known.get("lastmodified") or known.get("updated")
    return f"modified {modified}" if modified else ""


def stats(paths: Iterable[str], patience: Patience = USUAL) -> dict[str, Stat | OSError | None]:
    """`stat_of` each, or why it cannot be had.

    Many are asked for at once, and no more once a source stays away.
    """
    gone: list[SourceGone] = []

    def one(path: str) -> Stat | OSError | None:
        if gone:
            return None
        try:
            return stat_of(path, patience)
        except SourceGone as error:
            first = not gone
            gone.append(error)
            return error if first else None
        except OSError as error:
            return error

    paths = list(paths)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(paths, pool.map(one, paths), strict=True))


def small_file(url: str, patience: Patience = USUAL) -> bytes | None:
    """All bytes of a file at a URL, such as an index; None where there is none, or it is refused.

    Raises:
        SourceGone: it may be there, but cannot be had.
    """
    client, path = _client(url)
    try:
        return _persist(
            url, patience, lambda: _within(client, patience.timeout_s, client.cat_file, path)
        )
    except (FileNotFoundError, AccessDenied):
        return None


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
    """Write the bytes of a shard from elsewhere into an open file.

    A drop costs the piece that was under way, not what came before it; a command is started anew.

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
        ran = _persist(path, patience, lambda: _run(path, file, patience.timeout_s, size))
        return Copied(ran, "")

    def look() -> Stat:
        found = _asked_stat(path, patience)
        if None not in (found.size, size) and found.size != size:
            raise EOFError(f"it has {found.size} bytes, {size} when it was indexed")
        return found

    begin = _persist(path, patience, look)
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
    if begin.stamp and not _condition(path, begin.stamp):
        after = stat_of(path, patience)
        if is_other(after.stamp, begin.stamp):
            raise SourceGone(f"{redacted(path)}: {_CHANGED}")
    return Copied(digest.hexdigest(), begin.stamp)


def is_other(stamp: str, before: str) -> bool:
    """Whether two stamps of one kind tell two versions apart."""
    same_kind = stamp.split(" ")[0] == before.split(" ")[0]
    return bool(stamp and before) and same_kind and stamp != before


def _condition(url: str, stamp: str) -> dict[str, Any]:
    """Options of a request that a server refuses (412) once the file is another; empty where that
    cannot be asked. A weak tag never matches there.
    """
    tag = stamp.removeprefix("etag ")
    if url.startswith(("http://", "https://")) and tag != stamp and tag.startswith('"'):
        return {"headers": {"If-Match": tag}}
    return {}


def _piece(url: str, start: int, end: int | None, patience: Patience, stamp: str = "") -> bytes:
    """The next bytes of a file: PIECE of them, up to its end.

    All from there on where the server knows no ranges.
    """
    client, path = _client(url)
    options = _condition(url, stamp)

    def ask() -> bytes:
        if end is None:
            return _within(client, patience.timeout_s, client.cat_file, path, **options)
        stop = min(start + PIECE, end)
        data = _within(
            client, patience.timeout_s, client.cat_file, path, start=start, end=stop, **options
        )
        if len(data) == end and (start, stop) != (0, end):
            return data[start:]
        if len(data) != stop - start:
            raise EOFError(f"{len(data)} bytes came of {stop - start}")
        return data

    return _persist(url, patience, ask)


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
    """`size` bytes of a shard from elsewhere, or as many as are there, without a cache: for a look
    at a few samples.

    Raises:
        SourceGone, FileNotFoundError: as they say.
    """
    if path.startswith(PIPE):
        with fetched(path, patience) as (file, _):
            return pread(file.fileno(), size, offset)
    client, inside = _client(path)

    def ask() -> bytes:
        data = _within(
            client, patience.timeout_s, client.cat_file, inside, start=offset, end=offset + size
        )
        return data if len(data) <= size else data[offset : offset + size]

    return _persist(path, patience, ask)


@contextlib.contextmanager
def fetched(path: str, patience: Patience = USUAL) -> Iterator[tuple[BinaryIO, Copied]]:
    """(an open file with the bytes of a shard from elsewhere, what was copied), for as long as the
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
