"""The figures of a comparison as a table, in Markdown and in LaTeX: a row an objective, each figure
the mean and the standard deviation over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

FIGURES = {"knn": "k-NN", "logistic": "linear"}
NETWORKS = ("student", "teacher")
PLUS_MINUS = r"\pm"  # in LaTeX
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"}


class Figure(NamedTuple):
    """A figure over seeds."""

    mean: float
    deviation: float | None  # of the sample, n - 1; None for one seed


class Table(NamedTuple):
    """A table of texts and figures. None: there is no such figure."""

    titles: tuple[str, ...]
    rows: list[list[str | Figure | None]]
    caption: str


def over_seeds(values: Sequence[float]) -> Figure | None:
    """Mean and standard deviation of the sample; None of no values."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Figure(statistics.mean(values), deviation)


def table_of(
    rows: Sequence[Mapping[str, Any]],
    costs: Mapping[str, Mapping[str, float]],
    labelled: Sequence[str],
) -> Table:
    """The figures; columns that no row has are left out.

    Args:
        rows: as `rows_of` gives them.
        costs: of a step, by objective; none where they were not measured.
        labelled: objectives that were trained with labels.
    """
    columns = dict(_columns(rows, costs, labelled))
    names = list(dict.fromkeys([*costs, *(row["objective"] for row in rows)]))
    shown = {title: cells for title, cells in columns.items() if any(cells.values())}
    body: list[list[str | Figure | None]] = []
    for name in names:
        body.append([name, *(cells.get(name) for cells in shown.values())])
    return Table(("objective", *shown), body, _caption(rows))


def _columns(
    rows: Sequence[Mapping[str, Any]],
    costs: Mapping[str, Mapping[str, float]],
    labelled: Sequence[str],
) -> Iterator[tuple[str, dict[str, str | Figure | None]]]:
    """Title and cells of each column but the first; cells by objective."""
    names = dict.fromkeys([*costs, *(row["objective"] for row in rows)])
    seeds: dict[str, set[int]] = {name: set() for name in names}
    for row in rows:
        seeds[row["objective"]].add(row["seed"])
    yield "seeds", {name: str(len(found)) for name, found in seeds.items()}
    yield "labels", {name: "yes" if name in labelled else "no" for name in names}
    for figure, title in FIGURES.items():
        for network in NETWORKS:
            values: dict[str, list[float]] = {name: [] for name in names}
            for row in rows:
                if row["network"] == network:
                    values[row["objective"]].append(row[figure])
            cells = {name: over_seeds(found) for name, found in values.items()}
            yield f"{title}, {network}", dict(cells)
    yield "CPU s per step", {name: f"{cost['cpu_s']:.3f}" for name, cost in costs.items()}
    sizes = {name: cost["state_bytes"] + cost["step_bytes"] for name, cost in costs.items()}
    yield "MiB per step", {name: f"{size / 2**20:.0f}" for name, size in sizes.items()}


def _caption(rows: Sequence[Mapping[str, Any]]) -> str:
    seeds = sorted({row["seed"] for row in rows})
    listed = ", ".join(map(str, seeds))
    if len(seeds) < 2:
        return f"Top-1 in %, seed {listed}." if seeds else "Top-1 in %."
    return f"Top-1 in %, mean ± standard deviation over seeds {listed}."


def markdown(table: Table) -> str:
    """The table in Markdown, with its caption below."""
    lines = [f"| {' | '.join(table.titles)} |", "|---" * len(table.titles) + "|"]
    for row in table.rows:
        cells = [_plain(cell, "±").replace("|", r"\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", table.caption])


def latex(table: Table) -> str:
    """The table in LaTeX, with the rules of the package booktabs."""
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{_escaped(table.caption).replace('±', f'${PLUS_MINUS}$')}}}",
        rf"  \begin{{tabular}}{{l{'r' * (len(table.titles) - 1)}}}",
        r"    \toprule",
        f"    {' & '.join(map(_escaped, table.titles))} \\\\",
        r"    \midrule",
    ]
    for row in table.rows:
        lines.append(f"    {' & '.join(map(_in_latex, row))} \\\\")
    return "\n".join([*lines, r"    \bottomrule", r"  \end{tabular}", r"\end{table}"])


def _in_latex(cell: str | Figure | None) -> str:
    if isinstance(cell, Figure):
        return f"${_plain(cell, PLUS_MINUS)}$"
    return "--" if cell is None else _escaped(cell)


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)


def _plain(cell: str | Figure | None, between: str) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    if cell.deviation is None:
        return f"{cell.mean:.1f}"
    return f"{cell.mean:.1f} {between} {cell.deviation:.1f}"
