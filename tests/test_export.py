"""Weights leave a run in the files that others read, bit for bit.

Foreign files come in and nothing in them runs.
"""

import argparse
import contextlib
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import rcmae
from rcmae import checkpoint
from rcmae.checkpoint import find_checkpoint
from rcmae.commands import convert as convert_tool
from rcmae.commands import export as tool
from rcmae.errors import Refused
from rcmae.models.sizes import NetworkSizes
from rcmae.models.vit import MaskedAutoencoder
from rcmae.tasks.registry import TASKS, task_named
from rcmae.weights.encoder import load_autoencoder
from rcmae.weights.layouts import LAYOUTS
from rcmae.weights.reading import load_weights, read_network
from rcmae.weights.writing import export, timm_arguments
from tests.checkpoints import MODEL, network, state_of, write_checkpoint
from tests.runs import Folder

import timm

ROOT = Path(__file__).parent.parent
SUFFIX = {name: layout.suffixes[0] for name, layout in LAYOUTS.items()}
ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")


@pytest.fixture(scope="module")
def networks() -> dict[str, MaskedAutoencoder]:
    """Student and teacher, with position tables that are not those one would compute."""
    made = {"student": network(1), "teacher": network(2)}
    for model in made.values():
        model.pos_embed += 0.25
        model.decoder_pos_embed -= 0.5
    return made


