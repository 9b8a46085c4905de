#!/usr/bin/env python3
"""Where the time of a run went over all its jobs, where it stands, and how long it still takes.
Reads, writes nothing.

    python tools/runs.py status RUN_DIR [--watch] [--json]

Goodput is the time of steps that count (their updates are in the run as it stands) over the time
since the first job began. What is known: each logged step's mean times (metrics.jsonl), events with
their seconds (events.jsonl), the starts that SLURM made (jobs.jsonl), and the last beat of a job
that ended without a word (leases/). A gap before a restart of the same SLURM job is its queue, any
other gap is idle. The teacher's update is timed on logged steps alone and taken to be as long on
the others. Exit status: 0 told; 2 there is no run."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

KINDS = (
    "step",
    "ema",
    "data wait",
    "checkpoint",
    "evaluation",
    "start-up",
    "replayed",
    "other",
    "queue",
    "idle",
)
PRODUCTIVE = ("step", "ema")
BEATS_MISSED = 3.0  # a job whose beat is older than this many lease time-outs is not alive
RECENT = 20  # logged steps that the pace is taken from
EVENTS_SHOWN = 6


@dataclass
class Job:
    """One start of a run: from its process's beginning to its last sign of life."""

    began: float  # seconds since 1970
    ended: float
    first_step: int
    last_step: int
    how: str  # alive, or how it ended
    ranks: int
    job: str | None  # the scheduler's
    undone_steps: int = 0  # that it did and a later start does again
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))


Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The whole lines of a file of JSON objects; none where there is no file."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:  # torn by a power loss
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------- jobs


def jobs_of(folder: Path, now: float) -> list[Job]:
    """Every start of a run that came to training, oldest first, its seconds split.

    Raises:
        ValueError: no run was ever started in this folder.
    """
    events, rows = read(folder / "events.jsonl"), read(folder / "metrics.jsonl")
    starts = [event for event in events if event["event"] in ("start", "resume")]
    if not starts:
        raise ValueError(f"{folder} is no run: its events.jsonl tells of no start; give a run.dir")
    scheduled = {
        (row.get("job"), row.get("restart")): row["time"] for row in read(folder / "jobs.jsonl")
    }
    found: list[Job] = []
    for number, start in enumerate(starts):
        later = starts[number + 1] if number + 1 < len(starts) else None
        until = later["time"] if later else float("inf")
        mine = [row for row in rows if start["time"] <= row["time"] < until]
        happened = [
            event
            for event in events
            if start["time"] <= event["time"] < until and event is not start
        ]
        process: float = start.get("process_started") or start["time"]
        began: float = scheduled.get((start.get("job"), start.get("restart"))) or process
        if found:  # it may have waited for the one before to end
            began = max(began, found[-1].ended)
        found.append(job_of(folder, start, mine, happened, later, min(began, start["time"]), now))
    for before, after in itertools.pairwise(found):
        gap = max(0.0, after.began - before.ended)
        after.seconds["queue" if after.job and after.job == before.job else "idle"] = gap
    return found


def job_of(
    folder: Path,
    start: Row,
    rows: Sequence[Row],
    events: Sequence[Row],
    later: Row | None,
    began: float,
    now: float,
) -> Job:
    """One start, from what it wrote that still stands and what the next start said of the rest.

    Args:
        folder: the run's.
        start: its event.
        rows: its logged steps that were not cut back.
        events: that came after.
        later: the event of the next start.
        began: when its process did, or its job.
        now: seconds since 1970.
    """
    undone = (later or {}).get("undone")  # the last of the logged steps that were cut back
    ended, how = ending(folder, start, [*rows, *events, *([undone] if undone else [])], later, now)
    # not all log
    told = [
        start,
        *rows[-1:],
        *(event for event in events if event["event"] in ("checkpoint", "stop")),
    ]
    job = Job(
        began=began,
        ended=ended,
        first_step=start["step"],
        last_step=max(row["step"] for row in told),
        how=how,
        ranks=start["sizes"]["world"],
        job=start.get("job"),
    )
    job.seconds |= split(start, rows, events)
    job.seconds["start-up"] += start["time"] - began
    lost = [(event["step"], event["time"]) for event in events if event.get("action") == "rewind"]
    if undone and later:
        lost.append((undone["step"], undone["time"]))
    for step, at in lost:  # from what stands to there, all was done for nothing
        stands = max(
            (row for row in rows if row["time"] < at), key=lambda row: row["time"], default=start
        )
        interrupted = split(
            start, [], [event for event in events if stands["time"] < event["time"] <= at]
        )
        job.undone_steps += max(0, step - stands["step"])
        job.seconds["replayed"] += max(0.0, at - stands["time"] - sum(interrupted.values()))
    job.seconds["other"] = max(0.0, ended - began - sum(job.seconds.values()))
    return job


