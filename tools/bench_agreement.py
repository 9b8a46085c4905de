#!/usr/bin/env python3
"""What it costs a step that the ranks agree before it: gloo's all-reduce round a ring, waited for,
against a sum by doublings beside the step (`rcmae.exchange`), in turns.

    python tools/bench_agreement.py [--ranks N ...] [--step-ms MS] [--json [FILE]]

Each rank is a process. A step is a sleep, as of a host whose device computes: no core is taken from
the sums. `waits_us` is what a step waits: for the whole all-reduce, or for the call that begins the
sum and what is left of it after the step. `takes_us` is from the begin on a rank to its end there.
Microseconds by the clock, medians and quartiles over the steps of all rounds, of the rank that
waited most: on a machine with less cores than ranks much of them is the system's, which has to let
each rank run in turn. Hops are those of the schedules, whatever the machine.

Exit status: 0 done; 2 unusable input.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import bench_host

NUMBERS = 10  # of an agreement: counts and flags
KINDS = ("ring", "beside")
MANY = (8, 64, 256, 1000, 1024)  # ranks whose hops are told beside


class Took(NamedTuple):
    """Of one agreement, microseconds."""

    waits: float
    takes: float


def ring(step_s: float) -> Took:
    """An all-reduce before the step."""
    from rcmae import dist

    began = time.perf_counter()
    dist.sum_numbers([1.0] * NUMBERS)
    took = 1e6 * (time.perf_counter() - began)
    time.sleep(step_s)
    return Took(took, took)


def beside(step_s: float) -> Took:
    """A sum that is begun before the step and waited for after it."""
    from rcmae import exchange

    began = time.perf_counter()
    sums = exchange.begin([1.0] * NUMBERS)
    begun = time.perf_counter()
    time.sleep(step_s)
    back = time.perf_counter()
    sums.wait()
    waited = begun - began + time.perf_counter() - back
    return Took(1e6 * waited, 1e6 * sums.took_s)


def run_rank(told: str) -> NoReturn:
    """A rank; rank 0 prints what all ranks took, by kind."""
    from rcmae import dist

    asked = json.loads(told)
    dist.start(required=True, timeout_s=120)
    found = {}
    ways: dict[str, Callable[[float], Took]] = {"ring": ring, "beside": beside}
    for kind in KINDS:
        for _ in range(asked["warmup"]):
            ways[kind](asked["step_s"])
        dist.barrier()
        took = [ways[kind](asked["step_s"]) for _ in range(asked["steps"])]
        dist.barrier()
        found[kind] = dist.gather(took)
    if dist.rank() == 0:
        print("ROWS " + json.dumps(found), flush=True)
    dist.finish()
    # all is said; on a machine this busy gloo's threads may outlive the interpreter, and abort it
    os._exit(0)


def run_ranks(world: int, *, timeout_s: float, **how: float) -> dict[str, list[list[list[float]]]]:
    """By kind, what each rank's agreements took. Raises as `bench_host.rows_of_ranks`."""
    what = f"{world} ranks"
    found: dict[str, list[list[list[float]]]]
    found = bench_host.rows_of_ranks(__file__, json.dumps(how), world, what, timeout_s)
    return found


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """The median and what lies around it."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high}


def describe(world: int, kind: str, ranks: Sequence[Sequence[Took]]) -> dict[str, Any]:
    """The figures of the rank that waited most."""
    most = max(ranks, key=lambda took: statistics.median(each.waits for each in took))
    return {
        "ranks": world,
        "kind": kind,
        "hops": hops(kind, world),
        "waits_us": quartiles([each.waits for each in most]),
        "takes_us": quartiles([each.takes for each in most]),
        "steps": len(most),
    }


def hops(kind: str, world: int) -> int:
    """Messages one after the other."""
    from rcmae.exchange import distances

    return 2 * (world - 1) if kind == "ring" else len(distances(world))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="tools/bench_agreement.py", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4], metavar="N", help="(2 4)")
    parser.add_argument("--step-ms", type=float, default=20, help="of a step (20)")
    parser.add_argument("--steps", type=int, default=100, help="of a round that are counted (100)")
    parser.add_argument("--warmup", type=int, default=10, help="steps before them (10)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each number (3)")
    parser.add_argument("--timeout-s", type=float, default=200, help="of a round (200)")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="to FILE, or printed")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if min(asked.ranks) < 2:
        parser.error(f"--ranks={min(asked.ranks)}: one rank agrees with nobody; give 2 or more")
    if asked.steps < 2:
        parser.error(f"--steps={asked.steps} has no spread; give more")
    return asked


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    asked = arguments(argv)
    if asked.rank_of:
        run_rank(asked.rank_of)
    import torch

    from rcmae.planning.hardware import commit, hardware

    how = {"step_s": asked.step_ms / 1000, "steps": asked.steps, "warmup": asked.warmup}
    found: dict[tuple[int, str], list[list[Took]]] = {}
    for number in range(asked.rounds):
        for world in asked.ranks:
            print(f"round {number + 1}: {world} ranks", file=sys.stderr, flush=True)
            for kind, ranks in run_ranks(world, timeout_s=asked.timeout_s, **how).items():
                rows = found.setdefault((world, kind), [[] for _ in range(world)])
                for row, took in zip(rows, ranks, strict=True):
                    row += [Took(*each) for each in took]
    words = sys.argv[1:] if argv is None else argv
    report = {
        "tool": "bench_agreement",
        "command": "python tools/bench_agreement.py " + " ".join(words),
        "commit": commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "hardware": hardware(torch.device("cpu")),
        "rounds": asked.rounds,
        "step_ms": asked.step_ms,
        "numbers": NUMBERS,
        "cases": [describe(world, kind, ranks) for (world, kind), ranks in found.items()],
        "hops": {kind: {world: hops(kind, world) for world in MANY} for kind in KINDS},
    }
    if asked.json == "-":
        print(json.dumps(report, indent=1))
        return 0
    if asked.json:
        Path(asked.json).write_text(json.dumps(report, indent=1) + "\n")
    print(f"{'ranks':>5}  {'kind':<8}{'hops':>4}{'a step waits':>14}{'it takes':>12}  microseconds")
    for row in report["cases"]:
        waits, takes = row["waits_us"]["median"], row["takes_us"]["median"]
        print(f"{row['ranks']:>5}  {row['kind']:<8}{row['hops']:>4}{waits:>14.0f}{takes:>12.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
