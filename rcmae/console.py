"""Standard output and error that are never a reason to stop.

Whoever reads them may leave (`| head`, a `tee` that died, a terminal that is closed), and the disk
under a log may be full. A training goes on without them: its files have what counts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from typing import Any, TextIO, cast

# nobody will read from there again; a disk may have room again
_FOR_GOOD = (errno.EPIPE, errno.EIO, errno.EBADF)


class Lasting:
    """A text stream that drops what cannot be written; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.lost: str | None = None  # why something was dropped

    def write(self, text: str) -> int:
        """As a text stream's; never raises."""
        try:
            return self.stream.write(text)
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
