#!/usr/bin/env python3
"""Before the queue: whether a run fits and divides, how long it takes, and what to change. Nothing
is trained.

    python tools/plan.py RECIPE [key=value ...] [--nodes N] [--gpus N] [--gpu KIND] [--json]
    python tools/plan.py RECIPE --table a100-40g,h100-80g,h200
        kinds and sizes side by side, as Markdown

Memory is that of one GPU for every ZeRO stage and FSDP2 (`rcmae.planning.memory`: it agrees
with live tensors of CPU ranks), and what the driver, NCCL and a fragmented allocator take is left
free. Hours follow from the model's FLOPs and a
utilisation: measured by tools/bench_step.py on that kind of GPU where a result lies in
tools/results, else stated. Exit status: 0 it can run; 2 it cannot, or the input is wrong.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import dataclasses
import glob
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml
from braceexpand import braceexpand
from rich import box
from rich.console import Console
from rich.table import Table

from rcmae import config
from rcmae.config import Recipe, Resolved
from rcmae.data.cache import Reader, cache_problem, open_bytes
from rcmae.data.index import INDEX, ShardIndex
from rcmae.data.masking import visible_count
from rcmae.data.patterns import flat
from rcmae.data.plan import Plan
from rcmae.data.sources import is_remote
from rcmae.data.transforms import BadImage, TrainTransform
from rcmae.errors import Refused
from rcmae.models.bootmae import Network
from rcmae.parts import engine_settings, new_network
from rcmae.planning.hardware import peak_flops
from rcmae.planning.memory import Footprint, Settings, checkpoint_bytes, footprint

with contextlib.redirect_stdout(sys.stderr):  # it says there which accelerator it found
    from rcmae.engines.deepspeed import config_problems, read_config

GIB = 2**30
RESULTS = Path(__file__).parent / "results"
IMAGENET = 1_281_167  # samples of an epoch where the shards cannot be seen
UTILISATION = 0.35  # of the dense peak, by the model's own FLOPs, where none was measured
# images/s of a core, photographs of 500 x 375 to 224 px, where no sample can be tried
DECODE_PER_CORE = 700.0
RESERVED = 2.0 * GIB  # CUDA's context, workspaces of libraries, NCCL's channels
FRAGMENTED = 1.05  # what the caching allocator holds over what lives in it
WRITE_GBPS = 1.0  # GB/s of the file system for one checkpoint, all ranks together
TABLE_NODES = (1, 4, 8)
_MANY_SHARDS = 64  # without an index, headers of more shards than this are not read


class Gpu(NamedTuple):
    """A kind of GPU."""

    device_name: str  # as torch tells it
    memory: float  # bytes that CUDA can give out
    bf16: bool = True


GPUS = {
    "h100-80g": Gpu("NVIDIA H100 80GB HBM3", 79.1 * GIB),
    "h100-94g": Gpu("NVIDIA H100 NVL", 93.1 * GIB),
    "h200": Gpu("NVIDIA H200", 139.8 * GIB),
    "b200": Gpu("NVIDIA B200", 178.3 * GIB),
    "gh200": Gpu("NVIDIA GH200 480GB", 94.5 * GIB),
    "a100-40g": Gpu("NVIDIA A100-SXM4-40GB", 39.4 * GIB),
    "a100-80g": Gpu("NVIDIA A100-SXM4-80GB", 79.3 * GIB),
    "l40s": Gpu("NVIDIA L40S", 44.4 * GIB),
    "a10g": Gpu("NVIDIA A10G", 22.1 * GIB),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 23.5 * GIB),
    "v100-32g": Gpu("Tesla V100-SXM2-32GB", 31.7 * GIB, bf16=False),
}
ROWS = ("zero0", "zero1", "zero2", "zero3", "fsdp2")


class Site(NamedTuple):
    """Where the run would go."""

    nodes: int
    gpus: int  # of a node
    gpu: str
    cores: int | None = None  # of a node, for decoding; None: not told
    samples: int = IMAGENET
    utilisation: float | None = None
    decode_per_core: float | None = None
    write_gbps: float = WRITE_GBPS

    @property
    def world(self) -> int:
        """Ranks."""
        return self.nodes * self.gpus


# ------------------------------------------------------------------------------------------- recipe


def load(name: str, overrides: Sequence[str]) -> Recipe:
    """A recipe, also one that leaves the shards to the command line: they may not be there yet.

    Raises:
        ValueError: every problem.
    """
    tree = yaml.safe_load(config.recipe_path(name).read_text()) or {}
    given = bool((tree.get("data") or {}).get("shards")) or any(
        item.startswith("data.shards=") for item in overrides
    )
    recipe = config.load(
        name, [*([] if given else ["data.shards=shards-are-not-given.tar"]), *overrides]
    )
    if (module := config.module_of(recipe)) != "rcmae.train":
        raise Refused(
            f"{name} is trained by {module}; memory and hours are known of pretraining only"
        )
    return recipe


def student(recipe: Recipe) -> Network:
    """The student without its weights.

    Raises:
        ValueError: sizes that do not fit together.
    """
    with torch.device("meta"):
        return new_network(recipe, norm="torch")


def placement(recipe: Recipe) -> str:
    """Where the recipe's engine keeps its states: a row of the table."""
    if recipe.engine.name != "deepspeed":
        return recipe.engine.name
    zero = read_config(recipe.engine.config or "").get("zero_optimization", {})
    return f"zero{zero.get('stage', 0)}"


