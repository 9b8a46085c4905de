"""Requests to stop: a signal becomes a flag, the ranks agree on it at a step's boundary, the loop
commits and leaves.

SIGUSR1 (a scheduler's warning), SIGTERM and SIGINT all ask the same thing. A handler only sets the
flag, so no signal ever breaks a step or a commit; further ones change nothing. Install it first
thing: Python's default for SIGUSR1 is to die.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from rcmae.files import write_aside

# exit statuses of a rank
FINISHED = 0
FAILED = 1
REFUSED = 2  # the user's input is wrong
STOPPED = 75  # run me again

MARGIN_S = 5.0  # for the exit; in practice also for what takes longer than it did before
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Why this rank was asked to stop, if it was. Sets the process's handlers."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._deadline = _scheduler_deadline()
        for number in SIGNALS:
            signal.signal(number, self._asked)

    def ask(self, reason: str) -> None:
        """Ask for a stop; the first reason stands."""
        self.reason = self.reason or reason

    def within(self, seconds: float) -> None:
        """Set a deadline so many seconds from now, if it is before the scheduler's."""
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def is_late(self, save_s: float, step_s: float = 0.0) -> bool:
        """Whether there is no time for another step: after it two saves (one may be under way)
        and some must fit.
        """
        return time.monotonic() + step_s + 2 * save_s + MARGIN_S > self._deadline

    def has_time(self, seconds: float) -> bool:
        """Whether something that takes so long ends before the deadline."""
        return time.monotonic() + seconds < self._deadline

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)


def _scheduler_deadline() -> float:
    """When the scheduler ends this job, by the monotonic clock; never, where it does not tell.

    Its own clock is compared once, now: one that is set while the run trains moves no deadline.
    """
    return time.monotonic() + float(os.environ.get("SLURM_JOB_END_TIME", math.inf)) - time.time()


def this_start() -> dict[str, Any]:
    """When this process began, in seconds since 1970, and the scheduler's job and its restart,
    where there is one.
    """
    env = os.environ
    restart = int(env.get("SLURM_RESTART_COUNT") or 0) if "SLURM_JOB_ID" in env else None
    return {
        "process_started": psutil.Process().create_time(),
        "job": env.get("SLURM_JOB_ID"),
        "restart": restart,
    }


def write_outcome(
    run_dir: Path, *, status: int, step: int, reason: str, again: bool | None = None
) -> None:
    """Say in `outcome.json` how the job ended; torchrun turns every failure into 1, so this is what
    scripts read.

    Written aside and renamed, after the last commit. One rank calls.

    Args:
        run_dir: the run's folder.
        status: of the ranks.
        step: that was done last.
        reason: why it ended.
        again: whether the same command goes on with the run; by default if it was stopped on
            request.
    """
    words = {FINISHED: "finished", FAILED: "failed", REFUSED: "refused", STOPPED: "stopped"}
    document = {
        "status": words[status],
        "exit_status": status,
        "step": step,
        "reason": reason,
        "again": status == STOPPED if again is None else again,
        "time": time.time(),
    }
    write_aside(run_dir / "outcome.json", json.dumps(document, indent=1) + "\n")
