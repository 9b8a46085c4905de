"""What a run shows while it trains: files that stay true over kill and resume, and a progress line.

`metrics.jsonl` has one object a logged step, each step once: a resume cuts the file back to the
step it resumes from. `events.jsonl` is only ever appended to, so a step that was run twice shows
there. TensorBoard gets the same numbers and is told to forget what lies beyond the resume.
Everything takes plain numbers: nothing here waits for a GPU, so whoever calls decides when a tensor
becomes a number (on log steps).
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from torch.utils.tensorboard import SummaryWriter

from rcmae.files import aside, json_lines

# ---------------------------------------------------------------------------------------- the files


def cut_back(path: Path, step: int) -> int:
    """Keep the lines of a metrics file that `step` and its forerunners wrote; how many lines were
    dropped.

    Dropped are lines of later steps (they will be run again), lines of a step that was already
    seen, and whatever is no JSON object with a step: a kill tears the last line, a power loss can
    leave zeros. The file is written aside, synced and renamed, so a kill here loses nothing, and a
    writer that still holds the old file writes into the void.
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
    last = None
    for row in json_lines(path):
        if isinstance(row.get("step"), int) and row["step"] > step:
            last = row
    return {"step": last["step"], "time": last.get("time", 0.0)} if last else None


def events_of(directory: Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind in a run's folder, oldest first; none where there is no file yet."""
    return [row for row in json_lines(directory / "events.jsonl") if row.get("event") == kind]


def _lines(path: Path) -> Iterator[bytes]:
    if path.exists():
        with path.open("rb") as lines:
            yield from lines


def _step_of(line: bytes) -> int | None:
    """The step of a whole line, None for a torn or foreign one."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
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


def _write_line(file: IO[str], row: Mapping[str, Any]) -> None:
    # one write: a kill tears at most this line
    file.write(json.dumps(_plain(row), allow_nan=False) + "\n")
    file.flush()


class MetricsLog:
    """metrics.jsonl, events.jsonl, TensorBoard and the progress of one run, on the one rank that
    writes.

    Not collective: every rank makes one and calls it alike, those with `writes=False` do nothing.
    Make it after the run's folder is this job's to write (under the lease), and before the first
    step.

    Args:
        directory: the run's folder.
        resume_step: the step this job goes on from, 0 for a fresh start; lines beyond it are
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
        self._started = time.monotonic()
        self._board: SummaryWriter | None = None
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
        self._metrics = metrics.open("a", encoding="utf-8")
        self._events = events.open("a", encoding="utf-8")
        if tensorboard:
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=resume_step + 1)
        self._console = console or Console()
        if sys.stdout.isatty() if bar is None else bar:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                console=self._console,
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
        _write_line(self._metrics, row)
        if self._board:
            for name, value in row.items():
                if isinstance(value, int | float) and name not in ("step", "time"):
                    self._board.add_scalar(f"train/{name}", value, row["step"])
        if self._bar:
            self._bar.update(self._task, completed=row["step"], description=self._line(row))
        else:
            self.say(f"step {row['step']}/{self.total_steps}  {self._line(row)}")

    def event(self, kind: str, **details: Any) -> None:
        """Append to events.jsonl: start, resume, checkpoint, signal, bad_sample, evaluate, stop."""
        if self.writes:
            _write_line(self._events, {"event": kind, "time": time.time(), **details})

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
        cut_back(self.directory / "metrics.jsonl", step)
        self._metrics = (self.directory / "metrics.jsonl").open("a", encoding="utf-8")
        if self._board:
            self._board.close()
            self._board = SummaryWriter(str(self.directory / "tensorboard"), purge_step=step + 1)

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Numbers that belong to no logged step (an evaluation's) for TensorBoard, as
        group/name.
        """
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(f"{group}/{name}", value, step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """A picture for TensorBoard: uint8 [height, width, 3]."""
        if self._board:
            self._board.add_image(name, pixels, step, dataformats="HWC")

    def say(self, text: str) -> None:
        """Print above the bar, or just print; as it is, without wrapping or colours."""
        if self.writes:
            self._console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
            self._console.file.flush()

    def sync(self) -> None:
        """Put all lines on the disk. To be called before a checkpoint is committed: a power loss
        after the commit then finds every line up to the checkpoint's step."""
        if self.writes:
            for file in (self._metrics, self._events):
                os.fsync(file.fileno())

    def close(self) -> None:
        """Finish the files and the bar. A second call does nothing."""
        if not self.writes:
            return
        if self._bar:
            self._bar.stop()
        if self._board:
            self._board.close()
        if not self._metrics.closed:
            self.sync()
            self._metrics.close()
            self._events.close()
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

    def _line(self, row: Mapping[str, Any]) -> str:
        """A logged step for people."""
        parts = []
        if row.get("epoch") is not None:
            parts.append(f"epoch {row['epoch']:.2f}")
        if row.get("loss") is not None:
            parts.append(f"loss {row['loss']:.4f}{_terms(row)}")
        for name, form in _FIGURES:
            if row.get(name) is not None:
                parts.append(form.format(row[name]))
        done = row["step"] - self._first
        if done > 0 and row["step"] < self.total_steps:
            left = (time.monotonic() - self._started) / done * (self.total_steps - row["step"])
            parts.append(f"{_duration(left)} left")
        return "  ".join(parts)


# of a logged step, those that the progress line shows
_FIGURES = (
    ("lr", "lr {:.2e}"),
    ("images_per_s", "{:.0f} img/s"),
    ("data_wait_s", "wait {:.3f} s"),
    ("memory_peak_gib", "{:.1f} GiB"),
    ("mfu", "MFU {:.1%}"),
)


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


# ------------------------------------------------------------------------------------------ the end


def closing_summary(
    title: str,
    *,
    ran: Mapping[str, str],
    table: str,
    places: Mapping[str, Path],
    commands: Sequence[tuple[str, str]],
    caption: str = "k-NN, top-1 in %",
) -> str:
    """The text a run ends with.

    Args:
        title: the run and how it ended.
        ran: what ran, name and figure.
        table: the last evaluation as text, empty where there was none.
        places: what lies where; files that are not there are left out.
        commands: what to run next, (what it does, command line).
        caption: of the table.
    """
    there = {name: str(place) for name, place in places.items() if place.exists()}
    width = max((len(name) for name in [*ran, *there]), default=0)

    def section(heading: str, entries: Mapping[str, str]) -> list[str]:
        rows = [f"  {name:<{width}}  {value}" for name, value in entries.items()]
        return [heading, *rows] if rows else []

    lines = [f"== {title} =="]
    lines += section("what ran", ran)
    if table:
        lines.append(caption)
        lines += [f"  {line}" for line in table.splitlines()]
    lines += section("where it lies", there)
    if commands:
        lines.append("what to run next")
        lines += [f"  {command}    # {what}" for what, command in commands]
    return "\n".join(lines)
