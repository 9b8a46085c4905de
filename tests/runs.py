"""What a run left in its folder, and how a test starts one in this process."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from rcmae import checkpoint, train
from rcmae.process import garbage
from rcmae.run import preempt
from rcmae.run.loop import schedule

ROOT = Path(__file__).parent.parent


def python_path(*more: Path) -> str:
    """PYTHONPATH of a child: this repository, these folders, and what this process was given."""
    own = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(ROOT), *map(str, more), *([own] if own else [])])


class Folder:
    """A run's folder, read as its files are now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"

    def rows(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that are whole."""
        return _lines(self.path / "metrics.jsonl")

    def steps(self) -> list[int]:
        return [row["step"] for row in self.rows()]

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows()]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in _lines(self.path / "events.jsonl") if line["event"] == kind]

    def outcome(self) -> dict[str, Any]:
        return json.loads((self.path / "outcome.json").read_text())

    def committed(self) -> list[int]:
        """Steps of the checkpoints that are valid, oldest first."""
        found = []
        for path in checkpoint.step_folders(self.checkpoints):
            with contextlib.suppress(checkpoint.CheckpointError):
                found.append(checkpoint.open_verified(path).step)
        return found

    def state(self) -> dict[str, Tensor]:
        """Everything that moves, by kind/parameter, in the newest valid checkpoint."""
        manifest, _ = checkpoint.newest(self.checkpoints)
        assert manifest is not None, f"no valid checkpoint in {self.checkpoints}"
        return {key: checkpoint.tensor_of(manifest, key) for key in manifest.tensors}

    def leftovers(self) -> list[str]:
        """What lies among the checkpoints and is none."""
        known = {"LATEST", *(path.name for path in self.checkpoints.glob("step-*"))}
        return sorted(path.name for path in self.checkpoints.iterdir() if path.name not in known)


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [
        json.loads(line)
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two states are the same to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def distance(one: dict[str, Tensor], other: dict[str, Tensor], kind: str) -> float:
    """Relative L2 between all tensors of a kind."""
    keys = sorted(key for key in other if key.startswith(f"{kind}/"))
    got, wanted = (
        torch.cat([state[key].flatten() for key in keys]).double() for state in (one, other)
    )
    return float((got - wanted).norm() / wanted.norm())


class SeldomThawed:
    """Python's collector for a process with many trainings, in the place of `garbage.gc`.

    Each training looks through all objects once, libraries too: a fifth of a second with all that
    tests import, half of a tiny training. Here what was frozen stays so for ten trainings.
    """

    trainings = 10

    def __init__(self) -> None:
        self.left = self.trainings

    def __getattr__(self, name: str) -> Any:
        return getattr(gc, name)

    def unfreeze(self) -> None:
        self.left -= 1
        if self.left == 0:
            gc.unfreeze()
            self.left = self.trainings


def collect_seldom() -> None:
    """Let this process's trainings do so."""
    garbage.gc = SeldomThawed()  # type: ignore[assignment]


def start(recipe: Path | str, folder: Path, *overrides: str) -> int:
    """`python -m rcmae.train RECIPE run.dir=FOLDER ...` in this process; its exit status."""
    with keeping_handlers(), patch.object(os, "_exit", _not_the_tests):
        return train.main([str(recipe), f"run.dir={folder}", *overrides])


def at_step(step: int, action: Callable[[], object]) -> Callable[..., float]:
    """The schedule of the rate, which every step asks once.

    In this step something happens first.
    """
    rate = schedule.learning_rate

    def asked(now: int, **named: Any) -> float:
        if now == step:
            action()
        return rate(now, **named)

    return asked


def die_at_step(task: str, step: int, recipe: Path, folder: Path) -> None:
    """Train in a process of its own that is killed, by SIGKILL, before the update of a step; what
    was saved before is committed.
    """
    program = (
        "import importlib, os, signal, sys; sys.path[:0] = ['tests']\n"
        "from unittest.mock import patch; from runs import at_step\n"
        "from rcmae.run.loop import schedule\n"
        "task, step, *words = sys.argv[1:]\n"
        "kill = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with patch.object(schedule, 'learning_rate', at_step(int(step), kill)):\n"
        "    importlib.import_module(f'rcmae.{task}').main(words)\n"
    )
    command = [sys.executable, "-c", program, task, str(step), str(recipe), f"run.dir={folder}"]
    command.append("checkpoint.background=false")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr


def _not_the_tests(status: int) -> None:
    raise AssertionError(
        f"the run ended its process with {status}; what it said is on standard error"
    )


@contextlib.contextmanager
def keeping_handlers() -> Iterator[None]:
    """Put the process's signal handlers back at the end."""
    before = {number: signal.getsignal(number) for number in preempt.SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def once(condition: Callable[[], bool], action: Callable[[], object]) -> Iterator[None]:
    """Do something as soon as a condition holds while the block runs; an error if it never did."""
    over, done = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            if condition():
                done.set()
                action()
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    assert done.is_set(), "the block ended before the condition held"


def wait_for(
    condition: Callable[[], bool], alive: Callable[[], bool], timeout_s: float = 300.0
) -> None:
    """Return when a condition holds.

    Fail if what should bring it about has died or takes too long.
    """
    end = time.monotonic() + timeout_s
    while not condition():
        assert alive(), "it ended before the condition held"
        assert time.monotonic() < end, f"the condition did not hold within {timeout_s:g} s"
        time.sleep(0.02)


def send(number: signal.Signals) -> Callable[[], None]:
    """Signal this process, as a scheduler would."""
    return lambda: os.kill(os.getpid(), number)


def finite(row: dict[str, Any]) -> bool:
    """Whether every number of a metrics row is one."""
    return all(value is not None and math.isfinite(value) for value in row.values())


def hear_ctrl_c() -> None:
    """For a process that is born (preexec_fn): who starts tests in the background has it
    ignored, for all of them.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
