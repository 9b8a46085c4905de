"""What each second before the first step was.

A process starts up once, so this is the module's own state: `begin` sets the clock to the beginning
of the process, and each `mark` gives the seconds since the last one a name. Names may come again.
"""

from __future__ import annotations

import time

import psutil

_last = 0.0
_seconds: dict[str, float] = {}


def begin() -> None:
    """Start to count; what passed since the process began was for imports."""
    global _last
    _last = psutil.Process().create_time()
    _seconds.clear()
    mark("imports")


def mark(name: str) -> None:
    """Give the time since the last mark to `name`."""
    global _last
    now = time.time()
    _seconds[name] = _seconds.get(name, 0.0) + max(0.0, now - _last)
    _last = now


def seconds() -> dict[str, float]:
    """Seconds by name so far, in the order of their first marks."""
    return dict(_seconds)
