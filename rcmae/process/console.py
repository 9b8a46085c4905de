"""Standard output and error that are never a reason to stop.

Whoever reads them may leave (`| head`, a `tee` that died, a terminal that is closed), and the disk
under a log may be full. A training continues without them: its files have what counts.

Names that come from data (keys, classes, paths, URLs) may hold what a terminal obeys. They are
shown escaped: by `say` and `printable` where they are printed, and by the streams behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import sys
from typing import Any, TextIO, cast

# nobody will read from there again; a disk may have room again
_FOR_GOOD = (errno.EPIPE, errno.EIO, errno.EBADF)


# what a terminal obeys: control characters but line end and tab, and those that turn text round
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# of those, what tables and bars are drawn with: colours, moves within the bar, the cursor
_DRAWN = re.compile("\x1b\\[(?:[0-9;]*[mKAG]|\\?25[lh])|\r")


def printable(text: str) -> str:
    """The text with all that a terminal would obey shown escaped; line ends and tabs stay."""
    return _OBEYED.sub(_escaped, text)


def in_line(text: str) -> str:
    """A name or reason as it stands within a line: line ends and tabs are escaped, too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode()


def say(text: str, *, error: bool = False) -> None:
    """Print a text that has names from data in it, on standard output or error."""
    print(printable(text), file=sys.stderr if error else sys.stdout, flush=error)


def shown(text: str, stream: TextIO) -> str:
    """The text as a stream may have it; a terminal also gets what tables and bars are made of."""
    if not _OBEYED.search(text):
        return text
    if not stream.isatty():
        return "\r".join(map(printable, text.split("\r")))
    kept = [match[0] for match in _DRAWN.finditer(text)]
    pieces = [printable(piece) for piece in _DRAWN.split(text)]
    return "".join(piece + drawn for piece, drawn in zip(pieces, [*kept, ""], strict=True))


class Shown:
    """A text stream that shows escaped what a terminal would obey, but for what tables and bars
    are drawn with on a terminal; all else is the stream's own.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """As a text stream's."""
        return self.stream.write(shown(text, self.stream))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def guard() -> None:
    """From now on, what this process prints is shown as `Shown` does."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Shown | Lasting):
            setattr(sys, name, cast(TextIO, Shown(stream)))


class Lasting:
    """A text stream that drops what cannot be written, and shows the rest as `shown`; all else is
    the stream's own.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.lost: str | None = None  # why something was dropped

    def write(self, text: str) -> int:
        """As a text stream's; never raises."""
        try:
            return self.stream.write(shown(text, self.stream))
        except UnicodeEncodeError:  # a terminal without those letters
            return self.write(text.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError) as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """As a text stream's; never raises."""
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _drop(self, error: OSError | ValueError) -> None:
        self.lost = str(error)
        if isinstance(error, OSError) and error.errno in _FOR_GOOD:
            # for what is held back yet, for libraries that write by themselves, for children
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)


def outlive() -> None:
    """From now on, this process outlives whoever reads its output, and its terminal."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before the start
            stream = open(os.devnull, "w")  # noqa: SIM115  # for as long as the process lives
        if not isinstance(stream, Lasting):
            setattr(sys, name, cast(TextIO, Lasting(stream)))
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # children have it, too


def lost() -> str | None:
    """Why some of the output was dropped; None while all was written."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Lasting) and stream.lost:
            return stream.lost
    return None
