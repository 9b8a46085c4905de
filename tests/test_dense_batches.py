"""Images with maps or objects are the same for any ranks and workers: pixels, targets, and what the
losses draw of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_detect
import yaml
from scenes import write_scenes
from streams import flat_stream
from torch import Tensor

from rcmae import config
from rcmae.config import Recipe
from rcmae.data.batch import Batch
from rcmae.data.index import ShardIndex
from rcmae.data.plan import Plan
from rcmae.objectives.detection import DetectionLoss
from rcmae.tasks.registry import task_of

IMAGES, STEPS = 8, 2
DETECTOR: Any = SimpleNamespace(num_anchors=lambda size: 50, drop_path_rates=[0.0, 0.5])


def detecting(folder: Path) -> Recipe:
    test_detect.pack(folder / "train-0.tar", range(16), empty=[3])
    tree = {
        "task": {"name": "detect"},
        "model": {"name": "vit_tiny_patch16", "image_size": 64},
        "data": {"shards": str(folder / "train-0.tar")},
        "detect": {"category_ids": [7, 2], "scale": [0.5, 1.5]},
        "schedule": {"steps": STEPS, "lr": 1e-3},
    }
    (folder / "detect.yaml").write_text(yaml.safe_dump(tree))
    return config.load(str(folder / "detect.yaml"), [])


def segmenting(folder: Path) -> Recipe:
    return config.load(str(write_scenes(folder)), ["segment.num_classes=5"])


def seen(recipe: Recipe, world: int, workers: int) -> dict[int, list[bytes]]:
    """Position -> all that is of the image there, over all ranks."""
    task = task_of(recipe)
    members = task.members(recipe)
    assert members is not None
    index = ShardIndex.open(recipe.data.shards, needs=members.kinds)
    found: dict[int, list[bytes]] = {}
    for rank in range(world):
        stream = flat_stream(
            index=index,
            plan=Plan(index.counts, seed=0, images=IMAGES, streams=4, window=8),
            transform=task.transform(recipe),
            mask=task.mask(recipe),
            seed=1,
            members=members,
            micro=IMAGES // world // 2,
            rank=rank,
            world=world,
            workers=workers,
        )
        steps = stream.steps(0)
        for _ in range(STEPS):
            for batch in next(steps):
                found |= rows(recipe, batch)
        stream.close()
    return found


def rows(recipe: Recipe, batch: Batch) -> dict[int, list[bytes]]:
    assert batch.extra is not None
    columns: list[Any] = [batch.images, batch.crops, *batch.extra.values()]
    if recipe.task.name == "detect":
        draws = DetectionLoss(seed=3).draws(DETECTOR, batch)
        columns += [draws.anchors, draws.regions, draws.keep]
    found = {}
    for row, position in enumerate(batch.positions.tolist()):
        parts: list[Tensor] = [column[row] for column in columns]
        found[position] = [part.numpy().tobytes() for part in parts]
    return found


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there are two cores
@pytest.mark.parametrize("make", [detecting, segmenting])
def test_ranks_and_workers_change_nothing(make: Any, tmp_path: Path) -> None:
    recipe = make(tmp_path)
    wanted = seen(recipe, world=1, workers=0)
    assert sorted(wanted) == list(range(IMAGES * STEPS))
    assert len({tuple(each) for each in wanted.values()}) == len(wanted)
    for world, workers in ((2, 0), (4, 0), (1, 1), (1, 3), (2, 3)):
        assert seen(recipe, world, workers) == wanted, f"{world} ranks, {workers} workers"
