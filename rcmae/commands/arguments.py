"""What command lines share: numbers, not NaN and not endless; the word for what is to be done."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import shlex
from collections.abc import Sequence

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
