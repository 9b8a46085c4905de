"""Trains a small network under FSDP2 with weights that stay gathered between its passes, and with
weights that do not; says what moved, and what was gathered."""

import hashlib
import json
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from rcmae import config, dist
from rcmae.engines import protocol
from rcmae.engines.build import make_engine
from rcmae.models.build import new_student, new_teacher
from rcmae.models.protocol import blocks_of
from rcmae.objectives import make_objective
from rcmae.planning import planner
from rcmae.planning.live import made_up_batch

WORDS = [
    *("engine.name=fsdp2", "engine.config=null", "engine.precision=fp32", "batch.images=8"),
    *("batch.per_device=2", "model.image_size=32", "model.patch_size=8", "model.embed_dim=16"),
    *("model.depth=3", "model.num_heads=2", "model.decoder_dim=16", "model.decoder_depth=2"),
    "model.decoder_heads=2",
]


def train(kept_bytes: int) -> dict[str, Any]:
    """Three steps of two micro-batches, with evaluations between."""
    protocol.KEPT_BYTES = kept_bytes
    recipe = planner.load("rcmae_vit_b_16", WORDS)
    sizes = config.resolve(recipe, world=2, samples_per_epoch=8)
    objective = make_objective(recipe, sizes)
    student = new_student(recipe)
    teacher = new_teacher(student, objective.teacher_outputs)
    engine = make_engine(recipe, sizes, student, teacher, {})
    batch = made_up_batch(student, 2, dist.device())
    blocks = blocks_of(student)
    digest = hashlib.sha256()
    counts = CommDebugMode()
    gathers = []
    whole = {}

    ahead = {}

    def early() -> int:  # torch tells nobody in public
        states = [block._get_fsdp_state() for block in blocks]  # type: ignore[operator]
        return sum(len(state._states_to_forward_prefetch) for state in states)

    def is_whole() -> bool:
        return not any(isinstance(param, DTensor) for param in blocks[0].parameters())

    for _ in range(3):
        for micro in range(2):
            sums = objective(engine.student, engine.teacher, batch, 0.5)
            whole["trained"] = is_whole()
            ahead["trained"] = early()
            loss = torch.stack(list(sums.values())).sum()
            digest.update(loss.detach().numpy().tobytes())
            with counts:
                engine.backward(loss, last=micro == 1)
            gathers.append(
                sum(n for op, n in counts.get_comm_counts().items() if "gather" in str(op))
            )
        engine.step(lr=1e-2, weight_decay=0.05)
        engine.update_teacher(0.9)
        with torch.no_grad():
            objective(engine.student, engine.teacher, batch, 0.5)
        whole["evaluated"] = is_whole()
        ahead["evaluated"] = early()
        for piece in engine.state().pieces:
            for tensor in piece.tensors.values():
                digest.update(tensor.detach().contiguous().numpy().tobytes())
    return {"digest": digest.hexdigest(), "gathers": gathers, "whole": whole, "ahead": ahead}


def main() -> None:
    """Both ways."""
    dist.start(required=True)
    ways = {name: train(kept) for name, kept in (("kept", 2**31), ("gathered again", 0))}
    every = dist.gather(ways)
    if dist.rank() == 0:
        print("RESULT " + json.dumps(every))
    dist.finish()


if __name__ == "__main__":
    main()