# ------------------------------------------------------------------------------------------- memory


def settings_of(
    recipe: Recipe, model: Network, where: str, world: int, per_device: int
) -> Settings:
    """What `footprint` wants to know of a recipe in a place that may not be its own."""
    own = where == placement(recipe)
    deepspeed: Mapping[str, Any] = {}
    if where.startswith("zero"):
        deepspeed = read_config((recipe.engine.config or "") if own else where)
    return Settings(
        placement=where,
        precision=recipe.engine.precision,
        world=world,
        per_device=per_device,
        accumulation=recipe.batch.images // world // per_device,
        accumulate=recipe.teacher.accumulate,
        num_visible=visible_count(model.num_patches, recipe.objective.mask_ratio),
        teacher=recipe.objective.teacher_parts,
        checkpointing=recipe.engine.activation_checkpointing,
        deepspeed=deepspeed,
    )


def needed(found: Footprint) -> float:
    """Bytes of a GPU that a footprint asks for in practice."""
    return found.peak * FRAGMENTED + RESERVED


def memory_row(
    recipe: Recipe, model: Network, where: str, sizes: Resolved, memory: float
) -> dict[str, Any]:
    """One engine's memory on a GPU, with activations kept and recomputed, and the largest
    micro-batches that fit.
    """
    asked = recipe.engine.activation_checkpointing
    ways = {"kept": "none", "recomputed": "torch" if asked == "none" else asked}
    found: dict[str, dict[str, Any]] = {}
    for way, checkpointing in ways.items():

        def at(images: int, checkpointing: str = checkpointing) -> Footprint:
            settings = settings_of(recipe, model, where, sizes.world, images)
            return footprint(model, dataclasses.replace(settings, checkpointing=checkpointing))

        here, candidates = at(sizes.per_device), divisors(sizes.images_per_rank)
        fitting = candidates[
            : bisect.bisect_right(candidates, memory, key=lambda images: needed(at(images)))
        ]
        found[way] = {
            "at_peak": here.at_peak,
            "when": here.when,
            "needed": needed(here),
            "fits": needed(here) <= memory,
            "largest_per_device": max(fitting, default=0),
            "host": here.host,
        }
    return {"engine": where, "own": where == placement(recipe), **found}


def divisors(number: int) -> list[int]:
    """All of them, smallest first."""
    return [each for each in range(1, number + 1) if number % each == 0]


# -------------------------------------------------------------------------------------------- speed


