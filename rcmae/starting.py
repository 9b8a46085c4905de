"""Start a training from Python: from a notebook or your own program.

    import rcmae

    run = rcmae.start("quickstart", {"data.shards": "photos/*.tar", "schedule.steps": 100})
    run.metrics["loss"]  # while it trains
    run.wait()  # 0: finished

The training runs in its own process, as under `rcmae train`: it outlives the notebook's kernel, an
error in a cell does not affect it, and the same call resumes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rcmae import config
from rcmae.data.workers import refuse_again
from rcmae.errors import Refused
from rcmae.files import json_lines

REFUSED = 2  # exit status
ENDS_WITHIN_S = 60.0  # a start that has no step to do
SHOWN = 20  # rows of a table in a notebook


def start(
    recipe: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    ranks: int = 1,
) -> Training:
    """Start to train, or resume what lies in the recipe's run.dir. Returns once it trains.

    Args:
        recipe: a YAML file, or the name of a shipped recipe.
        overrides: keys of the recipe, as in {"schedule.steps": 100}.
        ranks: processes on this machine; several need engine.name ddp, deepspeed or fsdp2.

    Raises:
        Refused: the recipe, or the data that it names, is wrong; nothing was written. Or this is a
            worker process that imports the program that started it: put the call under
            `if __name__ == "__main__":`.
    """
    refuse_again("rcmae.start")
    given = [f"{key}={json.dumps(value)}" for key, value in (overrides or {}).items()]
    loaded = config.load(str(recipe), given)
    module = config.module_of(loaded)
    words = ["-m", module, str(recipe), *given]
    command = [sys.executable, *words]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [sys.executable, *launcher, *words]
    training = Training(loaded.run_dir, command)
    training.wait_for_start()
    return training


class Table(dict[str, list[Any]]):
    """Columns of equal length by name: `pandas.DataFrame(table)` takes it, and so do plots."""

    def _repr_html_(self) -> str:
        """What a notebook shows: the last rows."""
        head = "".join(f"<th>{name}</th>" for name in self)
        body = ""
        for row in list(zip(*self.values(), strict=True))[-SHOWN:]:
            cells = "".join(f"<td>{_short(value)}</td>" for value in row)
            body += f"<tr>{cells}</tr>"
        return f"<table><tr>{head}</tr>{body}</table>"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


class Training:
    """A training that was started; what it writes is in `folder`.

    Args:
        folder: the run's.
        command: that runs the training.
    """

    def __init__(self, folder: Path, command: list[str]) -> None:
        self.folder = folder
        file, path = tempfile.mkstemp(".log", "rcmae-")  # not in the folder: a refusal leaves none
        self._said = Path(path)
        weakref.finalize(self, self._said.unlink, missing_ok=True)
        self._began = time.time()
        self._process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        os.close(file)

    def __repr__(self) -> str:
        state = "training"
        if not self.is_running:
            status = self._process.returncode
            state = f"ended with {status}" if status else "finished"
        steps = self.metrics.get("step", [])
        return f"<{self.folder}: {state}, step {steps[-1] if steps else 0}>"

    @property
    def is_running(self) -> bool:
        """Whether its process is still there."""
        return self._process.poll() is None

    @property
    def metrics(self) -> Table:
        """The rows of metrics.jsonl so far, as columns; None where a row lacks one."""
        rows = list(json_lines(self.folder / "metrics.jsonl"))
        names = dict.fromkeys(name for row in rows for name in row)
        return Table({name: [row.get(name) for row in rows] for name in names})

    @property
    def said(self) -> str:
        """What it printed so far."""
        return self._said.read_text(errors="replace")

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait until it ends. The exit status: 0 finished, 75 stopped on request (start it again).

        Raises:
            Refused: the training was refused; the message is what it said.
            RuntimeError: it failed; the message is the end of what it said.
            TimeoutError: it still trains after `timeout_s` seconds.
        """
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.folder} still trains after {timeout_s} s") from None
        if status == REFUSED:
            raise Refused(self.said.strip().removeprefix("rcmae: "))
        if status not in (0, 75):
            last = "\n".join(self.said.splitlines()[-SHOWN:])
            raise RuntimeError(f"{self.folder} failed with exit status {status}:\n{last}")
        return status

    def wait_for_start(self, *, poll_s: float = 0.1) -> None:
        """Wait until it has begun, or ended.

        Raises:
            Refused, RuntimeError: as `wait`.
        """
        while self.is_running and not self._has_begun():
            time.sleep(poll_s)
        if self._had_finished():  # a run that has no step left: it says so and ends
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDS_WITHIN_S)
        if self._process.poll() not in (None, 0, 75):
            self.wait()

    def _had_finished(self) -> bool:
        """Whether this start found the last step done."""
        starts = self._starts()
        if not starts:
            return False
        total = starts[-1].get("sizes", {}).get("total_steps")
        return total is not None and starts[-1].get("step", 0) >= total

    def _has_begun(self) -> bool:
        """Whether the run's events tell of this start."""
        return bool(self._starts())

    def _starts(self) -> list[dict[str, Any]]:
        """What the run's events tell of this start."""
        path = self.folder / "events.jsonl"
        if not path.exists() or path.stat().st_mtime < self._began:
            return []
        events = (line for line in json_lines(path) if line.get("event") in ("start", "resume"))
        return [line for line in events if line.get("time", 0.0) >= self._began]

    def stop(self) -> int:
        """Ask it to stop, and wait until it has committed where it stands; as `wait`."""
        if self.is_running:
            self._process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait_for_step(self, step: int, *, poll_s: float = 0.2) -> None:
        """Wait until a row of metrics.jsonl has come to a step, or it has ended."""
        while self.is_running and max(self.metrics.get("step", [0])) < step:
            time.sleep(poll_s)
