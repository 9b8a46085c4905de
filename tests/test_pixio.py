"""Class tokens, registers, learned positions, blocks and drop path do what they say; their weights
go in and out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rcmae import config
from rcmae.data.masking import GridMask
from rcmae.models.build import new_teacher
from rcmae.models.classifier import Classifier
from rcmae.models.detection.vitdet import positions_for
from rcmae.models.fitting import fit_weights
from rcmae.models.segmentation.backbone import Form
from rcmae.models.segmentation.fitting import fit_encoder
from rcmae.models.segmentation.segmenter import Heads, Segmenter
from rcmae.models.sizes import NetworkSizes
from rcmae.models.vit import Encoder, MaskedAutoencoder, StochasticDepth
from rcmae.objectives import new
from rcmae.tasks.following import follow, sizes_told
from rcmae.tasks.protocol import Ended
from rcmae.tasks.segment import Segmentation
from rcmae.weights.conversion import convert
from rcmae.weights.encoder import load_encoder
from rcmae.weights.names import family_names, from_timm
from rcmae.weights.reading import read_network
from rcmae.weights.starting import start_of

from timm.models.vision_transformer import VisionTransformer

SIZES = NetworkSizes(
    image_size=(16, 24),
    patch_size=4,
    in_channels=3,
    embed_dim=24,
    depth=3,
    num_heads=3,
    decoder_dim=16,
    decoder_depth=2,
    decoder_heads=2,
    class_tokens=3,
    registers=2,
)


def network(**options: Any) -> MaskedAutoencoder:
    return MaskedAutoencoder(SIZES, positions="learned", **options)


def some_images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def test_blocks_are_seen_or_hidden_as_one() -> None:
    mask = GridMask((8, 12), block=4, blocks_visible=2)
    places = np.arange(96).reshape(8, 12)
    for position in range(20):
        ids = mask.ids(3, position)
        assert sorted(ids) == list(range(96))
        seen = np.isin(places, ids[: mask.num_visible])
        shares = seen.reshape(2, 4, 3, 4).mean(axis=(1, 3))
        assert set(shares.ravel()) == {0.0, 1.0}
        assert shares.sum() == 2
    assert not np.array_equal(mask.ids(3, 0), mask.ids(4, 0))


@pytest.mark.parametrize(
    ("grid", "block", "visible", "said"),
    [
        ((14, 14), 4, 2, "mask_grid=2 or 7.*12x12 or 16x16 patches"),
        ((8, 8), 16, 1, "mask_grid=4, or a grid of 32x32 patches"),
        ((6, 6), 3, 0, "0 visible blocks of 4"),
        ((4, 4), 4, 1, "1 visible blocks of 1"),
    ],
)
def test_blocks_that_cannot_be_are_refused(
    grid: tuple[int, int], block: int, visible: int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        GridMask(grid, block, visible)


def test_registers_reach_no_feature_and_no_decoder() -> None:
    model = network()
    encoded = model(some_images(), outputs=("encoded", "class_tokens", "tokens"))
    assert [encoded[name].shape[1] for name in ("encoded", "class_tokens", "tokens")] == [25, 3, 24]
    tokens = model.encode(some_images())  # [B, 3 + 2 + 24, D]
    torch.testing.assert_close(encoded["encoded"][:, 0], tokens[:, :3].mean(dim=1))
    assert torch.equal(encoded["encoded"][:, 1:], tokens[:, 5:])
    seen = []
    model.decoder_embed.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    ids = torch.arange(24).expand(2, -1)
    assert model(some_images(), ids, 6)["pixels"].shape == (2, 18, 48)
    assert seen == [3 + 6]
    moved = model(some_images(), ids, 6)["pixels"]
    with torch.no_grad():
        model.reg_token += 1
    assert not torch.equal(model(some_images(), ids, 6)["pixels"], moved), "blocks see registers"


def test_learned_positions_are_weights_and_fixed_ones_are_not() -> None:
    learned = network()
    names = [name for name, _ in learned.named_parameters()]
    assert names[:5] == ["cls_token", "reg_token", "pos_embed", "mask_token", "decoder_pos_embed"]
    assert all(learned.place_of(name).decays for name in names[:5])
    assert not list(learned.buffers())
    fixed = MaskedAutoencoder(SIZES)
    assert {name for name, _ in fixed.named_buffers()} == {"pos_embed", "decoder_pos_embed"}
    assert not fixed.pos_embed[:, :3].any(), "class tokens have no place"
    assert fixed.bfloat16().pos_embed.dtype == torch.float32
    assert learned.bfloat16().pos_embed.dtype == torch.bfloat16


def test_a_classifier_reads_what_the_pretraining_gives() -> None:
    model = network()
    reader = Classifier(SIZES, num_classes=0, pool="cls").eval()
    weights = {name: value for name, value in model.state_dict().items() if "decoder" not in name}
    fit_weights(reader, weights, SIZES.grid)
    torch.testing.assert_close(reader.encoded(some_images()), model.encode(some_images()))
    both = model(some_images(), outputs=("encoded",))["encoded"][:, 0]
    torch.testing.assert_close(reader(some_images()), both)
    one = dataclasses.replace(SIZES, class_tokens=1, registers=0)
    with pytest.raises(ValueError, match="class_tokens"):
        fit_weights(Classifier(one, num_classes=0, pool="cls"), weights, SIZES.grid)


def test_drop_path_is_a_function_of_position_and_stays_out_of_teachers() -> None:
    model = network(drop_path=StochasticDepth(rate=0.9, seed=5))
    ids = torch.arange(24).expand(4, -1)
    images = some_images(1).expand(4, -1, -1, -1)
    positions = torch.tensor([0, 1, 2, 0])
    keep = model.branches(positions)
    assert keep is not None
    assert keep.shape == (4, 3, 2)
    assert keep[:, 0].all(), "the first block never drops"
    pixels = model(images, ids, 6, ("pixels",), keep)["pixels"]
    assert torch.equal(pixels[0], pixels[3])
    assert not torch.equal(pixels[0], pixels[1])
    whole = model(images, ids, 6)["pixels"]
    torch.testing.assert_close(whole[0], whole[1])
    assert model.eval().branches(positions) is None
    plain = network()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(images, ids, 6)["pixels"], whole)


def test_the_teacher_of_rcpixio_has_encoder_and_decoder() -> None:
    objective = new("rcpixio", consistency_weight=0.5)
    assert objective.weights == {"reconstruction": 1.0, "consistency": 0.5}
    student = network()
    teacher = new_teacher(student, objective.teacher_outputs)
    assert teacher is not None
    assert teacher.state_dict().keys() == student.state_dict().keys()


def published(folder: Path, sizes: NetworkSizes) -> Path:
    """A file of an encoder's weights as they are published: names and nothing else."""
    model = Encoder(sizes, positions="learned")
    for index, param in enumerate(model.parameters()):
        torch.nn.init.normal_(param, 0.0, 0.2, generator=torch.Generator().manual_seed(index))
    file = folder / "encoder.pth"
    torch.save(model.state_dict(), file)
    return file


