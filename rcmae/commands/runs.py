"""Show where the time of a run went over all its jobs, its progress, and the time left.

    rcmae runs status RUN_DIR [--watch] [--json]

Read-only. Where squeue answers, a run that waits in SLURM's queue again is shown as such; --watch
continues until the run is finished or its job is over. Goodput is the time of steps that count
(those whose updates are in the run now) over the time since the first job began. A gap before a
restart of the same SLURM job is its queue, any other gap is idle. Exit status: 0 done; 2 there is
no such run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcmae.commands.arguments import above_zero, check_verb
from rcmae.errors import counted

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

QUEUE_EACH_S = 30.0  # between questions to squeue


def main(arguments: Sequence[str] | None = None) -> int:
    """Tell a run's status; the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    check_verb(parser, words, ("status",), "status")
    asked = parser.parse_args(words)

    from rcmae.errors import Refused
    from rcmae.run.records.status import status

    try:
        if asked.watch:
            _watch(asked)
        elif asked.json:
            print(json.dumps(status(asked.run), indent=1))
        else:
            _console().print(report(status(asked.run)))
    except Refused as error:
        print(f"rcmae: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rcmae runs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser("status", help="progress of a run and where its time went")
    verb.add_argument("run", type=Path, help="its run.dir")
    verb.add_argument(
        "--watch",
        action="store_true",
        help="repeat every few seconds, from the start of the run to its end",
    )
    verb.add_argument("--every-s", type=above_zero, default=5.0, help="seconds between updates (5)")
    verb.add_argument(
        "--json", action="store_true", help="print one JSON document, with --watch one a line"
    )
    return parser


def _console() -> Any:
    from rich.console import Console

    return Console(width=max(Console().width, 100))


def _watch(asked: argparse.Namespace) -> None:
    """Tell it again and again until the run is not running."""
    from rich.live import Live

    with Live(console=_console(), auto_refresh=False) as live:
        for told in _looks(asked.run, asked.every_s):
            if asked.json:
                print(json.dumps(told), flush=True)
            else:
                live.update(report(told), refresh=True)


def _looks(run: Path, every_s: float) -> Iterator[dict[str, Any]]:
    """What is known of a run, again and again while it trains; one that is queued is waited for.

    Raises:
        Refused: its jobs ended before it began to train, as SLURM says.
    """
    from rcmae.errors import Refused
    from rcmae.run import jobs
    from rcmae.run.records.status import queued_job, status

    asked = -math.inf
    while True:
        try:
            told = status(run)
        except Refused as error:
            if asked == -math.inf:
                print(f"waiting for a start: {error}", file=sys.stderr, flush=True)
            if time.monotonic() - asked > QUEUE_EACH_S:
                asked = time.monotonic()
                if queued_job(run) is jobs.GONE:
                    raise
            time.sleep(every_s)
            continue
        yield told
        if told["is_over"]:
            return
        time.sleep(every_s if told["state"] == "training" else max(every_s, QUEUE_EACH_S))


# ------------------------------------------------------------------------------------------- report


def report(told: Mapping[str, Any]) -> Group:
    """The status for people."""
    from rich.console import Group
    from rich.text import Text

    happened = [_event(event) for event in told["last_events"]]
    return Group(
        Text(_head(told)),
        Text(),
        _times(told),
        Text(),
        _jobs(told),
        Text(),
        Text("\n".join(["last events", *happened])),
    )


def _head(told: Mapping[str, Any]) -> str:
    left = ""
    if told["hours_to_go"] is not None:
        left = f", {_duration(3600 * told['hours_to_go'])} to go"
    loss = f", loss {told['loss']:.4f}" if told["loss"] is not None else ""
    share = told["step"] / told["total_steps"]
    lines = [
        f"{told['run']}: {told['state']}",
        f"step {told['step']} of {told['total_steps']} ({share:.1%}){loss}{left}",
        f"goodput {told['goodput']:.1%} of {_duration(told['wall_s'])} since the first start; "
        f"{counted(told['undone_steps'], 'step')} done twice, "
        f"{counted(told['starts_without_training'], 'start')} without training",
    ]
    startup = told["startup_s"]
    if startup:
        parts = [f"{name} {_duration(seconds)}" for name, seconds in startup.items()]
        lines.append(
            f"last start-up of rank 0, {_duration(sum(startup.values()))} to the first step: "
            + ", ".join(parts)
        )
    lines += map(_late, told["late_ranks"])
    return "\n".join(lines)


def _late(event: Mapping[str, Any]) -> str:
    """A rank that holds the others up, for people."""
    return (
        f"late: rank {event['rank']} on {event.get('host')} holds the others up by "
        f"{event['seconds_a_step']:.3f} s a step ({event['share']:.0%} of one), by "
        f"{event.get('cause')}, since step {event['step']} at the latest"
    )


def _times(told: Mapping[str, Any]) -> Table:
    table = _plain_table("where the time went", "", "%", left=("where the time went",))
    for kind, seconds in told["seconds"].items():
        share = 100 * seconds / max(told["wall_s"], 1e-9)
        table.add_row(kind, _duration(seconds), f"{share:.1f}")
    return table


def _jobs(told: Mapping[str, Any]) -> Table:
    from rcmae.run.records.status import PRODUCTIVE

    columns = ("start", "began", "ranks", "steps", "lasted", "goodput", "how it ended")
    table = _plain_table(*columns, left=("start", "how it ended"))
    for number, job in enumerate(told["jobs"], 1):
        lasted = job["ended"] - job["began"]
        good = sum(job["seconds"][kind] for kind in PRODUCTIVE) / max(lasted, 1e-9)
        table.add_row(
            f"{number} (job {job['job']})" if job["job"] else str(number),
            _clock(job["began"]),
            str(job["ranks"]),
            f"{job['first_step']} to {job['last_step']}",
            _duration(lasted),
            f"{good:.1%}",
            job["how"],
        )
    return table


def _plain_table(*columns: str, left: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right")
    return table


def _event(event: Mapping[str, Any]) -> str:
    text = f"{_clock(event['time'])}  {event['event']}"
    if "step" in event:
        text += f" at step {event['step']}"
    if "reason" in event:
        text += f": {event['reason']}"
    return text


def _duration(seconds: float) -> str:
    """Seconds for people."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if seconds >= 60 else f"{seconds:.1f} s"


def _clock(seconds: float) -> str:
    """A moment for people, in local time."""
    return time.strftime("%m-%d %H:%M:%S", time.localtime(seconds))
