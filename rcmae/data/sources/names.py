"""What shards from elsewhere are called: in messages, in indexes, in a cache. No message shows a
URL's password or query, or the words of a command."""

from __future__ import annotations

import hashlib
import os
import re

PIPE = "pipe:"
PASSWORD = re.compile(r"(://)[^/@\s]*:[^/@\s]*@")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s'\"<>)\]]+", re.IGNORECASE)


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
        return PASSWORD.sub(r"\1***@", plain) + ("?..." if query else "")

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
        PASSWORD.sub(r"\1", re.split(r"[?#]", path, maxsplit=1)[0])
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
