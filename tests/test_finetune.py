"""Fine-tuning and probing are trainings like any other: resumed, on any engine, refused clearly."""

from __future__ import annotations

import io
import json
import math
import pickle
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from test_classifier import SIZES

from rcmae import checkpoint, finetune, follow, probe
from rcmae.commands.again import replay
from rcmae.data.index import ShardIndex
from rcmae.models.classifier import Classifier
from rcmae.models.sizes import NetworkSizes
from runs import Folder, distance, equal, keeping_handlers
from tests.conftest import Ranks

PROGRAMS = Path(__file__).parent / "programs"
ENGINES = {
    "zero2": ["engine.name=deepspeed", "engine.config=zero2"],
    "zero3": ["engine.name=deepspeed", "engine.config=zero3"],
    "fsdp2": ["engine.name=fsdp2"],
    "ddp": ["engine.name=ddp"],
}
EVERYTHING = {
    "layer_decay": 0.7,
    "drop_path": 0.3,
    "smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "erase": 0.5,
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "average": True,
}


def recipe_of(tiny: Path, folder: Path, init: Path, name: str, **classify: object) -> Path:
    """The tiny recipe, fine-tuning (or probing) a run's encoder for 6 steps and judging it at
    the end.
    """
    tree = yaml.safe_load(tiny.read_text())
    tree["objective"] = {"name": name}
    tree["model"]["image_size"] = 40  # of another grid than the pretraining
    tree["schedule"] = {"steps": 6, "warmup_steps": 2, "lr": 1e-3, "clip_grad": 1.0}
    tree["classify"] = {"init": str(init), **classify}
    # 40 images: 20 a rank are padded to 24
    one = tree["data"]["shards"].replace("{000000..000005}", "000000")
    tree["evaluate"] = {"every_steps": 6, "test_shards": one, "batch": 8}
    tree["checkpoint"] = {"every_steps": 4}
    tree["teacher"] = {"momentum": 0.9, "schedule": "constant"}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def recipes(
    tiny: Path, uninterrupted: Folder, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("downstream")
    tree = yaml.safe_load(tiny.read_text())
    shards = Path(tree["data"]["shards"]).parent
    for shard in shards.glob("*.tar"):
        shutil.copy(shard, folder)
    tree["data"]["shards"] = str(folder / Path(tree["data"]["shards"]).name)
    ShardIndex.open(tree["data"]["shards"]).save(folder)  # once for all of these runs
    tiny = folder / "tiny.yaml"
    tiny.write_text(yaml.safe_dump(tree))
    return {
        "finetune": recipe_of(tiny, folder, uninterrupted.path, "finetune", **EVERYTHING),
        "probe": recipe_of(tiny, folder, uninterrupted.path, "probe", rule="lars", depth=2),
    }


def start(recipe: Path, folder: Path, *overrides: str) -> int:
    """`python -m rcmae.finetune` or `rcmae.probe`, as the recipe's name says, in this process.

    Its exit status.
    """
    module = {"finetune": finetune, "probe": probe}[recipe.stem.split("-")[0]]
    with (
        keeping_handlers(),
        patch("os._exit", side_effect=AssertionError("the run ended its process")),
    ):
        return module.main([str(recipe), f"run.dir={folder}", *overrides])


@pytest.fixture(scope="module")
def whole(recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folder]:
    folders = {name: Folder(tmp_path_factory.mktemp("whole") / name) for name in recipes}
    for name, folder in folders.items():
        assert start(recipes[name], folder.path) == 0
    return folders


def test_a_run_leaves_losses_scores_and_pictures(whole: dict[str, Folder]) -> None:
    for name, networks in (("finetune", ["student", "average"]), ("probe", ["student"])):
        folder = whole[name]
        assert folder.steps() == list(range(1, 7))
        assert {"loss", "loss_classification", "lr", "grad_norm"} <= folder.rows()[-1].keys()
        (event,) = folder.events("evaluate")
        assert list(event["scores"]) == networks
        assert event["scores"]["student"]["images"] == 40
        document = json.loads((folder.path / "evaluation" / "step-00000006.json").read_text())
        assert sum(row["images"] for row in document["networks"]["student"]["classes"]) == 40
        assert (folder.path / "pictures" / "confusion-student-00000006.png").stat().st_size > 100
    heads = {key for key in whole["probe"].state() if key.startswith("weight/")}
    assert heads == {"weight/1.weight", "weight/1.bias"}


@pytest.mark.parametrize("name", ["finetune", "probe"])
def test_from_beside_a_checkpoint_gets_the_scores_that_the_training_gave_it(
    name: str, whole: dict[str, Folder], tmp_path: Path
) -> None:
    run = Folder(shutil.copytree(whole[name].path, tmp_path / "run"))
    with keeping_handlers():
        assert follow.main([str(run.path), "--poll-s=0.1"]) == 0
    beside = Folder(run.path / follow.FOLDER)
    [told] = [event["scores"] for event in run.events("evaluate") if event["step"] == 6]
    [found] = [event["scores"] for event in beside.events("evaluate") if event["step"] == 6]
    assert found == told
    document = Path("evaluation") / "step-00000006.json"
    assert (beside.path / document).read_text() == (run.path / document).read_text()


@pytest.mark.parametrize("name", ["finetune", "probe"])
def test_interrupted_equals_uninterrupted(
    name: str, recipes: dict[str, Path], whole: dict[str, Folder], tmp_path: Path
) -> None:
    folder = Folder(tmp_path / "run")
    assert start(recipes[name], folder.path, "run.stop_after_steps=3") == 75
    assert start(recipes[name], folder.path) == 0
    assert folder.losses() == whole[name].losses()
    assert equal(folder.state(), whole[name].state())
    assert folder.events("evaluate")[-1]["scores"] == whole[name].events("evaluate")[-1]["scores"]


@pytest.fixture(scope="module")
def ranked(recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both trainings on two ranks of each engine, two micro-batches a step."""
    root = tmp_path_factory.mktemp("ranked")
    jobs = [
        [str(recipe), f"run.dir={root / f'{name}-{engine}'}", "batch.per_device=8", *overrides]
        for name, recipe in recipes.items()
        for engine, overrides in ENGINES.items()
    ]
    group = Ranks([sys.executable, str(PROGRAMS / "train_many.py"), json.dumps(jobs)], 2, root)
    assert f"STATUS {[0] * len(jobs)}" in group.succeed()
    return root


@pytest.mark.parametrize("engine", ENGINES)
def test_fine_tuning_on_two_ranks_is_the_local_one(
    engine: str, ranked: Path, whole: dict[str, Folder]
) -> None:
    run, oracle = Folder(ranked / f"finetune-{engine}"), whole["finetune"]
    assert run.losses() == pytest.approx(oracle.losses(), rel=1e-5)
    for kind in ("weight", "teacher"):
        assert distance(run.state(), oracle.state(), kind) < 1e-4
    mine, theirs = (each.events("evaluate")[-1]["scores"] for each in (run, oracle))
    assert mine["student"]["images"] == theirs["student"]["images"]
    assert mine["student"]["loss"] == pytest.approx(theirs["student"]["loss"], rel=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_probe_on_two_ranks_learns_the_same(
    engine: str, ranked: Path, whole: dict[str, Folder]
) -> None:
    """To a percent: its norm sees a micro-batch of all ranks, here half a step."""
    run, oracle = Folder(ranked / f"probe-{engine}"), whole["probe"]
    others = [Folder(ranked / f"probe-{other}") for other in ENGINES if other != engine]
    assert run.losses() == pytest.approx(oracle.losses(), rel=5e-2)
    for other in others:
        assert run.losses() == pytest.approx(other.losses(), rel=1e-5)
        assert distance(run.state(), other.state(), "weight") < 1e-4
        assert distance(run.state(), other.state(), "buffer") < 1e-4


@pytest.mark.parametrize("name", ["finetune", "probe"])
def test_a_bad_step_is_brought_back_by_its_bundle(
    name: str, recipes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert (
        start(recipes[name], folder, "guard.drill_nan_position=69", "checkpoint.every_steps=2") == 1
    )
    capsys.readouterr()
    with keeping_handlers():
        assert replay.main([str(folder / "replay" / "step-00000002.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["from_step"], found["step"], found["same_masks"]) == (2, 2, True)
    assert {row["position"] for row in found["samples"] if not math.isfinite(row["loss"])} == {69}
    assert len(found["samples"]) == 32


# ------------------------------------------------------------------------------------ what is wrong


def bomb(path: Path) -> None:
    class Run:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return exec, (f"open({str(path.parent / 'ran')!r}, 'w')",)

    torch.save({"model": Run()}, path, pickle_module=pickle)


def relabelled(shards: str, folder: Path, change: Callable[[int], int]) -> str:
    """A copy of the first shard with other labels."""
    source, target = shards.replace("{000000..000005}", "000000"), folder / "other-000000.tar"
    with tarfile.open(source) as tar, tarfile.open(target, "w") as out:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            data = file.read()
            if member.name.endswith(".cls"):
                data = str(change(int(data))).encode()
                member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    return str(target)


def refused(recipe: Path, folder: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    assert start(recipe, folder, *overrides) == 2
    assert not folder.exists(), "nothing is written"
    return capsys.readouterr().err


def test_wrong_weights_are_refused_by_name(
    recipes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for overrides, message in (
        (["model.embed_dim=32"], "cls_token 1x1x64 instead of 1x1x32"),
        (["model.patch_size=4"], "it has patches of 8 pixels, the model 4"),
        (["model.depth=2"], "has unknown blocks.2."),
        (["model.depth=4"], "lacks blocks.3."),
        ([f"classify.init={tmp_path / 'nowhere'}"], "no such file or folder"),
    ):
        for name in ("finetune", "probe"):
            message = "lacks blocks" if message.startswith("lacks") else message
            assert message in refused(recipes[name], run, capsys, *overrides)
    file = tmp_path / "weights.pth"
    bomb(file)
    said = refused(recipes["finetune"], run, capsys, f"classify.init={file}")
    assert "nothing was run" in said
    assert not (tmp_path / "ran").exists()
    state = Classifier(NetworkSizes(**{**SIZES, "embed_dim": 64}), num_classes=0).state_dict()
    del state["blocks.1.mlp.fc1.bias"]
    torch.save(state | {"surplus": torch.zeros(2)}, file)
    said = refused(recipes["finetune"], run, capsys, f"classify.init={file}")
    assert "lacks blocks.1.mlp.fc1.bias" in said
    assert "has unknown surplus" in said
    assert "classify.depth=9" in refused(recipes["probe"], run, capsys, "classify.depth=9")


def test_wrong_labels_are_refused_by_number(
    recipes: dict[str, Path], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, run = yaml.safe_load(tiny.read_text())["data"]["shards"], tmp_path / "run"
    recipe = recipes["finetune"]
    said = refused(recipe, run, capsys, "classify.num_classes=6")
    assert "labels 6, 7 lie outside classify.num_classes=6 (0 to 5)" in said
    other = relabelled(shards, tmp_path, lambda label: label + 3)
    said = refused(recipe, run, capsys, f"evaluate.test_shards={other}", "classify.num_classes=20")
    assert "classes 8, 9, 10" in said
    assert "none of data.shards'" in said


def test_recipes_of_another_command_are_sent_there(
    recipes: dict[str, Path], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with keeping_handlers():
        assert finetune.main([str(tiny), f"run.dir={run}"]) == 2
        assert "train it by `rcmae train`, not by `rcmae finetune`" in capsys.readouterr().err
    said = refused(recipes["finetune"], run, capsys, "classify.rule=lars", "classify.depth=2")
    assert "classify.rule=lars is for probes" in said
    assert "classify.depth is for probes" in said
    said = refused(recipes["probe"], run, capsys, "classify.mixup=0.8")
    assert "a probe's encoder is frozen" in said


def test_a_probe_keeps_the_encoder_that_it_began_with(
    recipes: dict[str, Path], whole: dict[str, Folder]
) -> None:
    manifest = checkpoint.read_manifest(max(whole["probe"].checkpoints.glob("step-*")))
    assert manifest.meta["recipe"]["classify"]["init"].endswith("checkpoints/step-00000020")
    assert manifest.meta["recipe"]["classify"]["num_classes"] == 8
