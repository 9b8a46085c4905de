"""The rank that holds all others up is named, with its host and the cause, and no other."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rcmae.commands import runs
from rcmae.run.loop import stopwatch, stragglers
from rcmae.run.loop.stopwatch import Own, Stopwatch
from rcmae.run.loop.stragglers import CAUSES, Lately, Part, arrivals, lateness
from rcmae.run.records.status import status
from runs import Folder
from tests.conftest import Ranks

CPU = torch.device("cpu")
ROWS = list(CAUSES)

# ---------------------------------------------------------------------------------------- the rule


def own(data: float = 0.0, compute: float = 0.1, save: float = 0.0, met: float = 0.0) -> Own:
    return Own(data, compute, save, met)


def test_who_waits_least_in_the_first_collective_comes_last() -> None:
    assert arrivals(np.array([0.3, 0.0, 0.25])).tolist() == pytest.approx([0.0, 0.3, 0.05])


def test_a_rank_is_late_by_what_it_did_itself_and_only_as_far_as_others_wait() -> None:
    slow = own(data=0.2, met=0.0)
    late = lateness([own(met=0.2), slow, own(met=0.2)])
    assert late[ROWS.index("data")].tolist() == pytest.approx([0.0, 0.2, 0.0])
    assert late[ROWS.index("compute")].max() == 0
    # rank 0 left the step before by 0.2 s and found no samples yet, but all come together
    late = lateness([own(data=0.2), own(), own()])
    assert late.max() == 0
    # ranks leave a step together whose forward passes were not alike: nobody arrives late
    late = lateness([own(), own(), own(compute=0.3)])
    assert late[ROWS.index("compute")].tolist() == pytest.approx([0.0, 0.0, 0.2])
    late = lateness([own(met=0.02), own(save=0.02)])  # of two the faster one is the measure
    assert late[ROWS.index("save")].tolist() == pytest.approx([0.0, 0.02])


def looked_at(late: Callable[[int, int], float], lines: int, every: int = 1) -> Iterator[Lately]:
    """What is known after each logged step whose part is whole: `late(rank, line)` of compute."""
    lately = Lately()
    for line in range(lines):
        seconds = np.zeros((len(CAUSES), 4))
        seconds[ROWS.index("compute")] = [late(rank, line) for rank in range(4)]
        if lately.add(Part(every, 1.0, seconds)):
            yield lately


@pytest.mark.parametrize(("every", "first"), [(1, 100), (20, 120), (60, 120), (1000, 2000)])
def test_a_rank_is_named_after_a_hundred_steps(every: int, first: int) -> None:
    (found, *_) = looked_at(lambda rank, _: 0.06 * (rank == 2), 200, every)
    late = found.late()["compute"]
    assert (late.rank, late.steps) == (2, first)
    assert late.seconds == pytest.approx(late.share) == pytest.approx(0.06)


def test_one_hiccup_names_nobody() -> None:
    seen = list(looked_at(lambda rank, line: 60.0 * (rank == 1 and line == 30), 400))
    assert seen
    assert not any(each.late() for each in looked_at(lambda rank, line: 0.049 * rank, 2))
    for each in looked_at(lambda rank, line: 60.0 * (rank == 1 and line == 30), 400):
        assert each.late() == {}


def test_noise_names_nobody_and_the_latest_of_two_is_named() -> None:
    draws = np.random.default_rng(0).normal(0.0, 0.1, (10_000, 4))  # twice the limit
    for each in looked_at(lambda rank, line: draws[line, rank], len(draws)):
        assert each.late() == {}
    for each in looked_at(lambda rank, _: 0.1 * rank, 200):
        assert each.late()["compute"].rank == 3


def test_short_steps_are_allowed_a_few_milliseconds() -> None:
    lately = Lately()
    for milliseconds, named in ((4, False), (6, True)):
        for _ in range(200):
            late = np.array([[0.0, 0.0], [0.0, milliseconds / 1000], [0.0, 0.0]])
            lately.add(Part(1, 0.010, late))
        assert bool(lately.late()) == named


class Told:
    """A log that remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.lines: list[str] = []

    def event(self, kind: str, **details: Any) -> None:
        self.events.append((kind, details))

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_a_rank_is_told_once_and_its_end_too(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    watch = Stopwatch(CPU, is_needed=True)
    compared = stragglers.Stragglers(watch, ["a", "b"], told)  # type: ignore[arg-type]
    slow = 0.3
    monkeypatch.setattr(
        stragglers.dist, "gather_numbers", lambda mine: [own(), own(compute=0.1 + slow)]
    )
    for step in range(10, 300, 10):
        slow = 0.3 if step <= 150 else 0.0
        row = compared.compare(step, steps=10, step_s=1.0, data_s=0.0)
    assert [kind for kind, _ in told.events] == ["late_rank", "late_rank_over"]
    first, over = (details for _, details in told.events)
    assert first == {"step": 120, "rank": 1, "host": "b", "cause": "compute"} | {
        "seconds_a_step": pytest.approx(0.3),
        "share": pytest.approx(0.3),
        "steps": 120,
    }
    assert (over["rank"], over["cause"]) == (1, "compute")
    assert 240 <= over["step"] <= 280  # no step of the last hundred was late
    (line,) = told.lines
    assert "rank 1 on b is late: the other ranks wait for it 0.300 s a step (30% of one)" in line
    assert row["compute_slowest_s"] == row["compute_median_s"] == pytest.approx(0.1)


# ----------------------------------------------------------------------------------- the stopwatch


class Clock:
    """Time that passes where a test says so: a busy machine is no failure."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    one = Clock()
    monkeypatch.setattr(stopwatch, "time", one)
    return one


def test_own_seconds_are_those_of_the_blocks_and_without_gathers(clock: Clock) -> None:
    network = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
    network[1].register_forward_pre_hook(lambda *_: clock.passes(0.5))  # an engine's
    watch = Stopwatch(CPU, is_needed=True)
    watch.leave_out_gathers(network, None)
    for _ in range(2):
        watch.met(0.02)
        for _ in range(2):
            with watch.computing(logs=False):
                network(torch.zeros(1, 2))
                clock.passes(0.01)
        network(torch.zeros(1, 2))  # in no block: a recomputation, or an evaluation
    watch.saving(0.1)
    # two gathers a step: who comes late to them waits less in them
    own = Own(data=0.3, compute=0.02, save=0.05, met=0.02 + 2 * 0.5)
    assert watch.read(data_s=0.3) == pytest.approx(own)
    assert watch.read(data_s=0.0) == Own(0.0, 0.0, 0.0, 0.0)


def test_a_device_is_timed_on_logged_steps_alone(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[float] = []
    waited_for = False

    class Event:
        """A device's: its moment can be asked for only once the device was waited for."""

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock.now
            events.append(self.at)

        def elapsed_time(self, other: Event) -> float:
            assert waited_for
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    network = nn.Linear(2, 2)
    network.register_forward_pre_hook(lambda *_: clock.passes(0.5))
    watch = Stopwatch(torch.device("cuda"), is_needed=True)
    watch.leave_out_gathers(network)
    for logs in (False, False, True):
        watch.met(0.0)
        for _ in range(2):
            with watch.computing(logs=logs):
                network(torch.zeros(1, 2))
                clock.passes(0.01)
        assert len(events) == 8 * logs, "two micro-batches, each with one gather"
    waited_for = True
    assert watch.read(data_s=0.0).compute == pytest.approx(0.02)


def test_a_rank_alone_times_nothing() -> None:
    network = nn.Linear(2, 2)
    network.register_forward_pre_hook(lambda *_: None)
    watch = Stopwatch(CPU, is_needed=False)
    watch.leave_out_gathers(network)
    assert len(network._forward_pre_hooks) == 1
    with watch.computing(logs=True):
        network(torch.zeros(1, 2))
    assert watch.read(data_s=0.0).compute == 0


# -------------------------------------------------------------------------------------- two ranks


@pytest.mark.slow
def test_a_sleeping_rank_is_named_with_its_cause(
    tiny: Path, tmp_path: Path, ranks: Callable[..., Ranks], capsys: pytest.CaptureFixture[str]
) -> None:
    """Sleep in one rank's loader, forward pass or save, under several engines.

    Two process groups at once: each sleeps most of the time.
    """
    small = [
        "batch.images=8",
        "model.depth=1",
        "model.decoder_depth=1",
        "log.every_steps=5",
        "checkpoint.every_steps=5",
    ]
    small += ["schedule.steps=200", "run.stop_after_steps=115"]
    fsdp2 = [*small, "engine.name=fsdp2"]
    zero2 = [*small, "engine.name=deepspeed", "engine.config=zero2.json"]
    ddp = [*small, "engine.name=ddp"]
    starts = []
    for cause, engine in (("data", fsdp2), ("compute", fsdp2), ("save", zero2), ("compute", ddp)):
        folder = tmp_path / f"{cause}-{engine[-1]}"
        starts.append([cause, str(tiny), f"run.dir={folder}", *engine])
    program = Path(__file__).parent / "programs" / "late_rank.py"
    groups = [ranks(program, json.dumps(half)) for half in (starts[:2], starts[2:])]
    for group in groups:
        assert "STATUS [75, 75]" in group.succeed(300)
    for cause, _, run, *_ in starts:
        folder = Folder(Path(run.removeprefix("run.dir=")))
        (late,) = folder.events("late_rank")
        assert (late["rank"], late["cause"]) == (1, cause), folder.path
        assert late["host"] == socket.gethostname()
        assert late["step"] <= 5 * 50, "within 50 logged steps"
        assert late["share"] > 0.05
        assert 0.03 < late["seconds_a_step"] < 0.4  # a fifth of the steps are saved
        rows = [row for row in folder.rows() if row["step"] >= late["step"]]
        key = {"data": "data_wait", "compute": "compute", "save": "arrival"}[cause]
        assert {row[f"{key}_slowest_rank"] for row in rows} == {1}
        assert all(row[f"{key}_slowest_s"] > row[f"{key}_median_s"] + 0.02 for row in rows)
        (told,) = status(folder.path)["late_ranks"]
        assert told == late
        assert runs.main(["status", str(folder.path)]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert f"late: rank 1 on {socket.gethostname()} holds the others up by" in shown


@pytest.mark.slow
def test_nobody_is_named_in_hundreds_of_steps_without_a_cause(
    tiny: Path, tmp_path: Path, ranks: Callable[..., Ranks]
) -> None:
    folder = Folder(tmp_path / "run")
    options = ["schedule.steps=500", "batch.images=8", "log.every_steps=4", "model.depth=1"]
    options += ["engine.name=fsdp2", "checkpoint.every_steps=50", "model.decoder_depth=1"]
    options.append(f"run.dir={folder.path}")
    ranks("-m", "rcmae.train", tiny, *options).succeed(400)
    assert folder.steps()[-1] == 500
    assert folder.events("late_rank") == []
    assert status(folder.path)["late_ranks"] == []
