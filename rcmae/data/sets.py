"""Where two sets of samples meet: whether a label is the same class in both, and whether one is the
other under another name.

The names of classes lie beside shards, in `classes.txt`: line i, from 0, is the class of label i.
Sets without that file are taken at their word.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from rcmae.data import sources
from rcmae.data.index import ShardIndex
from rcmae.data.sources import USUAL, Patience
from rcmae.data.tars import Shard
from rcmae.errors import Refused
from rcmae.files import patiently

CLASSES = "classes.txt"
LARGEST = 2**24  # bytes of such a file: a million names
_LINE_END = re.compile("\r\n|\r|\n")  # names may hold what else Unicode takes for one
_log = logging.getLogger(__name__)


class ClassList(NamedTuple):
    """Names of classes, in the order of their labels."""

    where: str  # the file
    names: tuple[str, ...]


class Labelled(NamedTuple):
    """A set of samples, as messages call it."""

    key: str  # data.shards, --test, ...
    samples: ShardIndex
    classes: tuple[ClassList, ...] = ()  # that lie beside its shards


def lines_of(text: str) -> tuple[str, ...]:
    """The names in a file of classes; empty lines at its end and a byte order mark are none."""
    text = text.removeprefix("\ufeff").rstrip()
    return tuple(line.strip() for line in _LINE_END.split(text)) if text else ()


def names_in(path: str | Path) -> tuple[str, ...]:
    """The names in a file of classes. Raises Refused: it cannot be read, or is no list of names."""
    try:
        return lines_of(patiently(lambda: _bytes_of(Path(path))).decode())
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise Refused(_no_text(path, error)) from error


def names_given(key: str, path: str | None) -> tuple[str, ...]:
    """The names of classes in a file, a name a line, that this key names. Raises Refused."""
    try:
        return names_in(path) if path is not None else ()
    except Refused as error:
        raise Refused(f"{key}: {error}") from error


def _bytes_of(path: Path) -> bytes:
    """What a file of classes holds. Raises OSError; Refused: it is too large for one."""
    with path.open("rb") as file:  # a pipe, too
        content = file.read(LARGEST + 1)  # /dev/zero has no end
    if len(content) > LARGEST:
        raise Refused(
            f"{path} has more than {LARGEST:,} bytes: no list of class names; give a text file "
            "with a name a line"
        )
    return content


def _no_text(where: str | Path, error: UnicodeDecodeError) -> str:
    return (
        f"{where} is not text in UTF-8: {error}; write it anew: iconv -f LATIN1 -t UTF-8 "
        f"{Path(where).name} > FILE, where it is Latin-1"
    )


def class_lists(index: ShardIndex, patience: Patience = USUAL) -> tuple[ClassList, ...]:
    """The files of classes beside the shards of a set. What cannot be read is passed over; what is
    no list of names is told of.
    """
    folders = dict.fromkeys(sources.folder_of(shard.path) for shard in index.shards)
    found = []
    for folder in filter(None, folders):
        where = f"{folder}/{CLASSES}"
        try:
            if "://" in folder:
                content = sources.small_file(where, patience)
            else:
                content = patiently(partial(_bytes_of, Path(where)))
            if content is not None:
                found.append(ClassList(where, lines_of(content.decode())))
        except OSError:
            continue
        except UnicodeDecodeError as error:
            _warn(f"{_no_text(sources.redacted(where), error)}. Its names are left out")
        except Refused as error:
            _warn(f"{error}. Its names are left out")
    return tuple(found)


@cache
def _warn(told: str) -> None:
    """Log a warning, once in a process."""
    _log.warning("%s", told)


def labelled(key: str, index: ShardIndex, patience: Patience = USUAL) -> Labelled:
    """A set with its files of classes."""
    return Labelled(key, index, class_lists(index, patience))


# ------------------------------------------------------------------------------------------ classes


def unlike(one: ClassList, other: ClassList) -> str | None:
    """The first label that is another class in another list; None where all both have agree."""
    for label, (mine, theirs) in enumerate(zip(one.names, other.names, strict=False)):
        if mine != theirs:
            return (
                f"label {label} is {mine!r} in {one.where} and {theirs!r} in {other.where}; pack "
                f"them with one list: rcmae shards make --classes {one.where}"
            )
    return None


def moved(one: ClassList, other: ClassList) -> str | None:
    """The first class that has another label in another list, which may have other words for the
    same classes; None where there is none.
    """
    places = {name: label for label, name in enumerate(one.names)}
    for label, name in enumerate(other.names):
        if places.get(name, label) != label:
            return (
                f"{name!r} is label {places[name]} in {one.where}, and {label} in {other.where}; "
                "one of them has other labels"
            )
    return None


def class_problems(sets: Sequence[Labelled]) -> list[str]:
    """Labels that are not the same class in all sets, or within one: a line for each set."""
    first: tuple[str, ClassList] | None = None
    problems = []
    for each in sets:
        for found in each.classes:
            if first is None:
                first = each.key, found
            elif told := unlike(first[1], found):
                both = " and ".join(dict.fromkeys([first[0], each.key]))
                problems.append(f"{both}: different classes: {told}")
                break
    return problems


# ----------------------------------------------------------------------------------------- the same


def _contents(index: ShardIndex) -> Iterator[tuple[int, int, str]]:
    """What identifies a shard whatever its name: size, samples, their offsets and labels."""
    for shard in index.shards:
        yield shard.size, shard.samples, _rows(shard)


def _rows(shard: Shard) -> str:
    return hashlib.sha256(shard.rows.tobytes()).hexdigest()


def shared(one: ShardIndex, other: ShardIndex) -> int:
    """How many shards of another set this one has, too: the same, or copies of them."""
    sizes = {(shard.size, shard.samples) for shard in one.shards}
    alike = [shard for shard in other.shards if (shard.size, shard.samples) in sizes]
    if not alike:
        return 0
    mine = set(_contents(one))
    return sum((shard.size, shard.samples, _rows(shard)) in mine for shard in alike)


class Meeting(NamedTuple):
    """What stands against judging by one set what another taught."""

    problems: list[str]
    warnings: list[str]


def met(train: Labelled, test: Labelled) -> Meeting:
    """Compare what is learnt from with what is judged on: classes, and that they are two sets."""
    problems = class_problems([train, test])
    warnings = []
    both = shared(train.samples, test.samples)
    if both == len(test.samples.shards) == len(train.samples.shards):
        problems.append(
            f"{test.key} is {train.key}: the same shards, or copies of them; give images that "
            "nothing was learnt from"
        )
    elif both:
        warnings.append(
            f"{both} of {len(test.samples.shards)} shards of {test.key} are in {train.key}, too: "
            "those test images were trained on"
        )
    return Meeting(problems, warnings)


def refuse_meeting(train: Labelled, test: Labelled) -> None:
    """Raise Refused where `met` has problems; log its warnings."""
    meeting = met(train, test)
    if meeting.problems:
        raise Refused("\n".join(meeting.problems))
    for told in meeting.warnings:
        _log.warning("%s", told)
