"""Where the time of a run went over all its jobs, where it stands, and how long it still takes.
Reads, writes nothing.

Goodput is the time of steps that count (their updates are in the run as it stands) over the time
since the first job began. What is known: each logged step's mean times (metrics.jsonl), events with
their seconds (events.jsonl), the starts that SLURM made (jobs.jsonl), and of a job that ended
without an event its last beat and, where it ran on this host, whether its process is there
(leases/). A gap before a restart of the same SLURM job is its queue, any other gap is idle. The
teacher's update is timed on logged steps alone and taken to be as long on the others.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rcmae.config.trees import tree_of
from rcmae.errors import Refused
from rcmae.files import json_lines, json_lines_back
from rcmae.process.alive import died_here
from rcmae.run import jobs
from rcmae.run.records.metrics import PROGRESS

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
QUEUE_ASKED = 3  # of a run's jobs, the newest
LOADING_S = 600.0  # a start that has not come to a step may take so long, where SLURM is not asked

Row = dict[str, Any]
_SIZES = {"total_steps": 0, "world": 0}  # of a start's event, what is read of its sizes
_SHOWN = ("teacher_update_s", "loss", "epoch", "images_per_s")  # of a step, where it has them
_OF_STEPS = ("step", "time", "step_s", "data_wait_s", *_SHOWN)
# the same of each kind of event
_NUMBERS = {
    "start": ("step",),
    "resume": ("step",),
    "checkpoint": ("step", "stall_s"),
    "evaluate": ("seconds",),
    "stop": ("step",),
    "late_rank": ("step", "rank", "seconds_a_step", "share"),
    "late_rank_over": ("rank",),
}


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


@dataclass(frozen=True)
class _Start:
    """What one start wrote that still stands, and what the next one said of the rest."""

    event: Row
    rows: list[Row]  # its logged steps that were not cut back
    events: list[Row]  # that came after its own
    later: Row | None  # the event of the next start
    undone: Row | None  # the last of its logged steps that were cut back


def status(folder: Path, now: float | None = None, *, asks: bool = True) -> dict[str, Any]:
    """All that is known of a run, as plain values.

    Args:
        folder: the run's.
        now: the time, in seconds since 1970; None: by the clock.
        asks: SLURM for the jobs of a run that does not train and is not finished.

    Raises:
        Refused: there is no run in this folder.
    """
    if now is None:
        now = time.time()
    starts = jobs_of(folder, now)
    events = _rows(folder / "events.jsonl", of="event")
    rows = _rows(folder / "metrics.jsonl", of="step")
    first_steps = [event for event in events if event["event"] == "first_step"]
    sizes = _starts_among(events)[-1]["sizes"]
    total = sizes["total_steps"]
    last = starts[-1]
    step = last.last_step
    told = state(last, step, total)
    queue = None
    if asks and told not in ("training", "finished"):
        queue = queued_job(folder, last)
        told = state_in_queue(told, folder, events, queue)
    seconds = {kind: sum(job.seconds[kind] for job in starts) for kind in KINDS}
    wall = last.ended - starts[0].began
    pace = seconds_per_step(rows, starts)
    left = (total - step) * pace if pace is not None else None
    row = rows[-1] if rows else {}
    shown = [event for event in events if event["event"] != "evaluation_begun"]
    return {
        "run": str(folder),
        "state": told,
        "is_over": told != "training" and not (queue and queue.state),
        "step": step,
        "total_steps": total,
        "epoch": row.get("epoch"),
        "loss": row.get("loss"),
        "images_per_s": row.get("images_per_s"),
        "ranks": last.ranks,
        "wall_s": wall,
        "goodput": sum(seconds[kind] for kind in PRODUCTIVE) / wall if wall > 0 else 0.0,
        "seconds": seconds,
        "undone_steps": sum(job.undone_steps for job in starts),
        "seconds_per_step": pace,
        "hours_to_go": left / 3600 if left is not None else None,
        "startup_s": first_steps[-1].get("startup_s", {}) if first_steps else {},
        "jobs": [asdict(job) for job in starts],
        "starts_without_training": starts_without_training(folder, events, queue, now),
        "late_ranks": late_ranks(events),
        "last_events": shown[-EVENTS_SHOWN:],
        "time": now,
    }


def state(last: Job, step: int, total: int) -> str:
    """What can be said of the run in a word or two."""
    if last.how == "alive":
        return "training"
    if step >= total and last.how == "finished":
        return "finished"
    return f"not running: {last.how}"


def seconds_per_step(rows: Sequence[Row], starts: Sequence[Job]) -> float | None:
    """Wall seconds of a step lately, everything in it, within the last start that logged twice.

    None without one.
    """
    for job in reversed(starts):
        mine = [row for row in rows if job.began <= row["time"] <= job.ended][-RECENT:]
        if len(mine) > 1 and mine[-1]["step"] > mine[0]["step"]:
            return float(mine[-1]["time"] - mine[0]["time"]) / (mine[-1]["step"] - mine[0]["step"])
    return None


def queued_job(folder: Path, last: Job | None = None) -> jobs.Queued | None:
    """What SLURM has of the run's jobs, the newest first; None where it cannot be asked.

    `last`: the last start that came to training.
    """
    rows = _rows(folder / "jobs.jsonl", of="job")
    named = [row["job"] for row in reversed(rows)] + ([last.job] if last else [])
    known = [job for job in dict.fromkeys(named) if isinstance(job, str) and job.isdecimal()]
    return jobs.queued(known[:QUEUE_ASKED]) if known else None


def state_in_queue(
    told: str, folder: Path, events: Sequence[Row], queue: jobs.Queued | None
) -> str:
    """What can be said of a run that does not train, by its job in the queue.

    `told`: without it.
    """
    if queue is None or not queue.state:
        return told
    if not queue.runs:
        why = f": {queue.why}" if queue.why else ""
        return f"requeued, waiting in the queue (job {queue.job}{why})"
    rows = _rows(folder / "jobs.jsonl", of="job")
    begun = {_scheduled(event) for event in _starts_among(events)}
    starts = bool(rows) and rows[-1]["job"] == queue.job and _scheduled(rows[-1]) not in begun
    return f"{'starting' if starts else 'ending'} (job {queue.job})"


def starts_without_training(
    folder: Path, events: Sequence[Row], queue: jobs.Queued | None, now: float
) -> int:
    """Starts of the scheduler that never came to a step: refused, or broken before they began.

    The newest is left out while it loads: as SLURM says, else for LOADING_S.
    """
    begun = {_scheduled(event) for event in _starts_among(events)}
    rows = [row for row in _rows(folder / "jobs.jsonl", of="job") if _scheduled(row) not in begun]
    if not rows:
        return 0
    last = rows[-1]
    loads = last["time"] > max(event["time"] for event in _starts_among(events))
    if queue is None:
        loads = loads and now - last["time"] < LOADING_S
    else:
        loads = loads and queue.runs and queue.job == last["job"]
    return len(rows) - loads


def late_ranks(events: Sequence[Row]) -> list[Row]:
    """What the last start says of ranks that hold the others up, and still do: one a cause."""
    late: dict[Any, Row] = {}
    for event in events:
        if event["event"] in ("start", "resume"):
            late = {}
        elif event["event"] == "late_rank":
            late[str(event.get("cause"))] = event
        elif event["event"] == "late_rank_over":
            late.pop(str(event.get("cause")), None)
    return list(late.values())


def _rows(path: Path, *, of: str) -> list[Row]:
    """The lines of a file that say when, and have this key: others are not ours."""
    found = (row for row in json_lines(path) if of in row and _is_whole(row, of))
    if of != "step":
        return list(found)
    # of a million logged steps, what is read of them alone
    return [{name: row[name] for name in _OF_STEPS if name in row} for row in found]


def _is_whole(row: Row, of: str) -> bool:
    """Whether a line says what is read of it: somebody may have edited the file."""
    numbers = {"step": ("step", "step_s", "data_wait_s"), "event": (), "job": ()}[of]
    if of == "event":
        if not isinstance(row["event"], str):
            return False
        numbers = _NUMBERS.get(row["event"], ())
        sizes = row.get("sizes") if row["event"] in ("start", "resume") else _SIZES
        if not isinstance(sizes, dict) or not _has_numbers(sizes, tuple(_SIZES)):
            return False
    shown = {name: row[name] for name in _SHOWN if row.get(name) is not None}
    return _has_numbers(row, ("time", *numbers)) and _has_numbers(shown, tuple(shown))


def _has_numbers(row: Row, names: Sequence[str]) -> bool:
    return all(
        isinstance(row.get(name), int | float) and not isinstance(row[name], bool) for name in names
    )


def _starts_among(events: Sequence[Row]) -> list[Row]:
    return [event for event in events if event["event"] in ("start", "resume")]


def _scheduled(row: Row) -> tuple[Any, Any]:
    """The scheduler's job and how often it had started that before."""
    job, restart = row.get("job"), row.get("restart")
    is_known = isinstance(job, str | None) and isinstance(restart, int | None)
    return (job, restart) if is_known else (None, None)


