"""What a file of weights does not hold is read beside it, told as a guess, or refused."""

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import rcmae
from rcmae import checkpoint
from rcmae.commands import convert as convert_tool
from rcmae.errors import Refused
from rcmae.models.classifier import Classifier
from rcmae.models.sizes import NetworkSizes
from rcmae.models.vit import MaskedAutoencoder
from rcmae.weights.encoder import WeightsWarning
from rcmae.weights.names import family_names
from rcmae.weights.reading import _of_checkpoint, read_network
from rcmae.weights.starting import function_problems, start_of
from runs import Folder, start

from timm.layers import LayerNorm

State = dict[str, Tensor]


def vit(seed: int = 0, width: int = 192, heads: int = 3, depth: int = 2) -> Classifier:
    """An encoder at 32 pixels in patches of 16, nothing at its usual start."""
    model = Classifier(
        NetworkSizes((32, 32), 16, 3, width, depth, heads), num_classes=0, pool="cls"
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(9))


def told(path: Path, **options: Any) -> tuple[Classifier, str]:
    """The encoder of a file, and what is said of it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", WeightsWarning)
        model = rcmae.load_encoder(path, **options)
    return model, " ".join(str(each.message) for each in said)


def test_a_guess_of_heads_is_told_and_an_answer_is_not(tmp_path: Path) -> None:
    torch.save(vit(heads=12).state_dict(), tmp_path / "w.pth")
    guessed, said = told(tmp_path / "w.pth")
    assert "num_heads=3 is guessed" in said
    assert guessed.blocks[0].attn.num_heads == 3
    right, said = told(tmp_path / "w.pth", num_heads=12)
    assert not said
    with torch.no_grad():
        same = vit(heads=12).forward_features(IMAGES)
        torch.testing.assert_close(right.forward_features(IMAGES), same)


@pytest.mark.parametrize(
    "args",
    [
        {"args": argparse.Namespace(model="mae_vit_tiny_patch16", mask_ratio=0.6)},
        {"args": {"model": "vit_tiny_patch16_224"}},
        {"arch": "vit_tiny_patch16_224"},
        {"hyper_parameters": {"num_heads": "3"}},
        {"config": argparse.Namespace(num_heads=3)},
    ],
)
def test_args_in_the_file_say_the_architecture(args: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"model": vit().state_dict(), **args}, tmp_path / "w.pth")
    model, said = told(tmp_path / "w.pth")
    assert model.blocks[0].attn.num_heads == 3
    assert not said


def test_heads_that_do_not_divide_the_width_are_named(tmp_path: Path) -> None:
    torch.save({"model": vit().state_dict(), "args": {"num_heads": 5}}, tmp_path / "w.pth")
    with pytest.raises(Refused, match="num_heads=5, by what lies beside the weights, does not"):
        rcmae.load_encoder(tmp_path / "w.pth")
    with pytest.raises(Refused, match="num_heads=7, as requested, does not divide"):
        rcmae.load_encoder(tmp_path / "w.pth", num_heads=7)


def hugging_face(folder: Path, processor: dict[str, Any] | None = None, **config: Any) -> Path:
    """A folder as transformers writes it, with what its configuration is to say."""
    folder.mkdir()
    names = family_names(vit(heads=12).state_dict(), "huggingface")
    save_file(
        {name.removeprefix("vit."): value.clone() for name, value in names.items()},
        folder / "model.safetensors",
    )
    tree = {"model_type": "vit", "hidden_size": 192, "num_attention_heads": 12, **config}
    (folder / "config.json").write_text(json.dumps(tree))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def as_configured(eps: float = 1e-12, act: type[nn.Module] = nn.GELU) -> Tensor:
    model = vit(heads=12)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | LayerNorm):
            module.eps = eps
        if isinstance(getattr(module, "act", None), nn.GELU):
            module.act = act()
    with torch.no_grad():
        return model.forward_features(IMAGES)


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        ({}, {}),
        ({"hidden_act": "relu"}, {"act": nn.ReLU}),
        ({"layer_norm_eps": 1e-2}, {"eps": 1e-2}),
        ({"num_attention_heads": "12"}, {}),
    ],
)
def test_a_configuration_beside_weights_is_used(
    config: dict[str, Any], changed: dict[str, Any], tmp_path: Path
) -> None:
    model, said = told(hugging_face(tmp_path / "hf", **config))
    assert not said
    with torch.no_grad():
        found = model.forward_features(IMAGES)
    torch.testing.assert_close(found, as_configured(**changed), atol=1e-5, rtol=1e-4)
    assert model.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("processor", "mean", "std"),
    [
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, 0.5, 0.25),
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "do_normalize": False}, 0.0, 1.0),
        ({"do_normalize": False}, 0.0, 1.0),
        ({"image_mean": 0.5, "image_std": 0.25}, 0.5, 0.25),
        ({"image_mean": [1.0] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 127.5}, 0.5, 0.25),
        ({"image_mean": [51.0] * 3, "image_std": [25.5] * 3, "do_rescale": False}, 0.2, 0.1),
    ],
)
def test_a_preprocessor_beside_weights_is_used(
    processor: dict[str, Any], mean: float, std: float, tmp_path: Path
) -> None:
    model, _ = told(hugging_face(tmp_path / "hf", processor))
    assert model.mean == pytest.approx((mean,) * 3)
    assert model.pretrained_cfg["std"] == pytest.approx((std,) * 3)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"hidden_act": "xielu"}, "hidden_act"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps"),
        ({"model_type": "dinov2"}, "model_type"),
        ({"num_attention_heads": "twelve"}, "num_attention_heads='twelve' must be a whole number"),
        ({"hidden_act": ["gelu"]}, "hidden_act"),
        ({"model_type": ["vit"]}, "model_type"),
        ({"layer_norm_eps": True}, "layer_norm_eps"),
        *(({"image_size": size}, "image_size") for size in ("32", 0, -32, 32.0, True, [32] * 3)),
        ({"num_hidden_layers": 12}, "num_hidden_layers=12, the weights have 2"),
        (
            {"patch_size": 8, "num_channels": 1},
            "patch_size=8.*; num_channels=1, the weights have 3",
        ),
        ({"qkv_bias": False}, "qkv_bias"),
    ],
)
def test_what_is_configured_and_unknown_is_refused(
    config: dict[str, Any], key: str, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=key):
        rcmae.load_encoder(hugging_face(tmp_path / "hf", **config))


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"image_std": [0, 0, 0]}, "image_std"),
        ({"image_std": [-0.5] * 3}, "image_std"),
        ({"image_std": None}, "image_std is missing"),
        ({"image_mean": [float("nan")] * 3}, "image_mean"),
        ({"image_mean": [10**400] * 3}, "image_mean"),
        ({"image_mean": [True] * 3}, "image_mean"),
        ({"image_mean": [], "image_std": []}, "image_mean"),
        ({"image_mean": [0.5] * 4, "image_std": [0.5] * 4}, "mean of 4 channels, the weights 3"),
        *(({"rescale_factor": factor}, "rescale_factor") for factor in ("1/255", 0, None)),
    ],
)
def test_a_preprocessor_that_would_ruin_images_is_refused(
    changed: dict[str, Any], key: str, tmp_path: Path
) -> None:
    processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3} | changed
    with pytest.raises(Refused, match=key):
        rcmae.load_encoder(hugging_face(tmp_path / "hf", processor))


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"model_args": [1]}, "model_args"),
        ({"pretrained_cfg": "augreg"}, "pretrained_cfg"),
        ({"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.0] * 3}}, "std"),
    ],
)
def test_what_timm_writes_beside_weights_is_checked(
    changed: dict[str, Any], key: str, tmp_path: Path
) -> None:
    save_file(vit().state_dict(), tmp_path / "model.safetensors")
    tree = {"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": None}}
    text = json.dumps(tree).encode("utf-8-sig")  # as some editors save it
    (tmp_path / "config.json").write_bytes(text)
    assert rcmae.load_encoder(tmp_path).blocks[0].attn.num_heads == 3
    (tmp_path / "config.json").write_text(json.dumps(tree | changed))
    with pytest.raises(Refused, match=key):
        rcmae.load_encoder(tmp_path)


def test_a_training_has_the_function_that_is_told_or_is_refused(tmp_path: Path) -> None:
    sizes = NetworkSizes((32, 32), 16, 3, 192, 2, 3)
    folder = hugging_face(tmp_path / "hf", hidden_act="relu", layer_norm_eps=1e-3)
    problems = "; ".join(function_problems(read_network(folder), sizes))
    assert "hidden_act=relu" in problems
    assert "layer_norm_eps=0.001" in problems
    assert "set model.num_heads=12" in problems


WRAPPED: dict[str, Callable[[State], Any]] = {
    "compiled": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "compiled block by block": lambda state: {
        name.replace("blocks.0.", "blocks.0._orig_mod."): value for name, value in state.items()
    },
    "a backbone with a head": lambda state: {
        **{f"module.backbone.{name}": value for name, value in state.items()},
        "module.projector.0.weight": torch.ones(3, 3),
    },
    "Lightning's": lambda state: {
        "state_dict": {f"model.{name}": value for name, value in state.items()},
        "pytorch-lightning_version": "2.5",
    },
    "an encoder": lambda state: {"model": {f"encoder.{name}": v for name, v in state.items()}},
    "DeepSpeed's": lambda state: {"module": state, "buffer_names": [], "ds_version": "0.19"},
    "an average alone": lambda state: {"model_ema": state},
    "an average beside weights": lambda state: {
        "state_dict": {name: value + 1 for name, value in state.items()},
        "state_dict_ema": state,
    },
    "an average in one table": lambda state: {
        "state_dict": {
            **{f"module.base_encoder.{name}": value + 1 for name, value in state.items()},
            **{f"module.momentum_encoder.{name}": value for name, value in state.items()},
        }
    },
    "averages beside weights, under other names": lambda state: {
        "model": {name: value + 1 for name, value in state.items()},
        "ema_model": {"decay": 0.99, "shadow": {f"module.{n}": v for n, v in state.items()}},
    },
    "an average of a callback": lambda state: {
        "state_dict": {f"model.{name}": value + 1 for name, value in state.items()},
        "callbacks": {"EMA": {"state": {f"model.{name}": v for name, v in state.items()}}},
    },
    "a target encoder": lambda state: {
        "encoder": {name: value + 1 for name, value in state.items()},
        "target_encoder": {f"module.{name}": value for name, value in state.items()},
        "predictor": {"blocks.0.norm1.weight": torch.ones(3)},
    },
    "torch's AveragedModel": lambda state: {
        **{f"module.{name}": value for name, value in state.items()},
        "n_averaged": torch.tensor(3),
    },
    "a model's vit": lambda state: {
        "state_dict": {f"model.vit.{name}": value for name, value in state.items()}
    },
    "deep": lambda state: {"checkpoint": {"model": {"state_dict": state}}},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_weights_come_out_of_their_wrappers(wrap: Callable[[State], Any], tmp_path: Path) -> None:
    state = dict(vit().state_dict())
    torch.save(wrap(state), tmp_path / "w.pth")
    model, _ = told(tmp_path / "w.pth", num_heads=3)
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_which_of_two_networks_was_taken_is_told(tmp_path: Path) -> None:
    torch.save(WRAPPED["an average beside weights"](dict(vit().state_dict())), tmp_path / "w.pth")
    _, said = told(tmp_path / "w.pth", num_heads=3)
    assert "state_dict_ema is taken; network='student' takes state_dict" in said
    model, said = told(tmp_path / "w.pth", num_heads=3, network="student")
    assert not said
    assert torch.equal(model.cls_token, vit().cls_token + 1)


def test_networks_that_differ_are_not_chosen_by_chance(tmp_path: Path) -> None:
    state = dict(vit().state_dict())
    other = {name: value + 1 for name, value in state.items()}
    torch.save({"model": state, "state_dict": other}, tmp_path / "w.pth")
    with pytest.raises(Refused, match="has several networks: model, state_dict; save one of them"):
        rcmae.load_encoder(tmp_path / "w.pth", num_heads=3)
    torch.save({"model": state, "model_without_ddp": state}, tmp_path / "w.pth")
    rcmae.load_encoder(tmp_path / "w.pth", num_heads=3)


def test_names_under_an_unknown_wrapper_are_refused_with_it(tmp_path: Path) -> None:
    torch.save({f"tower.{name}": v for name, v in vit().state_dict().items()}, tmp_path / "w.pth")
    with pytest.raises(Refused, match=r"'tower\.'"):
        rcmae.load_encoder(tmp_path / "w.pth", num_heads=3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    state = dict(vit().state_dict())
    state["blocks.1.mlp.fc2.weight"] = state["blocks.1.mlp.fc2.weight"] * value
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(Refused, match=r"not finite: blocks\.1\.mlp\.fc2\.weight"):
        rcmae.load_encoder(tmp_path / "w.pth", num_heads=3)


def test_an_encoder_starts_a_pretraining_with_a_fresh_decoder(tmp_path: Path) -> None:
    torch.save(vit().state_dict(), tmp_path / "w.pth")
    source = read_network(tmp_path / "w.pth")
    model = MaskedAutoencoder(NetworkSizes((32, 32), 16, 3, 192, 2, 3, 16, 1, 2))
    with pytest.raises(Refused, match=r"checkpoint\.init_decoder=fresh"):
        start_of(model, source, "file")
    begun = start_of(model, source, "fresh")
    own = dict(model.state_dict())
    assert all(name in begun.taken for name in source.weights)
    assert {name.split(".")[0] for name in begun.fresh} == {
        *("mask_token", "decoder_embed", "decoder_blocks", "decoder_norm", "decoder_pred")
    }
    assert torch.equal(begun.state["decoder_pred.weight"], own["decoder_pred.weight"])
    # positions were learned: the network computes what the file's did
    assert torch.equal(begun.state["pos_embed"], source.weights["pos_embed"])
    model.load_state_dict(begun.state)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(IMAGES), vit().forward_features(IMAGES))


def test_a_run_lists_what_it_took(tiny: Path, tmp_path: Path) -> None:
    sizes = NetworkSizes((32, 32), 8, 3, 64, 3, 4)
    encoder = Classifier(sizes, num_classes=0, pool="cls")
    torch.save({"model": encoder.state_dict()}, tmp_path / "w.pth")
    init = [f"checkpoint.init={tmp_path / 'w.pth'}", "schedule.steps=2", "schedule.warmup_steps=0"]
    assert start(tiny, tmp_path / "run", *init) == 2
    assert start(tiny, tmp_path / "run", *init, "checkpoint.init_decoder=fresh") == 0
    notes = " ".join(event["told"] for event in Folder(tmp_path / "run").events("note"))
    assert "weights taken (blocks, cls_token, norm, patch_embed)" in notes
    assert "newly initialised (decoder_blocks" in notes
    assert "model.num_heads=4 is this recipe's" in notes


# ------------------------------------------------------------------------------------ its images


@pytest.mark.parametrize("size", [(40, 60), (32, 32), (20, 24)])
def test_an_image_and_its_tensors_give_one_input(size: tuple[int, int], tmp_path: Path) -> None:
    torch.save(vit().state_dict(), tmp_path / "w.pth")
    model, _ = told(tmp_path / "w.pth", num_heads=3)
    pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    wanted = model.transform(image)
    assert wanted.shape == (3, 32, 32)
    assert torch.equal(model.transform(pixels), wanted)
    torch.testing.assert_close(model.transform(pixels.float() / 255), wanted)
    assert torch.equal(model.transform(torch.stack([pixels] * 2))[1], wanted)
    if size == (32, 32):
        mean, std = (torch.tensor(each)[:, None, None] for each in (model.mean, model.std))
        torch.testing.assert_close(wanted, (pixels / 255 - mean) / std)
    for strange in (pixels[:2], pixels[0], "photo.jpg"):
        with pytest.raises(Refused, match="3 channels"):
            model.transform(strange)


def test_hugging_face_reads_the_run_s_preprocessing(
    uninterrupted: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "hf"
    convert = [str(uninterrupted.path), "--to", "huggingface", "--out", str(out)]
    assert convert_tool.main(convert) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        processor = transformers.AutoImageProcessor.from_pretrained(out)
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(theirs, rcmae.load_encoder(uninterrupted.path).transform(image))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "image_size", "big"),
        ("model", "image_size", 10**9),
        ("model", "num_heads", "4"),
        ("model", "num_heads", 0),
        ("data", "mean", "x"),
        ("data", "std", [0.5, None, 0.5]),
    ],
)
def test_a_checkpoint_s_recipe_is_not_believed(
    section: str, key: str, value: Any, uninterrupted: Folder
) -> None:
    newest, _ = checkpoint.newest(uninterrupted.checkpoints)
    assert newest is not None
    recipe = newest.meta["recipe"]
    changed = recipe | {section: recipe[section] | {key: value}}
    odd = replace(newest, meta={**newest.meta, "recipe": changed})
    with pytest.raises(Refused, match=rf"its recipe has {section}\.{key}="):
        _of_checkpoint(odd, [], None, "teacher")
    assert _of_checkpoint(newest, [], None, "teacher").grid == (4, 4)
