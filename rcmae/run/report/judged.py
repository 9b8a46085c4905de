"""What evaluations found, for people: where each figure has its curve, and the tables of the last.

COCO's figures and the shares of classes are told in %, as all others are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rcmae.run.records.shown import Figure
from rcmae.run.report.axes import told
from rcmae.run.report.reading import Seen

KINDS = {
    "knn": "k-NN, top-1 in %",
    "logistic": "logistic regression, top-1 in %",
    "scores": "test set",
    "segmentation": "segmentation, in %",
    "dense": "dense k-NN, in %",
    "rankme": "RankMe: effective rank of the features",
    "lidar": "LiDAR: effective rank between images",
    "held": "held images, fixed masks",
}
NETWORKS = ("student", "teacher", "random", "pixels")
_NAMES = {
    "miou": "mIoU",
    "macc": "mean accuracy of the classes",
    "aacc": "accuracy of the pixels",
    "top1": "top-1 in %",
    "top5": "top-5 in %",
}
COCO = ("box", "mask")  # a figure's group begins with one of them
_BY_SIZE = {"APs": "small", "APm": "medium", "APl": "large"}
_OVERLAPS = ("AP", "AP50", "AP75")
PARTS = (*_OVERLAPS, *_BY_SIZE.values())  # of panels with several curves of a network
_COCO_SHOWN = (*_OVERLAPS, *_BY_SIZE, "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_HISTORY = 12  # evaluations of the table of all
_CLASSES = 1000  # rows of a table of classes
_CONFUSED = 20  # pairs of classes that were taken for each other
_OPEN = 24  # rows, up to which a table is open
_OF_CLASSES = {
    "iou": "IoU in %",
    "accuracy": "accuracy in %",
    "share": "share in %",
    "top1": "top-1 in %",
    "images": "images",
}
_FRACTIONS = ("iou", "accuracy", "share")


class Place(NamedTuple):
    """Where a figure is shown."""

    title: str  # of a panel, and of a table's row
    network: str  # empty: of none
    part: str = ""  # of a panel with several curves of a network


class Table(NamedTuple):
    """Texts in rows and columns."""

    columns: list[str]
    rows: list[list[str]]


class Part(NamedTuple):
    """A table of an evaluation, with its name."""

    title: str
    table: Table
    is_open: bool = True


def place_of(figure: Figure) -> Place:
    """Where a figure belongs."""
    kind, network, name = figure.group, "", figure.name
    for each in NETWORKS:
        if kind == each or kind.endswith(f"_{each}"):
            kind, network = kind.removesuffix(each).rstrip("_"), each
        elif name == each:
            name, network = "", each
    if kind in COCO and name in _COCO_SHOWN:
        if name in _BY_SIZE:
            return Place(f"{kind} AP by size, in %", network, _BY_SIZE[name])
        if name in _OVERLAPS:
            return Place(f"{kind} AP, in %", network, name)
        return Place(f"{kind} {name}, in %", network)
    title = KINDS.get(kind, kind.replace("_", " "))
    if kind == "knn" and name[:1] == "k":
        return Place(f"k-NN (k = {name[1:]}), top-1 in %", network)
    named = _NAMES.get(name, name.replace("_", " "))
    return Place(": ".join(part for part in (title, named) if part), network)


def value_of(figure: Figure) -> float:
    """A figure as it is told; NaN: there is none, as of the AP of large objects where no object
    is large.
    """
    if not _is_coco(figure):
        return figure.value
    return 100 * figure.value if figure.value >= 0 else math.nan


def has_curve(figure: Figure) -> bool:
    """Whether a figure has a curve: COCO's recalls stand in the tables alone."""
    return not (_is_coco(figure) and figure.name.startswith("AR"))


def _is_coco(figure: Figure) -> bool:
    return figure.group.split("_")[0] in COCO and figure.name in _COCO_SHOWN


# ------------------------------------------------------------------------------------------- tables


def last_evaluation(run: Seen) -> list[Part]:
    """The tables of the last evaluation: a row a figure, a column a network; COCO's; of classes."""
    if not run.judged:
        return []
    step = max(run.judged)
    figures = run.judged[step]
    parts = [
        Part("", _figures(step, [each for each in figures if not _is_coco(each)])),
        Part("", _coco(step, [each for each in figures if _is_coco(each)])),
        *_of_document(run.document),
    ]
    return [part for part in parts if part.table.rows]


def history(run: Seen) -> Table:
    """The newest evaluations: a row a step, a column a figure that has a curve."""
    steps = sorted(run.judged)[-_HISTORY:]
    columns: dict[str, dict[int, str]] = {}
    for step in steps:
        for figure in filter(has_curve, run.judged[step]):
            place = place_of(figure)
            title = ", ".join(part for part in (place.title, place.part, place.network) if part)
            columns.setdefault(title, {})[step] = _told(value_of(figure))
    rows = [[f"{step:,}", *(cells.get(step, "") for cells in columns.values())] for step in steps]
    return Table(["step", *columns], rows[::-1])


