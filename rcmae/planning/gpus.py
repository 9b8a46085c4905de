"""A node's GPUs as their driver reports them: whether torch can use them, and whether they are
healthy and free.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator

import torch

from rcmae.config import Recipe
from rcmae.planning.findings import Finding

_QUERY = (
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.hw_slowdown",
    "temperature.gpu",
    "compute_cap",
    "compute_mode",
)
_HOT = 88  # degrees Celsius


def read_gpus() -> list[dict[str, str]] | str:
    """This node's GPUs as the driver reports them, or why it does not.

    To be called before CUDA is in use here.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except FileNotFoundError:
        return []
    except subprocess.CalledProcessError as error:
        return f"nvidia-smi failed: {(error.stdout or error.stderr).strip()[:200]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi did not answer: {error}"
    rows = []
    for line in done.stdout.splitlines():
        cells = map(str.strip, line.split(","))
        rows.append(dict(zip(_QUERY, cells, strict=False)))
    return rows


def gpus_asked_for(given: int | None) -> int:
    """How many GPUs this process should see: as given, else what the scheduler says."""
    if given is not None:
        return given
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([each for each in visible.split(",") if each.strip() not in ("", "-1")])
    for key in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"):
        if count := re.search(r"\d+$", os.environ.get(key, "")):
            return int(count.group())
    return 0


def check_gpus(
    rows: list[dict[str, str]] | str, asked: int, recipe: Recipe | None
) -> Iterator[Finding]:
    """That torch can use the GPUs that are there, and that they are well and free.

    Args:
        rows: of `read_gpus`.
        asked: GPUs that this process should see.
        recipe: of the run, if one is known.
    """
    if isinstance(rows, str):
        yield Finding("driver", "red", rows, "drain the node, or restart its driver")
        return
    yield _usable(rows, asked)
    for number, row in enumerate(rows):
        yield from check_gpu(f"GPU {number}", row, recipe)


def _usable(rows: list[dict[str, str]], asked: int) -> Finding:
    there = max(asked, len(rows))
    if torch.version.cuda is None and there:
        return Finding(
            "GPUs",
            "red",
            f"torch {torch.__version__} is a CPU build beside {there} GPUs",
            "install the CUDA build of the same version of torch",
        )
    if not there:
        return Finding("GPUs", "green", "none here and none asked for: CPU")
    if not torch.cuda.is_available():
        driver = rows[0]["driver_version"] if rows else "none found"
        return Finding(
            "GPUs",
            "red",
            f"torch cannot use the GPUs (its CUDA {torch.version.cuda}, driver {driver})",
            "a newer driver, or a torch of an older CUDA; in a container: pass the GPUs in "
            "(--nv, --gpus)",
        )
    count = torch.cuda.device_count()
    if count < asked:
        return Finding(
            "GPUs",
            "red",
            f"{count} of {asked} GPUs can be seen",
            "ask the scheduler for them (--gres, --gpus-per-node); look at CUDA_VISIBLE_DEVICES",
        )
    return Finding("GPUs", "green", f"{count} x {torch.cuda.get_device_name()}")


def check_gpu(name: str, row: dict[str, str], recipe: Recipe | None) -> Iterator[Finding]:
    """One GPU by what the driver reports."""
    used = _number(row, "memory.used") / 1024  # GiB
    total = _number(row, "memory.total") / 1024
    problems = [
        *_taken(name, used, total),
        *_ill(name, row),
        *_hot(name, row),
        *_unsuited(name, row, recipe),
    ]
    yield from problems or [
        Finding(name, "green", f"{row.get('name')}, {used:.1f} of {total:.0f} GiB in use")
    ]


def _number(row: dict[str, str], key: str) -> float:
    try:
        return float(row.get(key, ""))
    except ValueError:  # [N/A], on GPUs that do not have it
        return 0.0


def _taken(name: str, used: float, total: float) -> Iterator[Finding]:
    if used > max(1.0, 0.02 * total):
        yield Finding(
            name,
            "red" if used > 0.1 * total else "yellow",
            f"{used:.1f} of {total:.0f} GiB are taken by others",
            "end their processes (nvidia-smi)",
        )


def _ill(name: str, row: dict[str, str]) -> Iterator[Finding]:
    if errors := _number(row, "ecc.errors.uncorrected.volatile.total"):
        found = f"{errors:.0f} uncorrected memory errors"
        yield Finding(name, "red", found, "drain the node, reset the GPU")


def _hot(name: str, row: dict[str, str]) -> Iterator[Finding]:
    if row.get("clocks_throttle_reasons.hw_slowdown") == "Active":
        found = f"the hardware slows it down, at {row['temperature.gpu']} C"
        yield Finding(name, "yellow", found, "look at cooling and power")
    elif _number(row, "temperature.gpu") >= _HOT:
        yield Finding(name, "yellow", f"{row['temperature.gpu']} C", "look at cooling")


def _unsuited(name: str, row: dict[str, str], recipe: Recipe | None) -> Iterator[Finding]:
    if row.get("compute_mode") == "Prohibited":
        found = "its compute mode is Prohibited"
        yield Finding(name, "red", found, "nvidia-smi -c DEFAULT, as root")
    if 0 < _number(row, "compute_cap") < 8.0:
        needs_bf16 = recipe is not None and recipe.engine.precision == "bf16"
        yield Finding(
            name,
            "red" if needs_bf16 else "yellow",
            f"{row['name']} has no bf16",
            "engine.precision=fp32, or other GPUs",
        )
