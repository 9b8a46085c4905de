"""The loss of a detector: the five of Mask R-CNN, each normalised within its image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rcmae.data.batch import Batch
from rcmae.data.draws import Purpose, raw
from rcmae.models.blocks import drop_path_draws, sent
from rcmae.models.detection.detector import Detector, Sampling
from rcmae.models.detection.losses import LOSSES, Targets


@dataclass(frozen=True)
class DetectionLoss:
    """The sum over images of each one's loss, whatever else is in the batch.

    Args:
        seed: of sampling and of drop path.
        keeps_average: whether the engine is to keep a moving average of the detector, as its
            teacher.
    """

    seed: int = 0
    keeps_average: bool = False
    weights: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(LOSSES, 1.0), init=False
    )
    teacher_outputs: tuple[str, ...] = field(default=(), init=False)

    @property
    def needs_teacher(self) -> bool:
        """Whether there is an average."""
        return self.keeps_average

    def counts(self, batch: Batch) -> dict[str, int]:
        """Images of the micro-batch."""
        return dict.fromkeys(LOSSES, len(batch))

    def __call__(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, progress: float
    ) -> dict[str, Tensor]:
        """Sums over the images; `teacher` and `progress` play no part."""
        targets = targets_of(batch)
        assert batch.extra is not None
        extents = batch.extra["extents"]
        found = student(batch.images, extents, targets, self.draws(_detector_of(student), batch))
        return {name: values.sum() for name, values in found.items()}

    def draws(self, detector: Any, batch: Batch) -> Sampling:
        """Of a micro-batch: functions of the seed and each image's position alone."""
        device = batch.images.device
        positions = batch.positions.tolist()
        anchors = detector.num_anchors((batch.images.shape[2], batch.images.shape[3]))
        rates = detector.drop_path_rates
        keep = sent(drop_path_draws(self.seed, positions, rates), device) if any(rates) else None
        regions = anchors + Detector.most_objects
        return Sampling(
            sent(self._numbers(Purpose.ANCHORS, positions, anchors), device),
            sent(self._numbers(Purpose.REGIONS, positions, regions), device),
            keep,
        )

    def _numbers(self, purpose: Purpose, positions: list[int], count: int) -> Tensor:
        """[B, count] int64 from 0 on."""
        rows = [raw(self.seed, purpose, position, count=count) for position in positions]
        return torch.from_numpy((np.stack(rows) >> np.uint64(1)).astype(np.int64))


def targets_of(batch: Batch) -> list[Targets]:
    """The objects of each image."""
    assert batch.extra is not None
    columns = (batch.extra[name] for name in ("boxes", "classes", "masks"))
    return [Targets(*row) for row in zip(*columns, strict=True)]


def _detector_of(wrapper: nn.Module) -> Any:
    """The model inside an engine's wrapper."""
    return wrapper if hasattr(wrapper, "drop_path_rates") else wrapper.module
