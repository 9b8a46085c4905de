"""Without a scheduler: two hosts with names and addresses of their own, the launchers started by
hand on each.

The hosts are namespaces of this machine (tests/slurm/lab.sh), which reach each other over their
network alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import LAB, PATH, equals, no_nodes
from runs import Folder, python_path
from tests.conftest import ROOT

Start = Callable[..., subprocess.Popen[str]]
ENGINE = ["engine.name=deepspeed", "engine.config=zero2.json", "batch.per_device=8"]


@pytest.fixture(scope="module")
def on() -> Iterator[Start]:
    """Start `python -m ARGS...` on host 1 or 2: on(1, "torch.distributed.run", ...)."""
    if (why := no_nodes()) is not None:
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix="wire"))
    subprocess.run([LAB, "wire", folder, "2"], check=True)
    python = str(Path(sys.executable).parent)
    own = {
        "PATH": f"{python}:{PATH}",
        "PYTHONPATH": python_path(),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }

    def start(host: int, *arguments: object) -> subprocess.Popen[str]:
        words = [LAB, "on", folder, str(host), sys.executable, "-m", *map(str, arguments)]
        return subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, **own},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    yield start
    subprocess.run([LAB, "down", folder], check=True)
    shutil.rmtree(folder)


def both(on: Start, words: Callable[[int], list[object]]) -> list[str]:
    """What each host's launcher said, once both ended with 0."""
    started = [on(host, *words(host)) for host in (1, 2)]
    try:
        said = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n---\n".join(said)
    return said


def trained_on_both(run: Folder, whole: Folder) -> None:
    assert equals(run, whole)
    (start,) = run.events("start")
    assert start["sizes"]["world"] == 2
    # where rank 0 was
    assert '"host": "node1"' in (run.path / "leases" / "00000001.json").read_text()


def test_torchrun_on_two_hosts(
    on: Start, tiny: Path, uninterrupted: Folder, tmp_path: Path
) -> None:
    run = Folder(tmp_path / "run")
    both(
        on,
        lambda host: [
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc-per-node=1",
            f"--node-rank={host - 1}",
            "--master-addr=node1",
            "--master-port=29500",
            "-m",
            "rcmae.train",
            tiny,
            *ENGINE,
            f"run.dir={run.path}",
        ],
    )
    trained_on_both(run, uninterrupted)


def test_deepspeed_with_a_hostfile_on_two_hosts(
    on: Start, tiny: Path, uninterrupted: Folder, tmp_path: Path
) -> None:
    run, hostfile = Folder(tmp_path / "run"), tmp_path / "hosts"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    said = both(
        on,
        lambda host: [
            "deepspeed.launcher.runner",
            f"--hostfile={hostfile}",
            "--no_ssh",
            f"--node_rank={host - 1}",
            "--master_addr=node1",
            "--master_port=29501",
            "--module",
            "rcmae.train",
            tiny,
            *ENGINE,
            f"run.dir={run.path}",
        ],
    )
    trained_on_both(run, uninterrupted)
    # both launchers had read the file
    assert all("'node1'" in each and "'node2'" in each for each in said)
