"""Kill a training at each call by which its second save reaches the disk, and let the same command
go on each time.

Arguments: a recipe of 12 steps, a folder. Prints `RESULT <JSON list>`: for each kill the call, the
steps that were committed then, the exit status of the same command started again, and whether it
ended as if nothing had happened. Trainings are forks of this process, which imports once and trains
nothing itself. A file that was not yet flushed when its writer died loses its second half, as in a
power cut."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rcmae import train
from rcmae.run import build, ending, look  # noqa: F401, what each fork would import for itself
from rcmae.tasks import pretrain  # noqa: F401
from runs import Folder, equal

CALLS = {"fsync": os, "rename": os, "replace": os, "rmtree": shutil}


def watch(on_call: Callable[[str, str], None]) -> None:
    """Have `on_call(name, path)` called before each of CALLS on something among the checkpoints."""

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(what: Any, *args: Any, **named: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else str(what)
            if "/checkpoints" in path:
                on_call(name, path)
            return original(what, *args, **named)

        return call

    for name, module in CALLS.items():
        setattr(module, name, wrap(name, getattr(module, name)))


def trained(
    recipe: str, run_dir: Path, on_call: Callable[[str, str], None] = lambda name, path: None
) -> int:
    """Exit status of a process that trains, negative if a signal ended it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        watch(on_call)
        overrides = [f"run.dir={run_dir}", "checkpoint.every_steps=4", "checkpoint.keep=2"]
        os._exit(train.main([recipe, *overrides]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killer(at: int) -> Callable[[str, str], None]:
    calls = 0

    def on_call(name: str, path: str) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            if name == "fsync" and os.path.isfile(path):
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    return on_call


def main(recipe: str, root: Path) -> None:
    calls = root / "calls.txt"

    def record(name: str, path: str) -> None:
        with calls.open("a") as file:
            file.write(f"{name} {Path(path).name}\n")

    whole = Folder(root / "whole")
    assert trained(recipe, whole.path, record) == 0
    made = calls.read_text().splitlines()
    commits = [number for number, call in enumerate(made, 1) if call.startswith("replace .LATEST.")]
    found = []
    for at in range(commits[0] + 1, commits[2]):
        # the end of the first save, the second, and the third to its LATEST
        run = Folder(root / f"killed-{at}")
        killed = trained(recipe, run.path, killer(at))
        assert killed == -signal.SIGKILL, f"it ended with {killed} before call {at}"
        committed = run.committed()
        again = trained(recipe, run.path)
        as_if = (
            run.steps() == whole.steps()
            and run.losses() == whole.losses()
            and equal(run.state(), whole.state())
        )
        kill = {"call": made[at - 1], "committed": committed, "again": again}
        found.append({**kill, "as if nothing": as_if, "tidy": run.leftovers() == []})
        shutil.rmtree(run.path)
    print("RESULT", json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
