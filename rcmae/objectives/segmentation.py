"""The loss of a segmenter: cross-entropy of every labelled pixel, of its head and of the one beside
it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcmae.data.batch import Batch
from rcmae.data.dense.crops import MAPS
from rcmae.data.dense.maps import none_of
from rcmae.models.blocks import sent
from rcmae.models.segmentation.heads import resized
from rcmae.models.segmentation.segmenter import DenseProbe, Keep, Segmenter, drawn
from rcmae.objectives.terms import widen

TERMS = ("segmentation", "auxiliary")  # of the head, of the one beside it


@dataclass(frozen=True)
class SegmentationLoss:
    """Cross-entropy per pixel at the map's size, 0 where there is no label.

    Args:
        auxiliary: weight of the head beside; 0: there is none.
        mean_over: "pixels" has those without a label in the denominator, as published; "labelled"
            has not.
        seed: of drop path and dropout.
        keeps_average: whether the engine is to keep a moving average as its teacher.
        encoder: of a probe: images to maps, not moved by any engine.
    """

    auxiliary: float = 0.4
    mean_over: Literal["pixels", "labelled"] = "pixels"
    seed: int = 0
    keeps_average: bool = False
    encoder: Callable[[Tensor], Sequence[Tensor]] | None = None
    teacher_outputs: tuple[str, ...] = field(default=(), init=False)

    @property
    def needs_teacher(self) -> bool:
        """Whether there is an average."""
        return self.keeps_average

    @property
    def weights(self) -> dict[str, float]:
        """Of each head."""
        main, beside = TERMS
        return {main: 1.0, beside: self.auxiliary} if self.auxiliary else {main: 1.0}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Pixels of the micro-batch, or those that have a label."""
        maps = maps_of(batch)
        pixels = maps.numel() if self.mean_over == "pixels" else int((maps != none_of(maps)).sum())
        return dict.fromkeys(self.weights, pixels)

    def __call__(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, progress: float
    ) -> dict[str, Tensor]:
        """Sums over the labelled pixels; `teacher` and `progress` play no part."""
        keep = _on(drawn(_inside(student), self.seed, batch.positions.tolist()), batch)
        seen: Any = batch.images
        if self.encoder is not None:
            with torch.no_grad():
                seen = self.encoder(batch.images)
        logits = student(seen, keep)
        maps = maps_of(batch)
        return {
            name: pixel_loss(each, maps) for name, each in zip(self.weights, logits, strict=True)
        }


def pixel_loss(logits: Tensor, maps: Tensor) -> Tensor:
    """The sum over the labelled pixels, in float32 (float64 for float64 logits).

    Args:
        logits: [B, classes, h, w], brought to the size of the maps.
        maps: [B, H, W].
    """
    full = resized(widen(logits), maps.shape[-2:])
    return F.cross_entropy(full, maps.long(), ignore_index=none_of(maps), reduction="sum")


def maps_of(batch: Batch) -> Tensor:
    """The maps [B, H, W] of a micro-batch."""
    assert batch.extra is not None, "a batch of images with their maps"
    maps = batch.extra[MAPS]
    assert isinstance(maps, Tensor)
    return maps


def _inside(wrapper: nn.Module) -> nn.Module:
    """The model inside an engine's wrapper."""
    inner: Any = wrapper if isinstance(wrapper, Segmenter | DenseProbe) else wrapper.module
    return inner


def _on(keep: Keep, batch: Batch) -> Keep:
    """The draws, where the images are."""
    device = batch.images.device
    return Keep(*(None if each is None else sent(each, device) for each in keep))
