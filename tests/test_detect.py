"""A detection is a training like any other: judged, resumed, the same on any engine and ranks."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import rcmae
from rcmae import detect
from rcmae.commands import export
from rcmae.data.dense.objects import decoded, encoded
from runs import Folder, distance, equal, keeping_handlers
from tests.conftest import Ranks

PROGRAMS = Path(__file__).parent / "programs"
CATEGORIES = [{"id": 7, "name": "square"}, {"id": 2, "name": "disc"}]
ENGINES = {
    "zero1": ["engine.name=deepspeed", "engine.config=zero1"],
    "zero3": ["engine.name=deepspeed", "engine.config=zero3"],
    "fsdp2": ["engine.name=fsdp2"],
}
STEPS = 3
DETECT = {
    "window": 2,
    "pretrain_size": 48,
    "channels": 16,
    "box_width": 16,
    "anchors": [8, 16, 24, 32, 48],
    "canonical_size": 32,
    "anchors_sampled": 32,
    "proposals_per_level": [60, 40],
    "proposals": [40, 20],
    "regions_sampled": 16,
    "scale": [0.7, 1.3],
    "layer_decay": 0.7,
    "drop_path": 0.2,
    "average": True,
    "detections": 5,
}


def photograph(number: int, with_objects: bool) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """[h, w, 3] noise with a square (a polygon), a disc (run lengths) and at times a crowd."""
    draw = np.random.default_rng(number)
    height, width = draw.integers(50, 90, 2).tolist()
    pixels = draw.integers(0, 90, (height, width, 3)).astype(np.uint8)
    if not with_objects:
        return pixels, []
    side = int(draw.integers(12, 24))
    x, y = (int(draw.integers(1, length - side - 1)) for length in (width, height))
    pixels[y : y + side, x : x + side] = (250, 40, 40)
    square = [x, y, x + side, y, x + side, y + side, x, y + side]
    rows, columns = np.mgrid[:height, :width]
    disc = (rows - height // 2) ** 2 + (columns - width // 3) ** 2 < 100
    pixels[disc] = (40, 250, 250)
    box = [width // 3 - 9, height // 2 - 9, 19, 19]
    objects: list[dict[str, Any]] = [
        {"bbox": [x, y, side, side], "category_id": 7, "segmentation": [square]},
        {"bbox": box, "category_id": 2, "segmentation": encoded(disc)},
    ]
    if number % 3 == 0:
        corner = encoded((rows < 9) & (columns < 9))
        crowd = {"bbox": [0, 0, 9, 9], "category_id": 2, "iscrowd": 1, "segmentation": corner}
        objects.append(crowd)
    for place, each in enumerate(objects):
        each["id"] = 10 * number + place + 1
        each["area"] = each["bbox"][2] * each["bbox"][3]
    return pixels, objects


def pack(path: Path, numbers: Sequence[int], empty: Sequence[int] = (), **changed: Any) -> Path:
    """A shard of photographs; those of `empty` have no objects."""
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            pixels, objects = photograph(number, number not in empty)
            image = io.BytesIO()
            Image.fromarray(pixels).save(image, "JPEG", quality=95)
            height, width = pixels.shape[:2]
            document = {"image_id": number, "height": height, "width": width}
            document |= {"annotations": objects, **changed}
            contents = {"jpg": image.getvalue(), "json": json.dumps(document).encode()}
            for suffix, data in contents.items():
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    categories = path.parent / "categories.json"
    if not categories.exists():
        categories.write_text(json.dumps(CATEGORIES))
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("annotated")
    pack(folder / "train-0.tar", range(12), empty=range(0, 12, 2))
    pack(folder / "none-0.tar", range(30, 42), empty=range(30, 42))
    pack(folder / "val-0.tar", range(20, 27), empty=[22])
    return folder


@pytest.fixture(scope="module")
def recipe(shards: Path) -> Path:
    sizes = {"image_size": 64, "embed_dim": 32, "depth": 8, "num_heads": 2}
    tree = {
        "model": {"name": "vit_tiny_patch16", **sizes},
        "engine": {"precision": "fp32"},
        "data": {"shards": str(shards / "train-0.tar"), "workers": 0, "canonical_streams": 2},
        "batch": {"images": 4, "per_device": 2},
        "schedule": {
            "steps": STEPS,
            "lr": 1e-3,
            "warmup_steps": 1,
            "warmup_from": 0.001,
            "warmup": "to_schedule",
            "shape": "steps",
            "milestones": [0.8889, 0.963],
        },
        "detect": DETECT,
        "teacher": {"momentum": 0.5, "schedule": "constant"},
        "evaluate": {"every_steps": STEPS, "test_shards": str(shards / "val-0.tar")},
        "checkpoint": {"every_steps": 2},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    path = shards / "detect.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(recipe: Path, folder: Path, *overrides: str) -> int:
    """`python -m rcmae.detect` in this process; its exit status."""
    with (
        keeping_handlers(),
        patch("os._exit", side_effect=AssertionError("the run ended its process")),
    ):
        return detect.main([str(recipe), f"run.dir={folder}", *overrides])


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    folder = Folder(tmp_path_factory.mktemp("whole") / "run")
    assert start(recipe, folder.path) == 0
    return folder


def found_in(folder: Folder, name: str = "detections", step: int = STEPS) -> list[dict[str, Any]]:
    return json.loads((folder.path / "evaluation" / f"{name}-step-{step:08d}.json").read_text())


def test_a_run_leaves_losses_numbers_detections_and_pictures(whole: Folder) -> None:
    assert whole.steps() == [1, 2, 3]
    names = {"loss", "loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"}
    assert names <= whole.rows()[-1].keys()
    assert [row["lr"] for row in whole.rows()] == pytest.approx([1e-6, 1e-3, 1e-3])
    (event,) = whole.events("evaluate")
    assert list(event["detection"]) == ["student", "average"]
    assert event["images"] == 7
    document = json.loads((whole.path / "evaluation" / "step-00000003.json").read_text())
    rows = document["networks"]["student"]["segm"]["categories"]
    assert [(row["id"], row["name"]) for row in rows] == [(2, "disc"), (7, "square")]
    picture = np.asarray(
        Image.open(whole.path / "pictures" / "detections-00000003.png", formats=["PNG"])
    )
    assert picture.std() > 10
    found = found_in(whole)
    assert {each["category_id"] for each in found} <= {2, 7}
    assert {each["image_id"] for each in found} <= set(range(20, 27))
    assert found_in(whole, "detections-average") != found


def test_the_numbers_are_pycocotools_of_the_files_that_are_written(whole: Folder) -> None:
    images = []
    annotations = []
    for number in range(20, 27):
        pixels, objects = photograph(number, number != 22)
        images.append({"id": number, "height": pixels.shape[0], "width": pixels.shape[1]})
        annotations += [{"image_id": number, "iscrowd": 0, **each} for each in objects]
    known = COCO()
    known.dataset = {"images": images, "categories": CATEGORIES, "annotations": annotations}
    known.createIndex()
    (event,) = whole.events("evaluate")
    for kind in ("bbox", "segm"):
        judged = COCOeval(known, known.loadRes(found_in(whole)), kind)
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
        numbers = list(event["detection"]["student"][kind].values())
        assert numbers == pytest.approx(judged.stats.tolist(), abs=1e-12)


def test_interrupted_equals_uninterrupted(recipe: Path, whole: Folder, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run")
    assert start(recipe, folder.path, "run.stop_after_steps=1") == 75
    assert start(recipe, folder.path) == 0
    assert folder.losses() == whole.losses()
    assert equal(folder.state(), whole.state())
    assert found_in(folder) == found_in(whole)


def test_a_run_is_loaded_exported_and_found_again(
    whole: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = rcmae.load_detector(whole.path, network="student")
    assert (model.class_names, model.category_ids) == (("square", "disc"), (7, 2))
    file = tmp_path / "detector.pth"
    command = [str(whole.path), "--format", "detectron2", "--what", "student", "--out", str(file)]
    assert export.main(command) == 0
    assert "rcmae.load_detector" in capsys.readouterr().out
    images = {}
    for number in range(20, 23):
        jpeg = io.BytesIO()
        Image.fromarray(photograph(number, number != 22)[0]).save(jpeg, "JPEG", quality=95)
        images[number] = Image.open(jpeg, formats=["JPEG"])
    for number, found in zip(images, model(list(images.values())), strict=True):
        wanted = [each for each in found_in(whole) if each["image_id"] == number]
        assert found.scores.tolist() == pytest.approx([each["score"] for each in wanted], abs=1e-5)
        for row, each in enumerate(wanted):
            x, y, across, down = each["bbox"]
            assert found.boxes[row].tolist() == pytest.approx(
                [x, y, x + across, y + down], abs=0.01
            )
            assert model.category_ids[int(found.classes[row])] == each["category_id"]
            differing = found.masks[row].numpy() != decoded(each["segmentation"]).astype(bool)
            assert differing.mean() < 0.01
    # the names alone tell the sizes, but not the anchors, which are the published ones
    plain = rcmae.load_detector(file)
    state = model.network.state_dict()
    assert all(
        torch.equal(value, state[name]) for name, value in plain.network.state_dict().items()
    )
    assert plain.network.sizes.backbone == dataclasses.replace(
        model.network.sizes.backbone, drop_path=0.0
    )


# -------------------------------------------------------------------------------- on several ranks


@pytest.fixture(scope="module")
def ranked(recipe: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trainings on two ranks of each engine; one where no image has an object."""
    root = tmp_path_factory.mktemp("ranked")
    jobs = [
        [str(recipe), f"run.dir={root / engine}", "batch.per_device=1", *overrides]
        for engine, overrides in ENGINES.items()
    ]
    norms = ["detect.backbone=benchmark", "batch.per_device=2", *ENGINES["fsdp2"]]
    jobs.append([str(recipe), f"run.dir={root / 'benchmark'}", *norms])
    none = f"data.shards={shards / 'none-0.tar'}"
    jobs.append([str(recipe), f"run.dir={root / 'none'}", none, *ENGINES["zero3"]])
    tasks = [[*job, "task.name=detect"] for job in jobs]
    group = Ranks([sys.executable, str(PROGRAMS / "train_many.py"), json.dumps(tasks)], 2, root)
    assert f"STATUS {[0] * len(jobs)}" in group.succeed()
    return root


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_learn_what_one_does(engine: str, ranked: Path, whole: Folder) -> None:
    """Half of the images have no object: in some steps all are on one rank."""
    run = Folder(ranked / engine)
    names = ("loss", "loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask")
    for row, wanted in zip(run.rows(), whole.rows(), strict=True):
        limit = 1e-6 if row["step"] == 1 else 1e-3
        for name in names:
            assert row[name] == pytest.approx(wanted[name], rel=limit, abs=limit)
    for kind in ("weight", "teacher"):
        assert distance(run.state(), whole.state(), kind) < 2e-3


