"""What shards from elsewhere are called: in messages, in indexes, in a cache. No message shows a
URL's password or query, or the words of a command."""

from __future__ import annotations

import hashlib
import os
import re
import urllib.parse

PIPE = "pipe:"
PASSWORD = re.compile(r"(://)[^/@\s]*:[^/@\s]*@")
_TAR = re.compile(r"[^\s/\"'=?&]{1,255}\.tar\b")
# names of what signs a request, says when it ends or how the answer is sent; they change each time
_SIGNS = re.compile(
    r"(x-[a-z]+-|awsaccesskeyid|googleaccessid|ossaccesskeyid|key-pair-id|policy|sign|sig=|hmac|"
    r"expir|se=|sp=|sv=|sr=|st=|spr=|sip=|ss=|srt=|sk[a-z]+=|ts=|timestamp|nonce|auth|cred|"
    r"[^=]*(token|secret|passw|apikey|api_key|access_key|session)[^=]*|key=|response-)",
    re.IGNORECASE,
)
_URL = re.compile(r"[a-z][a-z0-9+.-]{0,30}://[^\s'\"<>)\]]+", re.IGNORECASE)


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
        named = [name for part in _asked_for(url.group()) for name in _TAR.findall(part)]
        more = f"?...{named[-1]}" if named else "?..."
        return PASSWORD.sub(r"\1***@", plain) + (more if query else "")

    return _URL.sub(shown, text)


def indexing(path: str) -> str:
    """The command that indexes a shard again, as messages name it."""
    out = " --out FOLDER" if is_remote(path) else ""
    return f"rcmae shards index {redacted(path)}{out} --rebuild"


def identity(path: str) -> str:
    """What tells a shard from others wherever it is named: absolute path, or URL without password
    and signature. Signed anew, a URL keeps it.
    """
    said = _asked_for(path)
    return bare(path) + (f"?{'&'.join(said)}" if said else "")


def bare(path: str) -> str:
    """A URL without password and query; an absolute path; a command as it is."""
    if path.startswith(PIPE):
        return path
    if "://" not in path:
        return os.path.abspath(path)
    return PASSWORD.sub(r"\1", re.split(r"[?#]", path, maxsplit=1)[0])


def _asked_for(path: str) -> list[str]:
    """The parts `name=value` of a URL's query but those that sign it or say how it is sent."""
    if path.startswith(PIPE) or "://" not in path:
        return []
    query = path.partition("#")[0].partition("?")[2]
    parts = [part for part in query.split("&") if part]
    return [part for part in parts if not _SIGNS.match(part) or _names_a_tar(part)]


def _names_a_tar(part: str) -> bool:
    is_about_sending = part.lower().startswith("response-")
    return not is_about_sending and _TAR.search(urllib.parse.unquote(part)) is not None


def basename(path: str) -> str:
    """The file name of a shard.

    Of a command the last word that names a tar, else a name made of its hash; of a URL the tar that
    its query names, if it does.
    """
    if path.startswith(PIPE):
        tars = _TAR.findall(path)
        return tars[-1] if tars else f"pipe-{hashlib.sha256(path.encode()).hexdigest()[:12]}.tar"
    for part in _asked_for(path):
        if _names_a_tar(part):
            return _TAR.findall(urllib.parse.unquote(part))[-1]
    return bare(path).rstrip("/").rpartition("/")[2]


def folder_of(path: str) -> str:
    """The folder that a shard lies in; empty for a command."""
    if path.startswith(PIPE):
        return ""
    return bare(path).rpartition("/")[0] if "://" in path else os.path.dirname(path) or "."
