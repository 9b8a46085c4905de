#!/usr/bin/env python3
"""What an engine costs the host: processor time of a training step of a network of real depth whose
kernels cost almost nothing.

    python tools/bench_host.py [--models M ...] [--engines E ...] [--ranks N ...] [--profile [ROWS]]
        [--json [FILE]]

A GPU is fed by its host: a step cannot be faster than what Python, autograd, hooks and launches
take, however fast the device. Here the network has all its blocks and parameters, but a width of 16
and images of 16 patches, and computes on the CPU, so that little is left but the host's part.
Buckets and thresholds that count elements are made smaller as the network is: there are as many
buckets and as many gathers as at the real width. What a launch on a GPU costs beyond that of a
kernel on a CPU is not in it, and gloo's work is in it where NCCL would leave it to the device.

Each case runs in processes of its own, one thread each, in turns, round after round. Milliseconds
are those that a rank's process computed (`time.process_time`), so that waiting does not count, and
work of others on the machine little; they are medians over the steps of all rounds, of the rank
that took most. `--profile` runs each case once more under cProfile and lists the functions of rank
0 with the most time of their own; a step takes longer there, as each call costs more.

Exit status: 0 done; 2 unusable input.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import itertools
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ENGINES = ("local", "ddp", "ddp-sharded", "zero1", "zero2", "zero3", "fsdp2")
MODELS = ("vit_large_patch16", "vit_huge_patch14")
PHASES = ("forward", "backward", "update", "teacher")
WIDTH = 16
GRID = 4  # patches across
PATCH = 4  # pixels across
BATCH = 2
PROFILED = 20  # functions that a profile lists


@dataclass(frozen=True)
class Case:
    """One thing that is measured."""

    model: str
    engine: str  # one of ENGINES, or a DeepSpeed JSON
    objective: str
    precision: str
    ranks: int

    def __str__(self) -> str:
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{self.model} {self.objective} {self.engine} {self.precision}, {ranks}"


# ------------------------------------------------------------------------------------- in a process


def narrow(model: str) -> tuple[dict[str, Any], float]:
    """Sizes of the narrow network, and its parameters over those of the real one."""
    import torch

    from rcmae.models.sizes import ARCHITECTURES, NetworkSizes
    from rcmae.models.vit import MaskedAutoencoder

    real: dict[str, Any] = {**ARCHITECTURES[model], "image_size": (224, 224), "in_channels": 3}
    small = real | {"embed_dim": WIDTH, "decoder_dim": WIDTH, "patch_size": PATCH}
    small |= {"image_size": (GRID * PATCH,) * 2, "num_heads": 4, "decoder_heads": 4}
    counts = []
    with torch.device("meta"):
        for sizes in (small, real):
            network = MaskedAutoencoder(NetworkSizes(**sizes))
            counts.append(sum(param.numel() for param in network.parameters()))
    return small, counts[0] / counts[1]


def narrow_json(name: str, share: float) -> dict[str, Any]:
    """A DeepSpeed JSON whose numbers of elements are made smaller as the network is."""
    from rcmae.engines.deepspeed_config import read_config

    found = read_config(name)
    zero = dict(found.get("zero_optimization", {}))
    for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
        if key in zero:
            zero[key] = 2 * max(1, round(zero[key] * share / 2))  # it wants it even
    if "stage3_param_persistence_threshold" in zero:
        # between the biases and the matrices, as at the real width
        zero["stage3_param_persistence_threshold"] = WIDTH * WIDTH - 1
    return found | {"zero_optimization": zero}


def make_engine(case: Case) -> Any:
    """The engine of a case, around a narrow student and, for rcmae, its teacher."""
    from rcmae.engines.protocol import EngineSettings
    from rcmae.models.sizes import NetworkSizes
    from rcmae.models.vit import MaskedAutoencoder

    sizes, share = narrow(case.model)
    student = MaskedAutoencoder(NetworkSizes(**sizes))
    teacher = copy.deepcopy(student) if case.objective == "rcmae" else None
    settings = EngineSettings(precision=case.precision, per_device=BATCH)
    if case.engine == "local":
        from rcmae.engines.local import LocalEngine

        return LocalEngine(student, teacher, settings)
    if case.engine in ("ddp", "ddp-sharded"):
        from rcmae.engines.ddp import BUCKET_MB, DDPEngine

        shards = case.ranks if case.engine == "ddp-sharded" else 1
        return DDPEngine(student, teacher, settings, shards=shards, bucket_mb=BUCKET_MB * share)
    if case.engine == "fsdp2":
        from rcmae.engines.fsdp2 import FSDP2Engine

        return FSDP2Engine(student, teacher, settings)
    from rcmae.engines.deepspeed import DeepSpeedEngine

    config = narrow_json(case.engine, share)
    return DeepSpeedEngine(student, teacher, settings, config=config)


def measure(
    case: Case, *, steps: int, warmup: int, warm: Callable[[], object] = lambda: None
) -> list[dict[str, float]]:
    """Processor-ms of each phase of each step on this rank. Collective: every rank calls.

    Args:
        case: what is measured.
        steps: that are counted.
        warmup: before them.
        warm: called between both.
    """
    import torch

    from rcmae import dist
    from rcmae.objectives import new
    from rcmae.planning.live import made_up_batch

    engine = make_engine(case)
    objective = new(case.objective)
    network = getattr(engine.student, "module", engine.student)
    batch = made_up_batch(network, BATCH, torch.device("cpu"))
    counts = objective.counts(batch)
    rows = []
    for step in range(-warmup, steps):
        if step == 0:
            warm()
        marks = [time.process_time()]
        sums = objective(engine.student, engine.teacher, batch, 0.0)
        shares = [
            objective.weights[term] * total / (counts[term] * dist.world())
            for term, total in sums.items()
        ]
        loss = torch.stack(shares).sum()
        marks.append(time.process_time())
        engine.backward(loss, last=True)
        del sums, shares, loss
        marks.append(time.process_time())
        engine.step(lr=1e-4, weight_decay=0.05)
        marks.append(time.process_time())
        engine.update_teacher(0.99)
        marks.append(time.process_time())
        if step >= 0:
            spans = [1e3 * (end - begin) for begin, end in itertools.pairwise(marks)]
            rows.append(dict(zip(PHASES, spans, strict=True)))
    return rows


def profiled(case: Case, *, steps: int, warmup: int) -> list[dict[str, Any]]:
    """Where the processor time of the counted steps goes, a function a row, on this rank: that with
    the most time of its own first; of a step. Collective: every rank calls.
    """
    profile = cProfile.Profile(time.process_time)
    measure(case, steps=steps, warmup=warmup, warm=profile.enable)
    profile.disable()
    rows = []
    for entry in profile.getstats():
        code = entry.code
        where = code if isinstance(code, str) else place_of(code)
        times = {"own_ms": entry.inlinetime, "whole_ms": entry.totaltime}
        per_step = {key: 1e3 * seconds / steps for key, seconds in times.items()}
        rows.append({"function": where, "calls": entry.callcount / steps, **per_step})
    return sorted(rows, key=lambda row: -row["own_ms"])


def place_of(code: types.CodeType) -> str:
    """A Python function, as "torch/optim/optimizer.py:490 wrapper"."""
    file = "/".join(Path(code.co_filename).parts[-3:])
    return f"{file}:{code.co_firstlineno} {code.co_qualname}"


def run_rank(told: str) -> int:
    """A rank of a case; rank 0 prints all ranks' rows."""
    import gc

    import torch

    from rcmae import dist

    asked = json.loads(told)
    torch.set_num_threads(1)
    dist.start(required=True, timeout_s=120)
    gc.disable()  # when it runs is chance
    look = profiled if asked["profile"] else measure
    rows = dist.gather(look(Case(**asked["case"]), **asked["how"]))
    gc.enable()
    if dist.rank() == 0:
        print("ROWS " + json.dumps(rows), flush=True)
    dist.finish()
    return 0


