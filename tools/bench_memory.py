#!/usr/bin/env python3
"""Hold the planner's memory against what ranks take: tensors alive through a training step of each
engine.

    torchrun --nproc-per-node 2 tools/bench_memory.py [RECIPE] [key=value ...] [--json FILE]

Each case is the recipe under one engine, with activations kept or recomputed. On the CPU every
storage that an operation gives is counted after each operation: exact, and the same every time,
unlike resident memory; it does not see the inside of an operation. On GPUs it is the allocator's
own peak. Told and measured are compared twice: what lies there when everything is built, and the
height of a step above that. Exit status: 0 all within the tolerances; 1 not; 2 the input is wrong.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch

from rcmae import config, dist
from rcmae.commands.arguments import add_json, told
from rcmae.config import Recipe
from rcmae.errors import Refused
from rcmae.models import kernels
from rcmae.models.precision import bf16_of
from rcmae.planning import planner
from rcmae.planning.estimates import placement, settings_of
from rcmae.planning.hardware import commit, hardware
from rcmae.planning.live import measure
from rcmae.planning.memory import footprint
from rcmae.run.folder import versions
from rcmae.tasks.registry import task_of

# relative tolerances: of what lies there when all is built, and of the height of a step above it
RESIDENT = 0.01
STEP = {"cpu": 0.15, "cuda": 0.10}
KEPT = ("engine.activation_checkpointing=none",)
RECOMPUTED = ("engine.activation_checkpointing=torch",)
ENGINES = {
    **{
        f"zero{stage}": ("engine.name=deepspeed", f"engine.config=zero{stage}.json")
        for stage in (1, 2, 3)
    },
    "fsdp2": ("engine.name=fsdp2", "engine.config=null"),
}
CASES = {
    f"{engine}, {way}": [*overrides, *more]
    for engine, overrides in ENGINES.items()
    for way, more in (("kept", KEPT), ("recomputed", RECOMPUTED))
}


def compare(recipe: Recipe, measured: Sequence[dict[str, int]]) -> dict[str, Any]:
    """What the planner tells of a case beside what each rank took, and how far off it is."""
    world = len(measured)
    sizes = config.resolve(recipe, world=world, samples_per_epoch=recipe.batch.images)
    settings = settings_of(recipe, placement(recipe), world, sizes.per_device)
    # the planner's own is a GPU's
    fused = kernels.attention_is_fused(dist.device(), settings.precision)
    cost = task_of(recipe).cost(recipe, fused_attention=fused)
    told = footprint(cost, settings)
    resident = sum(told.resident.values())
    # the teacher's first publication, which has left by the second step: half of what its update
    # takes
    update = told.moments["teacher's update"]["teacher"] - told.resident["teacher"]
    gathers = settings.placement in ("zero1", "zero2")
    gathers |= settings.placement == "ddp" and settings.sharing > 1
    on_its_way = round(update / 2) if gathers and cost.teacher else 0
    ready = [each["ready"] - on_its_way for each in measured]
    above = [each["peak"] - base for each, base in zip(measured, ready, strict=True)]
    return {
        "placement": settings.placement,
        "checkpointing": recipe.engine.activation_checkpointing,
        "precision": settings.precision,
        "per_device": settings.per_device,
        "accumulation": settings.accumulation,
        "when": told.when,
        "told_ready_bytes": round(resident),
        "measured_ready_bytes": ready,
        "told_step_bytes": round(told.peak - resident),
        "measured_step_bytes": above,
        "ready_off": max((resident / base - 1 for base in ready), key=abs),
        "step_off": max(((told.peak - resident) / each - 1 for each in above), key=abs),
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="tools/bench_memory.py", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "recipe",
        nargs="?",
        default="rcmae_vit_b_16",
        help="a YAML file, or a shipped recipe's name",
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="as rcmae.train takes them"
    )
    parser.add_argument(
        "--images", type=int, default=8, help="of a micro-batch, and of a step on each rank (8)"
    )
    parser.add_argument(
        "--cases", type=json.loads, default=CASES, help="others: a JSON object, name -> overrides"
    )
    add_json(parser)
    return parser.parse_intermixed_args(argv)


def print_report(report: dict[str, Any]) -> None:
    """The cases as a table."""
    print(f"{report['recipe']} on {report['world']} ranks, MB of a rank: told / measured, off")
    for name, case in report["cases"].items():
        told = [case[f"told_{what}_bytes"] / 1e6 for what in ("ready", "step")]
        ready, step = (max(case[f"measured_{what}_bytes"]) / 1e6 for what in ("ready", "step"))
        print(
            f"  {name:<20} built {told[0]:9.1f} / {ready:9.1f} {case['ready_off']:+7.2%}   "
            f"in a step {told[1]:8.1f} / {step:8.1f} {case['step_off']:+7.1%}  {case['when']}"
        )
    print(
        "all within the tolerances"
        if not report["beyond"]
        else f"beyond: {', '.join(report['beyond'])}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every case, compare and report; the exit status. Collective: every rank calls."""
    asked = arguments(argv)
    dist.start(required=True)
    each_rank = f"batch.images={asked.images * dist.world()}"
    cases = {}
    try:
        for name, overrides in asked.cases.items():
            whole = [each_rank, f"batch.per_device={asked.images}", *asked.overrides, *overrides]
            recipe = planner.load(asked.recipe, whole)
            recipe = config.with_precision(recipe, bf16_of(dist.device()).units)
            cases[name] = compare(recipe, dist.gather(measure(recipe))) | {"overrides": whole}
    except Refused as error:
        print(f"bench_memory: {error}", file=sys.stderr)
        return 2
    limit = STEP[dist.device().type]
    beyond = [
        name
        for name, case in cases.items()
        if abs(case["ready_off"]) > RESIDENT or abs(case["step_off"]) > limit
    ]
    report = {
        "tool": "bench_memory",
        "command": "torchrun --nproc-per-node N tools/bench_memory.py "
        + " ".join(sys.argv[1:] if argv is None else argv),
        "commit": commit(),
        "versions": versions() | {"platform": platform.system()},
        "hardware": hardware(dist.device()),
        "recipe": asked.recipe,
        "world": dist.world(),
        "tolerance": {"ready": RESIDENT, "step": limit},
        "cases": cases,
        "beyond": beyond,
    }
    if dist.rank() == 0 and not told(report, asked.json):
        print_report(report)
    dist.finish()
    return 1 if beyond else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())
