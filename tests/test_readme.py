"""Every block of commands in the Markdown that a newcomer reads, run in order as it is written.

What differs from the text is in the tables below and nowhere else: paths of a cluster, sizes that a
laptop has, and lines that are left out, with the reason. Each training is judged as written first
(`--check`), then trained small. `tools/test.sh --all` has this, `tools/test.sh` has not.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import sklearn
from PIL import Image

from cluster import Cluster, Job, missing
from runs import python_path
from tests.conftest import ROOT, free_port

pytestmark = [pytest.mark.readme, pytest.mark.slow]

DOCUMENTS = ("README.md", "rcmae/recipes/README.md", "slurm/README.md")

# Lines that are not run -> why. Each stands in a document, else the entry is stale.
NOT_RUN = {
    "tools/quickstart.sh  ": "installs, and trains for minutes: the recipe is run by its own tests",
    "tools/test.sh  ": "it is what runs this",
    "bash tools/setup.sh && ": "installs from the network; tools/test.sh has done so",
    "git clone ... /shared/rcmae": "needs the network",
    "python3 -m venv .venv": "installs from the network; tests/test_wheel.py installs without",
    'export PATH="$PWD/.venv/bin:$PATH"': "there is none in this folder; PATH is set already",
    "rcmae shards make --coco instances_train.json": "no annotations of COCO's are here",
    "rcmae detect detect_rcmae_vit_b_16": "the same; tests/test_detect.py trains a detector",
    "rcmae shards make ADEChallengeData2016 ade": "ADE20K is not here; see below",
    "rcmae shards make --images photos --maps maps": "nor are maps; test_packing_targets.py packs",
    "rcmae segment segment_rcmae_vit_b_16": "the same; tests/test_segment.py trains a segmenter",
    "rcmae visualize segment runs/segment": "the same",
    "tail -F vit_l-$job.log": "it never ends; the files it shows are asked for instead",
}

# What a document says -> what stands for it here.
STANDS_FOR = {
    "RECIPE ...": "rcmae_vit_s_16 data.shards='/data/imagenet/train-*.tar' run.dir=runs/hosts",
    "/data/imagenet/train-{000000..001281}.tar": "/data/imagenet/train-*.tar",
    "'/data/": "'{here}/data/",
    " /data/": " {here}/data/",
    "data.shards=... run.dir=/scratch": (
        "data.shards='{here}/data/imagenet/train-*.tar' run.dir=/scratch"
    ),
    "/scratch/": "{here}/scratch/",
    "torchrun --nproc-per-node 8": "torchrun --master-port {port} --nproc-per-node 2",
    "deepspeed --num_gpus 8": "deepspeed --master_port {port} --num_gpus 2",
    "--nodes=4 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=8": "--nodes=2 --ntasks=2",
    "sbatch slurm/pretrain": "sbatch --nodes=2 --gpus-per-node=1 --cpus-per-gpu=1 slurm/pretrain",
    "sbatch --parsable": "sbatch --nodes=2 --gpus-per-node=1 --cpus-per-gpu=1 --parsable",
    "sbatch --dependency": "sbatch --cpus-per-gpu=1 --dependency",
    # two nodes: both commands at once, each one rank on this machine
    "--nproc-per-node=8": "--nproc-per-node=1",
    "master-addr=node1 --master-port=29500": "master-addr=127.0.0.1 --master-port={port}",
    "--hostfile=hosts --no_ssh --node_rank=0 --master_addr=node1 --master_port=29500": (
        "--num_gpus 2 --master_port {port}"
    ),
}

# Set over every training, once it was judged as written.
SHORT = (
    "batch.images=8 batch.per_device=4 schedule.epochs=null schedule.steps=3 "
    "schedule.warmup_epochs=null schedule.warmup_steps=1 data.workers=1 "
    "checkpoint.every_minutes=null"
)
# Set over those of a network of their own; others take it from the weights that they start from.
SMALL = (
    "model.image_size=32 model.patch_size=8 model.embed_dim=32 model.depth=2 model.num_heads=2 "
    "model.decoder_dim=16 model.decoder_depth=1 model.decoder_heads=2"
)
# A few photographs stand for ImageNet: what judges its recipes is told the length of its epoch.
LONG = "data.epoch_samples=1281167"
# As written, in a folder where nothing small was trained before.
CHECKED = "run.dir=runs/judged --check > /dev/null"

# Before a Python block: what its reader has.
PHOTO = """
from PIL import Image
photo = Image.open("photos/class0/0.jpg")
"""


class Block(NamedTuple):
    """A fenced block of a document."""

    document: str
    number: int
    language: str
    text: str

    @property
    def needs_slurm(self) -> bool:
        """Whether a command of it is SLURM's."""
        return bool(re.search(r"\b(sbatch|srun|squeue|scancel)\b", self.text))

    @property
    def is_for_two_nodes(self) -> bool:
        """Whether its commands are one a node, started together."""
        return "-rank=1" in self.text


