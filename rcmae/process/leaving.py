"""The end of a process whose work is done: it waits for nobody.

Python joins the threads of pools before it ends: one that waits for another process's lock, or for
a store that does not answer, would keep a job that has committed everything from ending."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time

_PATIENCE_S = 3.0  # for threads and workers that end by themselves


def leaving(status: int) -> int:
    """The exit status, given when all is done that the process is for: it ends with it within
    seconds. Called by what is started as a program.
    """
    threading.Thread(target=_leave, args=(status,), daemon=True, name="the end").start()
    return status


def _leave(status: int) -> None:
    time.sleep(_PATIENCE_S)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
