"""Requests to stop: a signal becomes a flag, the ranks agree on it at a step's boundary, the loop commits and leaves.

SIGUSR1 (a scheduler's warning), SIGTERM and SIGINT all ask the same thing. A handler only sets the flag, so no signal
ever breaks a step or a commit; further ones change nothing. Install it first thing: Python's default for SIGUSR1 is to
die.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import FrameType

FINISHED, FAILED, REFUSED, STOPPED = 0, 1, 2, 75  # exit statuses of a rank; 75 says: run me again
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Why this rank was asked to stop, if it was. Sets the process's handlers."""

    def __init__(self) -> None:
        self.reason: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._asked)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name


def write_outcome(run_dir: Path, *, status: int, step: int, reason: str) -> None:
    """Say in `outcome.json` how the job ended; torchrun turns every failure into 1, so this is what scripts read.

    Written aside and renamed, after the last commit. One rank calls.
    """
    words = {FINISHED: "finished", FAILED: "failed", REFUSED: "refused", STOPPED: "stopped"}
    document = {"status": words[status], "exit_status": status, "step": step, "reason": reason, "time": time.time()}
    aside = run_dir / "outcome.json.new"
    with aside.open("w") as file:
        json.dump(document, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, run_dir / "outcome.json")
