#!/usr/bin/env python3
"""What tools/gpu_day.py measures, in a process of its own: a JSON list of cases in, a line of JSON
for each out.

    python tools/gpu_cases.py '[{"name": ..., "kind": ..., ...}]' [--tiny]

Predictions are those of `rcmae plan`, from the same formulas. On a CPU, and with --tiny, networks
are of two narrow blocks: what is shown is that everything runs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import bench_memory
import bench_step
import numpy as np
import torch
from PIL import Image

from rcmae import config, dist
from rcmae.config import Recipe
from rcmae.data.packing.writer import PackingOptions, make_shards
from rcmae.engines.build import make_engine
from rcmae.models.build import new_student, new_teacher
from rcmae.models.cost import StepCost
from rcmae.models.precision import bf16_of
from rcmae.models.tuning import attention, compiling
from rcmae.objectives import make_objective
from rcmae.planning import planner
from rcmae.planning.estimates import cost_of, placement, speed, variant_of
from rcmae.planning.hardware import GPUS, peak_flops
from rcmae.planning.live import made_up_batch, measure
from rcmae.planning.site import UTILISATION, Site
from rcmae.run.build import choose_attention
from rcmae.run.preempt import REFUSED

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    *("model.image_size=32", "model.patch_size=8", "model.embed_dim=16", "model.depth=2"),
    *("model.num_heads=2", "model.decoder_dim=16", "model.decoder_depth=2"),
    "model.decoder_heads=2",
]
PHASES = ("forward", "backward", "optimizer", "teacher")
ENGINES = {
    "local": ("engine.name=local",),
    "ddp": ("engine.name=ddp",),
    "fsdp2": ("engine.name=fsdp2",),
    **{
        f"zero{stage}": ("engine.name=deepspeed", f"engine.config=zero{stage}.json")
        for stage in (1, 2, 3)
    },
}
FEW = 2  # images of a step whose kernels take no time: what is left is the host's part
# the shapes of ViT-S to H: queries, keys, heads, width of a head
SHAPES = (
    *((tokens, tokens, heads, 64) for heads in (6, 12, 16) for tokens in (50, 197)),
    *((tokens, tokens, 16, 32) for tokens in (197, 257)),
    (147, 197, 16, 32),
    *((tokens, tokens, 16, 80) for tokens in (65, 257)),
)
PHOTOGRAPHS = (375, 500)  # pixels
PROGRAM_S = 400  # of a program beside this process
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


# -------------------------------------------------------------------------------------------- steps


def recipe_of(case: dict[str, Any], tiny: bool, images: int | None = None) -> Recipe:
    """The recipe of a step on one rank."""
    images = images or case["images"]
    words = ["data.shards=none.tar", f"objective.name={case.get('objective', 'rcmae')}"]
    words += [f"batch.images={images}", f"batch.per_device={images}", *ENGINES[case["engine"]]]
    words += ["engine.activation_checkpointing=none", f"engine.compile={case['compile']}"]
    recipe = planner.load(case["recipe"], [*words, *(TINY if tiny else ())])
    return config.with_precision(recipe, bf16_of(dist.device()).units)


class Step:
    """A training step of a recipe on noise, its phases timed."""

    def __init__(self, recipe: Recipe) -> None:
        sizes = config.resolve(recipe, world=1, samples_per_epoch=recipe.batch.images)
        engine_config: dict[str, Any] = {}
        if recipe.engine.name == "deepspeed":
            from rcmae.engines.deepspeed_config import read_config

            engine_config = read_config(recipe.engine.config or "")
        self._objective = make_objective(recipe, sizes)
        student = new_student(recipe)
        self._has_teacher = bool(self._objective.teacher_outputs)
        teacher = new_teacher(student, self._objective.teacher_outputs)
        if dist.device().type == "cuda":  # as a training
            choose_attention(recipe, sizes, self._objective, student, teacher)
        self._batch = made_up_batch(student, recipe.batch.images, dist.device())
        self._counts = self._objective.counts(self._batch)
        self._engine = make_engine(recipe, sizes, student, teacher, engine_config)

    def __call__(self, watch: bench_step.Watch) -> None:
        """One step."""
        engine, objective = self._engine, self._objective
        with watch.phase("forward"):
            sums = objective(engine.student, engine.teacher, self._batch, 0.5)
            shares = [
                weight * sums[term] / max(self._counts[term], 1)
                for term, weight in objective.weights.items()
            ]
            loss = torch.stack(shares).sum()
        with watch.phase("backward"):
            engine.backward(loss, last=True)
        with watch.phase("optimizer"):
            engine.step(lr=1e-4, weight_decay=0.05)
        if self._has_teacher:
            with watch.phase("teacher"):
                engine.update_teacher(0.99)


def rounds_of(step: Step, count: int, warmup: int) -> list[dict[str, float]]:
    """Seconds of the phases of so many steps, and of each whole."""
    watch = bench_step.Stopwatch(dist.device())
    rows = []
    for number in range(-warmup, count):
        with watch.phase("step"):
            step(watch)
        row = watch.read()
        if number >= 0:
            rows.append(row)
    return rows


def measure_step(case: dict[str, Any], tiny: bool) -> dict[str, Any]:
    """A step: time, phases, kernels' and host's part, memory, and what `rcmae plan` says."""
    recipe = recipe_of(case, tiny)
    cuda = dist.device().type == "cuda"
    count, warmup = (2, 1) if tiny else (20, 5)
    began = time.perf_counter()
    step = Step(recipe)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    step(bench_step.NoWatch())
    bench_step.Stopwatch(dist.device()).read()  # waits
    first_s = time.perf_counter() - began  # with what is compiled
    rows = rounds_of(step, count, warmup)
    peak_bytes = torch.cuda.max_memory_allocated() if cuda else None
    not_measured: dict[str, str] = {}  # and why: a step's time is worth having without the rest
    kernels_s = None
    with noting(not_measured, "kernels"):
        kernels_s = kernel_seconds(step, 1 if tiny else 3)
    host_s = None
    with noting(not_measured, "host"):
        if case["images"] != FEW:
            del step
            gc.collect()
            step = Step(recipe_of(case, tiny, FEW))
        host = rounds_of(step, count, warmup)
        host_s = statistics.median(row["step"] for row in host)
    seconds = statistics.median(row["step"] for row in rows)
    told: dict[str, Any] = {}
    with noting(not_measured, "plan"):
        told = against_plan(recipe, seconds)
    return {
        "step_s": bench_step.spread([row["step"] for row in rows]),
        "phases_s": {
            name: statistics.median(row[name] for row in rows) for name in PHASES if name in rows[0]
        },
        "images_per_s": recipe.batch.images / seconds,
        "kernels_s": kernels_s,
        "host_s": host_s,
        "first_step_s": first_s,
        "peak_bytes": peak_bytes,
        "attention": attention.told(),
        "news": compiling.drain_news(),  # blocks that were not compiled after all
        "not_measured": not_measured,
        **told,
    }


@contextlib.contextmanager
def noting(failures: dict[str, str], what: str) -> Iterator[None]:
    """Note what ends with an exception inside, and go on."""
    try:
        yield
    except Exception:
        failures[what] = traceback.format_exc()[-1500:]


def kernel_seconds(step: Step, count: int) -> float:
    """Of a step: its kernels' own time, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    cuda = dist.device().type == "cuda"
    kind = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[kind]) as found:
        for _ in range(count):
            step(bench_step.NoWatch())
        bench_step.Stopwatch(dist.device()).read()  # waits
    which = "self_device_time_total" if cuda else "self_cpu_time_total"
    seconds = float(sum(getattr(row, which) for row in found.key_averages())) / 1e6 / count
    if not seconds:  # where CUPTI may not be used
        raise RuntimeError("torch's profiler saw no kernels")
    return seconds


