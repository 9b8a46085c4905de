"""Figures of many pairs of inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {"q1": low, "median": middle, "q3": high}


def shares_of(rows: Sequence[dict[str, Any]], kinds: Sequence[str]) -> dict[str, dict[str, float]]:
    """Median and quartiles of the shares of each kind of input."""
    found = {}
    for kind in kinds:
        found[kind] = quartiles([row["share"] for row in rows if row["kind"] == kind])
    return found


def rank_correlation(rows: Sequence[dict[str, Any]]) -> float:
    """Spearman's, of the similarity and the share."""
    alike = _ranks([row["similarity"] for row in rows])
    share = _ranks([row["share"] for row in rows])
    return float(np.corrcoef(alike, share)[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    return np.argsort(np.argsort(values))
