"""The first steps of a run come again from its own folder, and what does not is said."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rcmae.commands.again import reproduce
from rcmae.run.again.reproduce import compared, too_far
from runs import Folder, keeping_handlers, start

KEPT = Path(__file__).parent / "data" / "version_0.1.0"


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Reproduce; the exit status and the document."""

    def run(*words: object) -> tuple[int, dict[str, Any]]:
        capfd.readouterr()  # of trainings before
        with keeping_handlers():
            status = reproduce.main([*map(str, words), "--json"])
        said = capfd.readouterr()
        document = said.out if status != 2 else "{}"
        return status, json.loads(document) | {"said": said.err}

    return run


def edited(folder: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a run whose logged steps are others."""
    run = Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns("checkpoints")))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        change(row)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_a_run_of_one_process_comes_again_to_the_last_bit(
    uninterrupted: Folder, told: Callable[..., Any]
) -> None:
    before = sorted(path.name for path in uninterrupted.path.iterdir())
    status, found = told(uninterrupted.path, "--steps", 4)
    assert (status, found["same"], found["differs"]) == (0, True, [])
    losses = [number for number in found["numbers"] if number["name"] == "loss"]
    assert [number["step"] for number in losses] == [1, 2, 3, 4]
    assert [number["now"] for number in losses] == uninterrupted.losses()[:4]
    assert {number["difference"] for number in found["numbers"]} == {0.0}
    assert found["notes"] == []
    assert sorted(path.name for path in uninterrupted.path.iterdir()) == before


def test_a_run_of_pixio_comes_again(tiny: Path, tmp_path: Path, told: Callable[..., Any]) -> None:
    sizes = ["objective.mask_grid=2", "model.class_tokens=3", "model.position_table=learned"]
    words = ["objective.name=pixio", "schedule.steps=2", "schedule.warmup_steps=1", *sizes]
    assert start(tiny, tmp_path / "run", *words) == 0
    status, found = told(tmp_path / "run", "--steps", 2)
    assert (status, found["same"]) == (0, True)
    assert {number["difference"] for number in found["numbers"]} == {0.0}


def test_a_loss_that_is_another_is_named(
    uninterrupted: Folder, tmp_path: Path, told: Callable[..., Any]
) -> None:
    def change(row: dict[str, Any]) -> None:
        if row["step"] == 2:
            row["loss"] *= 1.001

    run = edited(uninterrupted.path, tmp_path / "run", change)
    status, found = told(run, "--steps", 3)
    assert status == 1
    (line,) = found["differs"]
    assert line.startswith("loss at step 2:")
    assert told(run, "--steps", 3, "--tolerance", 0.01)[0] == 0


def test_other_data_are_named(
    uninterrupted: Folder, photo_shards: str, told: Callable[..., Any]
) -> None:
    fewer = photo_shards.replace("000005", "000004")
    status, found = told(uninterrupted.path, "--steps", 2, f"data.shards={fewer}")
    assert status == 1
    assert found["differs"][-1].startswith("the data: fingerprint")
    assert any(line.startswith("loss") for line in found["differs"])


@pytest.mark.parametrize("name", ["local", "zero2", "fsdp2"])
def test_runs_of_the_first_version_and_of_several_ranks_come_again(
    name: str, tmp_path: Path, told: Callable[..., Any]
) -> None:
    """Trained by another version of this package, on two ranks where they are sharded."""
    kept = shutil.copytree(KEPT, tmp_path / "kept")
    shards = f"data.shards={kept / 'shards/tiles-*.tar'}"
    status, found = told(kept / name, "--steps", 4, shards)
    assert status == 0, found
    notes = " ".join(found["notes"])
    assert "rcmae: 0.1.0 then" in notes
    assert ("2 ranks by engine" in notes) == (name != "local")


def test_what_was_not_logged_cannot_be_compared(
    uninterrupted: Folder, tmp_path: Path, told: Callable[..., Any]
) -> None:
    run = edited(uninterrupted.path, tmp_path / "run", lambda row: row.update(step=row["step"] + 9))
    status, found = told(run, "--steps", 3)
    assert status == 2
    assert "give more --steps" in found["said"]
    later = edited(
        uninterrupted.path, tmp_path / "later", lambda row: row.update(step=row["step"] + 2)
    )
    status, found = told(later, "--steps", 3)
    assert status == 1
    assert any("1 step of the first 3 compared" in note for note in found["notes"])
    status, found = told(tmp_path, "--steps", 3)
    assert status == 2
    assert "is not a run" in found["said"]


def test_a_command_of_a_recipe_is_not_run_unasked(
    uninterrupted: Folder, tmp_path: Path, told: Callable[..., Any]
) -> None:
    run = edited(uninterrupted.path, tmp_path / "run", lambda row: None)
    recipe = (run / "recipe.yaml").read_text()
    ran = tmp_path / "ran"
    (run / "recipe.yaml").write_text(
        "\n".join(
            f"  shards: 'pipe:touch {ran}'" if line.startswith("  shards:") else line
            for line in recipe.splitlines()
        )
    )
    status, found = told(run, "--steps", 1)
    assert status == 2
    assert "--allow-pipe" in found["said"]
    assert not ran.exists()


def test_numbers_that_are_not_finite_are_equal_only_to_each_other() -> None:
    then = {1: {"loss": None, "lr": 0.1}, 2: {"loss": 1.0, "lr": 0.1}}
    now = {1: {"loss": None, "lr": 0.1}, 2: {"loss": None, "lr": 0.1000001}}
    numbers = compared(then, now)
    assert [number.difference for number in numbers if number.name == "loss"] == [0.0, math.inf]
    named = [line.partition(" ")[0] for line in too_far(numbers, 0.5)]
    assert named == ["loss", "lr"]  # a rate is a function of the step: any difference counts
