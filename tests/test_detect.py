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
from choices import Recorded, feeding, recording
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import save_file

import rcmae
from rcmae import detect
from rcmae.commands import export
from rcmae.commands.again import replay, reproduce
from rcmae.commands.evaluation import visualize
from rcmae.data.dense.objects import decoded, encoded
from rcmae.errors import Refused
from rcmae.evaluation.detection import pictures
from rcmae.evaluation.detection.pictures import SIDE
from rcmae.evaluation.visualisation import detections
from rcmae.models.classifier import Classifier
from rcmae.models.sizes import NetworkSizes
from rcmae.tasks import detect as detection
from runs import Folder, die_at_step, distance, equal, keeping_handlers
from tests.conftest import Ranks

PROGRAMS = Path(__file__).parent / "programs"
ZEROS = ("zero1", "zero2", "zero3")
CATEGORIES = [{"id": 7, "name": "square"}, {"id": 2, "name": "disc"}]
ENGINES = {
    **{zero: ["engine.name=deepspeed", f"engine.config={zero}"] for zero in ZEROS},
    "fsdp2": ["engine.name=fsdp2"],
    "ddp": ["engine.name=ddp"],
}
LOSSES = ("loss", "loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask")
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
    pack(folder / "none-0.tar", range(30, 42), empty=range(30, 42))
    return folder


@pytest.fixture(scope="module")
def recipe(shards: Path) -> Path:
    return write_recipe(shards)


