"""A task of somebody else's module is trained, resumed and judged without a line changed here.

It is the one that CONTRIBUTING.md shows.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Ranks

from runs import Folder, equal, python_path, start

NAME = "task.name=my_tasks:Rotation"
PROGRAM = "tests/programs/started_apart.py"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the module that CONTRIBUTING.md shows."""
    folder = tmp_path_factory.mktemp("project")
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## Add a task") :]
    shown = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert shown is not None
    (folder / "my_tasks.py").write_text(shown[1])
    assert f"{NAME} 'task.options={{smoothing: 0.1}}'" in section
    return folder


def train(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A training by the command line, in the project's folder."""
    command = [sys.executable, "-m", "rcmae.train", *arguments]
    paths = {**os.environ, "PYTHONPATH": python_path()}
    return subprocess.run(command, cwd=project, env=paths, capture_output=True, text=True)


@pytest.fixture
def inside(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The project's folder is the current one: its task is trained in this process."""
    monkeypatch.chdir(project)
    yield
    sys.modules.pop("my_tasks", None)
    if str(project) in sys.path:
        sys.path.remove(str(project))


def test_it_trains_resumes_on_other_ranks_and_is_judged(
    project: Path,
    inside: None,
    tiny: Path,
    photo_shards: str,
    tmp_path: Path,
    ranks: Callable[..., Ranks],
) -> None:
    arguments = [
        str(tiny),
        NAME,
        "task.options={smoothing: 0.1}",
        "schedule.steps=6",
        "schedule.warmup_steps=2",
        "evaluate.every_steps=6",
        f"evaluate.test_shards={photo_shards}",
    ]
    whole, halves = Folder(tmp_path / "whole"), Folder(tmp_path / "halves")
    done = train(project, *arguments, f"run.dir={whole.path}")
    assert done.returncode == 0, done.stderr
    assert "best student  top-1" in done.stdout
    assert set(whole.events("evaluate")[0]["rotation"]) >= {"top1", "loss"}

    assert start(tiny, halves.path, *arguments[1:], "run.stop_after_steps=3") == 75
    again = [*arguments, f"run.dir={halves.path}", "engine.name=fsdp2"]
    command = [str(project), "rcmae.train", *again]
    ranks(PROGRAM, json.dumps([command, command])).succeed()
    assert halves.losses() == pytest.approx(whole.losses(), rel=1e-5)


def test_it_resumes_bit_for_bit_with_the_same_options(
    inside: None, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [NAME, "task.options={smoothing: 0.1}", "schedule.steps=4"]
    arguments += ["schedule.warmup_steps=1"]
    whole, halves = Folder(tmp_path / "whole"), Folder(tmp_path / "halves")
    assert start(tiny, whole.path, *arguments) == 0
    assert start(tiny, halves.path, *arguments, "run.stop_after_steps=2") == 75
    capsys.readouterr()
    other = [*arguments, "task.options={smoothing: 0.2}"]
    assert start(tiny, halves.path, *other) == 2
    assert "task.options.smoothing=0.1, but this recipe has 0.2" in capsys.readouterr().err
    assert start(tiny, halves.path, *arguments) == 0
    assert equal(whole.state(), halves.state())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([NAME, "task.options={smothing: 1}"], "unknown option 'smothing'; did you mean 'smoothi"),
        (["task.name=my_tasks:Rotations"], "has no 'Rotations'; did you mean 'Rotation'?"),
        (["task.name=pretrian"], "unknown task 'pretrian'; did you mean 'pretrain'?"),
        (["task.name=finetune"], "trained by `rcmae finetune`, not by `rcmae train`"),
        (["task.options={a: 1}"], "task.options: task.name=pretrain has none; leave it out"),
        ([NAME, "objective.name=mae"], "task.name=my_tasks:Rotation has its own"),
    ],
)
def test_what_is_wrong_with_it_is_said(
    inside: None,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    said: str,
) -> None:
    assert start(tiny, tmp_path / "run", *given) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
