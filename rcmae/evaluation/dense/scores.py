"""Intersection over union and accuracies of a segmentation, from one matrix of whole numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rcmae.data.dense.maps import none_of

WORST = 20  # confusions that are listed
CLASSES_SHOWN = 30  # of a table for people; more are in the document alone


def confusion(labels: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """[classes, classes] int64: pixels of each class, by what they were taken for. Those without a
    label are left out, whatever was predicted there.

    Args:
        labels: [...] classes, `none_of` them where there is no label.
        prediction: the same shape.
        num_classes: all labels lie below.
    """
    there = labels != none_of(labels)
    pairs = labels[there].long() * num_classes + prediction[there].long()
    counts = torch.bincount(pairs, minlength=num_classes**2)
    assert len(counts) == num_classes**2, "labels are checked where maps are read"
    return counts.view(num_classes, num_classes)


@dataclass(frozen=True)
class Areas:
    """Pixels of each class [classes] int64, summed over all images."""

    shared: Tensor  # labelled so and predicted so
    predicted: Tensor
    labelled: Tensor

    @staticmethod
    def of(matrix: Tensor) -> Areas:
        """Of a confusion matrix."""
        return Areas(matrix.diagonal(), matrix.sum(dim=0), matrix.sum(dim=1))

    @property
    def union(self) -> Tensor:
        """Labelled or predicted so."""
        return self.predicted + self.labelled - self.shared

    @property
    def iou(self) -> Tensor:
        """[classes] float64; NaN of a class that is in neither."""
        return self.shared.double() / self.union.double()

    @property
    def accuracy(self) -> Tensor:
        """[classes] float64; NaN of a class that no label has."""
        return self.shared.double() / self.labelled.double()

    @property
    def mean_iou(self) -> float:
        """Over the classes that are labelled or predicted anywhere: one that is only predicted
        counts as 0. NaN where nothing is labelled.
        """
        return float(self.iou.nanmean())

    @property
    def mean_accuracy(self) -> float:
        """Over the classes that are labelled."""
        return float(self.accuracy.nanmean())

    @property
    def pixel_accuracy(self) -> float:
        """Of all labelled pixels."""
        return float(self.shared.sum().double() / self.labelled.sum().double())

    def figures(self) -> dict[str, float]:
        """The three, in %."""
        return {
            "miou": 100.0 * self.mean_iou,
            "macc": 100.0 * self.mean_accuracy,
            "aacc": 100.0 * self.pixel_accuracy,
        }


def finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    """The figures, None for what is no number: JSON has none."""
    return {key: value if value == value else None for key, value in figures.items()}


def named(names: Sequence[str], num_classes: int) -> list[str]:
    """A name for each class: its number, where it has none."""
    return [names[index] if index < len(names) else str(index) for index in range(num_classes)]


def classes_table(matrix: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row a class for JSON, None where it has no value."""
    areas = Areas.of(matrix)
    total = max(int(areas.labelled.sum()), 1)
    rows = []
    for index, (iou, accuracy) in enumerate(
        zip(areas.iou.tolist(), areas.accuracy.tolist(), strict=True)
    ):
        rows.append(
            {
                "class": index,
                "name": names[index] if index < len(names) else str(index),
                "iou": _or_none(iou),
                "accuracy": _or_none(accuracy),
                "share": int(areas.labelled[index]) / total,
                "pixels": int(areas.labelled[index]),
            }
        )
    return rows


def worst_confusions(matrix: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """What was taken for what most often, of all labelled pixels."""
    wrong = matrix.clone().fill_diagonal_(0)
    total = max(int(matrix.sum()), 1)
    count = min(WORST, wrong.numel())
    pixels, places = wrong.flatten().topk(count)
    found = []
    for number, place in zip(pixels.tolist(), places.tolist(), strict=True):
        if number:
            label, taken = divmod(place, len(matrix))
            named = [names[each] if each < len(names) else str(each) for each in (label, taken)]
            found.append(
                {
                    "label": named[0],
                    "taken_for": named[1],
                    "pixels": number,
                    "share": number / total,
                }
            )
    return found


def _or_none(value: float) -> float | None:
    return None if value != value else value


def scores_table(rows: Mapping[str, Areas], names: Sequence[str]) -> str:
    """Means of each network, then a line a class, in %, as text."""
    width = max(map(len, [*rows, *names]), default=0)
    lines = [f"{'':<{width}}   mIoU   mAcc   aAcc"]
    for name, areas in rows.items():
        figures = areas.figures().values()
        lines.append(f"{name:<{width}} {''.join(f'{value:7.2f}' for value in figures)}")
    first = next(iter(rows.values()))
    if 0 < len(names) <= CLASSES_SHOWN:
        lines.append(f"{'':<{width}}    IoU    Acc  share")
        total = max(int(first.labelled.sum()), 1)
        for index, name in enumerate(names):
            share = int(first.labelled[index]) / total
            values = (float(first.iou[index]), float(first.accuracy[index]), share)
            lines.append(f"{name:<{width}} {''.join(f'{100 * value:7.2f}' for value in values)}")
    return "\n".join(lines)
