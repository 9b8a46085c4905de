"""Questions to stores and servers, asked with patience: which shards there are, how large they are,
and what their versions are called.

Clients find their credentials in their usual places (environment, ~/.aws, metadata service)."""

from __future__ import annotations

import errno
import glob
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from fsspec.core import url_to_fs

from rcmae.config import Recipe
from rcmae.data.sources.names import PASSWORD, PIPE, local, no_command
from rcmae.data.sources.secrets import redacted
from rcmae.errors import Refused
from rcmae.files import patiently

PIECE = 8 * 2**20  # bytes of a request; each is tried again by itself
FULL = (errno.ENOSPC, errno.EDQUOT)  # what a disk says that has no room
_LONGEST_PAUSE_S = 30.0
_SILENT_ATTEMPTS = 3  # a hiccup is nobody's news; then who waits is told why, once
_AT_ONCE = 16  # requests for sizes under way together
_PRECONDITION_FAILED = 412  # HTTP
_MAY_PASS = (408, 425, 429)  # HTTP: too slow, too early, too many requests
CHANGED = "changed while it was copied; start again, and index it again if it has changed for good"
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class SourceGone(OSError):
    """A remote shard cannot be read.

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
    """With remote shards, as a recipe has it."""
    return Patience(recipe.data.source_timeout_s, recipe.data.source_attempts)


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
            sorted(map(no_command, glob.glob(pattern)))
            if glob.has_magic(pattern) and not os.path.exists(pattern)
            else [pattern]
        )
    if PASSWORD.search(pattern):
        raise Refused(
            "its URL holds a password; leave it to the client's own settings, such as ~/.netrc "
            "or ~/.aws"
        )
    client, path = client_of(pattern)
    if pattern.startswith("memory://") and not client.store:
        raise Refused(
            "memory:// is the memory of this very process, in which a command has no files; give "
            "a path, or a URL of a store"
        )
    if "*" not in re.split(r"[?#]", pattern, maxsplit=1)[0]:
        return [pattern]
    found = persist(
        pattern, patience, lambda: within(client, patience.timeout_s, client.glob, path)
    )
    return sorted(client.unstrip_protocol(each) for each in found)


def client_of(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path there.

    Raises ValueError where its package is not installed.
    """
    try:
        client, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise Refused(f"no client for it ({redacted(str(error))})") from error
    return client, path


def persist(path: str, patience: Patience, ask: Callable[[], _T]) -> _T:
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
            if isinstance(error, OSError) and error.errno in FULL:
                raise  # of our own disk
            hopeless = _hopeless(path, error)
            if hopeless is not None:
                raise hopeless from None
            text = _said(error)
            if attempt == patience.attempts:
                raise SourceGone(
                    f"{redacted(path)}: unreachable after {attempt} attempts in "
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
            asked_pause = min(_asked_pause(error), _LONGEST_PAUSE_S)
            time.sleep(max(pause * random.uniform(0.5, 1.0), asked_pause))
    raise AssertionError("at least one attempt is made")


def _hopeless(path: str, error: Exception) -> OSError | None:
    """What to raise where asking again changes nothing; None where it may."""
    status = _status(error)
    if _is_missing(error, status):
        return FileNotFoundError(f"{redacted(path)}: there is no such file")
    if type(_cause(error)).__name__ == "TooManyRedirects":  # aiohttp's: no word and no status
        return SourceGone(f"{redacted(path)}: its server redirects in a circle")
    if status == _PRECONDITION_FAILED:
        return SourceGone(f"{redacted(path)}: {CHANGED}")
    is_refused = status is not None and 400 <= status < 500 and status not in _MAY_PASS
    has_no_right = isinstance(error, PermissionError) or "Credential" in type(error).__name__
    if is_refused or has_no_right:
        return AccessDenied(f"{redacted(path)}: is refused ({_said(error)})")
    return None


def _cause(error: Exception) -> BaseException:
    """What went wrong, by itself: fsspec wraps it in what says less."""
    wraps = isinstance(error, FileNotFoundError | TimeoutError)
    return (error.__cause__ if wraps else None) or error


def _said(error: Exception) -> str:
    """What it says, else what it is called."""
    cause = _cause(error)
    return redacted(str(cause)) or type(cause).__name__


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


def within(
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
    """What distinguishes a file from its next version without reading it."""

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
        found = patiently(lambda: os.stat(path))
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
    return persist(path, patience, lambda: asked_stat(path, patience))


def asked_stat(url: str, patience: Patience) -> Stat:
    """Size and stamp of a file at a URL, asked for once. Raises what its client raises."""
    client, path = client_of(url)
    info = within(client, patience.timeout_s, client.info, path)
    return Stat(info["size"], _stamp(info))


def _stamp(info: dict[str, Any]) -> str:
    """The version that a client of fsspec reports: each store has its own names for it."""
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


def is_other(stamp: str, before: str) -> bool:
    """Whether two stamps of one kind tell two versions apart."""
    same_kind = stamp.split(" ")[0] == before.split(" ")[0]
    return bool(stamp and before) and same_kind and stamp != before


def small_file(url: str, patience: Patience = USUAL) -> bytes | None:
    """All bytes of a file at a URL, such as an index; None where there is none, or it is refused.

    Raises:
        SourceGone: it may be there, but cannot be had.
    """
    client, path = client_of(url)
    try:
        return persist(
            url, patience, lambda: within(client, patience.timeout_s, client.cat_file, path)
        )
    except (FileNotFoundError, AccessDenied):
        return None
