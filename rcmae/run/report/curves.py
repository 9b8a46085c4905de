"""Panels of curves: which numbers stand together, and the lines, marks and values of each panel.

A million logged steps become a few hundred places: the mean of each, between its least and largest.
What is drawn is text of numbers that are made here; names go through the template's escaping.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rcmae.run.report.axes import BOTTOM, Axis, across, told, upright
from rcmae.run.report.judged import NETWORKS, PARTS, Place, has_curve, place_of, value_of
from rcmae.run.report.reading import Curve, Seen

PLACES = 240  # across a panel, that a long curve is drawn at
HOVERS = 80  # across a panel, that tell their values
_DOTTED = 40  # a curve of fewer numbers has dots
_MARKED = 120  # checkpoints and evaluations that are marked, of each run
_ROW = 5.0  # of marks, in a panel's units

# key of metrics.jsonl -> its title; others are titled by their own names
TITLES = {
    "lr": "learning rate",
    "grad_norm": "norm of the gradient",
    "momentum": "momentum of the teacher",
    "images_per_s": "images a second",
    "step_s": "seconds a step",
    "data_wait_s": "seconds a step that wait for data",
    "memory_peak_gib": "peak memory, GiB",
    "model_tflops": "TFLOP/s of a device",
    "mfu": "share of the device's peak (MFU)",
    "teacher_distance": "teacher's distance from the student, relative L2",
    "teacher_moved": "share of the teacher's elements that an update moves",
    "teacher_update_s": "seconds of the teacher's update",
}
_LINEAR = (TITLES["lr"], TITLES["momentum"])  # schedules: their shape is what one looks at
_IN_PERCENT = "in %"  # of a title: not logarithmic either
# of a detector's losses
_TERMS = {
    "rpn_cls": "proposals, object or not",
    "rpn_loc": "proposals, boxes",
    "cls": "classes",
    "box_reg": "boxes",
    "mask": "masks",
}
# of a name in metrics.jsonl with _slowest_s, _median_s and _slowest_rank
_OF_RANKS = {
    "data_wait": "wait for data",
    "compute": "forward passes",
    "arrival": "arrival at the first collective",
}
_ENDS = {"_slowest_s": "slowest rank", "_median_s": "median"}
_OPTIMISATION = ("lr", "grad_norm", "weight_decay", "skipped")
_SPEED = ("images_per_s", "step_s", "data_wait_s", "memory_peak_gib", "model_tflops", "mfu")
_RANKS = ("rank", "slow", "late", "median", "arriv", "straggl")
GROUPS = ("loss", "how good it is", "optimisation", "teacher", "speed", "ranks", "more")


class Series(NamedTuple):
    """A curve among those of a panel."""

    label: str  # empty: the panel has one, its title says it
    colour: int  # of the page's palette
    curve: Curve
    dashed: bool = False


class Line(NamedTuple):
    """A curve as it is drawn; SVG's path data."""

    label: str
    colour: int
    path: str
    band: str  # between the least and the largest of each place; empty: every number is drawn
    dots: list[tuple[float, float]]
    last: str
    dashed: bool


class Hover(NamedTuple):
    """What is told where the pointer is."""

    x: float
    begin: float
    width: float
    said: list[str]  # a line each
    dots: list[tuple[float, float, int]]  # x, y, colour


class Mark(NamedTuple):
    """What happened in a run, below and across its curves; SVG's path data."""

    colour: int
    resumes: str
    checkpoints: str
    evaluations: str


@dataclass(frozen=True)
class Panel:
    """A picture of curves over the steps."""

    title: str
    lines: list[Line]
    hovers: list[Hover]
    ticks_x: list[tuple[float, str]]
    ticks_y: list[tuple[float, str]]
    said: str  # the picture in words
    notes: list[str] = field(default_factory=list)


class Group(NamedTuple):
    """Panels that belong together."""

    title: str
    panels: list[Panel]


