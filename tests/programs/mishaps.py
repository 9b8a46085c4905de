"""Run on any number of ranks: train recipes one after the other in one process group, with mishaps
between.

Arguments: a JSON list of ["train", recipe, override, ...], ["limit", rank, bytes or null] (from
then on that rank can write no file of more bytes) and ["flip", glob] (the middle byte of the last
file that matches). Prints `STATUS <list>` on rank 0: the exit status of each training.
"""

import glob
import json
import resource
import signal
import sys
from pathlib import Path

import torch

from rcmae import config, dist, train
from rcmae.run import preempt
from rcmae.tasks.pretrain import Pretraining


def limit(rank: int, size: int | None) -> None:
    if dist.rank() == rank:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


def flip(pattern: str) -> None:
    if dist.rank() == 0:
        path = Path(max(glob.glob(pattern)))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.start(required=True, timeout_s=120)
    statuses = []
    for what, *rest in json.loads(sys.argv[1]):
        if what == "train":
            name, *overrides = rest
            recipe = config.load(name, overrides)
            statuses.append(train.train(recipe, preempt.StopRequest(), Pretraining()))
        else:
            {"limit": limit, "flip": flip}[what](*rest)
    if dist.rank() == 0:
        print("STATUS", json.dumps(statuses))
    for number in preempt.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    dist.finish()
