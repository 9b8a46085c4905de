"""Brings a tracker up to a run's committed steps, each once, whenever and wherever it is called.

What was pushed is noted in the run's folder, `trackers/NAME.json`: before a part is pushed how far
it goes, after it that it is there. After a kill between the two the tracker itself is asked for the
newest step that it has.
"""

from __future__ import annotations

import fcntl
import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from rcmae.errors import Refused
from rcmae.files import write_aside
from rcmae.run.records.shown import recipe_of
from rcmae.run.report.judged import by_network
from rcmae.run.trackers import records
from rcmae.run.trackers.protocol import About, Tracker

_AT_ONCE = 500  # steps, after which the tracker is waited for
_LOCK_TRY_S = 0.5
_FORMAT = 1


@dataclass
class Pushed:
    """How far a tracker is: `trackers/NAME.json`."""

    token: str  # of this run in the tracker
    project: str
    step: int = -1  # that the tracker has, with all before it
    upto: int = -1  # above `step`: what is between the two was begun, and may be there in part
    seen_at: str = ""  # an address or a folder, for people
    format: int = _FORMAT


class Pusher:
    """A run, open in a tracker.

    Args:
        run: its folder.
        name: of the tracker.
        tracker: its adapter; opened and closed by the caller of `opened`.
    """

    def __init__(self, run: Path, name: str, tracker: Tracker, pushed: Pushed) -> None:
        self.pushed = pushed
        self.run = run
        self._path = _path(run, name)
        self._tracker = tracker

    def push(self, *, is_last: bool = True) -> int:
        """Push what is committed and not there yet; how many steps.

        `is_last`: tell where the run stands, whether steps were pushed or not.
        """
        upto = records.settled_step(self.run)
        found = records.records(self.run, self.pushed.step, upto)
        count = 0
        while part := list(islice(found, _AT_ONCE)):
            self.pushed.upto = part[-1].step
            self._note()
            for record in part:
                self._show(record)
            self._tracker.flush()
            self.pushed.step = self.pushed.upto
            self._note()
            count += len(part)
        if count or is_last:
            self._tracker.summary(records.summary_of(self.run))
            self._tracker.flush()
        return count

    def resume(self, seen_at: str) -> None:
        """Take up where the one before was, after a kill too."""
        if self.pushed.upto > self.pushed.step:
            self.pushed.step = max(self.pushed.step, self._tracker.last_step())
        self.pushed.upto = self.pushed.step
        self.pushed.seen_at = seen_at
        self._note()

    def _show(self, record: records.Record) -> None:
        for name, path in record.images:
            if path.exists():  # pruned since
                self._tracker.image(record.step, f"pictures/{name}", path)
        if record.table:
            networks, rows = by_network(record.table)
            self._tracker.table(record.step, "evaluation", ("metric", *networks), rows)
        self._tracker.scalars(record.step, record.time, record.scalars)

    def _note(self) -> None:
        write_aside(self._path, json.dumps(asdict(self.pushed), indent=1) + "\n")


@contextmanager
def opened(run: Path, name: str, tracker: Tracker, project: str | None = None) -> Iterator[Pusher]:
    """A run in a tracker, begun or continued. One process at a time: others wait.

    Args:
        run: the run's folder.
        name: of the tracker.
        tracker: its adapter.
        project: that the run belongs to in the tracker; later calls keep the first one's.

    Raises:
        Refused: there is no run in this folder, or what is noted of the tracker is a newer rcmae's.
    """
    config = recipe_of(run)
    with _alone(_path(run, name).with_suffix(".lock")):
        pushed = _noted(run, name, project)
        about = About(
            token=pushed.token,
            name=str(config.get("run", {}).get("name") or run.resolve().name),
            project=pushed.project,
            folder=run / "trackers" / name,
            config=config,
        )
        pusher = Pusher(run, name, tracker, pushed)
        pusher.resume(tracker.open(about))
        try:
            yield pusher
        finally:
            tracker.close(records.how_it_stands(run))


def _noted(run: Path, name: str, project: str | None) -> Pushed:
    """What is noted of a tracker; noted anew where nothing is, before the tracker hears of it."""
    path = _path(run, name)
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        pushed = Pushed(token=uuid.uuid4().hex, project=project or "rcmae")
        write_aside(path, json.dumps(asdict(pushed), indent=1) + "\n")
        return pushed
    except (ValueError, RecursionError) as error:
        raise Refused(
            f"{path} cannot be read ({error}); delete it to begin the run anew in {name}"
        ) from error
    if not isinstance(document, dict):
        raise Refused(f"{path} is no JSON object; delete it to begin the run anew in {name}")
    if document.get("format") != _FORMAT:
        raise Refused(f"{path} is of another rcmae (format {document.get('format')}); update rcmae")
    try:
        return Pushed(**document)
    except TypeError as error:
        raise Refused(
            f"{path} was changed ({error}); delete it to begin the run anew in {name}"
        ) from error


def _path(run: Path, name: str) -> Path:
    folder = run / "trackers"
    folder.mkdir(exist_ok=True)
    return folder / f"{name}.json"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock file. It is free again when its process is gone, however that ended."""
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_LOCK_TRY_S)
        yield
