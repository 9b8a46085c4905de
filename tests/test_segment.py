"""rcmae segment: one training under every engine, one judgement on any ranks, and what is refused.

Engines and ranks meet in one launch each; the rest runs in this process."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import segmentation_reference
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from scenes import CLASSES, members, pack, png, scene, write_scenes
from torch import Tensor

import rcmae
from rcmae import config, segment
from rcmae.commands import export, plan
from rcmae.commands import runs as runs_command
from rcmae.commands.again import replay, reproduce
from rcmae.commands.evaluation import visualize
from rcmae.data.dense.crops import Crops, Labels
from rcmae.data.dense.maps import WIDE_NONE, read_map
from rcmae.models.kernels import layer_norm
from rcmae.models.segmentation.backbone import Form
from rcmae.models.segmentation.build import new_segmenter
from rcmae.models.segmentation.fitting import fit_encoder
from rcmae.models.segmentation.heads import resized
from rcmae.models.segmentation.segmenter import Heads, Segmenter
from rcmae.models.sizes import NetworkSizes
from rcmae.objectives.segmentation import pixel_loss
from rcmae.tasks.segment import Segmentation
from rcmae.weights.segmenters import read_start
from runs import Folder, die_at_step, equal, keeping_handlers
from tests.conftest import ROOT, Ranks

HEADS = ("decode_head", "auxiliary_head")
ENGINES = ("zero1", "zero2", "zero3", "fsdp2", "ddp")
NOISE = ("fpn1.0.bias", "fpn1.3.bias", "fpn2.0.bias")  # gradients of 0, which Adam blows up


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


def run(recipe: Path, folder: Path, *overrides: str) -> int:
    """`rcmae segment` in this process; its exit status."""

    def ended(status: int) -> None:
        raise AssertionError(f"the run ended its process with {status}")

    with keeping_handlers(), patch.object(os, "_exit", ended):
        return segment.main([str(recipe), f"run.dir={folder}", *overrides])


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The recipe's run, without a stop."""
    folder = Folder(tmp_path_factory.mktemp("whole") / "run")
    assert run(recipe, folder.path) == 0
    return folder


def figures(folder: Folder) -> dict[str, float]:
    return folder.events("evaluate")[-1]["segmentation"]["student"]


def test_a_run_leaves_losses_scores_and_pictures(whole: Folder) -> None:
    row = whole.rows()[-1]
    weighted = row["loss_segmentation"] + 0.4 * row["loss_auxiliary"]
    assert row["loss"] == pytest.approx(weighted)
    assert 0 < figures(whole)["miou"] < figures(whole)["aacc"] < 100
    document = json.loads((whole.path / "evaluation" / "step-00000006.json").read_text())
    classes = document["networks"]["student"]["classes"]
    assert [each["name"] for each in classes] == list(CLASSES)
    assert document["untrained"] == [], "no label of the test set has it either"
    assert classes[4]["accuracy"] is None, "no label has it"
    assert sum(each["share"] for each in classes) == pytest.approx(1)
    picture = whole.path / "pictures" / "segments-00000006.png"
    assert np.asarray(Image.open(picture, formats=["PNG"])).shape[2] == 3
    assert yaml.safe_load((whole.path / "recipe.yaml").read_text())["segment"]["num_classes"] == 5


def test_a_class_that_is_judged_and_was_never_trained_is_named(
    recipe: Path, tmp_path: Path
) -> None:
    found = members(range(100, 103))
    values = scene(101)[1]
    values[3:6] = CLASSES.index("unseen")
    found["0101.seg.png"] = png(values)
    pack(tmp_path / "val.tar", found)
    folder = Folder(tmp_path / "run")
    tested = f"evaluate.test_shards={tmp_path}/val.tar"
    assert run(recipe, folder.path, tested, "schedule.steps=4", "evaluate.every_steps=4") == 0
    document = json.loads((folder.path / "evaluation" / "step-00000004.json").read_text())
    assert document["untrained"] == ["unseen"]


