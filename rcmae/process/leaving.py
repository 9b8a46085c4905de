"""The end of a process whose work is done: it waits for nobody, and tells its launcher why.

Python joins the threads of pools before it ends: one that waits for another process's lock, or for
a store that does not answer, would keep a job that has committed everything from ending."""

from __future__ import annotations

import contextlib
import json
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


def tell_launcher(cause: str) -> None:
    """Say why this rank ends, for torchrun's last page: it shows the first rank's that said so as
    the root cause, instead of "to enable traceback see ...". Elsewhere nothing is written.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        told = {"message": cause.replace("\n", "\n  "), "timestamp": int(time.time())}
        # its folder may be gone with the launcher
        with contextlib.suppress(OSError), open(path, "w") as file:
            json.dump(told, file)


def _leave(status: int) -> None:
    time.sleep(_PATIENCE_S)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
