"""What a recipe will take on a site: memory of a GPU under each engine, FLOPs and hours, cores for
decoding, bytes and seconds of a checkpoint.

Stated numbers give way to measured ones where there are any: a utilisation by tools/gpu_day.py or
tools/bench_step.py, the decoding of these very shards, a checkpoint that this run has written.
"""

from __future__ import annotations

import bisect
import contextlib
import glob
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rcmae import config
from rcmae.config import Recipe, Resolved
from rcmae.data.cache import Reader, open_bytes
from rcmae.data.index import INDEX, ShardIndex
from rcmae.data.loading import shared_bytes
from rcmae.data.patterns import flat, shards_named
from rcmae.data.sources import is_remote
from rcmae.data.sources.braces import expanded
from rcmae.data.transforms import BadImage, TrainTransform
from rcmae.errors import Refused
from rcmae.files import json_lines, shipped
from rcmae.models.cost import StepCost
from rcmae.planning.hardware import GIB, GPUS, peak_flops
from rcmae.planning.memory import Footprint, footprint
from rcmae.planning.site import DECODE_PER_CORE, UTILISATION, Site
from rcmae.planning.states import MemorySettings, checkpoint_bytes
from rcmae.tasks.registry import task_of

with contextlib.redirect_stdout(sys.stderr):  # it says there which accelerator it found
    from rcmae.engines.deepspeed_config import read_config

RESULTS = shipped("results")
MEASURING = ("bench_step", "gpu_day")  # tools whose results have speeds of steps
CHECKPOINTING = "engine.activation_checkpointing"
TODAY = True  # engine.precision=auto where no GPU is named: those of today have units for bf16
RESERVED = 2.0 * GIB  # CUDA's context, workspaces of libraries, NCCL's channels
FRAGMENTED = 1.05  # what the caching allocator holds over what lives in it
_MANY_SHARDS = 64  # without an index, headers of more shards than this are not read

# ------------------------------------------------------------------------------------------- memory


def placement(recipe: Recipe) -> str:
    """Where the recipe's engine keeps its states: one of `states.PLACEMENTS`."""
    if recipe.engine.name != "deepspeed":
        return recipe.engine.name
    zero = read_config(recipe.engine.config or "").get("zero_optimization", {})
    return f"zero{zero.get('stage', 0)}"


def settings_of(recipe: Recipe, where: str, world: int, per_device: int) -> MemorySettings:
    """What `footprint` wants to know of a recipe in a place that may not be its own."""
    deepspeed: Mapping[str, Any] = {}
    own = where == placement(recipe)
    accumulation = recipe.batch.images // world // per_device
    # then a thread makes them: of this step, the next, the one after, and one in the making
    made_there = recipe.data.resize == "device" or recipe.data.decode != "cpu"
    if where.startswith("zero"):
        deepspeed = read_config((recipe.engine.config or "") if own else where)
    return MemorySettings(
        placement=where,
        precision=config.precision_of(recipe.engine.precision, TODAY),
        world=world,
        per_device=per_device,
        accumulation=accumulation,
        ahead=3 * accumulation + 1 if made_there else 1,  # else a copy one ahead
        accumulate=recipe.teacher.accumulate,
        deepspeed=deepspeed,
        shard_ranks=recipe.engine.shard_ranks if own else None,
    )


def cost_of(recipe: Recipe) -> StepCost:
    """What a step takes for one image, as the recipe's task has it. Raises Refused."""
    return task_of(recipe).cost(config.with_precision(recipe, TODAY))


def needed(found: Footprint) -> float:
    """Bytes of a GPU that a footprint asks for in practice."""
    return found.peak * FRAGMENTED + RESERVED


def memory_row(recipe: Recipe, where: str, sizes: Resolved, memory: float) -> dict[str, Any]:
    """One engine's memory on a GPU, with activations kept and recomputed, and the largest
    micro-batches that fit.

    `memory`: bytes of the GPU.
    """
    chosen = recipe.engine.activation_checkpointing
    ways = {"kept": "none", "recomputed": "torch" if chosen == "none" else chosen}
    candidates = divisors(sizes.images_per_rank)
    row: dict[str, Any] = {"engine": where, "own": where == placement(recipe)}
    for way, checkpointing in ways.items():
        cost = cost_of(config.with_values(recipe, {CHECKPOINTING: checkpointing}))

        def at(images: int, cost: StepCost = cost) -> Footprint:
            return footprint(cost, settings_of(recipe, where, sizes.world, images))

        fitting = bisect.bisect_right(candidates, memory, key=lambda images: needed(at(images)))
        here = at(sizes.per_device)
        row[way] = {
            "at_peak": here.at_peak,
            "when": here.when,
            "needed": needed(here),
            "fits": needed(here) <= memory,
            "largest_per_device": candidates[fitting - 1] if fitting else 0,
            "host": here.host,
        }
    return row