def test_every_engine_on_two_ranks_is_the_local_one(
    recipe: Path, whole: Folder, tmp_path: Path, ranks: Callable[..., Ranks]
) -> None:
    """Losses, batch-norm statistics and mIoU; checkpoints of one go on in another."""
    jobs = []
    for engine in ENGINES:
        named = ["engine.name=deepspeed", f"engine.config={engine}.json"]
        options = named if engine.startswith("zero") else [f"engine.name={engine}"]
        jobs.append([str(recipe), f"run.dir={tmp_path / engine}", *options])
    halves = [f"run.dir={tmp_path / 'halves'}", "run.stop_after_steps=3"]
    first = [str(recipe), *halves, "engine.name=deepspeed", "engine.config=zero3.json"]
    second = [str(recipe), halves[0], "engine.name=fsdp2", "batch.per_device=2"]
    said = ranks("tests/programs/train_many.py", json.dumps([*jobs, first, second])).succeed()
    assert f"STATUS {[0] * len(jobs) + [75, 0]}" in said
    wanted = whole.state()
    for name in (*ENGINES, "halves"):
        folder = Folder(tmp_path / name)
        assert folder.losses() == pytest.approx(whole.losses(), rel=1e-5), name
        found = folder.state()
        for key, value in wanted.items():
            if key.startswith("buffer/") and "running_var" in key:
                torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)
        assert figures(folder)["aacc"] == pytest.approx(figures(whole)["aacc"], abs=0.1), name


def test_killed_and_stopped_it_ends_as_if_nothing_had_happened(
    recipe: Path, whole: Folder, tmp_path: Path
) -> None:
    folder = Folder(tmp_path / "run")
    die_at_step("segment", 3, recipe, folder.path)
    assert folder.committed() == [2]
    assert run(recipe, folder.path, "run.stop_after_steps=1", "data.workers=1") == 75
    assert run(recipe, folder.path) == 0
    assert folder.losses() == whole.losses()
    assert equal(folder.state(), whole.state())
    assert figures(folder) == figures(whole)


def test_scores_are_equal_on_one_two_and_three_ranks_and_for_any_batch(
    recipe: Path, ranks: Callable[..., Ranks]
) -> None:
    """On pictures of unequal odd sizes; with scales and flips, too."""
    sys.path.insert(0, str(ROOT / "tests" / "programs"))
    try:
        import judge_scenes
    finally:
        sys.path.pop(0)
    tar = str(recipe.parent / "val.tar")
    alone = judge_scenes.matrices(tar, 5, [1, 3, 4, 64])
    assert alone["1"] == alone["4"] == alone["64"] != alone["3"]
    maps = [scene(number)[1] for number in range(100, 107)]
    pixels = sum(int((values != 255).sum()) for values in maps)
    assert sum(map(sum, alone["1"])) == pixels, "every labelled pixel once"
    program = ("tests/programs/judge_scenes.py", tar, "5", "3", "4")
    for world in (2, 3):
        said = ranks(*program, world=world).succeed()
        line = next(line for line in said.splitlines() if line.startswith("RESULT "))
        assert json.loads(line.removeprefix("RESULT ")) == {key: alone[key] for key in ("3", "4")}


