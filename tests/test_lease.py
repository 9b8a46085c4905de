"""One writer a run, fenced when the right to write passes on."""

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rcmae import checkpoint
from rcmae.checkpoint import lease as lease_module
from rcmae.checkpoint.lease import Fence, Lease, LeaseHeld, LeaseLost, exit_status, fence
from rcmae.process.alive import boot
from runs import Folder, equal, python_path, start, wait_for
from tests.conftest import ROOT

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
    child = multiprocessing.get_context("fork").Process(
        target=lambda: take(tmp_path) and os._exit(0)
    )
    child.start()
    child.join()
    assert take(tmp_path, timeout_s=60).generation == 2


def test_a_holder_that_beats_is_respected_and_named(tmp_path: Path) -> None:
    held = take(tmp_path)
    with pytest.raises(
        LeaseHeld, match=rf"process {os.getpid()} on {socket.gethostname()} .*another run.dir"
    ):
        take(tmp_path, wait_s=0.0)
    held.release()


def test_a_count_that_stands_still_on_my_clock_is_a_holder_gone(tmp_path: Path) -> None:
    beat = foreign(tmp_path)
    # its host's clock is weeks ahead: no matter
    os.utime(beat, (time.time() + 1e6, time.time() + 1e6))
    begin = time.monotonic()
    assert take(tmp_path, timeout_s=0.6).generation == 2
    assert time.monotonic() - begin > 0.6


def test_a_job_that_was_started_again_takes_the_run_from_its_earlier_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    # alive and beating, as on a node that the scheduler cannot reach
    earlier = take(tmp_path, timeout_s=0.9)
    with pytest.raises(LeaseHeld):
        take(tmp_path, timeout_s=0.9, wait_s=0.0)  # a second training of the same start
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert exit_status(tmp_path, 1) == 1  # nobody has taken it over yet
    later = take(tmp_path, timeout_s=0.9, wait_s=0.0, step=40)
    assert exit_status(tmp_path, 1) == 1
    assert (later.generation, later.holder.restart, later.holder.from_step) == (2, 1, 40)
    with pytest.raises(LeaseLost, match=r"job 17, .* took over this run from step 40"):
        earlier.check()
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    # its srun would end the later start's step
    assert (exit_status(tmp_path, 1), exit_status(tmp_path, 75)) == (0, 0)
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert exit_status(tmp_path, 1) == 1
    with pytest.raises(LeaseHeld, match="job 17"):
        take(tmp_path, timeout_s=0.9, wait_s=0.0)  # another job waits like anybody
    later.release()
    earlier.release()


def test_a_holder_that_was_passed_over_notices_and_stops(tmp_path: Path) -> None:
    held = take(tmp_path, timeout_s=0.3)
    held.check()
    foreign(tmp_path, generation=2, from_step=40)
    with pytest.raises(
        LeaseLost,
        match=r"job 17, process 1 on elsewhere \(start 2 of the run\) took .* from step 40",
    ):
        held.check()
    deadline = time.monotonic() + 10
    while held._thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert held.lost  # the beating thread sees it by itself
    held.release()
    # nothing of the other's was touched
    assert (tmp_path / "leases" / "00000002.beat").read_text() == "5"


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


def test_a_folder_that_cannot_be_written_loses_the_run_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = take(tmp_path, timeout_s=0.3)

    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Lease, "_write_beat", refuse)
    deadline = time.monotonic() + 10
    while not held.lost and time.monotonic() < deadline:
        time.sleep(0.05)
        with contextlib.suppress(LeaseLost):
            held.check()
    with pytest.raises(LeaseLost, match="no beat could be written"):
        held.check()


def test_a_lease_that_cannot_be_read_for_a_moment_ends_neither_the_beat_nor_the_look(
    tmp_path: Path,
) -> None:
    held = take(tmp_path, timeout_s=0.6)
    mine = tmp_path / "leases" / "00000001.json"
    whole = mine.read_bytes()
    mine.write_bytes(b"")
    time.sleep(0.4)
    assert held._thread.is_alive()
    held.check()
    mine.write_bytes(whole)
    with pytest.raises(LeaseHeld, match="which is alive"):
        take(tmp_path, timeout_s=0.6, wait_s=0.0)
    mine.write_bytes(b"[" * 100_000)
    foreign(tmp_path, generation=2).with_suffix(".json").write_text("half a fi")
    deadline = time.monotonic() + 10
    while not held.lost and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(LeaseLost, match=r"another job \(start 2 of the run\) took over this run"):
        held.check()


