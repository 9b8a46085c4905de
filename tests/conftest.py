"""Shared fixtures: a launcher of real ranks, and small shards of real photographs."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from runs import Folder, collect_seldom, python_path, start

ROOT = Path(__file__).parent.parent

# The files that take longest, in that order: begun first, so that processes which share the files
# end together.
LONGEST = (
    "stragglers",  # mostly asleep
    *("slurm", "engines", "train", "detect", "plan", "checkpoint", "presence"),
    *("stream", "segment", "drill", "sources", "follow", "finetune", "starting"),
    *("waits", "ending", "compare_objectives", "preempt", "replay", "gpu_day", "lease", "hosts"),
    *("compiling", "wheel", "cli", "a_new_task", "expansion", "slurm_job", "doctor", "versions"),
    *("export", "ranks_start", "cooldown", "report", "bench_step", "plugins"),
)

settings.register_profile("here", deadline=None)  # a machine that is busy is no failure
settings.load_profile("here")
collect_seldom()


def pytest_configure(config: pytest.Config) -> None:
    """Tests are of the CPU on any machine: their numbers are, and ranks share no GPU. `-m gpu` runs
    those of a GPU.
    """
    if torch.version.cuda is not None and config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["DS_ACCELERATOR"] = "cpu"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU, or not asked for: pytest -m gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first (with xdist's --no-loadscope-reorder)."""
    rank = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ranks:
    """Processes with ranks, as a launcher starts them.

    `wait` gives their exit statuses and shows what they said.
    """

    def __init__(self, command: Sequence[str], world: int, log_dir: Path, **env: str) -> None:
        shared = {
            **os.environ,
            "PYTHONPATH": python_path(),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "PYTHONUNBUFFERED": "1",
            **env,
        }
        self.logs = [log_dir / f"rank-{rank}-{time.time_ns()}.log" for rank in range(world)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            with log.open("w") as out:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                        env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    )
                )

    def said(self, rank: int = 0) -> str:
        return self.logs[rank].read_text()

    def wait(self, timeout_s: float = 900.0) -> list[int]:
        """Exit statuses; a rank that outlives a failed peer by half a minute is killed."""
        end = time.monotonic() + timeout_s
        while any(process.poll() is None for process in self.processes):
            if any(process.poll() for process in self.processes):
                end = min(end, time.monotonic() + 30)
            if time.monotonic() > end:
                for process in self.processes:
                    process.kill()
            time.sleep(0.05)
        return [process.wait() for process in self.processes]

    def succeed(self, timeout_s: float = 900.0) -> str:
        """What rank 0 said, once all ranks ended with 0."""
        statuses = self.wait(timeout_s)
        heard = "\n".join(
            f"--- rank {rank}: {status}\n{self.said(rank)}" for rank, status in enumerate(statuses)
        )
        assert statuses == [0] * len(statuses), heard
        return self.said()


@pytest.fixture
def ranks(tmp_path: Path) -> Callable[..., Ranks]:
    """Start `python ARGS...` on so many ranks: ranks("-m", "rcmae.train", ..., world=2)."""

    def start(*args: str, world: int = 2, **env: str) -> Ranks:
        return Ranks([sys.executable, *map(str, args)], world, tmp_path, **env)

    return start


def two_photographs() -> list[np.ndarray]:
    """scikit-learn's, [427, 640, 3]; where it is not installed, two of noise, which do for all that
    is not held against numbers of the photographs.
    """
    try:
        import sklearn  # here alone: tests without photographs need it not
    except ModuleNotFoundError:
        draw = np.random.default_rng(0)
        small = [Image.fromarray(draw.integers(0, 255, (43, 64, 3), np.uint8)) for _ in range(2)]
        return [np.asarray(image.resize((640, 427))) for image in small]
    images = Path(sklearn.__file__).parent / "datasets" / "images"
    names = ("china.jpg", "flower.jpg")
    return [np.asarray(Image.open(images / name, formats=["JPEG"])) for name in names]


@pytest.fixture(scope="session")
def photo_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pattern of six shards of 40 tiles each, 44 to 95 pixels a side, cut from scikit-learn's two
    photographs.

    The label of a tile is its quadrant of its photograph, 0 to 7. Every call writes the same bytes.
    """
    folder = tmp_path_factory.mktemp("photo-shards")
    photographs = two_photographs()
    draw = np.random.default_rng(0)
    for shard in range(6):
        with tarfile.open(folder / f"photo-{shard:06d}.tar", "w") as tar:
            for number in range(40):
                label = int(draw.integers(8))
                photograph, bottom, right = photographs[label // 4], label // 2 % 2, label % 2
                height, width = draw.integers(44, 96, 2)
                top = 213 * bottom + int(draw.integers(213 - height))
                left = 320 * right + int(draw.integers(320 - width))
                jpeg = io.BytesIO()
                Image.fromarray(photograph[top : top + height, left : left + width]).save(
                    jpeg, "JPEG", quality=90
                )
                for suffix, data in (("jpg", jpeg.getvalue()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{shard}_{number:02d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return f"{folder}/photo-{{000000..000005}}.tar"


@pytest.fixture(scope="session")
def tiny(photo_shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of 20 steps of 32 images on `photo_shards`, in fp32 on one process.

    Give it a run.dir.
    """
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(
        f"""
objective: {{name: rcmae}}
model: {{name: vit_tiny_patch16, image_size: 32, patch_size: 8, embed_dim: 64, depth: 3,
        num_heads: 4,
        decoder_dim: 32, decoder_depth: 2, decoder_heads: 4}}
engine: {{name: local, precision: fp32}}
data: {{shards: "{photo_shards}", workers: 0, canonical_streams: 8}}
batch: {{images: 32}}
schedule: {{steps: 20, warmup_steps: 5, lr: 1.0e-3}}
checkpoint: {{every_steps: 10}}
log: {{every_steps: 1, tensorboard: false, report: false}}
"""
    )
    return path


@pytest.fixture(scope="session")
def uninterrupted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The run that `tiny` describes, from the first to the last of its 20 steps without a stop.

    Do not write to it.
    """
    folder = Folder(tmp_path_factory.mktemp("uninterrupted") / "run")
    assert start(tiny, folder.path) == 0
    return folder
