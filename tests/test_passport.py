"""A model's folder: timm and transformers load it without a network, and a stranger can read it."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import rcmae
from rcmae.commands import export
from rcmae.run.passport.card import UNTESTED, About, untested
from rcmae.run.records.shown import Figure
from rcmae.run.report.reading import seen
from runs import start
from tests.checkpoints import network, state_of, write_checkpoint
from tests.test_whole_classifiers import NAMES, SQUARE, finetuned, images

import timm

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No address of another machine can be had, whoever asks."""

    def refused(*where: Any, **named: Any) -> Any:
        raise OSError(f"no network: {where}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


@pytest.fixture(scope="module")
def trained(tiny: Path, photo_shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining with evaluations, finished, whose data are named by a secret address, too."""
    folder = tmp_path_factory.mktemp("passport") / "run"
    first = photo_shards.replace("{000000..000005}", "000000")
    second = photo_shards.replace("{000000..000005}", "000001")
    options = [
        "schedule.steps=6",
        "checkpoint.every_steps=3",
        "evaluate.every_steps=3",
        f"evaluate.train_shards={first}",
        f"evaluate.test_shards={second}",
        "run.name=a | name <b>",
    ]
    assert start(tiny, folder, *options) == 0
    return folder


def written(run: Path, out: Path, *more: str) -> Path:
    assert export.main([str(run), "--format", "folder", "--out", str(out), *more]) == 0
    return out


def test_timm_transformers_and_we_give_the_same_features(trained: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    out = written(trained, tmp_path / "model")
    inputs = images()
    ours = rcmae.load_encoder(trained)
    with torch.no_grad():
        wanted, tokens = ours(inputs), ours.forward_features(inputs)
        model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        assert torch.allclose(model(inputs), wanted, atol=1e-6, rtol=1e-5)
        wrapped = transformers.AutoModel.from_pretrained(out).eval()
        found = wrapped(inputs)
        assert torch.allclose(found.pooler_output, wanted, atol=1e-6, rtol=1e-5)
        assert torch.allclose(found.last_hidden_state, tokens, atol=1e-6, rtol=1e-5)
        again = rcmae.load_encoder(out)
        assert torch.equal(again(inputs), wanted)
    assert again.mean == ours.mean


def test_images_are_prepared_alike(trained: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    out = written(trained, tmp_path / "model")
    photo = Image.radial_gradient("L").resize((90, 70)).convert("RGB")
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    config = timm.data.resolve_model_data_config(model)
    wanted = timm.data.create_transform(**config, is_training=False)(photo)
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    assert torch.allclose(processor(photo, return_tensors="pt")["pixel_values"][0], wanted)
    assert rcmae.load_encoder(out).transform(photo).shape == wanted.shape
    assert (rcmae.load_encoder(out).transform(photo) - wanted).abs().mean() < 0.05


def test_the_card_has_what_made_the_model(trained: Path, tmp_path: Path) -> None:
    out = written(trained, tmp_path / "model")
    listed = {path.name for path in out.iterdir()}
    assert listed == {
        "README.md",
        "config.json",
        "curves.png",
        "model.safetensors",
        "recipe.yaml",
        "report.html",
        "training.json",
    }
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "timm"
    told = json.loads((out / "training.json").read_text())
    assert told["step"] == 6
    assert told["data_fingerprint"] in card
    assert told["device_hours"] > 0
    assert told["devices"]
    assert set(told["evaluations"]) == {"3", "6"}
    for word in ("rcmae", "Device hours", "k-NN", "## Not tested", "robustness", "vit_tiny"):
        assert word in card
    assert "k-NN or linear classification" not in card.split("## Not tested")[1]
    assert "# a \\| name &lt;b&gt;" in card  # no HTML, and no column of a table
    assert "{{" not in card
    assert "{%" not in card
    with Image.open(out / "curves.png", formats=["PNG"]) as picture:
        assert picture.size[0] > 400


def test_no_secret_leaves_with_the_model(tmp_path: Path) -> None:
    data = {"shards": "https://me:TOKEN@host/a.tar?X-Amz-Signature=SIGNED"}
    write_checkpoint(tmp_path / "run", 10, state_of(network(1, **SQUARE)), model=SQUARE, data=data)
    out = written(tmp_path / "run", tmp_path / "model")
    for path in out.iterdir():
        assert b"TOKEN" not in path.read_bytes()
        assert b"SIGNED" not in path.read_bytes()
    assert "host/a.tar" in (out / "README.md").read_text()


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_classifier_leaves_with_its_head_and_names(tmp_path: Path, pool: str) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "run").mkdir()
    with torch.no_grad():
        wanted = finetuned(tmp_path / "run", pool)(images())
        out = written(tmp_path / "run", tmp_path / "model")
        model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        assert torch.allclose(model(images()), wanted, atol=1e-6, rtol=1e-5)
        wrapped = transformers.AutoModelForImageClassification.from_pretrained(out).eval()
        assert torch.allclose(wrapped(images()).logits, wanted, atol=1e-6, rtol=1e-5)
    assert wrapped.config.id2label == dict(enumerate(NAMES))
    assert rcmae.load_classifier(out).class_names == tuple(NAMES)
    assert "AutoModelForImageClassification" in (out / "README.md").read_text()


def test_further_class_tokens_are_timm_s_registers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {**SQUARE, "class_tokens": 3}
    write_checkpoint(tmp_path / "run", 10, state_of(network(1, **sizes)), model=sizes)
    out = written(tmp_path / "run", tmp_path / "model")
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        wanted = rcmae.load_encoder(tmp_path / "run").forward_features(images())
        assert torch.allclose(model.forward_features(images()), wanted, atol=1e-6, rtol=1e-5)
        found = transformers.AutoModel.from_pretrained(out).eval()(images()).last_hidden_state
        assert torch.allclose(found, wanted, atol=1e-6, rtol=1e-5)
    untested = (out / "README.md").read_text().split("## Not tested")[1]
    for word in ("k-NN", "fine-tuning", "semantic segmentation", "detection", "robustness"):
        assert word in untested


@pytest.mark.parametrize(
    ("task", "group", "tested"),
    [
        ("pretrain", "knn_student", "k-NN or linear classification of frozen features"),
        ("probe", "scores_student", "k-NN or linear classification of frozen features"),
        ("finetune", "scores_student", "classification after fine-tuning"),
        ("segment", "segmentation_student", "semantic segmentation"),
        ("detect", "box_student", "detection of objects"),
    ],
)
def test_one_kind_of_evaluation_tells_nothing_of_others(
    trained: Path, task: str, group: str, tested: str
) -> None:
    (run,) = seen([trained])
    run = replace(run, judged={6: [Figure(group, "x", 1.0)]})
    recipe = {"task": {"name": task}}
    about = About(None, recipe, "student", run, None, 0, has_curves=False)  # type: ignore[arg-type]
    kinds = {what for what in UNTESTED if what not in untested(about)}
    assert kinds == {tested}


def test_a_folder_is_replaced_whole_and_only_where_it_is_a_model_s(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = written(trained, tmp_path / "model")
    again = [str(trained), "--format", "folder", "--out", str(out)]
    assert export.main(again) == 2
    assert "already exists" in capsys.readouterr().err
    assert export.main([*again, "--overwrite"]) == 0
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_text("")
    assert export.main([str(trained), "--format", "folder", "--out", str(photos)]) == 2
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_detector_is_refused_with_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"name": "detect"}
    write_checkpoint(
        tmp_path / "run", 10, state_of(network(1)), task=task, objective={"name": "detect"}
    )
    arguments = [str(tmp_path / "run"), "--format", "folder", "--out", str(tmp_path / "model")]
    assert export.main(arguments) == 2
    assert "rcmae.load_detector" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
