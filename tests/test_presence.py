"""A lost rank ends all others in time, and they say which it was, where, and what it did last."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rcmae.process import waits
from rcmae.run import presence as presence_module
from rcmae.run.presence import Presence
from runs import Folder, python_path, wait_for
from tests.conftest import ROOT, Ranks, free_port

FSDP2, ZERO2 = ["engine.name=fsdp2"], ["engine.name=deepspeed", "engine.config=zero2.json"]
DDP = ["engine.name=ddp"]


def three(run: Path) -> list[Presence]:
    """Presences of three ranks, all beating ten times a second."""
    return [
        Presence(run, generation=4, rank=rank, world=3, timeout_s=600.0, interval_s=0.1)
        for rank in range(3)
    ]


def test_a_silent_rank_is_named_with_its_place_and_those_that_beat_are_not(tmp_path: Path) -> None:
    ranks = three(tmp_path)
    ranks[1].at(17, "reading samples")
    time.sleep(2 * ranks[1].interval_s)
    ranks[1]._stop()  # as if it were dead: no word of its end
    loss = ranks[0].explain(RuntimeError("Connection closed by peer"))
    assert loss.of_a_peer
    assert loss.speaks
    place = (
        rf"rank 1 on \S+ \(process {os.getpid()}\) silent, last seen at step 17, reading samples"
    )
    assert re.search(place, loss.message), loss.message
    assert "rank 2" not in loss.message
    assert "Start the same command again" in loss.message
    ranks[2].leave()
    assert not (tmp_path / "ranks" / "00000004" / "00002.json").exists()


def test_the_step_under_way_is_the_one_after_those_done(tmp_path: Path) -> None:
    alone = Presence(tmp_path, generation=1, rank=0, world=1, timeout_s=600.0)
    alone.at(11, "computing the step")  # eleven are done
    assert alone.doing().startswith("step 12 (computing the step, ")
    alone.at(12, "evaluating or saving")
    assert alone.doing().startswith("step 12 (evaluating or saving, ")


def test_who_failed_first_is_told_by_the_others_and_its_failure_is_its_own(tmp_path: Path) -> None:
    ranks = three(tmp_path)
    told = {}
    first = threading.Thread(
        target=lambda: told.update(first=ranks[2].explain(OSError(28, "No space left on device")))
    )
    first.start()
    time.sleep(ranks[2].interval_s)
    told["second"] = ranks[1].explain(RuntimeError("Connection closed by peer"))
    first.join()
    assert not told["first"].of_a_peer
    assert "the failure is on this rank" in told["first"].message
    assert told["second"].of_a_peer
    assert "rank 2 on" in told["second"].message
    assert (
        "ended with OSError: [Errno 28] No space left on device, at step 0, starting"
        in told["second"].message
    )
    ranks[0].leave()


def test_where_rank_0_is_gone_the_next_speaks_and_a_rank_that_never_began_is_said(
    tmp_path: Path,
) -> None:
    only = Presence(tmp_path, generation=4, rank=1, world=2, timeout_s=600.0, interval_s=0.1)
    loss = only.explain(RuntimeError("Connection reset by peer"))
    assert loss.speaks
    assert "rank 0 silent since its launch" in loss.message


def test_beats_of_an_earlier_job_count_for_nothing(tmp_path: Path) -> None:
    Presence(tmp_path, generation=3, rank=1, world=2, timeout_s=600.0, interval_s=0.1)._stop()
    now = Presence(tmp_path, generation=4, rank=0, world=2, timeout_s=600.0, interval_s=0.1)
    assert sorted(path.name for path in (tmp_path / "ranks").iterdir()) == ["00000004"]
    assert "rank 1 silent since its launch" in now.explain(RuntimeError("x")).message


def test_a_process_that_was_paused_itself_does_not_take_its_peers_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Presence(tmp_path, generation=1, rank=0, world=2, timeout_s=100.0)
    mine._stop()
    quiet = presence_module._Quiet(mine)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 1e5)
    quiet.look()
    assert quiet.longer_than(0) == [1]
    assert quiet.longer_than(2.1 * mine.interval_s) == []


def test_a_process_alone_writes_nothing(tmp_path: Path) -> None:
    alone = Presence(tmp_path, generation=1, rank=0, world=1, timeout_s=10.0)
    assert not alone.explain(RuntimeError("x")).of_a_peer
    assert list(tmp_path.iterdir()) == []


def test_who_is_asked_to_stop_does_not_wait_long_for_a_silent_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up = threading.Event()
    monkeypatch.setattr(Presence, "_give_up", lambda *_: given_up.set())
    monkeypatch.setattr(presence_module, "STOPS_WITHOUT_S", 0.5)
    mine = Presence(tmp_path, generation=1, rank=0, world=2, timeout_s=600.0, interval_s=0.05)
    assert not given_up.wait(1.5)
    monkeypatch.setattr(waits, "asked", lambda: "SIGTERM")
    assert given_up.wait(10.0)
    mine.leave()


# --------------------------------------------------------------------------------------- real ranks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "victim", "number", "limit_s"),
    [
        (FSDP2, 1, signal.SIGKILL, 1800),
        (FSDP2, 0, signal.SIGKILL, 1800),
        (DDP, 1, signal.SIGKILL, 1800),
        (ZERO2, 1, signal.SIGSTOP, 20),
    ],
)
def test_a_dead_or_hung_rank_ends_the_other_within_the_time_out_and_is_named(
    tiny: Path,
    tmp_path: Path,
    ranks: Callable[..., Ranks],
    engine: list[str],
    victim: int,
    number: signal.Signals,
    limit_s: int,
) -> None:
    run = Folder(tmp_path / "run")
    long = ["schedule.steps=2000", "checkpoint.every_steps=2", f"engine.timeout_s={limit_s}"]
    started = ranks("-m", "rcmae.train", tiny, f"run.dir={run.path}", *long, *engine)
    wait_for(lambda: len(run.steps()) > 4, lambda: started.processes[1 - victim].poll() is None)
    begin, gone = time.monotonic(), started.processes[victim]
    gone.send_signal(number)
    survivor = started.processes[1 - victim]
    try:
        assert survivor.wait(timeout=120) == 1
    finally:
        gone.kill()
        gone.wait()
    # a closed connection is seen at once; four beats, and a machine that others use too
    assert time.monotonic() - begin < (limit_s if number == signal.SIGSTOP else 0) + 30
    said = started.said(1 - victim)
    found = re.search(
        rf"lost rank {victim} on \S+ \(process {gone.pid}\) silent, last seen at step (\d+), (\w+)",
        said,
    )
    assert found, said
    assert 0 <= int(found[1]) <= run.steps()[-1] + 1  # it was said a beat ago
    if victim == 1 and number == signal.SIGKILL:  # its error came to an exception: it could say so
        assert run.events("stop")[-1]["reason"].startswith("lost rank 1")
    if number == signal.SIGKILL:
        assert (
            run.outcome() | {"status": "failed", "exit_status": 1, "again": True} == run.outcome()
        )


@pytest.mark.slow
def test_ctrl_c_beside_a_hung_rank_is_answered_and_a_second_one_ends_the_run(
    tiny: Path, tmp_path: Path, ranks: Callable[..., Ranks]
) -> None:
    run = Folder(tmp_path / "run")
    long = ["schedule.steps=2000", "checkpoint.every_steps=2"]
    started = ranks("-m", "rcmae.train", tiny, f"run.dir={run.path}", *long, *ZERO2)
    first, hung = started.processes
    wait_for(lambda: len(run.steps()) > 4, lambda: first.poll() is None)
    hung.send_signal(signal.SIGSTOP)
    try:
        first.send_signal(signal.SIGINT)
        asked = time.monotonic()
        wait_for(lambda: "stop requested (SIGINT)" in started.said(0), lambda: True, 10.0)
        assert time.monotonic() - asked < 4.0  # a second of patience, and a busy machine
        assert "Ctrl-C again ends it now" in started.said(0)
        first.send_signal(signal.SIGINT)
        assert first.wait(10.0) == 75
    finally:
        first.kill()
        hung.kill()
        hung.wait()
    assert run.outcome()["status"] == "stopped"
    assert run.outcome()["again"]


def rank_of(launcher: subprocess.Popen[bytes], rank: int) -> psutil.Process:
    """The launcher's descendant that is this rank."""
    for process in psutil.Process(launcher.pid).children(recursive=True):
        try:
            if "--multiprocessing-fork" not in process.cmdline() and process.environ().get(
                "RANK"
            ) == str(rank):
                return process
        except psutil.Error:
            continue
    raise AssertionError(f"no rank {rank}")


@pytest.mark.slow
def test_torchrun_starts_the_ranks_again_and_they_go_on_by_themselves(
    tiny: Path, tmp_path: Path, uninterrupted: Folder
) -> None:
    run = Folder(tmp_path / "run")
    command = [
        str(Path(sys.executable).parent / "torchrun"),
        "--nproc_per_node",
        "2",
        "--max-restarts",
        "2",
        "--master_port",
        str(free_port()),
        "-m",
        "rcmae.train",
        str(tiny),
        f"run.dir={run.path}",
        "checkpoint.every_steps=3",
        *FSDP2,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log) as launcher,
    ):
        for victim in (1, 0):
            seen = len(run.events("checkpoint"))
            wait_for(
                lambda n=seen: len(run.events("checkpoint")) > n, lambda: launcher.poll() is None
            )
            rank_of(launcher, victim).kill()
        assert launcher.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    assert [event["step"] >= 3 for event in run.events("resume")] == [True, True]
    assert run.steps() == list(range(1, 21))
    assert run.losses() == pytest.approx(uninterrupted.losses(), rel=1e-5)
