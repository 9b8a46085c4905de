"""What a step of a recipe costs in this process: seconds of the processor (not of the clock: other
work on the machine does not count) and bytes of live tensors, on made-up images."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence

import torch

from rcmae import config
from rcmae.config import Recipe
from rcmae.engines.build import make_engine
from rcmae.models.build import new_student, new_teacher
from rcmae.models.precision import bf16_of
from rcmae.objectives import make_objective
from rcmae.planning.live import made_up_batch, measure


def costs(recipes: Mapping[str, Recipe], rounds: int) -> dict[str, dict[str, float]]:
    """Of each recipe: median and quartiles of a step's seconds, bytes of its state and, at the
    most, of a step above that.

    Args:
        recipes: by name, on engine local.
        rounds: steps of each that are timed, in turn, round after round; a first one warms up.
    """
    found: dict[str, dict[str, float]] = {}
    steps = {}
    units = bf16_of(torch.device("cpu")).units
    for name, asked in recipes.items():
        recipe = config.with_precision(asked, units)
        bytes_ = measure(recipe)
        found[name] = {
            "state_bytes": bytes_["ready"],
            "step_bytes": bytes_["peak"] - bytes_["ready"],
        }
        steps[name] = step_of(recipe)
    seconds: dict[str, list[float]] = {name: [] for name in recipes}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            begin = time.process_time()
            next(step)
            seconds[name].append(time.process_time() - begin)
    for name, timed in seconds.items():
        low, middle, high = _quartiles(timed[1:])
        found[name] |= {"cpu_s": middle, "cpu_s_q1": low, "cpu_s_q3": high}
    return found


def _quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3


def step_of(recipe: Recipe) -> Iterator[None]:
    """Training steps on noise, one at each call."""
    sizes = config.resolve(recipe, world=1, samples_per_epoch=recipe.batch.images)
    objective = make_objective(recipe, sizes)
    student = new_student(recipe)
    teacher = new_teacher(student, objective.teacher_outputs)
    engine = make_engine(recipe, sizes, student, teacher, {})
    batch = made_up_batch(student, sizes.per_device, torch.device("cpu"))
    counts = objective.counts(batch)
    while True:
        for micro in range(sizes.accumulation):
            sums = objective(engine.student, engine.teacher, batch, 0.5)
            shares = [
                weight * sums[term] / max(counts[term], 1)
                for term, weight in objective.weights.items()
            ]
            engine.backward(torch.stack(shares).sum(), last=micro == sizes.accumulation - 1)
        engine.step(lr=1e-4, weight_decay=0.05)
        engine.update_teacher(0.99)
        yield
