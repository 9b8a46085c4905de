"""Run on two ranks: 250 EMA updates at each stage against a float64 average of the same student
weights.

Arguments: engines, and what the teacher is asked for: "pixels,tokens", or one of them. Prints one
JSON document on rank 0: engine -> figures.
"""

import copy
import functools
import json
import sys

import torch

from rcmae import dist
from rcmae.engines.ddp import DDPEngine
from rcmae.engines.deepspeed import DeepSpeedEngine
from rcmae.engines.deepspeed_config import read_config
from rcmae.engines.fsdp2 import FSDP2Engine
from rcmae.engines.local import LocalEngine
from rcmae.engines.protocol import EngineSettings
from rcmae.engines.teacher import teacher_bytes
from rcmae.models.sizes import NetworkSizes
from rcmae.models.vit import MaskedAutoencoder
from rcmae.planning.states import teacher_groups

UPDATES = 250  # an average in bf16, or of another momentum, is off by 1e-3 and more by then
SIZES = {
    "image_size": (16, 16),
    "patch_size": 8,
    "in_channels": 3,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "decoder_dim": 20,
    "decoder_depth": 1,
    "decoder_heads": 2,
}


PARTS = {"pixels": ("encoder", "decoder"), "tokens": ("encoder",)}  # that an output needs


@functools.cache
def teacher_names(output):
    teacher = MaskedAutoencoder(NetworkSizes(**SIZES))
    teacher.keep((output,))
    return {name for name, _ in teacher.named_parameters()}


@functools.cache
def walk(update, count):
    """Numbers by which a student's weights move."""
    return torch.randn(count, generator=torch.Generator().manual_seed(update)) * 1e-3


def shards_of(kind):
    """Ranks that share, of "ddp" or "ddp/2"."""
    return int(kind.partition("/")[2] or 1)


def make(kind, precision, output):
    student = MaskedAutoencoder(NetworkSizes(**SIZES))
    settings = EngineSettings(precision=precision)
    teacher = copy.deepcopy(student)
    teacher.keep((output,))
    if kind == "local":
        return LocalEngine(student, teacher, settings)
    if kind == "fsdp2":
        return FSDP2Engine(student, teacher, settings)
    if kind.startswith("ddp"):
        return DDPEngine(student, teacher, settings, shards=shards_of(kind))
    return DeepSpeedEngine(student, teacher, settings, config=read_config(kind))


def whole(state, kind, taught):
    """name -> the full tensor of a kind, on every rank."""
    out = {}
    for name, shape in ((name, shape) for name, shape in state.shapes.items() if name in taught):
        flat = torch.zeros(torch.Size(shape).numel())
        for piece in state.pieces:
            if piece.name == name:
                flat[piece.start : piece.start + len(piece.tensors[kind])] = piece.tensors[
                    kind
                ].float()
        out[name] = dist.all_sum(flat) / state.copies.of
    return out


def relative(got, wanted):
    difference = sum((got[n].double() - wanted[n].double()).square().sum() for n in got)
    return float((difference / sum(wanted[n].double().square().sum() for n in wanted)).sqrt())


def held_bytes(tensors):
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()
    }
    return sum(storages.values())


def check(kind, precision, momentum, output):
    engine = make(kind, precision, output)
    state = engine.state()
    taught = teacher_names(output)
    pieces = [piece for piece in state.pieces if piece.name in taught]
    assert all("teacher" not in piece.tensors for piece in state.pieces if piece.name not in taught)
    average = [piece.tensors["teacher"].double().clone() for piece in pieces]
    index = {name: number for number, name in enumerate(state.shapes)}
    most = max(torch.Size(shape).numel() for shape in state.shapes.values())
    weights = [piece.tensors["weight"].data for piece in pieces]
    begins = [piece.start + index[piece.name] for piece in pieces]
    for update in range(UPDATES):  # the student walks at random, the same on every cut
        steps = walk(update, most + len(index))
        moves = [steps[at : at + len(w)] for at, w in zip(begins, weights, strict=True)]
        torch._foreach_add_(weights, moves)
        engine.update_teacher(momentum)
        torch._foreach_mul_(average, momentum)
        torch._foreach_add_(average, [w.double() for w in weights], alpha=1 - momentum)
    wanted = whole(state, "teacher", taught)
    for mean, piece in zip(average, pieces, strict=True):
        # borrow the student's place to bring the reference together
        piece.tensors["weight"].data.copy_(mean)
    figures = {"error": relative(wanted, whole(state, "weight", taught))}
    ema, dtype = engine._ema, next(engine.teacher.parameters()).dtype
    figures["copy_is_rounding"] = all(
        torch.equal(c, a.to(dtype)) for c, a in zip(ema.copies, ema.accumulators, strict=True)
    )
    # every rank computes with the whole copy
    if kind in ("local", "ddp", "ddp/2", "zero0", "zero1", "zero2"):
        # waits for a gather that is under way
        engine.teacher(torch.zeros(1, 3, 16, 16), outputs=("encoded",))
        named = dict(engine.teacher.named_parameters())
        figures["whole_copy_is_rounding"] = all(
            torch.equal(named[name].detach().flatten(), wanted[name].to(dtype)) for name in wanted
        )
    groups = teacher_groups(MaskedAutoencoder(NetworkSizes(**SIZES)), PARTS[output])
    placement = kind.partition("/")[0]
    world = shards_of(kind) if placement == "ddp" else dist.world()
    formula = teacher_bytes(placement, groups, rank=dist.rank(), world=world, precision=precision)
    if kind in ("zero3", "fsdp2"):
        copies = sum(c.numel() * c.element_size() for c in ema.copies)
    else:
        copies = held_bytes(list(engine.teacher.parameters()))
    accumulators = (
        0 if ema.accumulators is ema.copies else sum(a.numel() * 4 for a in ema.accumulators)
    )
    figures["bytes"] = dist.gather({"copy": copies, "accumulator": accumulators})
    figures["formula"] = dist.gather({"copy": formula.copy, "accumulator": formula.accumulator})
    return figures


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.start(required=True)
    found = {
        f"{kind} {precision} {momentum} {output}": check(kind, precision, momentum, output)
        for output in sys.argv[2].split(",")
        for kind in sys.argv[1].split(",")
        for precision in ("fp32", "bf16")
        for momentum in ((0.9999, 0.996) if output == "pixels" else (0.9999,))
    }
    if dist.rank() == 0:
        print("RESULT " + json.dumps(found))
    dist.finish()
