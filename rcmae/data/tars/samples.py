"""Samples of a tar: its members grouped by their keys as WebDataset does, and what is not used.

Neighbours with one key are a sample. What WebDataset would lose is found (links, members apart from
their image) or counted with a reason: nothing in a tar goes unsaid."""

from __future__ import annotations

import contextlib
import posixpath
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rcmae.data.tars.headers import (
    FOLDER,
    HARD_LINK,
    REGULAR,
    SPARSE,
    SYMBOLIC_LINK,
    BrokenTar,
    Header,
    Walk,
)
from rcmae.data.tars.kinds import KIND_OF_SUFFIX, dotted

_NETPBM = ("ppm", "pgm", "pbm", "pnm")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", *_NETPBM, "tif", "tiff", "gif", "npy")
FIRST_DOT = "first-dot"  # WebDataset's: a key ends at the first dot of a name
LAST_DOT = "last-dot"  # or at the last, but a kind's suffix such as `.seg.png` stays whole
RULES = (FIRST_DOT, LAST_DOT)
_SYSTEM_FOLDER = r"__MACOSX|@eaDir|#recycle|lost\+found|[.]ipynb_checkpoints|[.]Trash[^/]*"
_SYSTEM = re.compile(
    rf"(?:.*/)?(?:(?:{_SYSTEM_FOLDER})/.*|[.][^/]*|thumbs[.]db|desktop[.]ini)",
    re.DOTALL | re.IGNORECASE,
)
_METADATA = re.compile(r"__[^/]*__")  # of WebDataset
_PLAIN_EXTRA = re.compile(r"[a-z][a-z_-]*[0-9]?[.][a-z]+")  # depth.png, mask2.png
_LABEL_LIKE = {"label", "labels", "class", "target", "lbl", "cls_id", "y"}  # suffixes
_EXAMPLES = 3
_HOPS = 40  # links to links

# what may be said of a tar: what it was -> the words, after a number
WORDS = {
    "several_images": (
        "samples have several images under one key, and one of them is used; a key ends at the "
        f"first dot of a name: rcmae shards index --keys {LAST_DOT} ends it at the last"
    ),
    "twice": "members have the key and suffix of the one before: the first is used",
    "dotted_labels": (
        "labels have a dot in their suffix and are not used; a key ends at the first dot of a "
        f"name: rcmae shards index --keys {LAST_DOT} ends it at the last"
    ),
    "other_labels": "samples have no .cls, but a member that may be their label: not used",
    "without_image": "samples have no image: left out",
    "unnamed": "files without a dot in their names are not used",
    "links": "links lead to no file of the tar",
    "sparse": "sparse files cannot be read by offset",
    "special": "members are not files, links or folders",
    "too_large": "samples have an image of 4 GiB or a key of 64 kB: left out",
    "junk": "bytes behind the end mark are not part of the tar: not read",
    "bad_labels": "samples have a .cls that is not a class number: they count as unlabelled",
    "negative_labels": "samples have a negative label: they count as unlabelled",
    "system": "files of operating systems (._*, .DS_Store, __MACOSX/) are passed over",
    "behind": "members lie behind an end mark, as tars joined with cat have it: they are used",
    "apart": "samples have members apart from their images: they are used",
    "linked": "members are links to others of the tar: they are used",
}
# of these, what a copy would lose; the others are understood
LOST = tuple(WORDS)[: tuple(WORDS).index("bad_labels")]


class Place(NamedTuple):
    """Where the content of a member lies."""

    offset: int  # in bytes from the start of the tar
    size: int
    checksum: int  # of the header right before it


class Note(NamedTuple):
    """What is to be said of a tar."""

    what: str  # of WORDS
    number: int
    such_as: tuple[str, ...]  # a few names

    def __str__(self) -> str:
        names = ", ".join(f"{name!r:.100}" for name in self.such_as)
        return f"{self.number:,} {WORDS[self.what]}" + (f" (such as {names})" if names else "")


