"""A follower gives each checkpoint the k-NN that the training itself would, once, whatever
happens to it.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from rcmae import follow
from rcmae.run import preempt
from rcmae.tasks import protocol
from runs import Folder, keeping_handlers, start, wait_for
from tests.conftest import Ranks


@pytest.fixture(scope="module")
def labelled(photo_shards: str) -> list[str]:
    """The keys that name the labelled images: four shards to train on, two to test."""
    train = photo_shards.replace("{000000..000005}", "{000000..000003}")
    test = photo_shards.replace("{000000..000005}", "{000004..000005}")
    return [f"evaluate.train_shards={train}", f"evaluate.test_shards={test}", "evaluate.k=[3, 10]"]


@pytest.fixture(scope="module")
def trained(tiny: Path, labelled: list[str], tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A run of 12 steps with a checkpoint and an evaluation of its own every 4.

    Do not write to it.
    """
    folder = Folder(tmp_path_factory.mktemp("trained") / "run")
    every = [
        "checkpoint.every_steps=4",
        "checkpoint.keep=9",
        "evaluate.every_steps=4",
        "engine.precision=bf16",
    ]
    assert (
        start(tiny, folder.path, *every, *labelled, "schedule.steps=12", "evaluate.logistic=true")
        == 0
    )
    return folder


@pytest.fixture
def run(trained: Folder, tmp_path: Path) -> Folder:
    """A copy of it."""
    return Folder(shutil.copytree(trained.path, tmp_path / "run"))


def followed(run: Folder, *arguments: str) -> int:
    """`python -m rcmae.follow` in this process; its exit status."""
    with keeping_handlers():
        return follow.main([str(run.path), *arguments, "--poll-s=0.1"])


def answers(run: Folder) -> dict[int, dict[str, dict[str, float]]]:
    """What the follower says of each step; an error where it says it twice."""
    events = Folder(run.path / follow.FOLDER).events("evaluate")
    steps = [event["step"] for event in events]
    assert steps == sorted(set(steps))
    return {event["step"]: event["knn"] for event in events}


def test_each_checkpoint_gets_what_the_training_said_of_that_step(run: Folder) -> None:
    assert followed(run) == 0
    told = {event["step"]: event["knn"] for event in run.events("evaluate")}
    assert list(answers(run)) == list(told) == run.committed() == [4, 8, 12]
    for step, rows in answers(run).items():
        assert rows == {name: told[step][name] for name in ("student", "teacher")}
        assert set(rows["teacher"]) == {"3", "10"}
    linear = [
        {event["step"]: event["logistic"] for event in of.events("evaluate")}
        for of in (run, Folder(run.path / follow.FOLDER))
    ]
    assert linear[1] == {
        step: {name: row[name] for name in ("student", "teacher")}
        for step, row in linear[0].items()
    }
    assert followed(run) == 0, "again: there is nothing left to do"
    assert len(answers(run)) == 3


def test_keys_given_here_stand_over_the_runs(run: Folder) -> None:
    assert followed(run, "evaluate.k=[5]", "evaluate.pool=cls", "evaluate.logistic=false") == 0
    assert not any(
        "logistic" in event for event in Folder(run.path / follow.FOLDER).events("evaluate")
    )
    assert [set(rows["student"]) for rows in answers(run).values()] == [{"5"}] * 3


def test_two_ranks_say_the_same(
    run: Folder, trained: Folder, ranks: Callable[..., Ranks], tmp_path: Path
) -> None:
    ranks("-m", "rcmae.follow", str(run.path), world=2).succeed()
    told = {event["step"]: event["knn"] for event in run.events("evaluate")}
    assert answers(run) == {
        step: {name: told[step][name] for name in ("student", "teacher")} for step in told
    }