# --------------------------------------------------------------------------------------------- jobs


def jobs_of(folder: Path, now: float) -> list[Job]:
    """Every start of a run that came to training, oldest first, its seconds split.

    Raises:
        Refused: no run was ever started in this folder.
    """
    scheduled = {_scheduled(row): row["time"] for row in _rows(folder / "jobs.jsonl", of="job")}
    found: list[Job] = []
    for start in _starts_of(folder):
        event = start.event
        process: float = event.get("process_started") or event["time"]
        began: float = scheduled.get(_scheduled(event)) or process
        if found:  # it may have waited for the one before to end
            began = max(began, found[-1].ended)
        found.append(job_of(folder, start, began=min(began, event["time"]), now=now))
    for before, after in itertools.pairwise(found):
        gap = max(0.0, after.began - before.ended)
        after.seconds["queue" if after.job and after.job == before.job else "idle"] = gap
    return found


def _no_start(folder: Path) -> str:
    """Why nothing can be told of a folder: it is no run's, or that of one whose job is starting."""
    scheduled = _rows(folder / "jobs.jsonl", of="job")
    job = scheduled[-1]["job"] if scheduled else None
    if not isinstance(job, str) or not job.isdecimal():
        return f"{folder} is not a run: its events.jsonl has no start; give a run.dir"
    return (
        f"{folder} has not begun to train: job {job} started there; see "
        f"{folder}/logs/job-{job}/rank-00000.log"
    )