def blocks() -> list[Block]:
    """All that are commands, in order."""
    found = []
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        for number, (language, body) in enumerate(fenced):
            if language in ("bash", "sh", "python"):
                found.append(Block(document, number, language, body))
    return found


def commands(text: str) -> list[str]:
    """The lines of a shell block, continued ones whole, without those that are not run."""
    whole = text.replace("\\\n", " ").splitlines()
    return [line for line in whole if not line.startswith(tuple(NOT_RUN))]


def here(command: str, folder: Path, port: int) -> str:
    """A command with what stands for paths and sizes of a cluster."""
    for said, ours in STANDS_FOR.items():
        command = command.replace(said, ours)
    return command.replace("{here}", str(folder)).replace("{port}", str(port))


def trains(command: str) -> bool:
    """Whether a command starts a training."""
    return bool(
        re.match(r"(rcmae (train|finetune|probe) |torchrun|deepspeed|.*sbatch.*slurm/pre)", command)
    )


def with_keys(command: str, keys: str) -> str:
    """A command with keys at its end: before its comment, inside its `$(...)`."""
    body = re.sub(r"\s+#\s.*$", "", command).rstrip()
    inner = body.startswith("job=$(")
    return f"{body.removesuffix(')')} {keys}{')' if inner else ''}"


def script_of(block: Block, folder: Path, *, slurm: bool) -> str:
    """What bash runs for a block."""
    lines = []
    port = free_port()
    for command in commands(block.text):
        if not slurm and Block("", 0, "", command).needs_slurm:
            continue
        mine = here(command, folder, port)
        if trains(command):
            from_weights = re.search(r"classify.init=", mine)
            if "sbatch" not in command:
                long = LONG if "/imagenet" in mine else ""
                if "checkpoint.init=" in mine:
                    long = SMALL  # what it starts from was trained small
                lines.append(with_keys(mine, f"{long} {CHECKED}"))
            mine = with_keys(mine, SHORT if from_weights else f"{SHORT} {SMALL}")
        elif re.search(r"rcmae (plan|doctor)", mine):
            mine = with_keys(mine, LONG)
        lines.append(mine)
    if block.is_for_two_nodes:
        lines = [f"{line} &" for line in lines if "--check" not in line] + ["wait -n", "wait -n"]
    return "\n".join(["set -euo pipefail", *lines])


def shown(block: Block) -> str:
    """Its name in a report."""
    return f"{block.document}-{block.number}"


