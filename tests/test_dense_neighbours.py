"""Patches of labelled pictures vote for the pixels of others; student and teacher are judged so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
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