def divisors(number: int) -> list[int]:
    """All of them, smallest first."""
    return [each for each in range(1, number + 1) if number % each == 0]


# -------------------------------------------------------------------------------------------- speed


SHORTEST_S = 0.01  # of a micro-batch: launching its kernels takes a host so long; stated


def speed(recipe: Recipe, cost: StepCost, sizes: Resolved, site: Site) -> dict[str, Any]:
    """FLOPs, images/s and hours.

    Raises:
        Refused: the GPU does not compute in this precision.
    """
    gpu = GPUS[site.gpu]
    recipe = config.with_precision(recipe, gpu.bf16)
    peak = peak_flops(gpu.device_name, recipe.engine.precision, tf32=recipe.engine.tf32)
    if peak is None:
        raise Refused(
            f"{gpu.device_name} has no {recipe.engine.precision}; use engine.precision=fp32"
        )
    measured = None
    if site.utilisation is None:
        named = Path(site.measured) if site.measured else None
        measured = measured_utilisation(recipe, cost, site.gpu, named)
    share, source = measured or (site.utilisation or UTILISATION, "stated")
    forward = cost.forward_flops
    recomputes = recipe.engine.activation_checkpointing != "none"
    step = cost.step_flops + (forward if recomputes else 0.0)
    seconds = sizes.images_per_step * step / (share * peak * site.world)
    least = 0.0 if measured else SHORTEST_S * sizes.accumulation
    per_gpu = sizes.images_per_rank / max(seconds, least)
    return {
        "forward_flops_per_image": forward,
        "step_flops_per_image": step,
        "peak_flops": peak,
        "utilisation": share,
        "utilisation_from": source,
        "images_per_s_per_gpu": per_gpu,
        "images_per_s": per_gpu * site.world,
        "step_s": max(seconds, least),
        "launching": seconds < least,  # the GPU waits for its host
        "steps": sizes.total_steps,
        "hours": max(seconds, least) * sizes.total_steps / 3600,
        "hours_from": "measured" if measured else "computed",
    }


class Rate(NamedTuple):
    """A step's speed as somebody measured it."""

    flops_per_s: float
    placement: str  # of its engine
    file: str


def measured_utilisation(
    recipe: Recipe, cost: StepCost, gpu: str, results: Path | None = None
) -> tuple[float, str] | None:
    """Share of the dense peak that was measured with this network on this kind of GPU, and in
    which file; None where nobody has.

    Objective, precision and compilation are the recipe's, and so is the engine where a result has
    it, else it is one process; of several results the best.

    Args:
        recipe: in a precision that the GPU has.
        cost: of its step.
        gpu: a key of `GPUS`.
        results: a file of tools/gpu_day.py or tools/bench_step.py; None: those of the package.

    Raises:
        Refused: a file among the results is none, or the one that was named does not have it.
    """
    if recipe.task.name != "pretrain":
        return None  # steps of pretraining are measured
    device = GPUS[gpu].device_name
    rates = []
    for path in sorted(RESULTS.glob("*.json")) if results is None else [results]:
        rates += _rates(recipe, cost, device, path, named=results is not None)
    own = [rate for rate in rates if rate.placement == placement(recipe)]
    best = max(own or rates, default=None)
    if best is None:
        if results is None:
            return None
        raise Refused(
            f"--measured: {results} has no step of {recipe.model.name} ({variant_of(recipe)}) on "
            f"{device} by {placement(recipe)} or local; it has {_contents(results)}; leave it out "
            "to compute with a stated utilisation"
        )
    peak = peak_flops(device, recipe.engine.precision, tf32=recipe.engine.tf32)
    assert peak is not None, "the GPU does not compute in this precision"
    return best.flops_per_s / peak, best.file


