"""Run on two ranks: train recipes one after the other in one process group, each with a rank that
sleeps.

Arguments: a JSON list of [cause, recipe, override, ...]; cause: where rank 1 sleeps, "data",
"compute", "save", or "" for nowhere. Prints `STATUS <list>` on rank 0: the exit status of each.
"""

import json
import signal
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from rcmae import config, dist, train
from rcmae.checkpoint.saver import Saver
from rcmae.data.views import TrainReading
from rcmae.models.vit import MaskedAutoencoder
from rcmae.run import preempt
from rcmae.tasks.registry import task_of

SLEEPS = {  # and seconds: of each step, or of the fifth step that is saved
    "data": (TrainReading, "__getitem__", 0.2),
    "compute": (MaskedAutoencoder, "encode", 0.2),  # inside of what FSDP2 gathers
    "save": (Saver, "_snapshot", 0.5),
}


def sleepy(call: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slept(*args: Any, **named: Any) -> Any:
        if torch.is_grad_enabled() or call.__name__ != "encode":  # the student alone
            time.sleep(seconds)
        return call(*args, **named)

    return slept


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.start(required=True, timeout_s=120)
    statuses = []
    for cause, name, *overrides in json.loads(sys.argv[1]):
        recipe = config.load(name, overrides)
        where, method, seconds = SLEEPS.get(cause, (Saver, "_snapshot", 0.0))
        call = getattr(where, method)
        sleeps = seconds > 0 and dist.rank() == 1
        with patch.object(where, method, sleepy(call, seconds) if sleeps else call):
            statuses.append(train.train(recipe, preempt.StopRequest(), task_of(recipe)))
    if dist.rank() == 0:
        print("STATUS", json.dumps(statuses))
    for number in preempt.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    dist.finish()