def groups(runs: Sequence[Seen]) -> list[Group]:
    """All panels of these runs."""
    axis = steps_axis(runs)
    found: dict[str, list[Panel]] = {title: [] for title in GROUPS}
    for key, series in _logged(runs).items():
        found[group_of(key)].append(panel(title_of(key), series, axis))
    for title, series in _judged(runs).items():
        found["how good it is"].append(panel(title, series, axis))
    return [Group(title, panels) for title, panels in found.items() if panels]


def steps_axis(runs: Sequence[Seen]) -> Axis:
    """The steps that any of these runs has done."""
    return across(max(run.step for run in runs))


def group_of(key: str) -> str:
    """The group that a key of metrics.jsonl belongs to; one that is not known is in "more"."""
    if key == "loss" or key.startswith("loss_"):
        return "loss"
    if key in _OPTIMISATION:
        return "optimisation"
    if key.startswith("teacher") or key == "momentum":
        return "teacher"
    if key in _SPEED:
        return "speed"
    return "ranks" if any(word in key for word in _RANKS) else "more"


def title_of(key: str) -> str:
    """A key of metrics.jsonl, for people."""
    if key.startswith("loss_"):
        term = key.removeprefix("loss_")
        return f"loss: {_TERMS.get(term, term.replace('_', ' '))}"
    return TITLES.get(key) or key.replace("_", " ").replace("/", ", ")


# -------------------------------------------------------------------------------- what is together


def _logged(runs: Sequence[Seen]) -> dict[str, list[Series]]:
    """Key of metrics.jsonl -> its curve in each run that has it."""
    found: dict[str, list[Series]] = {}
    for number, run in enumerate(runs):
        label = run.name if len(runs) > 1 else ""
        for key, curve in run.curves.items():
            found.setdefault(key, []).append(Series(label, number, curve))
    _join_ranks(found, several=len(runs) > 1)
    terms = [key for key in found if key.startswith("loss_")]
    if len(terms) == 1 and "loss" in found and _same(found["loss"], found[terms[0]]):
        del found[terms[0]]  # the same curve again
    first = ["loss", *terms, "lr", "grad_norm", "images_per_s"]
    ordered = [key for key in first if key in found]
    return {key: found[key] for key in [*ordered, *(key for key in found if key not in ordered)]}


def _join_ranks(found: dict[str, list[Series]], *, several: bool) -> None:
    """Put the slowest rank and the median of a figure into one panel."""
    for name, title in _OF_RANKS.items():
        joined = []
        for number, (end, label) in enumerate(_ENDS.items()):
            for series in found.pop(name + end, []):
                named = f"{series.label}, {label}" if several else label
                colour = series.colour if several else number
                joined.append(Series(named, colour, series.curve, several and number > 0))
        which = found.pop(f"{name}_slowest_rank", [])
        if joined:
            found[f"ranks: {title}, s a step"] = joined
        if which:
            found[f"which rank is the slowest: {title}"] = which


def _same(one: Sequence[Series], other: Sequence[Series]) -> bool:
    return all(
        np.allclose(a.curve.values, b.curve.values, equal_nan=True)
        for a, b in zip(one, other, strict=False)
        if len(a.curve.values) == len(b.curve.values)
    ) and len(one) == len(other)


def _judged(runs: Sequence[Seen]) -> dict[str, list[Series]]:
    """Title of a panel -> its curves of each network of each run."""
    found: dict[str, dict[tuple[int, str, str], Curve]] = {}
    for number, run in enumerate(runs):
        chosen = _neighbours(run)
        for step, figures in run.judged.items():
            for figure in filter(has_curve, figures):
                place = place_of(figure)
                if place.title.startswith("k-NN (") and figure.name != chosen:
                    continue
                if len(runs) > 1 and not _is_compared(place):
                    continue
                value = value_of(figure)
                if math.isnan(value):  # there is none
                    continue
                key = (number, place.network, place.part)
                curve = found.setdefault(place.title, {}).setdefault(key, _empty())
                curve.steps.append(step)
                curve.values.append(value)
    return {
        title: [
            _series(runs, number, network, part, curve)
            for (number, network, part), curve in curves.items()
        ]
        for title, curves in found.items()
    }


