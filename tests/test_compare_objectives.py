"""Objectives compared are trained alike, judged by the same probes, and taken as they are where
they are finished.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from rcmae.checkpoint import newest_unverified, tensor_of
from rcmae.commands import export as export_tool
from rcmae.commands.evaluation import compare as command
from rcmae.commands.evaluation import visualize
from rcmae.config import load
from rcmae.errors import Refused
from rcmae.evaluation.comparison import curves, judging, tables
from rcmae.evaluation.comparison.runs import OBJECTIVES, grouped
from rcmae.models.build import new_network
from rcmae.models.classifier import Classifier
from rcmae.models.fitting import fit_weights
from rcmae.models.sizes import NetworkSizes
from rcmae.weights.conversion import convert
from rcmae.weights.encoder import load_encoder
from rcmae.weights.names import published_names
from rcmae.weights.reading import read_network
from runs import Folder, start

import timm


def test_runs_are_trained_judged_and_taken_as_they_are(
    tiny: Path, photo_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [
        "schedule.steps=3",
        "schedule.warmup_steps=1",
        "log.tensorboard=false",
        "log.report=false",
    ]
    test = photo_shards.replace("000000..", "000004..")
    shards = [f"evaluate.train_shards={photo_shards}", f"evaluate.test_shards={test}"]
    given = [str(tiny), *steps, *shards, "--runs", str(tmp_path), "--seeds", "4", "--rounds", "1"]
    given += ["--objectives", "supmae", "bootmae", "--json", str(tmp_path / "told.json")]
    assert command.main(given) == 0
    told = json.loads((tmp_path / "told.json").read_text())
    networks = [(row["objective"], row["network"], row["seed"]) for row in told["rows"]]
    assert networks == [
        ("supmae", "student", 4),
        ("random", "student", 4),
        ("bootmae", "student", 4),
        ("bootmae", "teacher", 4),
    ]
    runs = {name: Folder(tmp_path / f"{name}-s4") for name in ("supmae", "bootmae")}
    recipe = (runs["supmae"].path / "recipe.yaml").read_text()
    assert all(line in recipe for line in ("num_classes: 8", "class_hidden: 256", "seed: 4"))
    assert all(0 <= row[figure] <= 100 for row in told["rows"] for figure in ("knn", "logistic"))
    assert told["costs"]["bootmae"]["step_bytes"] > told["costs"]["supmae"]["step_bytes"], (
        "regressors and a teacher"
    )
    said, beside = capsys.readouterr()
    first = f"run 1 of 2, {runs['supmae'].path}: "
    assert [line.split(" after ")[0] for line in beside.splitlines() if first in line] == [
        f"{first}training; its log: {runs['supmae'].path}.log",
        f"{first}finished",
    ]
    assert "judging 2 runs" in beside
    assert f"| {told['rows'][0]['knn']:.1f} |" in said
    assert said == (tmp_path / "table.md").read_text()
    with Image.open(tmp_path / "curves.png", formats=["PNG"]) as picture:
        assert picture.width > 400
    before = {name: run.path.stat().st_mtime_ns for name, run in runs.items()}
    assert command.main([*given, "--no-training"]) == 0
    capsys.readouterr()
    assert command.main(given) == 0
    assert f"{first}finished before" in capsys.readouterr().err
    again = json.loads((tmp_path / "told.json").read_text())
    assert again["rows"] == told["rows"]
    assert [run.steps() for run in runs.values()] == [[1, 2, 3]] * 2
    assert {name: run.path.stat().st_mtime_ns for name, run in runs.items()} == before


def test_an_objective_of_ones_own_is_compared_in_the_precision_that_the_machine_has(
    tiny: Path, photo_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = "rcmae.objectives.mae:MAE"
    steps = ["schedule.steps=2", "schedule.warmup_steps=1", "engine.precision=auto"]
    shards = [f"evaluate.train_shards={photo_shards}", f"evaluate.test_shards={photo_shards}"]
    given = [str(tiny), *steps, *shards, "--runs", str(tmp_path), "--seeds", "4", "--rounds", "1"]
    given += ["--objectives", "mae", own, "--json"]
    assert command.main(given) == 0
    told = json.loads(capsys.readouterr().out)
    found = {row["objective"]: row["knn"] for row in told["rows"]}
    assert found[own] == found["mae"]
    assert set(told["costs"]) == {"mae", own}
    assert Folder(tmp_path / "rcmae.objectives.mae.MAE-s4").steps() == [1, 2]


def test_a_comparison_of_nothing_that_is_there_says_what_is(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main([str(tiny), "--objectives", "edges"])
    assert "not one of mae, rcmae, supmae, rcsupmae, bootmae" in capsys.readouterr().err


ENCODERS = {
    "mae": ["objective.name=mae"],
    "bootmae": ["objective.name=bootmae"],
    "rcsupmae and features": ["objective.terms={class: 0.01, features: 1}", "model.num_classes=8"],
    "q and v biases": ["model.qkv_bias=qv", "model.positions=row_first"],
    "no class token": ["model.cls_token=false", "model.decoder_cls=false", "model.qkv_bias=qv"],
}


@pytest.mark.parametrize("objective", ENCODERS)
def test_an_encoder_is_that_of_the_run_whatever_it_learnt(
    objective: str,
    tiny: Path,
    photo_shards: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert start(tiny, tmp_path / "run", "run.stop_after_steps=2", *ENCODERS[objective]) == 75
    recipe = load(str(tiny), ENCODERS[objective])
    manifest = newest_unverified(tmp_path / "run" / "checkpoints")
    assert manifest is not None
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    networks = {"student": "weight"} | (
        {"teacher": "teacher"} if recipe.objective.teacher_parts else {}
    )
    for which, kind in networks.items():
        own = new_network(recipe)
        state = own.state_dict()
        for key in manifest.tensors:
            if key.partition("/")[0] in (kind, "buffer"):
                name = key.partition("/")[2]
                state[name] = tensor_of(manifest, key).view(state[name].shape)
        own.load_state_dict(state)
        with torch.no_grad():
            wanted = own.eval().encoded(images)[:, 1:].mean(1)
            torch.testing.assert_close(
                load_encoder(tmp_path / "run", network=which)(images), wanted
            )
            # its positions are interpolated
            larger = load_encoder(tmp_path / "run", network=which, image_size=48)
            assert (
                larger.forward_features(torch.zeros(1, 3, 48, 48)).shape[1]
                == 36 + recipe.model.cls_token
            )
        # and timm's own model, by the line that is told, computes the same
        out = tmp_path / f"{which}.safetensors"
        assert (
            export_tool.main(
                [str(tmp_path / "run"), "--format=timm", f"--what={which}", f"--out={out}"]
            )
            == 0
        )
        (line,) = re.findall(
            r"^ +(timm\.create_model\(.*\))$", capsys.readouterr().out, re.MULTILINE
        )
        theirs, ours = eval(line, {"timm": timm}), load_encoder(tmp_path / "run", network=which)
        with torch.no_grad():
            torch.testing.assert_close(
                theirs.eval().forward_features(images), ours.forward_features(images)
            )
            torch.testing.assert_close(theirs(images), ours(images))
        config = timm.data.resolve_model_data_config(theirs)
        assert (config["mean"], config["std"]) == (ours.mean, ours.std)
        assert config["input_size"][1:] == ours.image_size
        if any(name.endswith("q_bias") for name in manifest.tensors):  # keys have none
            assert not load_file(out)["blocks.0.attn.qkv.bias"].chunk(3)[1].any()
        source = read_network(tmp_path / "run", which)
        plain = convert(source, "bootmae", tmp_path / f"{which}.pth").out
        torch.testing.assert_close(load_encoder(plain, num_heads=4)(images), wanted)
    shard = photo_shards.replace("{000000..000005}", "000000")
    drawn = visualize.main(
        ["reconstruct", str(tmp_path / "run"), "--images", shard, "--count=2", f"--out={tmp_path}"]
    )
    assert (drawn, (tmp_path / "reconstruction.png").is_file()) == (0, True)
    if not recipe.model.cls_token:
        with pytest.raises(ValueError, match="no class token to pool"):
            load_encoder(tmp_path / "run", pool="cls")


def test_what_was_trained_without_a_class_token_is_fine_tuned_with_a_fresh_one(
    tiny: Path, tmp_path: Path
) -> None:
    options = [
        "objective.name=mae",
        "model.cls_token=false",
        "model.decoder_cls=false",
        "model.qkv_bias=qv",
    ]
    assert start(tiny, tmp_path / "run", "run.stop_after_steps=2", *options) == 75
    source = read_network(tmp_path / "run")
    model = Classifier(
        NetworkSizes(
            image_size=(32, 32), patch_size=8, in_channels=3, embed_dim=64, depth=3, num_heads=4
        ),
        num_classes=8,
        pool="mean",
    )
    fit = fit_weights(model, published_names(source.weights), source.grid)
    assert "cls_token" in fit.fresh
    assert torch.equal(model.pos_embed[:, 1:], source.weights["pos_embed"])
    assert not model.pos_embed[:, 0].any()
    assert torch.equal(model.blocks[1].attn.qkv.bias[:64], source.weights["blocks.1.attn.q_bias"])
    assert not model.blocks[1].attn.qkv.bias[64:128].any(), "keys have none"


def test_the_commands_objectives_are_those_of_the_library() -> None:
    assert tuple(OBJECTIVES) == command.OBJECTIVES


def test_what_cannot_be_compared_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(tiny), "--runs", str(tmp_path / "runs")]) == 2
    assert "give evaluate.train_shards and evaluate.test_shards" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def seeded(tiny: Path, photo_shards: str, tmp_path: Path) -> dict[str, Path]:
    """Two seeds of MAE, one of RC-MAE, and MAE with another learning rate; a step each."""
    steps = ["schedule.steps=1", "schedule.warmup_steps=0", "log.every_steps=1", "log.report=false"]
    shards = [f"evaluate.train_shards={photo_shards}", f"evaluate.test_shards={photo_shards}"]
    options = {
        "a": ["objective.name=mae", "--seed", "3"],
        "b": ["objective.name=mae", "--seed", "5"],
        "c": ["objective.name=rcmae"],
        "d": ["objective.name=mae", "schedule.lr=0.5"],
    }
    runs = {name: tmp_path / name for name in options}
    for name, more in options.items():
        assert start(tiny, runs[name], *steps, *shards, *more) == 0
    return runs


def test_runs_that_differ_in_their_seeds_alone_are_one_row(
    seeded: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = grouped(list(seeded.values()))
    names = {group.name: [run.seed for run in group.runs] for group in groups}
    (base,) = {run.recipe.schedule.lr for run in groups[0].runs}
    assert names == {
        f"mae, schedule.lr={base}": [3, 5],
        "rcmae": [0],
        "mae, schedule.lr=0.5": [0],
    }
    assert {run.recipe.data.seed for run in groups[0].runs} == {3, 5}
    panels = curves.panels_of(groups)
    assert set(panels["loss_consistency"]) == {"rcmae"}, "MAE has no such term"
    assert [len(each) for each in panels["loss_reconstruction"].values()] == [2, 1, 1]
    out = tmp_path / "out"
    folders = [str(seeded[name]) for name in "abc"]
    assert command.main([*folders, "--rounds", "0", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    header, _, mae, random, rcmae, _, caption = told.splitlines()
    assert "CPU" not in header
    assert "consistency" not in told
    assert re.search(r"\| mae \| 2 \| no \| \d+\.\d ± \d+\.\d \| - \|", mae)
    assert random.startswith("| random | 3 |")
    assert rcmae.startswith("| rcmae | 1 |")
    assert caption == "Top-1 in %, mean ± standard deviation over seeds 0, 3, 5."
    tex = (out / "table.tex").read_text()
    assert re.search(r"mae & 2 & no & \$\d+\.\d \\pm \d+\.\d\$ & -- ", tex)
    assert r"Top-1 in \%" in tex


def test_runs_that_cannot_be_compared_are_refused(
    seeded: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    copy = seeded["a"].with_name("copy")
    shutil.copytree(seeded["a"], copy)
    with pytest.raises(Refused, match="same recipe and seed 3"):
        grouped([seeded["a"], copy])
    with pytest.raises(Refused, match=r"take evaluate\.train_shards"):
        judging.judging_of([], ["batch.images=4"], copy, allow_pipe=False)
    (copy / "outcome.json").unlink()
    with pytest.raises(Refused, match="is not finished"):
        grouped([copy])
    recipe = copy / "recipe.yaml"
    shutil.copy(seeded["a"] / "outcome.json", copy)
    recipe.write_text(re.sub("test_shards: .*", "test_shards: 'pipe:date'", recipe.read_text()))
    assert command.main([str(copy), "--rounds", "0"]) == 2
    assert "--allow-pipe" in capsys.readouterr().err


def test_the_spread_is_the_deviation_of_the_sample() -> None:
    figure = tables.over_seeds([1.0, 2.0, 6.0])
    assert figure is not None
    assert figure == pytest.approx((3.0, 7.0**0.5))
    assert tables.over_seeds([]) is None
    rows = [
        {"objective": "a_b", "seed": seed, "network": "student", "knn": 10.0 * seed, "logistic": 1}
        for seed in (1, 2)
    ]
    table = tables.table_of(rows, {}, [])
    assert "15.0 ± 7.1" in tables.markdown(table)
    assert r"a\_b & 2 & no & $15.0 \pm 7.1$" in tables.latex(table)
    steps, mean, deviation = curves.mean_over([{1: 1.0, 2: 2.0}, {2: 4.0, 3: 1.0}])
    assert (steps.tolist(), mean.tolist()) == ([2], [3.0])
    assert deviation == pytest.approx([2.0**0.5])
