"""Asked to stop, or short of time: the step is committed, and a commit under way is never
broken.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rcmae.run import preempt
from rcmae.run.loop import schedule
from rcmae.tasks import judging, protocol
from runs import Folder, at_step, equal, keeping_handlers, send, start


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "run")


def test_a_signal_in_the_first_step_commits_it(
    tiny: Path, folder: Folder, uninterrupted: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "learning_rate", at_step(0, send(signal.SIGTERM)))
    assert start(tiny, folder.path) == 75
    assert (folder.outcome()["step"], folder.committed(), folder.steps()) == (1, [1], [1])
    monkeypatch.undo()
    assert start(tiny, folder.path) == 0
    assert equal(folder.state(), uninterrupted.state())


def test_a_signal_during_an_evaluation_commits_its_step_after_it(
    tiny: Path,
    photo_shards: str,
    folder: Folder,
    uninterrupted: Folder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluated = [
        "evaluate.every_steps=4",
        f"evaluate.train_shards={photo_shards.replace('000005', '000004')}",
        f"evaluate.test_shards={photo_shards}",
    ]
    rows = judging.knn_rows

    def interrupted(*args: Any, **named: Any) -> Any:
        send(signal.SIGUSR1)()
        return rows(*args, **named)

    monkeypatch.setattr(judging, "knn_rows", interrupted)
    assert start(tiny, folder.path, *evaluated) == 75
    assert [event["step"] for event in folder.events("evaluate")] == [4]
    assert (folder.outcome()["step"], folder.committed()) == (4, [4])
    monkeypatch.undo()
    assert start(tiny, folder.path, *evaluated) == 0
    assert [event["step"] for event in folder.events("evaluate")] == [4, 8, 12, 16, 20]
    best = folder.events("evaluate")[-1]["best"]
    for name in ("student", "teacher"):  # over both jobs
        seen = [max(event["knn"][name].values()) for event in folder.events("evaluate")]
        assert best[name] == {"knn": max(seen), "step": 4 * (1 + seen.index(max(seen)))}
    assert equal(folder.state(), uninterrupted.state())


@pytest.mark.parametrize("step", [4, 20], ids=["on the way", "the last"])
def test_a_signal_ends_an_evaluation_which_the_next_job_makes(
    tiny: Path,
    photo_shards: str,
    folder: Folder,
    uninterrupted: Folder,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    evaluated = [
        f"evaluate.every_steps={step}",
        f"evaluate.train_shards={photo_shards.replace('000005', '000004')}",
        f"evaluate.test_shards={photo_shards}",
    ]
    reading = protocol.labelled_batches

    def interrupted(*args: Any, **named: Any) -> Any:
        for number, batch in enumerate(reading(*args, **named)):
            if number == 0:
                send(signal.SIGUSR1)()
            yield batch

    monkeypatch.setattr(protocol, "labelled_batches", interrupted)
    assert start(tiny, folder.path, *evaluated) == 75
    assert folder.events("evaluate") == []
    (left,) = folder.events("evaluation_left")
    assert left["step"] == step
    assert left["seconds"] > 0
    assert (folder.outcome()["step"], folder.committed()[-1]) == (step, step)
    assert folder.outcome()["again"]
    monkeypatch.undo()
    for _ in range(2):  # a finished run that is started again evaluates nothing again
        assert start(tiny, folder.path, *evaluated) == 0
        made = [event["step"] for event in folder.events("evaluate")]
        assert made == list(range(step, 21, step))
    assert equal(folder.state(), uninterrupted.state())


def test_evaluate_only_judges_the_newest_checkpoint_and_trains_nothing(
    tiny: Path, photo_shards: str, folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = photo_shards.replace("000005", "000004")
    shards = [f"evaluate.train_shards={fewer}", f"evaluate.test_shards={photo_shards}"]
    assert start(tiny, folder.path, "run.stop_after_steps=6") == 75
    before = (folder.committed(), folder.outcome(), folder.steps())
    assert start(tiny, folder.path, *shards, "--evaluate-only") == 2
    assert "set evaluate.every_steps" in capsys.readouterr().err
    evaluated = [*shards, "evaluate.every_steps=10"]
    assert start(tiny, folder.path, *evaluated, "--evaluate-only") == 0
    assert [event["step"] for event in folder.events("evaluate")] == [6]
    assert "k-NN at step 6" in capsys.readouterr().out
    assert (folder.committed(), folder.outcome(), folder.steps()) == before


def test_check_prints_what_would_run_and_writes_nothing(
    tiny: Path, folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tiny, folder.path, "--check") == 0
    shown = capsys.readouterr().out
    assert "# This run can start; it starts from scratch." in shown
    assert re.search(r"# time: about \S+ (ms|s|min): 20 steps of ", shown)
    assert "# total_steps: 20" in shown
    assert yaml.safe_load(shown)["run"]["dir"] == str(folder.path)
    assert not folder.path.exists()
    assert start(tiny, folder.path, "--check", "data.shards=/nowhere/*.tar") == 2
    assert not folder.path.exists()


class Clock:
    """Seconds since 1970 as the scheduler's deadline has them, and since the machine began.

    They pass only where a test says so.
    """

    def __init__(self) -> None:
        self.now = 1e9
        self.set_by = 0.0  # somebody set the machine's clock

    def time(self) -> float:
        return self.now + self.set_by

    def monotonic(self) -> float:
        return self.now - 9e8

    def leap_to(self, seconds: float) -> Callable[[], None]:
        return lambda: setattr(self, "now", seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(preempt, "time", found := Clock())
    return found


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> float:
    """How long a checkpoint's file takes at least to reach the disk, in seconds."""
    fsync, seconds = os.fsync, 0.4

    def slow(file: int) -> None:
        if os.readlink(f"/proc/self/fd/{file}").endswith("safetensors"):
            time.sleep(seconds)
        fsync(file)

    monkeypatch.setattr(os, "fsync", slow)
    return seconds


