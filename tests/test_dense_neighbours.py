"""Patches of labelled pictures vote for the pixels of others; student and teacher are judged so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scenes import CLASSES, write_scenes
from torch import Tensor

from rcmae.data.dense.maps import NONE
from rcmae.errors import Refused
from rcmae.evaluation.dense.neighbours import (
    Bank,
    Reading,
    Seen,
    class_counts,
    fill_bank,
    judge_patches,
    patch_pixels,
    vote,
)
from runs import Folder, start
from tests.conftest import Ranks

GRID = (2, 3)
PATCH = 4


def a_reading(batch: int = 4) -> Reading:
    """The mean colour of each patch."""

    def colours(images: Tensor) -> Tensor:
        return patch_pixels(PATCH)(images).unflatten(2, (3, -1)).mean(dim=3) + 1e-3

    return Reading({"colour": colours}, batch, lambda images: images.float(), torch.device("cpu"))


def a_picture(number: int, classes: list[int]) -> tuple[Tensor, Tensor]:
    """Each patch in the colour of its class [3, 8, 12], and the classes' map, twice as large."""
    grid = torch.tensor(classes).view(*GRID)
    image = torch.zeros(3, *GRID, dtype=torch.uint8)
    for index in range(3):
        image[index][grid == index] = 200 + number
    labels = grid.to(torch.uint8)
    return (
        image.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2),
        labels.repeat_interleave(2 * PATCH, 0).repeat_interleave(2 * PATCH, 1),
    )


def learnt(number: int, classes: list[int]) -> Seen:
    image, labels = a_picture(number, classes)
    return Seen(number, image, torch.from_numpy(class_counts(labels.numpy(), GRID, 3)))


def test_class_counts_are_of_each_patch_and_leave_out_what_has_no_label() -> None:
    labels = np.array([[0, 0, 1, 1, 2], [0, NONE, 1, 1, 2], [2, 2, 2, NONE, NONE]], np.uint8)
    counts = class_counts(labels, (1, 2), 3)  # of five columns the first three are the left patch's
    assert counts.tolist() == [[3, 2, 3], [0, 2, 2]]


def test_a_vote_is_the_weighted_mean_of_the_nearest_shares() -> None:
    bank = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), dim=1)
    shares = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    found = vote(torch.tensor([[2.0, 0.0]]), bank, shares, k=2, temperature=0.1)
    weights = torch.tensor([1.0, 0.5**0.5]).div(0.1).softmax(0)
    torch.testing.assert_close(found[0], weights[0] * shares[0] + weights[1] * shares[1])


@pytest.mark.parametrize("batch", [1, 4])
def test_colours_tell_classes_of_colours(batch: int) -> None:
    reading = a_reading(batch)
    train = [learnt(0, [0, 1, 2, 0, 1, 2]), None, learnt(1, [2, 2, 1, 1, 0, 0])]
    bank = fill_bank(reading, train, size=100, num_pictures=2, seed=0)
    assert bank.shares.sum(dim=1).tolist() == [1.0] * 12
    image, labels = a_picture(5, [1, 1, 1, 0, 0, 0])  # halves: no border is interpolated wrongly
    labels[0] = NONE
    test = [Seen(0, image, labels), None]
    matrix = judge_patches(reading, bank, test, grid=GRID, k=3, temperature=0.02)["colour"]
    assert int(matrix.sum()) == int((labels != NONE).sum())
    assert int(matrix.diagonal().sum()) == int(matrix.sum())


def test_a_bank_has_as_many_patches_of_each_picture_drawn_by_its_number() -> None:
    pictures = [learnt(number, [0, 1, 2, 0, 1, 2]) for number in range(4)]
    small = fill_bank(a_reading(), pictures, size=8, num_pictures=4, seed=0)
    assert len(small.shares) == 8
    first, *others = small.shares.view(4, 2, 3)
    assert not all(torch.equal(first, each) for each in others)
    turned = fill_bank(a_reading(3), pictures[::-1], size=8, num_pictures=4, seed=0)
    assert torch.equal(small.vectors["colour"], turned.vectors["colour"])
    assert torch.equal(small.shares, turned.shares)
    other = fill_bank(a_reading(), pictures, size=8, num_pictures=4, seed=1)
    assert not torch.equal(small.shares, other.shares)


def test_what_cannot_vote_is_refused() -> None:
    unlabelled = Seen(0, torch.zeros(3, 8, 12, dtype=torch.uint8), torch.zeros(6, 3).long())
    with pytest.raises(Refused, match="no patch of it has a label"):
        fill_bank(a_reading(), [unlabelled], size=9, num_pictures=1, seed=0)
    bank = Bank({"colour": torch.eye(3)}, torch.eye(3))
    with pytest.raises(Refused, match="k=4 neighbours of 3 labelled patches"):
        judge_patches(a_reading(), bank, [], grid=GRID, k=4, temperature=0.02)


