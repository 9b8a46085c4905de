"""Before the queue: whether a run fits and divides on a site, how long it takes, what to change.

`plan` puts the estimates together and judges them. Nothing is trained; of shards that can be seen
from here the index is read, and a few samples are decoded.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Sequence
from typing import Any

from rcmae import config
from rcmae.config import Recipe, Resolved
from rcmae.data.cache import cache_problem
from rcmae.data.index import ShardIndex
from rcmae.data.plan import Plan
from rcmae.engines.build import engine_settings
from rcmae.errors import Refused, counted
from rcmae.models.cost import StepCost
from rcmae.planning import recipe as recipes
from rcmae.planning.estimates import (
    checkpoint_needs,
    cost_of,
    data_needs,
    memory_row,
    placement,
    see_evaluation,
    see_shards,
    speed,
)
from rcmae.planning.hardware import GIB, GPUS
from rcmae.planning.site import Site

with contextlib.redirect_stdout(sys.stderr):  # it says there which accelerator it found
    from rcmae.engines.deepspeed_config import config_problems, read_config

ROWS = ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2")  # engines that are shown side by side

# ------------------------------------------------------------------------------------------- recipe


def load(name: str, overrides: Sequence[str]) -> Recipe:
    """A recipe, also one that leaves the shards to the command line: they may not be there yet.

    Raises:
        Refused: every problem.
    """
    return recipes.load(name, overrides)


# --------------------------------------------------------------------------------------------- plan


def plan(recipe: Recipe, site: Site) -> dict[str, Any]:
    """Everything about a run on a site, and the verdict.

    Raises:
        Refused: the model's sizes do not fit together.
    """
    recipe = config.with_precision(recipe, GPUS[site.gpu].bf16)
    cost = cost_of(recipe)
    report: dict[str, Any] = {
        "recipe": recipe.run.name,
        "task": recipe.task.name,
        "objective": recipe.objective.name,
        "model": recipe.model.name,
        "parameters": sum(param.numel() for param in cost.student.parameters()),
        "engine": placement(recipe),
        "precision": recipe.engine.precision,
        "activation_checkpointing": recipe.engine.activation_checkpointing,
        "site": {**site._asdict(), "world": site.world, "gpu_bytes": GPUS[site.gpu].memory},
    }
    problems = site_problems(recipe, site)
    advice: list[str] = []
    index = None
    try:
        index, report["shards"] = see_shards(recipe)
    except Refused as error:
        problems.append(str(error))
    problems += see_evaluation(recipe, sees=index is not None)
    if not problems:
        try:
            sizes = resolve(recipe, site, index)
            if index is not None:
                problems += _cache_problems(recipe, site, sizes, index)
            report |= figures(recipe, cost, site, sizes, index)
            problems += run_problems(recipe, site, sizes, report)
            advice += [
                *memory_advice(recipe, sizes, report),
                *data_advice(recipe, site, report),
                *saving_advice(report),
            ]
        except Refused as error:
            problems.append(str(error))
    verdict = "refused" if problems else "can run"
    return {**report, "problems": problems, "advice": advice, "verdict": verdict}


def resolve(recipe: Recipe, site: Site, index: ShardIndex | None) -> Resolved:
    """The derived numbers, with the epoch of the shards where they can be seen.

    Raises:
        Refused: the batch does not divide, or is larger than an epoch.
    """
    images = recipe.batch.images
    repeats = recipe.data.repeats
    samples = site.samples if index is None else len(index)
    recipe = config.with_streams(recipe, site.world, recipe.data.epoch_samples or samples)
    if index is not None:
        order = Plan(
            index.counts,
            seed=recipe.data.seed,
            images=images // repeats,
            streams=config.streams_for(recipe, site.world),
            window=recipe.data.shuffle_window,
            epoch_samples=recipe.data.epoch_samples,
            weights=index.weights,
        )
        epoch = repeats * order.samples_per_epoch
    else:
        epoch = (recipe.data.epoch_samples or site.samples) * repeats // images * images
    if epoch == 0:
        raise Refused(
            f"batch.images={images} is more than the {site.samples} samples of an epoch; give "
            "--samples"
        )
    return config.resolve(recipe, world=site.world, samples_per_epoch=epoch)


def figures(
    recipe: Recipe, cost: StepCost, site: Site, sizes: Resolved, index: ShardIndex | None
) -> dict[str, Any]:
    """The sections of the report.

    Raises:
        Refused: the GPU does not compute in the recipe's precision.
    """
    rows = ROWS if site.world > 1 else ("local", *ROWS)
    memory = GPUS[site.gpu].memory
    rate = speed(recipe, cost, sizes, site)
    return {
        "sizes": sizes.asdict(),
        "memory": [memory_row(recipe, where, sizes, memory) for where in rows],
        "speed": rate,
        "data": data_needs(recipe, sizes, site, index, rate["images_per_s"] / site.nodes),
        "checkpoint": checkpoint_needs(recipe, cost, site, rate["step_s"]),
    }


# ------------------------------------------------------------------------------------------ verdict


def site_problems(recipe: Recipe, site: Site) -> list[str]:
    """What stands against a recipe on a site before anything is computed."""
    gpu = GPUS[site.gpu]
    problems = config.batch_problems(recipe, site.world)
    problems += config.engine_problems(recipe, site.world)
    if recipe.engine.precision == "bf16" and not gpu.bf16:
        problems.append(f"{gpu.device_name} has no bf16; use engine.precision=fp32")
    return problems + config.rounding_problems(recipe)


def _cache_problems(recipe: Recipe, site: Site, sizes: Resolved, index: ShardIndex) -> list[str]:
    problem = cache_problem(
        index,
        streams=sizes.canonical_streams,
        window=recipe.data.shuffle_window,
        nodes=site.nodes,
        world=site.world,
        limit=int(recipe.data.cache_gb * 1e9),
    )
    return [problem] if problem else []


class _Own:
    """The recipe's own row of the report's memory, read its own way and the other."""

    def __init__(self, recipe: Recipe, report: dict[str, Any]) -> None:
        row = next(row for row in report["memory"] if row["own"])
        self.keeps = recipe.engine.activation_checkpointing == "none"
        self.way = "kept" if self.keeps else "recomputed"
        self.here = row[self.way]
        self.kept = row["kept"]
        self.other = row["recomputed" if self.keeps else "kept"]


def run_problems(recipe: Recipe, site: Site, sizes: Resolved, report: dict[str, Any]) -> list[str]:
    """What stands against the run, given the sections of the report."""
    problems = []
    if recipe.engine.name == "deepspeed":
        settings = engine_settings(recipe, sizes)
        json_config = read_config(recipe.engine.config or "")
        problems += config_problems(json_config, settings, lr=sizes.lr, world=site.world)
    own = _Own(recipe, report)
    if own.here["fits"]:
        return problems
    outs = []
    if own.here["largest_per_device"]:
        outs.append(f"batch.per_device={own.here['largest_per_device']}")
    if own.other["fits"] and own.keeps:
        outs.append("engine.activation_checkpointing=torch (a quarter to a third slower)")
    others = [row for row in report["memory"] if not row["own"] and row[own.way]["fits"]]
    outs += [row["engine"] for row in others[:2]]
    problems.append(
        f"{report['engine']} with {sizes.per_device} images needs "
        f"{own.here['needed'] / GIB:.1f} GiB of a GPU's {GPUS[site.gpu].memory / GIB:.1f} "
        f"({own.here['when']}); use "
        f"{', or '.join(outs) or 'more GPUs, or GPUs with more memory'}"
    )
    return problems


def memory_advice(recipe: Recipe, sizes: Resolved, report: dict[str, Any]) -> list[str]:
    """What would use a GPU's memory better."""
    advice = []
    own = _Own(recipe, report)
    largest = own.here["largest_per_device"]
    if own.here["fits"] and sizes.accumulation > 1 and largest > sizes.per_device:
        micros = counted(sizes.images_per_rank // largest, "micro-batch", "micro-batches")
        advice.append(f"batch.per_device={largest} fits: {micros} instead of {sizes.accumulation}")
    if not own.keeps and own.kept["fits"]:
        advice.append(
            "engine.activation_checkpointing=none fits, and is a quarter to a third faster"
        )
    fitting = {row["engine"] for row in report["memory"] if row[own.way]["fits"]}
    gathers = report["engine"] in ("zero3", "fsdp2")
    if own.here["fits"] and gathers and "zero1" in fitting:
        lighter = min(engine for engine in fitting - {"zero0"} if engine.startswith("zero"))
        advice.append(f"{lighter} fits too and gathers no parameters: faster between nodes")
    return advice


def saving_advice(report: dict[str, Any]) -> list[str]:
    """What would keep saves from running into each other."""
    saved, step_s = report["checkpoint"], report["speed"]["step_s"]
    between = 60 * saved["every_minutes"]
    if saved["seconds"] < between:
        return []
    rest = math.ceil(10 * saved["seconds"] / step_s)  # a tenth of the time
    return [
        f"a save takes {saved['seconds']:.3g} s ({saved['seconds_from']}), longer than the "
        f"{between:.3g} s from one to the next: each waits for the one before, and training with "
        f"it; checkpoint.every_steps={rest} or more"
    ]


def data_advice(recipe: Recipe, site: Site, report: dict[str, Any]) -> list[str]:
    """What would feed the GPUs better, or mix better."""
    advice = []
    data = report["data"]
    if data["workers"] < data["workers_needed"]:
        advice.append(
            f"data.workers={data['workers_needed']}: {data['workers']} decode "
            f"{data['workers'] * data['decode_per_core']:.0f} images/s, a GPU takes "
            f"{report['speed']['images_per_s_per_gpu']:.0f}"
        )
    if site.cores is not None and data["cores_needed"] > site.cores:
        slower = data["cores_needed"] / site.cores
        advice.append(
            f"decoding wants {counted(data['cores_needed'], 'core')} of a node, it has "
            f"{site.cores}: "
            f"{slower:.1f} x the hours; store smaller photographs, take more nodes with fewer GPUs "
            "each, lower data.decode_margin, or let the GPUs resize (data.resize=device, of "
            "photographs of about 500 px) or decode (data.decode=gpu)"
        )
    free = config.with_values(recipe, {"data.canonical_streams": None})
    fewer = config.streams_for(free, site.world, data["samples_per_epoch"] // recipe.data.repeats)
    if data["streams"] > fewer and data["samples_per_stream"] < recipe.data.shuffle_window / 8:
        advice.append(
            f"a stream has {data['samples_per_stream']:.0f} samples an epoch, far fewer than "
            f"data.shuffle_window={recipe.data.shuffle_window}: data.canonical_streams={fewer} "
            "would mix better"
        )
    return advice
