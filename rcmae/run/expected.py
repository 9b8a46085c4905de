"""How long a run should take on the devices that are here, told before it starts (`--check`).

An estimate by the network's FLOPs alone: reading images, evaluations and saves are not in it. What
a GPU multiplies is looked up; a CPU is tried for a moment.
"""

from __future__ import annotations

import time

import torch

from rcmae import dist
from rcmae.engines.protocol import DTYPES
from rcmae.planning.estimates import SHORTEST_S
from rcmae.planning.hardware import peak_flops
from rcmae.planning.site import UTILISATION
from rcmae.run.judge import Verdict
from rcmae.tasks.protocol import Task

TRIED_S = 0.1
SIDE = 512  # of the matrices that are multiplied


def expected(verdict: Verdict, task: Task) -> str:
    """The time of the steps that are left, and how it was reckoned; one line. Local."""
    recipe, sizes = verdict.recipe, verdict.sizes
    precision = verdict.precision.used
    rate, whose = device_rate(precision)
    if not rate:
        return "time: not known for this device"
    flops = task.cost(recipe).step_flops * sizes.images_per_rank
    least = SHORTEST_S * sizes.accumulation if dist.device().type == "cuda" else 0.0
    step_s = max(flops / (UTILISATION * rate), least)
    left = sizes.total_steps - (verdict.saved.step if verdict.saved else 0)
    return (
        f"time: about {duration(step_s * left)}: {left:,} steps of {duration(step_s)}, by "
        f"{flops / 1e9:.3g} GFLOP of a rank at {UTILISATION:.0%} of {whose}; reading, evaluations "
        "and saves not counted"
    )


def device_rate(precision: str) -> tuple[float, str]:
    """FLOP/s of this rank's device, and where that is from; 0 where it is not known."""
    device = dist.device()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = peak_flops(name, precision) or 0.0
        return peak, f"the {peak / 1e12:.0f} TFLOP/s of {name}"
    tried = cpu_rate(DTYPES[precision])
    return tried, f"the {tried / 1e9:.3g} GFLOP/s that this CPU multiplies (tried now)"


def cpu_rate(dtype: torch.dtype) -> float:
    """FLOP/s of matrix products in this process."""
    one = torch.ones(SIDE, SIDE, dtype=dtype)
    one @ one  # the first one prepares
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < TRIED_S:
        one @ one
        done += 1
    return done * 2 * SIDE**3 / (time.perf_counter() - began)


def duration(seconds: float) -> str:
    """A time with the unit that it is read in."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= 2 * size or (unit == "s" and seconds >= 1):
            return f"{seconds / size:.3g} {unit}"
    return f"{1000 * seconds:.3g} ms"