def _starts_of(folder: Path) -> list[_Start]:
    events = _rows(folder / "events.jsonl", of="event")
    rows = _rows(folder / "metrics.jsonl", of="step")
    starts = _starts_among(events)
    if not starts:
        raise Refused(_no_start(folder))
    found = []
    for event, later in itertools.zip_longest(starts, starts[1:]):
        begin = event["time"]
        end = later["time"] if later else float("inf")
        mine = [other for other in events if begin <= other["time"] < end and other is not event]
        start = _Start(
            event=event,
            rows=[row for row in rows if begin <= row["time"] < end],
            events=mine,
            later=later,
            undone=later.get("undone") if later else None,
        )
        found.append(start)
    return found


def job_of(folder: Path, start: _Start, *, began: float, now: float) -> Job:
    """One start, its seconds split.

    Args:
        folder: the run's.
        start: what it wrote.
        began: when its process did, or its job; seconds since 1970, as `now`.
        now: the time.
    """
    ended, how = ending(folder, start, now)
    told = [start.event, *start.rows[-1:]]  # not all steps are logged
    told += [event for event in start.events if event["event"] in ("checkpoint", "stop")]
    told += last_step_done(folder, start)
    job = Job(
        began=began,
        ended=ended,
        first_step=start.event["step"],
        last_step=max(row["step"] for row in told),
        how=how,
        ranks=start.event["sizes"]["world"],
        job=start.event.get("job"),
    )
    job.seconds |= split(start.event, start.rows, start.events)
    job.seconds["start-up"] += start.event["time"] - began
    job.seconds["evaluation"] += unended_evaluation(start.events, ended)
    _count_what_was_lost(job, start)
    _count_the_rest(job, start, told)
    job.seconds["other"] = max(0.0, ended - began - sum(job.seconds.values()))
    return job


def _count_what_was_lost(job: Job, start: _Start) -> None:
    """Steps and seconds from what stands to where a rewind or the next start threw them away."""
    lost = [event for event in start.events if event.get("action") == "rewind"]
    if start.undone:
        lost.append(start.undone)
    for row in lost:
        before = [each for each in start.rows if each["time"] < row["time"]]
        stands = max(before, key=lambda each: each["time"], default=start.event)
        between = [each for each in start.events if stands["time"] < each["time"] <= row["time"]]
        interrupted = sum(split(start.event, [], between).values())
        job.undone_steps += max(0, row["step"] - stands["step"])
        job.seconds["replayed"] += max(0.0, row["time"] - stands["time"] - interrupted)


def _count_the_rest(job: Job, start: _Start, told: Sequence[Row]) -> None:
    """Seconds of the steps after the last that was logged, up to the last that is known of."""
    logged = start.rows[-1] if start.rows else start.event
    later = [row for row in told if row["step"] > logged["step"]]
    if not later:
        return
    last = max(later, key=lambda row: (row["step"], -row["time"]))
    between = [each for each in start.events if logged["time"] < each["time"] <= last["time"]]
    interrupted = sum(split(start.event, [], between).values())
    seconds = max(0.0, last["time"] - logged["time"] - interrupted)
    if start.rows:  # as long as they usually are: what is left is not the steps'
        usual = statistics.median(row["step_s"] for row in start.rows)
        seconds = min(seconds, usual * (last["step"] - logged["step"]))
    job.seconds["step"] += seconds


