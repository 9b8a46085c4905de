"""Annotations: a JSON beside an image with its objects, in COCO's words.

    {"image_id", "height", "width", "annotations": [{"id", "bbox": [x, y, width, height],
     "category_id", "iscrowd", "area", "segmentation": polygons or a run-length code}]}

A JSON without `annotations` is somebody else's (captions, say) and no concern of ours."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcmae.data.members.kinds import Beside, Facts
from rcmae.data.members.maps import nearest
from rcmae.data.transforms import BadImage

_MARGIN = 1.0  # pixels by which a box may stick out: COCO's do by rounding
_NAMED = 3  # objects that a message names
_LISTED = 20  # objects that a report names
_FAR = 2  # sides of the image: who draws a polygon needs memory for where it leads
_POINTS = 6  # numbers of a polygon that encloses anything
_MOST = 64 * 2**20  # bytes of an annotation
# What drawing an image's objects may cost: a few bytes can ask for more than a memory holds.
_OBJECTS = 10_000
_OUTLINE = 3_000  # longer sides of the image, all polygons together
_MASK_PIXELS = 10**10  # of all run-length codes


def document_of(data: bytes) -> Any:
    """What a member says, as JSON has it. Raises BadImage."""
    if len(data) > _MOST:
        raise BadImage(f"its annotation has {len(data):,} bytes, more than {_MOST:,}")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadImage(f"its annotation is no JSON ({error})") from error


def is_annotation(document: Any) -> bool:
    """Whether a JSON is an annotation in COCO's words, not somebody else's."""
    return isinstance(document, dict) and "annotations" in document


def objects_of(
    data: bytes, size: tuple[int, int] | None, categories: Mapping[int, str] | None = None
) -> list[dict[str, Any]]:
    """The annotations of an image, all of them sound but for boxes without area.

    Args:
        data: of the member.
        size: (height, width) of the image; None: as the annotation says.
        categories: id -> name, of those that may be; None: any.

    Raises:
        BadImage: says what is wrong with the first objects that are not sound.
    """
    document = document_of(data)
    if not is_annotation(document):
        raise BadImage("its annotation has no `annotations`")
    stated = (document.get("height"), document.get("width"))
    if size is None:
        size = _size_stated(stated)
    elif stated != size:
        raise BadImage(
            f"its annotation is of {stated[1]} x {stated[0]} pixels, its image has "
            f"{size[1]} x {size[0]}"
        )
    objects = document["annotations"]
    if not isinstance(objects, list) or not all(isinstance(each, dict) for each in objects):
        raise BadImage("its annotation's `annotations` are no list of objects")
    if len(objects) > _OBJECTS:
        raise BadImage(f"its annotation has {len(objects):,} objects, more than {_OBJECTS:,}")
    problems = []
    for each in objects:
        problems += [
            f"object {each.get('id')!s:.40}: {told}" for told in _problems(each, size, categories)
        ]
    if not problems:
        problems = list(_costs(objects, size))
    if problems:
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise BadImage("; ".join(problems[:_NAMED]) + more)
    return objects


def _size_stated(stated: tuple[Any, Any]) -> tuple[int, int]:
    if not all(type(side) is int and side > 0 for side in stated):
        raise BadImage(f"its annotation has height, width = {stated!r:.60}")
    return stated


def is_box(box: Any) -> bool:
    """Whether this is a box: x, y, width and height, finite numbers."""
    return _numbers(box, 4)


def has_area(each: Mapping[str, Any]) -> bool:
    """Whether the box of an object has an area: without one it is left out."""
    return bool(each["bbox"][2] > 0 and each["bbox"][3] > 0)


def polygons_of(each: Mapping[str, Any]) -> list[list[float]]:
    """The polygons of an object that enclose something: those of three points or more."""
    return [polygon for polygon in each["segmentation"] if len(polygon) >= _POINTS]


def _problems(
    each: Mapping[str, Any], size: tuple[int, int], categories: Mapping[int, str] | None
) -> Iterator[str]:
    height, width = size
    box = each.get("bbox")
    if not is_box(box):
        yield f"its box is {box!r:.60}, wanted are x, y, width, height"
    else:
        assert box is not None
        left, top, across, down = box
        if across < 0 or down < 0:
            yield f"its box {box} has a negative side"
        outside = min(left, top) < -_MARGIN
        if outside or left + across > width + _MARGIN or top + down > height + _MARGIN:
            yield f"its box {box} lies outside the image of {width} x {height}"
    category = each.get("category_id")
    if not isinstance(category, int) or isinstance(category, bool):
        yield f"its category is {category!r:.60}, no number"
    elif categories is not None and category not in categories:
        yield f"its category {category} is none of categories.json"
    if each.get("iscrowd", 0) not in (0, 1):
        yield f"its iscrowd is {each['iscrowd']!r:.60}, wanted is 0 or 1"
    if not _numbers([each.get("area", 0)], 1) or each.get("area", 0) < 0:
        yield f"its area is {each['area']!r:.60}, no number from 0 on"
    yield from _shape_problems(each.get("segmentation"), size)


def _costs(objects: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> Iterator[str]:
    """What of sound objects would take too much to draw."""
    shapes = [each.get("segmentation") for each in objects]
    coded = sum(isinstance(shape, dict) for shape in shapes)
    if coded * size[0] * size[1] > _MASK_PIXELS:
        yield (
            f"its annotation has {coded:,} run-length codes of {size[1]} x {size[0]} pixels, "
            f"together more than {_MASK_PIXELS:,}"
        )
    polygons = (polygon for shape in shapes if isinstance(shape, list) for polygon in shape)
    outline = sum(map(_outline, polygons))
    if outline > _OUTLINE * max(size):
        yield (
            f"the polygons of its annotation are {outline:,.0f} pixels long, more than "
            f"{_OUTLINE:,} times the longer side of the image of {size[1]} x {size[0]}"
        )


def _outline(polygon: Sequence[float]) -> float:
    """Pixels along a closed polygon [x, y, x, y ...], the longer way of each side."""
    points = np.asarray(polygon, np.float64).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1, initial=0).sum())


def _shape_problems(shape: Any, size: tuple[int, int]) -> Iterator[str]:
    if shape is None:
        return  # a box alone
    if isinstance(shape, dict):
        try:
            runs_of(shape, size)
        except BadImage as error:
            yield str(error)
    elif not isinstance(shape, list) or not shape:
        yield "it has no polygon"
    elif not all(_numbers(polygon, None) for polygon in shape):
        yield "a polygon of it is no list of numbers"
    elif all(len(polygon) < _POINTS for polygon in shape):
        yield "no polygon of it has three points"
    elif any(len(polygon) % 2 for polygon in shape):
        yield "a polygon of it has an odd number of coordinates"
    elif any(abs(number) > _FAR * max(size) for polygon in shape for number in polygon):
        yield f"a polygon of it leads far out of the image of {size[1]} x {size[0]}"


def _numbers(values: Any, count: int | None) -> bool:
    """Whether this is a list of so many finite numbers; None: of any."""
    if not isinstance(values, list) or (count is not None and len(values) != count):
        return False
    largest = sys.float_info.max  # an int may be larger than any float
    return all(
        isinstance(each, int | float) and not isinstance(each, bool) and abs(each) <= largest
        for each in values
    )


# -------------------------------------------------------------------------------- run-length codes


def runs_of(code: Mapping[str, Any], size: tuple[int, int]) -> list[int]:
    """The lengths of the runs of a code, down the columns, the first of them outside the object.

    `counts` is a list, or COCO's text: numbers of five bits a character, each after the second less
    the last but one.

    Raises:
        BadImage: it is of another size, or its runs do not add up to it.
    """
    height, width = size
    stated = code.get("size")
    if stated != [height, width] or not all(type(side) is int for side in stated):
        raise BadImage(f"its mask is of {code.get('size')!r:.40}, its image of {[height, width]}")
    counts = code.get("counts")
    runs: list[int] = []
    if isinstance(counts, str):
        runs = _decompressed(counts)
    elif isinstance(counts, list) and all(type(each) is int for each in counts):
        runs = counts
    else:
        raise BadImage("its mask has no counts")
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise BadImage(f"its mask's runs do not add up to {height} x {width} pixels")
    return runs


def _decompressed(text: str) -> list[int]:
    runs: list[int] = []
    value = shift = 0
    if not text.isascii():
        raise BadImage("its mask's counts are no run-length code")
    for character in text.encode():
        bits = character - 48
        if not 0 <= bits < 64 or shift > 30:
            raise BadImage("its mask's counts are no run-length code")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise BadImage("its mask's counts break off")
    return runs


def _compressed(runs: Sequence[int]) -> str:
    text = []
    for place, run in enumerate(runs):
        value = run - runs[place - 2] if place > 2 else run
        while True:
            bits = value & 31
            value >>= 5
            is_done = value == (-1 if bits & 16 else 0)
            text.append(chr((bits if is_done else bits | 32) + 48))
            if is_done:
                break
    return "".join(text)


def mask_of(code: Mapping[str, Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    """[H, W] of a run-length code, True in the object. Raises BadImage."""
    runs = runs_of(code, size)
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(size[1], size[0]).T


def code_of(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """COCO's compressed run-length code of a mask [H, W]."""
    flat = mask.T.reshape(-1)
    edges = [0, *(np.flatnonzero(flat[1:] != flat[:-1]) + 1).tolist(), len(flat)]
    runs = [after - before for before, after in pairwise(edges)]
    if flat[0]:
        runs.insert(0, 0)
    return {"size": list(mask.shape), "counts": _compressed(runs)}


