"""A real SLURM on this machine for a test: its nodes, the jobs submitted to it, and what befalls
them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runs import Folder

ROOT = Path(__file__).parent.parent
LAB = ROOT / "tests" / "slurm" / "lab.sh"
# Two ranks, and steps that take their time: what should hit the middle of a run does.
TWO = ["engine.name=fsdp2", "batch.per_device=2", "evaluate.picture_every_steps=1"]
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def no_nodes() -> str | None:
    """Why this machine cannot have nodes with addresses of their own, None if it can."""
    absent = [
        program for program in ("ip", "nsenter", "unshare") if not shutil.which(program, path=PATH)
    ]
    if absent:
        return (
            f"no nodes: {', '.join(absent)} not installed (root on Debian: tests/slurm/install.sh)"
        )
    if os.geteuid() != 0:
        return "no nodes: their namespaces want root"
    link = f"probe{os.getpid()}"  # of this process: other tests may ask at the same moment
    probe = (
        f"unshare --mount --uts --net true && ip link add {link} type bridge && ip link delete "
        f"{link}"
    )
    if subprocess.run(probe, shell=True, capture_output=True, env={"PATH": PATH}).returncode:
        return "no nodes: this container may not make network namespaces"
    return None


def missing() -> str | None:
    """Why there can be no cluster here, None if there can."""
    programs = ("slurmctld", "slurmd", "sbatch", "munged")
    absent = [program for program in programs if not shutil.which(program, path=PATH)]
    if absent:
        return (
            f"no SLURM: {', '.join(absent)} not installed (root on Debian: tests/slurm/install.sh)"
        )
    return no_nodes()


class Cluster:
    """So many nodes of 8 GPUs on paper; `with` starts and ends it. Ranks run on the CPU."""

    def __init__(self, nodes: int) -> None:
        # munge wants a short path
        self.nodes, self.dir = nodes, Path(tempfile.mkdtemp(prefix="lab", dir="/tmp"))
        self.python = self.dir / "python"
        # its daemons have precedence on a busy machine; ranks are as nice as this process
        nice = f"nice -n $(({os.nice(0)} - $(nice)))"
        self.python.write_text(
            f'#!/bin/sh\nCUDA_VISIBLE_DEVICES= exec {nice} {sys.executable} "$@"\n'
        )
        self.python.chmod(0o755)
        self.env = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SLURM_", "SBATCH_"))
        } | {
            "PATH": PATH,
            "SLURM_CONF": str(self.dir / "slurm.conf"),
            "RCMAE_HOME": str(ROOT),
            "RCMAE_ENV": "/dev/null",
            "PYTHON": str(self.python),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "BACKOFF_S": "1",
        }

    def __enter__(self) -> Cluster:
        self.lab("up", self.nodes)
        return self

    def __exit__(self, *error: object) -> None:
        subprocess.run(["scancel", "--user=root"], env=self.env)
        self.lab("down")
        shutil.rmtree(self.dir, ignore_errors=True)

    def lab(self, verb: str, number: int = 0) -> None:
        """What lab.sh does."""
        done = subprocess.run(
            [LAB, verb, self.dir, str(number)], env=self.env, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{verb}: {done.stdout}{done.stderr}"

    def run(self, *command: object, **env: str) -> str:
        """What a command on the login node prints."""
        words = [str(word) for word in command]
        done = subprocess.run(
            words, env={**self.env, **env}, cwd=self.dir, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def idle(self, of: str, timeout_s: float = 300.0) -> None:
        """Wait until some nodes ("1-3") are free: a job for one or two nodes takes one if the
        other is not.
        """
        end, nodes = time.monotonic() + timeout_s, f"--nodes=node[{of}]"
        while set(
            self.run("sinfo", "--noheader", "--format=%T", "--partition=test", nodes).split()
        ) != {"idle"}:
            assert time.monotonic() < end, self.run("sinfo", "-lN")
            time.sleep(0.2)

    def submit(
        self,
        template: str | Path,
        *arguments: object,
        nodes: str = "2",
        of: str = "1-8",
        ranks: int = 1,
        options: tuple[str, ...] = (),
        **env: str,
    ) -> Job:
        """`sbatch` of a template: on so many of some nodes ("1-3"), with as many ranks and GPUs
        on each.
        """
        first, _, last = of.partition("-")
        others = {
            f"node{node}"
            for node in range(1, self.nodes + 1)
            if not int(first) <= node <= int(last or first)
        }
        shape = [f"--nodes={nodes}", f"--gpus-per-node={ranks}", "--cpus-per-gpu=1"]
        where = [f"--exclude={','.join(sorted(others))}"] if others else []
        script = ROOT / "slurm" / template  # or an absolute path
        told = self.run(
            "sbatch",
            "--parsable",
            "--output=%A.log",
            *shape,
            *where,
            *options,
            script,
            *arguments,
            **env,
        )
        return Job(self, int(told))


class Job:
    """A job that was submitted."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.cluster, self.id = cluster, number

    def show(self) -> dict[str, str]:
        """What scontrol says of it."""
        words = self.cluster.run("scontrol", "-o", "show", "job", self.id).split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    @property
    def state(self) -> str:
        return self.show()["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.show()["Restarts"])

    def said(self) -> str:
        """The job's own log."""
        path = self.cluster.dir / f"{self.id}.log"
        return path.read_text() if path.exists() else ""

    def scancel(self, *options: str) -> None:
        self.cluster.run("scancel", *options, self.id)

    def warn(self) -> None:
        """What --signal=B:USR1@300 does when the time limit is near."""
        self.scancel("--batch", "--signal=USR1")

    def until(self, condition: Callable[[], bool], timeout_s: float = 600.0) -> None:
        """Wait; fail with the logs if it takes too long."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, (
                f"not within {timeout_s:g} s; {self.show()}\n{self.said()}"
            )
            time.sleep(0.2)

    def ends(self, state: str, timeout_s: float = 600.0) -> Job:
        """Wait until the job is over; fail if it did not end so."""
        over = {
            "COMPLETED",
            "FAILED",
            "CANCELLED",
            "TIMEOUT",
            "NODE_FAIL",
            "OUT_OF_MEMORY",
            "DEADLINE",
        }
        self.until(lambda: self.state in over, timeout_s)
        assert self.state == state, f"{self.state}\n{self.said()}"
        return self


def rank_logs(run: Folder, job: Job) -> dict[int, str]:
    """What each rank of a job wrote, over all its starts."""
    logs = sorted((run.path / "logs" / f"job-{job.id}").glob("rank-*.log"))
    return {int(log.stem.removeprefix("rank-")): log.read_text() for log in logs}


def equals(run: Folder, whole: Folder) -> bool:
    """Whether a run took the steps of another, each once, with the same losses."""
    assert run.steps() == whole.steps()
    assert run.losses() == pytest.approx(whole.losses(), rel=1e-5)
    assert run.outcome()["status"] == "finished"
    assert run.committed()[-1] == whole.steps()[-1]
    return True