def measured_utilisation(
    recipe: Recipe, gpu: str, results: Path = RESULTS
) -> tuple[float, str] | None:
    """Share of the dense peak that tools/bench_step.py measured with this model on this kind of
    GPU, and in which file.

    The path, precision and compilation are the recipe's; of several results the best.
    """
    wanted = GPUS[gpu].device_name
    teacher = recipe.objective.teacher_parts
    objective = (
        "rcmae" if "decoder" in teacher else "bootmae" if recipe.decoder == "bootmae" else "mae"
    )
    variant = "-".join(
        [
            objective,
            "lean",
            recipe.engine.precision,
            "compiled" if recipe.engine.compile else "eager",
        ]
    )
    found = []
    for path in sorted(results.glob("*.json")):
        try:
            report = json.loads(path.read_text())
            if (
                report.get("tool") != "bench_step"
                or report["settings"]["model"] != recipe.model.name
            ):
                continue
            peak = peak_flops(report["hardware"].get("gpu", ""), recipe.engine.precision)
            same = report["hardware"].get("gpu") == wanted
            rates = [
                row["model_flops_per_s"] for row in report["variants"] if row["variant"] == variant
            ]
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise Refused(
                f"{path} is no result of tools/bench_step.py ({error}); move it away"
            ) from error
        found += [(rate / peak, path.name) for rate in rates if same and peak]
    return max(found, default=None)


def speed(recipe: Recipe, model: Network, sizes: Resolved, site: Site) -> dict[str, Any]:
    """FLOPs, images/s and hours. Raises ValueError where the GPU's peak is not known."""
    gpu = GPUS[site.gpu]
    peak = peak_flops(gpu.device_name, recipe.engine.precision)
    if peak is None:
        raise Refused(
            f"{gpu.device_name} has no {recipe.engine.precision}; use engine.precision=fp32"
        )
    measured = measured_utilisation(recipe, site.gpu) if site.utilisation is None else None
    share, source = measured or (site.utilisation or UTILISATION, "stated")
    visible = visible_count(model.num_patches, recipe.objective.mask_ratio)
    forward, parts = model.flops(visible), recipe.objective.teacher_parts
    taught = (
        forward if "decoder" in parts else model.encoder_flops(model.num_patches) if parts else 0.0
    )
    passes = 3 if recipe.engine.activation_checkpointing == "none" else 4  # a backward pass is two
    step = passes * forward + taught
    per_gpu = share * peak / step
    seconds = sizes.images_per_step / (per_gpu * site.world)
    return {
        "forward_flops_per_image": forward,
        "step_flops_per_image": step,
        "peak_flops": peak,
        "utilisation": share,
        "utilisation_from": source,
        "images_per_s_per_gpu": per_gpu,
        "images_per_s": per_gpu * site.world,
        "step_s": seconds,
        "steps": sizes.total_steps,
        "hours": seconds * sizes.total_steps / 3600,
    }


# --------------------------------------------------------------------------------------------- data


