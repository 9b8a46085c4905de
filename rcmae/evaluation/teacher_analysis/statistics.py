"""Figures of many pairs of inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {"q1": low, "median": middle, "q3": high}


def rank_correlation(rows: Sequence[dict[str, Any]]) -> float:
    """Spearman's, of the similarity and the share."""
    alike = _ranks([row["similarity"] for row in rows])
    share = _ranks([row["share"] for row in rows])
    return float(np.corrcoef(alike, share)[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    return np.argsort(np.argsort(values))