def test_a_side_car_that_was_there_first_sees_a_training_from_its_first_checkpoint_to_its_end(
    tiny: Path, labelled: list[str], tmp_path: Path, ranks: Callable[..., Ranks]
) -> None:
    run = Folder(tmp_path / "run")
    beside = ranks("-m", "rcmae.follow", str(run.path), *labelled, "--poll-s=0.1", world=1)
    keep = ["checkpoint.every_steps=2", "checkpoint.keep=99", "schedule.steps=24"]
    assert start(tiny, run.path, *keep, "run.stop_after_steps=10") == preempt.STOPPED
    wait_for(lambda: 10 in answers(run), lambda: beside.processes[0].poll() is None)
    assert start(tiny, run.path, *keep) == 0
    beside.succeed()
    assert list(answers(run)) == run.committed() == list(range(2, 25, 2))
    assert not run.leftovers()


def test_stopped_or_killed_it_goes_on_where_it_was(
    run: Folder, ranks: Callable[..., Ranks]
) -> None:
    (run.path / "outcome.json").unlink()  # so that there is something to wait for
    for number, status in ((signal.SIGUSR1, preempt.STOPPED), (signal.SIGKILL, -signal.SIGKILL)):
        late = run.checkpoints / "step-00000012"
        if number == signal.SIGUSR1:
            late.rename(run.path / "later")
        else:
            (run.path / "later").rename(late)
        beside = ranks("-m", "rcmae.follow", str(run.path), "--poll-s=0.1", world=1)
        steps = [4, 8] if number == signal.SIGUSR1 else [4, 8, 12]
        wait_for(
            lambda steps=steps: list(answers(run)) == steps,
            lambda b=beside: b.processes[0].poll() is None,
        )
        beside.processes[0].send_signal(number)
        assert beside.wait() == [status], beside.said()
    assert followed(run, "--patience-s=0.3") == preempt.STOPPED, "silent, and not finished"
    assert list(answers(run)) == [4, 8, 12]


def test_an_evaluation_under_way_is_left_when_asked(
    run: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = protocol.labelled_batches, []

    def interrupted(*args: object, **kwargs: object) -> object:
        for batch in real(*args, **kwargs):
            seen.append(len(seen))
            signal.raise_signal(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(protocol, "labelled_batches", interrupted)
    assert followed(run) == preempt.STOPPED
    assert (seen, answers(run)) == ([0], {})


def test_what_cannot_be_read_or_does_not_count_is_passed_over(run: Folder) -> None:
    for path in (run.checkpoints / "step-00000004").glob("*.safetensors"):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    lease = json.loads((run.path / "leases" / "00000001.json").read_text())
    later = {**lease, "generation": 2, "from_step": 8}  # another job took over the run at step 8
    (run.path / "leases" / "00000002.json").write_text(json.dumps(later))
    assert followed(run) == 0
    assert list(answers(run)) == [8]
    (event,) = Folder(run.path / follow.FOLDER).events("passed_over")
    assert event["step"] == 4
    assert "differs from its checksum" in event["reason"]


def test_one_side_car_at_a_time(
    run: Folder, ranks: Callable[..., Ranks], capsys: pytest.CaptureFixture[str]
) -> None:
    (run.path / "outcome.json").unlink()
    first = ranks("-m", "rcmae.follow", str(run.path), "--poll-s=0.1", world=1)
    wait_for(lambda: len(answers(run)) == 3, lambda: first.processes[0].poll() is None)
    assert followed(run, "run.lease_wait_s=0.2") == preempt.REFUSED
    assert f"another follower evaluates {run.path}" in capsys.readouterr().err
    first.processes[0].terminate()
    assert first.wait() == [preempt.STOPPED]


def test_wrong_input_is_refused(
    run: Folder, tiny: Path, photo_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert followed(run, "evaluate.train_shards=[]") == preempt.REFUSED
    assert "has no evaluate.train_shards; give them here" in capsys.readouterr().err
    assert followed(run, "evaluate.test_shards=/nowhere/x.tar") == preempt.REFUSED
    assert "/nowhere/x.tar" in capsys.readouterr().err
    assert followed(run, "evaluate.kk=3") == preempt.REFUSED
    assert "did you mean" in capsys.readouterr().err
    assert followed(Folder(tmp_path / "nothing")) == preempt.REFUSED
    assert "give the run.dir of a training" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "begins").mkdir()
    assert followed(Folder(tmp_path / "begins"), "--patience-s=0.2") == preempt.STOPPED
    assert answers(run) == {}
