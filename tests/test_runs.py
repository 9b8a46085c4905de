"""Every second of a run is accounted for once, over stops, kills, requeues and rewinds."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rcmae.commands import runs
from rcmae.process.alive import boot
from rcmae.run.records.status import status
from runs import Folder, once, send, start, wait_for
from tests.conftest import Ranks

SIZES = {"world": 8, "total_steps": 100}


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def step(number: int, at: float, **more: float) -> dict[str, Any]:
    return {
        "step": number,
        "time": at,
        "step_s": 1.0,
        "data_wait_s": 0.25,
        "loss": 0.5,
        "epoch": 0.1,
        **more,
    }


def begin(at: float, number: int, **more: Any) -> dict[str, Any]:
    kind = "resume" if number else "start"
    return {
        "event": kind,
        "time": at,
        "step": number,
        "sizes": SIZES,
        "process_started": at - 10,
        **more,
    }


@pytest.fixture
def told_run(tmp_path: Path) -> Path:
    """Two starts of one SLURM job and one of another.

    The first was killed at step 35 after a checkpoint of 20.
    """
    write(
        tmp_path / "events.jsonl",
        begin(1000, 0, job="7", restart=0, generation=1),
        {
            "event": "checkpoint",
            "time": 1021,
            "step": 20,
            "stall_s": 0.5,
            "seconds": 3.0,
            "bytes": 10,
        },
        begin(1100, 20, job="7", restart=1, generation=2, undone={"step": 35, "time": 1037}),
        {"event": "evaluate", "time": 1126, "step": 40, "seconds": 5.0, "knn": {}},
        {
            "event": "stop",
            "time": 1130,
            "step": 40,
            "status": 75,
            "reason": "stopped, asked by SIGUSR1",
        },
        begin(1200, 40, job="9", restart=0, generation=3),
        {
            "event": "checkpoint",
            "time": 1261,
            "step": 100,
            "stall_s": 1.0,
            "seconds": 3.0,
            "bytes": 10,
        },
        {"event": "stop", "time": 1262, "step": 100, "status": 0, "reason": "finished"},
    )
    first = [step(n, 1000 + n, teacher_update_s=0.125) for n in (5, 10, 15, 20)]
    second = [
        step(n, 1100 + n - 20 + 5 * (n == 25), step_s=2.0 if n == 25 else 1.0)
        for n in (25, 30, 35, 40)
    ]
    third = [step(n, 1200 + n - 40) for n in range(45, 101, 5)]
    write(tmp_path / "metrics.jsonl", *first, *second, *third)
    write(
        tmp_path / "jobs.jsonl",
        *(
            {"job": job, "restart": restart, "time": at, "step": 0}
            for job, restart, at in (
                ("7", 0, 980),
                ("7", 1, 1080),
                ("8", 0, 1140),
                ("9", 0, 1185),
            )
        ),
    )
    return tmp_path


def test_every_second_is_of_one_kind(told_run: Path) -> None:
    told = status(told_run, now=2000.0)
    assert told["wall_s"] == 1262 - 980
    assert sum(told["seconds"].values()) == pytest.approx(told["wall_s"])
    first, second, third = (job["seconds"] for job in told["jobs"])
    assert first["start-up"] == 20
    assert first["step"] == pytest.approx(20 * (1 - 0.25 - 0.125))
    assert first["ema"] == pytest.approx(20 * 0.125)
    assert first["data wait"] == pytest.approx(5)
    assert first["replayed"] == 17 - 0.5, (
        "from the checkpoint's step to the last logged one, less its stall"
    )
    assert second["queue"] == 1080 - 1037, "the same job came back"
    assert second["start-up"] == 20 + 5, "the first steps took a second longer than usual"
    assert second["evaluation"] == 5
    assert third["idle"] == 1185 - 1130, "another job"
    assert third["checkpoint"] == 1
    assert told["goodput"] == pytest.approx(
        sum(job["step"] + job["ema"] for job in (first, second, third)) / 282
    )


def test_an_evaluation_that_a_stop_left_is_evaluation(told_run: Path) -> None:
    left = {"event": "evaluation_left", "time": 1126, "step": 40}
    before = (told_run / "events.jsonl").read_text()
    for row, seconds in ((left | {"seconds": 4.0}, 4.0), (left, 0.0)):  # older runs did not time it
        lines = [json.loads(line) for line in before.splitlines()]
        lines[3] = row
        (told_run / "events.jsonl").unlink()
        write(told_run / "events.jsonl", *lines)
        assert status(told_run, now=2000.0)["jobs"][1]["seconds"]["evaluation"] == seconds


def test_an_evaluation_that_was_killed_is_evaluation(told_run: Path) -> None:
    """Of the second job nothing but its steps and the beginning of an evaluation is left."""
    lines = [json.loads(line) for line in (told_run / "events.jsonl").read_text().splitlines()]
    begun = {"event": "evaluation_begun", "time": 1121, "step": 40}
    assert lines[3]["event"] == "evaluate"
    assert lines[4]["event"] == "stop"
    (told_run / "leases").mkdir()
    beat = told_run / "leases" / "00000002.beat"  # the last sign of the process
    beat.touch()
    os.utime(beat, (1150, 1150))
    (told_run / "events.jsonl").unlink()
    write(told_run / "events.jsonl", *lines[:3], begun, *lines[5:])
    told = status(told_run, now=2000.0)
    second = told["jobs"][1]
    assert second["how"] == "ended without an event"
    assert second["seconds"]["evaluation"] == 1150 - 1121
    assert second["seconds"]["other"] < 1.5
    assert begun not in told["last_events"]
    (told_run / "events.jsonl").unlink()
    write(told_run / "events.jsonl", *lines[:3], begun, *lines[3:])
    assert status(told_run, now=2000.0)["jobs"][1]["seconds"]["evaluation"] == 5, "it ended"


def test_where_a_run_stands(told_run: Path) -> None:
    told = status(told_run, now=2000.0)
    assert (told["state"], told["step"], told["hours_to_go"]) == ("finished", 100, 0.0)
    assert told["undone_steps"] == 15
    assert told["starts_without_training"] == 1, "job 8 never came to a step"
    assert [job["how"] for job in told["jobs"]] == [
        "ended without an event",
        "stopped, asked by SIGUSR1",
        "finished",
    ]
    assert [(job["first_step"], job["last_step"]) for job in told["jobs"]] == [
        (0, 20),
        (20, 40),
        (40, 100),
    ]
    assert told["last_events"][-1]["reason"] == "finished"


def test_a_rewind_counts_as_replayed(tmp_path: Path) -> None:
    spike = {
        "event": "spike",
        "time": 1031,
        "step": 30,
        "action": "rewind",
        "checkpoint": "step-00000020",
    }
    write(tmp_path / "events.jsonl", begin(1000, 0), spike)
    write(
        tmp_path / "metrics.jsonl",
        *(step(n, 1000 + n) for n in (10, 20)),
        *(step(n, 1012 + n) for n in (30, 40)),
    )
    told = status(tmp_path, now=1100.0)
    assert told["undone_steps"] == 10
    assert told["seconds"]["replayed"] == 11
    assert told["seconds"]["step"] == pytest.approx(40 * 0.75)


def test_a_silent_job_is_alive_until_its_beat_is_old(tmp_path: Path) -> None:
    write(tmp_path / "events.jsonl", begin(1000, 0, generation=3))
    write(tmp_path / "metrics.jsonl", *(step(n, 1000 + n) for n in (10, 20)))
    beat = tmp_path / "leases" / "00000003.beat"
    beat.parent.mkdir()
    beat.write_text("4")
    os.utime(beat, (1025, 1025))
    told = status(tmp_path, now=1040.0)
    assert (told["state"], told["jobs"][0]["ended"]) == ("training", 1040.0)
    assert told["hours_to_go"] == pytest.approx(80 / 3600)
    assert told["seconds"]["other"] == pytest.approx(20.0), "what no line tells of"
    told = status(tmp_path, now=1025 + 181.0)
    assert (told["state"], told["jobs"][0]["ended"]) == (
        "not running: ended without an event",
        1025,
    )
    (tmp_path / "recipe.yaml").write_text("run: {lease_timeout_s: 1000}")
    assert status(tmp_path, now=1025 + 181.0)["state"] == "training"


def test_a_job_whose_process_died_on_this_host_is_not_alive(tmp_path: Path) -> None:
    """Its beat is fresh for a while; of a process elsewhere the beat alone tells."""
    write(tmp_path / "events.jsonl", begin(1000, 0, generation=3))
    write(tmp_path / "leases" / "00000003.beat")
    os.utime(tmp_path / "leases" / "00000003.beat", (1025, 1025))
    process = subprocess.Popen(["sleep", "60"])
    holder = {"host": socket.gethostname(), "boot": boot(), "pid": process.pid}
    write(tmp_path / "leases" / "00000003.json", holder)
    assert status(tmp_path, now=1030.0)["state"] == "training"
    process.kill()
    process.wait()
    told = status(tmp_path, now=1030.0)
    assert (told["state"], told["jobs"][0]["ended"]) == (
        "not running: ended without an event",
        1025,
    )
    (tmp_path / "leases" / "00000003.json").unlink()
    write(tmp_path / "leases" / "00000003.json", {**holder, "host": "elsewhere"})
    assert status(tmp_path, now=1030.0)["state"] == "training"


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a stand-in for SLURM's squeue says of any job; empty: that it is over."""
    answer = tmp_path / "answer"
    answer.write_text("")
    program = tmp_path / "bin" / "squeue"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat {answer}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    return answer


