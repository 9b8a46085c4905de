"""An objective of somebody else's module is trained by its name, from outside the package: the one
that CONTRIBUTING.md shows.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import rcmae
from rcmae import config
from rcmae.errors import Refused
from rcmae.objectives import OBJECTIVES
from runs import Folder, python_path, start
from tests.conftest import ROOT

NAME = "objective.name=my_objectives:Absolute"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the module that CONTRIBUTING.md shows."""
    folder = tmp_path_factory.mktemp("project")
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## Add an objective") :]
    shown = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert shown is not None
    (folder / "my_objectives.py").write_text(shown[1])
    assert f"{NAME} 'objective.options={{visible_weight: 0.2}}'" in section
    return folder


@pytest.fixture
def inside(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, and it is the current folder."""
    monkeypatch.chdir(project)
    yield project
    sys.modules.pop("my_objectives", None)
    if str(project) in sys.path:
        sys.path.remove(str(project))


def train(project: Path, recipe: Path, run: Path, *overrides: str) -> subprocess.CompletedProcess:
    """A training by the command line, in the project's folder."""
    command = [sys.executable, "-m", "rcmae.train", str(recipe), f"run.dir={run}", NAME, *overrides]
    paths = os.environ | {"PYTHONPATH": python_path()}
    return subprocess.run(command, cwd=project, env=paths, capture_output=True, text=True)


def test_it_trains_and_resumes(
    project: Path, inside: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "objective.options={visible_weight: 0.2}"
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    steps = ("schedule.steps=3", "schedule.warmup_steps=1", "checkpoint.every_steps=1")
    done = train(project, tiny, whole, options, *steps)  # by the command line, as a user does
    assert done.returncode == 0, done.stderr
    row = Folder(whole).rows()[-1]
    assert {key for key in row if key.startswith("loss")} == {"loss", "loss_absolute"}
    assert row["loss"] == row["loss_absolute"] > 0

    assert start(tiny, halves, NAME, options, *steps, "run.stop_after_steps=1") == 75
    assert start(tiny, halves, NAME, options, *steps) == 0
    assert Folder(halves).losses() == Folder(whole).losses()

    written = yaml.safe_load((halves / "recipe.yaml").read_text())["objective"]
    assert written["options"] == {"visible_weight": 0.2}
    assert not {"norm_pix_loss", "consistency_weight"} & written.keys()
    capsys.readouterr()
    assert start(tiny, halves, NAME, "objective.options={visible_weight: 0.3}", *steps) == 2
    said = capsys.readouterr().err
    assert "objective.options.visible_weight=0.2, but this recipe has 0.3" in said


def test_a_shipped_term_can_be_added_to_it(inside: Path, tiny: Path, tmp_path: Path) -> None:
    more = ("objective.terms={consistency: 0.5}", "schedule.steps=2", "schedule.warmup_steps=1")
    assert start(tiny, tmp_path / "run", NAME, *more) == 0
    for row in Folder(tmp_path / "run").rows():
        want = row["loss_absolute"] + 0.5 * row["loss_consistency"]
        assert row["loss"] == pytest.approx(want)


def test_a_term_of_ones_own_is_added_to_a_shipped_objective(
    inside: Path, tiny: Path, tmp_path: Path
) -> None:
    mine = 'objective.terms={"my_objectives:AbsoluteError": 0.5}'
    short = ("schedule.steps=2", "schedule.warmup_steps=1", "objective.name=mae")
    assert start(tiny, tmp_path / "run", mine, *short) == 0
    for row in Folder(tmp_path / "run").rows():
        want = row["loss_reconstruction"] + 0.5 * row["loss_absoluteerror"]
        assert row["loss"] == pytest.approx(want)
    tree = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    sys.modules.pop("my_objectives")
    config.stored(tree, imports=False).objective.student_outputs  # noqa: B018, imports nothing
    assert "my_objectives" not in sys.modules


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ("my_objectives:AbsoluteOptions", "is no class with a `student_output`"),
        ("my_objectives:AbsoluteEror", "did you mean 'AbsoluteError'?"),
        ("absolute", "objective.terms"),
    ],
)
def test_a_term_that_is_none_is_refused(inside: Path, tiny: Path, terms: str, said: str) -> None:
    with pytest.raises(Refused, match=re.escape(said)):
        config.load(str(tiny), [f'objective.terms={{"{terms}": 1.0}}'])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            [NAME, "objective.options={visible_wieght: 0.2}"],
            "unknown key 'visible_wieght' in objective.options; did you mean 'visible_weight'?",
        ),
        (
            [NAME, "objective.options={visible_weight: -1}"],
            "objective.options.visible_weight: input should be greater than or equal to 0, got -1",
        ),
        (
            [NAME, "objective.visible_weight=0.2"],
            "objective.visible_weight is an option of my_objectives:Absolute: "
            "'objective.options={visible_weight: ...}'",
        ),
        (
            [NAME, "objective.norm_pix_loss=false"],
            "objective.norm_pix_loss belongs to mae, rcmae, supmae, ",
        ),
        (["objective.name=my_objectives:Absolut"], "has no 'Absolut'; did you mean 'Absolute'?"),
        (["objective.name=my_objective:Absolute"], "no module 'my_objective' on Python's path"),
        (["objective.name=:Absolute"], "write MODULE:NAME"),
        (
            ["objective.name={my_objectives: Absolute}"],
            "objective.name: input should be a valid",
        ),
        (["objective.name=absolute"], "unknown objective 'absolute'; known: "),
    ],
)
def test_what_is_wrong_with_it_is_said(
    inside: Path, tiny: Path, given: list[str], said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        config.load(str(tiny), given)


def test_a_module_that_does_not_import_is_the_users(inside: Path, tiny: Path) -> None:
    (inside / "broken.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(ValueError, match="broken does not import: No module named 'nothing_of"):
        config.load(str(tiny), ["objective.name=broken:Absolute"])


def test_options_that_are_no_model_are_the_users(inside: Path, tiny: Path) -> None:
    (inside / "plain.py").write_text("class Plain:\n    Options = dict\n")
    with pytest.raises(ValueError, match="plain:Plain: its Options must be a pydantic model"):
        config.load(str(tiny), ["objective.name=plain:Plain"])


def test_an_option_that_came_later_has_its_default_in_an_old_run(inside: Path, tiny: Path) -> None:
    saved = config.load(str(tiny), [NAME]).model_dump(mode="json")
    del saved["objective"]["options"]["visible_weight"]  # the module had no such option yet
    for weight, lines in ((0.1, 0), (0.2, 1)):
        given = [NAME, f"objective.options={{visible_weight: {weight}}}"]
        mine = config.load(str(tiny), given).model_dump(mode="json")
        assert len(config.differences(mine, saved)) == lines


def test_a_stored_recipe_is_read_without_the_module(inside: Path, tiny: Path) -> None:
    dumped = config.load(str(tiny), [NAME]).model_dump(mode="json")
    dumped["objective"]["name"] = "gone_since:Absolute"
    read = config.stored(dumped, imports=False)
    assert read.objective.student_outputs == ("pixels",)
    assert read.model_dump(mode="json") == dumped
    with pytest.raises(ValueError, match="no module 'gone_since'"):
        config.stored(dumped)


def test_outputs_that_are_read_without_being_said_are_refused(inside: Path, tiny: Path) -> None:
    from rcmae import objectives

    (inside / "silent.py").write_text(
        "from my_objectives import *\n\n\nclass Silent(Absolute):\n    Options = type('Options', "
        "(BaseModel,), {'__annotations__': {'visible_weight': float}, 'visible_weight': 0.1})\n"
    )
    recipe = config.load(str(tiny), ["objective.name=silent:Silent"])
    with pytest.raises(ValueError, match="reads all_pixels of the student; say so in its Options"):
        objectives.make(recipe.objective, objectives.Context())


LOSS = "return (error * torch.ones_like(error).scatter(1, visible, self.visible_weight)).sum()"


@pytest.mark.parametrize(
    ("given", "status", "said"),
    [
        (LOSS.replace(".sum()", ".mean()"), 0, "so give the sum, not a mean"),
        (LOSS.replace(".sum()", ""), 2, "it must be a scalar, the sum"),
        (LOSS.replace(".sum()", ".sum() / 0"), 2, "the term absolute is inf on random images"),
        (LOSS.replace(".sum()", ".sum().detach()"), 2, "no gradient reaches the student"),
        ("return 1 + error.nothing", 2, "AttributeError: 'Tensor' object has no attribute"),
    ],
)
def test_what_a_loss_gets_wrong_is_told_before_anything_is_written(
    project: Path,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: str,
    status: int,
    said: str,
) -> None:
    text = (project / "my_objectives.py").read_text()
    assert LOSS in text
    (tmp_path / "wrong_objectives.py").write_text(text.replace(LOSS, given))
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "objective.name=wrong_objectives:Absolute"
    steps = ("schedule.steps=1", "schedule.warmup_steps=0")
    try:
        assert start(tiny, tmp_path / "run", name, *steps) == status
        assert said in "".join(capsys.readouterr())
        assert (tmp_path / "run").exists() == (status == 0)
        with pytest.raises(Refused, match=re.escape(said)):
            rcmae.check_objective("wrong_objectives:Absolute")
    finally:
        sys.modules.pop("wrong_objectives", None)


def test_a_loss_that_is_right_is_tried_in_ones_own_tests(inside: Path) -> None:
    assert rcmae.check_objective("my_objectives:Absolute", visible_weight=0.2)["absolute"] > 0
    for name in OBJECTIVES:
        assert all(value > 0 for value in rcmae.check_objective(name).values()), name
    with pytest.raises(Refused, match=r"or give my_objectives:Absolute"):
        rcmae.check_objective("my_objectives.Absolute")