def test_batch_norm_is_over_the_images_of_all_ranks(
    ranked: Path, recipe: Path, tmp_path: Path
) -> None:
    """Also in the heads, where ranks have other numbers of regions."""
    alone, run = Folder(tmp_path / "run"), Folder(ranked / "benchmark")
    assert start(recipe, alone.path, "detect.backbone=benchmark", "batch.per_device=4") == 0
    assert run.losses()[0] == pytest.approx(alone.losses()[0], rel=1e-5)
    assert run.losses() == pytest.approx(alone.losses(), rel=2e-2)
    for name, value in alone.state().items():
        if name.endswith(("lateral2.norm.running_mean", "conv1.norm.running_var")):
            assert torch.allclose(run.state()[name], value, rtol=1e-2, atol=1e-3)


def test_a_training_without_any_object_ends(ranked: Path) -> None:
    run = Folder(ranked / "none")
    assert run.steps() == [1, 2, 3]
    assert [row["loss_mask"] for row in run.rows()] == [0.0, 0.0, 0.0]


def test_any_number_of_ranks_writes_the_same_detections(
    recipe: Path, whole: Folder, tmp_path: Path
) -> None:
    """Seven images on three ranks are judged as seven, from the weights of another run."""
    init = [f"detect.init={whole.path}", "detect.network=student", "batch.images=6"]
    for world in (1, 2, 3):
        folder = Folder(tmp_path / f"{world}")
        command = [sys.executable, "-m", "rcmae.detect", str(recipe), f"run.dir={folder.path}"]
        only = ["--evaluate-only", "data.canonical_streams=6", "detect.average=false"]
        if world == 1:
            assert start(recipe, folder.path, *only, *init) == 0
        else:
            Ranks([*command, *only, *init, "engine.name=fsdp2"], world, tmp_path).succeed()
        (event,) = folder.events("evaluate")
        assert event["images"] == 7
        assert found_in(folder, step=0) == found_in(whole)


