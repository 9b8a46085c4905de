"""Weights go to every family and back without losing a bit, and other code computes the same
with them.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from safetensors import safe_open
from test_classifier import batch_of

import rcmae
from rcmae.commands import convert as tool
from rcmae.errors import Refused
from rcmae.models.sizes import NetworkSizes
from rcmae.models.vit import MaskedAutoencoder
from rcmae.objectives import new
from rcmae.weights.classifiers import load_classifier
from rcmae.weights.conversion import convert
from rcmae.weights.encoder import WeightsWarning, to_onnx
from rcmae.weights.names import family_names
from rcmae.weights.reading import read_network
from rcmae.weights.shapes import in_encoder
from runs import Folder, start

import timm

SIZES: dict[str, Any] = {
    "image_size": (32, 32),
    "patch_size": 8,
    "in_channels": 3,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 4,
    "decoder_dim": 16,
    "decoder_depth": 2,
    "decoder_heads": 16,
}


@pytest.fixture(scope="module")
def model() -> MaskedAutoencoder:
    found = MaskedAutoencoder(NetworkSizes(**SIZES)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in found.parameters():
            param.add_(0.02 * torch.randn(param.shape, generator=generator))  # no bias 0
    return found


@pytest.fixture
def file(model: MaskedAutoencoder, tmp_path: Path) -> Path:
    path = tmp_path / "published.pth"
    torch.save({"model": model.state_dict()}, path)
    return path


def by_its_line(said: str) -> Any:
    """What the line that the command prints last gives."""
    names = {"rcmae": rcmae, "timm": timm, "safetensors": safetensors, "transformers": transformers}
    return eval(said.splitlines()[-1].strip(), names)


HEADS = ("--num-heads", "4", "--decoder-heads", "16")
TARGETS = [
    ("mae", "w.pth", True),
    ("bootmae", "w.pth", False),
    ("maepriv", "w.pth", False),
    ("timm", "w.safetensors", False),
    ("timm", "w.pth", False),
    ("huggingface", "folder", True),
    ("safetensors", "w.safetensors", True),
]


@pytest.mark.parametrize(("target", "name", "whole"), TARGETS)
def test_there_and_back_is_equal_to_the_last_bit(
    target: str,
    name: str,
    whole: bool,
    file: Path,
    model: MaskedAutoencoder,
    tmp_path: Path,
    capsys: Any,
) -> None:
    out = tmp_path / name
    words = [str(file), "--to", target, "--out", str(out), *HEADS]
    assert tool.main(words) == 0
    loaded = by_its_line(capsys.readouterr().out)
    if target == "timm":
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        ours = rcmae.load_encoder(file, num_heads=4).forward_features(images)
        torch.testing.assert_close(loaded.eval().forward_features(images), ours)
    mode = (out / "model.safetensors" if out.is_dir() else out).stat().st_mode
    # others may read it where the umask lets them
    assert mode & 0o777 == (file.stat().st_mode & 0o777)
    back = read_network(out).weights
    wanted = {k: v for k, v in model.state_dict().items() if whole or in_encoder(k)}
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[k], wanted[k]) for k in wanted)


def test_a_guess_of_the_decoders_heads_is_told(file: Path, tmp_path: Path) -> None:
    source = read_network(file)
    with pytest.warns(WeightsWarning, match="decoder_heads=16 is guessed.*give --decoder-heads"):
        convert(source, "huggingface", tmp_path / "guessed", num_heads=4)
    convert(source, "huggingface", tmp_path / "asked", num_heads=4, decoder_heads=2)
    told = json.loads((tmp_path / "asked" / "config.json").read_text())
    assert (told["num_attention_heads"], told["decoder_num_attention_heads"]) == (4, 2)


@pytest.mark.parametrize(
    ("sizes", "args", "target", "heads", "told"),
    [
        ({"class_tokens": 0}, {}, "huggingface", 4, "has a class token, these weights none: --to"),
        (
            {"image_size": (16, 32)},
            {},
            "huggingface",
            4,
            "square images, these weights a grid of 2x4",
        ),
        ({"image_size": (16, 32)}, {}, "pixio", 4, "square images, these weights a grid of 2x4"),
        ({"mlp_ratio": 2.5}, {}, "pixio", 4, "Pixio has a whole mlp_ratio, these weights 2.5"),
        ({}, {}, "huggingface", 0, "num_heads=0, as requested, does not divide"),
        ({}, {}, "timm", -4, "num_heads=-4, as requested, does not divide"),
        ({}, {}, "timm", 5, "num_heads=5, as requested, does not divide"),
        ({}, {"decoder_heads": 3}, "huggingface", 4, "decoder_heads=3 does not divide"),
        (
            {},
            {"mask_ratio": torch.tensor(0.5), "norm_pix_loss": "False"},
            "huggingface",
            4,
            "mask_ratio=.* is not a number.*; norm_pix_loss='False' is not true or false",
        ),
        ({}, {"mask_ratio": 75}, "huggingface", 4, "mask_ratio=75 is not a number from 0"),
    ],
)
def test_what_a_target_cannot_hold_is_refused_and_nothing_written(
    sizes: dict[str, Any],
    args: dict[str, Any],
    target: str,
    heads: int,
    told: str,
    tmp_path: Path,
) -> None:
    state = MaskedAutoencoder(NetworkSizes(**SIZES | sizes)).state_dict()
    path = tmp_path / "w.pth"
    torch.save({"model": state, "args": {"decoder_heads": 16} | args}, path)
    out = tmp_path / ("out.safetensors" if target == "timm" else "out")
    with pytest.raises(Refused, match=told):
        convert(read_network(path), target, out, num_heads=heads)
    assert not out.exists()


def test_a_learned_table_of_no_square_does_not_say_its_rows(tmp_path: Path) -> None:
    state = MaskedAutoencoder(NetworkSizes(**SIZES | {"image_size": (16, 32)})).state_dict()
    assert convert_to_timm(state, tmp_path).is_file()  # the table of sines does
    shutil.rmtree(tmp_path)
    state["pos_embed"] = state["pos_embed"] + torch.linspace(0, 1, state["pos_embed"].numel()).view(
        state["pos_embed"].shape
    )
    with pytest.raises(Refused, match="8 positions are no square of patches"):
        convert_to_timm(state, tmp_path)


def convert_to_timm(state: dict[str, torch.Tensor], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save({"model": state, "args": {}}, folder / "w.pth")
    convert(read_network(folder / "w.pth"), "timm", folder / "out.safetensors", num_heads=4)
    return folder / "out.safetensors"


def test_supmaes_head_and_a_finetuned_one_are_left_out(
    model: MaskedAutoencoder, tmp_path: Path, capsys: Any
) -> None:
    extra = {"cls_head.0.weight": torch.zeros(3, 48), "head.weight": torch.zeros(3, 48)}
    torch.save({"model": {**model.state_dict(), **extra}}, tmp_path / "w.pth")
    assert (
        tool.main(
            [
                str(tmp_path / "w.pth"),
                "--to",
                "safetensors",
                "--out",
                str(tmp_path / "o.safetensors"),
            ]
        )
        == 0
    )
    assert "2 left out: cls_head, head" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["timm", "mae"])
def test_a_classifier_of_mean_pooling_is_told_its_way(
    model: MaskedAutoencoder, tmp_path: Path, capsys: Any, target: str
) -> None:
    state = {name: value for name, value in model.state_dict().items() if in_encoder(name)}
    pooled = {f"fc_norm.{each}": state.pop(f"norm.{each}") for each in ("weight", "bias")}
    torch.save({"model": state | pooled | {"head.weight": torch.zeros(3, 48)}}, tmp_path / "w.pth")
    out = tmp_path / "o.pth"
    assert tool.main([str(tmp_path / "w.pth"), "--to", target, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "normalises it (fc_norm) and has no norm after its last block" in said
    assert "`rcmae export RUN --format timm` (or hf)" in said
    assert not out.exists()


def test_names_of_the_families_are_the_published_ones(model: MaskedAutoencoder) -> None:
    names = family_names(model.state_dict(), "huggingface")
    assert {
        "vit.embeddings.position_embeddings",
        "vit.encoder.layer.1.attention.attention.value.bias",
        "vit.encoder.layer.0.intermediate.dense.weight",
        "decoder.decoder_layers.1.attention.output.dense.weight",
        "decoder.decoder_pred.bias",
        "vit.layernorm.weight",
    } <= names.keys()
    encoder = {name: value for name, value in model.state_dict().items() if in_encoder(name)}
    assert "encoder.blocks.0.attn.q_bias" in family_names(encoder, "maepriv")
    assert "blocks.0.attn.v_bias" in family_names(encoder, "bootmae")
    with pytest.raises(ValueError, match="unknown family 'beit'"):
        family_names(encoder, "beit")


def test_hugging_face_computes_the_same_loss(
    file: Path, model: MaskedAutoencoder, tmp_path: Path
) -> None:
    assert tool.main([str(file), "--to", "huggingface", "--out", str(tmp_path / "hf"), *HEADS]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import ViTMAEForPreTraining

        theirs, said = ViTMAEForPreTraining.from_pretrained(
            tmp_path / "hf", output_loading_info=True
        )
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    batch = batch_of(images, torch.zeros(3))
    ids = noise.argsort(dim=1)
    batch = replace(batch, ids_shuffle=ids, num_visible=4)
    task = new("mae", norm_pix_loss=True)
    with torch.no_grad():
        mine = (
            task(model, None, batch, 0.0)["reconstruction"] / task.counts(batch)["reconstruction"]
        )
        loss = theirs.eval()(pixel_values=images, noise=noise).loss
    assert mine.item() == pytest.approx(loss.item(), abs=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "again")
    again = rcmae.load_encoder(tmp_path / "again")  # its config.json tells the number of heads
    assert again.blocks[0].attn.num_heads == 4
    back = read_network(tmp_path / "again").weights
    assert all(torch.equal(back[name], value) for name, value in model.state_dict().items())


def test_onnxruntime_computes_the_same_features(file: Path, tmp_path: Path) -> None:
    import onnxruntime

    assert (
        tool.main(
            [str(file), "--to", "onnx", "--out", str(tmp_path / "e.onnx"), "--num-heads", "4"]
        )
        == 0
    )
    session = onnxruntime.InferenceSession(
        str(tmp_path / "e.onnx"), providers=["CPUExecutionProvider"]
    )
    encoder = rcmae.load_encoder(file, num_heads=4)
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["std"]) == list(encoder.pretrained_cfg["std"])
    for count in (1, 5):
        images = torch.randn(count, 3, 32, 32)
        (tokens,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(tokens, encoder.forward_features(images).numpy(), atol=1e-4)


def test_an_encoder_in_ones_own_code(file: Path, model: MaskedAutoencoder) -> None:
    encoder, images = rcmae.load_encoder(file, num_heads=4), torch.randn(2, 3, 32, 32)
    for wrong in (torch.zeros(2, 3, 48, 48), torch.zeros(3, 32, 32)):
        with pytest.raises(Refused, match=r"images are \[B, 3, 32, 32\], got .*model\.transform"):
            encoder(wrong)
    with torch.no_grad():
        tokens = model.encoded(images)
        torch.testing.assert_close(encoder.forward_features(images), tokens, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(encoder(images), tokens[:, 1:].mean(1), rtol=1e-5, atol=1e-5)
        cls = rcmae.load_encoder(file, num_heads=4, pool="cls")(images)
        torch.testing.assert_close(cls, tokens[:, 0], rtol=1e-5, atol=1e-5)
        maps = encoder.get_intermediate_layers(images, n=2, reshape=True)
    assert [tuple(each.shape) for each in maps] == [(2, 48, 4, 4)] * 2
    assert [row["module"] for row in encoder.feature_info] == ["blocks.0", "blocks.1"]
    assert not encoder.training
    wide = rcmae.load_encoder(file, num_heads=4, image_size=(16, 64))
    assert wide(torch.randn(1, 3, 16, 64)).shape == (1, 48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give num_heads"),
        ({"num_heads": 4, "image_size": 30}, "not a multiple of the patch of 8"),
        ({"num_heads": 4, "pool": "max"}, "use mean or cls"),
        ({"num_heads": 4, "network": "teacher"}, "has no teacher"),
    ],
)
def test_what_cannot_be_an_encoder_is_refused(
    options: dict[str, Any], message: str, file: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        rcmae.load_encoder(file, **options)


def test_a_run_is_read_by_its_own_recipe_and_its_teacher_first(
    uninterrupted: Folder, tmp_path: Path
) -> None:
    teacher, student = (
        rcmae.load_encoder(uninterrupted.path, network=which) for which in (None, "student")
    )
    state = uninterrupted.state()
    assert teacher.blocks[0].attn.num_heads == 4
    assert timm.data.resolve_model_data_config(teacher)["std"] == (0.229, 0.224, 0.225)
    assert timm.data.resolve_model_data_config(teacher)["input_size"] == (3, 32, 32)
    assert torch.equal(teacher.norm.weight, state["teacher/norm.weight"])
    assert torch.equal(student.norm.weight, state["weight/norm.weight"])
    out = tmp_path / "w.safetensors"
    assert tool.main([str(uninterrupted.path), "--to", "safetensors", "--out", str(out)]) == 0
    with safe_open(out, framework="pt") as opened:
        told = opened.metadata()
    assert {"recipe", "step", "data_fingerprint", "network"} <= told.keys()
    assert rcmae.load_encoder(out).blocks[0].attn.num_heads == 4  # the recipe in the file says so
    with pytest.raises(ValueError, match="has no head"):
        load_classifier(uninterrupted.path)


def test_a_pretraining_starts_from_a_file(
    uninterrupted: Folder, tiny: Path, tmp_path: Path, capsys: Any
) -> None:
    out, run = tmp_path / "w.safetensors", Folder(tmp_path / "run")
    assert (
        tool.main(
            [str(uninterrupted.path), "--to", "safetensors", "--out", str(out), "--what", "student"]
        )
        == 0
    )
    assert (
        start(tiny, run.path, f"checkpoint.init={out}", "schedule.steps=6", "schedule.lr=1e-6") == 0
    )
    assert run.losses()[0] < uninterrupted.losses()[0] - 0.05
    assert start(tiny, tmp_path / "other", f"checkpoint.init={out}", "model.depth=2") == 2
    said = capsys.readouterr().err
    assert "has unknown blocks.2." in said
    assert "; the network of these weights is model.name=" in said
    assert "model.depth=3" in said


def test_onnx_without_its_packages_is_a_clear_message(
    file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match="pip install onnx onnxscript"):
        to_onnx(rcmae.load_encoder(file, num_heads=4), tmp_path / "e.onnx")
