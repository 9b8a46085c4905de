"""Run on any number of ranks: train several recipes one after the other in one process group.

Arguments: a JSON list of [recipe, override, ...]. Prints `STATUS <list>` on rank 0: the exit status of each.
"""

import json
import signal
import sys

import torch

from rcmae import config, dist, preempt, train


def task_of(recipe: config.Recipe) -> train.Task:
    """What a recipe is for. The others are imported when they are asked for: they take seconds."""
    if recipe.objective.name == "finetune":
        from rcmae.finetune import Finetuning

        return Finetuning()
    if recipe.objective.name == "probe":
        from rcmae.probe import Probe

        return Probe()
    return train.Pretraining()


if __name__ == "__main__":
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
