"""Requests to stop: a signal becomes a flag, the ranks agree on it beside a step, the loop commits
and leaves before the next.

SIGUSR1 (a scheduler's warning), SIGTERM and SIGINT all ask the same thing, and so does a launcher
that is gone. No signal breaks a step or a commit, only waits (`process.waits`). Install it first
thing: Python's default for SIGUSR1 is to die.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import psutil

from rcmae.files import write_aside
from rcmae.process import launchers, waits

# exit statuses of a rank
FINISHED = 0
FAILED = 1
REFUSED = 2  # the user's input is wrong
STOPPED = 75  # run me again

MARGIN_S = 5.0  # for the exit; in practice also for what takes longer than it did before
SIGNALS = waits.SIGNALS


class StopRequest:
    """Why this rank was asked to stop, if it was. Sets the process's handlers."""

    def __init__(self) -> None:
        self._heard = waits.listen()
        self.has_begun = False  # a run is built, and would be saved
        self._deadline = _scheduler_deadline()

    @property
    def reason(self) -> str | None:
        """Who requested a stop: a signal's name, or words; None: no request."""
        return self._heard.reason

    @property
    def own_reason(self) -> str | None:
        """The reason, where this rank itself was asked and not told of it by a peer."""
        return None if self._heard.is_relayed else self._heard.reason

    def ask(self, reason: str) -> None:
        """Ask for a stop; the first reason stands."""
        self._heard.ask(reason)

    def leave(self) -> NoReturn:
        """End this process with 75, before the first step: there is nothing to save."""
        self._heard.leave("")

    def close(self) -> None:
        """At the end of the process: no thread listens any more."""
        self._heard.close()

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


def _scheduler_deadline() -> float:
    """When the scheduler ends this job, by the monotonic clock; never, where it does not tell.

    Its own clock is compared once, now: one that is set while the run trains moves no deadline.
    """
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    if not text:
        return math.inf
    try:
        left_s = float(text) - time.time()
    except ValueError:
        left_s = math.nan
    if left_s > 0:
        return time.monotonic() + left_s
    said = "it is over" if left_s <= 0 else "that is no time"
    print(
        f"rcmae: SLURM_JOB_END_TIME={text} is ignored as this job's end ({said}); it is left of "
        "another job: unset it",
        file=sys.stderr,
        flush=True,
    )
    return math.inf


def this_start() -> dict[str, Any]:
    """When this process began, in seconds since 1970, and the scheduler's job and its restart,
    where there is one.
    """
    env = os.environ
    restart = launchers.restarts() if "SLURM_JOB_ID" in env else None
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
        again: whether the same command resumes the run; by default if it was stopped on
            request.
    """
    from rcmae.data.sources import redacted  # its clients cost time: not where a typo is told

    words = {FINISHED: "finished", FAILED: "failed", REFUSED: "refused", STOPPED: "stopped"}
    document = {
        "status": words[status],
        "exit_status": status,
        "step": step,
        "reason": redacted(reason) if reason else reason,
        "again": status == STOPPED if again is None else again,
        "time": time.time(),
    }
    write_aside(run_dir / "outcome.json", json.dumps(document, indent=1) + "\n")
