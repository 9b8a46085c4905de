"""Labelled sets that a classifier is judged on, as a user names them: shards, and which of the
classifier's classes a set has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rcmae.config.trees import tree_of
from rcmae.data.batch import Batch
from rcmae.data.index import ShardIndex
from rcmae.data.sets import (
    CLASSES,
    ClassList,
    class_lists,
    class_problems,
    labelled,
    moved,
    names_in,
    unlike,
)
from rcmae.errors import Refused


class LabelledSet(NamedTuple):
    """A set, and how its labels are meant."""

    name: str
    shards: list[str]
    classes: list[int] | None = None  # of the classifier, that compete; None: all
    listed: bool = False  # whether labels are places in `classes`


def sets_of(given: Sequence[str], names: Sequence[str]) -> list[LabelledSet]:
    """The sets of a command line, in its order.

    Args:
        given: NAME=SHARDS, or YAML files of sets.
        names: of the classifier's classes.

    Raises:
        Refused: everything that is wrong with them.
        OSError: a file cannot be read.
    """
    found: list[LabelledSet] = []
    problems = []
    for item in given:
        plain = re.match(r"([\w.-]+)=(.+)", item)
        if plain and not Path(item).is_file():
            found.append(LabelledSet(plain[1], [plain[2]]))
        elif Path(item).suffix in (".yaml", ".yml"):
            for name, about in document_of(Path(item)).items():
                try:
                    found.append(set_of(str(name), about, Path(item).parent, names))
                except Refused as error:
                    problems.append(f"{item}: {name}: {error}")
        else:
            problems.append(f"{item!r} is not a set: give NAME=SHARDS, or a .yaml file of sets")
    called = [each.name for each in found]
    twice = {name for name in called if called.count(name) > 1}
    if twice:
        problems.append(f"two sets are called {', '.join(sorted(twice))}")
    if problems:
        raise Refused("\n".join(problems))
    return found


def refuse_other_classes(
    sets: Sequence[LabelledSet], indexes: Mapping[str, ShardIndex], of: ClassList | None
) -> None:
    """Compare the classes that lie beside the shards of sets with the classifier's.

    Args:
        sets: that it is judged on.
        indexes: theirs, by name.
        of: the classifier's classes; None: not known, the sets are compared among themselves.

    Raises:
        Refused: a label is another class there, of each set the first.
    """
    own = [labelled(each.name, indexes[each.name]) for each in sets if not each.listed]
    problems = [] if of is not None else class_problems(own)
    for each in sets if of is not None else ():
        for beside in class_lists(indexes[each.name]):
            assert of is not None
            mine = of
            if each.listed and each.classes is not None:
                # its label is a place in a list of the classifier's classes
                names = tuple(of.names[at] for at in each.classes if at < len(of.names))
                mine = ClassList(f"{of.where}, of the classes of {each.name},", names)
            same_words = Path(of.where).name == CLASSES
            if told := (unlike if same_words else moved)(mine, beside):
                problems.append(f"{each.name} has other classes than the classifier: {told}")
                break
    if problems:
        raise Refused("\n".join(problems))


def set_of(name: str, about: Any, folder: Path, names: Sequence[str]) -> LabelledSet:
    """A set of a file in `folder`. Raises Refused."""
    known = {"shards", "classes", "labels"}
    if not isinstance(about, dict) or "shards" not in about or set(about) - known:
        raise Refused(f"needs shards, and may have classes and labels; got {about!r}")
    labels = about.get("labels", "own")
    classes = about.get("classes")
    if labels not in ("own", "listed"):
        raise Refused(f"labels={labels!r}; use own or listed")
    if labels == "listed" and classes is None:
        raise Refused("labels: listed wants the list, as classes")
    shards = about["shards"] if isinstance(about["shards"], list) else [about["shards"]]
    chosen = None if classes is None else classes_of(classes, folder, names)
    return LabelledSet(name, shards, chosen, labels == "listed")


def classes_of(given: Any, folder: Path, names: Sequence[str]) -> list[int]:
    """Numbers of classes from a list of numbers or names, or a file of them, a line each.

    Raises:
        Refused: one of them is unknown or there twice, or the file is not there.
    """
    if isinstance(given, str):
        try:
            given = [name for name in names_in(folder / given) if name]
        except Refused as error:
            raise Refused(f"classes={given}: {error}") from error
    if not isinstance(given, list):
        raise Refused(f"classes={given!r}; give a list or a file")
    places = {name: number for number, name in enumerate(names)}
    found: list[int] = []
    unknown = []
    both = []  # called by the number of another one
    for item in given:
        if not isinstance(item, str) or item.isdecimal():
            number = int(item) if str(item).isdecimal() else -1
            if isinstance(item, str) and places.get(item, number) != number:
                both.append(item)
            if number < 0:
                unknown.append(str(item))
            found.append(number)
        elif item in places:
            found.append(places[item])
        else:
            unknown.append(item)
    if both:
        raise Refused(
            f"classes {', '.join(both[:5])} are numbers and names of other classes; give names "
            "that are not numbers, or a list of numbers"
        )
    if unknown:
        why = "not numbers, and there are no class names"
        if names:
            why = f"none of the {len(names)} class names"
        raise Refused(f"classes {', '.join(unknown[:5])} are {why}; give --class-names")
    if len(set(found)) < len(found):
        raise Refused("classes has one of them twice")
    return found


def document_of(path: Path) -> dict[str, Any]:
    """A JSON or YAML file of names and what they stand for. Raises Refused, OSError."""
    try:
        found = tree_of(path.read_text())
    except UnicodeDecodeError as error:
        raise Refused(f"{path} is neither JSON nor YAML: {error}") from error
    except Refused as error:
        raise Refused(f"{path} {error}") from error
    if not isinstance(found, dict):
        raise Refused(
            f"{path} should hold names and what they stand for, got {type(found).__name__}"
        )
    return found


def relabelled(batches: Iterator[Batch], classes: Sequence[int]) -> Iterator[Batch]:
    """The batches with the classifier's numbers for places in a list.

    A place beyond it becomes -1, to be refused.
    """
    table = torch.tensor(classes)
    for batch in batches:
        assert batch.labels is not None
        inside = (batch.labels >= 0) & (batch.labels < len(table))
        labels = torch.where(inside, table[batch.labels.clamp(0, len(table) - 1)], -1)
        yield replace(batch, labels=labels)
