"""COCO's annotations, a JSON for all images, as an annotation beside each image.

Images without objects are left out, as detectors are published to be trained: those whose
annotations are crowds alone, too."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rcmae.data.members.annotations import compact, has_area, is_box
from rcmae.data.packing.folders import walked
from rcmae.data.packing.found import Found, Named, Other, some
from rcmae.errors import Refused, counted
from rcmae.files import aside

_Row = dict[str, Any]


def in_coco(path: Path, folder: Path, spool: Path, *, keep_empty: bool) -> Found:
    """The images that a JSON names, each with its annotation.

    Args:
        path: of the JSON.
        folder: of the images.
        spool: a file for the annotations, which are then read from it by offset.
        keep_empty: take images without objects, too.

    Raises:
        Refused: the JSON is not in COCO's format, or none of its images is in the folder.
    """
    images, annotations, categories = _tables(path)
    there = walked(folder)
    files = {*there.images}
    gone = [row["file_name"] for row in images if row["file_name"] not in files]
    if len(gone) == len(images):
        raise Refused(
            f"{path} names {len(images):,} images, and none of them is in {folder}: "
            f"{some(gone, len(gone))}"
        )
    of_image, notes = _by_image(path, images, annotations, categories)
    named = []
    empty = 0
    spool.parent.mkdir(parents=True, exist_ok=True)
    with aside(spool) as out:
        for row in images:
            objects = of_image.get(row["id"], [])
            if row["file_name"] not in files:
                continue
            if not keep_empty and not any(not each.get("iscrowd") for each in objects):
                empty += 1
                continue
            data = compact(
                {
                    "image_id": row["id"],
                    "height": row["height"],
                    "width": row["width"],
                    "annotations": objects,
                }
            )
            digest = hashlib.sha256(data).hexdigest()[:16]
            other = Other("annotation", str(spool), out.tell(), len(data), digest=digest)
            out.write(data)
            place = str(folder / row["file_name"])
            named.append(Named(row["file_name"], None, place, others=(other,)))
    if not named:
        raise Refused(f"{path}: no image has an object; --keep-empty packs images without any")
    if empty:
        notes.append(
            f"{counted(empty, 'image')} without objects left out (--keep-empty takes such)"
        )
    unnamed = sorted(files - {row["file_name"] for row in images})
    if unnamed:
        notes.append(f"{counted(len(unnamed), 'image')} not named in {path.name}: {_some(unnamed)}")
    listed = json.dumps([{"id": row["id"], "name": row["name"]} for row in categories])
    return Found(
        named,
        others=there.others,
        notes=[f"{len(categories)} categories, in categories.json with their ids", *notes],
        files={"categories.json": listed.encode()},
        gone=gone,
    )


def _tables(path: Path) -> tuple[list[_Row], list[_Row], list[_Row]]:
    """(images, annotations, categories) of a JSON. Raises Refused."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise Refused(f"--coco {path}: there is no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{path} cannot be read as JSON ({error})") from error
    wanted = {
        "images": {"id": int, "file_name": str, "height": int, "width": int},
        "annotations": {"image_id": int, "category_id": int, "bbox": list},
        "categories": {"id": int, "name": str},
    }
    tables = []
    for name, fields in wanted.items():
        rows = document.get(name) if isinstance(document, dict) else None
        if not isinstance(rows, list):
            raise Refused(f"{path} has no list `{name}`: it is not in COCO's format for objects")
        for row in rows:
            for key, kind in fields.items():
                if not isinstance(row, dict) or type(row.get(key)) is not kind:
                    raise Refused(
                        f"{path}: {name}: {key} is missing or no {kind.__name__}: {row!r:.200}"
                    )
            if name == "annotations" and not is_box(row["bbox"]):
                raise Refused(f"{path}: bbox is not four numbers: {row!r:.200}")
        tables.append(rows)
    images, annotations, categories = tables
    for name, rows, key in (
        ("images", images, "id"),
        ("images", images, "file_name"),
        ("categories", categories, "id"),
    ):
        _refuse_twice(path, name, rows, key)
    for row in images:
        if os.path.isabs(row["file_name"]) or ".." in Path(row["file_name"]).parts:
            raise Refused(f"{path}: file_name={row['file_name']!r} leads out of the folder")
    return images, annotations, categories


def _refuse_twice(path: Path, name: str, rows: Sequence[_Row], key: str) -> None:
    counts = Counter(row[key] for row in rows)
    twice = [str(value) for value, count in counts.items() if count > 1]
    if twice:
        raise Refused(f"{path}: {name}: {key} is there twice: {_some(twice)}")


def _by_image(
    path: Path, images: Sequence[_Row], annotations: Sequence[_Row], categories: Sequence[_Row]
) -> tuple[Mapping[int, list[_Row]], list[str]]:
    """(the annotations of each image, without its id; what was left out, a line each).

    Raises:
        Refused: an annotation is of a category that is not listed.
    """
    known = {row["id"] for row in categories}
    unknown = sorted({row["category_id"] for row in annotations} - known)
    if unknown:
        raise Refused(f"{path}: categories lack {_some(list(map(str, unknown)))}")
    ids = {row["id"] for row in images}
    found: dict[int, list[_Row]] = {}
    flat, nobody = [], 0
    for row in annotations:
        if row["image_id"] not in ids:
            nobody += 1
        elif len(row["bbox"]) == 4 and not has_area(row):
            flat.append(str(row.get("id")))
        else:
            kept = {key: value for key, value in row.items() if key != "image_id"}
            found.setdefault(row["image_id"], []).append(kept)
    notes = []
    if flat:
        notes.append(f"{len(flat):,} boxes without area are left out: ids {_some(flat)}")
    if nobody:
        notes.append(f"{nobody:,} annotations are of no image and are left out")
    return found, notes


def _some(names: Sequence[str]) -> str:
    return some(names, len(names))
