#!/usr/bin/env python3
"""On the node: whether what a run needs is there and sound. Green, yellow or red, each with the way
out.

    python tools/doctor.py [RECIPE [key=value ...]] [--gpus N] [--json]
        this node
    srun python tools/doctor.py ...
        or torchrun tools/doctor.py: all nodes, compared, links measured

Without a recipe what depends on one (its folder, shards, precision) is left out. Nothing is
trained, and what is written is taken away again. Exit status: 0 no red; 1 something is red; 2 the
input is wrong."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import re
import resource
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as torch_dist
from rich.console import Console
from rich.table import Table

from rcmae import __version__, config, dist
from rcmae.config import Recipe
from rcmae.data.cache import Reader
from rcmae.data.index import ShardIndex
from rcmae.models import kernels

GIB = 2**30
NEEDED = (
    "timm",
    "torchvision",
    "deepspeed",
    "pydantic",
    "simplejpeg",
    "safetensors",
    "tensorboard",
    "webdataset",
)
COMPARED = (
    "rcmae",
    "python",
    "torch",
    "timm",
    "torchvision",
    "deepspeed",
    "numpy",
    "cuda",
    "nccl",
    "driver",
    "gpus",
)
COLOURS = ("green", "yellow", "red")  # from good to bad
SKEW_S = (1.0, 30.0)  # seconds between clocks that are yellow, red
CACHE_BYTES = (GIB, 0.1 * GIB)  # free bytes below which a cache folder is yellow, red
OPEN_FILES = 4096  # a rank's shards, workers and sockets
# GB/s of a link in one direction, by the maker: NVLink of one GPU. Others in a node meet over PCIe.
NVLINK_GBPS = {"B200": 900.0, "H200": 450.0, "H100": 450.0, "A100": 300.0, "V100": 150.0}
PCIE_GBPS = 16.0


class Finding(NamedTuple):
    """What one check saw."""

    check: str
    colour: str
    found: str
    way_out: str = ""


class Seen(NamedTuple):
    """A finding and the ranks that have it."""

    finding: Finding
    ranks: list[int]


# ----------------------------------------------------------------------------------------- software


def versions() -> dict[str, str]:
    """Of what a run stands on; "absent" where it is not there."""
    found = {
        "rcmae": __version__,
        "python": sys.version.split()[0],
        "cuda": torch.version.cuda or "none",
    }
    for name in ("torch", "timm", "torchvision", "deepspeed", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else "none"
    return found


def check_software(found: dict[str, str]) -> Iterator[Finding]:
    """Packages that import, and versions that belong together."""
    broken = {}
    for name in NEEDED:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                importlib.import_module(name)
        except Exception as error:  # whatever a broken package raises
            broken[name] = f"{type(error).__name__}: {error}"
    for name, why in broken.items():
        yield Finding(
            "packages",
            "red",
            f"{name} cannot be imported ({why})",
            "pip install -r requirements.txt",
        )
    wanted = torch_of("torchvision")
    if wanted and wanted != torch.__version__.split("+")[0]:
        yield Finding(
            "torchvision",
            "red",
            f"torchvision {found['torchvision']} belongs to torch {wanted}, this is torch "
            f"{torch.__version__}",
            "install the pair that requirements.txt names",
        )
    elif not broken:
        shown = ", ".join(
            f"{name} {found[name]}"
            for name in ("python", "torch", "torchvision", "timm", "deepspeed")
        )
        yield Finding("packages", "green", shown)
    apex = kernels.apex_status()
    if not apex.usable and "not NVIDIA" in apex.found:
        yield Finding(
            "apex",
            "yellow",
            apex.found,
            "pip uninstall apex; build github.com/NVIDIA/apex, or do without",
        )
    elif apex.usable:
        yield Finding("apex", "green", apex.found)


def torch_of(package: str) -> str | None:
    """The version of torch that a package was built for, by its metadata.

    None where it says none.
    """
    try:
        lines = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    pins = [re.match(r"torch\s*\(?==\s*([\w.]+)", line) for line in lines]
    return next((pin.group(1) for pin in pins if pin), None)


def check_kernels(recipe: Recipe) -> Iterator[Finding]:
    """Which fused kernels the recipe uses, and why not the others."""
    engine, usable = recipe.engine, kernels.apex_status()
    for key in ("layer_norm", "optimizer"):
        if getattr(engine, key) == "apex" and not usable.usable:
            yield Finding(
                "kernels", "red", f"engine.{key}=apex: {usable.found}", f"engine.{key}=torch"
            )
    for row in kernels.table(
        device=dist.device(),
        precision=engine.precision,
        layer_norm=engine.layer_norm,
        optimizer=engine.optimizer,
        compile=engine.compile,
        checkpointing=engine.activation_checkpointing,
    ):
        yield Finding("kernels", "green", f"{row.part}: {row.used} ({row.why})")
    offload = False
    if engine.name == "deepspeed":
        with contextlib.suppress(ImportError, ValueError), contextlib.redirect_stdout(sys.stderr):
            from rcmae.engines.deepspeed import read_config

            zero = read_config(engine.config or "").get("zero_optimization", {})
            offload = (zero.get("offload_optimizer") or {}).get("device") == "cpu"
    if offload:
        missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
        if missing:
            yield Finding(
                "compiler",
                "red",
                f"{engine.config} offloads to a DeepSpeed optimizer that is compiled at "
                "first use; "
                f"{' and '.join(missing)} not found",
                "load a compiler module, pip install ninja",
            )
        else:
            yield Finding(
                "compiler",
                "green",
                "g++ and ninja for DeepSpeed's CPU optimizer (half a minute, once)",
            )


# --------------------------------------------------------------------------------------------- GPUs

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


def read_gpus() -> list[dict[str, str]] | str:
    """This node's GPUs as the driver tells them, or why it does not.

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
    return [
        dict(zip(_QUERY, map(str.strip, line.split(",")), strict=False))
        for line in done.stdout.splitlines()
    ]


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
    """That torch can use the GPUs that are there, and that they are well and free."""
    if isinstance(rows, str):
        yield Finding("driver", "red", rows, "drain the node, or restart its driver")
        return
    there = max(asked, len(rows))
    if torch.version.cuda is None and there:
        yield Finding(
            "GPUs",
            "red",
            f"torch {torch.__version__} is a CPU build beside {there} GPUs",
            "install the CUDA build of the same version of torch",
        )
    elif not there:
        yield Finding("GPUs", "green", "none here and none asked for: CPU")
    elif not torch.cuda.is_available():
        driver = rows[0]["driver_version"] if rows else "none found"
        yield Finding(
            "GPUs",
            "red",
            f"torch cannot use the GPUs (its CUDA {torch.version.cuda}, driver {driver})",
            "a newer driver, or a torch of an older CUDA; in a container: pass the GPUs in "
            "(--nv, --gpus)",
        )
    elif torch.cuda.device_count() < asked:
        yield Finding(
            "GPUs",
            "red",
            f"{torch.cuda.device_count()} of {asked} GPUs can be seen",
            "ask the scheduler for them (--gres, --gpus-per-node); look at CUDA_VISIBLE_DEVICES",
        )
    else:
        yield Finding(
            "GPUs", "green", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
        )
    for number, row in enumerate(rows):
        yield from check_gpu(f"GPU {number}", row, recipe)


