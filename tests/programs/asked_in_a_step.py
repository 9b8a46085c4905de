"""Run on any number of ranks: train recipes one after the other in one process group, in each of
which rank 1 is asked to stop in the seventh step.

Arguments: a JSON list of [half, recipe, override, ...]; half: of the step, "first" or "second".
Prints `STATUS <list>` on rank 0, the exit status of each, and `SUMS <list>`, what each rank got of
sums of (its number + 1, 1).
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from rcmae import config, dist, exchange, train
from rcmae.engines.ddp import DDPEngine
from rcmae.run import preempt
from rcmae.run.loop.schedule import Schedule
from rcmae.tasks.registry import task_of

HALVES = {"first": (Schedule, "lr"), "second": (DDPEngine, "step")}


def asked_in_the_seventh(call: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def counted(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 7 and dist.rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return call(*args, **named)

    return counted


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.start(required=True, timeout_s=120)
    statuses = []
    for half, name, *overrides in json.loads(sys.argv[1]):
        recipe = config.load(name, overrides)
        where, method = HALVES[half]
        with patch.object(where, method, asked_in_the_seventh(getattr(where, method))):
            statuses.append(train.train(recipe, preempt.StopRequest(), task_of(recipe)))
    sums = dist.gather(exchange.begin([dist.rank() + 1, 1]).wait())
    if dist.rank() == 0:
        print("STATUS", json.dumps(statuses))
        print("SUMS", json.dumps(sums))
    for number in preempt.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    dist.finish()
