"""The page of a run that trains, kept as it goes on, by a process beside the training.

The training starts it and does nothing more: it reads the run's folder, and ends with its standard
input, when the training ends or is killed.
"""

from __future__ import annotations

import time
from pathlib import Path

from rcmae.errors import Refused
from rcmae.files import json_lines_back
from rcmae.run.report import page
from rcmae.run.trackers.beside import input_ended, wait_for_end

NICENESS = 19  # the training comes first
AGAIN_S = 600.0  # after which a page of a run that goes on is made again, evaluated or not
REST = 10.0  # times as long as a page took, before the next: millions of logged steps take a while


def keep(run: Path, out: Path, every_s: float) -> None:
    """Write the page at each evaluation, each ten minutes, and once more when standard input ends.

    Args:
        run: its folder.
        out: the page.
        every_s: seconds between two looks.

    Raises:
        OSError: the last page could not be written; those before are tried again.
    """
    shown = _last_evaluation(run)
    made = time.monotonic()
    took = 0.0
    while not input_ended(every_s):
        now = _last_evaluation(run)
        began = time.monotonic()
        if began - made < (AGAIN_S if now == shown else REST * took):
            continue
        try:
            page.write([run], out)
        except (OSError, Refused):  # a full disk, a folder that is being deleted: it may pass
            continue
        shown, made = now, time.monotonic()
        took = made - began
    wait_for_end(run)
    page.write([run], out)


def _last_evaluation(run: Path) -> float:
    """When it was made; 0: never."""
    try:
        for event in json_lines_back(run / "events.jsonl"):
            if event.get("event") == "evaluate":
                return float(event.get("time") or 0.0)
    except OSError:
        pass
    return 0.0