def _is_compared(place: Place) -> bool:
    """Whether a figure is drawn where several runs are: the rest is in each run's own tables."""
    return place.network not in ("random", "pixels") and place.part in ("", "AP")


def _neighbours(run: Seen) -> str:
    """Of k-NN's k, the one that was best for a network that trains at the last evaluation: one
    curve, not five.
    """
    for figures in reversed(list(run.judged.values())):
        mine = [each for each in figures if each.group in ("knn_student", "knn_teacher")]
        if mine:
            return max(mine, key=lambda each: each.value).name
    return ""


def _series(runs: Sequence[Seen], number: int, network: str, part: str, curve: Curve) -> Series:
    """One run's networks, or parts of a figure, have a colour each; several runs theirs."""
    if len(runs) > 1:
        label = ", ".join(name for name in (runs[number].name, network) if name)
        return Series(label, number, curve, network not in ("", "student"))
    if part:
        label = ", ".join(name for name in (network, part) if name)
        return Series(label, PARTS.index(part), curve, network not in ("", "student"))
    colour = NETWORKS.index(network) if network in NETWORKS else 0
    return Series(network, colour, curve)


def _empty() -> Curve:
    from array import array

    return Curve(array("d"), array("d"))


# -------------------------------------------------------------------------------------- one panel


class _Places(NamedTuple):
    """A curve, gathered at places across a panel."""

    steps: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def panel(title: str, series: Sequence[Series], axis: Axis) -> Panel:
    """A panel of some curves.

    Args:
        title: of it.
        series: the curves.
        axis: of the steps.
    """
    gathered = [_gathered(each.curve, axis, PLACES) for each in series]
    ends = np.concatenate([np.concatenate((each.low, each.high)) for each in gathered])
    upwards = upright(ends.tolist(), may_be_log=title not in _LINEAR and _IN_PERCENT not in title)
    lines = [
        _line(each, places, axis, upwards) for each, places in zip(series, gathered, strict=True)
    ]
    lost = sum(int(np.isnan(each.curve.values).sum()) for each in series)
    notes = ["logarithmic"] if upwards.log else []
    notes += [f"{lost:,} logged steps were not finite"] if lost else []
    ticks_x = [(axis.at(step), told(step)) for step in axis.ticks() if step == int(step)]
    return Panel(
        title=title,
        lines=lines,
        hovers=list(_hovers(series, axis, upwards)),
        ticks_x=ticks_x,
        ticks_y=[(upwards.at(value), told(value)) for value in upwards.ticks()],
        said="; ".join(_in_words(each) for each in series),
        notes=notes,
    )


def _gathered(curve: Curve, axis: Axis, most: int) -> _Places:
    """The finite numbers of a curve: all, or at so many places."""
    steps, values = np.frombuffer(curve.steps), np.frombuffer(curve.values)
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(steps) <= most:
        return _Places(steps, values, values, values)
    place = ((steps - axis.low) / (axis.high - axis.low) * most).astype(int).clip(0, most - 1)
    firsts = np.flatnonzero(np.r_[True, np.diff(place) > 0])  # steps ascend
    counts = np.diff(np.r_[firsts, len(place)])
    return _Places(
        np.add.reduceat(steps, firsts) / counts,
        np.add.reduceat(values, firsts) / counts,
        np.minimum.reduceat(values, firsts),
        np.maximum.reduceat(values, firsts),
    )


