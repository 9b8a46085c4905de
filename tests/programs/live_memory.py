"""Run on ranks: bytes of live tensors through two steps of each of several training settings, on every rank.

    live_memory.py RECIPE CASES     CASES: a JSON object, name -> overrides

Prints one JSON document on rank 0: case -> {"ready": [of each rank], "peak": [of each rank]}: bytes when everything is
built, and the most that lived at once in the second step.
"""

import copy
import gc
import json
import sys
import weakref

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rcmae import config, dist, train
from tools.bench_step import made_up_batch


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations gave and that are alive, looked at after each operation.

    Exact and the same every time, unlike resident memory. It does not see the inside of an operation, nor what gloo
    allocates for itself.
    """

    def __init__(self):
        super().__init__()
        self._storages = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own dispatch comes back here with the local tensors
        out = func(*args, **(kwargs or {}))
        for item in tree_leaves(out):
            if isinstance(item, torch.Tensor) and not isinstance(item, DTensor) and item.device.type != "meta":
                storage = item.untyped_storage()
                self._storages[storage._cdata] = weakref.ref(storage)
        self.peak = max(self.peak, self.now())
        return out

    def now(self):
        total = 0
        for key, reference in list(self._storages.items()):
            storage = reference()
            if storage is None:
                del self._storages[key]
            else:
                total += storage.nbytes()  # asked each time: FSDP2 resizes
        return total


def measure(recipe):
    sizes = config.resolve(recipe, world=dist.world(), samples_per_epoch=recipe.batch.images)
    objective, engine_config = train.make_objective(recipe), {}
    if recipe.engine.name == "deepspeed":
        from rcmae.engine_deepspeed import read_config

        engine_config = read_config(recipe.engine.config)
    with LiveBytes() as live:
        student = train.new_student(recipe)
        teacher = copy.deepcopy(student) if objective.needs_teacher else None
        plain = student
        engine = train.make_engine(recipe, sizes, student, teacher, engine_config)
        del student, teacher
        gc.collect()
        ready = live.now()
        for _ in range(2):
            live.peak = 0
            for micro in range(sizes.accumulation):
                batch = made_up_batch(plain, sizes.per_device, dist.device())
                sums = objective(engine.student, engine.teacher, batch, 0.0)
                engine.backward(torch.stack(list(sums.values())).sum() / 1000, last=micro == sizes.accumulation - 1)
                del sums, batch
            engine.step(lr=1e-4, weight_decay=0.05)
            engine.update_teacher(0.99)
        del engine, plain
        gc.collect()
    return {"ready": ready, "peak": live.peak}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.start(required=True)
    found = {}
    for name, overrides in json.loads(sys.argv[2]).items():
        figures = dist.gather(measure(config.load(sys.argv[1], overrides)))
        found[name] = {key: [each[key] for each in figures] for key in figures[0]}
    if dist.rank() == 0:
        print("RESULT " + json.dumps(found))
    dist.finish()
