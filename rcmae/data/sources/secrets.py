"""Secrets in what names data: commands with tokens, URLs with passwords and signatures.

What is shown or passed on is `redacted`; what must stay whole, for a run to resume from it, lies in
a file that is its owner's alone (`holds_secret`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rcmae.data.sources.names import PIPE, TAR, asked_for, is_remote

_USER = re.compile(r"(://)[^\s/]*@")  # to the last @ of the host: a password may hold any other
_URL = re.compile(r"[a-z][a-z0-9+.-]{0,30}://[^\s'\"<>)\]?#]*(?:[?#]\S*)?", re.IGNORECASE)
# a command to the end of its line; not one that is redacted already
_COMMAND = re.compile(r"\bpipe:(?!(?:[\w.+-]+ )?\.\.\. \()(?=[^\s`])[^\n]*")
_FIRST_WORD = re.compile(r"[A-Za-z][\w.+-]*(?=\s|$)")
_VALUE = r"(?:\"[^\"]*\"|'[^']*'|[^\s,;]+)"
_ASSIGNED = re.compile(
    r"\b((?:[A-Z0-9_]{0,40}(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIAL)[A-Z0-9_]{0,40}"
    r"|password|passwd|secret|api_key|access_key|secret_key|auth_token|access_token)\s{0,9}=\s{0,9})"
    + _VALUE
)
_HEADER = re.compile(
    r"(authorization\s*:\s*(?:(?:bearer|basic|token)\s+)?)" + _VALUE, re.IGNORECASE
)


def redacted(text: str) -> str:
    """A text without the passwords and queries of the URLs in it, without the words of a command,
    and without what is assigned to names of secrets. What is redacted already stays as it is.
    """
    text = _COMMAND.sub(_without_words, text)
    text = _USER.sub(r"\1***@", text)
    text = _URL.sub(_without_query, text)
    return _HEADER.sub(r"\1***", _ASSIGNED.sub(r"\1***", text))


def without_secrets(tree: Any) -> Any:
    """A tree of JSON or YAML with every text in it redacted."""
    if isinstance(tree, str):
        return redacted(tree)
    if isinstance(tree, Mapping):
        return {key: without_secrets(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_secrets(value) for value in tree]
    return tree


def holds_secret(tree: Any) -> bool:
    """Whether a text in a tree may hold one: a file of it is to be its owner's alone."""
    if isinstance(tree, str):
        return redacted(tree) != tree
    if isinstance(tree, Mapping):
        return any(holds_secret(value) for value in tree.values())
    if isinstance(tree, list | tuple):
        return any(holds_secret(value) for value in tree)
    return False


def _without_words(command: re.Match[str]) -> str:
    text = command.group().removeprefix(PIPE)
    first = _FIRST_WORD.match(text)
    tars = TAR.findall(text)
    shown = f"{first.group()} ..." if first else "..."
    return f"{PIPE}{shown} ({tars[-1] if tars else 'a command'})"


def _without_query(url: re.Match[str]) -> str:
    plain, *rest = re.split(r"[?#]", url.group(), maxsplit=1)
    if not rest or rest[0].startswith("..."):
        return url.group()
    named = [name for part in asked_for(url.group()) for name in TAR.findall(part)]
    return f"{plain}?...{named[-1] if named else ''}"


def indexing(path: str) -> str:
    """The command that indexes a shard again, as messages name it."""
    out = " --out FOLDER" if is_remote(path) else ""
    return f"rcmae shards index {redacted(path)}{out} --rebuild"
