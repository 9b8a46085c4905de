"""Run on any number of ranks: train several recipes one after the other in one process group, some
of them on choices that another run made.

Arguments: a file of `tests/choices.py`, a JSON list of [recipe, override, ...] that are fed, one of
those that choose for themselves. Prints `STATUS <list>` on rank 0, the exit status of each, and
`FLIPS <counts>`."""

import json
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from choices import Recorded, feeding

from rcmae import config, dist, train
from rcmae.run import preempt
from rcmae.tasks.registry import task_of
from tests.runs import collect_seldom


def trained(jobs: list[list[str]]) -> list[int]:
    """Exit statuses."""
    statuses = []
    for name, *overrides in jobs:
        recipe = config.load(name, overrides)
        statuses.append(train.train(recipe, preempt.StopRequest(), task_of(recipe)))
    return statuses


if __name__ == "__main__":
    collect_seldom()
    torch.set_num_threads(1)
    dist.start(required=True, timeout_s=120)
    recorded = Recorded.of(Path(sys.argv[1]))
    with feeding(recorded):
        statuses = trained(json.loads(sys.argv[2]))
    statuses += trained(json.loads(sys.argv[3]))
    flips = {name: sum(dist.gather(recorded.counts[name])) for name in sorted(recorded.counts)}
    if dist.rank() == 0:
        print("STATUS", json.dumps(statuses))
        print("FLIPS", json.dumps(flips))
    for number in preempt.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    dist.finish()
