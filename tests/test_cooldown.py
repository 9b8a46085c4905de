"""A cooldown of a trunk is the run that had been planned so, and the trunk keeps every byte."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from rcmae import config
from rcmae.commands.cooldown import main, refuse_contradictions
from rcmae.config import ties_to_the_end
from rcmae.engines.schedules import Shape
from runs import Folder, distance, equal, start
from tests.conftest import Ranks

TRUNK = [
    "schedule.shape=wsd",
    "schedule.steps=16",
    "schedule.warmup_steps=2",
    "schedule.cooldown_steps=4",
    "teacher.schedule=constant",
    "checkpoint.every_steps=4",
    "checkpoint.keep=9",
]


@pytest.fixture(scope="module")
def trunk(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trunk") / "trunk"
    assert start(tiny, folder, *TRUNK) == 0
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_cooldown_is_the_run_that_had_been_planned_so(
    trunk: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hashes(trunk)
    given = [f"{trunk}@8", "--steps", "3", "--shape", "1-sqrt", "--dir", str(tmp_path / "new")]
    assert main([*given, "run.stop_after_steps=1"]) == 75
    assert main(given) == 0, "the same command resumes"
    assert hashes(trunk) == before
    planned = Folder(tmp_path / "planned")
    changed = ["schedule.steps=11", "schedule.cooldown_steps=3", "schedule.cooldown_shape=1-sqrt"]
    assert start(tiny, planned.path, *TRUNK, *changed) == 0
    new = Folder(tmp_path / "new")
    assert equal(new.state(), planned.state())
    assert new.losses() == planned.losses()[8:]
    rates = [row["lr"] for row in new.rows()]
    assert rates == [row["lr"] for row in planned.rows()][8:]
    others = [[f"{trunk}@8", "--steps", "4"], [f"{trunk}@12", "--steps", "3"], given[:3]]
    ended = hashes(new.path)
    for other in others:  # of another length, another step, another curve
        assert main([*other, "--dir", str(new.path)]) == 2
        assert "a 1-sqrt cooldown of 3 steps from" in capsys.readouterr().err
    assert main([f"{trunk}@8", "--steps", "3", "--dir", str(planned.path)]) == 2
    assert "has another run" in capsys.readouterr().err
    assert hashes(new.path) == ended
    assert rates == pytest.approx([1e-3, 1e-3 * (1 - (1 / 3) ** 0.5), 1e-3 * (1 - (2 / 3) ** 0.5)])


@pytest.mark.slow
def test_a_cooldown_on_other_ranks_and_another_engine_is_killed_and_is_still_the_planned_run(
    trunk: Path, tiny: Path, tmp_path: Path, ranks: Callable[..., Ranks]
) -> None:
    new = Folder(tmp_path / "new")
    program = (
        "import os, signal, sys; sys.path[:0] = ['tests']\n"
        "from unittest.mock import patch; from runs import at_step\n"
        "from rcmae.commands.cooldown import main; from rcmae.run.loop import schedule\n"
        "kill = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with patch.object(schedule, 'learning_rate', at_step(11, kill)):\n"
        "    sys.exit(main(sys.argv[1:]))\n"
    )
    given = [f"{trunk}@8", "--steps", "4", "--dir", str(new.path)]
    often = ["checkpoint.every_steps=1", "checkpoint.background=false"]
    started = ranks("-c", program, *given, *often, "engine.name=fsdp2")
    assert started.wait(200.0) == [-signal.SIGKILL] * 2, started.said()
    assert new.committed()[-1] in (10, 11)
    other = ["engine.name=deepspeed", "engine.config=zero1.json"]
    done = ranks("-m", "rcmae", "cooldown", *given, *often, *other).wait(200.0)
    assert done == [0, 0]
    planned = Folder(tmp_path / "planned")
    assert start(tiny, planned.path, *TRUNK, "schedule.steps=12") == 0
    assert new.losses() == pytest.approx(planned.losses()[8:], rel=1e-5)
    for kind in ("weight", "teacher"):
        assert distance(new.state(), planned.state(), kind) < 1e-5, kind


def test_a_cooldown_falls_to_its_end_by_either_curve() -> None:
    for curve, middle in (("linear", 0.5), ("1-sqrt", 1 - 0.5**0.5)):
        shape = Shape("wsd", cooldown=0.25, curve=curve)  # type: ignore[arg-type]
        assert [shape.at(done) for done in (0.0, 0.5, 0.75, 1.0)] == [1.0, 1.0, 1.0, 0.0]
        assert shape.at(0.875) == pytest.approx(middle)


@pytest.mark.parametrize(
    ("at", "steps", "said"),
    [
        ("@8", "0", "at least one step"),
        ("", "3", "give RUN@STEP"),
        ("@7", "3", "it was pruned, or never saved. Kept: 4, 8, 12, 16"),
        ("@17", "3", "the trunk is at step 16 of 16. Kept: 4, 8, 12, 16"),
        ("@16", "3", "the trunk's own cooldown, which began at step 12"),
    ],
)
def test_what_no_cooldown_can_start_from_is_refused(
    trunk: Path, at: str, steps: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"{trunk}{at}", "--steps", steps]) == 2
    assert said in capsys.readouterr().err


def test_a_schedule_that_contradicts_the_commands_options_is_refused(
    trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["schedule.cooldown_steps=5", "schedule.cooldown_shape=1-sqrt", "schedule.min_lr=0"]
    assert main([f"{trunk}@8", "--steps", "3", "--dir", str(tmp_path / "new"), *given]) == 2
    said = capsys.readouterr().err
    assert "schedule.cooldown_steps=5: rcmae cooldown sets it by --steps" in said
    assert "schedule.cooldown_shape=1-sqrt: rcmae cooldown sets it by --shape" in said
    assert "min_lr" not in said
    refuse_contradictions(["schedule.cooldown_steps=3"], ["schedule.cooldown_steps=3"])


def test_a_training_that_depends_on_its_end_is_no_trunk(
    uninterrupted: Folder, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"{uninterrupted.path}@10", "--steps", "3"]) == 2
    said = capsys.readouterr().err
    assert "schedule.shape=cosine" in said
    assert "teacher.schedule=constant" in said
    features = config.load(
        str(tiny),
        ["objective.name=mae", "objective.terms={features: 1.0}", "teacher.schedule=constant"],
    )
    assert ["objective.terms: features" in line for line in ties_to_the_end(features)] == [True]
    assert main([str(uninterrupted.path.parent / "none@1"), "--steps", "3"]) == 2
    assert "no run's folder" in capsys.readouterr().err
