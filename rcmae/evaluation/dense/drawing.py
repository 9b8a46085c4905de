"""Pictures of a segmentation: the image, its map, what was predicted, and where the two differ."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from rcmae.data.dense.geometry import resize_map
from rcmae.data.dense.maps import none_of
from rcmae.evaluation.dense.judging import Shown

HEIGHT = 240  # pixels of a picture
GAP = 4
_TURN = 0.61803398875  # golden: neighbouring classes have unlike hues
_NO_LABEL = (60, 60, 60)
_WRONG = (220, 40, 40)
_LINE = 18


def colours(num_classes: int) -> NDArray[np.uint8]:
    """[classes + 1, 3] RGB of each class; grey, the last, of no label."""
    table = np.full((num_classes + 1, 3), _NO_LABEL, dtype=np.uint8)
    for index in range(num_classes):
        value = 0.95 if index % 2 else 0.75
        red, green, blue = colorsys.hsv_to_rgb(index * _TURN % 1.0, 0.75, value)
        table[index] = [round(255 * part) for part in (red, green, blue)]
    return table


def segments_picture(
    shown: Sequence[Shown], num_classes: int, names: Sequence[str]
) -> NDArray[np.uint8]:
    """[H, W, 3] of some pictures, a row each: image, map, prediction, difference (red where they
    differ, dark where there is no label); of one without any label image, prediction, and both.
    Under them what the colours mean, of the classes those that occur.
    """
    table = colours(num_classes)
    rows = []
    present: set[int] = set()
    has_labels = False

    def coloured(values: Tensor) -> NDArray[np.uint8]:
        numbers = values.numpy()
        return table[np.where(numbers == none_of(values), num_classes, numbers)]

    for each in shown:
        height = min(HEIGHT, each.labels.shape[0])
        width = max(1, round(each.labels.shape[1] * height / each.labels.shape[0]))
        labels, prediction = (
            resize_map(values, (height, width)) for values in (each.labels, each.prediction)
        )
        present |= set(labels.unique().tolist()) | set(prediction.unique().tolist())
        image = _image(each.image, height, width)
        found = coloured(prediction)
        if bool((labels == none_of(labels)).all()):
            both = (image // 2 + found // 2).astype(np.uint8)
            rows.append(_beside([image, found, both]))
            continue
        difference = _difference(image, labels, prediction)
        rows.append(_beside([image, coloured(labels), found, difference]))
        has_labels = True
    entries = []
    for index in sorted(each for each in present if each < num_classes):
        name = names[index] if index < len(names) else str(index)
        entries.append((name, tuple(table[index].tolist())))
    if has_labels:
        entries += [("(no label)", _NO_LABEL), ("(at the right: wrong)", _WRONG)]
    legend = _legend(entries, max(row.shape[1] for row in rows))
    return _below([*rows, legend])


def _image(image: Tensor, height: int, width: int) -> NDArray[np.uint8]:
    small = interpolate(image[None].float(), (height, width), mode="bilinear", antialias=True)[0]
    pixels = small.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return np.repeat(pixels[..., :1], 3, axis=2) if pixels.shape[2] != 3 else pixels


def _difference(image: NDArray[np.uint8], labels: Tensor, prediction: Tensor) -> NDArray[np.uint8]:
    grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8)
    unlabelled = labels == none_of(labels)
    wrong = ((labels != prediction) & ~unlabelled).numpy()
    grey[wrong] = _WRONG
    grey[unlabelled.numpy()] = _NO_LABEL
    return grey


def _beside(panels: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    gap = np.full((panels[0].shape[0], GAP, 3), 255, dtype=np.uint8)
    parts = [part for panel in panels for part in (panel, gap)]
    return np.concatenate(parts[:-1], axis=1)


def _below(rows: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    width = max(row.shape[1] for row in rows)
    parts = []
    for row in rows:
        sheet = np.full((row.shape[0] + GAP, width, 3), 255, dtype=np.uint8)
        sheet[: row.shape[0], : row.shape[1]] = row
        parts.append(sheet)
    return np.concatenate(parts, axis=0)


def _legend(entries: Sequence[tuple[str, tuple[int, ...]]], width: int) -> NDArray[np.uint8]:
    """Names with their colours, in lines of this width."""
    font = ImageFont.load_default(12)
    places = []
    left = top = 0
    for text, _ in entries:
        length = int(font.getlength(text)) + 26
        if left and left + length > width:
            left, top = 0, top + _LINE
        places.append((left, top))
        left += length
    sheet = Image.new("RGB", (width, top + _LINE), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for (text, colour), (left, top) in zip(entries, places, strict=True):
        pen.rectangle((left, top + 2, left + 14, top + 14), fill=colour)
        pen.text((left + 18, top + 1), text, (0, 0, 0), font)
    return np.asarray(sheet)
