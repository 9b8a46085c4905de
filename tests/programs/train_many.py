"""Run on any number of ranks: train several recipes one after the other in one process group.

Arguments: a JSON list of [recipe, override, ...]. Prints `STATUS <list>` on rank 0: the exit status
of each."""

import json
import signal
import sys

import torch

from rcmae import config, dist, train
from rcmae.run import preempt
from rcmae.tasks.registry import task_of
from tests.runs import collect_seldom

if __name__ == "__main__":
    collect_seldom()
    torch.set_num_threads(1)
    dist.start(required=True, timeout_s=120)
    statuses = []
    for name, *overrides in json.loads(sys.argv[1]):
        recipe = config.load(name, overrides)
        statuses.append(train.train(recipe, preempt.StopRequest(), task_of(recipe)))
    if dist.rank() == 0:
        print("STATUS", json.dumps(statuses))
    for number in preempt.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    dist.finish()
