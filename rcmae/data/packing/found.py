"""What is found before shards are written: images with names, labels, maps and annotations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

_NAMED = 5  # of many files that a message is about


class Source(NamedTuple):
    """An image, a file or a part of one, and what it becomes."""

    path: str
    key: str
    label: int | None
    offset: int = 0
    size: int = -1  # bytes; -1: to the end of the file
    name: str = ""  # what messages call it, where that is not the path
    others: tuple[Other, ...] = ()  # what belongs to it

    def read(self) -> bytes:
        """The encoded image. Raises OSError."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Other(NamedTuple):
    """A member beside an image: a map or an annotation, a file or a part of one."""

    kind: str  # of members: map, annotation
    path: str
    offset: int = 0
    size: int = -1  # bytes; -1: to the end of the file
    recode: str = ""  # how a map's numbers are changed: a name in `layouts.RECODED`
    classes: int = 0  # so many may be in a map; 0: any
    digest: str = ""  # of bytes that are no file of the user's

    def read(self) -> bytes:
        """Its bytes. Raises OSError."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Named(NamedTuple):
    """An image that was found, before it has a key and a number for its class."""

    name: str  # decides its place in the order
    label: str | int | None
    path: str
    offset: int = 0
    size: int = -1
    others: tuple[Other, ...] = ()  # what belongs to it


class Found(NamedTuple):
    """All images of an input."""

    images: list[Named]
    others: Sequence[str] = ()  # files that no image suffix names: not looked at
    notes: Sequence[str] = ()  # what was taken for a label, and what was passed over; a line each
    classes: Sequence[str] | None = None  # of maps, as the set has them; None: not told
    files: Mapping[str, bytes] = MappingProxyType({})  # to lie beside the shards, by their names
    gone: Sequence[str] = ()  # images that are named and not there


def some(names: Sequence[str], of: int) -> str:
    """The first few of `of` names, and how many more there are."""
    more = f" and {of - _NAMED:,} more" if of > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


class Targets(NamedTuple):
    """What a user says of maps and annotations."""

    maps: str | None = None  # a folder, paired with that of the images by names
    coco: str | None = None  # a JSON in COCO's format
    split: str | None = None  # of a set that is laid out in splits
    keep_empty: bool = False  # images without objects, too


class Labelling(NamedTuple):
    """What a user says of labels."""

    column: str | None = None  # of a list or Parquet file; None: label; "none": there is none
    gaps: bool = False  # whether some images may have a label and others none
    # whether all classes are named: one without images then shifts no other
    has_classes: bool = False


NO_TARGETS = Targets()
