"""Check before queueing that a run fits into memory and divides over the ranks; estimate its time;
suggest changes. Nothing is trained.

    rcmae plan RECIPE [key=value ...] [--nodes N] [--gpus N] [--gpu KIND] [--json]
    rcmae plan RECIPE --table a100-40g,h100-80g,h200
        kinds and sizes side by side, as Markdown

Memory is that of one GPU for every ZeRO stage and FSDP2 (it agrees with live tensors of CPU ranks),
with a margin for the driver, NCCL and fragmentation. Hours follow from the model's FLOPs and a
utilisation: measured, where a result of tools/gpu_day.py or tools/bench_step.py has this network on
that GPU (one of the package, or --measured FILE), else assumed, and then the hours are computed.
Exit status: 0 it can run; 2 it cannot, or the input is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rcmae.errors import counted
from rcmae.planning.hardware import GIB, GPUS
from rcmae.planning.site import IMAGENET, UTILISATION, WRITE_GBPS, Site

if TYPE_CHECKING:
    from rich.console import Console

    from rcmae.config import Recipe

TABLE_NODES = (1, 4, 8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan and report; the exit status."""
    asked = parse(arguments)
    site = Site(
        nodes=asked.nodes,
        gpus=asked.gpus,
        gpu=asked.gpu,
        cores=asked.cores,
        samples=asked.samples,
        utilisation=asked.utilisation,
        decode_per_core=asked.decode_per_core,
        write_gbps=asked.write_gbps,
        measured=asked.measured,
    )
    from rich.console import Console

    from rcmae.errors import Refused
    from rcmae.planning import planner

    try:
        recipe = planner.load(asked.recipe, asked.overrides)
        if asked.table:
            print(markdown(recipe, asked.table, asked.gpus, asked.measured))
            return 0
        report = planner.plan(recipe, site)
        if recipe.engine.name == "local" and site.world > 1:
            report["advice"].append("--gpus 1 plans the one process of engine.name=local")
    except Refused as error:
        print(f"rcmae: {error}", file=sys.stderr)
        return 2
    if asked.json:
        print(json.dumps(report, indent=1))
    else:
        print_report(report, Console(width=max(Console().width, 110)))
    return 2 if report["problems"] else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="rcmae plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="recipe keys, as for rcmae train",
    )
    parser.add_argument("--nodes", type=int, default=1, help="(1)")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs per node (8)")
    parser.add_argument(
        "--gpu",
        default="h100-80g",
        choices=GPUS,
        help="kind (h100-80g); CPUs are not planned for: rcmae train RECIPE --check",
    )
    parser.add_argument("--cores", type=int, help="cores per node that decode")
    parser.add_argument(
        "--samples",
        type=int,
        default=IMAGENET,
        help="samples per epoch, if the shards are not here",
    )
    parser.add_argument(
        "--utilisation", type=float, help=f"share of peak FLOP/s ({UTILISATION}, or as measured)"
    )
    parser.add_argument(
        "--measured",
        metavar="FILE",
        help="steps measured by tools/gpu_day.py (those of the package)",
    )
    parser.add_argument(
        "--decode-per-core",
        type=float,
        help="images/s that a core decodes (measured on the shards, if they are here)",
    )
    parser.add_argument(
        "--write-gbps",
        type=float,
        default=WRITE_GBPS,
        help="write speed of the run's file system, GB/s (1)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--table",
        metavar="KINDS",
        type=lambda text: text.split(","),
        help="GPU kinds separated by commas: print a Markdown table of them",
    )
    asked = parser.parse_intermixed_args(arguments)
    low = []
    for key, value in vars(asked).items():
        if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
            low.append(f"--{key.replace('_', '-')}")
    if low:
        parser.error(f"{', '.join(low)} must be above 0")
    unknown = [kind for kind in asked.table or () if kind not in GPUS]
    if unknown:
        parser.error(f"--table: unknown {', '.join(unknown)}; known: {', '.join(GPUS)}")
    return asked


# ------------------------------------------------------------------------------------- for people


def print_report(report: dict[str, Any], console: Console) -> None:
    """The report for people."""
    site = report["site"]
    console.print(
        f"{report['recipe']}: {report['objective']} {report['model']}, "
        f"{_amount(report['parameters'])} parameters, "
        f"on {site['nodes']} x {site['gpus']} {site['gpu']}"
    )
    if "sizes" in report:
        _print_memory(report, console)
        for name, text in _lines(report).items():
            console.print(f"  {name:<11}{text}", highlight=False, soft_wrap=True)
    for text in report["problems"]:
        console.print(f"[red]cannot run[/]: {text}")
    for text in report["advice"]:
        console.print(f"[yellow]better[/]: {text}")
    console.print("[red]refused[/]" if report["problems"] else "[green]can run[/]")


