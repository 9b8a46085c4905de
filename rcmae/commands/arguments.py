"""What command lines share: numbers, not NaN and not endless; the word for what is to be done;
`--json`.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rcmae.files import write_aside
from rcmae.process.console import in_line

_MOST = 6  # words of a command line that is shown


def from_zero(text: str) -> float:
    """A finite number, 0 or more."""
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text}: must be a finite number, 0 or more")
    return value


def above_zero(text: str) -> float:
    """A finite number above 0."""
    if not (value := from_zero(text)):
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return value


def check_verb(
    parser: argparse.ArgumentParser, words: Sequence[str], verbs: Sequence[str], left_out: str
) -> None:
    """End with status 2 and the command that was meant, where the first word is no verb.

    Args:
        parser: of the command, for its name.
        words: behind the command.
        verbs: what the first of them may be; options before it are the parser's.
        left_out: what a path in their place most likely misses: a verb, or several words.
    """
    if not words or words[0].startswith("-") or words[0] in verbs:
        return
    is_path = "/" in words[0] or os.path.exists(words[0])
    close = [] if is_path else difflib.get_close_matches(words[0], verbs, n=1)
    meant = [close[0], *words[1:]] if close else [*left_out.split(), *words]
    shown = shlex.join(meant[:_MOST]) + (" ..." if len(meant) > _MOST else "")
    several = len(verbs) > 1
    is_none = f"is none of {', '.join(verbs)}" if several else f"is not {verbs[0]!r}"
    parser.error(in_line(f"{words[0]!r} {is_none}; did you mean: {parser.prog} {shown}"))


def add_json(parser: argparse.ArgumentParser) -> None:
    """Give a command whose document is large, or kept, `--json [FILE]`."""
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        type=_document,
        metavar="FILE",
        help="print one JSON document instead of the tables; with FILE, write it there, too",
    )


def _document(text: str) -> str:
    """A place that a document may be written to."""
    if text != "-" and (os.path.isdir(text) or text.endswith((".yaml", ".yml", ".tar"))):
        raise argparse.ArgumentTypeError(
            f"{text} is no place for a document; give FILE.json, or --json behind all else"
        )
    return text


def told(document: Any, to: str | None) -> bool:
    """Print a document, or write it, as `--json` asks; whether it stands for the tables.

    Raises:
        OSError: the file cannot be written.
    """
    if to is None:
        return False
    whole = json.dumps(document, indent=1)
    if to == "-":
        print(whole)
        return True
    write_aside(Path(to), whole + "\n")
    return False
