"""What is there and what was found, side by side on the image itself."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from rcmae.data.dense.objects import of_size
from rcmae.evaluation.detection.collect import Drawn
from rcmae.evaluation.pictures import BLACK, GAP, LINE, WHITE

SIDE = 320  # pixels of an image's longer side
SHOWN = 0.5  # detections of a lower score are not drawn
_OPAQUE = 0.45  # of a mask


def detections_picture(drawn: Sequence[Drawn], names: Mapping[int, str]) -> NDArray[np.uint8]:
    """[H, W, 3]: a row an image; what is there at the left, then what each network found.

    Args:
        drawn: images with objects and detections.
        names: category id -> name.
    """
    rows = []
    for each in drawn:
        there = "image" if each.annotations is None else "there"
        cells = [_cell(there, each.pixels, each.annotations or (), names)]
        for network, found in each.detections.items():
            shown = [one for one in found if one["score"] >= SHOWN]
            caption = f"found ({network}){_nothing(found) if not shown else ''}"
            cells.append(_cell(caption, each.pixels, shown, names))
        rows.append(_beside(cells))
    width = max(row.width for row in rows)
    height = sum(row.height + GAP for row in rows)
    sheet = Image.new("RGB", (width, height), WHITE)
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + GAP
    return np.asarray(sheet)


def _nothing(found: Sequence[Mapping[str, Any]]) -> str:
    """Why no detection is drawn."""
    highest = max((one["score"] for one in found), default=None)
    return ": nothing" if highest is None else f": none over {SHOWN}, best {highest:.2f}"


def _beside(cells: Sequence[Image.Image]) -> Image.Image:
    row = Image.new("RGB", (sum(each.width + GAP for each in cells), cells[0].height), WHITE)
    left = 0
    for each in cells:
        row.paste(each, (left, 0))
        left += each.width + GAP
    return row


def _cell(
    caption: str,
    pixels: NDArray[np.uint8],
    objects: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
) -> Image.Image:
    """An image with masks, boxes and names of objects."""
    height, width = pixels.shape[:2]
    shade = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
    mixed = shade.astype(np.float32)
    for number, each in enumerate(objects):
        covered = coco_mask.decode(of_size(each, (height, width))).astype(bool)
        mixed[covered] = (1 - _OPAQUE) * mixed[covered] + _OPAQUE * np.array(_colour(number))
    scale = SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = Image.fromarray(mixed.round().astype(np.uint8)).resize(size)
    cell = Image.new("RGB", (size[0], size[1] + LINE), WHITE)
    cell.paste(image, (0, LINE))
    pen = ImageDraw.Draw(cell)
    pen.text((0, 2), caption, fill=BLACK)
    for number, each in enumerate(objects):
        x, y, across, down = (scale * value for value in each["bbox"])
        y += LINE
        pen.rectangle((x, y, x + across, y + down), outline=_colour(number), width=2)
        score = f" {each['score']:.2f}" if "score" in each else ""
        crowd = " (crowd)" if each.get("iscrowd") else ""
        name = names.get(each["category_id"], str(each["category_id"]))
        pen.text(
            (x + 3, y + 2), f"{name}{score}{crowd}", fill=WHITE, stroke_fill=BLACK, stroke_width=1
        )
    return cell


def _colour(number: int) -> tuple[int, int, int]:
    """Far from those of the numbers before."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618 % 1.0, 0.9, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)
