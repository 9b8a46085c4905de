"""A classifier leaves a run whole: timm and transformers compute the same scores, with names."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import rcmae
from rcmae.commands import export as command
from rcmae.errors import Refused
from rcmae.models.classifier import Classifier, probe_head
from rcmae.models.sizes import NetworkSizes
from rcmae.weights.reading import read_network
from tests.checkpoints import MODEL, network, state_of, write_checkpoint

import timm

NAMES = ["cat", "dog", "eel", "fox", "gnu"]
SQUARE = {**MODEL, "image_size": [32, 32]}
SIZES = {key: value for key, value in SQUARE.items() if key != "name"} | {"image_size": (32, 32)}


def drawn(model: nn.Module, seed: int = 3) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.2, generator=generator)
    return model.eval()


def finetuned(folder, pool, names=True):
    """A run of a fine-tuned classifier, and the classifier."""
    model = drawn(Classifier(NetworkSizes(**SIZES), num_classes=5, pool=pool))
    state = {f"weight/{name}": param.detach() for name, param in model.named_parameters()}
    folder.mkdir(exist_ok=True)
    listed = folder / "classes.txt"
    listed.write_text("\n".join(NAMES) + "\n")
    classify = {"pool": pool, "num_classes": 5, "class_names": str(listed) if names else None}
    write_checkpoint(
        folder,
        10,
        state,
        model=SQUARE,
        task={"name": "finetune"},
        objective={"name": "finetune"},
        classify=classify,
    )
    return model


def images(count=3):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(9))


def written(folder, form, capsys, *more):
    out = folder / ("out" if form == "hf" else "out.safetensors")
    arguments = [str(folder), "--format", form, "--out", str(out), "--json", *more]
    assert command.main(arguments) == 0, capsys.readouterr().err
    return out, json.loads(capsys.readouterr().out)["use"]


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_timm_and_transformers_give_the_scores_of_a_fine_tuned_classifier(tmp_path, capsys, pool):
    with torch.no_grad():
        wanted = finetuned(tmp_path, pool)(images())
        out, use = written(tmp_path, "timm", capsys)
        model = eval(use, {"timm": timm}).eval()  # the line that was printed
        assert torch.allclose(model(images()), wanted, atol=1e-6, rtol=1e-5)
        loaded = rcmae.load_classifier(tmp_path)
        assert loaded.class_names == tuple(NAMES)
        assert torch.equal(loaded(images()), wanted)
        again = rcmae.load_classifier(out)
        assert again.class_names == tuple(NAMES)
        assert torch.equal(again(images()), wanted)

        transformers = pytest.importorskip("transformers")
        out, use = written(tmp_path, "hf", capsys)
        assert (use.split(".")[1] == "BeitForImageClassification") == (pool == "mean")
        model = eval(use, {"transformers": transformers}).eval()
        assert torch.allclose(model(images()).logits, wanted, atol=1e-5, rtol=1e-5)
        assert model.config.id2label == dict(enumerate(NAMES))
        found = transformers.AutoImageProcessor.from_pretrained(out)
        assert tuple(found.image_mean) == loaded.mean


def probed(folder, pool="cls", depth=2):
    """A run of a probe on a run of a pretrained encoder; and what it computes."""
    encoder = network(1, **SQUARE)
    write_checkpoint(folder / "encoder", 10, state_of(encoder), model=SQUARE)
    head = drawn(probe_head(48, 5))
    generator = torch.Generator().manual_seed(4)
    head[0].running_mean.normal_(generator=generator)
    head[0].running_var.uniform_(0.5, 2.0, generator=generator)
    state = {f"weight/{name}": param.detach() for name, param in head.named_parameters()}
    floats = ((name, value) for name, value in head.named_buffers() if value.is_floating_point())
    state |= {f"buffer/{name}": value for name, value in floats}
    classify = {"init": str(folder / "encoder"), "pool": pool, "depth": depth, "num_classes": 5}
    write_checkpoint(
        folder / "probe",
        20,
        state,
        model=SQUARE,
        task={"name": "probe"},
        objective={"name": "probe"},
        classify=classify,
    )
    body = rcmae.load_encoder(folder / "encoder", pool="cls")
    body.blocks = body.blocks[:depth]
    return lambda pixels: head(body.forward_head(body.forward_features(pixels), pre_logits=True))


def test_a_probe_is_its_encoder_with_the_head_and_timm_gives_its_scores(tmp_path, capsys):
    scores = probed(tmp_path)
    with torch.no_grad():
        wanted = scores(images())
        model = rcmae.load_classifier(tmp_path / "probe")
        assert torch.allclose(model(images()), wanted, atol=1e-5, rtol=1e-5)
        assert model.class_names == ()

        _, use = written(tmp_path / "probe", "timm", capsys)
        assert "depth=2" in use
        other = eval(use, {"timm": timm}).eval()
        assert torch.allclose(other(images()), wanted, atol=1e-5, rtol=1e-5)
    (tmp_path / "encoder").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"head on the encoder of classify\.init=.*cannot be read"):
        rcmae.load_classifier(tmp_path / "probe")


def test_the_encoder_alone_is_still_written(tmp_path, capsys):
    finetuned(tmp_path, "cls")
    out, use = written(tmp_path, "timm", capsys, "--encoder")
    assert "num_classes=0" in use
    assert "head.weight" not in read_network(out).weights
    finetuned(tmp_path / "mean", "mean")  # has no last norm: its norm is of the mean
    mean = [str(tmp_path / "mean"), "--format", "timm", "--encoder", "--out", str(tmp_path / "x")]
    assert command.main(mean) == 2
    assert "without --encoder the whole network is written" in capsys.readouterr().err


def test_what_does_not_go_together_is_refused_and_leaves_what_was_there(tmp_path, capsys):
    finetuned(tmp_path, "cls", names=False)
    there = tmp_path / "there"
    there.mkdir()
    (there / "notes.txt").write_text("mine")

    def refused(*arguments):
        assert command.main([str(tmp_path), *arguments]) == 2
        return capsys.readouterr().err

    assert "did you mean 'timm'" in refused("--format", "tim", "--out", "x.safetensors")
    assert "ends in .safetensors or .pth" in refused("--format", "timm", "--out", str(there))
    assert "already exists" in refused("--format", "hf", "--out", str(there))
    said = refused("--format", "hf", "--out", str(there), "--overwrite")
    assert "a folder of something else" in said
    assert (there / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".there*"))


@pytest.mark.parametrize("names", ["", "5", "null", "[1]", "[" * 100_000])
def test_names_in_a_file_that_are_none_are_refused(tmp_path, capsys, names):
    finetuned(tmp_path, "mean")
    out, _ = written(tmp_path, "timm", capsys)
    with safe_open(out, framework="pt") as opened:
        told = opened.metadata() | {"class_names": names}
    save_file(load_file(out), out, told)
    with pytest.raises(Refused, match=r"out\.safetensors.*its class_names are no list of texts"):
        rcmae.load_classifier(out)


def test_a_file_has_the_names_and_no_place_of_data(tmp_path, capsys):
    finetuned(tmp_path, "mean")
    out, _ = written(tmp_path, "timm", capsys)
    with safe_open(out, framework="pt") as opened:
        told = opened.metadata()
    assert json.loads(told["class_names"]) == NAMES
    assert "x.tar" not in json.dumps(told)