def _rates(recipe: Recipe, cost: StepCost, device: str, path: Path, *, named: bool) -> list[Rate]:
    """Those of a recipe's step on a device in one file; of another tool's none, unless it was
    named.
    """
    wanted = (recipe.model.name, variant_of(recipe))
    found = []
    try:
        report = json.loads(path.read_text())
        if report.get("tool") not in MEASURING:
            if named:
                raise ValueError(f"it is of {report.get('tool')}")
            return []
        rows = list(_rows(report)) if report["hardware"].get("gpu") == device else []
        for of, rate in rows:
            flops = of.get("step_flops", cost.step_flops)
            same = math.isclose(flops, cost.step_flops, rel_tol=1e-6)
            if same and (of["model"], of["variant"]) == wanted:
                found.append(Rate(rate, of["placement"], path.name))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        way = "name one of these" if named else "move it away"
        raise Refused(
            f"{path} is not a result of tools/gpu_day.py or tools/bench_step.py ({error}); {way}"
        ) from error
    return [rate for rate in found if rate.placement in ("local", placement(recipe))]


def _contents(path: Path) -> str:
    """What a result that was read has, for people."""
    report = json.loads(path.read_text())
    steps = {f"{of['model']} ({of['variant']}) by {of['placement']}" for of, _ in _rows(report)}
    gpu = report["hardware"].get("gpu")
    where = f"on {gpu}" if gpu else "on a CPU"
    return f"{', '.join(sorted(steps)) or 'no step'}, {where}"


def _rows(report: dict[str, Any]) -> Iterator[tuple[dict[str, Any], float]]:
    """What each step of a report was, and its FLOP/s."""
    if report["tool"] == "bench_step":
        for row in report["variants"]:
            of = {"model": report["settings"]["model"], "placement": "local"}
            yield of | {"variant": row["variant"]}, row["model_flops_per_s"]
        return
    for case in report["cases"].values():
        result = case.get("result", {})
        if "of" in result:
            yield result["of"], result["flops_per_s"]


def variant_of(recipe: Recipe) -> str:
    """What the tools that measure call this recipe's step."""
    if "decoder" in recipe.objective.teacher_parts:
        objective = "rcmae"
    else:
        objective = "bootmae" if recipe.decoder == "bootmae" else "mae"
    compiles = config.compiles(recipe, cuda=True, zero3=placement(recipe) == "zero3")
    mode = "compiled" if compiles else "eager"
    return f"{objective}-lean-{recipe.engine.precision}-{mode}"


# --------------------------------------------------------------------------------------------- data


def see_shards(recipe: Recipe) -> tuple[ShardIndex | None, str]:
    """The index of the shards as far as they can be seen from here, else why not.

    Raises:
        Refused: their folder is there, but shards cannot be used.
    """
    patterns = flat(recipe.data.shards)
    caches = [str(recipe.run_dir / "index")]
    if recipe.data.index:
        caches.append(recipe.data.index)
    if any(map(is_remote, patterns)):
        return ShardIndex.open(recipe.data.shards, cache=caches, scan=False), ""
    paths = []
    for pattern in patterns:
        for piece in expanded(os.path.expanduser(pattern)):
            paths += glob.glob(piece) or [piece]
    folders = {os.path.dirname(path) for path in paths}
    has_folder = any(folder and os.path.isdir(folder) for folder in folders)
    if not has_folder and not any(map(os.path.exists, paths)):
        return None, "not seen from here"
    indexed = all(os.path.exists(os.path.join(folder, INDEX)) for folder in folders)
    if len(paths) > _MANY_SHARDS and not indexed:
        return None, f"{len(paths)} shards without an index: run rcmae shards index on them"
    return ShardIndex.open(recipe.data.shards, cache=caches), ""


def see_evaluation(recipe: Recipe, *, sees: bool) -> list[str]:
    """What stands against the shards that the run's evaluations read, a line each.

    Args:
        recipe: of the run.
        sees: the training's shards can be seen from here, and so should these. Else only those
            whose folder is there are looked at.
    """
    problems: list[str] = []
    for each in task_of(recipe).evaluation_sets(recipe):
        names = flat(each.shards)
        folders = [os.path.dirname(os.path.expanduser(name)) or "." for name in names]
        here = sees or all(map(os.path.isdir, folders))
        if here and not any(map(is_remote, names)):
            problems += [f"{each.key}: {told}" for told in shards_named(each.shards)[1]]
    return problems


