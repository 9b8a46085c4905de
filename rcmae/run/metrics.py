"""What a run shows while it trains: files that stay true over kill and resume, a progress line, and
the speed meter.

`metrics.jsonl` has one object a logged step, each step once: a resume cuts the file back to the
step it goes on from. `events.jsonl` is only ever appended to, so a step that was run twice shows
there. TensorBoard gets the same numbers and is told to forget what lies beyond the resume.
Everything takes plain numbers: nothing here waits for a GPU, so whoever calls decides when a tensor
becomes a number (on log steps)."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from torch.utils.tensorboard import SummaryWriter

GIB = 2**30

# Dense peaks in TFLOP/s from the makers' data sheets: (bf16 with fp32 sums, TF32, fp32). A name is
# matched by the first entry that it contains, so the special case stands before the general one. 0
# = the device has no such unit.
_PEAKS: tuple[tuple[str, tuple[float, float, float]], ...] = (
    ("GB200", (2500.0, 1250.0, 80.0)),
    ("B200", (2250.0, 1125.0, 75.0)),
    ("H200 NVL", (835.5, 417.5, 60.0)),
    ("H200", (989.4, 494.7, 66.9)),
    ("GH200", (989.4, 494.7, 66.9)),
    ("H100 NVL", (835.5, 417.5, 60.0)),
    ("H100 PCIe", (756.0, 378.0, 51.2)),
    ("H100", (989.4, 494.7, 66.9)),
    ("H800", (989.4, 494.7, 66.9)),
    ("H20", (148.0, 74.0, 44.0)),
    ("A100", (312.0, 156.0, 19.5)),
    ("A800", (312.0, 156.0, 19.5)),
    ("A6000", (154.8, 77.4, 38.7)),
    ("A40", (149.7, 74.8, 37.4)),
    ("A30", (165.0, 82.0, 10.3)),
    ("A10G", (70.0, 35.0, 31.5)),
    ("A10", (125.0, 62.5, 31.2)),
    ("L40S", (362.1, 183.0, 91.6)),
    ("L40", (181.1, 90.5, 90.5)),
    ("L4", (121.0, 60.0, 30.3)),
    ("RTX 6000 Ada", (364.2, 182.1, 91.1)),
    ("RTX 5090", (209.5, 104.8, 104.8)),
    ("RTX 4090", (165.2, 82.6, 82.6)),
    ("RTX 3090", (71.2, 35.6, 35.6)),
    ("V100-PCIE", (0.0, 0.0, 14.0)),
    ("V100", (0.0, 0.0, 15.7)),
    ("T4", (0.0, 0.0, 8.1)),
    ("MI300X", (1307.4, 653.7, 163.4)),
)


def peak_flops(device_name: str, precision: str, *, tf32: bool = False) -> float | None:
    """The device's dense peak in FLOP/s, None where it is not known (a CPU, a device that is not in
    the table).

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
        precision: "bf16" or "fp32".
        tf32: whether fp32 matrix products may use TF32 (`torch.get_float32_matmul_precision() !=
            "highest"`).
    """
    column = 0 if precision == "bf16" else 1 if tf32 else 2
    for name, peaks in _PEAKS:
        if name in device_name:
            return max(peaks[column], peaks[2] if column == 1 else 0.0) * 1e12 or None
    return None


# ---------------------------------------------------------------------------------------- the files


def cut_back(path: Path, step: int) -> int:
    """Keep the lines of a metrics file that `step` and its forerunners wrote; how many lines were
    dropped.

    Dropped are lines of later steps (they will be run again), lines of a step that was already
    seen, and whatever is no JSON object with a step: a kill tears the last line, a power loss can
    leave zeros. The file is written aside, synced and renamed, so a kill here loses nothing, and a
    writer that still holds the old file writes into the void."""
    dropped, last = 0, 0
    aside = path.with_name(path.name + ".aside")
    with aside.open("wb") as out:
        if path.exists():
            with path.open("rb") as lines:
                for line in lines:
                    at = _step_of(line)
                    if at is None or not last < at <= step:
                        dropped += 1
                        continue
                    last = at
                    out.write(line)
        out.flush()
        os.fsync(out.fileno())
    aside.replace(path)
    _sync_folder(path.parent)
    return dropped


def undone(path: Path, step: int) -> dict[str, float] | None:
    """The last whole line of a metrics file beyond `step`: its step and when it was written; None
    without one.

    Steps up to there were done once and will be done again.
    """
    if not path.exists():
        return None
    with path.open("rb") as lines:
        rows = [json.loads(line) for line in lines if (_step_of(line) or 0) > step]
    return {"step": rows[-1]["step"], "time": rows[-1].get("time", 0.0)} if rows else None


def events_of(directory: Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind in a run's folder, oldest first; none where there is no file yet."""
    try:
        lines = (directory / "events.jsonl").read_bytes().splitlines(keepends=True)
    except OSError:
        return []
    mark = f'"event": "{kind}"'.encode()
    return [json.loads(line) for line in lines if mark in line and line.endswith(b"\n")]


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


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
        metrics, events = directory / "metrics.jsonl", directory / "events.jsonl"
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
            named = {
                name[5:]: value
                for name, value in row.items()
                if name.startswith("loss_") and value is not None
            }
            terms = [f"{name} {value:.4f}" for name, value in named.items()]
            parts.append(
                f"loss {row['loss']:.4f}" + (f" ({', '.join(terms)})" if len(terms) > 1 else "")
            )
        for name, form in (
            ("lr", "lr {:.2e}"),
            ("images_per_s", "{:.0f} img/s"),
            ("data_wait_s", "wait {:.3f} s"),
            ("memory_peak_gib", "{:.1f} GiB"),
            ("mfu", "MFU {:.1%}"),
        ):
            if row.get(name) is not None:
                parts.append(form.format(row[name]))
        done = row["step"] - self._first
        if done > 0 and row["step"] < self.total_steps:
            left = (time.monotonic() - self._started) / done * (self.total_steps - row["step"])
            parts.append(f"{_duration(left)} left")
        return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days}d {h:02d}:{m:02d}:{s:02d}" if days else f"{h}:{m:02d}:{s:02d}"