# ------------------------------------------------------------------------------------ in a training


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with maps: train.tar, val.tar and classes.txt."""
    return write_scenes(tmp_path_factory.mktemp("scenes")).parent


def dense(scenes: Path, **changed: object) -> list[str]:
    """Keys that judge a training of four steps by pictures with maps alone."""
    keys = {"train_shards": scenes / "train.tar", "test_shards": scenes / "val.tar", "k": 5}
    words = [f"evaluate.dense.{key}={value}" for key, value in (keys | changed).items()]
    short = ["schedule.steps=4", "schedule.warmup_steps=1", "evaluate.every_steps=4"]
    return [*short, "evaluate.batch=4", *words]


def test_student_and_teacher_are_judged_beside_what_does_not_train(
    tiny: Path, scenes: Path, tmp_path: Path, ranks: Callable[..., Ranks]
) -> None:
    alone = Folder(tmp_path / "alone")
    assert start(tiny, alone.path, *dense(scenes)) == 0
    [event] = alone.events("evaluate")
    found = event["dense"]["networks"]
    assert found.keys() == {"student", "teacher", "random", "pixels"}
    assert all(0 < row["miou"] < row["aacc"] <= 100 for row in found.values())
    assert found["random"]["aacc"] > 40  # chance is 25: classes are of brightness and side
    document = json.loads((alone.path / "evaluation/step-00000004.json").read_text())
    assert [row["name"] for row in document["dense"]["student"]["classes"]] == list(CLASSES)
    two = Folder(tmp_path / "two")
    words = [*dense(scenes), f"run.dir={two.path}", "engine.name=fsdp2"]
    assert ranks("-m", "rcmae.train", tiny, *words).wait() == [0, 0]
    for name in ("random", "pixels"):  # the trained ones differ by rounding
        assert two.events("evaluate")[0]["dense"]["networks"][name] == found[name]


def test_names_of_classes_come_from_the_file_that_is_given(
    tiny: Path, scenes: Path, tmp_path: Path
) -> None:
    for name in ("train.tar", "val.tar"):
        shutil.copy(scenes / name, tmp_path)
    (tmp_path / "names.txt").write_text("\n".join(each.upper() for each in CLASSES))
    sets = {"train_shards": tmp_path / "train.tar", "test_shards": tmp_path / "val.tar"}
    folder = tmp_path / "run"
    assert start(tiny, folder, *dense(scenes, **sets, class_names=tmp_path / "names.txt")) == 0
    document = json.loads((folder / "evaluation/step-00000004.json").read_text())
    rows = document["dense"]["student"]["classes"]
    assert [row["name"] for row in rows] == [each.upper() for each in CLASSES]


def test_sets_that_cannot_be_judged_are_refused_before_anything_is_written(
    tiny: Path, scenes: Path, photo_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(scenes / "val.tar", other / "val.tar")
    (other / "classes.txt").write_text("\n".join(reversed(CLASSES)))
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("train.tar", "val.tar"):
        shutil.copy(scenes / name, bare / name)
    cases = [
        (
            {"test_shards": "[]"},
            "evaluate.dense.train_shards and test_shards, both with",
        ),
        ({"test_shards": scenes / "train.tar"}, "the same shards, or copies of them"),
        ({"test_shards": other / "val.tar"}, "different classes"),
        ({"train_shards": photo_shards}, "evaluate.dense.train_shards: no sample has a .seg.png"),
        (
            {"train_shards": bare / "train.tar", "test_shards": bare / "val.tar"},
            "evaluate.dense.num_classes: give it",
        ),
        ({"class_names": other / "classes.txt"}, f"evaluate.dense.class_names={other}/classes"),
        ({"class_names": tmp_path / "none.txt"}, "evaluate.dense.class_names: "),
        ({"k": 0}, "evaluate.dense.k"),
        ({"k": 5000}, "evaluate.dense.train_shards have 384 patches; use fewer"),
        (
            {"num_classes": 2},
            "evaluate.dense.test_shards: each of the 7 maps looked at has numbers beyond 1, the "
            "last that evaluate.dense.num_classes=2 allows; they run to 3",
        ),
    ]
    for changed, said in cases:
        folder = tmp_path / "run"
        assert start(tiny, folder, *dense(scenes, **changed)) == 2, changed
        assert said in capsys.readouterr().err, changed
        assert not folder.exists()
