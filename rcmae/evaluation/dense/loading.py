"""Trained segmenters for other code: a picture of any size in, a class for each pixel out.

segmenter = rcmae.load_segmenter("runs/segment_mae_vit_b_16")
classes = segmenter.predict(PIL.Image.open("street.jpg"))   # [H, W] uint8
names = [segmenter.class_names[index] for index in classes.unique()]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rcmae.config import Recipe
from rcmae.data.transforms import Normalise
from rcmae.errors import Refused
from rcmae.evaluation.dense.judging import Picture, Sight, predictions, scaled
from rcmae.models.segmentation.segmenter import Segmenter
from rcmae.weights.encoder import say
from rcmae.weights.layouts import Which
from rcmae.weights.segmenters import read_segmenter

BATCH = 8  # windows at once


@dataclass(frozen=True)
class TrainedSegmenter:
    """A segmenter with what its pictures and its classes need."""

    model: Segmenter
    sight: Sight
    mean: tuple[float, ...]  # of each channel, pixels from 0 to 1
    std: tuple[float, ...]
    num_classes: int
    class_names: tuple[str, ...]  # empty where nothing tells them

    @torch.no_grad()
    def predict(self, image: Image.Image | Tensor, *, batch: int = BATCH) -> Tensor:
        """The class [H, W] of each pixel, by windows, where the model is: uint8, of more than 255
        classes int16. Local.

        Args:
            image: PIL, or [C, H, W] uint8.
            batch: windows at once.

        Raises:
            Refused: it is no such image.
        """
        pixels = self._pixels(image)
        device = next(self.model.parameters()).device
        size = (pixels.shape[1], pixels.shape[2])
        views = scaled(pixels, self.sight)
        picture = Picture(0, size, views, torch.zeros(size, dtype=torch.uint8))
        found = predictions(
            lambda images: self.model(images)[0],
            [picture],
            self.sight,
            batch=batch,
            normalise=Normalise(self.mean, self.std, device).images,
            device=device,
        )
        ((_, classes),) = list(found)
        return classes

    def _pixels(self, image: Image.Image | Tensor) -> Tensor:
        """[C, H, W] uint8. Raises Refused."""
        channels = self.sight.in_channels
        if isinstance(image, Image.Image) and channels in (1, 3):
            rows = np.array(image.convert("L" if channels == 1 else "RGB"))
            return torch.from_numpy(rows).view(*rows.shape[:2], -1).permute(2, 0, 1)
        is_whole = isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3
        if isinstance(image, Tensor) and is_whole and image.shape[0] == channels:
            return image.cpu()
        raise Refused(
            f"this is no picture of {channels} channels: give a PIL image, or a tensor [C, H, W] "
            "of uint8"
        )


def load_segmenter(source: str | Path, *, network: Which | None = None) -> TrainedSegmenter:
    """A segmenter in evaluation mode, on the CPU, in float32. Local.

    Args:
        source: a run of `rcmae segment`, or a checkpoint of one.
        network: whose weights; None: the average's where there is one.

    Raises:
        Refused: there is none.
        CheckpointError: the checkpoint is damaged.
    """
    trained = read_segmenter(Path(source), network)
    say(trained.source)
    recipe = trained.recipe
    num_classes = recipe.segment.num_classes
    assert num_classes is not None
    return TrainedSegmenter(
        trained.model,
        sight_of(recipe),
        recipe.data.mean,
        recipe.data.std,
        num_classes,
        trained.class_names,
    )


def sight_of(recipe: Recipe) -> Sight:
    """How the evaluation of a recipe sees a picture."""
    options = recipe.segment
    return Sight(
        recipe.model.image_hw,
        stride=options.test_stride,
        scales=tuple(options.test_scales),
        flip=options.test_flip,
        antialias=options.resize == "antialias",
        in_channels=recipe.model.in_channels,
    )