def device_name() -> str:
    """As torch tells it; empty on a CPU."""
    return torch.cuda.get_device_name() if dist.device().type == "cuda" else ""


def against_plan(recipe: Recipe, seconds: float) -> dict[str, Any]:
    """Utilisation and the recipe's hours, beside what `rcmae plan` computes.

    `mfu` is None where the device's peak is not known; `told` and `hours_over_told` are where it is
    none of those that `rcmae plan` knows.
    """
    images = recipe.batch.images
    cost = cost_of(recipe)
    rate = images / seconds
    precision, tf32 = recipe.engine.precision, recipe.engine.tf32
    peak = peak_flops(device_name(), precision, tf32=tf32)
    told = told_by_plan(recipe, cost)
    return {
        "flops_per_s": rate * cost.step_flops,
        "mfu": rate * cost.step_flops / peak if peak else None,
        "of": {  # what `rcmae plan` finds it by
            "model": recipe.model.name,
            "variant": variant_of(recipe),
            "placement": placement(recipe),
            "step_flops": cost.step_flops,
        },
        "told": told,
        "hours_over_told": told["images_per_s"] / rate if told else None,
    }


def told_by_plan(recipe: Recipe, cost: StepCost) -> dict[str, Any] | None:
    """What `rcmae plan` computes for this GPU; None where it does not know it."""
    gpu = next((key for key, gpu in GPUS.items() if gpu.device_name == device_name()), None)
    if gpu is None:
        return None
    sizes = config.resolve(recipe, world=1, samples_per_epoch=recipe.batch.images)
    # what it computes without this very file
    told = speed(recipe, cost, sizes, Site(nodes=1, gpus=1, gpu=gpu, utilisation=UTILISATION))
    return {
        "gpu": gpu,
        "utilisation": told["utilisation"],
        "from": told["utilisation_from"],
        "images_per_s": told["images_per_s_per_gpu"],
        "step_s": told["step_s"],
    }