# ------------------------------------------------------------------------------------------- report


def rows_of_ranks(script: str, told: str, world: int, what: str, timeout_s: float) -> Any:
    """What rank 0 of so many processes of a script printed as `ROWS JSON`.

    Args:
        script: started on each with `--rank-of` and `told`.
        told: JSON of what it is to measure.
        world: ranks, on this machine, without a GPU.
        what: names it in errors.
        timeout_s: after which they are killed.

    Raises:
        RuntimeError: a rank failed, with what all said, or they were not done in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    shared = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    command = [sys.executable, str(Path(script).resolve()), "--rank-of", told]
    ranks = []
    for rank in range(world):
        env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    said = []
    try:
        for process in ranks:
            said.append(process.communicate(timeout=timeout_s)[0].decode(errors="replace"))
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{what}: not done within {timeout_s:.0f} s") from error
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    lines = [line for line in said[0].splitlines() if line.startswith("ROWS ")]
    if any(process.returncode for process in ranks) or not lines:
        statuses = [process.returncode for process in ranks]
        raise RuntimeError(f"{what}: a rank failed, {statuses}\n" + "\n".join(said))
    return json.loads(lines[0].removeprefix("ROWS "))


def run_case(case: Case, *, steps: int, warmup: int, timeout_s: float) -> list[dict[str, float]]:
    """Rows of the rank that took most, by the median of a step. Raises as `rows_of_ranks`."""
    how = {"steps": steps, "warmup": warmup}
    told = json.dumps({"case": asdict(case), "how": how, "profile": False})
    found: list[list[dict[str, float]]]
    found = rows_of_ranks(__file__, told, case.ranks, str(case), timeout_s)
    return max(found, key=lambda rows: statistics.median(sum(row.values()) for row in rows))


def profile_case(
    case: Case, most: int, *, steps: int, warmup: int, timeout_s: float
) -> list[dict[str, Any]]:
    """Rank 0's functions that took most of a step by themselves. Raises as `rows_of_ranks`."""
    how = {"steps": steps, "warmup": warmup}
    told = json.dumps({"case": asdict(case), "how": how, "profile": True})
    found: list[list[dict[str, Any]]]
    found = rows_of_ranks(__file__, told, case.ranks, f"profile of {case}", timeout_s)
    return found[0][:most]