# ---------------------------------------------------------------------------------------- the meter


class Meter:
    """Speed between two log steps, by this rank's clock. Reads no tensor and waits for no device.

    On a GPU the clock is true where the loop itself waits at log steps (it reads the loss there)
    before it calls `read()`; in between, launches run ahead of the device.

    Args:
        device: where this rank computes.
        world: ranks that train, each on one device.
        step_flops_per_image: FLOPs of a whole training step for one image (forwards and backward,
            no recomputation).
        precision: "bf16" or "fp32", for the peak.
    """

    def __init__(
        self, *, device: torch.device, world: int, step_flops_per_image: float, precision: str
    ) -> None:
        self._device = device
        self._world = world
        self._flops = step_flops_per_image
        self.peak: float | None = None  # FLOP/s of one device
        if device.type == "cuda":
            tf32 = torch.get_float32_matmul_precision() != "highest"
            self.peak = peak_flops(torch.cuda.get_device_name(device), precision, tf32=tf32)
        self._reset()

    def _reset(self) -> None:
        self._since = time.perf_counter()
        self._images = self._steps = 0
        self._waited = self._away = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in this block as waiting for data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Leave the time in this block out: evaluation, pictures, the wait for a checkpoint's
        copy.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            self._away += time.perf_counter() - start

    def step(self, images: int) -> None:
        """Count one optimizer step of so many images over all ranks."""
        self._images += images
        self._steps += 1

    def read(self) -> dict[str, float]:
        """The figures since the last call, and start anew.

        images_per_s over all ranks; step_s and data_wait_s are means over the steps, in seconds;
        memory_peak_gib is the peak since the start (the device's allocator, on CPU the process's
        resident memory); model_tflops per device counts the model's own FLOPs only; mfu is their
        share of the device's dense peak, left out where none is known."""
        elapsed = time.perf_counter() - self._since - self._away
        steps = max(self._steps, 1)
        rate = self._images / elapsed
        flops = rate * self._flops / self._world  # FLOP/s of one device
        figures = {
            "images_per_s": rate,
            "step_s": elapsed / steps,
            "data_wait_s": self._waited / steps,
            "memory_peak_gib": self._peak_memory() / GIB,
            "model_tflops": flops / 1e12,
        }
        if self.peak:
            figures["mfu"] = flops / self.peak
        self._reset()
        return figures

    def _peak_memory(self) -> float:
        """Bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
    lines = [f"== {title} =="]
    for heading, entries in (("what ran", ran), ("where it lies", there)):
        lines += (
            [heading, *(f"  {name:<{width}}  {value}" for name, value in entries.items())]
            if entries
            else []
        )
        if heading == "what ran" and table:
            lines += [caption, *(f"  {line}" for line in table.splitlines())]
    if commands:
        lines += ["what to run next", *(f"  {command}    # {what}" for what, command in commands)]
    return "\n".join(lines)
