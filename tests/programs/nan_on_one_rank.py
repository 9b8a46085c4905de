"""Run on two ranks: a NaN in rank 1's images alone, at every stage and precision, then a good step.

Prints one JSON document on rank 0: "engine precision" -> what happened on each rank.
"""

import copy
import json
import math

import torch

from rcmae import dist
from rcmae.data.batch import Batch
from rcmae.engines.ddp import DDPEngine
from rcmae.engines.deepspeed import DeepSpeedEngine
from rcmae.engines.deepspeed_config import read_config
from rcmae.engines.fsdp2 import FSDP2Engine
from rcmae.engines.protocol import EngineSettings
from rcmae.models.sizes import NetworkSizes
from rcmae.models.vit import MaskedAutoencoder
from rcmae.objectives import new

SIZES = {
    "image_size": (16, 16),
    "patch_size": 4,
    "in_channels": 3,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "decoder_dim": 20,
    "decoder_depth": 1,
    "decoder_heads": 2,
}


def snapshot(engine):
    return [t.clone() for piece in engine.state().pieces for t in piece.tensors.values()]


def train(engine, poisoned):
    generator = torch.Generator().manual_seed(dist.rank())
    for last in (False, True):
        images = torch.randn(2, 3, 16, 16, generator=generator)
        if poisoned and dist.rank() == 1 and last:
            images[0, 0, 0, 0] = math.nan
        ids = torch.rand(2, 16, generator=generator).argsort(1)
        batch = Batch(
            images, ids, 4, None, ("a", "b"), torch.arange(2), torch.zeros(2, 5, dtype=torch.int64)
        )
        sums = new("rcmae")(engine.student, engine.teacher, batch, 0.0)
        engine.backward(sum(sums.values()) / (8 * 12), last=last)
    return engine.step(lr=1e-2, weight_decay=0.05)


def check(kind, precision):
    student = MaskedAutoencoder(NetworkSizes(**SIZES))
    settings = EngineSettings(precision=precision, accumulation=2, per_device=2)
    if kind == "fsdp2":
        engine = FSDP2Engine(student, copy.deepcopy(student), settings)
    elif kind.startswith("ddp"):
        shards = int(kind.partition("/")[2] or 1)
        engine = DDPEngine(student, copy.deepcopy(student), settings, shards=shards)
    else:
        engine = DeepSpeedEngine(
            student, copy.deepcopy(student), settings, config=read_config(kind)
        )
    assert train(engine, poisoned=False).finite
    engine.update_teacher(0.9)
    before, steps = snapshot(engine), engine.state().optimizer_step
    stats = train(engine, poisoned=True)
    untouched = all(torch.equal(a, b) for a, b in zip(before, snapshot(engine), strict=True))
    same_step = engine.state().optimizer_step == steps
    after = train(engine, poisoned=False)  # the poisoned gradients are gone
    moved = any(not torch.equal(a, b) for a, b in zip(before, snapshot(engine), strict=True))
    finite = all(bool(t.isfinite().all()) for t in snapshot(engine))
    return {
        "stopped": not stats.finite,
        "untouched": untouched and same_step,
        "goes on": after.finite and moved and finite and engine.state().optimizer_step == steps + 1,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.start(required=True)
    found = {
        f"{kind} {precision}": dist.gather(check(kind, precision))
        for kind in ("ddp", "ddp/2", "zero0", "zero1", "zero2", "zero3", "fsdp2")
        for precision in ("fp32", "bf16")
    }
    if dist.rank() == 0:
        print("RESULT " + json.dumps(found))
    dist.finish()
