"""The one error that is the user's: everything else that is raised is ours, or the machine's."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Refused(ValueError):
    """Something that a user gave cannot be used: says what, what was got, and the way out.

    Entry points print it and exit with 2. A plain ValueError is a bug of this package: it ends with
    a traceback and exit status 1.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: a similar one, else all known names."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun: "1 rank", "2 ranks"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