def test_a_probe_trains_its_head_on_the_frozen_encoder_of_a_run(
    recipe: Path, whole: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its encoder is no part of the checkpoint; a resume reads it again."""
    pretrained = tmp_path / "pretrained"
    options = ["task.name=pretrain", "objective.name=mae", "segment={}", "schedule.steps=2"]
    sizes = ["model.image_size=16", "model.decoder_dim=16", "model.decoder_depth=1"]
    from rcmae import train

    with keeping_handlers():
        arguments = [str(recipe), f"run.dir={pretrained}", *options, *sizes]
        arguments += ["evaluate.every_steps=0", "schedule.warmup_steps=1"]
        assert train.main([*arguments, "model.decoder_heads=2"]) == 0
    probe = ["segment.head=linear", "segment.frozen=true", "segment.levels=null"]
    probe += ["segment.width=null", "segment.drop_path=0", "segment.layer_decay=1"]
    probe += [f"segment.init={pretrained}", "segment.crop=32"]
    one, other = Folder(tmp_path / "one"), Folder(tmp_path / "other")
    assert run(recipe, one.path, *probe) == 0
    assert run(recipe, other.path, *probe, "run.stop_after_steps=3") == 75
    assert run(recipe, other.path, *probe) == 0
    assert equal(one.state(), other.state())
    folder = [str(one.path), "--format", "folder", "--out", str(tmp_path / "model")]
    assert export.main(folder) == 2
    assert "rcmae.load_segmenter reads the run" in capsys.readouterr().err
    loaded = rcmae.load_segmenter(one.path)
    encoder = rcmae.load_encoder(pretrained)
    mine = loaded.model.backbone.blocks[2].mlp.fc1.weight
    assert torch.equal(mine, encoder.blocks[2].mlp.fc1.weight)
    names = {key.partition("/")[2] for key in one.state() if key.startswith("weight/")}
    assert names == {f"decode_head.{each}" for each in ("bn.weight", "bn.bias")} | {
        f"decode_head.conv_seg.{each}" for each in ("weight", "bias")
    }


def test_the_first_steps_come_again(whole: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    with keeping_handlers():
        assert reproduce.main([str(whole.path), "--steps", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    losses = [row["now"] for row in found["numbers"] if row["name"] == "loss"]
    assert losses == whole.losses()[:2]


def test_a_run_is_loaded_and_exported_with_the_same_logits(
    recipe: Path, whole: Folder, tmp_path: Path
) -> None:
    """transformers' UperNetForSemanticSegmentation is the oracle."""
    from transformers import UperNetForSemanticSegmentation

    segmenter = rcmae.load_segmenter(whole.path)
    assert segmenter.class_names == CLASSES
    image, values = scene(100)
    classes = segmenter.predict(Image.fromarray(image))
    assert classes.shape == values.shape
    assert classes.max() < 5
    (tmp_path / "photo.png").write_bytes(png(image))
    drawing = ["segment", str(whole.path), "--images", str(tmp_path / "photo.png")]
    assert visualize.main([*drawing, "--out", str(tmp_path)]) == 0
    drawn = np.asarray(Image.open(tmp_path / "segments.png", formats=["PNG"]))
    assert (drawn[: image.shape[0], : image.shape[1]] == image).all()
    for name, out in (("hf-upernet", "hf"), ("mmseg", "file.pth")):
        arguments = [str(whole.path), "--format", name, "--out", str(tmp_path / out)]
        assert export.main(arguments) == 0
    theirs = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "hf").eval().double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model = segmenter.model.double()
    with torch.no_grad():
        got = resized(model(images)[0], (16, 16))
        torch.testing.assert_close(got, theirs(images).logits, rtol=0, atol=1e-12)
    leaves_with_a_card(whole.path, tmp_path / "model", images.float(), got.float())
    state = torch.load(tmp_path / "file.pth", weights_only=True)["state_dict"]
    other = Folder(tmp_path / "again")
    started = [f"segment.init={tmp_path}/file.pth", "schedule.steps=3", "schedule.lr=1e-12"]
    assert run(recipe, other.path, *started, "evaluate.every_steps=0") == 0
    for name in ("fpn1.0.weight", "blocks.2.attn.relative_position_bias_table"):
        mine = other.state()[f"weight/backbone.{name}"].view_as(state[f"backbone.{name}"])
        torch.testing.assert_close(mine, state[f"backbone.{name}"], rtol=0, atol=1e-7)
    for name in ("decode_head.conv_seg.weight", "auxiliary_head.convs.0.conv.weight"):
        torch.testing.assert_close(other.state()[f"weight/{name}"], state[name], rtol=0, atol=1e-7)
    index = "backbone.blocks.1.attn.relative_position_index"
    assert torch.equal(state[index], segmentation_reference.index((4, 4)))
    assert len(state) == len(segmenter.model.state_dict()) + 4