def describe(case: Case, rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """A case's figures, processor-ms."""
    wholes = [sum(row.values()) for row in rows]
    low, middle, high = statistics.quantiles(wholes, n=4, method="inclusive")
    return {
        **asdict(case),
        "step_ms": {"median": middle, "q1": low, "q3": high, "min": min(wholes)},
        "phases_ms": {name: statistics.median(row[name] for row in rows) for name in PHASES},
        "steps": len(rows),
    }


def print_report(report: dict[str, Any]) -> None:
    """The figures as a table."""
    machine = report["hardware"]
    print(
        f"processor-ms of a step and a rank; {machine['cpu']}, torch {report['versions']['torch']}"
    )
    print(f"{'':<52}{'step':>8}  {'q1..q3':<16}{'  '.join(f'{name:>8}' for name in PHASES)}")
    for row in report["cases"]:
        case = Case(**{key: row[key] for key in Case.__dataclass_fields__})
        step = row["step_ms"]
        spread = f"{step['q1']:.1f}..{step['q3']:.1f}"
        phases = "  ".join(f"{row['phases_ms'][name]:8.1f}" for name in PHASES)
        print(f"{case!s:<52}{step['median']:8.1f}  {spread:<16}{phases}")
    for row in report["cases"]:
        if "profile" in row:
            case = Case(**{key: row[key] for key in Case.__dataclass_fields__})
            print_profile(str(case), row["profile"])


def print_profile(what: str, rows: Sequence[dict[str, Any]]) -> None:
    """The functions that took most, as a table."""
    print(f"\n{what}: processor-ms of a step under cProfile, rank 0\n")
    print(f"{'own':>8}  {'whole':>8}  {'calls':>8}  function")
    for row in rows:
        numbers = f"{row['own_ms']:8.2f}  {row['whole_ms']:8.2f}  {row['calls']:8,.0f}"
        print(f"{numbers}  {row['function']}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="tools/bench_host.py", description=(__doc__ or "").split("\n\n")[0]
    )
    from rcmae.models.sizes import ARCHITECTURES

    parser.add_argument(
        "--models",
        nargs="+",
        default=list(MODELS),
        metavar="NAME",
        help=f"of {', '.join(ARCHITECTURES)}; by default {' '.join(MODELS)}",
    )
    parser.add_argument(
        "--engines",
        nargs="+",
        default=list(ENGINES),
        metavar="ENGINE",
        help=f"{', '.join(ENGINES)}, or a DeepSpeed JSON; by default all of these",
    )
    parser.add_argument("--objectives", nargs="+", default=["rcmae"], choices=("mae", "rcmae"))
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1], metavar="N", help="(1)")
    parser.add_argument("--steps", type=int, default=20, help="of a round that are counted (20)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them (5)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each case (3)")
    parser.add_argument("--timeout-s", type=float, default=300, help="of a case and round (300)")
    parser.add_argument(
        "--profile",
        nargs="?",
        type=int,
        const=PROFILED,
        default=0,
        metavar="ROWS",
        help=f"list this many functions of each case that take most by themselves ({PROFILED})",
    )
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="to FILE, or printed")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.rank_of:
        return asked
    for name in ("steps", "warmup", "rounds"):
        if getattr(asked, name) < 1:
            parser.error(f"--{name}={getattr(asked, name)} must be at least 1")
    if asked.steps < 2:
        parser.error("--steps=1 has no spread; give more")
    if min(asked.ranks) < 1:
        parser.error(f"--ranks={min(asked.ranks)} must be at least 1")
    for name in asked.models:
        if name not in ARCHITECTURES:
            parser.error(f"no model {name!r}; there are {', '.join(ARCHITECTURES)}")
    for name in asked.engines:
        _check_engine(parser, name)
    return asked