def photographs(folder: Path, each: int) -> None:
    """A folder of photographs in four sub-folders: tiles of scikit-learn's two."""
    images = Path(sklearn.__file__).parent / "datasets" / "images"
    draw = np.random.default_rng(each)
    for label in range(4):
        name = ("china.jpg", "flower.jpg")[label // 2]
        photograph = np.asarray(Image.open(images / name, formats=["JPEG"]))  # [427, 640, 3]
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(each):
            height, width = draw.integers(90, 200, 2)
            top = 213 * (label % 2) + int(draw.integers(213 - height))
            left = int(draw.integers(640 - width))
            tile = photograph[top : top + height, left : left + width]
            Image.fromarray(tile).save(folder / f"class{label}" / f"{number}.jpg", quality=90)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all blocks are run, one after the other: what one makes, the next one finds."""
    folder = tmp_path_factory.mktemp("newcomer")
    photographs(folder / "photos", 20)  # of which a tenth is held out, and 64 make a batch
    photographs(folder / "others", 4)
    photographs(folder / "data/photos", 4)
    for name, images in (("train", "photos"), ("val", "others")):
        make("imagenet", name, folder / images, folder)
    make("theirs", "theirs", folder / "others", folder)
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    shutil.copytree(ROOT / "tools", folder / "tools")
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def make(where: str, name: str, images: Path, folder: Path) -> None:
    """Shards of a folder of images, where a document has some of another."""
    command = ["shards", "make", str(images), str(folder / "data" / where), "--name", name]
    subprocess.run([sys.executable, "-m", "rcmae", *command], check=True, env=environment(folder))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster | None]:
    """A real SLURM; None where there can be none."""
    if missing() is not None:
        yield None
        return
    with Cluster(2) as cluster:
        yield cluster


def environment(folder: Path, cluster: Cluster | None = None) -> dict[str, str]:
    """Of a newcomer's shell: `rcmae`, `python` and the launchers are this installation's."""
    commands = folder / "bin"
    if not commands.is_dir():
        commands.mkdir()
        rcmae = commands / "rcmae"
        rcmae.write_text(f'#!/bin/sh\nexec {sys.executable} -m rcmae "$@"\n')
        rcmae.chmod(0o755)
    base = {**os.environ, **(cluster.env if cluster else {})}
    # a rank's variables stay behind where a test has joined ranks in this very process
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in ("RCMAE_HOME", "RCMAE_ENV", *ranks):
        base.pop(name, None)
    return base | {
        "PATH": f"{commands}:{Path(sys.executable).parent}:{base['PATH']}",
        "PYTHONPATH": python_path(),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }


@pytest.mark.parametrize("block", blocks(), ids=shown)
def test_a_block_does_what_the_document_says(
    block: Block, folder: Path, cluster: Cluster | None
) -> None:
    if block.language == "python":
        command = [sys.executable, "-c", PHOTO + block.text]
    else:
        script = script_of(block, folder, slurm=cluster is not None)
        command = ["bash", "-c", script]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(folder, cluster),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{command[-1]}\n\n{done.stdout[-6000:]}"
    if block.needs_slurm:
        if cluster is None:
            pytest.skip(f"commands of SLURM left out: {missing()}")
        jobs_end_well(cluster, folder)


def jobs_end_well(cluster: Cluster, folder: Path) -> None:
    """Every job that was submitted completes."""
    for number in cluster.run("squeue", "--noheader", "--format=%i", "--states=all").split():
        job = Job(cluster, int(number))
        logs = "\n".join(path.read_text() for path in folder.glob(f"*-{number}.log"))
        job.until(lambda job=job: job.state not in ("PENDING", "RUNNING", "CONFIGURING"))
        assert job.state in ("COMPLETED", "COMPLETING"), f"{job.show()}\n{logs}"


@pytest.mark.parametrize("said", [*NOT_RUN, *STANDS_FOR])
def test_what_is_run_otherwise_stands_in_a_document(said: str) -> None:
    text = "\n".join((ROOT / document).read_text() for document in DOCUMENTS)
    if said not in STANDS_FOR or said[0] != " ":
        text = re.sub(r" *\\\n *", " ", text)
    assert said in text.replace("\\\n", " ")
