"""A request to stop in the moment before anybody listens, and in that after.

Python's default for SIGUSR1, a scheduler's warning, is to die with 138, which says nothing. From
the package's first import on, where it is what was started, it is noted for who listens then
(`process.waits`). What comes before that is for the launcher: slurm/rank.sh ignores it meanwhile.
While Python takes itself down it puts the defaults back: a launcher that sends TERM to the peers of
a rank that was refused would have them end with 143, and the job with it, not with 2.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from types import FrameType

asked: list[str] = []  # names of the signals that came


def hear() -> None:
    """Note SIGUSR1 from now on, if this package is the program and has no other handler."""
    words = sys.orig_argv
    at = words.index("-m") + 1 if "-m" in words else len(words)
    module = words[at].split(".")[0] if at < len(words) else ""
    is_program = module == "rcmae" or os.path.basename(sys.argv[0]) == "rcmae"
    if is_program:
        atexit.register(_hear_no_more)
    if is_program and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        try:
            signal.signal(signal.SIGUSR1, _note)
        except ValueError:  # not the main thread: no program of ours
            return


def _hear_no_more() -> None:
    """The exit status stands: what comes now changes it no more."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        try:
            signal.signal(number, signal.SIG_IGN)
        except ValueError:  # not the main thread
            return


def _note(number: int, frame: FrameType | None) -> None:
    asked.append(signal.Signals(number).name)
