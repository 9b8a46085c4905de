"""What a detector's training looks at, recorded from one run and fed to another: which anchors and
regions the losses see, by the position of each image in the run.

An engine rounds otherwise than another, and a region that one keeps by a hair the other drops: fed
the same choices, they must agree closely; by their own they differ where choices flip, which is
counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from rcmae.models.detection.detector import Choices, Detector
from rcmae.models.detection.losses import Regions
from rcmae.objectives.detection import DetectionLoss

Row = dict[str, Tensor]  # of one image
NEAR = 1e-3  # pixels: regions that are the same but for rounding


class Recorded:
    """Choices by position; `counts` says how many of a run's own differ from those it is fed."""

    def __init__(self, rows: dict[int, Row] | None = None) -> None:
        self.rows = rows or {}
        self.counts: Counter[str] = Counter()

    def save(self, path: Path) -> None:
        torch.save(self.rows, path)

    @classmethod
    def of(cls, path: Path) -> Recorded:
        return cls(torch.load(path, weights_only=True))

    def note(self, positions: list[int], chosen: Choices) -> None:
        for number, position in enumerate(positions):
            boxes, classes, objects = chosen.regions[number]
            self.rows[position] = {
                "labels": chosen.labels[number].clone(),
                "objects": chosen.objects[number].clone(),
                "boxes": boxes.clone(),
                "classes": classes.clone(),
                "object": objects.clone(),
            }

    def fed(self, positions: list[int], own: Choices) -> Choices:
        rows = [self.rows[position] for position in positions]
        labels = torch.stack([row["labels"] for row in rows])
        self.counts["anchors"] += labels.numel()
        self.counts["flipped anchors"] += int((labels != own.labels).sum())
        regions = tuple(Regions(row["boxes"], row["classes"], row["object"]) for row in rows)
        for mine, theirs in zip(own.regions, regions, strict=True):
            apart = torch.cdist(mine.boxes, theirs.boxes, p=float("inf"))
            self.counts["regions"] += len(theirs.boxes)
            if apart.numel():
                self.counts["flipped regions"] += int((apart.amin(dim=1) > NEAR).sum())
        return Choices(labels, torch.stack([row["objects"] for row in rows]), regions)


@contextmanager
def _choosing(recorded: Recorded, *, feeds: bool) -> Iterator[None]:
    lose, choose = DetectionLoss.__call__, Detector.choose
    now: list[int] = []

    def called(self: Any, student: Any, teacher: Any, batch: Any, progress: float) -> Any:
        now[:] = batch.positions.tolist()
        return lose(self, student, teacher, batch, progress)

    @torch.no_grad()
    def chosen(self: Any, *inputs: Any) -> Choices:
        own = choose(self, *inputs)
        if feeds:
            return recorded.fed(now, own)
        recorded.note(now, own)
        return own

    with patch.object(DetectionLoss, "__call__", called), patch.object(Detector, "choose", chosen):
        yield


def recording(recorded: Recorded) -> Any:
    """Within it, trainings of this process leave their choices."""
    return _choosing(recorded, feeds=False)


def feeding(recorded: Recorded) -> Any:
    """Within it, trainings of this process see the choices that were recorded."""
    return _choosing(recorded, feeds=True)