def ending(
    folder: Path, start: Row, signs: Sequence[Row], later: Row | None, now: float
) -> tuple[float, str]:
    """When a start ended, by its last sign of life, and how.

    `now` and "alive" for one that goes on.
    """
    stop = next((event for event in signs if event.get("event") == "stop"), None)
    if stop is not None:
        return stop["time"], stop["reason"]
    beat = last_beat(folder, start.get("generation"))
    if later is None and beat is not None and now - beat < BEATS_MISSED * lease_timeout(folder):
        return now, "alive"
    ended = max([start["time"], *(sign["time"] for sign in signs), beat or 0.0])
    return (min(ended, later["time"]) if later else ended), "ended without a word"


def split(start: Row, rows: Sequence[Row], events: Sequence[Row]) -> dict[str, float]:
    """Seconds of a start's logged steps and of what interrupted them, by kind."""
    spent = dict.fromkeys(("step", "ema", "data wait", "start-up"), 0.0)
    usual, done = statistics.median(row["step_s"] for row in rows) if rows else 0.0, start["step"]
    for row in rows:
        steps, done = max(0, row["step"] - done), row["step"]
        wait, ema = row["data_wait_s"], row.get("teacher_update_s", 0.0)
        work = max(0.0, row["step_s"] - wait - ema)
        slow = 0.0
        if row is rows[0] and len(rows) > 2:
            # kernels compiled, caches filled: more than a usual step
            slow = min(work, max(0.0, row["step_s"] - usual))
        for kind, seconds in (
            ("step", work - slow),
            ("ema", ema),
            ("data wait", wait),
            ("start-up", slow),
        ):
            spent[kind] += steps * seconds
    spent["checkpoint"] = sum(
        event["stall_s"] for event in events if event["event"] == "checkpoint"
    )
    spent["evaluation"] = sum(event["seconds"] for event in events if event["event"] == "evaluate")
    return spent


def last_beat(folder: Path, generation: int | None) -> float | None:
    """When the holder of a generation of the lease gave its last sign.

    By the file system's clock.
    """
    try:
        return (
            (folder / "leases" / f"{generation:08d}.beat").stat().st_mtime
            if generation is not None
            else None
        )
    except OSError:
        return None


