"""One writer a run, fenced when the right to write passes on."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from rcmae import lease as lease_module
from rcmae.lease import Fence, Lease, LeaseHeld, LeaseLost, fence

FOREIGN = {"host": "elsewhere", "boot": "another", "pid": 1, "token": "t", "job": "17"}


def take(run: Path, *, timeout_s: float = 0.6, wait_s: float = 5.0, step: int = 0) -> Lease:
    return Lease(run, timeout_s=timeout_s, wait_s=wait_s, newest_step=lambda: step)


def foreign(run: Path, generation: int = 1, **about: object) -> Path:
    """A lease of a job on another host; its beat file."""
    folder = run / "leases"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**FOREIGN, "generation": generation, "from_step": 0, **about})
    (folder / f"{generation:08d}.json").write_text(text)
    beat = folder / f"{generation:08d}.beat"
    beat.write_text("5")
    return beat


def test_a_released_run_is_taken_at_once(tmp_path: Path) -> None:
    first = take(tmp_path)
    first.release()
    begin = time.monotonic()
    second = take(tmp_path, timeout_s=60, step=30)
    assert time.monotonic() - begin < 5
    assert (first.generation, second.generation, second.holder.from_step) == (1, 2, 30)
    second.release()


def test_a_holder_that_died_on_this_host_is_replaced_at_once(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=lambda: take(tmp_path) and os._exit(0))
    child.start()
    child.join()
    assert take(tmp_path, timeout_s=60).generation == 2


def test_a_holder_that_beats_is_respected_and_named(tmp_path: Path) -> None:
    held = take(tmp_path)
    with pytest.raises(LeaseHeld, match=rf"process {os.getpid()} on {socket.gethostname()} .*another run.dir"):
        take(tmp_path, wait_s=0.0)
    held.release()


def test_a_count_that_stands_still_on_my_clock_is_a_holder_gone(tmp_path: Path) -> None:
    beat = foreign(tmp_path)
    os.utime(beat, (time.time() + 1e6, time.time() + 1e6))  # its host's clock is weeks ahead: no matter
    begin = time.monotonic()
    assert take(tmp_path, timeout_s=0.6).generation == 2
    assert time.monotonic() - begin > 0.6


def test_a_job_that_was_started_again_takes_the_run_from_its_earlier_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    earlier = take(tmp_path, timeout_s=0.9)  # alive and beating, as on a node that the scheduler cannot reach
    with pytest.raises(LeaseHeld):
        take(tmp_path, timeout_s=0.9, wait_s=0.0)  # a second training of the same start
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    later = take(tmp_path, timeout_s=0.9, wait_s=0.0, step=40)
    assert (later.generation, later.holder.restart, later.holder.from_step) == (2, 1, 40)
    with pytest.raises(LeaseLost, match=r"job 17, .* took this run over from step 40"):
        earlier.check()
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    with pytest.raises(LeaseHeld, match="job 17"):
        take(tmp_path, timeout_s=0.9, wait_s=0.0)  # another job waits like anybody
    later.release()
    earlier.release()


def test_a_holder_that_was_passed_over_notices_and_stops(tmp_path: Path) -> None:
    held = take(tmp_path, timeout_s=0.3)
    held.check()
    foreign(tmp_path, generation=2, from_step=40)
    with pytest.raises(LeaseLost, match=r"job 17, process 1 on elsewhere \(generation 2\) took .* from step 40"):
        held.check()
    deadline = time.monotonic() + 10
    while held._thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert held.lost  # the beating thread sees it by itself
    held.release()
    assert (tmp_path / "leases" / "00000002.beat").read_text() == "5"  # nothing of the other's was touched


def test_of_two_jobs_that_reach_for_a_generation_one_gets_it(tmp_path: Path) -> None:
    foreign(tmp_path).write_text("released")
    context = multiprocessing.get_context("fork")
    got, done = context.SimpleQueue(), context.Event()

    def reach() -> None:
        try:
            mine = Lease(tmp_path, timeout_s=6, wait_s=0.0, newest_step=lambda: 0)
            got.put(mine.generation)
            done.wait(60)
        except LeaseHeld:
            got.put(None)

    jobs = [context.Process(target=reach) for _ in range(4)]
    for job in jobs:
        job.start()
    outcomes = [got.get() for _ in jobs]
    done.set()
    for job in jobs:
        job.join()
    assert sorted(outcomes, key=str) == [2, None, None, None]


def test_a_paused_holder_does_not_beat_and_wakes_to_a_lost_run(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()

    def hold() -> None:
        mine = take(tmp_path, timeout_s=0.5)
        told.put("holding")
        while not mine.lost:
            time.sleep(0.01)
        told.put("lost")
        os._exit(0)

    child = context.Process(target=hold)
    child.start()
    assert told.get() == "holding"
    assert child.pid is not None
    os.kill(child.pid, signal.SIGSTOP)
    mine = take(tmp_path, timeout_s=0.5, step=12)
    assert (mine.generation, mine.holder.from_step) == (2, 12)
    os.kill(child.pid, signal.SIGCONT)
    assert told.get() == "lost"
    child.join()
    mine.check()
    mine.release()


def test_the_fence_counts_out_what_a_passed_over_writer_commits(tmp_path: Path) -> None:
    rules = Fence(((1, 0), (2, 100), (3, 250)))
    assert rules.allows(1, 100)
    assert not rules.allows(1, 101)
    assert not rules.allows(2, 300)
    assert rules.allows(2, 250)
    assert rules.allows(3, 10_000)
    foreign(tmp_path, 1)
    foreign(tmp_path, 2, from_step=100)
    assert fence(tmp_path) == Fence(((1, 0), (2, 100)))
    assert fence(tmp_path / "nowhere") == Fence(())


def test_a_folder_that_cannot_be_written_loses_the_run_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = take(tmp_path, timeout_s=0.3)

    def refuse(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lease_module, "_replace", refuse)
    deadline = time.monotonic() + 10
    while not held.lost and time.monotonic() < deadline:
        time.sleep(0.05)
        with contextlib.suppress(LeaseLost):
            held.check()
    with pytest.raises(LeaseLost, match="no beat could be written"):
        held.check()