def test_a_lease_that_stays_unreadable_refuses_a_start_and_fails_a_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "_READ_AGAIN_S", 0.2)
    foreign(tmp_path).with_suffix(".json").write_text('{"generation": "1"}')
    with pytest.raises(LeaseHeld, match=r"00000001.json cannot be read .* delete it"):
        take(tmp_path)
    with pytest.raises(OSError, match="cannot be read"):
        fence(tmp_path)


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("00000009", {}),
        ("00000001", {"generation": 9}),
        ("00000001", {"from_step": -1}),
        ("00000001", {"pid": "4711"}),
        ("00000001", {"pid": 10**30}),
        ("00000001", {"restart": None}),
        ("00000001", {"host": ["a"]}),
        ("00000001", {"token": None}),
    ],
)
def test_a_lease_that_no_job_wrote_is_refused_by_its_name(
    file: str, changed: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was taken, and lost at once to itself, or ended a start with a traceback."""
    monkeypatch.setattr("rcmae.checkpoint.lease._READ_AGAIN_S", 0.0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    here = {"host": socket.gethostname(), "boot": boot(), "pid": 1, "job": "7", "restart": 0}
    holder = {"generation": 1, "from_step": 0, "token": "t", **here} | changed
    (tmp_path / "leases").mkdir()
    (tmp_path / "leases" / f"{file}.json").write_text(json.dumps(holder))
    with pytest.raises(LeaseHeld, match=rf"{file}\.json cannot be read .* delete it"):
        take(tmp_path, timeout_s=0.3)


def test_a_beat_of_any_bytes_stands_still(tmp_path: Path) -> None:
    holder = {"generation": 1, "from_step": 0, "token": "t", "host": "h", "boot": "b", "pid": 1}
    (tmp_path / "leases").mkdir()
    (tmp_path / "leases" / "00000001.json").write_text(json.dumps({**holder, "job": ""}))
    (tmp_path / "leases" / "00000001.beat").write_bytes(b"\xff\xfe\x00")
    taken = take(tmp_path, timeout_s=0.2)
    assert taken.generation == 2
    taken.release()


def test_a_holder_whose_beating_thread_is_stuck_stops_or_beats_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = take(tmp_path, timeout_s=0.3)
    monkeypatch.setattr(Lease, "_keep_beating", lambda self: None)
    dead = take(tmp_path / "other", timeout_s=0.3)
    dead._thread.join()
    time.sleep(0.4)
    assert not dead.lost  # nobody took it: the loop itself has beaten
    monkeypatch.setattr(dead, "_write_beat", lambda text: os.open("/nowhere/at/all", os.O_RDONLY))
    time.sleep(0.4)
    assert dead.lost
    assert "no beat could be written" in dead.why_lost
    assert dead.holds()  # still, nobody has: its outcome may be written down
    held.release()


def test_a_folder_that_was_deleted_is_taken_again_unless_another_job_has_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    held = take(run, timeout_s=0.6)
    shutil.rmtree(run)
    held.check()
    assert held.holds()
    with pytest.raises(LeaseHeld):
        take(run, timeout_s=0.6, wait_s=0.0)
    held._done.set()
    held._thread.join()
    shutil.rmtree(run)
    other = take(run, timeout_s=60)
    assert other.generation == held.generation
    with pytest.raises(LeaseLost, match=r"its folder was deleted, process .* took over this run"):
        held.check()
    assert not held.holds()
    other.check()
    other.release()


# ---------------------------------------------------------------------- two trainings on one folder


@contextlib.contextmanager
def training(log: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """`python COMMAND...` in a process of its own, for as long as the block lasts."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=env, stdout=out, stderr=out
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_of_two_trainings_on_one_folder_exactly_one_commits(tiny: Path, tmp_path: Path) -> None:
    run = Folder(tmp_path / "run")
    job = [
        "-m",
        "rcmae.train",
        str(tiny),
        f"run.dir={run.path}",
        "schedule.steps=100000",
        "run.lease_wait_s=0",
    ]
    logs = [tmp_path / "one", tmp_path / "other"]
    with training(logs[0], *job) as one, training(logs[1], *job) as other:
        wait_for(lambda: (one.poll() or other.poll()) is not None, lambda: True)
        refused = (one, other).index(one if one.poll() is not None else other)
        went = (other, one)[refused]
        wait_for(lambda: run.committed() != [], lambda: went.poll() is None)
        went.terminate()
        assert [process.wait(timeout=120) for process in ((one, other)[refused], went)] == [2, 75]
    said = logs[refused].read_text()
    assert re.search(
        rf"is being trained by process {went.pid} on \S+ \(start 1 of the run\), which is alive",
        said,
    ), said
    assert "use another run.dir" in said
    assert {
        checkpoint.read_manifest(path).generation for path in run.checkpoints.glob("step-*")
    } == {1}
    assert run.committed()[-1] == run.outcome()["step"]
    assert len(run.events("start")) == 1


def test_a_holder_paused_between_its_last_check_and_its_rename_changes_nothing_that_is_read(
    tiny: Path, tmp_path: Path, uninterrupted: Folder
) -> None:
    run = Folder(tmp_path / "run")
    job = [
        str(tiny),
        f"run.dir={run.path}",
        "checkpoint.every_steps=5",
        "checkpoint.keep=9",
        "run.lease_timeout_s=1",
    ]
    pausing = str(ROOT / "tests" / "programs" / "paused_commit.py")
    with training(tmp_path / "log", pausing, "10", *job) as paused:
        process = psutil.Process(paused.pid)
        wait_for(lambda: process.status() == psutil.STATUS_STOPPED, lambda: paused.poll() is None)
        assert run.committed() == [5]
        later = take(run.path, timeout_s=1, step=5)

        paused.send_signal(signal.SIGCONT)
        assert paused.wait(timeout=120) == 1
    said = (tmp_path / "log").read_text()
    assert "took over this run from step 5; this job stops and writes nothing more" in said
    assert "Free space" not in said.splitlines()[-1]  # the wrong way out
    assert (run.checkpoints / "step-00000010" / "manifest.json").exists()  # it did rename, and ...
    newest, passed_over = checkpoint.newest(run.checkpoints)
    assert newest is not None
    assert newest.step == 5  # ... nobody reads it
    assert "its writer, start 1 of the run, had lost the run" in passed_over[0]
    assert (run.checkpoints / "LATEST").read_text() == "step-00000005\n"
    assert not (run.path / "outcome.json").exists()

    later.release()
    assert start(tiny, run.path, *job[2:]) == 0
    assert run.events("resume")[-1]["step"] == 5
    assert run.steps() == list(range(1, 21))
    assert equal(run.state(), uninterrupted.state())
    assert checkpoint.read_manifest(run.checkpoints / "step-00000010").generation == 3