def test_a_published_encoder_starts_a_pretraining_with_a_fresh_decoder(tmp_path: Path) -> None:
    square = dataclasses.replace(SIZES, image_size=(16, 16), registers=0)
    found = read_network(published(tmp_path, square))
    model = MaskedAutoencoder(square, positions="learned")
    with pytest.raises(ValueError, match="init_decoder=fresh"):
        start_of(model, found, "file")
    begun = start_of(model, found, "fresh")
    assert set(begun.taken) == found.weights.keys()
    model.load_state_dict(begun.state)
    assert torch.equal(model.pos_embed, found.weights["pos_embed"])
    larger = MaskedAutoencoder(
        dataclasses.replace(square, image_size=(24, 24)), positions="learned"
    )
    assert start_of(larger, found, "fresh").state["pos_embed"].shape == (1, 3 + 36, 24)
    fewer = MaskedAutoencoder(dataclasses.replace(square, class_tokens=2), positions="learned")
    with pytest.raises(ValueError, match="cls_token 1x3x24 instead of 1x2x24"):
        start_of(fewer, found, "fresh")


def test_transformers_and_timm_compute_the_same(tmp_path: Path) -> None:
    from transformers import PixioModel

    square = dataclasses.replace(SIZES, image_size=(16, 16), registers=0)
    source = read_network(published(tmp_path, square))
    images = some_images()[..., :16].double()
    mine = load_encoder(tmp_path / "encoder.pth", num_heads=3, pool="cls").double()
    tokens = mine.forward_features(images)
    convert(source, "pixio", tmp_path / "hf", num_heads=3)
    theirs = PixioModel.from_pretrained(tmp_path / "hf").double().eval()
    given = theirs(images)
    torch.testing.assert_close(given.last_hidden_state, tokens, atol=1e-13, rtol=0)
    torch.testing.assert_close(given.pooler_output, mine(images), atol=1e-13, rtol=0)
    for size in ((24, 16), (32, 32), (12, 20)):  # positions of its own, resized in float32
        images_of_size = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(3))
        other = load_encoder(tmp_path / "encoder.pth", num_heads=3, image_size=size)
        resized = theirs.float()(images_of_size, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(
            resized, other.forward_features(images_of_size), atol=1e-5, rtol=1e-5
        )
    back = read_network(tmp_path / "hf")
    assert all(torch.equal(back.weights[name], value) for name, value in source.weights.items())

    convert(source, "timm", tmp_path / "timm.safetensors", num_heads=3)
    model = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=3, reg_tokens=2, num_classes=0
    )
    model.load_state_dict(load_file(tmp_path / "timm.safetensors"))
    made = model.double().eval().forward_features(images)
    torch.testing.assert_close(made, tokens, atol=1e-13, rtol=0)
    again = load_encoder(tmp_path / "timm.safetensors", num_heads=3).double()
    torch.testing.assert_close(again.forward_features(images)[:, -16:], tokens[:, -16:])