def write_recipe(shards: Path) -> Path:
    """A recipe in a folder, with the shards that it trains and judges on."""
    pack(shards / "train-0.tar", range(12), empty=range(0, 12, 2))
    pack(shards / "val-0.tar", range(20, 27), empty=[22])
    sizes = {"image_size": 64, "embed_dim": 32, "depth": 8, "num_heads": 2}
    tree = {
        "task": {"name": "detect"},
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
def recorded(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, Recorded]:
    """The recipe's run, without a stop, and what its losses saw."""
    folder, choices = Folder(tmp_path_factory.mktemp("whole") / "run"), Recorded()
    with recording(choices):
        assert start(recipe, folder.path) == 0
    return folder, choices


@pytest.fixture(scope="module")
def whole(recorded: tuple[Folder, Recorded]) -> Folder:
    return recorded[0]


def found_in(folder: Folder, name: str = "detections", step: int = STEPS) -> list[dict[str, Any]]:
    return json.loads((folder.path / "evaluation" / f"{name}-step-{step:08d}.json").read_text())


def test_the_first_steps_come_again(whole: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    with keeping_handlers():
        assert reproduce.main([str(whole.path), "--steps", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    losses = [row["now"] for row in found["numbers"] if row["name"] == "loss"]
    assert losses == whole.losses()[:2]


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
    table = detection.categories_of(document["networks"])
    assert [line.split()[0] for line in table[1:]] == ["disc", "square"]
    assert [float(line.split()[2]) for line in table[1:]] == pytest.approx(
        [100 * row["AP"] for row in rows], abs=0.01
    )
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
    """Stopped after the first step, killed in the third."""
    folder = Folder(tmp_path / "run")
    assert start(recipe, folder.path, "run.stop_after_steps=1") == 75
    die_at_step("detect", 2, recipe, folder.path)
    assert folder.committed()[-1] == 2
    assert start(recipe, folder.path) == 0
    assert folder.losses() == whole.losses()
    assert equal(folder.state(), whole.state())
    assert found_in(folder) == found_in(whole)


def test_a_step_is_the_same_however_it_is_cut(recipe: Path, whole: Folder, tmp_path: Path) -> None:
    """Four images at once, or twice two."""
    folder = Folder(tmp_path / "run")
    assert start(recipe, folder.path, "batch.per_device=4", "evaluate.every_steps=0") == 0
    for row, wanted in zip(folder.rows(), whole.rows(), strict=True):
        limit = 1e-6 if row["step"] == 1 else 1e-3
        for name in LOSSES:
            assert row[name] == pytest.approx(wanted[name], rel=limit, abs=limit)


def test_a_bad_step_is_replayed_sample_by_sample(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    poisoned = ["guard.drill_nan_position=5", "evaluate.every_steps=0"]
    assert start(recipe, run, *poisoned) == 1
    capsys.readouterr()
    with keeping_handlers(), patch("rcmae.run.preempt.SIGNALS", ()):
        assert replay.main([str(run / "replay" / "step-00000001.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["reproduced"], found["same_masks"]) == (1, True, True)
    losses = {each["position"]: each["loss"] for each in found["samples"]}
    assert sorted(losses) == [4, 5, 6, 7]
    assert [position for position, loss in losses.items() if loss != loss] == [5]


def test_where_memory_does_not_suffice_the_message_says_what_to_set(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    folder = Folder(tmp_path / "run")
    with (
        patch("rcmae.models.detection.detector.Detector.look", side_effect=full),
        pytest.raises(AssertionError, match="the run ended its process"),
    ):
        start(recipe, folder.path)
    wanted = (
        "out of memory with batch.per_device=2 and engine.name=local on 1 rank; what helps: "
        "batch.per_device=1 (the same images a step), engine.precision=bf16, "
        "engine.activation_checkpointing=torch"
    )
    assert wanted in capfd.readouterr().err
    (event,) = folder.events("stop")
    assert wanted in event["reason"]
    with (
        patch("rcmae.tasks.detect.new_detector", side_effect=full),
        pytest.raises(AssertionError, match="the run ended its process"),
    ):
        start(recipe, tmp_path / "other")
    said = capfd.readouterr().err
    assert "out of memory while the network was built, with model.name=" in said
    assert "on 1 rank; what helps: engine.name=fsdp2 on several ranks" in said


def test_photographs_are_drawn_with_what_is_found(whole: Folder, tmp_path: Path) -> None:
    pixels = photograph(20, True)[0]
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    command = ["detect", str(whole.path), "--images", str(tmp_path / "photo.png")]
    assert visualize.main([*command, "--out", str(tmp_path)]) == 0
    drawn = np.asarray(Image.open(tmp_path / "detections.png", formats=["PNG"]))
    assert drawn.shape[1] > 2 * SIDE * pixels.shape[1] / max(pixels.shape[:2])  # two, side by side
    model = rcmae.load_detector(whole.path)
    rows = detections._rows(model([pixels])[0])
    assert rows
    assert all(decoded(row["segmentation"]).shape == pixels.shape[:2] for row in rows)
    assert {row["category_id"] for row in rows} <= {0, 1}


def test_a_picture_says_when_no_detection_is_sure_enough() -> None:
    found = [{"score": 0.07}, {"score": 0.21}]
    assert pictures._nothing(found) == ": none over 0.5, best 0.21"
    assert pictures._nothing([]) == ": nothing"


def test_a_run_is_loaded_exported_and_found_again(
    recipe: Path, whole: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = rcmae.load_detector(whole.path, network="student")
    assert (model.class_names, model.category_ids) == (("square", "disc"), (7, 2))
    file = tmp_path / "detector.pth"
    command = [str(whole.path), "--format", "detectron2", "--what", "student", "--out", str(file)]
    assert export.main(command) == 0
    assert f"rcmae.load_detector({str(file)!r});" in capsys.readouterr().out
    document = torch.load(file, weights_only=True)
    metadata = document["metadata"]
    assert metadata == {
        "pixel_mean": pytest.approx([123.675, 116.28, 103.53]),
        "pixel_std": pytest.approx([58.395, 57.12, 57.375]),
        "input_format": "RGB",
        "thing_classes": ["square", "disc"],
        "thing_dataset_id_to_contiguous_id": {7: 0, 2: 1},
    }
    read = rcmae.load_detector(file)
    assert (read.class_names, read.category_ids) == (("square", "disc"), (7, 2))
    assert read._mean == pytest.approx(model._mean)
    own = {"pixel_mean": [127.5, 0.0, 51.0], "pixel_std": [25.5] * 3}
    torch.save({**document, "metadata": metadata | own}, tmp_path / "own.pth")
    read = rcmae.load_detector(tmp_path / "own.pth")
    assert (read._mean, read._std) == (pytest.approx((0.5, 0, 0.2)), pytest.approx((0.1,) * 3))
    for key, strange in (("pixel_mean", [1.0]), ("pixel_std", [0.0] * 3), ("pixel_std", "RGB")):
        torch.save({**document, "metadata": metadata | {key: strange}}, tmp_path / "own.pth")
        with pytest.raises(Refused, match=key):
            rcmae.load_detector(tmp_path / "own.pth")
    for unsound in (None, {"thing_classes": [1, 2]}, {"thing_classes": ["one"]}):
        torch.save({**document, "metadata": unsound}, tmp_path / "other.pth")
        assert rcmae.load_detector(tmp_path / "other.pth").class_names == ("0", "1")
    folder = [str(whole.path), "--format", "folder", "--out", str(tmp_path / "folder")]
    assert export.main(folder) == 2
    assert "use --format detectron2, or rcmae.load_detector" in capsys.readouterr().err
    with pytest.raises(Refused, match="give a list of images"):
        model(Image.new("RGB", (32, 32)))
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
    judged = Folder(tmp_path / "judged")
    only = ["--evaluate-only", f"detect.init={file}", "detect.average=false"]
    assert start(recipe, judged.path, *only) == 0
    assert found_in(judged, step=0) == found_in(whole)
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
def ranked(
    recipe: Path,
    shards: Path,
    recorded: tuple[Folder, Recorded],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Trainings on two ranks: of each engine, fed what one process chose; one that chooses for
    itself; one that goes from one rank to two and back; one where no image has an object.
    """
    root = tmp_path_factory.mktemp("ranked")
    choices = recorded[1]
    choices.save(root / "choices.pt")

    def job(name: str, *overrides: str) -> list[str]:
        return [str(recipe), f"run.dir={root / name}", "evaluate.every_steps=0", *overrides]

    small = "batch.per_device=1"
    hops = ["run.stop_after_steps=1", "evaluate.every_steps=0"]
    with feeding(Recorded(choices.rows)):
        assert start(recipe, root / "hops", *hops) == 75
    fed = [job(engine, small, *overrides) for engine, overrides in ENGINES.items()]
    fed.append(job("hops", small, hops[0], *ENGINES["zero2"]))
    own = [
        job("own", small, *ENGINES["fsdp2"]),
        job("benchmark", "detect.backbone=benchmark", *ENGINES["fsdp2"]),
        job("none", f"data.shards={shards / 'none-0.tar'}", *ENGINES["zero3"]),
    ]
    program = [sys.executable, str(PROGRAMS / "train_detectors.py"), str(root / "choices.pt")]
    said = Ranks([*program, json.dumps(fed), json.dumps(own)], 2, root).succeed()
    assert f"STATUS {[0] * len(ENGINES) + [75] + [0] * len(own)}" in said
    flips = next(line for line in said.splitlines() if line.startswith("FLIPS "))
    (root / "flips.json").write_text(flips.removeprefix("FLIPS "))
    with feeding(Recorded(choices.rows)):
        assert start(recipe, root / "hops", hops[1]) == 0
    return root


def assert_near(run: Folder, whole: Folder, limit: float) -> None:
    """Losses of each step, and weights and average at the end; the first step's closer."""
    for row, wanted in zip(run.rows(), whole.rows(), strict=True):
        allowed = min(1e-6, limit) if row["step"] == 1 else limit
        for name in LOSSES:
            assert row[name] == pytest.approx(wanted[name], rel=allowed, abs=allowed), name
    for kind in ("weight", "teacher"):
        assert distance(run.state(), whole.state(), kind) < 2 * limit


@pytest.mark.parametrize("name", [*ENGINES, "hops"])
def test_two_ranks_learn_what_one_does(name: str, ranked: Path, whole: Folder) -> None:
    """Half of the images have no object: in some steps all are on one rank. All see the same
    anchors and regions, some of which an engine would have chosen otherwise: few.
    """
    assert_near(Folder(ranked / name), whole, 1e-5)
    flips = json.loads((ranked / "flips.json").read_text())
    assert flips["anchors"] > 1000
    assert flips.get("flipped anchors", 0) < 1e-3 * flips["anchors"]
    assert flips.get("flipped regions", 0) < 0.05 * flips["regions"]


def test_two_ranks_that_choose_for_themselves_learn_nearly_the_same(
    ranked: Path, whole: Folder
) -> None:
    assert_near(Folder(ranked / "own"), whole, 1e-3)


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
    for world in (1, 3):
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
    said = refused(recipe, run, capsys, "model.image_size=100")
    assert "patch_size=16 does not divide the image height 100; use 96 or 128" in said
    said = refused(recipe, run, capsys, "detect.window=5")
    assert "detect.window=5 is larger than the canvas of 4x4 patches" in said


def test_what_a_detector_starts_from_is_told(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = NetworkSizes((32, 32), 8, 3, 32, 4, 2)
    encoder = Classifier(sizes, num_classes=0).state_dict()
    save_file(encoder, tmp_path / "encoder.safetensors")
    said = refused(recipe, tmp_path / "run", capsys, f"detect.init={tmp_path}/encoder.safetensors")
    assert "the network of these weights is model.name=" in said
    save_file({"decode_head.x": torch.zeros(1), **encoder}, tmp_path / "segmenter.safetensors")
    said = refused(
        recipe, tmp_path / "run", capsys, f"detect.init={tmp_path}/segmenter.safetensors"
    )
    assert "these are weights of rcmae segment: give those of an encoder" in said
    fine = Classifier(dataclasses.replace(sizes, depth=8), num_classes=0).state_dict()
    save_file(fine, tmp_path / "fine.safetensors")
    init = [f"detect.init={tmp_path}/fine.safetensors", "schedule.steps=1"]
    assert start(recipe, tmp_path / "run", *init, "evaluate.every_steps=0") == 0
    assert "its patches of 8 pixels are interpolated to 16" in capsys.readouterr().out


def test_annotations_that_do_not_fit_are_named(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pack(tmp_path / "train-0.tar", range(4), height=9)
    assert start(recipe, tmp_path / "run", f"data.shards={tmp_path / 'train-0.tar'}") != 0
    said = capfd.readouterr()
    assert "its annotation is of" in said.err + said.out
