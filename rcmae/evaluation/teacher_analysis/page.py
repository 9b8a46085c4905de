"""The figures of an analysis as a page of plots, and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rcmae.evaluation.teacher_analysis.gradients import KINDS, SAME

COLOURS = dict(zip(KINDS, ("tab:blue", "tab:orange", "tab:grey"), strict=True))


def draw(told: Mapping[str, Any], path: Path) -> None:
    """Write the page of plots as PNG. Raises OSError."""
    import matplotlib  # for these plots alone

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, 2, figsize=(13, 19), layout="constrained")
    figure.suptitle(f"{told['run']}: what the teacher does to the gradients", fontsize=14)
    found = told["checkpoints"]
    title = "cosine of the gradients of reconstruction and consistency"
    _layers(figure, axes[0, 0], found, "cosine", title)
    title = "norm of the consistency's gradient over the reconstruction's"
    _layers(figure, axes[0, 1], found, "ratio", title)
    title = "cosine of the consistency's gradient\nwith the way from teacher to student"
    _own_teacher(axes[1, 0], found, "with_way_gone", title)
    title = "the same with the last reconstruction's\n(below 0: it is taken back)"
    _own_teacher(axes[1, 1], found, "with_last_gradient", title)
    _pairs(axes[2, 0], told["pairs"], found[-1]["step"])
    _shares(axes[2, 1], found)
    _linear(axes[3, 0], told["linear_model"], "share_of_last", "by that step's own term")
    _linear(axes[3, 1], told["linear_model"], "share", "by the teacher's whole memory")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _layers(
    figure: Any, axis: Any, found: Sequence[Mapping[str, Any]], which: str, title: str
) -> None:
    """A figure of each layer at each checkpoint, as colours."""
    names = list(found[0]["layers"])
    steps = [each["step"] for each in found]
    rows = []
    for name in names:
        rows.append([each["layers"][name][which] for each in found])
    table = np.array(rows)
    signed = which == "cosine"
    shown = axis.imshow(
        table,
        aspect="auto",
        vmin=-1.0 if signed else 0.0,
        vmax=1.0 if signed else float(table.max()),
        cmap="RdBu_r" if signed else "viridis",
    )
    axis.set_yticks(range(len(names)), names)
    every = max(1, -(-len(steps) // 8))
    axis.set_xticks(range(0, len(steps), every), [str(step) for step in steps[::every]])
    axis.set(title=title, xlabel="step")
    figure.colorbar(shown, ax=axis)


def _own_teacher(axis: Any, found: Sequence[Mapping[str, Any]], which: str, title: str) -> None:
    """What the run's own teacher pulls at, over the steps."""
    steps = [each["step"] for each in found]
    for kind in KINDS:
        values = [each["own_teacher"][kind][which] for each in found]
        axis.plot(steps, values, marker="o", color=COLOURS[kind], label=f"at: {kind}")
    axis.axhline(0, color="black", linewidth=0.5)
    axis.set(title=f"the run's own teacher: {title}", xlabel="step")
    axis.legend()


def _pairs(axis: Any, pairs: Sequence[Mapping[str, Any]], step: int) -> None:
    """The share of a step that is taken back, against how alike two inputs are."""
    for kind in KINDS[1:]:
        _points(axis, pairs, kind, "share", 0.6)
    axis.axhline(1, color=COLOURS[SAME], linewidth=1, label=f"{SAME}: the unit")
    most = np.quantile([row["share"] for row in pairs], 0.99)
    axis.set(
        title=f"one step from step {step}: share of it taken back",
        xlabel="cosine of the encoder's features, less their mean",
        ylabel="share, in units of the same input's",
        ylim=(0, 1.3 * most),
    )
    axis.legend()


def _points(
    axis: Any, rows: Sequence[Mapping[str, Any]], kind: str, which: str, alpha: float
) -> None:
    of_kind = [row for row in rows if row["kind"] == kind]
    similarities = [row["similarity"] for row in of_kind]
    shares = [row[which] for row in of_kind]
    axis.scatter(similarities, shares, s=14, alpha=alpha, color=COLOURS[kind], label=kind)


def _shares(axis: Any, found: Sequence[Mapping[str, Any]]) -> None:
    """The share of a step that is taken back, over the steps."""
    steps = [each["step"] for each in found]
    for kind in KINDS[1:]:
        rows = [each["taken_back"][kind] for each in found]
        medians = [row["median"] for row in rows]
        axis.plot(steps, medians, marker="o", color=COLOURS[kind], label=kind)
        lower = [row["q1"] for row in rows]
        upper = [row["q3"] for row in rows]
        axis.fill_between(steps, lower, upper, color=COLOURS[kind], alpha=0.2)
    axis.axhline(1, color=COLOURS[SAME], linewidth=1)
    title = "one step: share of it taken back, median and quartiles"
    axis.set(title=title, xlabel="step", ylim=(0, 1.3))
    axis.legend(loc="upper right")


def _linear(axis: Any, linear: Mapping[str, Any], which: str, title: str) -> None:
    """The linear model's share, against the square that algebra has for its own term."""
    low = min(row["similarity"] for row in linear["points"])
    line = np.linspace(low, 1, 100)
    label = "cosine squared: the algebra of the own term"
    axis.plot(line, line**2, color="black", linewidth=1, label=label)
    for kind in KINDS:
        _points(axis, linear["points"], kind, which, 0.4)
    axis.set(
        title=f"linear model: share of the last step taken back,\n{title}",
        xlabel="cosine of the two masked inputs",
        ylabel="share over rate x momentum x |b|²",
    )
    axis.legend()


def summary(told: Mapping[str, Any]) -> str:
    """The figures for people: a line a checkpoint."""
    lines = [
        f"{told['run']}: gradients of consistency and reconstruction, and what the teacher "
        "takes back",
        f"{'step':>8} {'cosine':>8} {'ratio':>8}   {'with the way gone, at':^32}   "
        f"{'share of a step taken back':^33}",
        f"{'':>26}   {'same':>10} {'remasked':>10} {'other':>10}   {'other mask':>16} "
        f"{'other image':>16}",
    ]
    lines += [_line(figures) for figures in told["checkpoints"]]
    newest = told["checkpoints"][-1]
    linear = told["linear_model"]
    ranked = [f"{value:.2f} over {name}" for name, value in newest["rank_correlation"].items()]
    medians = [f"{row['median']:.2f} at the {kind}" for kind, row in linear["taken_back"].items()]
    lines.append(
        f"rank correlation of the features' likeness and the share at step {newest['step']}: "
        f"{', '.join(ranked)}"
    )
    lines.append(
        f"linear model: median share {', '.join(medians)}; its gradients are those of the algebra "
        f"within {linear['error']:.1e}"
    )
    return "\n".join(lines)


def _line(figures: Mapping[str, Any]) -> str:
    total = figures["layers"]["all"]
    cells = [f"{figures['step']:>8} {total['cosine']:>8.3f} {total['ratio']:>8.3f}  "]
    for kind in KINDS:
        cells.append(f"{figures['own_teacher'][kind]['with_way_gone']:>10.3f}")
    cells.append(" ")
    for kind in KINDS[1:]:
        share = figures["taken_back"][kind]
        spread = f"{share['median']:.2f} ({share['q1']:.2f}-{share['q3']:.2f})"
        cells.append(f"{spread:>16}")
    return " ".join(cells)
