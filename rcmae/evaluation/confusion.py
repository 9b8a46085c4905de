"""The picture of a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from rcmae.evaluation.pictures import plotted

COUNTED = 20  # classes: up to so many, cells have their counts
NAMED = 40  # classes: up to so many are named
LONGEST = 18  # letters of a name


def confusion_picture(confusion: Tensor, names: Sequence[str] = (), *, title: str) -> np.ndarray:
    """A picture uint8 [height, width, 3]: a row a true class, a column a predicted one, dark where
    many of a class were taken for that.

    Args:
        confusion: [K, K] int64, images of class i that were taken for class j.
        names: of the classes.
        title: of the picture.
    """
    from matplotlib.colors import PowerNorm  # a second, for this picture alone
    from matplotlib.figure import Figure

    count = len(confusion)
    images = confusion.sum(dim=1, keepdim=True)
    shares = (confusion.double() / images.clamp(min=1)).numpy()
    side = min(9.0, max(5.0, 2.2 + 0.42 * count))
    figure = Figure(figsize=(side + 1.2, side), dpi=100, layout="constrained")
    axis = figure.subplots()
    # the root shows rare mistakes, too
    norm = PowerNorm(0.5, vmin=0, vmax=1)
    shown = axis.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest")
    if count <= NAMED:
        labels = [_short(name) for name in (*names, *map(str, range(len(names), count)))][:count]
        axis.set_xticks(range(count), labels, rotation=90 if count > 8 else 45)
        axis.set_yticks(range(count), labels)
    if count <= COUNTED:
        _count(axis, confusion, shares)
    axis.set(xlabel="predicted class", ylabel="true class")
    axis.set_title(title)
    figure.colorbar(shown, ax=axis, label="share of the true class's images", shrink=0.8)
    return plotted(figure)


def _count(axis: Any, confusion: Tensor, shares: np.ndarray) -> None:
    """Write the images of each cell that has any."""
    for row, column in confusion.nonzero().tolist():
        colour = "white" if shares[row, column] > 0.3 else "black"
        text = str(int(confusion[row, column]))
        size = 9 if len(confusion) > 12 else 11
        axis.text(column, row, text, color=colour, size=size, ha="center", va="center")


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."
