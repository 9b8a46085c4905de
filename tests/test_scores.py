"""Scores are exact: padding is left out, every figure agrees with its definition."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, log_loss, top_k_accuracy_score

from rcmae.data.batch import Batch
from rcmae.evaluation.confusion import confusion_picture
from rcmae.evaluation.scores import classify, scores_table

CLASSES = 7


def batches(labels: torch.Tensor, size: int) -> list[Batch]:
    """The number of a sample is in its first pixel; the last batch is padded."""
    found = []
    for start in range(0, len(labels), size):
        numbers = torch.arange(start, start + size)
        real = numbers < len(labels)
        images = torch.where(real, numbers, 0).float().view(-1, 1, 1, 1)
        positions = torch.where(real, numbers, -1)
        rows = labels[torch.where(real, numbers, 0)]
        found.append(
            Batch(images, torch.zeros(size, 0), 0, rows, (), positions, torch.zeros(size, 5))
        )
    return found


@pytest.fixture
def judged() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(53, CLASSES, generator=generator), torch.randint(
        CLASSES, (53,), generator=generator
    )


def test_every_figure_is_by_its_definition(judged: tuple[torch.Tensor, torch.Tensor]) -> None:
    scores, labels = judged
    found = classify(
        lambda images: scores[images.flatten().long()],
        batches(labels, 8),
        num_classes=CLASSES,
        device=torch.device("cpu"),
        normalise=lambda images: images,
    )
    shares, every = scores.double().softmax(1), range(CLASSES)
    assert found.images == 53
    assert found.top1 == pytest.approx(
        100 * top_k_accuracy_score(labels, shares, k=1, labels=every), abs=1e-4
    )
    assert found.top5 == pytest.approx(
        100 * top_k_accuracy_score(labels, shares, k=5, labels=every), abs=1e-4
    )
    assert found.loss == pytest.approx(log_loss(labels, shares, labels=every), rel=1e-6)
    assert np.array_equal(
        found.confusion.numpy(), confusion_matrix(labels, shares.argmax(1), labels=every)
    )
    sure, right = shares.max(1).values, (shares.argmax(1) == labels).double()
    bins = (sure * 15).ceil().clamp(min=1)
    error = sum(abs((sure - right)[bins == b].sum().item()) for b in range(1, 16)) / 53
    assert found.calibration_error == pytest.approx(error, abs=1e-5)
    rows = found.classes(["a"])
    assert rows[0]["name"] == "a"
    assert sum(row["images"] for row in rows) == 53
    assert sum(row["images"] * row["top1"] / 100 for row in rows) == pytest.approx(
        found.confusion.trace().item()
    )
    true, guess, count = found.confused()[0]
    assert true != guess
    assert found.confusion[true, guess] == count
    assert f"{found.top1:.2f}" in scores_table({"student": found})


def test_classes_of_a_subset_alone_compete(judged: tuple[torch.Tensor, torch.Tensor]) -> None:
    scores, labels = judged
    some = labels % 2 * 3  # classes 0 and 3
    found = classify(
        lambda images: scores[images.flatten().long()],
        batches(some, 8),
        num_classes=CLASSES,
        device=torch.device("cpu"),
        normalise=lambda images: images,
        among=[0, 3],
    )
    guess = torch.where(scores[:, 3] > scores[:, 0], 3, 0)
    assert found.top1 == pytest.approx(100 * (guess == some).double().mean().item(), abs=1e-4)
    with pytest.raises(ValueError, match="labels 3 are none of the 1 classes"):
        classify(
            lambda images: scores[images.flatten().long()],
            batches(some, 8),
            num_classes=CLASSES,
            device=torch.device("cpu"),
            normalise=lambda images: images,
            among=[0],
        )


def test_the_confusion_picture_is_dark_where_mistakes_are() -> None:
    confusion = torch.diag(torch.full((50,), 4))
    confusion[10, 10], confusion[10, 30] = 0, 4
    picture = confusion_picture(confusion, title="student")
    matrix = picture[:, : int(0.88 * picture.shape[1])].astype(int)  # without the scale
    dark = matrix[:, :, 2] > matrix[:, :, 0] + 70  # blue
    down, across = np.nonzero(dark)
    side = (down.max() + 1 - down.min()) / 50
    for (row, column), is_dark in {(10, 30): True, (10, 10): False, (11, 11): True}.items():
        at = (int(down.min() + (row + 0.5) * side), int(across.min() + (column + 0.5) * side))
        assert dark[at] == is_dark, (row, column)
    named = confusion_picture(confusion[:12, :12], ["frog"] * 12, title="student")
    assert named.shape[2] == 3
