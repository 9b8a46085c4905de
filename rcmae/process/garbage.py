"""Python's collector of cycles, kept out of training steps.

It looks through every object of a process whenever enough new ones were made: tens of milliseconds
with torch and a network loaded, at a moment of its own on each rank, while the others wait. Here
what a start has made is left out of it for good (it stays), and the rest is looked through where
the loop says so: at log steps, on all ranks at once.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

OFTEN = 200  # steps: whoever says so less often leaves it to Python


@contextlib.contextmanager
def collected_each(steps: int | None) -> Iterator[None]:
    """While this lasts nothing is collected but by `collect`, which somebody calls after so many
    steps; left to Python where that is rare.
    """
    if steps is None or steps > OFTEN or not gc.isenabled():
        yield
        return
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def collect() -> None:
    """Collect now what Python does not collect by itself."""
    if not gc.isenabled():
        gc.collect()
