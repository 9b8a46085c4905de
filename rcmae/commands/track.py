"""Show a run in Weights & Biases, MLflow or trackio: its committed steps, each once.

    rcmae track RUN --to wandb|mlflow|trackio [--project NAME] [--follow [SECONDS]]

A training does this by itself with log.trackers=[mlflow]. Use this command where compute nodes have
no way out, from a login node, for a running or a finished run; run it again as often as you like.
Servers and keys are those of the tracker's own variables (MLFLOW_TRACKING_URI, WANDB_API_KEY, ...).
WANDB_MODE=offline writes folders under RUN/trackers/wandb, a start each; `wandb sync` sends them as
one run. Tests read these back; the site itself is tried by no test.
Exit status: 0 pushed; 1 the tracker failed; 2 there is no run, or the tracker is not installed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rcmae.commands.arguments import above_zero
from rcmae.run.trackers.registry import NAMES

if TYPE_CHECKING:
    from rcmae.run.trackers.pushing import Pusher


def main(arguments: Sequence[str] | None = None) -> int:
    """Bring a tracker up to a run; the exit status."""
    asked = _parser().parse_args(arguments)

    from rcmae.errors import Refused
    from rcmae.run.trackers.pushing import opened
    from rcmae.run.trackers.registry import tracker

    print(f"{asked.run}: connecting to {asked.to}", file=sys.stderr, flush=True)
    try:
        with opened(asked.run, asked.to, tracker(asked.to), asked.project) as pusher:
            print(f"{asked.run} in {asked.to}: {pusher.pushed.seen_at}", flush=True)
            _push(pusher, asked.follow, ends_with_input=asked.ends_with_input)
    except Refused as error:
        print(f"rcmae: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    except Exception as error:  # whatever the tracker's library raises: its address, its rights
        from rcmae.data.sources import redacted

        print(f"rcmae: {asked.to}: {redacted(str(error)) or repr(error)}", file=sys.stderr)
        return 1
    return 0


def _push(pusher: Pusher, every_s: float | None, *, ends_with_input: bool) -> None:
    from rcmae.run.trackers.beside import input_ended, wait_for_end

    while True:
        count = pusher.push(is_last=every_s is None)
        if count or every_s is None:
            print(f"{count} steps pushed, up to step {pusher.pushed.step}", flush=True)
        if every_s is None:
            return
        if ends_with_input:
            if input_ended(every_s):
                wait_for_end(pusher.run)
                every_s = None
        else:
            time.sleep(every_s)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rcmae track",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="its run.dir")
    parser.add_argument("--to", required=True, choices=NAMES, help="the tracker")
    parser.add_argument("--project", help="in the tracker; default: rcmae")
    parser.add_argument(
        "--follow",
        nargs="?",
        type=above_zero,
        const=30.0,
        metavar="SECONDS",
        help="look again every so many seconds (default 30), until Ctrl-C",
    )
    # of a training that started this: the last push, when the training ends
    parser.add_argument("--ends-with-input", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
