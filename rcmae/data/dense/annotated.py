"""Samples with an annotation, as training and evaluation see them: a canvas and its objects."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rcmae.data.batch import Extra
from rcmae.data.dense.jitter import (
    Jitter,
    Size,
    Style,
    fitted,
    jitter_of,
    on_canvas,
    seen,
    seen_pixels,
)
from rcmae.data.dense.objects import objects_on
from rcmae.data.draws import Purpose, uniform
from rcmae.data.members.annotations import document_of, objects_of
from rcmae.data.members.protocol import Seen, stacked
from rcmae.data.members.whole import Whole
from rcmae.data.transforms import FORMATS, MAX_PIXELS, BadImage, View, decode, plain_jpeg


@dataclass(frozen=True)
class Canvas:
    """What images are put on."""

    size: Size
    channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # data.mean: padding is next to 0 normalised
    max_pixels: int = MAX_PIXELS  # of an image

    @property
    def fill(self) -> list[int]:
        """Levels of the padding; `ready` makes it 0 exactly."""
        return [min(255, max(0, round(255 * value))) for value in self.mean]


@dataclass(frozen=True)
class Jittered:
    """`Members` of a detection: each image with its objects, under one jitter, on a canvas.

    Args:
        canvas: its size.
        categories: COCO's id of each class, in their order.
        scale: of the image over the canvas, drawn evenly.
        flip: probability.
        style: whose order of flip, cut and padding.
        margin: data.decode_margin.
    """

    canvas: Canvas
    categories: tuple[int, ...]
    scale: tuple[float, float] = (0.1, 2.0)
    flip: float = 0.5
    style: Style = "vitdet"
    margin: float = 2.5
    kinds: tuple[str, ...] = ("annotation",)
    optional: tuple[str, ...] = ()

    def views(
        self, image: bytes, content: Mapping[str, bytes], seed: int, positions: Sequence[int]
    ) -> list[Seen]:
        """An image at several positions of the run. Raises BadImage."""
        source = size_of(image, self.canvas.max_pixels)
        names = dict.fromkeys(self.categories, "")
        annotations = objects_of(content["annotation"], source, names)
        return [
            self._seen(image, annotations, self.jitter(source, seed, position))
            for position in positions
        ]

    def jitter(self, source: Size, seed: int, position: int) -> Jitter:
        """Of the image at a position of the run."""
        scale, offset = uniform(seed, Purpose.SCALE, position, count=2).tolist()
        low, high = self.scale
        return jitter_of(
            source,
            self.canvas.size,
            scale=low + (high - low) * scale,
            offset=offset,
            flipped=bool(uniform(seed, Purpose.FLIP, 0, position, count=1)[0] < self.flip),
            style=self.style,
        )

    def _seen(self, image: bytes, annotations: Sequence[Any], jitter: Jitter) -> Seen:
        classes = {category: number for number, category in enumerate(self.categories)}
        channels, most = self.canvas.channels, self.canvas.max_pixels
        pixels = seen(image, jitter, channels, self.margin, max_pixels=most)
        objects = objects_on(annotations, jitter, classes)
        extra = {
            "boxes": torch.from_numpy(objects.boxes),
            "classes": torch.from_numpy(objects.classes),
            "masks": torch.from_numpy(objects.masks),
            "extents": torch.tensor(jitter.extent, dtype=torch.float32),
        }
        down, along = jitter.factors
        crop = (
            int(jitter.top / down),
            int(jitter.left / along),
            int(jitter.size[0] / down),
            int(jitter.size[1] / along),
            int(jitter.flipped),
        )
        canvas = torch.from_numpy(on_canvas(pixels, jitter, self.canvas.fill))
        return Seen(View(canvas, crop), extra)

    def collate(self, rows: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Extra]:
        """boxes [n, 4], classes [n] and masks [n, H, ceil(W / 8)] of each image; extents [B, 4]."""
        ragged = ("boxes", "classes", "masks")
        found: dict[str, Extra] = {name: tuple(row[name] for row in rows) for name in ragged}
        return found | {"extents": stacked([row["extents"] for row in rows])}


class Judged(NamedTuple):
    """A sample to be judged."""

    number: int  # in its set
    image_id: int
    size: Size  # of the image
    image: Tensor  # [C, H, W] uint8 on the canvas
    extent: tuple[int, int, int, int]  # (x0, y0, x1, y1) of the canvas that is image
    annotations: list[dict[str, Any]]  # COCO's, of the image
    pixels: NDArray[np.uint8] | None  # [h, w, C], where a picture is drawn of it


@dataclass(frozen=True)
class Fitted:
    """What is made of a sample for an evaluation: the whole image, as large as the canvas takes.

    Args:
        canvas: its size.
        categories: COCO's ids that may be.
        drawn: samples of lower numbers keep their pixels.
    """

    canvas: Canvas
    categories: tuple[int, ...]
    drawn: int = 0

    def __call__(self, whole: Whole) -> Judged:
        """Raises BadImage."""
        pixels = decode(whole.image, self.canvas.channels, max_pixels=self.canvas.max_pixels)
        size = (pixels.shape[0], pixels.shape[1])
        data = whole.content["annotation"]
        annotations = objects_of(data, size, dict.fromkeys(self.categories, ""))
        image_id = document_of(data).get("image_id")
        if type(image_id) is not int:
            raise BadImage(f"its annotation has image_id={image_id!r:.40}, no number")
        jitter = fitted(size, self.canvas.size)
        image = on_canvas(seen_pixels(pixels, jitter), jitter, self.canvas.fill)
        kept = pixels if whole.number < self.drawn else None
        return Judged(
            whole.number,
            image_id,
            size,
            torch.from_numpy(image),
            jitter.extent,
            annotations,
            kept,
        )


def size_of(data: bytes, max_pixels: int) -> Size:
    """(height, width) of an encoded image, by its header where that says it. Raises BadImage."""
    head = plain_jpeg(data, max_pixels)
    if head is not None:
        return head.height, head.width
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.height, image.width
    except Exception as error:  # Pillow raises whatever damaged bytes lead it to
        raise BadImage(f"its size cannot be read: {type(error).__name__}: {error}") from error