def measure_memory(case: dict[str, Any], tiny: bool) -> dict[str, Any]:
    """Bytes when all is built and at the height of a step, told and measured."""
    recipe = recipe_of(case, tiny)
    return bench_memory.compare(recipe, [measure(recipe)])


# ----------------------------------------------------------------------------------------- ceilings


def measure_ceilings(case: dict[str, Any], tiny: bool) -> dict[str, Any]:
    """Large products, copies within the device and to it from pinned memory."""
    device = dist.device()
    watch = bench_step.Stopwatch(device)
    found: dict[str, Any] = {"products_flops_per_s": {}, "told_peak_flops_per_s": {}}
    for precision in ("bf16", "fp32"):
        for side in (64,) if tiny else (4096, 8192, 16384):
            product = functools.partial(
                bench_step.matrix_product_rate, precision, device, side, watch
            )
            found["products_flops_per_s"][f"{precision} {side}"] = max(product() for _ in range(5))
        found["told_peak_flops_per_s"][precision] = peak_flops(device_name(), precision)
    size = 2**20 if tiny else 2**31
    found["copy_bytes_per_s"] = 2 * copy_rate(size, device, device)  # read and written
    found["upload_bytes_per_s"] = copy_rate(size // 8, torch.device("cpu"), device)
    return found


def copy_rate(size: int, source: torch.device, target: torch.device) -> float:
    """Bytes/s of the fastest of five copies."""
    pinned = source.type == "cpu" and target.type == "cuda"
    here = torch.empty(size, dtype=torch.uint8, device=source, pin_memory=pinned)
    there = torch.empty(size, dtype=torch.uint8, device=target)
    watch = bench_step.Stopwatch(target)
    seconds = []
    for _ in range(6):
        with watch.phase("copy"):
            there.copy_(here, non_blocking=True)
        seconds.append(watch.read()["copy"])
    return size / min(seconds[1:])


def measure_attention(case: dict[str, Any], tiny: bool) -> dict[str, Any]:
    """Milliseconds of a forward and a backward pass by each kernel and shape."""
    batch, device = case["images"], dist.device()
    attention.leave_out_cudnn()  # torch's own choice is that of a training; it is timed by name
    rounds, each = (1, 1) if tiny else (5, 10)

    def timer(shape: attention.Shape, name: str) -> float | None:
        return attention.milliseconds(
            shape, name, batch=batch, device=device, rounds=rounds, each=each
        )

    found = {}
    for numbers in SHAPES[:2] if tiny else SHAPES:
        shape = attention.Shape(*numbers, "bfloat16" if bf16_of(device).units else "float32")
        timed = attention.fastest(shape, timer)
        flops = 3.5 * 4 * batch * shape.heads * shape.queries * shape.keys * shape.head_dim
        rates = {name: flops / ms * 1e3 for name, ms in timed.ms.items() if ms}
        found[str(shape)] = {**timed._asdict(), "flops_per_s": rates}
    return {"images": batch, "shapes": found}


# ------------------------------------------------------------------------------------------- shards


def photographs(count: int) -> Iterator[tuple[str, bytes]]:
    """Names and JPEGs of about 60 kB: noise at several scales, as photographs compress."""
    draw = np.random.default_rng(0)
    height, width = PHOTOGRAPHS
    for number in range(count):
        layers = np.zeros((height, width, 3), dtype=np.float32)
        for side, strength in ((4, 60.0), (32, 30.0), (128, 12.0)):
            small = draw.normal(size=(side, side, 3)).astype(np.float32)
            planes = [
                np.asarray(Image.fromarray(small[:, :, channel]).resize((width, height)))
                for channel in range(3)
            ]
            layers += strength * np.stack(planes, axis=2)
        file = io.BytesIO()
        pixels = (layers + 128).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        yield f"{number:06d}", file.getvalue()


def write_photographs(folder: Path, count: int) -> str:
    """Shards of `photographs`, each drawn photograph several times; their pattern."""
    pictures = folder / "pictures"
    pictures.mkdir()
    drawn = list(photographs(min(count, 256)))
    for number in range(count):
        (pictures / f"{number:06d}.jpg").write_bytes(drawn[number % len(drawn)][1])
    (folder / "shards").mkdir()
    with contextlib.redirect_stdout(sys.stderr):
        make_shards(pictures, folder / "shards", PackingOptions(name="train"))
    return str(folder / "shards" / "train-*.tar")


def measure_shards(case: dict[str, Any], tiny: bool) -> dict[str, Any]:
    """Images/s of a training from shards on a disk, by its own log, beside a step on noise."""
    steps = 4 if tiny else 80
    images = case["images"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pattern = write_photographs(folder, max(8 * images, 16 if tiny else 4096))
        words = [f"data.shards={pattern}", f"batch.images={images}"]
        words += [
            f"batch.per_device={images}",
            f"schedule.steps={steps}",
            "schedule.warmup_steps=1",
        ]
        words += ["log.every_steps=2", "log.report=false", "log.tensorboard=false"]
        words += ["checkpoint.every_steps=1000", f"run.dir={folder / 'run'}"]
        compiles = case["compile"] and not tiny
        words += [f"engine.compile={compiles}", *ENGINES[case["engine"]]]
        words += TINY if tiny else []
        command = [sys.executable, "-m", "rcmae.train", case["recipe"], *words]
        # a container may have little shared memory: then with fewer workers
        for workers in (0,) if tiny else (len(os.sched_getaffinity(0)) - 1, 4, 1, 0):
            status, _, errors = alone([*command, f"data.workers={workers}"])
            if status != REFUSED or "shared memory" not in errors:
                break
        if status:
            raise RuntimeError(f"the training ended with {status}\n{errors[-2000:]}")
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines][-max(1, steps // 4) :]
    step = Step(recipe_of(case, tiny))
    noise = rounds_of(step, 2 if tiny else 20, 1 if tiny else 5)
    synthetic = images / statistics.median(row["step"] for row in noise)
    rate = statistics.median(row["images_per_s"] for row in rows)
    return {
        "images_per_s": rate,
        "synthetic_images_per_s": synthetic,
        "share_of_synthetic": rate / synthetic,
        "data_wait_s": statistics.median(row["data_wait_s"] for row in rows),
        "workers": workers,
    }


def measure_tests(case: dict[str, Any], tiny: bool) -> dict[str, Any]:
    """The tests that need a GPU."""
    marked = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        if "pytest.mark.gpu" in path.read_text():
            marked.append(str(path))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["--collect-only"] if tiny else []
    status, output, errors = alone([*command, *marked])
    told = output.strip().splitlines()
    if status:
        # how many failed comes last, where a report looks
        raise RuntimeError("\n".join([errors[-1000:], *told[-40:]]))
    skipped = [line for line in told if line.startswith("SKIPPED")]
    return {"files": [Path(path).name for path in marked], "told": told[-1], "skipped": skipped}


def alone(command: Sequence[str]) -> tuple[int, str, str]:
    """A program beside this process, which is no rank of it: its status and what it said."""
    env = {key: value for key, value in os.environ.items() if key not in OF_RANKS}
    child = subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        output, errors = child.communicate(timeout=PROGRAM_S)
    except subprocess.TimeoutExpired:
        child.kill()
        output, errors = child.communicate()
        raise RuntimeError(f"over {PROGRAM_S} s\n{output[-1500:]}\n{errors[-1000:]}") from None
    return child.returncode, output, errors


# ------------------------------------------------------------------------------------------ process


def out_of_memory(case: dict[str, Any], error: Exception) -> dict[str, Any]:
    """That a case does not fit, and how far it came."""
    return {
        "out_of_memory": str(error).strip().splitlines()[0],
        "images": case.get("images"),
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


KINDS: dict[str, Callable[[dict[str, Any], bool], dict[str, Any]]] = {
    "ceilings": measure_ceilings,
    "attention": measure_attention,
    "step": measure_step,
    "memory": measure_memory,
    "shards": measure_shards,
    "tests": measure_tests,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure each case and print a line for it; a case that fails says why in its line."""
    parser = argparse.ArgumentParser(prog="tools/gpu_cases.py")
    parser.add_argument("cases", type=json.loads)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args(argv)
    if asked.tiny:
        torch.set_num_threads(1)
        quick = functools.partial(torch.compile, backend="eager")  # without minutes of C++
        torch.compile = cast(Any, quick)
    dist.start(required=True)
    for case in asked.cases:
        began = time.perf_counter()
        row: dict[str, Any] = {"name": case["name"]}
        try:
            row["result"] = KINDS[case["kind"]](case, asked.tiny)
        except torch.OutOfMemoryError as error:  # an answer, not a failure
            row["result"] = out_of_memory(case, error)
        except Exception:  # whatever a case ends with, the others are measured
            row["error"] = traceback.format_exc()[-3000:]
        gc.collect()
        row["seconds"] = time.perf_counter() - began
        print("CASE " + json.dumps(row), flush=True)
    dist.finish()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