def last_step_done(folder: Path, start: _Start) -> list[Row]:
    """The last step of the newest start, as it noted it itself; none of another start."""
    if start.later is not None:
        return []
    noted = [row for row in json_lines(folder / PROGRESS) if _has_numbers(row, ("step", "time"))]
    return [row for row in noted if row["time"] >= start.event["time"]]


def ending(folder: Path, start: _Start, now: float) -> tuple[float, str]:
    """When a start ended, by its last sign of life, and how.

    `now` and "alive" for one that is still running.
    """
    stop = next((event for event in start.events if event["event"] == "stop"), None)
    if stop is not None:
        return stop["time"], str(stop.get("reason", "ended"))
    beat = last_beat(folder, start.event.get("generation"))
    silent_s = now - beat if beat is not None else float("inf")
    beats = silent_s < BEATS_MISSED * lease_timeout(folder)
    if start.later is None and beats and not holder_died(folder, start.event.get("generation")):
        return now, "alive"
    signs = [start.event, *start.rows, *start.events]
    if start.undone:
        signs.append(start.undone)
    ended = max(sign["time"] for sign in signs)
    ended = max(ended, beat or 0.0)
    if start.later:
        ended = min(ended, start.later["time"])
    return ended, "ended without an event"


def split(start: Row, rows: Sequence[Row], events: Sequence[Row]) -> dict[str, float]:
    """Seconds of a start's logged steps and of what interrupted them, by kind."""
    spent = dict.fromkeys(("step", "ema", "data wait", "start-up"), 0.0)
    usual = statistics.median(row["step_s"] for row in rows) if rows else 0.0
    done = start["step"]
    for row in rows:
        steps = max(0, row["step"] - done)
        done = row["step"]
        wait = row["data_wait_s"]
        ema = row.get("teacher_update_s") or 0.0
        work = max(0.0, row["step_s"] - wait - ema)
        slow = 0.0
        if row is rows[0] and len(rows) > 2:
            # kernels compiled, caches filled: more than a usual step
            slow = min(work, max(0.0, row["step_s"] - usual))
        spent["step"] += steps * (work - slow)
        spent["ema"] += steps * ema
        spent["data wait"] += steps * wait
        spent["start-up"] += steps * slow
    saves = [event["stall_s"] for event in events if event["event"] == "checkpoint"]
    spent["checkpoint"] = sum(saves)
    spent["evaluation"] = sum(event["seconds"] for event in events if _is_evaluation(event))
    return spent


def _is_evaluation(event: Row) -> bool:
    """Whether an event says how long networks were judged, to the end or not."""
    left = event["event"] == "evaluation_left" and _has_numbers(event, ("seconds",))
    return left or event["event"] == "evaluate"


def unended_evaluation(events: Sequence[Row], ended: float) -> float:
    """Seconds of an evaluation that is under way, or that the job was killed in."""
    told = [event for event in events if event["event"].startswith("evaluat")]
    if not told or told[-1]["event"] != "evaluation_begun":
        return 0.0
    return max(0.0, ended - float(told[-1]["time"]))


def last_beat(folder: Path, generation: int | None) -> float | None:
    """When the holder of a generation of the lease gave its last sign, by the file system's clock.

    None where it gave none.
    """
    if generation is None:
        return None
    try:
        return (folder / "leases" / f"{generation:08d}.beat").stat().st_mtime
    except OSError:
        return None


def holder_died(folder: Path, generation: Any) -> bool:
    """Whether the process that took a generation of the lease was one of this host, and is gone."""
    try:
        holder = json.loads((folder / "leases" / f"{generation:08d}.json").read_text())
        return died_here(str(holder["host"]), str(holder["boot"]), int(holder["pid"]))
    except (OSError, ValueError, KeyError, TypeError):  # none, or somebody edited it
        return False


def has_stopped(folder: Path) -> bool:
    """Whether the last start of a run wrote how it stopped, or its process is seen to be gone."""
    for event in json_lines_back(folder / "events.jsonl"):
        if event.get("event") == "stop":
            return True
        if event.get("event") in ("start", "resume"):
            return holder_died(folder, event.get("generation"))
    return True


def lease_timeout(folder: Path) -> float:
    """Seconds after which a silent job is taken to be gone, of this run's recipe."""
    try:
        return float(tree_of((folder / "recipe.yaml").read_text())["run"]["lease_timeout_s"])
    except (OSError, ValueError, KeyError, TypeError):
        return 60.0