@pytest.mark.parametrize("registers", [0, 2])
def test_what_timm_reads_is_read_back(registers: int) -> None:
    model = Encoder(dataclasses.replace(SIZES, registers=registers), positions="learned")
    for index, param in enumerate(model.parameters()):
        torch.nn.init.normal_(param, generator=torch.Generator().manual_seed(index))
    state = model.state_dict()
    back = from_timm(family_names(state, "timm"), SIZES.class_tokens, SIZES.num_patches)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_a_recipe_follows_class_tokens_and_a_message_names_them(tmp_path: Path) -> None:
    path = published(tmp_path, dataclasses.replace(SIZES, image_size=(16, 16), registers=0))
    given = [f"classify.init={path}", "data.shards=x.tar", "evaluate.test_shards=y.tar"]
    recipe = config.load("finetune", given, task="finetune")
    found = follow(recipe, before=None, samples=None, world=1).recipe
    assert found.model.class_tokens == SIZES.class_tokens
    source = read_network(path)
    told = sizes_told(source, "segment")
    assert told.endswith("model.class_tokens=3 segment.relative_positions=false")
    assert sizes_told(source, "classify").endswith("model.class_tokens=3")
    detector = sizes_told(source, "detect")
    assert "model.embed_dim=24" in detector
    assert "patch_size" not in detector
    assert "class_tokens" not in detector


def test_a_segmenter_is_offered_the_exports_that_it_has() -> None:
    offered = []
    for tokens in (1, 4):
        keys = [f"model.class_tokens={tokens}", "segment.relative_positions=false"]
        recipe = config.load("segment_camvid_demo", keys, task="segment")
        ended = Ended(recipe, Path("runs/x"), is_done=True, launcher="rcmae")
        commands = [command for _, command in Segmentation().hints(ended)]
        offered.append(any(command.startswith("rcmae export") for command in commands))
    assert offered == [True, False]
    for crop, transformers in (("[32,32]", True), ("[32,64]", False)):  # takes square images alone
        recipe = config.load("segment_camvid_demo", [f"segment.crop={crop}"], task="segment")
        ended = Ended(recipe, Path("runs/x"), is_done=True, launcher="rcmae")
        labels = [label for label, _ in Segmentation().hints(ended) if "mmseg" in label]
        assert ["hf-upernet" in label for label in labels] == [transformers]


def test_a_segmenter_computes_the_features_of_a_published_encoder_at_other_sizes(
    tmp_path: Path,
) -> None:
    square = dataclasses.replace(SIZES, image_size=(16, 16), registers=0)
    found = read_network(published(tmp_path, square))
    mine = load_encoder(tmp_path / "encoder.pth", num_heads=3, image_size=(24, 16))
    images = torch.randn(2, 3, 24, 16, generator=torch.Generator().manual_seed(1))
    sizes = dataclasses.replace(square, image_size=(24, 16))
    form, heads = Form((), relative_positions=False, layer_scale=False), Heads(5, kind="linear")
    model = Segmenter(sizes, form, heads).eval()
    fitted = fit_encoder(model, found.weights, found.grid)
    assert {name for name in found.weights if not name.startswith("norm.")} <= set(fitted.matched)
    (features,) = model.backbone(images)
    tokens = mine.forward_features(images)[:, 3:]
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), tokens, atol=1e-5, rtol=1e-5)
    other = Segmenter(dataclasses.replace(sizes, class_tokens=1), form, heads)
    with pytest.raises(ValueError, match="cls_token 1x3x24 instead of 1x1x24"):
        fit_encoder(other, found.weights, found.grid)


def test_a_detector_takes_the_patches_of_a_published_encoder(tmp_path: Path) -> None:
    square = dataclasses.replace(SIZES, image_size=(16, 16), registers=0)
    found = read_network(published(tmp_path, square))
    table = positions_for(found.weights["pos_embed"], (4, 4), (4, 4))
    assert torch.equal(table[:, 1:], found.weights["pos_embed"][:, 3:])
    assert positions_for(found.weights["pos_embed"], (4, 4), (6, 8)).shape == (1, 49, 24)


def test_what_other_models_lack_is_refused(tmp_path: Path) -> None:
    source = read_network(published(tmp_path, dataclasses.replace(SIZES, image_size=(16, 16))))
    with pytest.raises(ValueError, match="--to pixio"):
        convert(source, "huggingface", tmp_path / "mae", num_heads=3)
    with pytest.raises(ValueError, match="no registers"):
        convert(source, "pixio", tmp_path / "pixio", num_heads=3)