def see_shards(recipe: Recipe) -> tuple[ShardIndex | None, str]:
    """The index of the shards as far as they can be seen from here, else why not.

    Raises:
        ValueError: their folder is there, but shards cannot be used.
    """
    patterns = flat(recipe.data.shards)
    caches = [str(recipe.run_dir / "index"), *([recipe.data.index] if recipe.data.index else [])]
    if any(map(is_remote, patterns)):
        return ShardIndex.open(recipe.data.shards, cache=caches, scan=False), ""
    pieces = [piece for pattern in patterns for piece in braceexpand(os.path.expanduser(pattern))]
    paths = [path for piece in pieces for path in (glob.glob(piece) or [piece])]
    folders = {os.path.dirname(path) for path in paths}
    if not any(folder and os.path.isdir(folder) for folder in folders) and not any(
        map(os.path.exists, paths)
    ):
        return None, "not seen from here"
    if len(paths) > _MANY_SHARDS and not all(
        os.path.exists(os.path.join(folder, INDEX)) for folder in folders
    ):
        return None, f"{len(paths)} shards without an index: run rcmae shards index on them"
    return ShardIndex.open(recipe.data.shards, cache=caches), ""


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
    done, begin = 0, time.thread_time()
    try:
        for number in range(0, len(index), max(1, len(index) // 64)):
            sample = index[number]
            encoded = reader.read(sample.shard, sample.offset, sample.size)
            with contextlib.suppress(BadImage):
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
    tried = (
        decode_rate(recipe, index) if index is not None and site.decode_per_core is None else None
    )
    per_core = site.decode_per_core or tried or DECODE_PER_CORE
    figures: dict[str, Any] = {
        "decode_per_core": per_core,
        "decode_from": "given"
        if site.decode_per_core
        else "tried here on these shards"
        if tried
        else "stated",
        "cores_needed": math.ceil(rate / per_core),
        "cores": site.cores,
        "workers_needed": math.ceil(rate / site.gpus / per_core),
        "workers": recipe.data.workers,
        "streams": sizes.canonical_streams,
        "streams_per_rank": sizes.canonical_streams // sizes.world,
        "samples_per_stream": sizes.samples_per_epoch / sizes.canonical_streams,
        "samples_per_epoch": sizes.samples_per_epoch,
    }
    if index is not None:
        window = min(recipe.data.shuffle_window, figures["samples_per_stream"])
        # shards that a stream reads at once
        spanned = 1 + window / (len(index) / len(index.shards))
        figures |= {
            "samples": len(index),
            "shards": len(index.shards),
            "bytes": sum(shard.size for shard in index.shards),
            "shards_read_at_once_per_rank": math.ceil(
                min(len(index.shards), figures["streams_per_rank"] * spanned)
            ),
            "open_bytes_per_node": open_bytes(
                index,
                streams=sizes.canonical_streams,
                window=recipe.data.shuffle_window,
                nodes=site.nodes,
            ),
        }
    return figures


# --------------------------------------------------------------------------------------- checkpoint


def checkpoint_needs(recipe: Recipe, model: Network, site: Site, step_s: float) -> dict[str, Any]:
    """Bytes and seconds of a checkpoint: those of this run's own where it has written some."""
    size = checkpoint_bytes(model, teacher=recipe.objective.teacher_parts)
    seen = [
        line
        for line in _events(recipe)
        if line.get("event") == "checkpoint" and line.get("seconds")
    ]
    seconds = seen[-1]["seconds"] if seen else size / (site.write_gbps * 1e9)
    often = recipe.checkpoint
    minutes = [
        each
        for each in (often.every_minutes, (often.every_steps or math.inf) * step_s / 60)
        if each
    ]
    return {
        "bytes": size,
        "seconds": seconds,
        "seconds_from": "this run" if seen else f"{site.write_gbps:g} GB/s, stated",
        "every_minutes": min(minutes),
        "disk_bytes": size * (max(2, often.keep) + 1),
        "host_bytes_per_node": size / site.nodes if often.background else 0,
    }


def _events(recipe: Recipe) -> list[dict[str, Any]]:
    try:
        lines = (recipe.run_dir / "events.jsonl").read_text().splitlines(keepends=True)
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


# ------------------------------------------------------------------------------------------- report


def plan(recipe: Recipe, site: Site) -> dict[str, Any]:
    """Everything about a run on a site, and the verdict.

    Raises:
        ValueError: the model's sizes do not fit together.
    """
    gpu, model = GPUS[site.gpu], student(recipe)
    problems: list[str] = []
    advice: list[str] = []
    report: dict[str, Any] = {
        "recipe": recipe.run.name,
        "objective": recipe.objective.name,
        "model": recipe.model.name,
        "parameters": sum(param.numel() for param in model.parameters()),
        "engine": placement(recipe),
        "precision": recipe.engine.precision,
        "activation_checkpointing": recipe.engine.activation_checkpointing,
        "site": {**site._asdict(), "world": site.world, "gpu_bytes": gpu.memory},
    }
    problems += config.batch_problems(recipe, site.world)
    if recipe.engine.name == "local" and site.world > 1:
        problems.append(
            f"engine.name=local is one process, not {site.world}; use deepspeed or fsdp2"
        )
    if recipe.engine.precision == "bf16" and not gpu.bf16:
        problems.append(f"{gpu.device_name} has no bf16; use engine.precision=fp32")
    index = None
    try:
        index, report["shards"] = see_shards(recipe)
    except ValueError as error:
        problems.append(str(error))
    if not problems:
        try:
            sizes = resolve(recipe, site, index)
            small = index and cache_problem(
                index,
                streams=sizes.canonical_streams,
                window=recipe.data.shuffle_window,
                nodes=site.nodes,
                world=site.world,
                limit=int(recipe.data.cache_gb * 1e9),
            )
            problems += [small] if small else []
            report |= figures(recipe, model, site, sizes, index)
            judge(recipe, site, sizes, report, problems, advice)
        except ValueError as error:
            problems.append(str(error))
    return {
        **report,
        "problems": problems,
        "advice": advice,
        "verdict": "refused" if problems else "can run",
    }


def resolve(recipe: Recipe, site: Site, index: ShardIndex | None) -> Resolved:
    """The derived numbers, with the epoch of the shards where they can be seen.

    Raises ValueError: it cannot be.
    """
    images, repeats = recipe.batch.images, recipe.data.repeats
    if index is not None:
        epoch = (
            repeats
            * Plan(
                index.counts,
                seed=recipe.data.seed,
                images=images // repeats,
                streams=config.streams_for(recipe, site.world),
                window=recipe.data.shuffle_window,
                epoch_samples=recipe.data.epoch_samples,
                weights=index.weights,
            ).samples_per_epoch
        )
    else:
        epoch = (recipe.data.epoch_samples or site.samples) * repeats // images * images
    if epoch == 0:
        raise Refused(
            f"batch.images={images} is more than the {site.samples} samples of an epoch; give "
            "--samples"
        )
    return config.resolve(recipe, world=site.world, samples_per_epoch=epoch)


def figures(
    recipe: Recipe, model: Network, site: Site, sizes: Resolved, index: ShardIndex | None
) -> dict[str, Any]:
    """The sections of the report."""
    rows = (*(("local",) if site.world == 1 else ()), *ROWS)
    rate = speed(recipe, model, sizes, site)
    return {
        "sizes": sizes.asdict(),
        "memory": [
            memory_row(recipe, model, where, sizes, GPUS[site.gpu].memory) for where in rows
        ],
        "speed": rate,
        "data": data_needs(recipe, sizes, site, index, rate["images_per_s"] / site.nodes),
        "checkpoint": checkpoint_needs(recipe, model, site, rate["step_s"]),
    }


def judge(
    recipe: Recipe,
    site: Site,
    sizes: Resolved,
    report: dict[str, Any],
    problems: list[str],
    advice: list[str],
) -> None:
    """What stands against the run, and what would be better."""
    rows, checkpointing = report["memory"], recipe.engine.activation_checkpointing
    own = next(row for row in rows if row["own"])
    way, other = ("kept", "recomputed") if checkpointing == "none" else ("recomputed", "kept")
    have = GPUS[site.gpu].memory
    if recipe.engine.name == "deepspeed":
        settings = engine_settings(recipe, sizes)
        json_config = read_config(recipe.engine.config or "")
        problems += config_problems(json_config, settings, lr=sizes.lr, world=site.world)
    if not own[way]["fits"]:
        outs = [f"batch.per_device={own[way]['largest_per_device']}"] * bool(
            own[way]["largest_per_device"]
        )
        if own[other]["fits"] and checkpointing == "none":
            outs.append("engine.activation_checkpointing=torch (a quarter to a third slower)")
        outs += [f"{row['engine']}" for row in rows if not row["own"] and row[way]["fits"]][:2]
        problems.append(
            f"{report['engine']} with {sizes.per_device} images needs "
            f"{own[way]['needed'] / GIB:.1f} GiB of a GPU's "
            f"{have / GIB:.1f} ({own[way]['when']}); use "
            f"{', or '.join(outs) or 'more GPUs, or GPUs with more memory'}"
        )
    elif sizes.accumulation > 1 and own[way]["largest_per_device"] > sizes.per_device:
        advice.append(
            f"batch.per_device={own[way]['largest_per_device']} fits: "
            f"{sizes.images_per_rank // own[way]['largest_per_device']} micro-batches "
            f"instead of {sizes.accumulation}"
        )
    if checkpointing != "none" and own["kept"]["fits"]:
        advice.append(
            "engine.activation_checkpointing=none fits, and is a quarter to a third faster"
        )
    lighter = [
        row["engine"] for row in rows if row[way]["fits"] and row["engine"].startswith("zero")
    ]
    if own[way]["fits"] and report["engine"] in ("zero3", "fsdp2") and "zero1" in lighter:
        advice.append(
            f"{min(set(lighter) - {'zero0'})} fits too and gathers no parameters: faster between "
            "nodes"
        )
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
            f"decoding wants {data['cores_needed']} cores of a node, it has {site.cores}: "
            f"{slower:.1f} x the hours; "
            "store smaller photographs, take more nodes with fewer GPUs each, lower "
            "data.decode_margin, or let the "
            "GPUs decode (data.decode=gpu)"
        )
    if data["samples_per_stream"] < recipe.data.shuffle_window / 8:
        advice.append(
            f"a stream has {data['samples_per_stream']:.0f} samples an epoch, far fewer than "
            "data.shuffle_window="
            f"{recipe.data.shuffle_window}: fewer data.canonical_streams would mix better"
        )


def print_report(report: dict[str, Any], console: Console) -> None:
    """The report for people."""
    site = report["site"]
    console.print(
        f"{report['recipe']}: {report['objective']} {report['model']}, "
        f"{report['parameters'] / 1e6:.0f} M parameters, "
        f"on {site['nodes']} x {site['gpus']} {site['gpu']}"
    )
    if "sizes" in report:
        _print_figures(report, console)
    for text in report["problems"]:
        console.print(f"[red]cannot run[/]: {text}")
    for text in report["advice"]:
        console.print(f"[yellow]better[/]: {text}")
    console.print("[red]refused[/]" if report["problems"] else "[green]can run[/]")


def _print_figures(report: dict[str, Any], console: Console) -> None:
    sizes, rate, data, saved, site = (
        report[key] for key in ("sizes", "speed", "data", "checkpoint", "site")
    )
    table = Table(
        title=f"GiB of a GPU at the highest moment of a step, {sizes['per_device']} images at "
        "once, "
        f"{report['precision']};\n{site['gpu_bytes'] / GIB:.1f} are there, "
        f"{RESERVED / GIB:g} for CUDA and NCCL; "
        "right: with activations recomputed",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    kinds = ("weights", "gradients", "moments", "teacher", "communication", "activations")
    short = ("weights", "grads", "moments", "teacher", "comm.", "activ.")
    for name in ("engine", *short, "needed", "batch <=", "recomp.", "batch <="):
        table.add_column(name, justify="left" if name == "engine" else "right", no_wrap=True)
    for row in report["memory"]:
        kept, again = row["kept"], row["recomputed"]

        def cell(way: dict[str, Any]) -> str:
            return f"[{'green' if way['fits'] else 'red'}]{way['needed'] / GIB:.1f}[/]"

        table.add_row(
            row["engine"] + (" *" if row["own"] else ""),
            *(f"{kept['at_peak'][kind] / GIB:.2f}" for kind in kinds),
            cell(kept),
            str(kept["largest_per_device"] or "-"),
            cell(again),
            str(again["largest_per_device"] or "-"),
        )
    console.print(table)
    lines = {
        "batch": f"{sizes['images_per_step']} images = {sizes['world']} ranks x "
        f"{sizes['accumulation']} x "
        f"{sizes['per_device']}; {sizes['total_steps']} steps, {sizes['steps_per_epoch']} an epoch",
        "speed": f"{rate['forward_flops_per_image'] / 1e9:.1f} GFLOP an image forward, "
        f"{rate['step_flops_per_image'] / 1e9:.0f} a step; {rate['images_per_s']:,.0f} images/s "
        f"({rate['images_per_s_per_gpu']:,.0f} a GPU) at {rate['utilisation']:.0%} of "
        f"{rate['peak_flops'] / 1e12:.0f} "
        f"TFLOP/s ({rate['utilisation_from']})",
        "time": f"{rate['step_s']:.2f} s a step, {rate['hours']:.1f} hours, "
        f"{rate['hours'] * site['world']:,.0f} GPU hours",
        "decoding": f"{data['cores_needed']} cores of a node"
        + (f" of {data['cores']}" if data["cores"] else "")
        + f", {data['workers_needed']} workers a rank (data.workers={data['workers']}), at "
        f"{data['decode_per_core']:.0f} images/s a core ({data['decode_from']})",
        "shards": (
            f"{data['shards']} with {data['samples']:,} samples, {data['bytes'] / 1e9:.1f} "
            "GB; a rank reads "
            f"{data['streams_per_rank']} of {data['streams']} streams, "
            f"{data['shards_read_at_once_per_rank']} shards "
            f"at once, a node {data['open_bytes_per_node'] / 1e9:.2f} GB of them"
            if "shards" in data
            else f"{report['shards']}; {data['samples_per_epoch']:,} samples an epoch are taken; "
            f"{data['streams_per_rank']} of {data['streams']} streams a rank"
        ),
        "checkpoint": f"{saved['bytes'] / 1e9:.2f} GB in {saved['seconds']:.1f} s "
        f"({saved['seconds_from']}), every "
        f"{saved['every_minutes']:.0f} min; {saved['disk_bytes'] / 1e9:.1f} GB of disk, "
        f"{saved['host_bytes_per_node'] / 1e9:.1f} GB of a node's memory",
    }
    for name, text in lines.items():
        console.print(f"  {name:<11}{text}", highlight=False, soft_wrap=True)


def markdown(recipe: Recipe, kinds: Sequence[str], gpus: int) -> str:
    """A table of the recipe on each kind of GPU and each of TABLE_NODES."""
    titles = (
        "GPUs",
        "kind",
        "placement",
        "GiB needed of",
        "images at once",
        "at most (recomputed)",
        "images/s",
        "step s",
        "hours",
        "GPU hours",
        "cores a node to decode",
        "checkpoint GB",
    )
    rows = [list(titles), ["---"] * len(titles)]
    for kind in kinds:
        for nodes in TABLE_NODES:
            site = Site(nodes=nodes, gpus=gpus, gpu=kind)
            report = plan(recipe, site)
            cells = [str(site.world), kind, report["engine"]]
            if report["problems"]:
                rows.append([*cells, "; ".join(report["problems"]), *[""] * (len(titles) - 4)])
                continue
            own, rate = next(row for row in report["memory"] if row["own"]), report["speed"]
            way = own["kept" if report["activation_checkpointing"] == "none" else "recomputed"]
            rows.append(
                [
                    *cells,
                    f"{way['needed'] / GIB:.1f} of {GPUS[kind].memory / GIB:.1f}",
                    f"{report['sizes']['per_device']} x {report['sizes']['accumulation']}",
                    f"{way['largest_per_device']} ({own['recomputed']['largest_per_device']})",
                    f"{rate['images_per_s']:,.0f}",
                    f"{rate['step_s']:.2f}",
                    f"{rate['hours']:.1f}",
                    f"{rate['hours'] * site.world:,.0f}",
                    str(report["data"]["cores_needed"]),
                    f"{report['checkpoint']['bytes'] / 1e9:.2f}",
                ]
            )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Plan and report; the exit status."""
    parser = argparse.ArgumentParser(
        prog="tools/plan.py", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="as rcmae.train takes them"
    )
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="of a node (8)")
    parser.add_argument("--gpu", default="h100-80g", choices=GPUS)
    parser.add_argument("--cores", type=int, help="of a node, for decoding")
    parser.add_argument(
        "--samples", type=int, default=IMAGENET, help="of an epoch, where the shards cannot be seen"
    )
    parser.add_argument(
        "--utilisation", type=float, help=f"share of the peak ({UTILISATION}, or as measured)"
    )
    parser.add_argument(
        "--decode-per-core",
        type=float,
        help="images/s (tried on the shards where they can be seen)",
    )
    parser.add_argument(
        "--write-gbps", type=float, default=WRITE_GBPS, help="GB/s of the run's file system (1)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--table",
        metavar="KINDS",
        help="of GPUs, with commas between: print a Markdown table of them",
    )
    asked = vars(parser.parse_intermixed_args(argv))
    recipe_name, overrides, as_json = asked.pop("recipe"), asked.pop("overrides"), asked.pop("json")
    kinds = (asked.pop("table") or "").split(",")
    if low := [
        key for key, value in asked.items() if isinstance(value, int | float) and value <= 0
    ]:
        parser.error(", ".join(f"--{key.replace('_', '-')}" for key in low) + " must be above 0")
    if kinds != [""] and (unknown := [kind for kind in kinds if kind not in GPUS]):
        parser.error(f"--table: unknown {', '.join(unknown)}; known: {', '.join(GPUS)}")
    try:
        if kinds != [""]:
            print(markdown(load(recipe_name, overrides), kinds, asked["gpus"]))
            return 0
        report = plan(load(recipe_name, overrides), Site(**asked))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        print_report(report, Console(width=max(Console().width, 110)))
    return 2 if report["problems"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