@pytest.fixture(scope="module")
def run(networks: dict[str, MaskedAutoencoder], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint, of step 10, by three ranks."""
    path = tmp_path_factory.mktemp("run")
    write_checkpoint(path, 10, state_of(networks["student"], networks["teacher"]))
    return path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A run without a teacher."""
    write_checkpoint(tmp_path / "plain", 10, state_of(network(1)))
    return tmp_path / "plain"


def command(*args: object) -> int:
    """The tool in this process; its exit status."""
    return tool.main(list(map(str, args)))


def same(state: dict[str, Tensor], model: MaskedAutoencoder, encoder: bool = False) -> bool:
    wanted = {
        name: value
        for name, value in model.state_dict().items()
        if not encoder or name.startswith(ENCODER)
    }
    return state.keys() == wanted.keys() and all(
        torch.equal(state[name], wanted[name]) for name in wanted
    )


def torch_load(path: Path) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


# ------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("layout", ["safetensors", "mae", "mae-full", "timm"])
def test_weights_come_back_bit_for_bit(run, networks, layout, which, tmp_path):
    manifest, _ = find_checkpoint(run)
    out = tmp_path / f"weights{SUFFIX[layout]}"
    done = export(manifest, out, layout=layout, network=which)
    assert (done.networks, done.step, done.bytes) == ((which,), 10, out.stat().st_size)
    read = load_weights(out)
    assert list(read.networks) == [which if out.suffix == ".safetensors" else "model"]
    [state] = read.networks.values()
    assert same(state, networks[which], encoder=layout in ("mae", "timm"))
    assert done.tensors == len(state)
    assert read.sizes["depth"] == MODEL["depth"]
    assert read.sizes.get("decoder_dim") == (
        MODEL["decoder_dim"] if layout in ("safetensors", "mae-full") else None
    )
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_what_rcmae_writes_is_what_is_written(run, networks, tmp_path):
    """The keys and names that the published code's checkpoints have, for its own fine-tuning to
    find.
    """
    manifest, _ = find_checkpoint(run)
    out = tmp_path / "checkpoint-2.pth"
    assert export(manifest, out, layout="rcmae").networks == ("student", "teacher")
    document = torch_load(out)
    assert list(document) == [
        "student",
        "teacher",
        "student_without_ddp",
        "teacher_without_ddp",
        "epoch",
        "args",
    ]
    assert all(name.startswith("module.") for name in document["student"])
    for key in ("teacher", "student_without_ddp", "teacher_without_ddp"):
        assert same(document[key], networks[key.partition("_")[0]])
    # of 10 steps, 4 an epoch, the second is the last whole one, counted from 0
    assert document["epoch"] == 1
    assert type(document["args"]) is argparse.Namespace
    assert (document["args"].model, document["args"].mask_ratio) == ("vit_tiny_patch16", 0.75)
    assert out.stat().st_size < 1.2 * 2 * sum(
        4 * value.numel() for value in networks["student"].state_dict().values()
    )
    read = load_weights(out)
    assert all(same(read.networks[which], networks[which]) for which in ("student", "teacher"))


def test_torch_layouts_are_what_the_published_loaders_index(run, networks, tmp_path):
    manifest, _ = find_checkpoint(run)
    for layout in ("mae", "mae-full"):
        export(manifest, tmp_path / f"{layout}.pth", layout=layout)
        assert list(torch_load(tmp_path / f"{layout}.pth")) == ["model"]
    assert list(torch_load(tmp_path / "mae.pth")["model"]) == [
        name for name in networks["teacher"].state_dict() if name.startswith(ENCODER)
    ]


def test_teacher_is_the_default_and_the_student_where_there_is_none(run, plain, networks, tmp_path):
    manifest, _ = find_checkpoint(run)
    assert export(manifest, tmp_path / "a.safetensors", layout="safetensors").networks == (
        "teacher",
    )
    manifest, _ = find_checkpoint(plain)
    assert export(manifest, tmp_path / "b.safetensors", layout="safetensors").networks == (
        "student",
    )


def test_metadata_says_what_made_the_weights(run, tmp_path):
    manifest, _ = find_checkpoint(run)
    export(manifest, tmp_path / "w.safetensors", layout="safetensors", network="student")
    about = load_weights(tmp_path / "w.safetensors").about
    assert (about["network"], about["step"], about["images"]) == ("student", "10", "320")
    assert about["data_fingerprint"] == "0123456789abcdef"
    assert json.loads(about["recipe"])["model"]["embed_dim"] == 48
    assert json.loads(about["versions"])["torch"]


def test_bf16_accumulators_are_exported_as_float32(tmp_path):
    student, teacher = network(1), network(2)
    state = state_of(student, teacher)
    state = {
        key: value.bfloat16() if key.startswith("teacher/") else value
        for key, value in state.items()
    }
    write_checkpoint(tmp_path, 10, state)
    manifest, _ = find_checkpoint(tmp_path)
    export(manifest, tmp_path / "w.safetensors", layout="safetensors")
    assert same(
        load_weights(tmp_path / "w.safetensors").networks["teacher"],
        teacher.bfloat16().float(),
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_gives_the_same_features(run, networks, suffix, tmp_path):
    """By the line of Python that the report prints: timm loads strictly."""
    manifest, _ = find_checkpoint(run)
    use = export(manifest, tmp_path / f"encoder{suffix}", layout="timm").use
    model = eval(use, {"timm": timm}).eval()
    images = torch.randn(2, 3, *MODEL["image_size"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = networks["teacher"].encoded(images)
        tokens = model.forward_features(images)
        torch.testing.assert_close(tokens, wanted, rtol=1e-5, atol=1e-5)
        # without a head, logits are the mean of the patches, as of rcmae.load_encoder
        torch.testing.assert_close(model(images), wanted[:, 1:].mean(1), rtol=1e-5, atol=1e-5)


def test_timm_line_of_a_published_architecture_is_short(run):
    manifest, _ = find_checkpoint(run)
    keys = (
        "patch_size",
        "embed_dim",
        "depth",
        "num_heads",
        "decoder_dim",
        "decoder_depth",
        "decoder_heads",
    )
    manifest.meta["recipe"]["model"].update(
        {"name": "vit_base_patch16", "image_size": 224} | dict.fromkeys(keys)
    )
    *arguments, cfg = timm_arguments(manifest)
    assert arguments == [
        *("'vit_base_patch16_224'", "num_classes=0"),
        *("global_pool='avg'", "fc_norm=False"),
    ]
    assert cfg.startswith("pretrained_cfg={'input_size': (3, 224, 224), 'mean': (0.485, ")
    assert timm.is_model("vit_base_patch16_224")


# ------------------------------------------------------------------------------------------ command


def test_command_exports_a_real_run(uninterrupted: Folder, tmp_path):
    out = tmp_path / "teacher.safetensors"
    args = [uninterrupted.path, "--format", "safetensors", "--out", out, "--json"]
    ran = subprocess.run(
        [sys.executable, "tools/export.py", *args],
        cwd=ROOT,
        check=True,
        text=True,
        capture_output=True,
    )
    told = json.loads(ran.stdout)
    assert (told["step"], told["networks"], told["bytes"]) == (20, ["teacher"], out.stat().st_size)
    state = load_weights(out).networks["teacher"]
    wanted = uninterrupted.state()
    for name, value in state.items():
        assert torch.equal(value, wanted.get(f"buffer/{name}", wanted.get(f"teacher/{name}"))), name


def test_help_names_the_formats_of_every_task():
    formats = [task_named(name).formats for name in TASKS]
    assert set().union(*formats) == tool.OF_TASKS.keys()


def test_user_hears_of_every_mistake_at_once(plain, tmp_path, capsys):
    (tmp_path / "there.pth").write_text("kept")
    assert (
        command(
            plain, "--format", "safetensors", "--what", "teacher", "--out", tmp_path / "there.pth"
        )
        == 2
    )
    said = capsys.readouterr().err
    for text in ("has no teacher", "ends in .safetensors", "already exists"):
        assert text in said
    assert (tmp_path / "there.pth").read_text() == "kept"


def test_no_checkpoint_is_a_mistake_and_a_damaged_one_is_not_exported(run, networks, tmp_path):
    with pytest.raises(ValueError, match="no such file or folder; give a run's"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no checkpoint in this folder"):
        find_checkpoint(tmp_path)
    state = state_of(networks["student"])
    good, bad = (write_checkpoint(tmp_path / "run", step, state) for step in (10, 20))
    flip(bad / "rank-00001.safetensors")
    found, passed_over = find_checkpoint(tmp_path / "run")
    assert found.path == good
    assert "rank-00001.safetensors differs from its checksum" in passed_over[0]
    with pytest.raises(checkpoint.CheckpointError, match="differs from its checksum"):
        find_checkpoint(bad)
    (good / "manifest.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="no valid checkpoint"):
        find_checkpoint(tmp_path / "run")
    with pytest.raises(checkpoint.CheckpointError, match="never committed"):
        find_checkpoint(good)


@pytest.mark.parametrize("text", ["{}", "[1]", "[" * 100_000, "x", '{"model": {"image_size": []}}'])
def test_metadata_that_is_no_recipe_is_refused_by_the_files_name(networks, tmp_path, text):
    weights = {name: value.detach() for name, value in networks["student"].named_parameters()}
    save_file(weights, tmp_path / "odd.safetensors", {"recipe": text})
    with pytest.raises(Refused, match=r"odd\.safetensors: the recipe in its metadata"):
        read_network(tmp_path / "odd.safetensors")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_another_network_has_no_place_in_the_layouts(networks, tmp_path):
    state = state_of(networks["student"])
    state["weight/neck.weight"] = torch.zeros(5, 48)
    del state["weight/blocks.1.norm1.bias"]
    write_checkpoint(tmp_path, 10, state)
    manifest, _ = find_checkpoint(tmp_path)
    with pytest.raises(
        ValueError, match=r"lacks blocks\.1\.norm1\.bias; student has unknown neck\.weight"
    ):
        export(manifest, tmp_path / "w.safetensors", layout="safetensors")


def test_several_class_tokens_are_told_of_and_the_line_loads_them(tmp_path, capsys):
    sizes = {"class_tokens": 3, "image_size": [32, 32]}
    student = network(1, **sizes)
    write_checkpoint(tmp_path, 10, state_of(student), model={**MODEL, **sizes})
    out = tmp_path / "w.pth"
    assert command(tmp_path, "--format", "mae", "--out", out) == 0
    said = capsys.readouterr()
    assert "one class token" in said.err
    model = eval(said.out.splitlines()[-1].strip(), {"rcmae": rcmae})
    assert torch.equal(model.cls_token, student.cls_token)
    folder = str(tmp_path / "folder")
    assert command(tmp_path, "--format", "hf", "--out", folder) == 2
    said = capsys.readouterr().err
    assert f"`rcmae convert {tmp_path} --to pixio --out FOLDER`" in said
    assert "this is a run of rcmae pretrain" in said
    assert convert_tool.main([str(tmp_path), "--to", "pixio", "--out", folder]) == 0
    line = capsys.readouterr().out.splitlines()[-1].strip()
    assert line == f"transformers.PixioModel.from_pretrained({folder!r})"
    assert command(tmp_path, "--format", "mmseg", "--out", out) == 2
    assert "of rcmae segment" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["mae", "mae-full", "rcmae"])
def test_the_line_of_a_torch_layout_loads_it(run, layout, tmp_path, capsys):
    out = tmp_path / "w.pth"
    square = {"image_size": [32, 32]}
    student, teacher = network(1, **square), network(2, **square)
    write_checkpoint(tmp_path, 10, state_of(student, teacher), model={**MODEL, **square})
    assert command(tmp_path, "--format", layout, "--out", out) == 0
    said = capsys.readouterr()
    model = eval(said.out.splitlines()[-1].strip(), {"rcmae": rcmae})
    assert torch.equal(model.pos_embed, teacher.pos_embed)
    assert model.blocks[0].attn.num_heads == MODEL["num_heads"]
    assert not said.err
    height, width = MODEL["image_size"]  # not square
    assert command(run, "--format", layout, "--out", out, "--overwrite") == 0
    line = capsys.readouterr().out.splitlines()[-1].strip()
    assert f"image_size=({height}, {width})" in line
    read = eval(line, {"rcmae": rcmae})
    assert read.image_size == (height, width)
    assert torch.equal(read.pos_embed, rcmae.load_encoder(run).pos_embed)


def test_a_table_of_sines_tells_the_grid_of_images_that_are_not_square(tmp_path):
    out = tmp_path / "w.pth"
    for size in ((24, 40), (16, 64)):  # of the second as many patches as a square has
        sizes = {**MODEL, "image_size": size}
        del sizes["name"]
        model = MaskedAutoencoder(NetworkSizes(**sizes))
        torch.save({"model": model.state_dict()}, out)
        whole, _ = load_autoencoder(out, num_heads=MODEL["num_heads"], decoder_heads=1)
        assert whole.sizes.image_size == size
        read = rcmae.load_encoder(out, num_heads=MODEL["num_heads"])
        assert read.image_size == size
        assert torch.equal(read.pos_embed, model.pos_embed)


def test_a_learned_table_that_is_no_squares_wants_the_size_of_its_images(run, tmp_path):
    out = tmp_path / "w.pth"
    state = dict(rcmae.load_encoder(run).state_dict())
    state["pos_embed"] = torch.randn_like(state["pos_embed"])
    torch.save({"model": state}, out)
    height, width = MODEL["image_size"]
    with pytest.raises(Refused, match=r"no square.*give image_size=\(height, width\)"):
        rcmae.load_encoder(out, num_heads=MODEL["num_heads"])
    found = rcmae.load_encoder(out, num_heads=MODEL["num_heads"], image_size=(height, width))
    assert torch.equal(found.pos_embed, state["pos_embed"])


def test_report_says_what_was_written_and_how_to_read_it(run, tmp_path, capsys):
    write_checkpoint(tmp_path, 20, {})  # of no network, but newer
    flip(tmp_path / "checkpoints" / "step-00000020" / "rank-00000.safetensors")
    shutil.copytree(
        run / "checkpoints" / "step-00000010", tmp_path / "checkpoints" / "step-00000010"
    )
    assert command(tmp_path, "--format", "timm", "--out", tmp_path / "encoder.pth") == 0
    said = capsys.readouterr()
    assert "teacher of step 10" in said.out
    assert "timm.create_model('vit_tiny_patch16_224', num_classes=0" in said.out
    assert "skipped: " in said.err
    assert "step-00000020" in said.err


@contextlib.contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Writes beyond so many bytes of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# of the weights: fails while they are gathered, and when they are packed
@pytest.mark.parametrize("limit", [0.5, 1.0])
@pytest.mark.parametrize("layout", ["safetensors", "mae-full"])
def test_a_write_that_fails_leaves_what_was_there(run, networks, layout, limit, tmp_path, capsys):
    out = tmp_path / f"weights{SUFFIX[layout]}"
    out.write_bytes(b"before")
    size = sum(4 * value.numel() for value in networks["teacher"].state_dict().values())
    with no_file_above(int(limit * size)):
        assert command(run, "--format", layout, "--out", out, "--overwrite") == 1
    assert "File too large" in capsys.readouterr().err
    assert out.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert command(run, "--format", layout, "--out", out, "--overwrite") == 0
    assert load_weights(out).networks


def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """A network of 100 MB leaves in twice its largest tensor, 2 MB, and what the interpreter
    moves.
    """
    wide = {"embed_dim": 256, "depth": 32}
    write_checkpoint(tmp_path, 10, state_of(network(1, **wide), kinds=1), model={**MODEL, **wide})
    program = [
        sys.executable,
        str(ROOT / "tests/programs/export_memory.py"),
        str(tmp_path),
        "safetensors",
        "mae-full",
    ]
    for figures in json.loads(
        subprocess.run(program, check=True, text=True, capture_output=True).stdout
    ):
        assert figures["written"] > 100e6
        assert figures["rise"] < 2 * figures["largest"] + 40e6, figures


# -------------------------------------------------------------------------------------------- files


def test_a_published_training_checkpoint_is_read(networks, tmp_path):
    """As the published code saves it: wrapped student, plain teacher, optimizer, loss scale,
    options.
    """
    student, teacher = (networks[which].state_dict() for which in ("student", "teacher"))
    optimizer = torch.optim.AdamW(networks["student"].parameters()).state_dict()
    document = {
        "student": {f"module.{name}": value for name, value in student.items()},
        "teacher": teacher,
        "student_without_ddp": student,
        "teacher_without_ddp": teacher,
        "optimizer": optimizer,
        "epoch": 7,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="rc_vit_tiny_patch16", betas=(0.9, 0.95)),
    }
    torch.save(document, tmp_path / "checkpoint-7.pth")
    read = load_weights(tmp_path / "checkpoint-7.pth")
    assert read.layout == "rcmae"
    assert all(same(read.networks[which], networks[which]) for which in ("student", "teacher"))
    assert (read.about["epoch"], read.about["args"].betas) == (7, (0.9, 0.95))


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_bomb_does_not_go_off(networks, zipped, tmp_path):
    document = {"model": networks["student"].state_dict(), "args": Bomb(tmp_path / "went off")}
    torch.save(document, tmp_path / "bomb.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"bomb\.pth asks for \S*mkdir.*nothing was run"):
        load_weights(tmp_path / "bomb.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(document, protocol=2))
    with pytest.raises(ValueError, match=r"bare\.pth"):
        load_weights(tmp_path / "bare.pth")
    assert not (tmp_path / "went off").exists()


def drop(state: dict[str, Any]) -> None:
    del state["blocks.2.attn.qkv.weight"], state["norm.bias"]


def add(state: dict[str, Any]) -> None:
    state["head.weight"] = torch.zeros(10, 48)


def widen(state: dict[str, Any]) -> None:
    state["blocks.0.mlp.fc2.weight"] = torch.zeros(48, 191)


def skip(state: dict[str, Any]) -> None:
    for name in [name for name in state if name.startswith("blocks.1.")]:
        state[name.replace("blocks.1.", "blocks.3.")] = state.pop(name)


def claim(state: dict[str, Any]) -> None:
    state["norm.weight"] = torch.zeros(1).expand(48)


def count(state: dict[str, Any]) -> None:
    state["norm.weight"] = torch.zeros(48, dtype=torch.int64)


def speak(state: dict[str, Any]) -> None:
    state["norm.weight"] = "nothing"


def empty(state: dict[str, Any]) -> None:
    state.clear()


def flatten(state: dict[str, Any]) -> None:
    state["patch_embed.proj.weight"] = torch.zeros(48, 192)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, r"model lacks blocks\.2\.attn\.qkv\.weight, norm\.bias"),
        (add, r"model has unknown head\.weight"),
        (widen, r"model has blocks\.0\.mlp\.fc2\.weight 48x191 instead of 48x192"),
        (skip, r"lacks blocks\.1\.norm1\.weight.* and 7 more; model has unknown blocks\.3\."),
        (claim, r"not dense tensors of floats, such as norm\.weight"),
        (count, r"not dense tensors of floats, such as norm\.weight"),
        (speak, r"not dense tensors of floats, such as norm\.weight"),
        (
            empty,
            r"it has no patch_embed\.proj\.weight: no masked autoencoder, nor the encoder of one",
        ),
        (flatten, r"shapes of its first weights"),
    ],
)
def test_weights_of_no_such_network_are_refused(networks, damage, message, tmp_path):
    state = dict(networks["student"].state_dict())
    damage(state)
    torch.save({"model": state}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "value", [torch.zeros(3), [1, 2], {"model": torch.zeros(2)}, {"teacher": None}, 7]
)
def test_a_file_of_something_else_is_refused(value, tmp_path):
    torch.save(value, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="not weights by name"):
        load_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("layout", ["safetensors", "mae", "rcmae"])
def test_a_damaged_file_is_refused_however_it_was_cut(run, layout, tmp_path):
    manifest, _ = find_checkpoint(run)
    whole, cut = tmp_path / f"whole{SUFFIX[layout]}", tmp_path / f"cut{SUFFIX[layout]}"
    export(manifest, whole, layout=layout)
    data = whole.read_bytes()
    for stop in (0, 1, 7, 100, len(data) // 2, len(data) - 1):
        cut.write_bytes(data[:stop])
        with pytest.raises(ValueError, match="cut"):
            load_weights(cut)
    cut.write_text("a text, and no weights")
    with pytest.raises(ValueError, match="cut"):
        load_weights(cut)
    with pytest.raises(ValueError, match="no such file"):
        load_weights(tmp_path / "nowhere.pth")