def _print_memory(report: dict[str, Any], console: Console) -> None:
    from rich import box
    from rich.table import Table

    from rcmae.planning.estimates import RESERVED

    table = Table(
        title=f"GiB of a GPU at the highest moment of a step, {report['sizes']['per_device']} "
        f"images at once, {report['precision']};\n{report['site']['gpu_bytes'] / GIB:.1f} are "
        f"there, {RESERVED / GIB:g} for CUDA and NCCL; right: with activations recomputed",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    kinds = ("weights", "gradients", "moments", "teacher", "communication", "activations")
    short = ("weights", "grads", "moments", "teacher", "comm.", "activ.")
    for name in ("engine", *short, "needed", "batch <=", "recomp.", "batch <="):
        table.add_column(name, justify="left" if name == "engine" else "right", no_wrap=True)
    for row in report["memory"]:
        kept = row["kept"]
        again = row["recomputed"]
        table.add_row(
            row["engine"] + (" *" if row["own"] else ""),
            *(f"{kept['at_peak'][kind] / GIB:.2f}" for kind in kinds),
            _needed(kept),
            str(kept["largest_per_device"] or "-"),
            _needed(again),
            str(again["largest_per_device"] or "-"),
        )
    console.print(table)


def _needed(way: dict[str, Any]) -> str:
    colour = "green" if way["fits"] else "red"
    return f"[{colour}]{way['needed'] / GIB:.1f}[/]"


def _lines(report: dict[str, Any]) -> dict[str, str]:
    """A line of text for each section of the report but the memory."""
    sizes = report["sizes"]
    rate = report["speed"]
    saved = report["checkpoint"]
    return {
        "batch": f"{sizes['images_per_step']} images = {counted(sizes['world'], 'rank')} x "
        f"{sizes['accumulation']} x {sizes['per_device']}; {sizes['total_steps']} steps, "
        f"{sizes['steps_per_epoch']} an epoch",
        "speed": _speed(rate),
        "time": f"{rate['hours_from']}: {_duration(rate['step_s'])} a step, "
        f"{_duration(rate['hours'] * 3600)}, "
        f"{rate['hours'] * report['site']['world']:,.{0 if rate['hours'] > 1 else 2}f} GPU hours",
        "decoding": _decoding(report["data"]),
        "shards": _shards(report),
        "checkpoint": f"{saved['bytes'] / 1e9:.2f} GB in {saved['seconds']:.1f} s "
        f"({saved['seconds_from']}), every {_duration(saved['every_minutes'] * 60)}; "
        f"{saved['disk_bytes'] / 1e9:.1f} GB of disk, "
        f"{saved['host_bytes_per_node'] / 1e9:.1f} GB of a node's memory",
    }


def _speed(rate: dict[str, Any]) -> str:
    """How fast, and why."""
    how = f"{rate['utilisation']:.0%} of {rate['peak_flops'] / 1e12:.0f} TFLOP/s ({_source(rate)})"
    if rate["launching"]:
        how = "the least that launching kernels takes a host (stated): the network is small"
    return (
        f"{_amount(rate['forward_flops_per_image'])}FLOP an image forward, "
        f"{_amount(rate['step_flops_per_image'])}FLOP of a step; "
        f"{rate['images_per_s']:,.0f} images/s ({rate['images_per_s_per_gpu']:,.0f} a GPU) at {how}"
    )


def _source(rate: dict[str, Any]) -> str:
    """Where a utilisation is from."""
    source = rate["utilisation_from"]
    return f"measured, {source}" if rate["hours_from"] == "measured" else source


def _amount(number: float) -> str:
    """A count with its unit: 329 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    """A time with the unit that it is read in."""
    if seconds == math.inf:
        return "never"
    for unit, size in (("hours", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= size:
            return f"{seconds / size:.{2 if unit == 's' else 1}f} {unit}"
    return f"{seconds * 1000:.0f} ms"


def _decoding(data: dict[str, Any]) -> str:
    there = f" of {data['cores']}" if data["cores"] else ""
    needed = counted(data["cores_needed"], "core")
    return (
        f"{needed} of a node{there}, {counted(data['workers_needed'], 'worker')} a rank "
        f"(data.workers={data['workers']}), at {data['decode_per_core']:.0f} images/s a core "
        f"({data['decode_from']}); {data['shared_bytes_per_node'] / 1e9:.2f} GB of /dev/shm"
    )


def _shards(report: dict[str, Any]) -> str:
    data = report["data"]
    streams = f"{data['streams_per_rank']} of {data['streams']} streams"
    if "shards" not in data:
        return (
            f"{report['shards']}; {data['samples_per_epoch']:,} samples an epoch are taken; "
            f"{streams} a rank"
        )
    return (
        f"{data['shards']} with {data['samples']:,} samples, {data['bytes'] / 1e9:.1f} GB; a rank "
        f"reads {streams}, {data['shards_read_at_once_per_rank']} shards at once, a node "
        f"{data['open_bytes_per_node'] / 1e9:.2f} GB of them"
    )


TITLES = (
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


def markdown(recipe: Recipe, kinds: Sequence[str], gpus: int, measured: str | None = None) -> str:
    """A table of the recipe on each kind of GPU and each of TABLE_NODES."""
    from rcmae.planning.planner import plan

    rows = [list(TITLES), ["---"] * len(TITLES)]
    for kind in kinds:
        for nodes in TABLE_NODES:
            report = plan(recipe, Site(nodes=nodes, gpus=gpus, gpu=kind, measured=measured))
            rows.append(_markdown_row(report))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _markdown_row(report: dict[str, Any]) -> list[str]:
    site = report["site"]
    cells = [str(site["world"]), site["gpu"], report["engine"]]
    if report["problems"]:
        empty = [""] * (len(TITLES) - len(cells) - 1)
        return [*cells, "; ".join(report["problems"]), *empty]
    own = next(row for row in report["memory"] if row["own"])
    way = own["kept" if report["activation_checkpointing"] == "none" else "recomputed"]
    sizes = report["sizes"]
    rate = report["speed"]
    return [
        *cells,
        f"{way['needed'] / GIB:.1f} of {site['gpu_bytes'] / GIB:.1f}",
        f"{sizes['per_device']} x {sizes['accumulation']}",
        f"{way['largest_per_device']} ({own['recomputed']['largest_per_device']})",
        f"{rate['images_per_s']:,.0f}",
        f"{rate['step_s']:.2f}",
        f"{rate['hours']:.1f}",
        f"{rate['hours'] * site['world']:,.0f}",
        str(report["data"]["cores_needed"]),
        f"{report['checkpoint']['bytes'] / 1e9:.2f}",
    ]
