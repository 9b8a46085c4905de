"""The loss of a classifier, fine-tuned whole or by a head on a frozen encoder: cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcmae.data.batch import Batch
from rcmae.models.blocks import drop_path_draws, sent


@dataclass(frozen=True)
class ClassifierLoss:
    """Cross-entropy with smoothed labels, or with the targets of mixed images.

    Args:
        smoothing: share of a target that is spread over all classes.
        seed: of drop path.
        keeps_average: whether the engine is to keep a moving average of the classifier, as its
            teacher.
    """

    smoothing: float = 0.0
    seed: int = 0
    keeps_average: bool = False
    weights: dict[str, float] = field(default_factory=lambda: {"classification": 1.0}, init=False)
    teacher_outputs: tuple[str, ...] = field(default=(), init=False)

    @property
    def needs_teacher(self) -> bool:
        """Whether there is an average."""
        return self.keeps_average

    def counts(self, batch: Batch) -> dict[str, int]:
        """Images of the micro-batch."""
        return {"classification": len(batch)}

    def __call__(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, progress: float
    ) -> dict[str, Tensor]:
        """Sum over the images; `teacher` and `progress` play no part."""
        rates = _classifier_of(student).drop_path_rates
        keep = None
        if any(rates):
            draws = drop_path_draws(self.seed, batch.positions.tolist(), rates)
            keep = sent(draws, batch.images.device)
        return {"classification": cross_entropy(student(batch.images, keep), batch, self.smoothing)}


def _classifier_of(wrapper: nn.Module) -> Any:
    """The model inside an engine's wrapper."""
    return wrapper if hasattr(wrapper, "drop_path_rates") else wrapper.module


def cross_entropy(scores: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """Sum over the images, in float32 (float64 for float64 scores).

    Args:
        scores: [B, classes].
        batch: with targets [B, classes], or labels [B].
        smoothing: (1 - s) of a target is its label's, s is spread over all classes; targets are
            smooth already.
    """
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if batch.targets is not None:
        return F.cross_entropy(scores, batch.targets.to(scores.dtype), reduction="sum")
    assert batch.labels is not None
    return F.cross_entropy(scores, batch.labels, reduction="sum", label_smoothing=smoothing)


@dataclass(frozen=True)
class ProbeLoss:
    """Cross-entropy of a head on what a frozen encoder makes of the images.

    Args:
        encoder: images [B, C, H, W] -> features [B, D], in evaluation mode, not moved by any
            engine.
    """

    encoder: Callable[[Tensor], Tensor]
    weights: dict[str, float] = field(default_factory=lambda: {"classification": 1.0}, init=False)
    teacher_outputs: tuple[str, ...] = field(default=(), init=False)
    needs_teacher: bool = field(default=False, init=False)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Images of the micro-batch."""
        return {"classification": len(batch)}

    def __call__(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, progress: float
    ) -> dict[str, Tensor]:
        """Sum over the images; `teacher` and `progress` play no part."""
        with torch.no_grad():
            features = self.encoder(batch.images)
        return {"classification": cross_entropy(student(features), batch, 0.0)}
