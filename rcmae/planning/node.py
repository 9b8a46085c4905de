"""What a run needs of a node: software that belongs together, folders that do as they should, room,
and shards that can be read from here.

Nothing is trained, and what is written is taken away again.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import resource
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from rcmae import __version__, config, dist
from rcmae.config import Recipe
from rcmae.data.cache import Reader
from rcmae.data.index import ShardIndex
from rcmae.data.loading import pins_memory, shared_bytes, workers_amiss, workers_crowded
from rcmae.data.patterns import Patterns
from rcmae.errors import Refused, counted
from rcmae.files import flush_folder
from rcmae.models import kernels
from rcmae.models.precision import bf16_of
from rcmae.planning.findings import COLOURS, Finding
from rcmae.planning.hardware import GIB
from rcmae.process import (
    cores,
    extensions,  # timm and torchvision import beside a CPU torch
)

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
CACHE_BYTES = (GIB, 0.1 * GIB)  # free bytes below which a cache folder is yellow, red
OPEN_FILES = 4096  # a rank's shards, workers and sockets
_TRIED = 32  # samples of the shards that are read and decoded

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
    """Packages that import, and versions that belong together.

    `found`: of `versions`.
    """
    broken = dict(_broken())
    for name, why in broken.items():
        text = f"{name} cannot be imported ({why})"
        yield Finding("packages", "red", text, "pip install -r requirements.txt")
    unmatched = _torchvision(found["torchvision"], imports="torchvision" not in broken)
    if unmatched is not None:
        yield unmatched
    elif not broken:
        shown = ("python", "torch", "torchvision", "timm", "deepspeed")
        yield Finding("packages", "green", ", ".join(f"{name} {found[name]}" for name in shown))
    if "simplejpeg" not in broken:
        yield _jpegs()
    apex = kernels.apex_status()
    if apex.usable:
        yield Finding("apex", "green", apex.found)
    elif "not NVIDIA" in apex.found:
        ways = "pip uninstall apex; build github.com/NVIDIA/apex, or do without"
        yield Finding("apex", "yellow", apex.found, ways)


def _torchvision(version: str, *, imports: bool) -> Finding | None:
    """That it is of another torch, and what does not work then; None where nothing is known."""
    wanted = extensions.torch_of("torchvision")
    loads = not extensions.guard_torchvision()
    if wanted and wanted != torch.__version__.split("+")[0]:
        text = f"torchvision {version} belongs to torch {wanted}, this is torch {torch.__version__}"
    elif not loads:
        text = (
            f"the compiled part of torchvision {version} does not load beside torch "
            f"{torch.__version__}"
        )
    else:
        return None
    if not imports:
        return Finding("torchvision", "red", text, extensions.remedy())
    if loads:
        text += ": its compiled part loads, and rcmae works"
    else:
        text += (
            ": rcmae works, but `import timm` and `import torchvision` alone fail, and detection "
            "computes ROI align and suppression in plain torch, slower"
        )
    return Finding("torchvision", "yellow", text, extensions.remedy())


def _jpegs() -> Finding:
    """Which library decodes JPEGs in the workers."""
    from rcmae.data.jpeg import library  # here: it needs simplejpeg

    newer = "libjpeg-turbo 3.1 or later of the system or of conda (libturbojpeg.so)"
    found = library()
    if found is None:
        text = "simplejpeg decodes each JPEG whole, to the same pixels: slower by a fifth or more"
        way = (
            f"install {newer}, or the wheel turbojpeg==0.0.2; or, where shards are made: rcmae "
            "shards make --restart-markers"
        )
        return Finding("jpegs", "yellow", text, way)
    if found.released:
        return Finding("jpegs", "green", f"parts of JPEGs are decoded by {found.told}")
    text = f"parts of JPEGs are decoded by {found.told}, a pre-release of 3.0"
    return Finding("jpegs", "yellow", text, f"where shards are not trusted, install {newer}")


def _broken() -> Iterator[tuple[str, str]]:
    """Packages that do not import, and why."""
    for name in NEEDED:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                importlib.import_module(name)
        except Exception as error:  # whatever a broken package raises
            yield name, f"{type(error).__name__}: {error}"


def check_kernels(recipe: Recipe) -> Iterator[Finding]:
    """Which fused kernels the recipe uses, and why not the others."""
    engine = recipe.engine
    apex = kernels.apex_status()
    for key in ("layer_norm", "optimizer"):
        if getattr(engine, key) == "apex" and not apex.usable:
            text = f"engine.{key}=apex: {apex.found}"
            yield Finding("kernels", "red", text, f"engine.{key}=torch")
    bf16 = bf16_of(dist.device())
    if engine.precision == "auto":
        used = config.precision_of("auto", bf16.units)
        yield Finding("kernels", "green", f"precision: {used} (auto: {bf16.why})")
    elif engine.precision == "bf16" and dist.device().type == "cpu" and not bf16.units:
        found = f"engine.precision=bf16 is emulated here: {bf16.why}"
        yield Finding("kernels", "yellow", found, "engine.precision=auto")
    for row in kernels.table(
        device=dist.device(),
        precision=config.precision_of(engine.precision, bf16.units),
        layer_norm=engine.layer_norm,
        optimizer=engine.optimizer,
        compile=_compiles(recipe),
        checkpointing=engine.activation_checkpointing,
    ):
        yield Finding("kernels", "green", f"{row.part}: {row.used} ({row.why})")
    if _offloads(recipe):
        yield _compiler(recipe)


def _compiles(recipe: Recipe) -> bool:
    """Whether the recipe compiles blocks on this node."""
    zero3 = recipe.engine.name == "deepspeed" and _stage(recipe) == 3
    return config.compiles(recipe, cuda=dist.device().type == "cuda", zero3=zero3)


def _stage(recipe: Recipe) -> int | None:
    with contextlib.suppress(ImportError, Refused), contextlib.redirect_stdout(sys.stderr):
        from rcmae.engines.deepspeed_config import read_config

        zero = read_config(recipe.engine.config or "").get("zero_optimization", {})
        stage: int = zero.get("stage", 0)
        return stage
    return None


def _offloads(recipe: Recipe) -> bool:
    """Whether DeepSpeed's JSON keeps the optimizer in host memory."""
    if recipe.engine.name != "deepspeed":
        return False
    with contextlib.suppress(ImportError, Refused), contextlib.redirect_stdout(sys.stderr):
        from rcmae.engines.deepspeed_config import read_config

        zero = read_config(recipe.engine.config or "").get("zero_optimization", {})
        return (zero.get("offload_optimizer") or {}).get("device") == "cpu"
    return False