def check_gpu(name: str, row: dict[str, str], recipe: Recipe | None) -> Iterator[Finding]:
    """One GPU by what the driver tells of it."""

    def number(key: str) -> float:
        try:
            return float(row.get(key, ""))
        except ValueError:  # [N/A], on GPUs that do not have it
            return 0.0

    problems = []
    used, total = number("memory.used") / 1024, number("memory.total") / 1024  # GiB
    if used > max(1.0, 0.02 * total):
        colour = "red" if used > 0.1 * total else "yellow"
        problems.append(
            Finding(
                name,
                colour,
                f"{used:.1f} of {total:.0f} GiB are taken by others",
                "end their processes (nvidia-smi)",
            )
        )
    if errors := number("ecc.errors.uncorrected.volatile.total"):
        problems.append(
            Finding(
                name,
                "red",
                f"{errors:.0f} uncorrected memory errors",
                "drain the node, reset the GPU",
            )
        )
    if row.get("clocks_throttle_reasons.hw_slowdown") == "Active":
        problems.append(
            Finding(
                name,
                "yellow",
                f"the hardware slows it down, at {row['temperature.gpu']} C",
                "look at cooling and power",
            )
        )
    elif number("temperature.gpu") >= 88:
        problems.append(Finding(name, "yellow", f"{row['temperature.gpu']} C", "look at cooling"))
    if row.get("compute_mode") == "Prohibited":
        problems.append(
            Finding(name, "red", "its compute mode is Prohibited", "nvidia-smi -c DEFAULT, as root")
        )
    if 0 < number("compute_cap") < 8.0:
        asked = recipe is not None and recipe.engine.precision == "bf16"
        problems.append(
            Finding(
                name,
                "red" if asked else "yellow",
                f"{row['name']} has no bf16",
                "engine.precision=fp32, or other GPUs",
            )
        )
    yield from problems or [
        Finding(name, "green", f"{row.get('name')}, {used:.1f} of {total:.0f} GiB in use")
    ]


