"""Shared fixtures: a launcher of real ranks, and small shards of real photographs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ranks:
    """Processes with ranks, as a launcher starts them; `wait` gives their exit statuses and shows what they said."""

    def __init__(self, command: Sequence[str], world: int, log_dir: Path, **env: str) -> None:
        shared = {
            **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world), "PYTHONUNBUFFERED": "1", **env,
        }  # fmt: skip
        self.logs = [log_dir / f"rank-{rank}-{time.time_ns()}.log" for rank in range(world)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            with log.open("w") as out:
                self.processes.append(
                    subprocess.Popen(
                        command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                        env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    )  # fmt: skip
                )

    def said(self, rank: int = 0) -> str:
        return self.logs[rank].read_text()

    def wait(self, timeout_s: float = 300.0) -> list[int]:
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

    def succeed(self, timeout_s: float = 300.0) -> str:
        """What rank 0 said, once all ranks ended with 0."""
        statuses = self.wait(timeout_s)
        heard = "\n".join(f"--- rank {rank}: {status}\n{self.said(rank)}" for rank, status in enumerate(statuses))
        assert statuses == [0] * len(statuses), heard
        return self.said()


@pytest.fixture
def ranks(tmp_path: Path) -> Callable[..., Ranks]:
    """Start `python ARGS...` on so many ranks: ranks("-m", "rcmae.train", ..., world=2)."""

    def start(*args: str, world: int = 2, **env: str) -> Ranks:
        return Ranks([sys.executable, *map(str, args)], world, tmp_path, **env)

    return start