# ------------------------------------------------------------------------------------ what is wrong


def refused(recipe: Path, folder: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    assert start(recipe, folder, *overrides) == 2
    assert not folder.exists(), "nothing is written"
    return capsys.readouterr().err


def test_wrong_data_and_sizes_are_refused(
    recipe: Path, photo_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    said = refused(recipe, run, capsys, f"data.shards={photo_shards}")
    assert "data.shards: no sample has a .json (annotation), which the task reads" in said
    assert "no categories.json lies beside them" in said
    said = refused(recipe, run, capsys, "detect.num_classes=3")
    assert "detect.num_classes=3, but there are 2 categories: 7, 2" in said
    other = tmp_path / "other"
    other.mkdir()
    (other / "categories.json").write_text(json.dumps([*CATEGORIES, {"id": 9, "name": "star"}]))
    test = pack(other / "val-0.tar", range(3))
    said = refused(recipe, run, capsys, f"evaluate.test_shards={test}")
    assert "categories.json has 9 (star), which data.shards have not" in said
    said = refused(recipe, run, capsys, "evaluate.picture_every_steps=5")
    assert "evaluate.picture_every_steps is of a pretraining" in said
    said = refused(recipe, run, capsys, "model.image_size=[64, 80]")
    assert "the stride of 32 does not divide the canvas's width of 80; use 64 or 96" in said
    said = refused(recipe, run, capsys, "detect.window=5")
    assert "detect.window=5 is larger than the canvas of 4x4 patches" in said


def test_annotations_that_do_not_fit_are_named(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pack(tmp_path / "train-0.tar", range(4), height=9)
    assert start(recipe, tmp_path / "run", f"data.shards={tmp_path / 'train-0.tar'}") != 0
    said = capfd.readouterr()
    assert "its annotation is of" in said.err + said.out