# ------------------------------------------------------------------------------------- file systems


def check_folder(name: str, folder: Path, needed: float) -> Iterator[Finding]:
    """That files in a folder can be written, flushed, replaced and linked as checkpoints and leases
    do, and fit.

    Args:
        name: of the folder, for people.
        folder: made if it is not there.
        needed: bytes that should be free.
    """
    aside = folder / f".doctor-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        rate = _exercise(aside)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield Finding(
            name,
            "red",
            f"{folder}: {error.strerror or error}",
            "mend its permissions or quota, or use another folder",
        )
        return
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if free < needed:
        yield Finding(
            name,
            "red",
            f"{folder}: {free / GIB:.1f} GiB are free, {needed / GIB:.1f} are needed for "
            "checkpoints",
            "free some, lower checkpoint.keep, or use another folder",
        )
        return
    yield Finding(
        name,
        "green",
        f"{folder}: writes, renames, links and flushes as it should; {rate:.0f} MB/s, "
        f"{free / GIB:.0f} GiB free",
    )


def _exercise(folder: Path) -> float:
    """Do what checkpoints and leases do; MB/s of a flushed write.

    Raises OSError where it does not work.
    """
    block = secrets.token_bytes(2**20)
    begin = time.perf_counter()
    with (folder / "data").open("wb") as file:
        for _ in range(8):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    rate = 8 * 2**20 / 1e6 / (time.perf_counter() - begin)
    (folder / "new").write_text("new")
    (folder / "pointer").write_text("old")
    os.replace(folder / "new", folder / "pointer")
    if (folder / "pointer").read_text() != "new":
        raise OSError("a rename does not replace what was there")
    os.link(folder / "pointer", folder / "lease")
    try:
        os.link(folder / "data", folder / "lease")
    except FileExistsError:
        pass
    else:
        raise OSError("a second link to one name succeeds: two jobs could take one run")
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    (folder / "aside").mkdir()
    os.rename(folder / "aside", folder / "final")
    return rate


def caches(recipe: Recipe | None) -> dict[str, Path]:
    """Folders that libraries fill while a run goes on, by the variable that moves each."""
    home, temporary = Path.home() / ".cache", Path(tempfile.gettempdir())
    folders = {"TMPDIR": temporary}
    if recipe is None or recipe.engine.name == "deepspeed":
        folders["TORCH_EXTENSIONS_DIR"] = Path(
            os.environ.get("TORCH_EXTENSIONS_DIR", home / "torch_extensions")
        )
    if recipe is not None and recipe.engine.compile:
        folders["TORCHINDUCTOR_CACHE_DIR"] = Path(
            os.environ.get("TORCHINDUCTOR_CACHE_DIR", temporary)
        )
        folders["TRITON_CACHE_DIR"] = Path(
            os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton")
        )
    return folders


