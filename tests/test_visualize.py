"""Pictures show what they say: the right patches hidden, pasted ones untouched, nothing of
hidden ones leaked.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_convert import file, model  # noqa: F401, fixtures

from rcmae.commands.evaluation import visualize as command
from rcmae.data.batch import Batch
from rcmae.data.masking import random_ids
from rcmae.errors import Refused
from rcmae.evaluation import visualisation
from rcmae.evaluation.images import load_images
from rcmae.models.vit import MaskedAutoencoder
from rcmae.objectives.mae import pixel_targets
from rcmae.weights.reading import NetworkWeights
from runs import Folder, start

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def batch() -> Batch:
    ids = torch.from_numpy(np.stack([random_ids(0, index, 16) for index in range(2)]))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return Batch(images, ids, 4, None, ("a", "b"), torch.empty(0), torch.empty(0))


def blocks(images: torch.Tensor) -> torch.Tensor:
    # [B, L, C, p, p]
    return images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


@pytest.mark.parametrize("norm", visualisation.NORMS.values())
@pytest.mark.parametrize("statistics", ["visible", "true", "none"])
def test_visible_patches_are_untouched_and_hidden_ones_are_predicted(
    statistics: str,
    norm: Any,
    batch: Batch,
    model: MaskedAutoencoder,  # noqa: F811
) -> None:
    filled = visualisation.pasted(model, batch, norm=norm, statistics=statistics)
    for image, ids in enumerate(batch.ids_shuffle):
        same = (blocks(filled)[image] == blocks(batch.images)[image]).flatten(1).all(1)
        assert set(same.nonzero().flatten().tolist()) == set(ids[:4].tolist())
    raw = visualisation.pasted(model, batch, norm=norm, statistics=statistics, raw=True)
    hidden = batch.ids_shuffle[0, 4:]
    assert torch.equal(blocks(raw)[0, hidden], blocks(filled)[0, hidden])
    assert not torch.equal(
        blocks(raw)[0, batch.ids_shuffle[0, :4]], blocks(batch.images)[0, batch.ids_shuffle[0, :4]]
    )


@pytest.mark.parametrize("norm", ["unbiased", "biased", "channel"])
def test_what_is_hidden_does_not_leak_unless_asked(
    norm: Any,
    batch: Batch,
    model: MaskedAutoencoder,  # noqa: F811
) -> None:
    other = batch.images.clone()
    for image, ids in enumerate(batch.ids_shuffle):
        for place in ids[4:].tolist():
            top, left = place // 4 * 8, place % 4 * 8
            other[image, :, top : top + 8, left : left + 8] += 2.0
    changed = replace(batch, images=other)
    for statistics, leaks in (("visible", False), ("none", False), ("true", True)):
        one, two = (
            visualisation.pasted(model, each, norm=norm, statistics=statistics)
            for each in (batch, changed)
        )
        assert torch.equal(one, two) != leaks


@pytest.mark.parametrize("norm", ["unbiased", "biased", "channel"])
def test_what_training_took_out_is_put_back(norm: Any, batch: Batch) -> None:
    """A network that predicts its targets exactly gives the image back, by whichever mean and
    deviation they are.
    """
    targets = pixel_targets(
        batch.images, torch.arange(16).expand(2, 16), 16, norm_pix=True, kind=norm
    )

    class Perfect:
        patch_size, image_size, in_channels = 8, (32, 32), 3

        def __call__(self, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
            return {"all_pixels": targets}

    filled = visualisation.pasted(Perfect(), batch, norm=norm, statistics="true", raw=True)
    torch.testing.assert_close(filled, batch.images, rtol=1e-4, atol=1e-4)


def test_the_normalisation_is_the_recipes_own() -> None:
    def of(**objective: Any) -> Any:
        source = NetworkWeights(
            {}, None, {}, "a run", {"recipe": json.dumps({"objective": objective})}
        )
        return visualisation.norm_of(source)

    assert of(name="mae", norm_pix_loss=True, pixel_norm=None) == "unbiased"
    assert of(name="mae", norm_pix_loss=True, pixel_norm="biased") == "biased"
    assert of(name="mae", norm_pix_loss=False, pixel_norm="biased") is None


def test_every_kind_of_a_run_is_drawn_and_put_on_one_page(
    uninterrupted: Folder, photo_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard, out = photo_shards.replace("{000000..000005}", "000000"), tmp_path / "run" / "pictures"
    for kind in ("reconstruct", "attention", "features", "filters"):
        count = ["--count", "40"] if kind == "features" else ["--count", "2"]
        where = [] if kind == "filters" else ["--images", shard]
        assert command.main([kind, str(uninterrupted.path), "--out", str(out), *where, *count]) == 0
    names = {path.stem for path in out.glob("*.png")}
    assert names == {"reconstruction", "attention", "features", "tsne", "filters", "positions"}
    picture = np.asarray(Image.open(out / "reconstruction.png", formats=["PNG"]))
    assert picture.shape[1] > 6 * 160  # input, masked, and two of each network
    capsys.readouterr()
    assert command.main(["page", str(tmp_path / "run"), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)["written"]
    assert written == [str(tmp_path / "run" / "pictures.html")]
    page = (tmp_path / "run" / "pictures.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert "http" not in page


def test_attention_without_a_class_token_is_that_of_the_patches(
    tiny: Path, photo_shards: str, tmp_path: Path
) -> None:
    run, shard = tmp_path / "run", photo_shards.replace("{000000..000005}", "000000")
    tokenless = ["objective.name=mae", "model.cls_token=false", "model.decoder_cls=false"]
    assert start(tiny, run, "run.stop_after_steps=1", *tokenless) == 75
    for kind in ("attention", "features", "filters"):
        where = [] if kind == "filters" else ["--images", shard, "--count", "8"]
        assert command.main([kind, str(run), "--out", str(tmp_path), *where]) == 0
    assert (tmp_path / "attention.png").is_file()


def test_files_and_folders_are_images_too(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg"):
        Image.fromarray(
            np.random.default_rng(0).integers(0, 255, (40, 50, 3)).astype(np.uint8)
        ).save(tmp_path / name)
    shown = load_images([tmp_path], (32, 32), HALF, 9)
    assert shown.names == ["a.jpg", "b.png"]
    assert shown.pixels.shape == (2, 3, 32, 32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image in"):
        load_images([tmp_path / "empty"], (32, 32), HALF, 9)


def test_the_first_images_of_a_folder_of_classes_are_of_all_classes(tmp_path: Path) -> None:
    for name in (
        "cat/0.png",
        "cat/1.png",
        "cat/2.png",
        "dog/3.JPG",
        "dog/deep/4.png",
        ".bin/5.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 50)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("of the folder\n")
    assert load_images([tmp_path], (32, 32), HALF, 2).names == ["0.png", "3.JPG"]
    shown = load_images([tmp_path], (32, 32), HALF, 9)
    assert shown.names == ["0.png", "3.JPG", "1.png", "4.png", "2.png"]


def test_mistakes_are_answered(
    file: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.main(["attention", str(file), "--out", str(tmp_path)]) == 2
    assert "needs --images" in capsys.readouterr().err
    gone = str(tmp_path / "gone.jpg")
    assert command.main(["attention", str(file), "--images", gone]) == 2
    assert f"--images {gone}: no such file or folder" in capsys.readouterr().err
    assert command.main(["page", str(tmp_path)]) == 2
    assert "has no pictures" in capsys.readouterr().err
    assert command.main(["filters", str(file)]) == 2
    assert "give --out" in capsys.readouterr().err


def test_the_commands_choices_are_those_of_the_library() -> None:
    for name in ("NORMS", "STATISTICS", "PLANES"):
        assert getattr(command, name) == tuple(getattr(visualisation, name)), name


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "b.tar").write_bytes(b"no tar" * 500)
    with pytest.raises(Refused, match=r"a\.png is not an image"):
        load_images([tmp_path / "a.png"], (32, 32), HALF, 9)
    with pytest.raises(Refused, match=r"b\.tar cannot be read as a tar"):
        load_images([tmp_path / "b.tar"], (32, 32), HALF, 9)


def test_umap_without_its_package_is_a_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ValueError, match="pip install umap-learn"):
        visualisation.umap(np.zeros((40, 8), np.float32), 0)


def test_colours_of_tokens_follow_their_largest_differences() -> None:
    tokens = torch.zeros(1, 30, 8)
    tokens[0, :15, 2] = 10.0
    colours = visualisation.principal_colours(
        tokens + 0.01 * torch.randn(1, 30, 8, generator=torch.Generator().manual_seed(0))
    )
    assert abs(colours[0, :15, 0].mean() - colours[0, 15:, 0].mean()) > 0.8
