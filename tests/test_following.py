"""Generic recipes: network, images and sizes follow from the weights and the data, and stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_finetune import start

from rcmae import config
from rcmae.config import Recipe
from rcmae.errors import Refused
from rcmae.models.classifier import Classifier
from rcmae.models.sizes import NetworkSizes
from rcmae.tasks.following import batch_for, follow, size_values
from runs import Folder

GENERIC = Path("finetune")
HEAD = ["classify.rand_augment=null", "data.workers=0", "log.tensorboard=false", "log.report=false"]


def loaded(*overrides: str, name: str = "finetune") -> Recipe:
    return config.load(name, ["data.shards=photos.tar", *overrides])


def test_a_recipe_that_names_no_network_trains_that_of_the_weights_and_resumes(
    photo_shards: str, uninterrupted: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Folder(tmp_path / "run")
    one = photo_shards.replace("{000000..000005}", "000000")
    words = [f"data.shards={photo_shards}", f"evaluate.test_shards={one}", *HEAD]
    words += ["schedule.steps=4", "schedule.warmup_steps=1", f"classify.init={uninterrupted.path}"]
    assert start(GENERIC, run.path, *words, "run.stop_after_steps=2") == 75
    assert "model.embed_dim=64" in capfd.readouterr().out
    uninterrupted.path.rename(tmp_path / "away")
    try:
        assert start(GENERIC, run.path, *words) == 0  # what it took is in the run
    finally:
        (tmp_path / "away").rename(uninterrupted.path)
    recipe = config.load(str(run.path / "recipe.yaml"))
    assert (recipe.model.image_size, recipe.model.embed_dim, recipe.model.depth) == (32, 64, 3)
    assert (recipe.batch.images, recipe.classify.num_classes) == (16, 8)
    # judged, at the end too, though nobody said how often
    assert run.events("evaluate")[-1]["step"] == 4


def test_what_is_given_goes_over_what_would_follow(uninterrupted: Folder) -> None:
    init = f"classify.init={uninterrupted.path}"
    recipe = loaded(init, "model.image_size=64", "data.mean=[0.5,0.5,0.5]", "batch.images=12")
    found = follow(recipe, before=None, samples=4000, world=1)
    assert found.recipe.model.image_size == 64
    assert found.recipe.model.num_heads == 4
    assert found.recipe.data.mean == (0.5, 0.5, 0.5)
    assert found.recipe.batch.images == 12
    assert "image_size" not in found.notes[0]


def test_a_file_without_a_recipe_tells_by_its_shapes(tmp_path: Path) -> None:
    sizes = NetworkSizes((32, 32), 16, 3, embed_dim=192, depth=12, num_heads=3)
    model = Classifier(sizes, num_classes=0, pool="mean")
    path = tmp_path / "tiny.pth"
    torch.save(dict(model.state_dict()), path)
    found = follow(loaded(f"classify.init={path}"), before=None, samples=4000, world=1).recipe
    assert (found.model.name, found.model.image_size) == ("vit_tiny_patch16", 32)
    assert (found.model.num_heads, found.model.depth) == (3, 12)
    assert found.data.mean == config.DataOptions().mean


def test_without_weights_there_is_nothing_to_follow() -> None:
    with pytest.raises(Refused, match="give a run, a checkpoint or a file"):
        follow(loaded(), before=None, samples=100, world=1)


def test_the_batch_is_one_that_the_ranks_divide_in_pairs() -> None:
    assert batch_for("finetune", 64, 1) == 8
    assert batch_for("finetune", 1000, 1) == 64
    assert batch_for("finetune", 1_281_167, 8) == 1024
    assert batch_for("probe", 1_281_167, 8) == 16384
    for world in range(1, 65):
        for samples in (1, 30, 1000, 50_000, 1_281_167):
            images = batch_for("finetune", samples, world)
            assert images % (2 * world) == 0
            assert images >= 2 * world


def test_several_ranks_are_given_an_engine_unless_one_is_named() -> None:
    assert size_values(loaded(), 1000, 2)["engine.name"] == "fsdp2"
    assert "engine.name" not in size_values(loaded("engine.name=local"), 1000, 2)
    assert "engine.name" not in size_values(loaded(), 1000, 1)
    judged = size_values(loaded("evaluate.test_shards=a.tar", "schedule.steps=50"), 1000, 1)
    assert judged["evaluate.every_steps"] == 5


def test_a_probe_follows_too(photo_shards: str, uninterrupted: Folder, tmp_path: Path) -> None:
    words = [f"data.shards={photo_shards}", *HEAD[1:], "schedule.steps=2"]
    words += ["schedule.warmup_steps=1", f"classify.init={uninterrupted.path}"]
    assert start(Path("probe"), tmp_path / "run", *words) == 0
    assert config.load(str(tmp_path / "run" / "recipe.yaml")).batch.images == 32
