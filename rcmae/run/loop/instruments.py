"""What every part of the loop writes to, or is watched by."""

from __future__ import annotations

from typing import NamedTuple

from rcmae.run.loop.meter import Meter
from rcmae.run.loop.stopwatch import Stopwatch
from rcmae.run.preempt import StopRequest
from rcmae.run.presence import Presence
from rcmae.run.records.metrics import MetricsLog


class Instruments(NamedTuple):
    """Of this rank."""

    log: MetricsLog
    meter: Meter
    stopwatch: Stopwatch
    presence: Presence
    stop: StopRequest