def check_caches(
    folders: dict[str, Path], recipe: Recipe | None, local_world: int
) -> Iterator[Finding]:
    """Room for what libraries cache, for batches on their way from workers, and for open files."""
    for variable, folder in folders.items():
        there = next(each for each in (folder, *folder.parents) if each.exists())
        free = shutil.disk_usage(there).free
        colour = COLOURS[sum(free < least for least in CACHE_BYTES)]
        if not os.access(there, os.W_OK):
            yield Finding(
                "caches",
                "red",
                f"{folder} cannot be written",
                f"export {variable}=a folder of this node",
            )
        elif colour != "green":
            ways = f"free some, or export {variable} elsewhere"
            yield Finding("caches", colour, f"{folder}: {free / GIB:.2f} GiB are free", ways)
        else:
            yield Finding("caches", "green", f"{folder}: {free / GIB:.0f} GiB free ({variable})")
    shared = Path("/dev/shm")
    if recipe is not None and shared.is_dir() and recipe.data.workers:
        height, width = recipe.model.image_hw
        images = recipe.batch.per_device or max(1, recipe.batch.images // max(dist.world(), 1))
        each = images * recipe.model.in_channels * height * width  # a micro-batch travels as uint8
        needed = local_world * recipe.data.workers * 3 * each  # two ready, one in the making
        free = shutil.disk_usage(shared).free
        if free < needed:
            yield Finding(
                "shared memory",
                "red",
                f"/dev/shm has {free / GIB:.1f} GiB free, workers need {needed / GIB:.1f}",
                "start the container with more (--shm-size, --ipc=host), or lower "
                "data.workers or batch.per_device",
            )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES:
        ways = f"ulimit -n {min(hard, 65536)} in the job"
        yield Finding("open files", "yellow", f"a process may open {soft} at once", ways)


def checkpoints_bytes(recipe: Recipe) -> float:
    """Bytes that a run's checkpoints take at most: those it keeps, and one in the making."""
    from rcmae.parts import new_network
    from rcmae.planning.states import checkpoint_bytes  # these two cost seconds

    with torch.device("meta"):
        model = new_network(recipe, norm="torch")
    return checkpoint_bytes(model, teacher=recipe.objective.teacher_parts) * (
        max(2, recipe.checkpoint.keep) + 1
    )


def check_shards(recipe: Recipe) -> tuple[list[Finding], str]:
    """That every shard can be read from here and samples decode.

    And the fingerprint of all of them.
    """
    from rcmae.data.transforms import BadImage, CentreTransform

    try:
        folders = [
            str(recipe.run_dir / "index"),
            *([recipe.data.index] if recipe.data.index else []),
        ]
        index = ShardIndex.open(recipe.data.shards, cache=folders)
    except ValueError as error:
        return [
            Finding(
                "shards",
                "red",
                str(error),
                "mend or leave out these shards, or correct data.shards",
            )
        ], ""
    transform, bad, size = CentreTransform(recipe.model.image_hw, recipe.model.in_channels), [], 0
    reader, begin = Reader(), time.perf_counter()
    numbers = range(0, len(index), max(1, len(index) // 32))
    for number in numbers:
        sample = index[number]
        try:
            data = reader.read(sample.shard, sample.offset, sample.size)
            size += len(data)
            transform(data, 0, number)
        except (OSError, BadImage) as error:
            bad.append(f"{sample.id} ({error})")
    seconds = time.perf_counter() - begin
    shown = f"{len(index.shards)} with {len(index):,} samples"
    if index.short:
        bad += [f"{path} is shorter than it was when it was indexed" for path in index.short]
    if bad:
        colour, text = "red" if len(bad) > len(numbers) / 2 else "yellow", "; ".join(bad[:5])
        ways = "write these shards again, or leave them out"
        finding = Finding("shards", colour, f"{shown}; of {len(numbers)} tried: {text}", ways)
    else:
        text = f"{len(numbers)} read and decoded at {size / 1e6 / seconds:.0f} MB/s"
        finding = Finding("shards", "green", f"{shown}; {text}")
    return [finding], index.fingerprint


# ---------------------------------------------------------------------------------------- all ranks


def check_port() -> Finding | None:
    """That rank 0 can listen where the others will look for it.

    To be called before the ranks meet.
    """
    env = os.environ
    if env.get("RANK", env.get("SLURM_PROCID", "0")) != "0" or "MASTER_PORT" not in env:
        return None
    if "TORCHELASTIC_RUN_ID" in env:  # torchrun listens there itself
        return None
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(env["MASTER_PORT"])))
        except OSError as error:
            return Finding(
                "port",
                "red",
                f"MASTER_PORT={env['MASTER_PORT']} on {socket.gethostname()}: {error.strerror}",
                "export another MASTER_PORT, or end the process that listens there",
            )
    return None


def check_same(facts: Sequence[dict[str, str]], hosts: Sequence[str]) -> Iterator[Finding]:
    """That ranks have the same versions, GPUs and shards."""
    for key in facts[0]:
        values: dict[str, list[str]] = {}
        for host, each in zip(hosts, facts, strict=True):
            values.setdefault(each[key], []).append(host)
        if len(values) > 1:
            shown = "; ".join(
                f"{value or 'none'} on {', '.join(sorted(set(at)))}" for value, at in values.items()
            )
            colour = "yellow" if key == "gpus" else "red"
            yield Finding(
                "nodes differ",
                colour,
                f"{key}: {shown}",
                "give all nodes the same environment and files",
            )


def clock_skew(now: Callable[[], float], rounds: int = 5) -> list[float]:
    """Seconds by which each rank's clock is before rank 0's. Collective: every rank calls."""
    offsets = []
    for _ in range(rounds):  # the least disturbed of several meetings
        dist.barrier()
        clocks = dist.gather(now())
        offsets.append([clock - clocks[0] for clock in clocks])
    return [statistics.median(each) for each in zip(*offsets, strict=True)]


def check_clocks(skew: Sequence[float], hosts: Sequence[str]) -> Finding:
    """That clocks agree: deadlines and logs are told in their time."""
    worst = max(range(len(skew)), key=lambda rank: abs(skew[rank]))
    spread = max(skew) - min(skew)
    colour = COLOURS[sum(spread > limit for limit in SKEW_S)]
    text = f"{spread:.2f} s between the clocks of {len(set(hosts))} hosts"
    if colour == "green":
        return Finding("clocks", colour, text)
    shown = f"{text}; rank {worst} on {hosts[worst]} is {skew[worst]:+.1f} s from rank 0"
    return Finding("clocks", colour, shown, "start chrony or ntpd there")


def check_shared(folder: Path, wait_s: float = 5.0) -> Finding:
    """That all ranks see one folder. Collective: every rank calls."""
    token = dist.from_first(secrets.token_hex(8))
    mark, seen = folder / f".doctor-{token}", False
    if dist.rank() == 0:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            mark.write_text(token)
    dist.barrier()
    end = time.monotonic() + wait_s
    while not (seen := mark.exists()) and time.monotonic() < end:
        # network file systems can be late
        time.sleep(0.2)
    blind = [rank for rank, sees in enumerate(dist.gather(seen)) if not sees]
    if dist.rank() == 0:
        with contextlib.suppress(OSError):
            mark.unlink()
    if blind:
        return Finding(
            "run folder",
            "red",
            f"{folder} of rank 0 is not that of ranks {', '.join(map(str, blind))}",
            "use a folder on a file system that all nodes mount, by an absolute path",
        )
    return Finding("run folder", "green", f"{folder} is one folder on all ranks")


@contextlib.contextmanager
def left_as_it_was(folder: Path | None) -> Iterator[None]:
    """Take the folder and those above it away at the end, if they were not there.

    Collective: every rank calls.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()] if folder else []
    dist.barrier()  # all have looked before any makes it
    yield
    dist.barrier()
    for each in missing:
        with contextlib.suppress(OSError):  # not made, or another rank was faster
            each.rmdir()


def measure_links(size: int, rounds: int = 5) -> dict[str, float]:
    """GB/s of each GPU's or process's link in an all-reduce and an all-gather of `size` bytes.
    Collective.

    By NCCL's convention: what a link has to carry for it, whatever the number of ranks ("bus
    bandwidth")."""
    device, world = dist.device(), dist.world()
    whole = torch.ones(size // 4 // world * world, device=device)
    part = whole[: len(whole) // world].clone()
    share = {"all-reduce": 2 * (world - 1) / world, "all-gather": (world - 1) / world}
    # its name since torch 2.13
    gather = getattr(torch_dist, "all_gather_single", torch_dist.all_gather_into_tensor)
    work: dict[str, Callable[[], object]] = {
        "all-reduce": lambda: torch_dist.all_reduce(whole, torch_dist.ReduceOp.MAX),
        "all-gather": lambda: gather(whole, part),
    }
    rates = {}
    for name, action in work.items():
        seconds = []
        for number in range(rounds + 1):
            dist.barrier()
            begin = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:  # the first one makes connections
                seconds.append(time.perf_counter() - begin)
        rates[name] = share[name] * whole.nbytes / statistics.median(seconds) / 1e9
    assert bool((whole == 1).all()), "a collective changed what it should not"
    return rates


def network_gbps(folder: Path = Path("/sys/class/infiniband")) -> float:
    """GB/s of this node's InfiniBand or RoCE ports together; 0 without any."""
    rates = [path.read_text().split()[0] for path in folder.glob("*/ports/*/rate")]
    return sum(float(rate) for rate in rates) / 8


def check_links(
    rates: dict[str, float], hosts: Sequence[str], name: str, network: float
) -> Iterator[Finding]:
    """Measured bandwidths against what the link should give: half of it is yellow, a tenth red.

    Args:
        rates: of `measure_links`.
        hosts: of the ranks.
        name: of the GPU; empty on CPUs, where nothing is expected.
        network: GB/s of a node's ports.
    """
    per_node = len(hosts) // len(set(hosts))
    inside = next((rate for kind, rate in NVLINK_GBPS.items() if kind in name), PCIE_GBPS)
    between = network / max(1, per_node) if len(set(hosts)) > 1 else None
    expected = inside if between is None else min(inside, between or inside)
    for what, rate in rates.items():
        text = f"{what} of {len(hosts)} ranks: {rate:.2f} GB/s a link"
        if not name:
            yield Finding("links", "green", text)
            continue
        colour = COLOURS[(rate < 0.5 * expected) + (rate < 0.1 * expected)]
        text += f", {expected:.0f} should be there"
        ways = "see slurm/README.md on NCCL; NCCL_DEBUG=INFO tells which network it takes"
        yield Finding("links", colour, text, "" if colour == "green" else ways)


# --------------------------------------------------------------------------------------------- main


def examine(recipe: Recipe | None, gpus: int | None, now: Callable[[], float]) -> list[Seen]:
    """All findings, worst first, on every rank. Collective: every rank calls."""
    rows = read_gpus()  # before this process takes memory of a GPU
    port = check_port()
    if port is not None:
        return [Seen(port, [0])]
    dist.start(required=False, timeout_s=120.0)
    with left_as_it_was(recipe.run_dir if recipe else None):
        seen = look(recipe, rows, gpus_asked_for(gpus), now)
    return sorted(seen, key=lambda each: -COLOURS.index(each.finding.colour))


def look(
    recipe: Recipe | None, rows: list[dict[str, str]] | str, gpus: int, now: Callable[[], float]
) -> list[Seen]:
    """Findings of each rank, then those of all together. Collective: every rank calls."""
    facts = versions()
    facts["driver"] = rows[0]["driver_version"] if isinstance(rows, list) and rows else "none"
    facts["gpus"] = ", ".join(row["name"] for row in rows) if isinstance(rows, list) else "unknown"
    mine = [*check_software(facts), *check_gpus(rows, gpus, recipe)]
    mine += check_caches(caches(recipe), recipe, dist.launched()["local_world"])
    if recipe is not None:
        mine += check_kernels(recipe)
        if not any(each.check == "packages" and each.colour == "red" for each in mine):
            mine += check_folder("run folder", recipe.run_dir, checkpoints_bytes(recipe))
            found, facts["shards"] = check_shards(recipe)
            mine += found
    seen = merged(dist.gather(mine))
    if dist.world() == 1:
        return seen
    hosts = dist.gather(socket.gethostname())
    together = list(check_same(dist.gather(facts), hosts))
    together.append(check_clocks(clock_skew(now), hosts))
    if recipe is not None:
        together.append(check_shared(recipe.run_dir))
    on_gpu = dist.device().type == "cuda"
    rates = measure_links(256 * 2**20 if on_gpu else 4 * 2**20)
    together += check_links(
        rates, hosts, torch.cuda.get_device_name() if on_gpu else "", network_gbps()
    )
    return seen + [Seen(finding, list(range(len(hosts)))) for finding in dist.from_first(together)]


def merged(found: Sequence[Sequence[Finding]]) -> list[Seen]:
    """One row for what several ranks found alike; numbers in it may differ."""
    rows: dict[tuple[str, ...], Seen] = {}
    for rank, findings in enumerate(found):
        for finding in findings:
            key: tuple[str, ...] = (
                finding.check,
                finding.colour,
                re.sub(r"[\d.,]+", "#", finding.found),
            )
            if key in rows and rows[key].ranks[-1] == rank:  # two GPUs, two folders of one rank
                key = (*key, finding.found)
            rows.setdefault(key, Seen(finding, [])).ranks.append(rank)
    return list(rows.values())


def print_report(seen: Sequence[Seen], world: int, console: Console) -> None:
    """The findings for people."""
    table = Table.grid(padding=(0, 2))
    for finding, ranks in seen:
        at = "" if len(ranks) == world else f" [dim](rank {', '.join(map(str, ranks))})[/]"
        way = f"\n[bold]{finding.way_out}[/]" if finding.way_out else ""
        table.add_row(
            f"[{finding.colour}]{finding.colour}[/]", finding.check, f"{finding.found}{at}{way}"
        )
    console.print(table)


def main(argv: Sequence[str] | None = None, *, now: Callable[[], float] = time.time) -> int:
    """Examine and report; the exit status. Collective: every rank calls."""
    parser = argparse.ArgumentParser(
        prog="tools/doctor.py", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("recipe", nargs="?", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="as rcmae.train takes them"
    )
    parser.add_argument(
        "--gpus", type=int, help="that a process should see (what the scheduler says)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    asked = parser.parse_intermixed_args(argv)
    try:
        recipe = config.load(asked.recipe, asked.overrides) if asked.recipe else None
        seen = examine(recipe, asked.gpus, now)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    world, worst = dist.world(), max(COLOURS.index(each.finding.colour) for each in seen)
    if dist.launched()["rank"] == 0:
        if asked.json:
            rows = [{**each.finding._asdict(), "ranks": each.ranks} for each in seen]
            print(
                json.dumps({"verdict": COLOURS[worst], "world": world, "findings": rows}, indent=1)
            )
        else:
            print_report(seen, world, Console(width=max(Console().width, 100)))
        sys.stdout.flush()
    dist.finish()
    return int(COLOURS[worst] == "red")


if __name__ == "__main__":
    raise SystemExit(main())
