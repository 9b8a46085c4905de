"""Drills on a real SLURM that take a minute or more each: `python -m pytest tests/slurm/drills.py`,
as root.

Where the seconds of a start-up go: `python -m pytest tests/slurm/drills.py -k start_up -s`, on an
idle machine."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from cluster import TWO, Cluster, Job, equals, missing, rank_logs
from runs import Folder, start

pytestmark = pytest.mark.slow
LONG = ["schedule.steps=120", "schedule.warmup_steps=5"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if (why := missing()) is not None:
        pytest.skip(why)
    with Cluster(8) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def long_one(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The run of LONG without a stop."""
    folder = Folder(tmp_path_factory.mktemp("long") / "run")
    assert start(tiny, folder.path, *LONG) == 0
    return folder


def test_of_a_cut_off_start_and_its_successor_one_writes(
    cluster: Cluster, tiny: Path, long_one: Folder, tmp_path: Path
) -> None:
    run = Folder(tmp_path / "run")
    arguments = [
        tiny,
        *TWO,
        *LONG,
        "batch.per_device=1",
        "run.lease_timeout_s=6",
        f"run.dir={run.path}",
    ]
    job = cluster.submit("pretrain.sbatch", *arguments, nodes="1", ranks=2, of="1-2")
    job.until(lambda: len(run.steps()) >= 3)
    (first,) = re.findall(r"node[12]", job.show()["NodeList"])
    # SLURM gives it up; its ranks have each other and the disk, and train on
    cluster.lab("cut", int(first[-1]))
    try:
        job.until(lambda: job.restarts == 1 and len(run.events("resume")) == 1)
        # says the earlier start, and stops
        job.until(lambda: "took over this run from step" in rank_logs(run, job)[0])
        assert job.state == "RUNNING"
    finally:
        cluster.lab("heal", int(first[-1]))
    job.ends("COMPLETED")
    assert equals(run, long_one)
    assert len(list((run.path / "leases").glob("*.json"))) == 1 + job.restarts


@pytest.mark.parametrize("rank", [0, 1])
def test_a_cut_link_between_two_nodes_of_a_job(
    cluster: Cluster, tiny: Path, long_one: Folder, tmp_path: Path, rank: int
) -> None:
    run = Folder(tmp_path / "run")
    job = cluster.submit("pretrain.sbatch", tiny, *TWO, *LONG, f"run.dir={run.path}", of="3-5")
    job.until(lambda: bool(run.committed()))  # there is something to go on from
    header = re.search(r"rank \d on node(\d)", rank_logs(run, job)[rank])
    assert header
    cluster.lab("cut", int(header[1]))
    try:
        job.until(lambda: len(run.events("resume")) == 1)
    finally:
        cluster.lab("heal", int(header[1]))
    job.ends("COMPLETED")
    assert equals(run, long_one)
    assert job.restarts == 1, job.said()  # what came back did not take the new start down


def test_the_node_of_the_batch_shell_is_lost(
    cluster: Cluster, tiny: Path, uninterrupted: Folder, tmp_path: Path
) -> None:
    run = Folder(tmp_path / "run")
    job = cluster.submit("pretrain.sbatch", tiny, *TWO, f"run.dir={run.path}", of="6-8")
    job.until(lambda: run.committed() == [10] and len(run.steps()) > 10)
    node = int(job.show()["BatchHost"].removeprefix("node"))
    cluster.lab("kill", node)
    try:
        job.ends("COMPLETED")
    finally:
        cluster.lab("start", node)
    assert equals(run, uninterrupted)
    assert [event["step"] for event in run.events("resume")] == [10]


def test_the_time_limit_as_slurm_sees_it(
    cluster: Cluster, tiny: Path, long_one: Folder, tmp_path: Path
) -> None:
    run = Folder(tmp_path / "run")
    limit = ("--time=2", "--signal=B:USR1@60")  # looked at every 30 s
    arguments = [
        tiny,
        *TWO,
        *LONG,
        "batch.per_device=1",
        "evaluate.picture_every_steps=1",
        f"run.dir={run.path}",
    ]
    job = cluster.submit("pretrain.sbatch", *arguments, of="1-2", options=limit)
    job.ends("COMPLETED", timeout_s=1000)
    assert equals(run, long_one)
    stops = run.events("stop")
    assert len(stops) == job.restarts + 1 > 1
    assert {stop["status"] for stop in stops[:-1]} == {75}
    assert all(
        "SIGUSR1" in stop["reason"] or "the deadline is near" in stop["reason"]
        for stop in stops[:-1]
    )


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_preempted_job_of_another_launcher_goes_on(
    cluster: Cluster, tiny: Path, uninterrupted: Folder, tmp_path: Path, launcher: str
) -> None:
    run = Folder(tmp_path / "run")
    job = cluster.submit(
        "pretrain.sbatch", tiny, *TWO, f"run.dir={run.path}", of="1-2", LAUNCHER=launcher
    )
    job.until(lambda: len(run.steps()) >= 3)
    whole = (
        "--partition=high",
        "--exclusive",
        "--nodes=2",
        "--exclude=node[3-8]",
        "--output=/dev/null",
    )
    Job(cluster, int(cluster.run("sbatch", "--parsable", *whole, "--wrap=sleep 1"))).ends(
        "COMPLETED"
    )
    job.ends("COMPLETED")
    assert equals(run, uninterrupted)
    assert (job.restarts, run.events("stop")[0]["reason"]) == (1, "stopped, asked by SIGTERM")