def _compiler(recipe: Recipe) -> Finding:
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if not missing:
        text = "g++ and ninja for DeepSpeed's CPU optimizer (half a minute, once)"
        return Finding("compiler", "green", text)
    return Finding(
        "compiler",
        "red",
        f"{recipe.engine.config} offloads to a DeepSpeed optimizer that is compiled at first use; "
        f"{' and '.join(missing)} not found",
        "load a compiler module, pip install ninja",
    )


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
        text = f"{folder}: {error.strerror or error}"
        ways = "fix its permissions or quota, or use another folder"
        yield Finding(name, "red", text, ways)
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
    flush_folder(folder)
    (folder / "aside").mkdir()
    os.rename(folder / "aside", folder / "final")
    return rate


def caches(recipe: Recipe | None) -> dict[str, Path]:
    """Folders that libraries fill during a run, by the variable that moves each."""
    temporary = Path(tempfile.gettempdir())
    folders = {"TMPDIR": temporary}
    if recipe is None or recipe.engine.name == "deepspeed":
        folders["TORCH_EXTENSIONS_DIR"] = Path(os.path.expanduser("~/.cache/torch_extensions"))
    if recipe is not None and _compiles(recipe):
        folders["TORCHINDUCTOR_CACHE_DIR"] = recipe.run_dir / "compiled"  # Triton's is in it
    return {
        variable: folder if variable == "TMPDIR" else Path(os.environ.get(variable, folder))
        for variable, folder in folders.items()
    }


def check_caches(
    folders: dict[str, Path], recipe: Recipe | None, local_world: int
) -> Iterator[Finding]:
    """Room for what libraries cache, for batches on their way from workers, and for open files.

    Args:
        folders: of `caches`.
        recipe: of the run, if one is known.
        local_world: ranks of this node.
    """
    for variable, folder in folders.items():
        yield _cache(variable, folder)
    if recipe is not None:
        yield from _workers(recipe, local_world)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES:
        ways = f"ulimit -n {min(hard, 65536)} in the job"
        yield Finding("open files", "yellow", f"a process may open {soft} at once", ways)


def _cache(variable: str, folder: Path) -> Finding:
    there = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        ways = f"export {variable}=a folder of this node"
        return Finding("caches", "red", f"{folder} cannot be written", ways)
    colour = COLOURS[sum(free < least for least in CACHE_BYTES)]
    if colour == "green":
        return Finding("caches", "green", f"{folder}: {free / GIB:.0f} GiB free ({variable})")
    ways = f"free some, or export {variable} elsewhere"
    return Finding("caches", colour, f"{folder}: {free / GIB:.2f} GiB are free", ways)