def _check_engine(parser: argparse.ArgumentParser, name: str) -> None:
    if name in ENGINES:
        return
    from rcmae.engines.deepspeed_config import read_config
    from rcmae.errors import Refused

    try:
        read_config(name)
    except Refused as error:
        parser.error(f"no engine {name!r}; there are {', '.join(ENGINES)}; {error}")


def cases_of(asked: argparse.Namespace) -> list[Case]:
    """What is measured; one process has nothing to do for several."""
    cases = []
    for model, objective in itertools.product(asked.models, asked.objectives):
        for ranks, engine in itertools.product(asked.ranks, asked.engines):
            alone = (engine == "local" and ranks > 1) or (engine == "ddp-sharded" and ranks == 1)
            if not alone:
                cases.append(Case(model, engine, objective, asked.precision, ranks))
    return cases


def keep(report: dict[str, Any], file: str | None) -> None:
    """Write the report, where a file is asked for."""
    if file not in (None, "-"):
        Path(file).write_text(json.dumps(report, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    asked = arguments(argv)
    if asked.rank_of:
        return run_rank(asked.rank_of)
    import torch

    from rcmae.engines.ddp import BUCKET_MB
    from rcmae.planning.hardware import commit, hardware

    rows: dict[Case, list[dict[str, float]]] = {case: [] for case in cases_of(asked)}
    how = {"steps": asked.steps, "warmup": asked.warmup, "timeout_s": asked.timeout_s}
    words = sys.argv[1:] if argv is None else argv
    settings = {"width": WIDTH, "patches": GRID**2, "batch": BATCH, "bucket_mb": BUCKET_MB}
    report: dict[str, Any] = {
        "tool": "bench_host",
        "command": "python tools/bench_host.py " + " ".join(words),
        "commit": commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "hardware": hardware(torch.device("cpu")),
        "settings": settings,
    }
    for number in range(asked.rounds):
        for case, found in rows.items():
            print(f"round {number + 1}: {case}", file=sys.stderr, flush=True)
            found += run_case(case, **how)
        cases = [describe(case, found) for case, found in rows.items()]
        report |= {"rounds": number + 1, "cases": cases}
        keep(report, asked.json)  # whatever stops the next round
    for case, row in zip(rows, report["cases"] if asked.profile else (), strict=False):
        print(f"profile: {case}", file=sys.stderr, flush=True)
        row["profile"] = profile_case(case, asked.profile, **how)
        keep(report, asked.json)
    if asked.json == "-":
        print(json.dumps(report, indent=1))
    else:
        print_report(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
