"""The drills themselves: they hold here in short, and they would see it if a promise were
broken.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from runs import Folder, start
from tools import drill


def test_a_training_killed_in_each_kind_of_moment_comes_out_bit_for_bit(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "kill.json"
    short = ["schedule.steps=60", "batch.images=8", "checkpoint.every_steps=3"]
    assert drill.main(["kill", str(tiny), "--times=4", "--seed=3", f"--json={report}", *short]) == 0
    assert "as promised" in capsys.readouterr().out
    found = json.loads(report.read_text())
    assert (
        found["kills"]
        == sum(found["hits"].values())
        == found["resumes"] + found["starts_before_a_first_checkpoint"]
    )
    assert [check["bit_equal"] for check in found["trainings_finished_and_compared"]][-1]


@pytest.mark.slow
def test_ranks_of_ddp_with_shards_that_are_killed_come_out_as_if_nobody_had(
    tiny: Path, tmp_path: Path
) -> None:
    report = tmp_path / "kill.json"
    short = ["schedule.steps=30", "batch.images=8", "checkpoint.every_steps=3"]
    words = ["--layout=ddp/2 x2", "--times=2", "--seed=1", f"--json={report}"]
    assert drill.main(["kill", str(tiny), *words, *short]) == 0
    found = json.loads(report.read_text())
    assert found["kills"] == sum(found["hits"].values()) == 2
    assert found["resumes"] > 0
    last = found["trainings_finished_and_compared"][-1]
    assert last["close"]
    assert last["steps_once"]


def test_a_plan_of_kills_has_a_third_in_saves_each_phase_as_often() -> None:
    plan = drill.moments(100)
    assert len(plan) == 100
    assert {phase: plan.count(phase) for phase in drill.PHASES} == dict.fromkeys(drill.PHASES, 5)
    assert plan.count("") == 65


@pytest.mark.slow
def test_engines_and_ranks_change_on_resume_and_samples_losses_and_teacher_do_not(
    tiny: Path, tmp_path: Path
) -> None:
    report = tmp_path / "matrix.json"
    pairs = "fsdp2 x2 -> ds3 x2, fsdp2 x2 -> local x1"
    assert drill.main(["matrix", str(tiny), f"--pairs={pairs}", f"--json={report}"]) == 0
    found = json.loads(report.read_text())["pairs"]
    assert list(found) == ["fsdp2 x2 -> ds3 x2", "fsdp2 x2 -> local x1"]
    assert all(
        0 <= pair["loss"] < 1e-5 and pair["teacher"] < 1e-5 and pair["same_samples"]
        for pair in found.values()
    )


def test_another_training_is_not_taken_for_the_same(
    tiny: Path, tmp_path: Path, uninterrupted: Folder
) -> None:
    other = Folder(tmp_path / "other")
    assert start(tiny, other.path, "schedule.lr=0.0015") == 0
    whole = Folder(shutil.copytree(uninterrupted.path, tmp_path / "whole"))
    seen = drill.compare(other.path, whole.path)
    assert not seen["bit_equal"]
    assert not seen["close"]
    assert seen["steps_once"]
    bounds = drill.BOUNDS["fp32"]
    for folder, position in ((whole, 0), (other, 1)):
        (folder.path / "samples-0.jsonl").write_text(json.dumps([0, [[position, "key"]]]) + "\n")
    judged = drill.judge(other.path, whole.path, whole.path, bounds)
    assert not judged["ok"]
    assert judged["loss"] > bounds["loss"]
    assert judged["teacher"] > bounds["teacher"]
    assert not judged["same_samples"]

    torn = Folder(shutil.copytree(uninterrupted.path, tmp_path / "torn"))
    lines = (torn.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (torn.path / "metrics.jsonl").write_text("".join([*lines, lines[-1]]))
    assert not drill.compare(torn.path, whole.path)["steps_once"]
    shutil.rmtree(torn.checkpoints)
    with pytest.raises(drill.Failed, match="no valid checkpoint"):
        drill.compare(torn.path, whole.path)


def test_what_cannot_run_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert drill.main(["kill", str(tiny), "modle.depth=2"]) == 2
    assert "did you mean 'model'?" in capsys.readouterr().err
    assert drill.main(["matrix", str(tiny), "--layouts=local x1,ds9 x2"]) == 2
    assert "unknown layouts ds9 x2; known: local x1" in capsys.readouterr().err
    assert drill.main(["kill", str(tiny), "--times=1", f"data.shards={tmp_path}/none.tar"]) == 1
    assert "none.tar: No such file" in capsys.readouterr().err
