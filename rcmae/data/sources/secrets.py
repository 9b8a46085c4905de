"""Secrets in what names data: commands with tokens, URLs with passwords and signatures.

What is shown or passed on is `redacted`; what must stay whole, for a run to resume from it, lies in
a file that is its owner's alone (`holds_secret`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rcmae.data.sources.names import PIPE, TAR, asked_for, is_remote

_USER = re.compile(r"(://)[^\s/]*@")  # to the last @ of the host: a password may hold any other
_URL = re.compile(
    r"[a-z][a-z0-9+.-]{0,30}://(?:(?!%3f)[^\s'\"<>)\]?#])*(?:(?:[?#]|%3f)\S*)?", re.IGNORECASE
)
# a command to the end of its line; not one that is redacted already
_COMMAND = re.compile(r"\bpipe:(?!(?:[\w.+-]+ )?\.\.\. \()(?=[^\s`])[^\n]*")
_FIRST_WORD = re.compile(r"[A-Za-z][\w.+-]*(?=\s|$)")
_VALUE = r"(?!\*\*\*)(?:\"[^\"]*\"|'[^']*'|[^\s,;]+)"
_BEFORE = r"[a-z0-9_.-]{0,40}"  # of a name that ends so: aws_, x-amz-
_KEY = r"(?:api|access|account|secret|private)[_-]?key(?:_id)?"
_TOKEN = r"(?:access|auth|bearer|github|gitlab|hf|id|refresh|security|session|wandb)[_-]?token"
_NAME = rf"(?:{_BEFORE}(?:password|passwd|passphrase|secret|{_KEY}|{_TOKEN})|sig|signature)"
_ASSIGNED = re.compile(
    r"\b((?:[A-Z0-9_]{0,40}(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIAL)[A-Z0-9_]{0,40}"
    rf"|(?i:{_NAME}))[\"']?\s{{0,9}}[=:]\s{{0,9}})" + _VALUE
)
_QUOTED = re.compile(r"([\"']token[\"']\s{0,9}:\s{0,9})" + _VALUE)  # of JSON
_OPTION = re.compile(
    r"(--(?:password|secret|(?:[a-z]{1,20}-)?(?:key|token))\s{1,9}|(?:-u|--user)\s{1,9}[^\s:]{1,99}:)"
    + _VALUE
)
# of a URL or a connection, wherever it is cut: ;AccountKey=, &x-sig=
_PARAMETER = re.compile(
    r"([;&?][a-z0-9_.-]{0,40}(?:key|password|secret|sig|signature|token)=)[^\s&;'\"]+",
    re.IGNORECASE,
)
_HEADER = re.compile(
    r"((?:authorization|x-[a-z-]{1,30}(?:key|token)|private-token)\s*:\s*(?:(?:bearer|basic|token)\s+)?+)"
    + _VALUE,
    re.IGNORECASE,
)
_COOKIE = re.compile(r"(cookie\s*:\s*)[^\n\"']+", re.IGNORECASE)
_BEARER = re.compile(r"(\bbearer\s{1,9})[\w.~+/=-]{8,}", re.IGNORECASE)
_OTHERS = (_HEADER, _COOKIE, _BEARER, _ASSIGNED, _QUOTED, _OPTION, _PARAMETER)


def redacted(text: str) -> str:
    """A text without the passwords and queries of the URLs in it, without the words of a command,
    and without what is assigned to names of secrets. What is redacted already stays as it is.
    """
    text = _COMMAND.sub(_without_words, text)
    text = _USER.sub(r"\1***@", text)
    text = _URL.sub(_without_query, text)
    for kind in _OTHERS:
        text = kind.sub(r"\1***", text)
    return text


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
    plain, *rest = re.split(r"[?#]|%3[fF]", url.group(), maxsplit=1)
    if not rest or rest[0].startswith("..."):
        return url.group()
    named = [name for part in asked_for(url.group()) for name in TAR.findall(part)]
    return f"{plain}?...{named[-1] if named else ''}"


def indexing(path: str) -> str:
    """The command that indexes a shard again, as messages name it."""
    out = " --out FOLDER" if is_remote(path) else ""
    return f"rcmae shards index {redacted(path)}{out} --rebuild"
