"""Labels as people, spreadsheets and data frames write them, and the order of classes with names.

A column is whole numbers, however they are spelled, or names: never a guess between the two. An
empty cell and -1 are no label: of some images alone, only where the user says so. What is neither
is refused with its row.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from rcmae.errors import Refused, counted

LARGEST = 2**31 - 1  # that an index has room for
Label = int | str | None
_NAMED = 5  # of many rows that a message is about
_GAPS = {"", "nan", "na", "n/a", "none", "null", "<na>"}  # in a column of numbers
_NUMBER = re.compile(r"[+-]?\d+(\.0*)?([eE]\+?\d+)?")
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf(inity)?", re.IGNORECASE)
_LIKELY = re.compile(
    r"(.*[_ ])?(labels?|lables?|class|classes|categor(y|ies)|targets?|cls|species|synsets?|wnids?"
    r"|gt|ground[_ ]?truth|annotations?|answers?)([_ .]?(id|idx|index|names?|no|\d+))?"
    r"|y"
)
# what data hubs call it, where there is no column `label`
_USUAL = ("labels", "fine_label")


class Taken(NamedTuple):
    """A column of labels, as it was read."""

    labels: list[Label]  # all numbers or all names, None where there is none
    told: str  # what was taken, for people


def column_of(
    wanted: str, names: Sequence[str], asked: str | None = None, *, likely: bool = False
) -> str | None:
    """The column of a table that is called so, whatever its case and spaces; None: there is none.

    Args:
        wanted: the name that it should have.
        names: of all columns.
        asked: the column that the user names instead.
        likely: whether others that could be meant are refused.

    Raises:
        Refused: it is there twice, is not the one asked for, or another could be meant.
    """
    if asked is not None:
        if asked not in names:
            raise Refused(f"no column {asked!r}; it has {', '.join(map(repr, names))}")
        return asked
    alike = [name for name in names if name.strip().lower() == wanted]
    found = [name for name in alike if name == wanted] or alike
    if len(found) > 1:
        raise Refused(f"{len(found)} columns are called {wanted}: {', '.join(map(repr, found))}")
    if found:
        return found[0]
    meant = [name for name in names if _LIKELY.fullmatch(name.strip().lower())]
    usual = [name for name in meant if name in _USUAL]
    if likely and len(usual) == 1:
        return usual[0]
    if likely and meant:
        raise Refused(
            f"no column {wanted}, but {', '.join(map(repr, meant))}; say which has the labels with "
            f"--label {meant[0]}, or --label none"
        )
    return None


def read_labels(
    column: str,
    cells: Sequence[Any],
    place: Callable[[int], str],
    *,
    gaps: bool = False,
    has_classes: bool = False,
) -> Taken:
    """The labels of a column.

    Args:
        column: its name.
        cells: text, or values of any type.
        place: what a message calls the row of a number, from 0.
        gaps: whether some images may have a label and others none.
        has_classes: the classes are listed, so that no other word is taken for one by mistake.

    Raises:
        Refused: they are not labels, or it is not clear which; names the first rows.
    """
    texts = [_text(column, cell, place(row)) for row, cell in enumerate(cells)]
    numbers = [_number(text) for text in texts]
    words = [
        row
        for row, (number, text) in enumerate(zip(numbers, texts, strict=True))
        if number is None and text.lower() not in _GAPS
    ]
    whole = sum(number is not None for number in numbers)
    if words and whole:
        told = _some(texts, words, place)
        if whole < len(words):
            told += f"; the numbers: {_some(texts, _rows(numbers), place)}"
        raise Refused(
            f"the column {column!r} has {whole} whole numbers, and {len(words)} cells that are "
            f"none: {told}; an empty cell or -1 is not a label among numbers, an empty cell among "
            "names"
        )
    if words:
        if all(_DECIMAL.fullmatch(texts[row]) for row in words):
            raise Refused(
                f"the column {column!r} has numbers that are not classes: "
                f"{_some(texts, words, place)}; labels are whole numbers or names"
            )
        doubtful = [row for row, text in enumerate(texts) if text and text.lower() in _GAPS]
        if doubtful and not has_classes:
            raise Refused(
                f"the column {column!r} has {len(words)} names, and {len(doubtful)} cells that may "
                f"be gaps: {_some(texts, doubtful, place)}; empty them and give --unlabelled, or "
                "name all classes, with or without it, by --classes"
            )
        return _taken(column, texts, [text or None for text in texts], place, gaps)
    wrong = [row for row, number in enumerate(numbers) if number is not None and number < -1]
    wrong += [row for row, number in enumerate(numbers) if number is not None and number > LARGEST]
    if wrong:
        raise Refused(
            f"the column {column!r} has {len(wrong)} numbers that are not classes: "
            f"{_some(texts, wrong, place)}; expected 0 to {LARGEST}, or -1 for no label"
        )
    found = [None if number is None or number < 0 else number for number in numbers]
    return _taken(column, texts, found, place, gaps)


def _taken(
    column: str,
    texts: Sequence[str],
    labels: Sequence[Label],
    place: Callable[[int], str],
    gaps: bool,
) -> Taken:
    without = [row for row, label in enumerate(labels) if label is None]
    if 0 < len(without) < len(labels) and not gaps:
        raise Refused(
            f"the column {column!r} has no label for {len(without)} of {len(labels)} images: "
            f"{_some(texts, without, place)}; --unlabelled packs them without one"
        )
    return Taken(list(labels), _told(column, labels))


def _rows(numbers: Sequence[int | None]) -> list[int]:
    return [row for row, number in enumerate(numbers) if number is not None]


def _text(column: str, cell: Any, place: str) -> str:
    """A cell as text, whole numbers of any type as such."""
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return str(int(cell))
    if isinstance(cell, float | Decimal):
        if not math.isfinite(cell):
            return "" if cell != cell else str(cell)
        return str(int(cell)) if cell == int(cell) else str(cell)
    if isinstance(cell, int | str):
        return str(cell).strip()
    raise Refused(
        f"the column {column!r} holds {type(cell).__name__} in {place}; labels are numbers or names"
    )


def _number(text: str) -> int | None:
    """The whole number that a text spells, if it is one."""
    if not _NUMBER.fullmatch(text) or len(text) > 40:
        return None
    value = Decimal(text)
    return int(value) if value.adjusted() < 40 else LARGEST + 1


def _some(texts: Sequence[str], rows: Sequence[int], place: Callable[[int], str]) -> str:
    shown = ", ".join(f"{texts[row]!r} in {place(row)}" for row in rows[:_NAMED])
    return shown + (f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else "")


def _told(column: str, labels: Sequence[Label]) -> str:
    numbers = [label for label in labels if isinstance(label, int)]
    names = {label for label in labels if isinstance(label, str)}
    without = sum(label is None for label in labels)
    what = "no labels at all"
    if numbers:
        what = f"{len(numbers):,} labels, the numbers {min(numbers)} to {max(numbers)}"
    elif names:
        what = f"{len(labels) - without:,} labels, {len(names):,} names"
    gaps = f"; {counted(without, 'image')} without one" if without else ""
    return f"column {column!r}: {what}{gaps}"


# ------------------------------------------------------------------------------------------ classes


def in_order(names: Iterable[str]) -> list[str]:
    """Names of classes in the order of their labels: of whole numbers their own, else the
    alphabet's, as torchvision has it.
    """
    found = sorted(set(names))
    if found and all(name.isdecimal() for name in found):
        found.sort(key=int)
    return found


def order_doubt(names: Sequence[str]) -> str:
    """What a user should know of the order of classes; empty: nothing."""
    if all(name.isdecimal() for name in names):
        if [int(name) for name in names] == list(range(len(names))):
            return ""
        return f"class folders are numbers, and labels their places: {names[0]!r} is label 0"
    natural = sorted(names, key=_natural)
    if natural == list(names):
        return ""
    first = next(at for at, name in enumerate(names) if natural[at] != name)
    return (
        f"classes are in the order of the alphabet: {names[first]!r} is label {first}, before "
        f"{natural[first]!r}; --classes gives another order"
    )


def _natural(name: str) -> list[tuple[int, str]]:
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def refuse_names(names: Sequence[str], what: str) -> None:
    """Raise Refused where a list of classes cannot stand in a classes.txt, a name a line."""
    empty = [number for number, name in enumerate(names) if not name.strip()]
    twice = [name for name, count in Counter(names).items() if count > 1]
    broken = [repr(name) for name in names if "\n" in name or "\r" in name]
    if empty:
        raise Refused(f"{what}: the class of label {empty[0]} has no name")
    if twice:
        raise Refused(f"{what}: classes are named twice: {', '.join(twice[:_NAMED])}")
    if broken:
        raise Refused(f"{what}: names of classes with a line break: {', '.join(broken[:_NAMED])}")
