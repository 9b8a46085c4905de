"""Images to draw pictures of: files, folders of them and shards, cut at the centre and
normalised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from rcmae.data.sets import CLASSES, names_in
from rcmae.data.sources import pread
from rcmae.data.tars import BrokenTar, Contents, Place, image_suffix, label_in
from rcmae.data.transforms import BadImage, CentreTransform, Normalise
from rcmae.errors import Refused

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")
Statistics = tuple[Sequence[float], Sequence[float]]  # mean and deviation of each channel, 0 to 1


class Encoded(NamedTuple):
    """An image as it lies in a file."""

    name: str
    data: bytes
    class_name: str = ""  # that of its folder; of a shard's, by classes.txt or its number; "": none
    is_in_shard: bool = False


class Shown(NamedTuple):
    """Images to draw."""

    pixels: Tensor  # [B, C, H, W] normalised
    names: list[str]
    classes: list[str]  # the name of each one's class; "": none


def encoded(paths: Sequence[Path]) -> Iterator[Encoded]:
    """Every image under these files, folders and shards, in the order of their names.

    A folder's own come first; then one of each of its sub-folders in turn, so that the first few
    are of all classes. Hidden folders are passed over.

    Raises:
        Refused: a shard is none.
        OSError: something cannot be read.
    """
    for path in paths:
        if path.is_dir():
            inside = [each for each in sorted(path.iterdir()) if each.name[0] != "."]
            folders = [each for each in inside if each.is_dir()]
            yield from encoded([each for each in inside if _is_image_or_shard(each)])
            yield from _in_turn([_of_class(folder) for folder in folders])
        elif path.suffix == ".tar":
            yield from _in_shard(path)
        else:
            yield Encoded(path.name, path.read_bytes())


def _of_class(folder: Path) -> Iterator[Encoded]:
    """The images of a sub-folder, which is their class; those in shards have their own."""
    for image in encoded([folder]):
        yield image if image.is_in_shard else image._replace(class_name=folder.name)


def _is_image_or_shard(path: Path) -> bool:
    return path.suffix.lower() in (*SUFFIXES, ".tar") and not path.is_dir()


def _in_turn(each: Sequence[Iterator[Encoded]]) -> Iterator[Encoded]:
    while each:
        found = [(one, next(one, None)) for one in each]
        yield from (image for _, image in found if image is not None)
        each = [one for one, image in found if image is not None]


def _in_shard(path: Path) -> Iterator[Encoded]:
    """The images of a WebDataset shard with their classes. Raises Refused."""
    listed = path.with_name(CLASSES)
    names = names_in(listed) if listed.is_file() else ()
    try:
        with path.open("rb") as file:
            for key, members in Contents(file.fileno()).surveyed():
                suffix = image_suffix(members)
                if suffix is None:
                    continue
                label = label_in(_bytes(file, members["cls"])) if "cls" in members else None
                class_name = _class_name(names, label)
                yield Encoded(key, _bytes(file, members[suffix]), class_name, is_in_shard=True)
    except BrokenTar as error:
        raise Refused(f"{path} cannot be read as a tar: {error}") from error


def _class_name(names: Sequence[str], label: int | None) -> str:
    if label is None or label < 0:
        return ""
    return names[label] if label < len(names) else str(label)


def _bytes(file: BinaryIO, place: Place) -> bytes:
    return pread(file.fileno(), place.size, place.offset)


def load_images(
    paths: Sequence[Path], size: tuple[int, int], statistics: Statistics, count: int
) -> Shown:
    """The first `count` images, cut at the centre to `size`, normalised by mean and deviation of
    each channel.

    Raises:
        Refused: there is none, or one is not an image.
        OSError: something cannot be read.
    """
    transform = CentreTransform(size, len(statistics[0]))
    images = list(islice(encoded(paths), count))
    if not images:
        raise Refused(
            f"no image in {', '.join(map(str, paths))}; give files ending in {', '.join(SUFFIXES)}"
        )
    pixels = []
    names = []
    classes = []
    for image in images:
        names.append(image.name)
        classes.append(image.class_name)
        try:
            pixels.append(transform(image.data, 0, 0).image)
        except BadImage as error:
            raise Refused(f"{image.name} is not an image that can be decoded: {error}") from error
    return Shown(Normalise(*statistics).images(torch.stack(pixels)), names, classes)
