"""Ranks start together or not at all: what one of them alone was told or sees, all are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, Ranks, free_port

from rcmae import config
from rcmae.errors import Refused
from rcmae.run.command import Command
from rcmae.run.judge import AnotherTraining, judge
from rcmae.run.look import Sight, look
from rcmae.tasks.pretrain import Pretraining
from runs import Folder, python_path

PROGRAM = "tests/programs/started_apart.py"
TWO = ("engine.name=fsdp2", "schedule.steps=2", "schedule.warmup_steps=1")


@pytest.fixture
def sight(tiny: Path, tmp_path: Path) -> Sight:
    """What one process sees of the recipe `tiny`."""
    recipe = config.load(str(tiny), [f"run.dir={tmp_path / 'run'}"])
    return look(recipe, Command("tiny"), Pretraining())


def seen_by_two(sight: Sight, **second: object) -> Sight:
    """The same from two ranks, of which the second has some of it otherwise."""
    recipe = config.with_values(sight.facts.recipe, {"engine.name": "fsdp2"})
    facts = replace(sight.facts, recipe=recipe)
    first = sight.views[0]._replace(local_world=2)
    return Sight(facts, (first, first._replace(**second)))


def test_ranks_with_other_recipes_end_with_2_and_are_told_what_differs(
    ranks: Callable[..., Ranks], tiny: Path, tmp_path: Path
) -> None:
    run = Folder(tmp_path / "run")
    command = [str(tmp_path), "rcmae.train", str(tiny), *TWO, f"run.dir={run.path}"]
    other = [*command, "schedule.lr=2e-3", "run.seed=1"]
    started = ranks(PROGRAM, json.dumps([command, other]))
    assert started.wait() == [2, 2]
    said = started.said()
    assert "schedule.lr is 'not given' on rank 0 and '2e-3' on rank 1" in said
    assert "run.seed is 'not given' on rank 0 and '1' on rank 1" in said
    assert not run.path.exists()


def test_rank_0_alone_reads_the_recipe_and_the_names_of_classes(
    ranks: Callable[..., Ranks], tiny: Path, photo_shards: str, tmp_path: Path
) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for folder in (here, elsewhere):
        folder.mkdir()
    (here / "mine.yaml").write_text(tiny.read_text())
    (here / "names.txt").write_text("\n".join("abcdefgh"))
    arguments = [
        "rcmae.finetune",
        "mine.yaml",
        *TWO,
        "objective.name=finetune",
        "classify.class_names=names.txt",
        "evaluate.every_steps=2",
        f"evaluate.test_shards={photo_shards.replace('000000..', '000004..')}",
        f"run.dir={tmp_path / 'run'}",
    ]
    ranks(PROGRAM, json.dumps([[str(here), *arguments], [str(elsewhere), *arguments]])).succeed()
    document = json.loads((tmp_path / "run/evaluation/step-00000002.json").read_text())
    assert document["networks"]["student"]["classes"][0]["name"] == "a"


def test_a_mistake_of_ours_ends_with_its_traceback_and_1(tiny: Path, tmp_path: Path) -> None:
    command = [str(tmp_path), "bug", str(tiny), f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, ROOT / PROGRAM, json.dumps([command])],
        env={**os.environ, "PYTHONPATH": python_path(), "RANK": "0", "WORLD_SIZE": "1"}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ValueError: the mistake is ours" in done.stderr


def test_a_rank_that_reaches_nobody_says_so_on_its_own_stderr() -> None:
    program = (
        "from rcmae import dist, train\n"
        "dist.USUAL_TIMEOUT_S = 1.0\n"
        "raise SystemExit(train.main(['quickstart']))"
    )
    port = str(free_port())
    env = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": python_path(), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert f"rank 1 of 2 on {os.uname().nodename} cannot join the others at 127.0.0.1:{port}" in (
        done.stderr
    )
    assert "Traceback" not in done.stderr


def test_the_last_value_of_a_key_counts(sight: Sight) -> None:
    twice = Command("tiny", ("run.seed=1", "run.seed=2"))
    once = Command("tiny", ("run.seed=2",))
    views = (sight.views[0]._replace(command=twice), sight.views[0]._replace(command=once))
    recipe = config.with_values(sight.facts.recipe, {"engine.name": "fsdp2"})
    judge(Sight(replace(sight.facts, recipe=recipe), views), Pretraining())


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ({"versions": {"torch": "1.0"}}, "the version of torch is"),
        ({"shards": ("a.tar: No such file",)}, "does not see the shards of rank 0: a.tar"),
        ({"cache": "data.cache_dir=/x cannot be written"}, "rank 1"),
        ({"command": Command("other")}, "the recipe is 'tiny' on rank 0 and 'other' on rank 1"),
    ],
)
def test_what_one_rank_lacks_is_refused_with_its_name(
    sight: Sight, second: dict[str, object], told: str
) -> None:
    with pytest.raises(Refused, match=told):
        judge(seen_by_two(sight, **second), Pretraining())


def test_the_same_sight_gives_the_same_verdict(sight: Sight) -> None:
    one, two = (judge(seen_by_two(sight), Pretraining()) for _ in range(2))
    assert one.recipe == two.recipe
    assert one.sizes == two.sizes


def test_nothing_is_written_into_the_recipe_that_was_asked_for(sight: Sight) -> None:
    before = sight.facts.recipe.model_dump()
    verdict = judge(sight, Pretraining())
    assert sight.facts.recipe.model_dump() == before
    assert verdict.recipe.data.canonical_streams == 8


def test_a_run_of_another_training_is_told_apart_from_other_refusals(
    uninterrupted: Folder, tiny: Path
) -> None:
    recipe = config.load(str(tiny), [f"run.dir={uninterrupted.path}", "schedule.lr=5e-4"])
    seen = look(recipe, Command("tiny"), Pretraining())
    with pytest.raises(AnotherTraining, match=r"schedule\.lr"):
        judge(seen, Pretraining())
