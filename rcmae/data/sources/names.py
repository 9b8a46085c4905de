"""What remote shards are called: in indexes, in a cache. `secrets` has how messages show
them."""

from __future__ import annotations

import hashlib
import os
import re
import urllib.parse

PIPE = "pipe:"
PASSWORD = re.compile(r"(://)[^/@\s]*:[^/@\s]*@")
TAR = re.compile(r"[^\s/\"'=?&]{1,255}\.tar\b")
# names of what signs a request, says when it ends or how the answer is sent; they change each time
_SIGNS = re.compile(
    r"(x-[a-z]+-|awsaccesskeyid|googleaccessid|ossaccesskeyid|key-pair-id|policy|sign|sig=|hmac|"
    r"expir|se=|sp=|sv=|sr=|st=|spr=|sip=|ss=|srt=|sk[a-z]+=|ts=|timestamp|nonce|auth|cred|"
    r"q-(sign|ak|key|header|url)|hdn(ts|ea|tl)=|md5=|exp=|e=\d{9,}$|"
    r"[^=]*(token|secret|passw|apikey|api_key|access_key|session)[^=]*|key=|response-)",
    re.IGNORECASE,
)


def is_remote(path: str) -> bool:
    """Whether a shard is copied into the cache to be read."""
    return path.startswith(PIPE) or "://" in path


def local(path: str) -> str:
    """A `file://` URL as a path; all else as it is."""
    return no_command(path.removeprefix("file://")) if path.startswith("file://") else path


def no_command(path: str) -> str:
    """A path here, by a name that is no command's, whatever the file is called."""
    return f"./{path}" if path.startswith(PIPE) else path


def identity(path: str) -> str:
    """What identifies a shard wherever it is named: absolute path, or URL without password
    and signature. A URL that is signed again keeps it.
    """
    said = asked_for(path)
    return bare(path) + (f"?{'&'.join(said)}" if said else "")


def bare(path: str) -> str:
    """A URL without password and query; an absolute path; a command as it is."""
    if path.startswith(PIPE):
        return path
    if "://" not in path:
        return os.path.abspath(path)
    return PASSWORD.sub(r"\1", re.split(r"[?#]", path, maxsplit=1)[0])


def asked_for(path: str) -> list[str]:
    """The parts `name=value` of a URL's query but those that sign it or say how it is sent."""
    if path.startswith(PIPE) or "://" not in path:
        return []
    query = path.partition("#")[0].partition("?")[2]
    parts = [part for part in query.split("&") if part]
    return [part for part in parts if not _SIGNS.match(part) or _names_a_tar(part)]


def _names_a_tar(part: str) -> bool:
    is_about_sending = part.lower().startswith("response-")
    return not is_about_sending and TAR.search(urllib.parse.unquote(part)) is not None


def basename(path: str) -> str:
    """The file name of a shard.

    Of a command the last word that names a tar, else a name made of its hash; of a URL the tar that
    its query names, if it does.
    """
    if path.startswith(PIPE):
        tars = TAR.findall(path)
        return tars[-1] if tars else f"pipe-{hashlib.sha256(path.encode()).hexdigest()[:12]}.tar"
    for part in asked_for(path):
        if _names_a_tar(part):
            return TAR.findall(urllib.parse.unquote(part))[-1]
    return bare(path).rstrip("/").rpartition("/")[2]


def folder_of(path: str) -> str:
    """The folder that a shard lies in; empty for a command."""
    if path.startswith(PIPE):
        return ""
    return bare(path).rpartition("/")[0] if "://" in path else os.path.dirname(path) or "."
