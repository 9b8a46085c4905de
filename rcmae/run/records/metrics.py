"""What a run shows while it trains: files that stay true over kill and resume, and a progress line.

`metrics.jsonl` has one object a logged step, each step once: a resume cuts the file back to the
step it resumes from. `events.jsonl` is only ever appended to, so a step that was run twice shows
there. TensorBoard gets the same numbers and drops those beyond the resume.
Everything takes plain numbers: nothing here waits for a GPU, so whoever calls decides when a tensor
becomes a number (on log steps). Lines that a disk does not take are reported and wait: no line is a
reason to stop.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column

from rcmae.data.sources import redacted, without_secrets
from rcmae.errors import counted
from rcmae.files import Lines, aside, json_lines_back, write_aside
from rcmae.process import console as standard
from rcmae.run.records.board import Board

# ---------------------------------------------------------------------------------------- the files


# a line as this module writes it
_OURS = re.compile(rb'\{"step": (\d{1,15}), "')


def cut_back(path: Path, step: int) -> int:
    """Keep the lines of a metrics file that `step` and its forerunners wrote; how many lines were
    dropped.

    Dropped are lines of later steps (they will be run again), lines of a step that was already
    seen, and whatever is not a JSON object with a step: a kill tears the last line, a power loss
    can leave zeros. The file is written aside, synced and renamed, so a kill here loses nothing,
    and a writer that still holds the old file writes into the void.
    """
    dropped = 0
    last = 0
    with aside(path) as out:
        for line in _lines(path):
            at = _step_of(line)
            if at is None or not last < at <= step:
                dropped += 1
                continue
            last = at
            out.write(line)
    return dropped


def undone(path: Path, step: int) -> dict[str, float] | None:
    """The last whole line of a metrics file beyond `step`: its step and when it was written; None
    without one.

    Steps up to there were done once and will be done again.
    """
    for row in json_lines_back(path):
        if isinstance(row.get("step"), int):
            if row["step"] <= step:
                return None
            return {"step": row["step"], "time": row.get("time", 0.0)}
    return None


def events_of(directory: Path, kind: str, last: int | None = None) -> list[dict[str, Any]]:
    """The events of a kind in a run's folder, oldest first; none where there is no file yet.

    With `last`: so many at most, the latest. Then only the file's end is read.
    """
    rows = json_lines_back(directory / "events.jsonl")
    found = (row for row in rows if row.get("event") == kind)
    return list(itertools.islice(found, last))[::-1]


def _lines(path: Path) -> Iterator[bytes]:
    if path.exists():
        with path.open("rb") as lines:
            yield from lines


def _step_of(line: bytes) -> int | None:
    """The step of a whole line, None for a torn or foreign one."""
    if not line.endswith(b"\n"):
        return None
    ours = _OURS.match(line)  # a million lines are read in a second so
    if ours and line.endswith(b"}\n"):
        return int(ours[1])
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else None


def _drop_torn_line(path: Path) -> None:
    """Cut a file back to its last line end."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 4096)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                end = start + at + 1
                break
            end = start
        file.truncate(end)