@pytest.mark.parametrize("told_by", ["the recipe", "the scheduler"])
def test_a_deadline_ends_a_job_in_time_with_its_step_committed(
    tiny: Path, folder: Folder, monkeypatch: pytest.MonkeyPatch, clock: Clock, told_by: str
) -> None:
    deadline, overrides = clock.now + 1000, ["run.deadline_s=1000"]
    if told_by == "the scheduler":
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(deadline))
        overrides = ["run.deadline_s=5000"]  # the earlier one counts
    monkeypatch.setattr(
        schedule, "learning_rate", at_step(6, clock.leap_to(deadline - preempt.MARGIN_S))
    )
    assert start(tiny, folder.path, *overrides) == 75
    assert folder.outcome()["reason"] == "stopped, asked by the deadline is near"
    assert (folder.outcome()["step"], folder.committed(), folder.steps()[-1]) == (7, [7], 7)
    assert folder.events("signal")[0]["asked"] == {"0": "the deadline is near"}


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_set_while_the_run_trains_moves_no_deadline(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(clock.now + 2000))
    with keeping_handlers():
        by_scheduler, by_recipe = preempt.StopRequest(), preempt.StopRequest()
    by_recipe.within(1000.0)
    clock.set_by = 3600.0 * hours
    for stop, seconds in ((by_recipe, 1000), (by_scheduler, 2000)):
        clock.now = 1e9 + seconds - preempt.MARGIN_S - 1
        assert not stop.is_late(save_s=0.0)
        assert stop.has_time(5.0)
        clock.now += 2
        assert stop.is_late(save_s=0.0)


def test_two_saves_and_a_step_must_fit_before_the_deadline(clock: Clock) -> None:
    with keeping_handlers():
        stop = preempt.StopRequest()
    assert not stop.is_late(save_s=1e6, step_s=1e6)  # nobody told of a deadline
    stop.within(100.0)
    for save_s, step_s in ((0.0, 0.0), (10.0, 3.0), (3.0, 40.0)):
        clock.now = 1e9 + 100 - (2 * save_s + step_s + preempt.MARGIN_S) - 0.1
        assert not stop.is_late(save_s=save_s, step_s=step_s)
        clock.now += 0.2
        assert stop.is_late(save_s=save_s, step_s=step_s)


def test_the_next_job_knows_from_its_first_step_on_what_a_save_takes(
    tiny: Path, folder: Folder, clock: Clock, slow_disk: float
) -> None:
    often = "checkpoint.every_steps=5"
    assert start(tiny, folder.path, often, "run.stop_after_steps=10") == 75
    seconds = folder.events("checkpoint")[0]["seconds"]
    assert seconds >= slow_disk
    short = preempt.MARGIN_S + 1.9 * seconds
    assert start(tiny, folder.path, often, f"run.deadline_s={short}") == 75
    assert folder.outcome()["step"] == 10
    assert "the deadline is near" in folder.outcome()["reason"]
    assert start(tiny, folder.path, often, f"run.deadline_s={short + 1000}") == 0


def test_no_save_is_begun_that_would_not_end_in_time(
    tiny: Path,
    folder: Folder,
    uninterrupted: Folder,
    monkeypatch: pytest.MonkeyPatch,
    clock: Clock,
    slow_disk: float,
) -> None:
    # a step that took longer than any before
    late = clock.leap_to(clock.now + 1000 - 0.9 * slow_disk)
    monkeypatch.setattr(schedule, "learning_rate", at_step(7, late))
    often = "checkpoint.every_steps=3"
    assert start(tiny, folder.path, often, "run.deadline_s=1000") == 75
    assert [event["step"] for event in folder.events("checkpoint_left_out")] == [8]
    assert folder.committed() == [3, 6]
    outcome = folder.outcome()
    assert (outcome["status"], outcome["again"]) == ("stopped", True)
    assert outcome["reason"].endswith(
        "no time was left to save step 8, the run resumes from step 6"
    )
    monkeypatch.undo()
    assert start(tiny, folder.path, often) == 0
    assert folder.events("resume")[-1]["step"] == 6
    assert folder.steps() == list(range(1, 21))
    assert equal(folder.state(), uninterrupted.state())
