"""Images with label maps as sets are unpacked: ADE20K, Cityscapes, VOC, or any two folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rcmae.data.packing.folders import walked
from rcmae.data.packing.found import Found, Named, Other, some
from rcmae.errors import Refused

_NO_LABEL = 255  # of 8 bits
_ADE = 150  # classes
_CITYSCAPES = {  # of labelIds that count -> the class in training
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
_VOC = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)


def _table(numbers: Mapping[int, int]) -> NDArray[np.uint8]:
    """[256] what each number becomes; those that are not named are no label."""
    table = np.full(256, _NO_LABEL, np.uint8)
    table[list(numbers)] = list(numbers.values())
    return table


# how the numbers of a map are changed; ADE20K's zero is "other", which is no class
RECODED = {
    "ade20k": _table({number: number - 1 for number in range(1, 256)}),
    "cityscapes": _table({number: place for place, number in enumerate(_CITYSCAPES)}),
}


class Layout(NamedTuple):
    """How a set is unpacked."""

    name: str
    is_here: Callable[[Path], bool]
    found: Callable[[Path, str | None], Found]


def layout_of(folder: Path) -> Layout | None:
    """The layout of a folder; None: it is none that is known."""
    return next((layout for layout in LAYOUTS if layout.is_here(folder)), None)


def in_folders(images: Path, maps: Path) -> Found:
    """The images of a folder with the maps of another, paired by their paths without suffix.

    Raises:
        Refused: there is no image, or one has no map.
    """
    for folder in (images, maps):
        if not folder.is_dir():
            raise Refused(f"{folder} is no folder")
    pictures = walked(images)
    numbers = {_stem(path): str(maps / path) for path in walked(maps).images}
    if not pictures.images:
        raise Refused(f"{images} holds no image among {len(pictures.others)} files")
    pairs = {path: numbers.pop(_stem(path), None) for path in pictures.images}
    if not any(pairs.values()) and numbers:
        there = sorted(numbers.values())
        raise Refused(
            f"no image of {images} has a map of its name in {maps}: {images / pictures.images[0]} "
            f"wants {maps / _stem(pictures.images[0])}.png, and there is {there[0]}; rename them, "
            "or give pairs.csv with the columns path and map in the place of both folders"
        )
    found = _paired(images, pairs, f"in {maps}")
    return found._replace(others=pictures.others, notes=[*found.notes, *_left(numbers)])


def _paired(
    images: Path,
    pairs: Mapping[str, str | None],
    where: str,
    *,
    recode: str = "",
    classes: Sequence[str] | None = None,
) -> Found:
    """Images (paths in a folder) with their maps. Raises Refused where one has none."""
    missing = [path for path, found in pairs.items() if found is None]
    if missing:
        raise Refused(
            f"{len(missing):,} of {len(pairs):,} images of {images} have no map {where}: "
            f"{some(missing, len(missing))}; unpack all maps, or move these images away"
        )
    named = []
    for path, place in pairs.items():
        assert place is not None
        other = Other("map", place, recode=recode)
        named.append(Named(path, None, str(images / path), others=(other,)))
    return Found(named, classes=classes)


def _left(maps: Mapping[str, str]) -> list[str]:
    if not maps:
        return []
    names = [os.path.basename(path) for path in maps.values()]
    return [f"{len(maps):,} maps have no image: {some(names, len(names))}"]


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def name_of_split(split: str | None) -> str:
    """What the shards of a split are named, alike for all sets; of none: train."""
    return {None: "train", "training": "train", "validation": "val"}.get(split) or str(split)


def _split(asked: str | None, there: Sequence[str], what: str) -> str:
    """The split that is meant. Raises Refused where that is not clear."""
    if asked in there:
        assert asked is not None
        return asked
    said = f"--split {asked} is not there" if asked else "say which with --split"
    raise Refused(f"{what} has the splits {', '.join(sorted(there))}: {said}")


def _folders(folder: Path) -> list[str]:
    return [each.name for each in folder.iterdir() if each.is_dir()] if folder.is_dir() else []


# ------------------------------------------------------------------------------------------- ADE20K


def _is_ade(folder: Path) -> bool:
    return {"training", "validation"} & {*_folders(folder / "images")} != set() and (
        (folder / "annotations").is_dir() or (folder / "objectInfo150.txt").is_file()
    )


def _ade(folder: Path, split: str | None) -> Found:
    chosen = _split(split, _folders(folder / "images"), str(folder))
    images, maps = folder / "images" / chosen, folder / "annotations" / chosen
    numbers = (
        {_stem(path): str(maps / path) for path in walked(maps).images} if maps.is_dir() else {}
    )
    pairs = {path: numbers.pop(_stem(path), None) for path in walked(images).images}
    names = _ade_names(folder / "objectInfo150.txt")
    found = _paired(images, pairs, f"in {maps}", recode="ade20k", classes=names)
    notes = [f"ADE20K, {chosen}: 0 is no label, and class n of the set is n - 1", *_left(numbers)]
    return found._replace(notes=notes)


def _ade_names(path: Path) -> list[str]:
    """The names of the classes; numbers where the set has come without them."""
    try:
        rows = path.read_text("utf-8").splitlines()[1:]
        names = [row.split("\t")[-1].strip() for row in rows if row.strip()]
    except (OSError, UnicodeDecodeError):
        names = []
    return names if len(names) == _ADE else [f"class {number}" for number in range(_ADE)]


# --------------------------------------------------------------------------------------- Cityscapes


def _is_cityscapes(folder: Path) -> bool:
    return (folder / "leftImg8bit").is_dir()


def _cityscapes(folder: Path, split: str | None) -> Found:
    top = folder / "leftImg8bit"
    chosen = _split(split, _folders(top), str(folder))
    images, maps = top / chosen, folder / "gtFine" / chosen
    paths = walked(images).images
    ready, ids = (
        {path: _cityscapes_map(maps, path, kind) for path in paths}
        for kind in ("labelTrainIds", "labelIds")
    )
    taken = ready if paths and all(ready.values()) else ids
    recode = "" if taken is ready else "cityscapes"
    names = list(_CITYSCAPES.values())
    found = _paired(images, taken, f"(gtFine, labelIds) in {maps}", recode=recode, classes=names)
    how = (
        "labelTrainIds as they are" if taken is ready else "labelIds to the 19 classes of training"
    )
    return found._replace(notes=[f"Cityscapes, {chosen}: {how}"])


def _cityscapes_map(maps: Path, path: str, kind: str) -> str | None:
    stem = _stem(path).removesuffix("_leftImg8bit")
    place = maps / f"{stem}_gtFine_{kind}.png"
    return str(place) if place.is_file() else None


# ---------------------------------------------------------------------------------------------- VOC


def _is_voc(folder: Path) -> bool:
    return _voc_top(folder) is not None


def _voc_top(folder: Path) -> Path | None:
    """The folder of a year: itself, or the one in it."""
    inside = [folder, *sorted(folder.glob("VOC20*"))] if folder.is_dir() else []
    years = [each for each in inside if (each / "SegmentationClass").is_dir()]
    return years[0] if len(years) == 1 else None


def _voc(folder: Path, split: str | None) -> Found:
    top = _voc_top(folder)
    assert top is not None
    lists = top / "ImageSets" / "Segmentation"
    chosen = _split(split, [path.stem for path in sorted(lists.glob("*.txt"))], str(top))
    try:
        names = (lists / f"{chosen}.txt").read_text("utf-8").split()
    except UnicodeDecodeError as error:
        raise Refused(f"{lists / chosen}.txt: is no text ({error})") from error
    images = top / "JPEGImages"
    absent = [name for name in names if not (images / f"{name}.jpg").is_file()]
    if absent:
        raise Refused(
            f"{lists / chosen}.txt names {len(absent):,} images that are not in {images}: "
            f"{some(absent, len(absent))}"
        )
    pairs: dict[str, str | None] = {}
    for name in names:
        place = top / "SegmentationClass" / f"{name}.png"
        pairs[f"{name}.jpg"] = str(place) if place.is_file() else None
    found = _paired(images, pairs, f"in {top / 'SegmentationClass'}", classes=_VOC)
    return found._replace(notes=[f"{top.name}, {chosen}: palette numbers as they are"])


LAYOUTS = (
    Layout("ADE20K", _is_ade, _ade),
    Layout("Cityscapes", _is_cityscapes, _cityscapes),
    Layout("VOC", _is_voc, _voc),
)