def test_a_requeue_by_hand_goes_on(
    cluster: Cluster, tiny: Path, uninterrupted: Folder, tmp_path: Path
) -> None:
    run = Folder(tmp_path / "run")
    job = cluster.submit("pretrain.sbatch", tiny, *TWO, f"run.dir={run.path}", of="3-4")
    job.until(lambda: len(run.steps()) >= 3)
    cluster.run("scontrol", "requeue", job.id)
    job.ends("COMPLETED")
    assert equals(run, uninterrupted)
    assert job.restarts == 1


def test_starts_without_progress_come_to_an_end(
    cluster: Cluster, tiny: Path, tmp_path: Path
) -> None:
    run = Folder(tmp_path / "run")
    # each start stops before its first step
    late = [tiny, f"run.dir={run.path}", "run.deadline_s=0.001"]
    job = cluster.submit(
        "pretrain.sbatch", *late, nodes="1", of="5-6", IDLE_STARTS="3", BACKOFF_S="2"
    )
    job.ends("FAILED")
    assert (job.restarts, job.show()["ExitCode"]) == (2, "75:0")
    assert "restarts in 2 s" in job.said()
    assert "restarts in 4 s" in job.said()
    assert "3 restarts in a row without progress beyond step 0" in job.said()


def test_a_second_job_on_a_run_waits_and_then_leaves_it_alone(
    cluster: Cluster, tiny: Path, long_one: Folder, tmp_path: Path
) -> None:
    run = Folder(tmp_path / "run")
    arguments = [tiny, *TWO, *LONG, f"run.dir={run.path}"]
    job = cluster.submit("pretrain.sbatch", *arguments, of="1-2")
    job.until(lambda: len(run.steps()) >= 3)
    second = cluster.submit("pretrain.sbatch", *arguments, "run.lease_wait_s=0.5", of="7-8").ends(
        "FAILED"
    )
    assert (second.restarts, second.show()["ExitCode"]) == (0, "2:0")
    assert f"is being trained by job {job.id}" in second.said()
    job.ends("COMPLETED")
    assert equals(run, long_one)


STARTS = {
    "ZeRO-2": ("zero2.json", None),
    "ZeRO-3, offload, its C++ built before": (
        "zero3_offload.json",
        os.environ.get("TORCH_EXTENSIONS_DIR", ""),
    ),
    "ZeRO-3, offload, its C++ built now": ("zero3_offload.json", "new"),
}


@pytest.mark.parametrize("case", STARTS)
def test_a_start_up_takes_seconds(
    cluster: Cluster, tiny: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the job's start to the first step of two ranks on one node, through pretrain.sbatch
    and srun.
    """
    config, extensions = STARTS[case]
    run, folder = (
        Folder(tmp_path / "run"),
        str(tmp_path / "new") if extensions == "new" else extensions,
    )
    job = cluster.submit(
        "pretrain.sbatch",
        tiny,
        "engine.name=deepspeed",
        f"engine.config={config}",
        "engine.precision=bf16",
        "schedule.steps=6",
        f"run.dir={run.path}",
        nodes="1",
        ranks=2,
        of="1-2",
        **({"TORCH_EXTENSIONS_DIR": folder} if folder is not None else {}),
    )
    job.ends("COMPLETED", timeout_s=600)
    noted = json.loads((run.path / "jobs.jsonl").read_text())["time"]
    (begun,), (first,) = run.events("start"), run.events("first_step")
    started = datetime.fromisoformat(job.show()["StartTime"]).timestamp()  # whole seconds
    split = {
        "batch shell": noted - started,
        "srun": begun["process_started"] - noted,
        **first["startup_s"],
    }
    with capsys.disabled():
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in split.items())
        print(f"\n{case}: {sum(split.values()):.1f} s to the first step: {parts}", end="")
    assert sum(split.values()) == pytest.approx(first["time"] - started, abs=0.1)
    assert sum(split.values()) < (25 if extensions != "new" else 200)