def decode_rate(recipe: Recipe, index: ShardIndex, *, seconds: float = 1.0) -> float | None:
    """Images/s that one core of this machine makes of these shards' samples.

    None where none of the tried decodes.
    """
    data = recipe.data
    transform = TrainTransform(
        recipe.model.image_hw,
        recipe.model.in_channels,
        data.crop_scale,
        data.crop_ratio,
        data.flip,
        data.decode_margin,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    reader = Reader()
    done = 0
    begin = time.thread_time()
    try:
        for number in range(0, len(index), max(1, len(index) // 64)):
            sample = index[number]
            encoded = reader.read(sample.shard, sample.offset, sample.size)
            with contextlib.suppress(BadImage):
                if data.resize == "device":
                    transform.parts(encoded, data.seed, [number])
                else:
                    transform(encoded, data.seed, number)
                done += 1
            if time.thread_time() - begin > seconds:
                break
    finally:
        torch.set_num_threads(threads)
    return done / max(time.thread_time() - begin, 1e-9) if done else None


def data_needs(
    recipe: Recipe, sizes: Resolved, site: Site, index: ShardIndex | None, rate: float
) -> dict[str, Any]:
    """Cores for decoding, workers, and how shards, streams and ranks meet.

    `rate` is the node's images/s.
    """
    per_core, source = _decode_per_core(recipe, site, index)
    figures: dict[str, Any] = {
        "decode_per_core": per_core,
        "decode_from": source,
        "cores_needed": math.ceil(rate / per_core),
        "cores": site.cores,
        "workers_needed": math.ceil(rate / site.gpus / per_core),
        "workers": recipe.data.workers,
        "shared_bytes_per_node": site.gpus * shared_bytes(recipe, sizes.world, pins=True),
        "streams": sizes.canonical_streams,
        "streams_per_rank": sizes.canonical_streams // sizes.world,
        "samples_per_stream": sizes.samples_per_epoch / sizes.canonical_streams,
        "samples_per_epoch": sizes.samples_per_epoch,
    }
    if index is None:
        return figures
    window = min(recipe.data.shuffle_window, figures["samples_per_stream"])
    # shards that a stream reads at once
    spanned = 1 + window / (len(index) / len(index.shards))
    at_once = min(len(index.shards), figures["streams_per_rank"] * spanned)
    return figures | {
        "samples": len(index),
        "shards": len(index.shards),
        "bytes": sum(shard.size for shard in index.shards),
        "shards_read_at_once_per_rank": math.ceil(at_once),
        "open_bytes_per_node": open_bytes(
            index,
            streams=sizes.canonical_streams,
            window=recipe.data.shuffle_window,
            nodes=site.nodes,
        ),
    }


def _decode_per_core(recipe: Recipe, site: Site, index: ShardIndex | None) -> tuple[float, str]:
    """Images/s of a core, and where that is from."""
    if site.decode_per_core is not None:
        return site.decode_per_core, "given"
    tried = decode_rate(recipe, index) if index is not None else None
    if tried:
        return tried, "tried here on these shards"
    return DECODE_PER_CORE, "stated"


# --------------------------------------------------------------------------------------- checkpoint


def checkpoint_needs(recipe: Recipe, cost: StepCost, site: Site, step_s: float) -> dict[str, Any]:
    """Bytes and seconds of a checkpoint: those of this run's own where it has written some."""
    often = recipe.checkpoint
    size = checkpoint_bytes(cost.student, teacher=cost.teacher)
    seconds = size / (site.write_gbps * 1e9)
    source = f"{site.write_gbps:g} GB/s, stated"
    for line in json_lines(recipe.run_dir / "events.jsonl"):
        if line.get("event") == "checkpoint" and line.get("seconds"):
            seconds = line["seconds"]
            source = "this run"
    by_steps = (often.every_steps or math.inf) * step_s / 60
    return {
        "bytes": size,
        "seconds": seconds,
        "seconds_from": source,
        "every_minutes": min(often.every_minutes or math.inf, by_steps),
        "disk_bytes": size * (max(2, often.keep) + 1),
        "host_bytes_per_node": size / site.nodes if often.background else 0,
    }