def cut(run: Path, events: int) -> None:
    """Leave so many lines of a run's events: what it wrote by some moment."""
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(lines[:events]))


def test_a_run_that_was_requeued_is_told_by_its_job(told_run: Path, squeue: Path) -> None:
    cut(told_run, 5)  # job 7 was stopped by its second start
    stopped = "not running: stopped, asked by SIGUSR1"
    assert (status(told_run)["state"], status(told_run)["is_over"]) == (stopped, True)
    squeue.write_text("PENDING Resources\n")
    told = status(told_run)
    assert told["state"] == "requeued, waiting in the queue (job 9: Resources)"
    assert not told["is_over"]
    squeue.write_text("RUNNING None\n")
    told = status(told_run)
    assert (told["state"], told["is_over"]) == ("starting (job 9)", False)
    assert told["starts_without_training"] == 1, "job 8; that of 9 loads"
    squeue.write_text("")
    assert status(told_run)["starts_without_training"] == 2, "job 9 is over"
    lines = (told_run / "jobs.jsonl").read_text().splitlines(keepends=True)
    (told_run / "jobs.jsonl").write_text("".join(lines[:2]))
    squeue.write_text("COMPLETING None\n")
    assert status(told_run)["state"] == "ending (job 7)"


def test_watching_goes_on_through_a_requeue(
    told_run: Path,
    squeue: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = (told_run / "events.jsonl").read_text()
    cut(told_run, 5)
    squeue.write_text("PENDING BeginTime\n")
    monkeypatch.setattr(runs, "QUEUE_EACH_S", 0.1)
    timer = threading.Timer(0.5, lambda: (told_run / "events.jsonl").write_text(whole))
    timer.start()
    assert runs.main(["status", str(told_run), "--watch", "--json", "--every-s", "0.1"]) == 0
    timer.join()
    states = [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()]
    assert states[0] == "requeued, waiting in the queue (job 9: BeginTime)"
    assert states[-1] == "finished"


def test_watching_ends_where_the_job_ended_before_it_trained(
    tmp_path: Path, squeue: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "jobs.jsonl", {"job": "8", "restart": 0, "time": 1000.0})
    assert runs.main(["status", str(tmp_path), "--watch", "--every-s", "0.1"]) == 2
    assert f"{tmp_path}/logs/job-8/rank-00000.log" in capsys.readouterr().err


def test_torn_lines_and_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.main(["status", str(tmp_path / "nothing")]) == 2
    assert "is not a run" in capsys.readouterr().err
    write(tmp_path / "events.jsonl", begin(1000, 0))
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "stop", "ti')
    told = status(tmp_path, now=1001.0)
    assert (told["step"], told["hours_to_go"], told["goodput"]) == (0, None, 0.0)
    assert runs.main(["status", str(tmp_path)]) == 0
    assert "step 0 of 100" in capsys.readouterr().out


def test_a_real_run_stopped_and_killed_is_told_right(
    tiny: Path, tmp_path: Path, ranks: Callable[..., Ranks], capsys: pytest.CaptureFixture[str]
) -> None:
    """One start stopped by a signal, one killed in its checkpoint's wake, one to the end: real
    files, real clocks.
    """
    before = time.time()
    folder = Folder(tmp_path / "run")
    common = ["checkpoint.every_steps=4", "run.lease_timeout_s=3"]
    with once(lambda: 6 in folder.steps(), send(signal.SIGTERM)):
        assert start(tiny, folder.path, *common) == 75
    stopped = folder.committed()[-1]
    killed = ranks(
        "-m",
        "rcmae.train",
        str(tiny),
        f"run.dir={folder.path}",
        *common,
        "schedule.steps=20",
        world=1,
    )
    wait_for(lambda: 14 in folder.steps(), lambda: killed.processes[0].poll() is None)
    killed.processes[0].kill()
    killed.wait()
    told = status(folder.path)
    assert told["step"] >= 14
    assert start(tiny, folder.path, *common) == 0
    told = status(folder.path)
    assert (told["state"], told["step"], len(told["jobs"])) == ("finished", 20, 3)
    resumed = folder.events("resume")[-1]
    assert told["undone_steps"] == resumed["undone"]["step"] - resumed["step"] > 0
    assert [job["first_step"] for job in told["jobs"]] == [0, stopped, resumed["step"]]
    assert all(one["ended"] <= other["began"] for one, other in itertools.pairwise(told["jobs"]))
    assert sum(told["seconds"].values()) == pytest.approx(told["wall_s"], rel=0.02)
    assert 0 < told["goodput"] < 1
    assert told["jobs"][1]["seconds"]["start-up"] > 0.5, "a process that imports torch"
    assert told["jobs"][1]["began"] > before
    begun, first = folder.events("resume")[0], folder.events("first_step")[1]
    assert sum(first["startup_s"].values()) == pytest.approx(
        first["time"] - begun["process_started"], abs=0.1
    )
    assert list(first["startup_s"])[:3] == ["imports", "recipe", "process group"]
    assert first["startup_s"]["imports"] > 0.5
    assert told["startup_s"] == folder.events("first_step")[-1]["startup_s"]
    assert runs.main(["status", str(folder.path), "--watch"]) == 0
    assert "goodput" in capsys.readouterr().out


def test_a_run_whose_job_is_starting_is_told_with_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "jobs.jsonl", {"job": "8", "restart": 0, "time": 1000.0})
    assert runs.main(["status", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "has not begun to train: job 8" in said
    assert f"{tmp_path}/logs/job-8/rank-00000.log" in said


def test_watching_waits_for_the_first_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"  # its job is in the queue

    def begin_and_finish() -> None:
        write(run / "metrics.jsonl", step(100, 1100.0))
        stop = {"event": "stop", "time": 1101.0, "step": 100, "reason": "finished"}
        write(run / "events.jsonl", begin(1000, 0), stop)

    timer = threading.Timer(0.5, begin_and_finish)
    timer.start()
    assert runs.main(["status", str(run), "--watch", "--json", "--every-s", "0.1"]) == 0
    timer.join()
    told = capsys.readouterr()
    assert "waiting for a start" in told.err
    assert json.loads(told.out.splitlines()[-1])["state"] == "finished"


def test_watching_ends_with_the_run(tmp_path: Path) -> None:
    write(tmp_path / "events.jsonl", begin(time.time(), 0, generation=1))
    (tmp_path / "leases").mkdir()
    (tmp_path / "leases" / "00000001.beat").write_text("1")

    def finish() -> None:
        write(tmp_path / "metrics.jsonl", step(100, time.time()))
        write(
            tmp_path / "events.jsonl",
            {"event": "stop", "time": time.time(), "step": 100, "reason": "finished"},
        )

    timer = threading.Timer(3.0, finish)
    timer.start()
    command = [
        sys.executable,
        "-m",
        "rcmae",
        "runs",
        "status",
        str(tmp_path),
        "--watch",
        "--json",
        "--every-s",
        "0.2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    timer.join()
    states = [json.loads(line)["state"] for line in done.stdout.splitlines()]
    assert states[-1] == "finished", done.stderr
    assert set(states[:-1]) <= {"training"}


def test_lines_that_somebody_edited_are_left_out(told_run: Path) -> None:
    whole = status(told_run, now=10_000.0)
    for name in ("events.jsonl", "metrics.jsonl"):
        rows = [json.loads(line) for line in (told_run / name).read_text().splitlines()]
        odd: list[dict[str, Any]] = []
        for row in rows:
            odd += [{key: row[key] for key in row if key != gone} for gone in row]
            odd += [{**row, key: ["x"]} for key in row if key not in ("undone", "process_started")]
        kept = [row for row in odd if row.get("event") not in ("start", "resume", "stop")]
        with (told_run / name).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in [*kept, {"event": "start"}, {}])
    found = status(told_run, now=10_000.0)
    assert (found["step"], found["state"]) == (whole["step"], whole["state"])
    assert runs.main(["status", str(told_run)]) == 0


def test_a_run_that_logged_no_step_yet_says_where_it_stands(tmp_path: Path) -> None:
    start = {"event": "start", "time": 1000.0, "step": 0, "sizes": {"total_steps": 40, "world": 1}}
    events = [start, {"event": "first_step", "time": 1010.0, "step": 1}]
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (tmp_path / "events.jsonl").write_text(lines)
    (tmp_path / "progress.json").write_text(json.dumps({"step": 10, "time": 1100.0}) + "\n")
    told = status(tmp_path, now=1102.0, asks=False)
    assert told["step"] == 10
    assert told["seconds"]["step"] == pytest.approx(100.0), "it trained, though nothing is logged"
    assert told["goodput"] > 0.9
    stop = {"event": "stop", "time": 1105.0, "step": 10, "status": 75, "reason": "stopped"}
    (tmp_path / "events.jsonl").write_text(lines + json.dumps(stop) + "\n")
    told = status(tmp_path, now=2000.0, asks=False)
    assert told["seconds"]["step"] == pytest.approx(100.0), "not the wait for its last save"
    assert told["seconds"]["other"] == pytest.approx(5.0)
    older = json.dumps({"step": 30, "time": 900.0}) + "\n"  # of a start before
    (tmp_path / "progress.json").write_text(older)
    assert status(tmp_path, now=2000.0, asks=False)["step"] == 10