def _figures(step: int, figures: Sequence[Figure]) -> Table:
    """A row a figure, a column a network."""
    networks, found = by_network(figures)
    rows = [
        [str(title), *("" if each is None else _told(each) for each in row)]
        for title, *row in found
    ]
    return Table([f"at step {step:,}", *networks], rows)


def by_network(figures: Sequence[Figure]) -> tuple[list[str], list[list[Any]]]:
    """The networks, and of each figure its title and a number of each network, None where there is
    none. What is of no network, as the loss of held images, stands with the student's.
    """
    cells: dict[str, dict[str, float]] = {}
    for figure in figures:
        place = place_of(figure)
        title = f"{place.title}: {place.part}" if place.part else place.title
        cells.setdefault(title, {})[place.network or "student"] = value_of(figure)
    found = {name for row in cells.values() for name in row}
    networks = [name for name in NETWORKS if name in found]
    rows = [[title, *map(row.get, networks)] for title, row in cells.items()]
    return networks, [list(map(_short, row)) for row in rows]


def _short(value: Any) -> Any:
    """A number in six digits, None where it is NaN."""
    if not isinstance(value, float):
        return value
    return None if math.isnan(value) else float(f"{value:.6g}")


def _coco(step: int, figures: Sequence[Figure]) -> Table:
    """A row a kind and network, a column a figure; as COCO names them."""
    rows: dict[str, dict[str, str]] = {}
    for figure in figures:
        kind = figure.group.split("_")[0]
        row = rows.setdefault(f"{kind}, {place_of(figure).network}".removesuffix(", "), {})
        row[figure.name] = _told(value_of(figure))
    columns = [name for name in _COCO_SHOWN if any(name in row for row in rows.values())]
    cells = [[title, *(row.get(name, "") for name in columns)] for title, row in rows.items()]
    return Table([f"at step {step:,}, in %", *columns], cells)


def _told(value: float) -> str:
    return "none" if math.isnan(value) else told(value)


# --------------------------------------------------------------------------------------- of classes


def _of_document(document: Mapping[str, Any]) -> Iterator[Part]:
    """Tables of evaluation/step-*.json, whose lines somebody may have edited."""
    for kind, networks in (("", document.get("networks")), ("dense k-NN", document.get("dense"))):
        for network, row in _mapping(networks).items():
            named = ", ".join(part for part in (kind, str(network)) if part)
            classes = _mappings(_mapping(row).get("classes"))
            yield _part(f"classes: {named}", _classes(classes))
            yield _part(f"categories: {network}", _categories(_mapping(row)))
            names = {each.get("class"): str(each.get("name")) for each in classes}
            confused = _confused(_mapping(row).get("confused"), names)
            yield Part(f"what was taken for what most often: {named}", confused, is_open=False)
    missing = document.get("untrained")
    if isinstance(missing, list) and missing:
        rows = [[str(name)] for name in missing[:_CLASSES]]
        yield _part("classes that training never showed", Table(["class"], rows))


def _part(title: str, table: Table) -> Part:
    return Part(title, table, is_open=len(table.rows) <= _OPEN)


def _classes(classes: Sequence[Mapping[str, Any]]) -> Table:
    keys = [key for key in _OF_CLASSES if any(key in row for row in classes)]
    rows = []
    for row in classes[:_CLASSES]:
        cells = [_cell(row.get(key), 100 if key in _FRACTIONS else 1) for key in keys]
        rows.append([str(row.get("name", row.get("class", ""))), *cells])
    return Table(["class", *(_OF_CLASSES[key] for key in keys)], rows)


def _categories(row: Mapping[str, Any]) -> Table:
    """Of the kinds of COCO's scores: the AP of each category."""
    found: dict[str, dict[str, str]] = {}
    kinds = {"bbox": "box AP in %", "segm": "mask AP in %"}
    there = [kind for kind in kinds if kind in row]
    for kind in there:
        for category in _mappings(_mapping(row[kind]).get("categories"))[:_CLASSES]:
            cells = found.setdefault(str(category.get("name", "")), {})
            cells[kind] = _cell(category.get("AP"), 100)
    rows = [[name, *(cells.get(kind, "") for kind in there)] for name, cells in found.items()]
    return Table(["category", *(kinds[kind] for kind in there)], rows)


def _confused(found: Any, names: Mapping[Any, str]) -> Table:
    """Rows of [class, taken for, images], or of names and shares of all pixels."""
    if not isinstance(found, list):
        return Table([], [])
    rows, last = [], "images"
    for each in found[:_CONFUSED]:
        if isinstance(each, Mapping):
            last = "share of all pixels, in %"
            share = _cell(each.get("share"), 100)
            rows.append([str(each.get("label")), str(each.get("taken_for")), share])
        elif isinstance(each, list) and len(each) == 3:
            one, other = (names.get(number, str(number)) for number in each[:2])
            rows.append([one, other, str(each[2])])
    return Table(["class", "taken for", last], rows)


def _cell(value: Any, factor: int) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
        return "none"
    return told(factor * value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []
