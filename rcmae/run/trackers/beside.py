"""Trackers, and the run's page, beside a training: a process each, which reads the run's folder as
anybody could.

No tracker's library is in the training's process: one that hangs, prints or dies costs nothing.
When the training ends, or is killed, the process sees its input end and shows what was committed.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rcmae.run.records.status import has_stopped

EVERY_S = 10.0  # a tracker looks for a new checkpoint
LAST_PUSH_S = 60.0  # that the end of a training waits for all of them
HURRY_S = 5.0  # the same where a job was asked to stop: the next one pushes the rest
_GONE_S = 15.0  # that a process that was killed may take to give its memory back
REPORT = "report"  # among the names: RUN/report.html
# a tracker is no rank
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class _Beside(NamedTuple):
    name: str
    process: subprocess.Popen[bytes]
    log: Path


class Trackers:
    """The trackers of a run, on the one rank that writes.

    Args:
        names: of `registry.NAMES`, or REPORT; none on other ranks.
        run_dir: the run's folder.
        say: prints a line; called by threads.
    """

    def __init__(self, names: Sequence[str], run_dir: Path, say: Callable[[str], None]) -> None:
        self._run_dir = run_dir
        self._say = say
        self._told: set[str] = set()
        self._running = [self._start(name) for name in names]
        for each in self._running:
            threading.Thread(target=self._watch, args=(each,), daemon=True).start()

    def close(self, *, in_a_hurry: bool) -> None:
        """Let them push the rest, and say which did not. A second call does nothing."""
        running, self._running = self._running, []
        for each in running:
            assert each.process.stdin is not None
            with contextlib.suppress(OSError):  # it is gone
                each.process.stdin.close()
        seconds = HURRY_S if in_a_hurry else LAST_PUSH_S
        end = time.monotonic() + seconds
        for each in running:
            try:
                each.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                each.process.kill()
                if not in_a_hurry:
                    self._tell(each, f"did not take all within {seconds:g} s")
            else:
                self._judge(each)

    def _watch(self, each: _Beside) -> None:
        each.process.wait()
        if each in self._running:  # it ended before the training
            self._judge(each)

    def _judge(self, each: _Beside) -> None:
        if each.process.returncode != 0:
            self._tell(each, "failed")

    def _tell(self, each: _Beside, what: str) -> None:
        if each.name in self._told:
            return
        self._told.add(each.name)
        run = shlex.quote(str(self._run_dir))
        if each.name == REPORT:
            again = f"Write the page with\n  rcmae report {run}"
        else:
            again = f"Push the rest with\n  rcmae track {run} --to {each.name}"
        self._say(f"{each.name} {what} (see {each.log}); the training goes on. {again}")

    def _start(self, name: str) -> _Beside:
        folder = self._run_dir / "trackers"
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.log"
        env = {key: value for key, value in os.environ.items() if key not in _OF_RANKS}
        with path.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "rcmae", *_words(name, self._run_dir)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                env={**env, "CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,  # Ctrl-C is for the training
            )
        return _Beside(name, process, path)


def _words(name: str, run_dir: Path) -> list[str]:
    """The command of a name, behind `rcmae`."""
    if name == REPORT:
        return ["report", str(run_dir), "--beside", str(EVERY_S)]
    return ["track", str(run_dir), "--to", name, "--follow", str(EVERY_S), "--ends-with-input"]


def input_ended(seconds: float) -> bool:
    """Wait so long at most for the end of standard input: of the training that started this
    process.
    """
    ready, _, _ = select.select([0], [], [], seconds)
    return bool(ready) and not os.read(0, 4096)


def wait_for_end(run: Path) -> None:
    """Once the input has ended: wait until it can be seen how the training did.

    One that is killed closes its files a moment before it is gone.
    """
    end = time.monotonic() + _GONE_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if has_stopped(run):
                return
        time.sleep(0.1)