# ----------------------------------------------------------------------------------------- the kind


class Annotations:
    """The kind `annotation`."""

    name = "annotation"
    suffix = "json"
    beside = "categories.json"

    def read_beside(self, text: str) -> Mapping[int, str]:
        """Id -> name of each category. Raises ValueError."""
        try:
            rows = json.loads(text)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        wanted = "a list of {id: a whole number, name: a text}"
        if not isinstance(rows, list) or not all(isinstance(each, dict) for each in rows):
            raise ValueError(f"wanted is {wanted}")
        found: dict[int, str] = {}
        for each in rows:
            number, name = each.get("id"), each.get("name")
            if type(number) is not int or not isinstance(name, str):
                raise ValueError(f"wanted is {wanted}, got {each!r:.80}")
            if number in found:
                raise ValueError(f"id {number} is there twice")
            found[number] = name
        return found

    def verify(self, data: bytes, size: tuple[int, int] | None, beside: Beside) -> Facts:
        """Objects and images of each category. Raises BadImage."""
        if not is_annotation(document_of(data)):
            return {"others": Counter({"files": 1})}
        objects = objects_of(data, size, beside)
        boxes = Counter(str(each["category_id"]) for each in objects if has_area(each))
        crowds = sum(bool(each.get("iscrowd")) for each in objects)
        flat = sum(not has_area(each) for each in objects)
        shapes = [each for each in objects if isinstance(each.get("segmentation"), list)]
        thin = sum(len(each["segmentation"]) - len(polygons_of(each)) for each in shapes)
        told = {"crowds": crowds, "without area": flat, "images without": int(not boxes)}
        told["thin polygons"] = thin
        facts = {
            "boxes": boxes,
            "images": Counter(dict.fromkeys(boxes, 1)),
            "objects": Counter({what: count for what, count in told.items() if count}),
        }
        if flat:
            image = document_of(data).get("image_id")
            named = [f"{each.get('id')} of image {image}" for each in objects if not has_area(each)]
            facts["flat"] = Counter(named[:_NAMED])
        return facts

    def resized(self, data: bytes, old: tuple[int, int], new: tuple[int, int]) -> bytes:
        """The annotation of an image that is made smaller: boxes, polygons, masks, areas."""
        document = document_of(data)
        if not is_annotation(document):
            return data
        objects = [scaled(each, old, new) for each in objects_of(data, old)]
        document |= {"height": new[0], "width": new[1], "annotations": objects}
        return compact(document)

    def report(self, facts: Facts, beside: Beside) -> list[str]:
        """Boxes and images of each category, for people."""
        boxes = facts.get("boxes", Counter())
        told = facts.get("objects", Counter())
        lines = []
        if others := facts.get("others", Counter())["files"]:
            lines.append(f"{others:,} .json are no annotations: they have no `annotations`")
        if "boxes" in facts:
            lines.append(
                f"{boxes.total():,} boxes of {len(boxes)} categories; {told['images without']:,} "
                f"images without any; {told['crowds']:,} crowds; {told['without area']:,} boxes "
                f"without area and {told['thin polygons']:,} polygons of less than three points "
                "are left out"
            )
        if flat := facts.get("flat"):
            names = sorted(flat)[:_LISTED]
            more = f" and {len(flat) - len(names):,} more" if len(flat) > len(names) else ""
            lines.append(f"boxes without area: object {', '.join(names)}{more}")
        for number in sorted(map(int, boxes)):
            name = f" {beside[number]}" if beside is not None and number in beside else ""
            lines.append(
                f"category {number}{name}: {boxes[str(number)]:,} boxes in "
                f"{facts['images'][str(number)]:,} images"
            )
        return lines


def scaled(each: Mapping[str, Any], old: tuple[int, int], new: tuple[int, int]) -> dict[str, Any]:
    """An object of an image whose size (height, width) changes."""
    down, across = new[0] / old[0], new[1] / old[1]
    found = dict(each)
    found["bbox"] = _scaled(each["bbox"], across, down)
    if "area" in each:
        found["area"] = each["area"] * across * down
    shape = each.get("segmentation")
    if isinstance(shape, dict):
        mask = nearest(mask_of(shape, old).astype(np.uint8), new)
        found["segmentation"] = code_of(mask.astype(bool))
    elif shape is not None:
        found["segmentation"] = [_scaled(polygon, across, down) for polygon in shape]
    return found


def _scaled(numbers: Sequence[float], across: float, down: float) -> list[float]:
    return [number * (down if place % 2 else across) for place, number in enumerate(numbers)]


def compact(document: Any) -> bytes:
    """A document as JSON without spaces."""
    return json.dumps(document, separators=(",", ":")).encode()
