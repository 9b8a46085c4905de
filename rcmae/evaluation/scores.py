"""How good a classifier is: accuracies, loss and calibration, a table of classes, its mistakes.

Counted exactly over all ranks: padding is left out, and nothing is averaged of averages. The
metrics are torchmetrics'; what it lacks here is a loss over unequal shares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rcmae import dist
from rcmae.data.batch import Batch
from rcmae.errors import Refused
from rcmae.process import extensions  # noqa: F401, torchvision imports beside a CPU torch

from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
)

BINS = 15  # of the calibration error
NAMED = 20  # confusions that are listed


@dataclass(frozen=True)
class Scores:
    """What a classifier got right on a labelled set."""

    images: int
    top1: float  # percent
    top5: float  # percent; among fewer classes than five, of all of them
    loss: float  # mean cross-entropy
    calibration_error: float  # expected, 15 bins of confidence, 0 to 1 (Guo et al., 2017)
    confusion: Tensor  # [K, K] int64: images of class i that were taken for class j

    def figures(self) -> dict[str, float]:
        """The numbers, for a log."""
        return {
            "images": self.images,
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "calibration_error": self.calibration_error,
        }

    def classes(self, names: Sequence[str] = ()) -> list[dict[str, Any]]:
        """A row a class that the set has: its number, name, images and top-1 in percent."""
        return [
            {
                "class": index,
                "name": names[index] if index < len(names) else str(index),
                "images": int(row.sum()),
                "top1": 100.0 * int(row[index]) / int(row.sum()),
            }
            for index, row in enumerate(self.confusion)
            if row.sum()
        ]

    def confused(self) -> list[tuple[int, int, int]]:
        """The most frequent mistakes: (class, taken for, images)."""
        wrong = self.confusion.clone()
        wrong.fill_diagonal_(0)
        count = min(NAMED, int((wrong > 0).sum()))
        at = wrong.flatten().topk(count).indices.tolist()
        return [(i // len(wrong), i % len(wrong), int(wrong.flatten()[i])) for i in at]


def classify(
    score: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    *,
    num_classes: int,
    device: torch.device,
    normalise: Callable[[Tensor], Tensor],
    among: Sequence[int] | None = None,
) -> Scores:
    """Judge a classifier. Collective: every rank calls with as many batches of its share, and gets
    the same.

    Args:
        score: normalised images [B, C, H, W] -> scores [B, num_classes]; models in evaluation mode.
        batches: labelled, as `labelled_batches` gives them: uint8, padded with samples of position
            -1.
        num_classes: labels are below this.
        device: where the classifier computes.
        normalise: uint8 images on the device -> what the classifier was trained on.
        among: score only these classes, as for a set that has some of them; None: all.

    Raises:
        Refused: a label is not below `num_classes` or not `among` them; the same on every rank.
    """
    metrics = _metrics(num_classes)
    left_out = torch.ones(num_classes, dtype=torch.bool)
    left_out[list(among) if among is not None else slice(None)] = False
    loss = 0.0
    images = 0
    strange: set[int] = set()
    with torch.no_grad():
        for batch in batches:
            assert batch.labels is not None
            real = batch.positions >= 0
            labels = batch.labels[real]
            shown = normalise(batch.images.to(device, non_blocking=True))
            scores = score(shown).float().cpu()[real]
            fits = (labels >= 0) & (labels < num_classes)
            fits &= ~left_out[labels.clamp(0, num_classes - 1)]
            strange |= set(labels[~fits].tolist())
            labels = labels[fits]
            scores = scores[fits].masked_fill(left_out, float("-inf"))
            loss += float(F.cross_entropy(scores.double(), labels, reduction="sum"))
            images += len(labels)
            for metric in metrics.values():
                metric.update(scores.softmax(dim=1), labels)
    _refuse(strange, num_classes if among is None else len(among))
    loss, total = dist.sum_numbers([loss, images])
    found = {name: metric.compute() for name, metric in metrics.items()}
    return Scores(
        images=int(total),
        top1=100.0 * float(found["top1"]),
        top5=100.0 * float(found["top5"]),
        loss=loss / max(total, 1.0),
        calibration_error=float(found["calibration"]),
        confusion=found["confusion"].long(),
    )


def _refuse(strange: set[int], scored: int) -> None:
    """Raise Refused on every rank where one has met labels that are not scored. Collective."""
    met = sorted(set().union(*dist.gather(strange)))
    if met:
        raise Refused(
            f"labels {', '.join(map(str, met[:10]))} are none of the {scored} classes that are "
            "scored; give other shards"
        )


def _metrics(num_classes: int) -> dict[str, Any]:
    """torchmetrics' metrics, joined over all ranks when they are computed."""
    common: dict[str, Any] = {"validate_args": False, "process_group": dist.control()}
    top = min(5, num_classes)
    return {
        "top1": MulticlassAccuracy(num_classes, average="micro", **common),
        "top5": MulticlassAccuracy(num_classes, top_k=top, average="micro", **common),
        "calibration": MulticlassCalibrationError(num_classes, n_bins=BINS, **common),
        "confusion": MulticlassConfusionMatrix(num_classes, **common),
    }


def scores_table(rows: dict[str, Scores]) -> str:
    """The scores as text: a line a network."""
    width = max(map(len, rows), default=0)
    lines = [f"{'':<{width}}   top-1   top-5    loss  calibration error"]
    lines += [
        f"{name:<{width}}  {row.top1:6.2f}  {row.top5:6.2f}  {row.loss:6.3f}  "
        f"{row.calibration_error:.4f}"
        for name, row in rows.items()
    ]
    return "\n".join(lines)