def _line(series: Series, places: _Places, axis: Axis, upwards: Axis) -> Line:
    points = list(_points(places.steps, places.mean, axis, upwards))
    band = ""
    if not np.array_equal(places.low, places.high):
        upper = list(_points(places.steps, places.high, axis, upwards))
        lower = list(_points(places.steps, places.low, axis, upwards))
        band = f"{_path([*upper, *reversed(lower)])}Z"
    values = series.curve.values
    return Line(
        label=series.label,
        colour=series.colour,
        path=_path(points),
        band=band,
        dots=points if len(points) <= _DOTTED else [],
        last=told(values[-1]) if len(values) else "",
        dashed=series.dashed,
    )


def _points(
    steps: Iterable[float], values: Iterable[float], axis: Axis, upwards: Axis
) -> Iterator[tuple[float, float]]:
    for step, value in zip(steps, values, strict=True):
        yield round(axis.at(float(step)), 1), round(upwards.at(float(value)), 1)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "".join(f"{'L' if number else 'M'}{x:g} {y:g}" for number, (x, y) in enumerate(points))


def _hovers(series: Sequence[Series], axis: Axis, upwards: Axis) -> Iterator[Hover]:
    """The values at places across the panel: each logged step, or means."""
    gathered = [_gathered(each.curve, axis, HOVERS) for each in series]
    at: dict[int, list[tuple[Series, float, float]]] = {}
    for each, places in zip(series, gathered, strict=True):
        for step, value in zip(places.steps.tolist(), places.mean.tolist(), strict=True):
            at.setdefault(round(axis.at(step) * 2), []).append((each, step, value))
    columns = sorted(at)
    for number, column in enumerate(columns):
        before = columns[number - 1] if number else column - 16
        after = columns[number + 1] if number + 1 < len(columns) else column + 16
        begin, end = (column + before) / 4, (column + after) / 4
        rows = at[column]
        said = [f"step {told(round(rows[0][1]))}"]
        dots = []
        for each, step, value in rows:
            said.append(f"{each.label} {told(value)}".strip())
            x, y = round(axis.at(step), 1), round(upwards.at(value), 1)
            dots.append((x, y, each.colour))
        yield Hover(column / 2, begin, end - begin, said, dots)


def _in_words(series: Series) -> str:
    """A curve for whoever does not see it."""
    values = [value for value in series.curve.values if math.isfinite(value)]
    if not values:
        return f"{series.label} has no finite number".strip()
    ends = f"{told(values[0])} at step {told(series.curve.steps[0])}"
    last = f"{told(values[-1])} at step {told(series.curve.steps[-1])}"
    between = f"least {told(min(values))}, largest {told(max(values))}"
    return f"{series.label} from {ends} to {last}, {between}".strip()


# ------------------------------------------------------------------------------------------- marks


def marks(runs: Sequence[Seen]) -> list[Mark]:
    """Resumes, checkpoints and evaluations of each run, for every panel alike."""
    axis = steps_axis(runs)
    found = []
    for number, run in enumerate(runs):
        below = BOTTOM + 2 + _ROW * number
        resumes = _steps(run, "resume")
        checkpoints = _thinned(_steps(run, "checkpoint"))
        evaluations = _thinned(sorted(run.judged))
        lines = [f"M{axis.at(step):.1f} 14V{BOTTOM:g}" for step in resumes]
        ticks = [f"M{axis.at(step):.1f} {below:g}v4" for step in checkpoints]
        signs = [f"M{axis.at(step):.1f} {below:g}l2 4h-4z" for step in evaluations]
        found.append(Mark(number, "".join(lines), "".join(ticks), "".join(signs)))
    return found


def _steps(run: Seen, kind: str) -> list[int]:
    """The steps of a kind of event that are in the run as it stands."""
    steps = {event.get("step") for event in run.of(kind)}
    return sorted(step for step in steps if isinstance(step, int) and 0 < step <= run.step)


def _thinned(steps: Sequence[int]) -> Sequence[int]:
    return steps[:: max(1, -(-len(steps) // _MARKED))]