class Notes:
    """Counts of what is to be said, each with a few names."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, tuple[str, ...]]] = {}

    def add(self, what: str, name: str = "", count: int = 1) -> None:
        """One more; `name` is shown if it is among the first."""
        before, names = self._found.get(what, (0, ()))
        if name and len(names) < _EXAMPLES:
            names = (*names, name[:200])
        self._found[what] = (before + count, names)

    def __iter__(self) -> Iterator[Note]:
        """In the order of WORDS."""
        for what in WORDS:
            if what in self._found:
                yield Note(what, *self._found[what])


def together(notes: Iterable[tuple[str, Note]]) -> list[Note]:
    """(name of a shard, what is to be said of it) of many: one of each kind."""
    all_notes = Notes()
    for shard, note in notes:
        first, *_ = (*note.such_as, "")
        all_notes.add(note.what, f"{shard}/{first}" if first else shard, note.number)
    return list(all_notes)


class Apart(NamedTuple):
    """What is not where its neighbours are."""

    links: dict[int, Place]  # offset of a link -> what it leads to
    members: dict[str, dict[str, Place]]  # key of an image elsewhere -> suffix -> member


_NOTHING_APART = Apart({}, {})


class Contents:
    """The samples of an open tar, in its order: (key, suffix -> place of a member).

    Groups without an image come, too. After the last one `notes` has what is to be said."""

    def __init__(self, file: int, rule: str = FIRST_DOT, apart: Apart = _NOTHING_APART) -> None:
        """The tar of a descriptor; `apart` comes of `surveyed`."""
        self._file = file
        self._rule = rule
        self._apart = apart
        self._is_surveyed = apart is not _NOTHING_APART
        self.notes = Notes()
        self.first_names: list[str] = []
        self.needs_survey = False  # there are links, or groups without an image

    def __iter__(self) -> Iterator[tuple[str, dict[str, Place]]]:
        """Raises BrokenTar where the tar breaks off, after the whole samples before that."""
        self.notes = Notes()
        self.first_names = []
        waiting = dict(self._apart.members)
        for key, members in self._neighbours():
            if image_suffix(members) is None:
                self.needs_survey = True
                if key in self._apart.members:
                    continue
                self.notes.add("without_image", key)
            elif key in waiting:
                for suffix, place in waiting.pop(key).items():
                    members.setdefault(suffix, place)
                self.notes.add("apart", key)
            self._say(key, members)
            yield key, members

    def surveyed(self) -> Contents:
        """The same tar with its links followed, and members joined to their images.

        It reads the headers up to four times. A tar that breaks off is surveyed up to there."""
        links = _followed(self._file)
        seen = Contents(self._file, self._rule, Apart(links, {}))
        without: dict[str, dict[str, Place]] = {}
        keys = set()
        with contextlib.suppress(BrokenTar):
            for key, members in seen._neighbours():
                if image_suffix(members) is None:
                    without[key] = members | without.get(key, {})
                else:
                    keys.add(key)
        joined = {key: members for key, members in without.items() if key in keys}
        return Contents(self._file, self._rule, Apart(links, joined))

    def _neighbours(self) -> Iterator[tuple[str, dict[str, Place]]]:
        walk = Walk(self._file)
        current: str | None = None
        members: dict[str, Place] = {}
        split = _split(self._rule)
        broken: BrokenTar | None = None
        headers = iter(walk)
        while True:
            try:
                header = next(headers, None)
            except BrokenTar as error:
                header, broken = None, error
            if header is None:
                break
            if len(self.first_names) < _EXAMPLES:
                self.first_names.append(header.name)
            place = self._place(header)
            if place is None:
                continue
            match = split.match(header.name)
            if match is None:
                if not _METADATA.fullmatch(header.name):
                    self.notes.add("unnamed", header.name)
                continue
            key = match[1]
            suffix = match[2].lower()
            if key != current:
                if members:
                    yield str(current), members
                current = key
                members = {}
            if members.setdefault(suffix, place) != place:
                self.notes.add("twice", header.name)
        if members:
            yield str(current), members
        if broken is not None:
            raise broken
        if walk.behind:
            self.notes.add("behind", count=walk.behind)
        if walk.junk:
            self.notes.add("junk", count=walk.junk)

    def _place(self, header: Header) -> Place | None:
        """Where the content of a member lies; None if it is not to be used."""
        if header.kind == FOLDER:
            return None
        if _SYSTEM.fullmatch(header.name):
            self.notes.add("system", header.name)
            return None
        if header.kind in REGULAR:
            return Place(header.offset, header.size, header.checksum)
        if header.kind not in (HARD_LINK, SYMBOLIC_LINK):
            self.notes.add("sparse" if header.kind == SPARSE else "special", header.name)
            return None
        self.needs_survey = True
        place = self._apart.links.get(header.offset)
        self.notes.add("links" if place is None else "linked", header.name)
        return place

    def _say(self, key: str, members: dict[str, Place]) -> None:
        if len(members) == 1:
            return
        if _is_ambiguous(members):
            self.notes.add("several_images", key)
        if "cls" not in members:
            labels = sum(suffix.endswith(".cls") for suffix in members)
            if labels:
                self.notes.add("dotted_labels", key, labels)
            elif not _LABEL_LIKE.isdisjoint(members):
                self.notes.add("other_labels", key)


def _split(rule: str) -> re.Pattern[str]:
    """What matches the name of a member: its key, and its suffix."""
    if rule == FIRST_DOT:
        return re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
    suffix = rf"{dotted(KIND_OF_SUFFIX)}[^/.]*"
    return re.compile(rf"((?:.*/|)[^/]+?)[.]({suffix})$", re.DOTALL | re.IGNORECASE)


def _is_ambiguous(members: Iterable[str]) -> bool:
    """Whether it is not clear which of a sample's images is the image."""
    images = [
        suffix for suffix in _images(members) if not suffix.endswith("npy")
    ]  # an array beside them
    plain = [suffix for suffix in images if "." not in suffix]
    others = [suffix for suffix in images if "." in suffix]
    if len(images) < 2:
        return False
    return len(plain) != 1 or not all(map(_PLAIN_EXTRA.fullmatch, others))


def image_suffix(members: Iterable[str]) -> str | None:
    """The suffix of the member that is a sample's image, if it has one."""
    # "jpg" before "mask.png" and before an array; else the first
    return min(
        _images(members),
        key=lambda suffix: (suffix.endswith("npy"), suffix.count(".")),
        default=None,
    )


def _images(members: Iterable[str]) -> list[str]:
    """The suffixes that name an image, and no member of another kind."""
    images = [suffix for suffix in members if suffix.rpartition(".")[2] in IMAGE_SUFFIXES]
    return [suffix for suffix in images if suffix not in KIND_OF_SUFFIX]


def _followed(file: int) -> dict[int, Place]:
    """Offset of a link -> what it leads to in the tar, over other links, too."""
    links: dict[str, str] = {}
    asked: dict[int, str] = {}  # offset of a link -> name
    with contextlib.suppress(BrokenTar):
        for header in Walk(file):
            if header.kind in (HARD_LINK, SYMBOLIC_LINK):
                name = posixpath.normpath(header.name)
                top = posixpath.dirname(name) if header.kind == SYMBOLIC_LINK else ""
                links[name] = posixpath.normpath(posixpath.join(top, header.link))
                asked[header.offset] = name
    wanted = {*links.values()}
    places: dict[str, Place] = {}
    with contextlib.suppress(BrokenTar):
        for header in Walk(file) if links else ():
            name = posixpath.normpath(header.name)
            if header.kind in REGULAR and name in wanted:
                places[name] = Place(header.offset, header.size, header.checksum)
    found = {}
    for offset, name in asked.items():
        for _ in range(_HOPS):
            name = links.get(name, name)
            if name in places:
                found[offset] = places[name]
                break
    return found
