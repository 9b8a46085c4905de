"""What a run could not read: the bad samples among its events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rcmae.errors import Refused
from rcmae.files import json_lines

_LEDGER = {"position", "shard", "key", "offset", "reason", "replaced_by"}  # of a bad sample's event


def ledger(run: Path) -> list[dict[str, Any]]:
    """The bad samples of a run (its folder, or its events.jsonl), in the order of their positions.

    Raises:
        Refused: there is no such run.
    """
    path = run / "events.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise Refused(f"{path}: is not a run's events.jsonl (no such file)")
    found = {}
    for event in json_lines(path):
        # all of it is asked for: the file may be somebody's own
        if event.get("event") == "bad_sample" and event.keys() >= _LEDGER:
            # steps done again after a resume tell theirs again
            found[event["position"]] = event
    return [found[position] for position in sorted(found)]
