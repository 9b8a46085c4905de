"""Objects of an image, in COCO's words, on a canvas: boxes, classes, masks of a bit a pixel.

Polygons are moved as points and rasterised once; run-length masks are resized by the nearest pixel
centre. Boxes are those of what is left of the mask: an object without a pixel is dropped. Crowds
are no objects to train on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from rcmae.data.dense.jitter import Jitter, Size
from rcmae.data.members.annotations import has_area, polygons_of

_Box = tuple[int, int, int, int]  # (x0, y0, x1, y1)


class Objects(NamedTuple):
    """The objects that a canvas shows."""

    boxes: NDArray[np.float32]  # [n, 4] (x0, y0, x1, y1), x1 and y1 exclusive
    classes: NDArray[np.int64]  # [n]
    masks: NDArray[np.uint8]  # [n, H, ceil(W / 8)] packed as numpy.packbits
    numbers: NDArray[np.int64]  # [n] which annotation each is


def objects_on(
    annotations: Sequence[Mapping[str, Any]], jitter: Jitter, classes: Mapping[int, int]
) -> Objects:
    """What is left of annotations; those whose box has no area are left out.

    Args:
        annotations: of the whole image, sound (`members.annotations.objects_of`).
        jitter: what of it the canvas shows.
        classes: COCO's category id -> the network's class.
    """
    numbers = []
    found = []
    for number, annotation in enumerate(annotations):
        if annotation.get("iscrowd", 0) or not has_area(annotation):
            continue
        mask = _mask(annotation, jitter)
        if mask is not None:
            numbers.append(number)
            found.append(_packed(mask, jitter))
    height, width = jitter.canvas
    masks = np.zeros((len(found), height, -(-width // 8)), np.uint8)
    boxes = np.zeros((len(found), 4), np.float32)
    for row, (box, bits) in enumerate(found):
        boxes[row] = box
        masks[row, box[1] : box[3], : bits.shape[1]] = bits
    kinds = [classes[annotations[number]["category_id"]] for number in numbers]
    return Objects(boxes, np.array(kinds, np.int64), masks, np.array(numbers, np.int64))


def _packed(mask: NDArray[np.uint8], jitter: Jitter) -> tuple[_Box, NDArray[np.uint8]]:
    """(box on the canvas, the bits of its rows) of a mask of the cut: at once, for the masks of all
    objects as bytes would fill the memory.
    """
    left, top, right, bottom = _box(mask)
    part = np.ascontiguousarray(mask[top:bottom])
    if jitter.style == "benchmark" and jitter.flipped:
        width = jitter.canvas[1]
        left, right = width - right, width - left
        x0, _, x1, _ = jitter.extent
        line = np.zeros((bottom - top, width), np.uint8)
        line[:, x0:x1] = part[:, ::-1]
        part = line
    return (left, top, right, bottom), np.packbits(part, axis=1)


def _mask(annotation: Mapping[str, Any], jitter: Jitter) -> NDArray[np.uint8] | None:
    """[h, w] of the cut, 0 or 1; None where nothing is left."""
    shape = annotation.get("segmentation")
    if isinstance(shape, dict):
        seen = _resampled(decoded(shape), jitter)
        return seen if seen.any() else None
    # a box alone is its own mask
    polygons = polygons_of(annotation) if shape else [_rectangle(annotation["bbox"])]
    if not polygons:
        return None
    moved = [_moved(np.asarray(polygon, np.float64), jitter) for polygon in polygons]
    height, width = jitter.size
    codes = coco_mask.frPyObjects(moved, height, width)
    code = coco_mask.merge(codes)
    if not coco_mask.area(code):
        return None
    mask: NDArray[np.uint8] = coco_mask.decode(code)
    return mask


def _rectangle(box: Sequence[float]) -> list[float]:
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def _moved(points: NDArray[np.float64], jitter: Jitter) -> list[float]:
    """A polygon [x, y, x, y ...] of the source, in the cut."""
    down, along = jitter.factors
    x = points[0::2]
    if jitter.flipped and jitter.style == "vitdet":
        x = jitter.source[1] - x
    moved = np.empty_like(points)
    moved[0::2] = x * along - jitter.left
    moved[1::2] = points[1::2] * down - jitter.top
    return moved.tolist()


def decoded(code: Mapping[str, Any]) -> NDArray[np.uint8]:
    """[h, w] of a run-length code, its counts COCO's text or a list."""
    if isinstance(code["counts"], list):
        code = coco_mask.frPyObjects(dict(code), *code["size"])
    mask: NDArray[np.uint8] = coco_mask.decode(code)
    return mask


def _resampled(mask: NDArray[np.uint8], jitter: Jitter) -> NDArray[np.uint8]:
    """The cut of a mask [h, w] of the source."""
    if jitter.flipped and jitter.style == "vitdet":
        mask = mask[:, ::-1]
    rows, columns = (
        _nearest(start, length, new, old)
        for start, length, new, old in zip(
            (jitter.top, jitter.left), jitter.size, jitter.resized, jitter.source, strict=True
        )
    )
    return mask[rows[:, None], columns]


def _nearest(start: int, length: int, new: int, old: int) -> NDArray[np.int64]:
    """[length] the source pixel under the centre of each pixel from `start` on."""
    places = (np.arange(start, start + length) + 0.5) * (old / new)
    return np.minimum(places.astype(np.int64), old - 1)


def _box(mask: NDArray[np.uint8]) -> _Box:
    """(x0, y0, x1, y1) around the ones of a mask that has some."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def encoded(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """COCO's run-length code of [h, w], as JSON has it."""
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(code["size"]), "counts": code["counts"].decode("ascii")}


def of_size(annotation: Mapping[str, Any], size: Size) -> dict[str, Any]:
    """COCO's run-length code of an annotation's own mask on an image of this size."""
    shape = annotation.get("segmentation")
    if isinstance(shape, dict):
        return encoded(decoded(shape).astype(bool))
    polygons = polygons_of(annotation) if shape else []
    drawn = polygons or [_rectangle(annotation["bbox"])]
    code = coco_mask.merge(coco_mask.frPyObjects(drawn, *size))
    return {"size": list(code["size"]), "counts": code["counts"].decode("ascii")}