def lease_timeout(folder: Path) -> float:
    """Seconds after which a silent job is taken to be gone, of this run's recipe."""
    try:
        return float(yaml.safe_load((folder / "recipe.yaml").read_text())["run"]["lease_timeout_s"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return 60.0


# ------------------------------------------------------------------------------------------- status


def status(folder: Path, now: float | None = None) -> dict[str, Any]:
    """Everything `status` tells, as plain values.

    Raises:
        ValueError: there is no run in this folder.
    """
    now = time.time() if now is None else now
    jobs, events, rows = (
        jobs_of(folder, now),
        read(folder / "events.jsonl"),
        read(folder / "metrics.jsonl"),
    )
    last = jobs[-1]
    sizes = [event for event in events if event["event"] in ("start", "resume")][-1]["sizes"]
    total, step = sizes["total_steps"], last.last_step
    seconds = {kind: sum(job.seconds[kind] for job in jobs) for kind in KINDS}
    wall = last.ended - jobs[0].began
    pace = seconds_per_step(rows, jobs)
    left = (total - step) * pace if pace is not None else None
    row = rows[-1] if rows else {}
    return {
        "run": str(folder),
        "state": state(last, step, total),
        "step": step,
        "total_steps": total,
        "epoch": row.get("epoch"),
        "loss": row.get("loss"),
        "images_per_s": row.get("images_per_s"),
        "ranks": last.ranks,
        "wall_s": wall,
        "goodput": sum(seconds[kind] for kind in PRODUCTIVE) / wall if wall > 0 else 0.0,
        "seconds": seconds,
        "undone_steps": sum(job.undone_steps for job in jobs),
        "seconds_per_step": pace,
        "hours_to_go": left / 3600 if left is not None else None,
        "startup_s": next(
            (event["startup_s"] for event in reversed(events) if event["event"] == "first_step"), {}
        ),
        "jobs": [asdict(job) for job in jobs],
        "starts_without_training": starts_without_training(folder, events),
        "last_events": events[-EVENTS_SHOWN:],
        "time": now,
    }


def state(last: Job, step: int, total: int) -> str:
    """What can be said of the run in a word or two."""
    if last.how == "alive":
        return "training"
    if step >= total and last.how == "finished":
        return "finished"
    return f"not running: {last.how}"


def seconds_per_step(rows: Sequence[Row], jobs: Sequence[Job]) -> float | None:
    """Wall seconds of a step lately, everything in it, within the last start that logged twice.

    None without one.
    """
    for job in reversed(jobs):
        mine = [row for row in rows if job.began <= row["time"] <= job.ended][-RECENT:]
        if len(mine) > 1 and mine[-1]["step"] > mine[0]["step"]:
            return float(mine[-1]["time"] - mine[0]["time"]) / (mine[-1]["step"] - mine[0]["step"])
    return None


def starts_without_training(folder: Path, events: Sequence[Row]) -> int:
    """Starts of the scheduler that never came to a step: refused, or broken before they began."""
    begun = {
        (event.get("job"), event.get("restart"))
        for event in events
        if event["event"] in ("start", "resume")
    }
    return sum(
        (row.get("job"), row.get("restart")) not in begun for row in read(folder / "jobs.jsonl")
    )


# ------------------------------------------------------------------------------------------- report


def duration(seconds: float) -> str:
    """Seconds for people."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if seconds >= 60 else f"{seconds:.1f} s"


def report(told: Mapping[str, Any]) -> Group:
    """The status for people."""
    left = (
        f", {duration(3600 * told['hours_to_go'])} to go" if told["hours_to_go"] is not None else ""
    )
    loss = f", loss {told['loss']:.4f}" if told["loss"] is not None else ""
    head = (
        f"{told['run']}: {told['state']}\n"
        f"step {told['step']} of {told['total_steps']} "
        f"({told['step'] / told['total_steps']:.1%}){loss}{left}\n"
        f"goodput {told['goodput']:.1%} of {duration(told['wall_s'])} since the first start; "
        f"{told['undone_steps']} steps done twice, {told['starts_without_training']} starts "
        "without training"
    )
    if told["startup_s"]:
        parts = ", ".join(
            f"{name} {duration(seconds)}" for name, seconds in told["startup_s"].items()
        )
        head += (
            f"\nlast start-up of rank 0, {duration(sum(told['startup_s'].values()))} to the "
            f"first step: {parts}"
        )
    split = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("where the time went", "", "%"):
        split.add_column(name, justify="left" if name.startswith("where") else "right")
    for kind, seconds in told["seconds"].items():
        split.add_row(kind, duration(seconds), f"{100 * seconds / max(told['wall_s'], 1e-9):.1f}")
    jobs = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("start", "began", "ranks", "steps", "lasted", "goodput", "how it ended"):
        jobs.add_column(name, justify="left" if name in ("start", "how it ended") else "right")
    for number, job in enumerate(told["jobs"]):
        lasted = job["ended"] - job["began"]
        good = sum(job["seconds"][kind] for kind in PRODUCTIVE) / max(lasted, 1e-9)
        jobs.add_row(
            f"{number + 1}" + (f" (job {job['job']})" if job["job"] else ""),
            clock(job["began"]),
            str(job["ranks"]),
            f"{job['first_step']} to {job['last_step']}",
            duration(lasted),
            f"{good:.1%}",
            job["how"],
        )
    happened = [
        f"{clock(event['time'])}  {event['event']}"
        + (f" at step {event['step']}" if "step" in event else "")
        + (f": {event['reason']}" if "reason" in event else "")
        for event in told["last_events"]
    ]
    return Group(
        Text(head), Text(), split, Text(), jobs, Text(), Text("\n".join(["last events", *happened]))
    )


def clock(seconds: float) -> str:
    """A moment for people, in local time."""
    return time.strftime("%m-%d %H:%M:%S", time.localtime(seconds))


def main(argv: Sequence[str] | None = None) -> int:
    """Tell a run's status; the exit status."""
    parser = argparse.ArgumentParser(
        prog="tools/runs.py", description=(__doc__ or "").split("\n")[0]
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser("status", help="where a run stands and where its time went")
    verb.add_argument("run", type=Path, help="its run.dir")
    verb.add_argument(
        "--watch", action="store_true", help="again every few seconds, until the run is not running"
    )
    verb.add_argument("--every-s", type=float, default=5.0, help="seconds between two looks (5)")
    verb.add_argument(
        "--json", action="store_true", help="print one JSON document, with --watch one a line"
    )
    options = parser.parse_args(argv)
    console = Console(width=max(Console().width, 100))
    try:
        told = status(options.run)
        if not options.watch:
            if options.json:
                print(json.dumps(told, indent=1))
            else:
                console.print(report(told))
            return 0
        with Live(console=console, auto_refresh=False) as live:
            while True:
                if options.json:
                    print(json.dumps(told), flush=True)
                else:
                    live.update(report(told), refresh=True)
                if told["state"] != "training":
                    return 0
                time.sleep(options.every_s)
                told = status(options.run)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    raise SystemExit(main())
