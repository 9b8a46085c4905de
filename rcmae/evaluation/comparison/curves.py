"""What compared runs logged, over their steps: a line an objective, the mean over its seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rcmae.evaluation.comparison.runs import Group, Run
from rcmae.files import aside, json_lines

Curve = dict[int, float]  # step -> value
Curves = dict[str, list[Curve]]  # group -> a curve of each of its runs
COLOURS = (
    "tab:blue",
    "tab:orange",
    "tab:green",
    "tab:red",
    "tab:purple",
    "tab:brown",
    "tab:pink",
    "tab:olive",
    "tab:cyan",
    "tab:grey",
)
LAST = ("loss", "grad_norm")  # panels after the terms and the evaluations


def panels_of(groups: Sequence[Group]) -> dict[str, Curves]:
    """What is drawn: the terms of the loss, evaluations, the loss and the gradient's norm.

    A panel has the runs that logged it: a term that an objective lacks has no curve of it.
    """
    panels: dict[str, Curves] = {}
    for group in groups:
        for run in group.runs:
            for name, curve in _curves(run).items():
                panels.setdefault(name, {}).setdefault(group.name, []).append(curve)
    terms = [name for name in panels if name.startswith("loss_")]
    if len(terms) == 1 and len(panels[terms[0]]) == len(groups):
        panels.pop("loss")  # of one term, it is the same curve
    names = sorted(panels, key=lambda name: (name in LAST, not name.startswith("loss_")))
    return {name: panels[name] for name in names}


def _curves(run: Run) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for row in json_lines(run.folder / "metrics.jsonl"):
        for name, value in row.items():
            if name in LAST or name.startswith("loss_"):
                _add(curves, name, row["step"], value)
    for event in json_lines(run.folder / "events.jsonl"):
        if event.get("event") == "evaluate":
            for name, value in _accuracies(event):
                _add(curves, name, event["step"], value)
    return curves


def _add(curves: dict[str, Curve], name: str, step: int, value: Any) -> None:
    if isinstance(value, int | float) and math.isfinite(value):
        curves.setdefault(name, {})[step] = float(value)


def _accuracies(event: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The accuracies of an evaluation, by the title of their panel."""
    for network in ("student", "teacher"):
        by_k = event.get("knn", {}).get(network, {})
        if by_k:
            k = max(by_k, key=int)
            yield f"k-NN (k={k}) of the {network}, top-1 in %", by_k[k]
    for network, scores in event.get("scores", {}).items():
        yield f"test set, {network}: top-1 in %", scores["top1"]


def mean_over(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps that all curves have, the mean there and the standard deviation of the sample (0 of one
    curve).
    """
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = np.array([[curve[step] for step in steps] for curve in curves])  # [runs, steps]
    deviation = values.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(steps))
    return np.array(steps), values.mean(0), deviation


def draw(groups: Sequence[Group], path: Path) -> None:
    """Write the figure as PNG: a panel each, mean and standard deviation over seeds.

    Raises OSError where it cannot be written.
    """
    import matplotlib  # for this figure alone

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = panels_of(groups)
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    size = (4.6 * across, 3.4 * down + 0.9)
    figure, axes = pyplot.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    colours = {group.name: COLOURS[i % len(COLOURS)] for i, group in enumerate(groups)}
    for axis, (name, curves) in zip(axes.flat, panels.items(), strict=False):
        for group, runs in curves.items():
            _line(axis, runs, colours[group])
        axis.set(title=_panel_title(name), xlabel="step")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(_title(groups))
    handles = [pyplot.Line2D([], [], color=colour) for colour in colours.values()]
    figure.legend(handles, list(colours), loc="outside lower center", ncols=min(4, len(colours)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path, durable=False) as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)


def _line(axis: Any, runs: Sequence[Curve], colour: str) -> None:
    steps, mean, deviation = mean_over(runs)
    axis.plot(steps, mean, color=colour, marker="o" if len(steps) < 12 else None, markersize=3)
    if len(runs) > 1:
        axis.fill_between(steps, mean - deviation, mean + deviation, color=colour, alpha=0.2)


def _panel_title(name: str) -> str:
    if name.startswith("loss_"):
        return f"loss: {name.removeprefix('loss_')}"
    return {"loss": "loss: weighted sum", "grad_norm": "norm of the gradient"}.get(name, name)


def _title(groups: Sequence[Group]) -> str:
    counts = sorted({len(group.runs) for group in groups})
    if counts == [1]:
        return "Training curves, one seed each"
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Training curves: mean and standard deviation over {seeds} seeds"
