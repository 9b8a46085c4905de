"""From numbers to places in a picture, and back to words: axes, ticks, and how a number is told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 400.0, 200.0  # of a panel, in its own units
LEFT, RIGHT, TOP, BOTTOM = 48.0, 392.0, 14.0, 166.0  # of where the lines are
_LOG_SPAN = 50.0  # largest over smallest, above which an axis is logarithmic
_MARGIN = 0.04  # above and below the lines
_TICKS = 4


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high`, between two places."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value is."""
        low, high, value = (self._scaled(each) for each in (self.low, self.high, value))
        return self.begin + (value - low) / (high - low) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Round values, a few."""
        if self.log:
            found = [
                digit * 10.0**power
                for power in range(math.floor(math.log10(self.low)), 20)
                for digit in (1, 2, 5)
            ]
            found = [value for value in found if self.low <= value <= self.high]
            tens = [value for value in found if math.log10(value) % 1 == 0]
            if len(tens) > 1:
                found = tens
            return found[:: max(1, -(-len(found) // (_TICKS + 1)))]
        step = _round(self.high - self.low)
        first = math.ceil(self.low / step)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value


def across(last_step: float) -> Axis:
    """The axis of steps, from 0."""
    return Axis(0.0, max(1.0, last_step), LEFT, RIGHT)


def upright(values: Sequence[float], *, may_be_log: bool = True) -> Axis:
    """The axis of these values, which are finite."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if may_be_log and low > 0 and high / low > _LOG_SPAN:
        return Axis(low / 1.1, high * 1.1, BOTTOM, TOP, log=True)
    margin = _MARGIN * (high - low) or abs(high) * _MARGIN or 1.0
    bottom = 0.0 if low >= 0 > low - margin else low - margin  # what is never negative looks so
    return Axis(bottom, high + margin, BOTTOM, TOP)


def _round(span: float) -> float:
    """The distance of ticks: 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(span / _TICKS))
    return next(digit * power for digit in (1, 2, 5, 10) if span / (digit * power) <= _TICKS + 1)


def told(value: float) -> str:
    """A number in few digits."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size >= 1e4 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds, as people say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    return f"{hours} h {m:02d} min" if hours else f"{m} min {s:02d} s"
