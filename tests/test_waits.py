"""Every wait says what it waits for, and a request to stop ends it, whoever gets it."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, free_port

from rcmae.data import cache
from rcmae.process import waits
from rcmae.run.preempt import StopRequest
from runs import Folder, equal, hear_ctrl_c, once, python_path, send, start, wait_for

PROGRAM = ROOT / "tests/programs/waiting.py"
STOPPED = 75


class Waiting:
    """A started program that waits."""

    def __init__(self, how: str, folder: Path, **env: str) -> None:
        self._log = folder / f"{how}{env.get('RANK', '')}.log"
        with self._log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, PROGRAM, how],
                env={**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", **env},
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                preexec_fn=hear_ctrl_c,
            )

    def said(self) -> str:
        return self._log.read_text()

    def until(self, text: str) -> None:
        wait_for(lambda: text in self.said(), lambda: self.process.poll() is None, 60.0)

    def ends(self, within_s: float) -> int:
        try:
            return self.process.wait(within_s)
        finally:
            self.process.kill()


def test_a_process_whose_work_is_done_waits_for_no_thread(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = Waiting("leave", tmp_path, LOCK=str(lock.name))
        waiting.until("ends")
        assert waiting.ends(8.0) == STOPPED


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_wait_says_so_and_is_broken_by_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    waiting = Waiting("start", tmp_path)
    waiting.until("rcmae: waiting for the others (")
    waiting.process.send_signal(number)
    assert waiting.ends(4.0) == STOPPED
    assert f"broken by {number.name}" in waiting.said()


def test_a_collective_before_the_first_step_ends_the_process(tmp_path: Path) -> None:
    waiting = Waiting("collective", tmp_path)
    waiting.until("waits")
    waiting.process.send_signal(signal.SIGTERM)
    assert waiting.ends(5.0) == STOPPED
    assert "stopped by SIGTERM while it waited for the others" in waiting.said()


def test_a_second_ctrl_c_ends_a_wait_for_ranks_that_do_not_come(tmp_path: Path) -> None:
    waiting = Waiting("training", tmp_path)
    waiting.until("waits")
    waiting.process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.process.wait(3.5)  # the others may come yet
    waiting.process.send_signal(signal.SIGINT)
    assert waiting.ends(4.0) == STOPPED


def test_what_will_never_come_is_raised_in_the_wait(tmp_path: Path) -> None:
    waiting = Waiting("checked", tmp_path)
    assert waiting.ends(10.0) == 0
    assert "a worker is dead" in waiting.said()


def test_ranks_whose_launcher_is_killed_end(tmp_path: Path) -> None:
    waiting = Waiting("launcher", tmp_path, RANK="0", WORLD_SIZE="2")
    waiting.until("waits")
    child = psutil.Process(int(waiting.said().split("child ")[1].split()[0]))
    waiting.process.kill()
    waiting.process.wait()
    try:
        child.wait(10.0)
    except psutil.TimeoutExpired:
        child.kill()
        raise
    assert "broken by its launcher is gone" in waiting.said()


def test_a_request_to_one_rank_breaks_the_wait_of_another(tmp_path: Path) -> None:
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [Waiting("ranks", tmp_path, RANK=str(rank), **env) for rank in (0, 1)]
    for rank in ranks:
        rank.until("waits")
    ranks[1].process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    ranks[0].until("broken by SIGTERM")
    assert time.monotonic() - began < 4.0
    for rank in ranks:
        rank.process.kill()
        rank.process.wait()


class _Peer:
    """A link to a rank that was asked to stop."""

    def tell(self, reason: str) -> None:
        raise AssertionError("it knows already")

    def heard(self) -> str:
        return "SIGUSR1"


def test_only_the_rank_that_was_asked_has_a_reason_of_its_own() -> None:
    before = {number: signal.getsignal(number) for number in waits.SIGNALS}
    stop = StopRequest()
    try:
        waits.connect(_Peer(), every_s=0.01)
        wait_for(lambda: stop.reason is not None, lambda: True, 10.0)
        assert (stop.reason, stop.own_reason) == ("SIGUSR1", None)
    finally:
        stop.close()
        for number, handler in before.items():
            signal.signal(number, handler)

    asked = StopRequest()
    try:
        asked.ask("SIGTERM")
        assert asked.own_reason == "SIGTERM"
    finally:
        asked.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_rank_alone_says_whom_it_waits_for_and_by_which_variable(tmp_path: Path) -> None:
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    waiting = Waiting("ranks", tmp_path, SLURM_JOB_ID="4711", SLURM_STEP_ID="0", **step)
    waiting.until("waiting for 1 of 2 ranks; SLURM_STEP_NUM_TASKS=2 says that there are 2")
    waiting.process.send_signal(signal.SIGTERM)
    assert waiting.ends(5.0) == STOPPED


def test_a_rank_that_meets_another_training_is_told(tmp_path: Path) -> None:
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    first = Waiting("ranks", tmp_path, RANK="0", WORLD_SIZE="3", **port)
    first.until("waiting for 2 of 3 ranks; WORLD_SIZE=3")
    other = Waiting("ranks", tmp_path, RANK="1", WORLD_SIZE="2", **port)
    assert other.ends(40.0) == 1
    assert "belongs to another training (3 ranks, this one is 2 ranks)" in other.said()
    first.process.kill()
    first.process.wait()


@pytest.mark.parametrize("evaluates", [False, True])
def test_samples_that_do_not_come_keep_no_run_from_its_checkpoint(
    tiny: Path,
    photo_shards: str,
    uninterrupted: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    evaluates: bool,
) -> None:
    folder, hangs, read = Folder(tmp_path / "run"), [], cache.Reader._read

    def hanging(*arguments: Any) -> bytes:
        if len(folder.rows()) >= 4:
            hangs.append(time.monotonic())
            time.sleep(60.0)
        return read(*arguments)

    every = "4" if evaluates else "null"
    test = photo_shards.replace("000000..", "000004..")
    sets = [f"evaluate.train_shards={photo_shards}", f"evaluate.test_shards={test}"]
    evaluation = [f"evaluate.every_steps={every}", *sets]
    monkeypatch.setattr(cache.Reader, "_read", hanging)
    with once(lambda: bool(hangs), send(signal.SIGTERM)):
        assert start(tiny, folder.path, *evaluation) == STOPPED
    assert time.monotonic() - hangs[0] < 10.0
    # the samples of the sixth step do not come in the fifth, whose own did
    assert folder.committed() == [4 if evaluates else 5]
    assert len(folder.events("evaluation_left")) == evaluates
    monkeypatch.undo()
    assert start(tiny, folder.path, *evaluation) == 0
    assert equal(folder.state(), uninterrupted.state())


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_during_imports_ends_with_75(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "rcmae.train", "quickstart", f"run.dir={tmp_path / 'run'}"],
        env={**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    torch = "/torch/lib/"
    wait_for(
        lambda: torch in Path(f"/proc/{process.pid}/maps").read_text(),
        lambda: process.poll() is None,
        60.0,
    )
    process.send_signal(number)
    _, said = process.communicate(timeout=60.0)
    assert process.returncode == STOPPED, said
    assert f"stopped by {number.name}" in said
    assert not (tmp_path / "run").exists()


def test_a_warning_before_anybody_listens_is_noted(tmp_path: Path) -> None:
    program = tmp_path / "rcmae"
    program.write_text(
        "import os, signal, rcmae\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "from rcmae.process import waits\n"
        "print(waits.listen().reason)\n"
    )
    done = subprocess.run(
        [sys.executable, program],
        env={**os.environ, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "SIGUSR1"), done.stderr