def test_a_layout_of_encoders_is_refused_with_the_formats_of_a_segmenter(
    whole: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "e.safetensors"
    assert export.main([str(whole.path), "--format", "timm", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "a run of rcmae segment: --format mmseg or hf-upernet" in said


def leaves_with_a_card(run: Path, out: Path, images: Tensor, wanted: Tensor) -> None:
    """A folder that transformers opens, with what was and what was not tested."""
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

    assert export.main([str(run), "--format", "folder", "--out", str(out)]) == 0
    model = AutoModelForSemanticSegmentation.from_pretrained(out).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, wanted, rtol=0, atol=1e-4)
    processor = AutoImageProcessor.from_pretrained(out)
    grey = Image.new("RGB", (40, 30), (128, 128, 128))
    pixels = processor(grey, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())["data"]
    level = (128 / 255 - torch.tensor(recipe["mean"])) / torch.tensor(recipe["std"])
    torch.testing.assert_close(pixels.mean((0, 2, 3)), level, rtol=1e-4, atol=1e-4)
    card = (out / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "| class | IoU in % | accuracy in % | share in % |" in card
    tested, untested = card.split("## Not tested")
    assert "segmentation, in %: mIoU" in tested
    assert "detection of objects" in untested
    assert "whole images, resized to the window" in untested
    assert "semantic segmentation" not in untested


def theirs(name: str) -> str:
    """What mmsegmentation 1.x calls a weight of a segmenter."""
    for ours, other in (
        (r"backbone\.fpn1\.", "neck.upsample_4x."),
        (r"backbone\.fpn2\.", "neck.upsample_2x."),
        (r"backbone\.patch_embed\.proj\.", "backbone.patch_embed.projection."),
        (r"backbone\.blocks\.", "backbone.layers."),
        (r"\.norm([12])\.", r".ln\1."),
        (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
        (r"\.mlp\.fc2\.", ".ffn.layers.1."),
    ):
        name = re.sub(ours, other, name)
    return name


def test_a_segmenter_of_mmsegmentation_1_starts_another(whole: Folder, tmp_path: Path) -> None:
    """All of it, but for the last layers where there are other classes."""
    state = rcmae.load_segmenter(whole.path).model.state_dict()
    table = {theirs(name): value for name, value in state.items()}
    for block in range(4):
        place = f"backbone.layers.{block}.attn.relative_position_index"
        table[place] = segmentation_reference.index((4, 4))
    file = tmp_path / "upernet.pth"
    torch.save({"meta": {"epoch": 1}, "state_dict": table}, file)
    source = read_start(file)
    sizes = NetworkSizes((16, 16), 4, 3, 16, 4, 2)
    form = Form(levels=(0, 1, 2, 3))
    counted = {name for name in state if name.endswith("num_batches_tracked")}
    for classes in (5, 7):
        model = Segmenter(sizes, form, Heads(classes, width=8))
        fit = fit_encoder(model, source.weights)
        last = {f"{head}.conv_seg.{leaf}" for head in HEADS for leaf in ("weight", "bias")}
        fresh = set() if classes == 5 else last
        assert {name for name in fit.fresh if not name.endswith("num_batches_tracked")} == fresh
        for name, value in model.state_dict().items():
            assert name in counted | fresh or torch.equal(value, state[name]), name
    other = Segmenter(sizes, form, Heads(5, width=12))
    fit = fit_encoder(other, source.weights)
    assert "fpn1.0.weight" in fit.matched
    assert "decode_head.bottleneck.conv.weight" in fit.fresh, "of another width"
    assert "auxiliary_head.convs.0.conv.weight" in fit.matched


def test_a_bad_step_is_replayed_sample_by_sample(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    poisoned = ["guard.drill_nan_position=5", "evaluate.every_steps=0"]
    assert run(recipe, folder, *poisoned) == 1
    capsys.readouterr()
    with keeping_handlers(), patch("rcmae.run.preempt.SIGNALS", ()):
        assert replay.main([str(folder / "replay" / "step-00000001.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["reproduced"], found["same_masks"]) == (1, True, True)
    losses = {each["position"]: each["loss"] for each in found["samples"]}
    assert sorted(losses) == [4, 5, 6, 7]
    assert [position for position, loss in losses.items() if loss != loss] == [5]


def test_a_run_is_planned_and_its_state_told(
    recipe: Path, whole: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs_command.main(["status", str(whole.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert plan.main([str(recipe), "--gpus", "1", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["task"] == "segment"


def test_more_than_255_classes_are_told_apart(recipe: Path, tmp_path: Path) -> None:
    """Maps of 16 bits: of 300 classes, no label 65535, and with a zero that is no label."""
    wide = {}
    for name, data in members(range(8)).items():
        values = scene(int(name[:4]))[1].astype(np.uint16)
        shifted = np.where(values == 255, 65535, 70 * values + 50)
        wide[name] = png(shifted.astype(np.uint16)) if "seg" in name else data
    pack(tmp_path / "wide.tar", wide)
    size = scene(0)[1].shape
    labels = read_map(wide["0000.seg.png"], size, 300)
    narrow = scene(0)[1]
    assert labels.dtype == np.int16
    assert (labels == np.where(narrow == 255, WIDE_NONE, 70 * narrow.astype(int) + 50)).all()
    less = read_map(wide["0000.seg.png"], size, 299, zero_is_none=True)
    assert (less == np.where(labels == WIDE_NONE, WIDE_NONE, labels - 1)).all()
    both = np.array([[0, 255, 256, 65535]], np.uint16)
    assert read_map(png(both), (1, 4), 300).tolist() == [[0, 255, 256, WIDE_NONE]]
    assert read_map(png(both), (1, 4), 300, zero_is_none=True).tolist() == [
        [WIDE_NONE, 254, 255, WIDE_NONE]
    ]
    eight = np.array([[0, 1, 254, 255]], np.uint8)
    assert read_map(png(eight), (1, 4), 300).tolist() == [[0, 1, 254, WIDE_NONE]]
    with pytest.raises(ValueError, match=r"outside segment.num_classes=250: 260 \("):
        read_map(wide["0000.seg.png"], size, 250)

    logits = torch.randn(1, 300, 4, 4)
    maps = torch.from_numpy(labels)[None, :16, :16]
    chosen = [50, 120, 190, 260]
    few = torch.from_numpy(narrow)[None, :16, :16]
    loss = pixel_loss(logits, maps)
    logs = resized(logits, (16, 16)).log_softmax(dim=1)[:, chosen]
    there = few != 255
    picked = logs.gather(1, torch.where(there, few, 0).long()[:, None])[:, 0]
    assert float(loss) == pytest.approx(-float(picked[there].sum()), rel=1e-5)

    folder = Folder(tmp_path / "run")
    options = [f"data.shards={tmp_path}/wide.tar", f"evaluate.test_shards={tmp_path}/wide.tar"]
    options += ["segment.num_classes=300", "schedule.warmup_steps=1"]
    options += ["schedule.steps=2", "evaluate.every_steps=2"]
    assert run(recipe, folder.path, *options) == 0
    document = json.loads((folder.path / "evaluation" / "step-00000002.json").read_text())
    rows = document["networks"]["student"]["classes"]
    assert [row["class"] for row in rows if row["pixels"]] == chosen
    classes = rcmae.load_segmenter(folder.path).predict(Image.fromarray(scene(1)[0]))
    assert classes.dtype == torch.int16


def test_shards_that_are_not_there_are_the_only_problem(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "num_classes" not in refused(recipe, tmp_path, capsys, "data.shards=nowhere/*.tar")


def test_levels_are_the_features_of_timms_vit() -> None:
    """Without relative positions and layer scale it is the plain network."""
    from timm.models.vision_transformer import VisionTransformer

    sizes = NetworkSizes((24, 32), 4, 3, 16, 4, 2)
    form = Form(levels=(0, 1, 3), relative_positions=False, layer_scale=False)
    backbone = Segmenter(sizes, form, Heads(3, kind="linear")).backbone.double().eval()
    plain = VisionTransformer(
        (24, 32), 4, embed_dim=16, depth=4, num_heads=2, num_classes=0, norm_layer=layer_norm()
    ).double()
    state = {name: value for name, value in backbone.state_dict().items() if "fpn" not in name}
    missing = plain.load_state_dict(state, strict=False)
    assert set(missing.missing_keys) == {"norm.weight", "norm.bias"}
    assert not missing.unexpected_keys
    images = torch.randn(2, 3, 24, 32, dtype=torch.float64)
    with torch.no_grad():
        theirs = plain.eval().forward_intermediates(
            images, indices=[0, 1, 3], intermediates_only=True
        )
        for mine, other in zip(backbone.outputs(images), theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_the_plan_knows_what_the_heads_keep(recipe: Path) -> None:
    """Within a factor: what batch norm and resizing keep depends on torch."""
    loaded = config.load(
        str(recipe), ["segment.num_classes=19", "segment.crop=64", "segment.width=32"]
    )
    model = new_segmenter(loaded, 19).train()
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # else its memory is used again
        return tensor

    alive: list[torch.Tensor] = []
    maps = torch.zeros(2, 64, 64, dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(torch.randn(2, 3, 64, 64))
        torch.stack([pixel_loss(each, maps) for each in logits]).sum()
    parts = Segmentation().cost(loaded).parts
    stated = 2 * sum(part.saved for part in parts)  # of two images
    assert 0.8 * sum(kept.values()) < stated < 1.5 * sum(kept.values())


def test_a_step_without_any_label_has_no_loss_and_no_nan(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blank = {
        name: png(np.full_like(scene(int(name[:4]))[1], 255)) if "seg" in name else data
        for name, data in members(range(8)).items()
    }
    pack(tmp_path / "blank.tar", blank)
    folder = Folder(tmp_path / "run")
    options = [f"data.shards={tmp_path}/blank.tar", "segment.num_classes=5"]
    assert run(recipe, folder.path, *options, "evaluate.every_steps=0", "schedule.steps=3") == 0
    assert folder.losses() == [0.0] * 3
    assert [row["zero_losses"] for row in folder.rows()] == [1, 2, 3]
    said = capsys.readouterr()
    assert (said.out + said.err).count("warning: the loss of step 1 is exactly 0") == 1
    labelled = [*options, "evaluate.every_steps=0", "schedule.steps=3"]
    other = Folder(tmp_path / "labelled")
    assert run(recipe, other.path, *labelled, "segment.mean_over=labelled") == 0
    assert other.losses() == [0.0] * 3


def refused(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *given: str) -> str:
    """What a start says that is refused before anything is written."""
    folder = tmp_path / "refused"
    assert run(recipe, folder, *given) == 2
    assert not folder.exists()
    return capsys.readouterr().err


BAD = [
    (["segment.num_classes=4"], "segment.num_classes=4, but 5 classes are named"),
    (["segment.crop=18"], "patch_size=4 does not divide the image height 18"),
    (["segment.crop=16", "model.image_size=32"], "segment.crop=16 is the size of the network's"),
    (["segment.crop=[4,16]"], "has a grid of 1x4 patches; the pyramid halves it"),
    (["segment.levels=[0,2,1,3]"], "wants 4 blocks in ascending order, from 0 to 3"),
    (["segment.levels=[0,1,2,4]"], "wants 4 blocks in ascending order, from 0 to 3"),
    (["segment.levels=[0,1,2]"], "wants 4 blocks"),
    (["segment.head=linear"], "segment.width is of head=uper"),
    (["segment.frozen=true"], "segment.frozen is a probe: set segment.head=linear"),
    (["segment.scale=[2,1]"], "segment.scale: wants 0 < low <= high <= 10"),
    (["segment.init=nowhere"], "segment.init=nowhere"),
    (["segment.widht=3"], "did you mean 'width'?"),
    (["evaluate.test_shards=[]"], "give evaluate.test_shards, with maps"),
]


@pytest.mark.parametrize(("given", "said"), BAD, ids=[each[0][0] for each in BAD])
def test_what_does_not_fit_is_one_message_before_anything_is_written(
    given: list[str],
    said: str,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = refused(recipe, tmp_path, capsys, *given)
    assert said in told
    assert "Traceback" not in told


def test_weights_of_another_architecture_are_refused(
    recipe: Path, whole: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from timm.models.vision_transformer import VisionTransformer

    told = refused(recipe, tmp_path, capsys, f"segment.init={whole.path}", "model.embed_dim=24")
    assert "instead of" in told
    sizes = {"embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 0}
    encoder = VisionTransformer(16, 2, **sizes)
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    told = refused(recipe, tmp_path, capsys, f"segment.init={tmp_path}/encoder.safetensors")
    wanted = "the network of these weights is model.name=vit_small_patch16 model.patch_size=2"
    assert f"{wanted} model.embed_dim=48 model.depth=3" in told


def test_shards_without_maps_are_refused_and_some_without_are_replaced(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = members(range(12))
    images = {name: data for name, data in every.items() if "seg" not in name}
    pack(tmp_path / "without.tar", images)
    options = [f"data.shards={tmp_path}/without.tar", "segment.num_classes=5"]
    assert "no sample has a .seg.png" in refused(recipe, tmp_path, capsys, *options)
    some = {name: data for name, data in every.items() if name != "0003.seg.png"}
    other, values = scene(5)
    some["0005.seg.png"] = png(values[:-1])
    some["0007.seg.png"] = png(other)  # colours
    some["0009.seg.png"] = png(np.where(values == 255, 255, 5 + 0 * values).astype(np.uint8))
    pack(tmp_path / "some.tar", some)
    folder = Folder(tmp_path / "run")
    options = [f"data.shards={tmp_path}/some.tar", "segment.num_classes=5", "schedule.steps=6"]
    missing = ("0003.", "0009.")  # of a test set these are refused before the start
    test = {name: data for name, data in some.items() if not name.startswith(missing)}
    pack(tmp_path / "test.tar", test)
    options += ["data.max_bad_fraction=1", f"evaluate.test_shards={tmp_path}/test.tar"]
    assert run(recipe, folder.path, *options, "evaluate.every_steps=6") == 0
    reasons = {event["key"]: event["reason"] for event in folder.events("bad_sample")}
    assert reasons["0003"] == "it has no map"
    assert "its image" in reasons["0005"]
    assert "RGB" in reasons["0007"]
    assert set(reasons) == {"0003", "0005", "0007", "0009"}
    left_out = {"evaluate.test_shards": {"samples": 2, "of": 10}}
    (found,) = folder.events("evaluate")
    assert found["left_out"] == left_out
    document = json.loads((folder.path / "evaluation" / "step-00000006.json").read_text())
    assert document["left_out"] == left_out
    line = "evaluate.test_shards: 2 of 10 samples could not be used (20.0%)"
    assert f"left out: {line}" in capsys.readouterr().out
    warned = [event["told"] for event in folder.events("warning")]
    assert not any("evaluate.test_shards" in each for each in warned)
    again = [*options, "--evaluate-only", "evaluate.every_steps=6", "data.max_bad_fraction=0.1"]
    assert run(recipe, folder.path, *again) == 0
    told = folder.events("warning")[-1]["told"]
    assert f"{line}, more than data.max_bad_fraction=0.1: the figures are of the" in told


def test_maps_of_other_classes_are_refused_before_anything_is_written(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from_one = {}
    for name, data in members(range(6)).items():
        values = scene(int(name[:4]))[1]
        from_one[name] = png(values + (values != 255).astype(np.uint8)) if "seg" in name else data
    pack(tmp_path / "one.tar", from_one)
    options = [f"data.shards={tmp_path}/one.tar", "segment.num_classes=4"]
    told = refused(recipe, tmp_path, capsys, *options, "evaluate.every_steps=0")
    assert "data.shards: each of the 6 maps looked at has numbers beyond 3" in told
    assert "if zero is no label, set segment.map_zero=none" in told
    tested = [f"data.shards={tmp_path}/one.tar", f"evaluate.test_shards={tmp_path}/one.tar"]
    options = ["segment.num_classes=4", "segment.map_zero=none", "schedule.steps=3"]
    assert run(recipe, tmp_path / "zero", *tested, *options, "evaluate.every_steps=0") == 0
    pack(tmp_path / "zero.tar", members(range(6)))
    good = [f"data.shards={tmp_path}/zero.tar", f"evaluate.test_shards={tmp_path}/one.tar"]
    told = refused(recipe, tmp_path, capsys, *good, "segment.num_classes=4")
    assert "data.shards" not in told
    assert "evaluate.test_shards: each of the 6 maps looked at has numbers beyond 3" in told


def test_maps_whose_zero_is_no_label_say_so(recipe: Path, tmp_path: Path) -> None:
    found = {}
    for name, data in members(range(4)).items():
        values = scene(int(name[:4]))[1]
        shifted = np.where(values == 255, 0, values + 1).astype(np.uint8)
        found[name] = png(shifted) if "seg" in name else data
    crops = Crops((16, 16), Labels(4), in_channels=3)
    image, content = found["0000.png"], {"map": found["0000.seg.png"]}
    with pytest.raises(ValueError, match=r"outside segment.num_classes=4: 4 .*map_zero=none"):
        crops.views(image, content, 0, [0])
    right = Crops((16, 16), Labels(4, zero_is_none=True))
    (seen,) = right.views(image, content, 0, [0])
    assert set(seen.extra["maps"].unique().tolist()) <= {0, 1, 2, 3, 255}


def test_crops_are_of_image_and_map_and_a_function_of_the_position(recipe: Path) -> None:
    every = members(range(3))
    crops = Crops((16, 24), Labels(5))
    for number in range(3):
        image, content = every[f"{number:04d}.png"], {"map": every[f"{number:04d}.seg.png"]}
        together = crops.views(image, content, 3, range(5))
        for position, seen in enumerate(together):
            (alone,) = crops.views(image, content, 3, [position])
            assert torch.equal(seen.view.image, alone.view.image)
            assert torch.equal(seen.extra["maps"], alone.extra["maps"])
            height, width = seen.extra["extents"].tolist()
            assert (seen.extra["maps"][height:] == 255).all()
            assert (seen.extra["maps"][:, width:] == 255).all()
            assert seen.view.image.shape == (3, 16, 24)
        different = {each.view.image.sum().item() for each in together}
        assert len(different) == 5


def test_the_cost_is_that_of_the_published_network() -> None:
    """ViT-B at 512 pixels: 214 GFLOP of the encoder, 29 of the pyramid, 967 of the heads."""
    recipe = config.load(
        "segment_mae_vit_b_16", ["segment.num_classes=150", "engine.precision=bf16"]
    )
    cost = Segmentation().cost(recipe)
    assert cost.forward_flops == pytest.approx((214 + 29 + 967) * 1e9, rel=0.01)
    assert sum(part.params for part in cost.parts) == sum(
        param.numel() for param in cost.student.parameters()
    )