def _workers(recipe: Recipe, local_world: int) -> Iterator[Finding]:
    each = shared_bytes(recipe, dist.world(), pins=pins_memory())
    amiss = workers_amiss(recipe.data.workers, local_world, each)
    if amiss:
        told, _, ways = amiss.partition(": ")
        yield Finding("data workers", "red", told, ways)
    bound = dist.launched().who == "srun"
    crowded = workers_crowded(recipe.data.workers, cores.of_a_rank(local_world, bound=bound))
    if crowded:
        told, _, ways = crowded.partition(": ")
        yield Finding("data workers", "yellow", told, ways)


def checkpoints_bytes(recipe: Recipe) -> float:
    """Bytes that a run's checkpoints take at most: those it keeps, and one in the making."""
    # here, where timm and torchvision are known to import: these need them
    from rcmae.planning.states import checkpoint_bytes
    from rcmae.tasks.registry import task_of

    recipe = config.with_values(recipe, {"engine.precision": "fp32"})  # as checkpoints are
    cost = task_of(recipe).cost(recipe)
    size = checkpoint_bytes(cost.student, teacher=cost.teacher)
    return size * (max(2, recipe.checkpoint.keep) + 1)


def check_ranks(recipe: Recipe, world: int) -> Iterator[Finding]:
    """That the recipe can be trained on so many ranks."""
    if world < 2:  # the doctor alone: not the run's ranks
        return
    if recipe.engine.name == "local":
        text = f"engine.name=local is one process, {world} were launched"
        yield Finding("ranks", "red", text, "engine.name=fsdp2, or engine.name=deepspeed")
    for problem in config.batch_problems(recipe, world):
        told, _, ways = problem.partition("; ")
        yield Finding("ranks", "red", told, ways)


def check_evaluation(recipe: Recipe) -> Iterator[Finding]:
    """That the shards of the run's evaluations can be read from here."""
    from rcmae.tasks.registry import task_of  # as in checkpoints_bytes

    for each in task_of(recipe).evaluation_sets(recipe):
        finding, _ = check_shards(recipe, each.shards, each.key)
        yield finding


def check_shards(
    recipe: Recipe, shards: Patterns | None = None, key: str = "data.shards"
) -> tuple[Finding, str]:
    """That every shard can be read from here and samples decode.

    And the fingerprint of all of them; empty where they cannot be read.

    Args:
        recipe: says where an index may lie, and the network's images.
        shards: their patterns; None: those of the training.
        key: that names them.
    """
    caches = [str(recipe.run_dir / "index")]
    if recipe.data.index:
        caches.append(recipe.data.index)
    try:
        index = ShardIndex.open(recipe.data.shards if shards is None else shards, cache=caches)
    except Refused as error:
        ways = f"repair or remove these shards, or correct {key}"
        return Finding("shards", "red", f"{key}: {error}", ways), ""
    numbers = range(0, len(index), max(1, len(index) // _TRIED))
    bad, rate = _try_samples(recipe, index, numbers)
    bad += [f"{path} is shorter than it was when it was indexed" for path in index.short]
    shown = f"{key}: {len(index.shards)} with {counted(len(index), 'sample')}"
    if not bad:
        text = f"{len(numbers)} read and decoded at {rate / 1e6:.0f} MB/s"
        return Finding("shards", "green", f"{shown}; {text}"), index.fingerprint
    colour = "red" if len(bad) > len(numbers) / 2 else "yellow"
    text = f"{shown}; of {len(numbers)} tried: {'; '.join(bad[:5])}"
    ways = "write these shards again, or leave them out"
    return Finding("shards", colour, text, ways), index.fingerprint


def _try_samples(
    recipe: Recipe, index: ShardIndex, numbers: Iterable[int]
) -> tuple[list[str], float]:
    """Samples that cannot be read or decoded, and bytes/s of the others."""
    from rcmae.data.members.reading import image_bytes
    from rcmae.data.transforms import BadImage, CentreTransform  # as above

    transform = CentreTransform(recipe.model.image_hw, recipe.model.in_channels)
    reader = Reader()
    bad = []
    size = 0
    begin = time.perf_counter()
    for number in numbers:
        sample = index[number]
        try:
            data = image_bytes(reader, sample)
            size += len(data)
            transform(data, 0, number)
        except (OSError, BadImage) as error:
            bad.append(f"{sample.id} ({error})")
    return bad, size / (time.perf_counter() - begin)
