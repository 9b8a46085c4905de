"""A run's events, told: what to look at, what happened when, which samples were bad."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from rcmae.errors import counted
from rcmae.run.report.axes import duration
from rcmae.run.report.reading import Seen

SHOWN = 300  # lines of a timeline, the newest
SAMPLES = 100  # of bad ones
_LONGEST = 400  # characters of a line
_SAYS = ("told", "reason", "jumped", "action")  # keys of an event that are words for people
_BEGUN = "evaluation_begun"  # its end has a line of its own
_ORDINARY = (
    *("start", "resume", "first_step", "checkpoint", _BEGUN, "evaluate"),
    *("signal", "stop", "note"),
)
_OFTEN = ("checkpoint", "evaluate", "bad_sample")  # told together where they follow each other
_NAMES = {"evaluate": "evaluation", "bad_sample": "bad sample"}
_TOLD_APART = ("bad_sample", "late_rank", "late_rank_over")
# events that ask for a look -> what is said of them
_LOOK = {
    "warning": "warned",
    "not_finite": "the loss or its gradient was not finite",
    "spike": "the loss jumped",
    "checkpoint_failed": "a checkpoint could not be written",
    "checkpoint_left_out": "a checkpoint was left out",
    "not_written": "something could not be written",
    "console_lost": "the console was lost",
    "worker_lost": "a data worker was killed",
    "collapse": "the features collapsed",
    "short_shards": "shards are shorter than their index says",
}


class Notice(NamedTuple):
    """What whoever opens the page should look at."""

    text: str
    is_now: bool  # it is the run's state, not only its past


class Happened(NamedTuple):
    """A line of the timeline."""

    when: str  # local time
    what: str  # the event's kind
    step: str
    text: str


class BadSample(NamedTuple):
    """A sample that could not be read."""

    step: int | str
    sample: str
    reason: str
    replaced_by: str


def notices(run: Seen) -> list[Notice]:
    """What to look at first, the newest of a kind standing for all of it."""
    found = []
    how = str(run.status["state"])
    found += [Notice(late(event), is_now=how == "training") for event in run.status["late_ranks"]]
    bad = run.of("bad_sample")
    if bad:
        found.append(Notice(f"{counted(len(bad), 'sample')} could not be read", is_now=False))
    kinds = dict.fromkeys(event["event"] for event in run.events)
    for kind in kinds:
        if kind in _ORDINARY or kind in _TOLD_APART:
            continue
        same = run.of(kind)
        times = f"{len(same):,} times; the last time " if len(same) > 1 else ""
        name = _LOOK.get(kind, kind.replace("_", " "))
        where = _at(same[-1])
        found.append(Notice(f"{name}{where}: {times}{said(same[-1])}"[:_LONGEST], is_now=False))
    return found


def timeline(run: Seen) -> tuple[list[Happened], int]:
    """The events, the newest first, and how many lines are left out: many of the same kind one
    after the other are one line.
    """
    rows = list(_rows([event for event in run.events if event["event"] != _BEGUN]))
    return rows[::-1][:SHOWN], max(0, len(rows) - SHOWN)


def bad_samples(run: Seen) -> tuple[list[BadSample], int]:
    """The bad samples, the newest first, and how many there are."""
    found = []
    events = run.of("bad_sample")
    for event in events[::-1][:SAMPLES]:
        found.append(
            BadSample(
                event.get("step", ""),
                f"{event.get('shard', '?')}/{event.get('key', '?')}",
                str(event.get("reason", "")),
                str(event.get("replaced_by", "")),
            )
        )
    return found, len(events)


def late(event: Mapping[str, Any]) -> str:
    """A rank that all others wait for."""
    share = _number(event, "share")
    return (
        f"rank {event.get('rank')} on {event.get('host')} holds the others up by "
        f"{_number(event, 'seconds_a_step'):.3f} s a step ({share:.0%} of one), by "
        f"{event.get('cause')}, since step {_number(event, 'step'):,.0f} at the latest"
    )


def clock(seconds: float) -> str:
    """A moment, in local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def said(event: Mapping[str, Any]) -> str:
    """What an event tells, in a line."""
    kind = event["event"]
    if kind in ("start", "resume"):
        return _start(event)
    if kind == "first_step":
        parts = _mapping(event, "startup_s")
        return f"{duration(sum(_number(parts, key) for key in parts))} after the process began"
    if kind == "checkpoint":
        size = _number(event, "bytes") / 1e6
        return f"{size:,.1f} MB in {duration(_number(event, 'seconds'))}"
    if kind == "late_rank":
        return late(event)
    if kind == "late_rank_over":
        return f"rank {event.get('rank')} on {event.get('host')} is no longer late"
    if kind == "evaluate":
        return f"took {duration(_number(event, 'seconds'))}"
    words = [str(event[key]) for key in _SAYS if event.get(key)]
    if words:
        return ": ".join(words)[:_LONGEST]
    rest = {key: value for key, value in event.items() if key not in ("event", "time", "step")}
    return _plain(rest)[:_LONGEST]


def _start(event: Mapping[str, Any]) -> str:
    sizes, engine = _mapping(event, "sizes"), _mapping(event, "engine")
    config = engine.get("config")
    name = f"{engine.get('name', '')} {config if isinstance(config, str) else ''}".strip()
    torch = _mapping(event, "versions").get("torch", "?")
    parts = [
        counted(int(_number(sizes, "world")), "rank"),
        name,
        str(engine.get("precision", "")),
        str(event.get("device") or ""),
        f"torch {torch}",
    ]
    if event.get("job"):
        parts.append(f"job {event['job']}")
    return ", ".join(part for part in parts if part)


def _rows(events: Sequence[Mapping[str, Any]]) -> Iterator[Happened]:
    for often, group in groupby(events, key=lambda event: event["event"] in _OFTEN):
        together = list(group)
        if often and len(together) > 2:
            yield _many(together)
            continue
        for event in together:
            kind = event["event"]
            name = _NAMES.get(kind, kind.replace("_", " "))
            yield Happened(clock(event["time"]), name, str(event.get("step", "")), said(event))


def _many(events: Sequence[Mapping[str, Any]]) -> Happened:
    counts = []
    for kind in _OFTEN:
        number = sum(event["event"] == kind for event in events)
        if number:
            counts.append(counted(number, _NAMES.get(kind, kind)))
    steps = [event["step"] for event in events if isinstance(event.get("step"), int)]
    where = f"{min(steps):,} to {max(steps):,}" if steps else ""
    text = f"until {clock(events[-1]['time'])}"
    return Happened(clock(events[0]["time"]), ", ".join(counts), where, text)


def _at(event: Mapping[str, Any]) -> str:
    step = event.get("step")
    return f" at step {step:,}" if isinstance(step, int) else ""


def _number(event: Mapping[str, Any], key: str) -> float:
    """A number of an event; 0 where it has none: somebody may have edited the file."""
    value = event.get(key)
    return float(value) if isinstance(value, int | float) else 0.0


def _mapping(event: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = event.get(key)
    return value if isinstance(value, Mapping) else {}


def _plain(tree: Mapping[str, Any]) -> str:
    parts = []
    for key, value in tree.items():
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        parts.append(f"{key.replace('_', ' ')} {text}")
    return ", ".join(parts)