def _plain(value: Any) -> Any:
    """`value` as JSON has it: NaN and infinities, which JSON lacks, become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(_plain(row), allow_nan=False)


SILENT_S = 30.0  # without a line, after which a step is mentioned
PROGRESS = "progress.json"  # the last step done, which metrics.jsonl need not have
PROGRESS_EACH_S = 5.0


class MetricsLog:
    """metrics.jsonl, events.jsonl, TensorBoard and the progress of one run, on the one rank that
    writes.

    Not collective: every rank makes one and calls it alike, those with `writes=False` do nothing.
    Make it after the run's folder is this job's to write (under the lease), and before the first
    step.

    Args:
        directory: the run's folder.
        resume_step: the step this job resumes from, 0 for a fresh start; lines beyond it are
            dropped.
        total_steps: the run's last step, for the progress.
        writes: whether this rank writes (rank 0).
        tensorboard: whether to write `tensorboard/` too.
        console: where the progress goes; standard output by default.
        bar: a live bar (a terminal) or plain lines (a log file); by default whichever standard
            output is.
    """

    def __init__(
        self,
        directory: Path,
        *,
        resume_step: int,
        total_steps: int,
        writes: bool = True,
        tensorboard: bool = True,
        console: Console | None = None,
        bar: bool | None = None,
    ) -> None:
        self.directory = directory
        self.writes = writes
        self.total_steps = total_steps
        self._first = resume_step
        self._began = (resume_step, time.monotonic())  # what the rest of the time is told by
        self._row: Mapping[str, Any] = {}  # that was shown last
        self._said = time.monotonic()  # when a line of a step came last
        self._moved: dict[str, float] = {}  # the last step done and when, as PROGRESS has it
        self._noted = -math.inf  # when that was written
        self._board: Board | None = None
        self._troubles: set[str] = set()  # that were told
        self._bar: Progress | None = None
        self.undone: dict[str, float] | None = None
        if not writes:
            return
        directory.mkdir(parents=True, exist_ok=True)
        metrics = directory / "metrics.jsonl"
        events = directory / "events.jsonl"
        self.undone = undone(metrics, resume_step)
        self.dropped_lines = cut_back(metrics, resume_step)
        _drop_torn_line(events)
        self._metrics = Lines(metrics)
        self._events = Lines(events)
        self._console = console or Console()
        if tensorboard:
            self._board = Board(
                directory / "tensorboard", step=resume_step, told=self._tell_of_trouble
            )
        if sys.stdout.isatty() if bar is None else bar:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=16),
                # the rest of the line, cut where a terminal is narrow
                TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True)),
                console=self._console,
                expand=True,
            )
            self._task: TaskID = self._bar.add_task("", total=total_steps, completed=resume_step)
            self._bar.start()

    def step(self, row: Mapping[str, Any]) -> None:
        """Record one logged step: plain numbers, among them `step`.

        Adds `time`, seconds since 1970.
        """
        if not self.writes:
            return
        row = {**row, "time": time.time()}
        self._write(self._metrics, row)
        if self._board:
            for name, value in row.items():
                if isinstance(value, int | float) and name not in ("step", "time"):
                    self._board.scalar(f"train/{name}", value, row["step"])
        self._row = row
        if self._bar:
            self._bar.update(self._task, completed=row["step"], description=self._in_short(row))
        else:
            self._said = time.monotonic()
            self.say(f"step {row['step']}/{self.total_steps}  {self._shown(row)}")

    def tell(self, row: Mapping[str, Any]) -> None:
        """Show a step that is not logged: a line, and on a terminal the first of this job alone,
        where the bar shows the others.
        """
        if not self.writes:
            return
        self._row = row
        if not self._bar or row["step"] == self._first + 1:
            self._said = time.monotonic()
            self.say(f"step {row['step']}/{self.total_steps}  {self._shown(row)}")

    def mention(self, step: int, images_per_s: float) -> None:
        """Show that a step is done, where no line of a step came for SILENT_S; a bar shows it."""
        if not self.writes or self._bar or time.monotonic() - self._said < SILENT_S:
            return
        self._said = time.monotonic()
        row = {"step": step, "images_per_s": images_per_s}
        self.say(f"step {step}/{self.total_steps}  {self._shown(row)}")

    def moved(self, step: int, images_per_s: float) -> None:
        """A step is done: move the bar, and note it now and then. Cheap: called at each."""
        if not self.writes:
            return
        if step == self._first + 1:
            self._began = (step, time.monotonic())  # the start-up is not a step
        self._moved = {"step": step, "time": time.time()}
        if time.monotonic() - self._noted > PROGRESS_EACH_S:
            self._note_progress()
        if self._bar:
            # the loss is that of the last step that was read
            row = {**self._row, "step": step, "images_per_s": images_per_s}
            self._bar.update(self._task, completed=step, description=self._in_short(row))

    def _note_progress(self) -> None:
        """Leave the last step done where others read it; a disk that refuses has its own alarms."""
        self._noted = time.monotonic()
        with contextlib.suppress(OSError):
            write_aside(self.directory / PROGRESS, json.dumps(self._moved) + "\n", durable=False)

    def conclude(self, text: str) -> None:
        """Print the last word; a bar ends above it."""
        if self._bar:
            self._bar.stop()
            self._bar = None
        self.say(text)

    def event(self, kind: str, **details: Any) -> None:
        """Append to events.jsonl: start, checkpoint, signal, bad_sample, evaluate, stop, ..."""
        if self.writes:
            self._write(
                self._events, {"event": kind, "time": time.time(), **without_secrets(details)}
            )

    def warn(self, text: str) -> None:
        """Say what a user should look at, and keep it as an event."""
        self.event("warning", told=text)
        self.say(f"warning: {text}")

    def rewind(self, step: int) -> None:
        """Forget the logged steps beyond `step`: the run goes back to it."""
        if not self.writes:
            return
        self.sync()
        self._metrics.close()
        with self.sparing("the steps of metrics.jsonl that the run goes back on stay there"):
            cut_back(self._metrics.path, step)
        self._metrics = Lines(self._metrics.path)
        if self._board:
            self._board.rewind(step)

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Numbers that belong to no logged step (an evaluation's) for TensorBoard, as
        group/name.
        """
        if self._board:
            for name, value in values.items():
                self._board.scalar(f"{group}/{name}", value, step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """A picture for TensorBoard: uint8 [height, width, 3]."""
        if self._board:
            self._board.picture(name, pixels, step)

    def say(self, text: str) -> None:
        """Print above the bar, or just print; as it is, without wrapping or colours."""
        if self.writes:
            text = standard.printable(redacted(text))
            self._console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
            self._console.file.flush()
            reason = standard.lost()
            if reason is not None and "console" not in self._troubles:
                self._troubles.add("console")
                self.event("console_lost", reason=reason)

    @property
    def problem(self) -> str | None:
        """What the disk says, while lines wait for it; None where this rank does not write."""
        return (self._metrics.problem or self._events.problem) if self.writes else None

    @contextlib.contextmanager
    def sparing(self, what: str) -> Iterator[None]:
        """Write something that the run can do without; a refusal of the disk is reported.

        Args:
            what: comes of it, or is not written then.
        """
        try:
            yield
        except OSError as error:
            self._tell_of_trouble(f"{what}: {error}")

    def _tell_of_trouble(self, text: str) -> None:
        """Report once what cannot be written, and continue."""
        if text not in self._troubles:
            self._troubles.add(text)
            self.event("not_written", reason=text)
            self.say(f"continuing without: {text}")

    def _write(self, lines: Lines, row: Mapping[str, Any]) -> None:
        """Append a line; report the first that must wait, and the first that is written again."""
        before = lines.problem
        lines.write(_line(row))
        if lines.problem and not before:
            self.say(f"{lines.problem}; its lines are kept in memory, and a save is attempted")
        elif before and not lines.problem:
            self.say(f"{lines.path} is written again")

    def sync(self) -> None:
        """Put all lines on the disk. To be called before a checkpoint is committed: a power loss
        after the commit then finds every line up to the checkpoint's step."""
        if self.writes:
            self._metrics.sync()
            self._events.sync()

    def close(self) -> None:
        """Finish the files and the bar. A second call does nothing."""
        if not self.writes:
            return
        if self._moved:
            self._note_progress()
            self._moved = {}
        if self._bar:
            self._bar.stop()
        if self._board:
            self._board.close()
        for lines in (self._metrics, self._events):
            lines.close()
            if lines.waiting:
                self.say(f"{lines.path}: {counted(lines.waiting, 'line')} could not be written")
        self._bar = self._board = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _in_short(self, row: Mapping[str, Any]) -> str:
        """A step beside the bar: first what must fit beside it on 80 columns."""
        parts = []
        if row.get("loss") is not None:
            parts.append(f"loss {row['loss']:.4f}")
        if row.get("images_per_s") is not None:
            parts.append(f"{_rate(row['images_per_s'])} img/s")
        parts += self._left(row)
        rest = {name: value for name, value in row.items() if name != "images_per_s"}
        return "  ".join([*parts, *_figures(rest)])

    def _left(self, row: Mapping[str, Any]) -> list[str]:
        """The time that the rest will take, where it can be told."""
        first, began = self._began
        done = row["step"] - first
        if done <= 0 or row["step"] >= self.total_steps:
            return []
        left = (time.monotonic() - began) / done * (self.total_steps - row["step"])
        return [f"{_duration(left)} left"]

    def _shown(self, row: Mapping[str, Any]) -> str:
        """A logged step for people."""
        parts = []
        if row.get("epoch") is not None:
            parts.append(f"epoch {row['epoch']:.2f}")
        if row.get("loss") is not None:
            parts.append(f"loss {row['loss']:.4f}{_terms(row)}")
        return "  ".join([*parts, *_figures(row), *self._left(row)])


# of a logged step, those that the progress line shows
_FIGURES = (
    ("lr", "lr {:.2e}"),
    ("images_per_s", "{} img/s"),
    ("data_wait_s", "wait {:.3f} s"),
    ("memory_peak_gib", "{:.1f} GiB"),
    ("mfu", "MFU {:.1%}"),
)


def _figures(row: Mapping[str, Any]) -> list[str]:
    shown = {**row}
    if row.get("images_per_s") is not None:
        shown["images_per_s"] = _rate(row["images_per_s"])
    return [form.format(shown[name]) for name, form in _FIGURES if shown.get(name) is not None]


def _rate(value: float) -> str:
    """Images a second; below one with two digits, so that a slow step does not show none."""
    return f"{value:.2f}" if value < 1 else f"{value:.0f}"


def _terms(row: Mapping[str, Any]) -> str:
    """The terms of a loss in brackets, where it has more than one."""
    terms = []
    for name, value in row.items():
        if name.startswith("loss_") and value is not None:
            terms.append(f"{name.removeprefix('loss_')} {value:.4f}")
    return f" ({', '.join(terms)})" if len(terms) > 1 else ""


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days}d {h:02d}:{m:02d}:{s:02d}" if days else f"{h}:{m:02d}:{s:02d}"
