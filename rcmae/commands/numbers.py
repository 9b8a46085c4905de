"""Numbers on a command line: not NaN, not endless."""

from __future__ import annotations

import argparse
import math


def from_zero(text: str) -> float:
    """A finite number, 0 or more."""
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text}: must be a finite number, 0 or more")
    return value


def above_zero(text: str) -> float:
    """A finite number above 0."""
    if not (value := from_zero(text)):
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return value
