"""The templates on a real SLURM: whatever happens to the jobs, the run is the uninterrupted one.

Two ranks on two nodes of a cluster on this machine (tests/slurm/lab.sh). Longer drills:
tests/slurm/drills.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from scenes import write_scenes
from test_detect import write_recipe
from test_finetune import recipe_of
from test_finetune import start as start_classifier

from cluster import ROOT, TWO, Cluster, Job, equals, missing, rank_logs
from rcmae import segment
from rcmae.commands import slurm_templates
from runs import Folder, keeping_handlers, python_path


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if (why := missing()) is not None:
        pytest.skip(why)
    with Cluster(8) as cluster:
        yield cluster


def test_every_template_is_accepted_by_the_scheduler(cluster: Cluster) -> None:
    templates = sorted((ROOT / "slurm").glob("*.sbatch"))
    assert {path.name for path in templates} >= {
        "pretrain.sbatch",
        "pretrain_vit_l.sbatch",
        "pretrain_vit_h.sbatch",
        "sweep.sbatch",
        "evaluate.sbatch",
    }
    nodes = {"pretrain_vit_l.sbatch": "node[1-4]", "pretrain_vit_h.sbatch": "node[1-8]"}
    for path in templates:
        told = cluster.run("sbatch", "--test-only", path)
        assert f"nodes {nodes.get(path.name, 'node1')} " in told
        lines = path.read_text().splitlines()
        options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
        first_command = next(
            number for number, line in enumerate(lines) if not line.startswith("#")
        )
        assert max(options) < first_command  # sbatch would pass over it without a word


def test_each_launcher_saves_when_warned_and_goes_on_after_the_requeue(
    cluster: Cluster, tiny: Path, uninterrupted: Folder, tmp_path: Path
) -> None:
    runs = {launcher: Folder(tmp_path / launcher) for launcher in ("srun", "torchrun", "deepspeed")}
    engines = {"deepspeed": ["engine.name=deepspeed", "engine.config=zero2.json"]}
    jobs = {
        launcher: cluster.submit(
            "pretrain.sbatch",
            tiny,
            *TWO,
            *engines.get(launcher, []),
            f"run.dir={run.path}",
            of="1-2",
            LAUNCHER=launcher,
        )
        for launcher, run in runs.items()
    }
    for launcher, job in jobs.items():
        job.until(lambda run=runs[launcher]: len(run.steps()) >= 3)
        job.warn()
    used = set()
    for launcher, job in jobs.items():
        job.ends("COMPLETED")
        run = runs[launcher]
        assert equals(run, uninterrupted)
        assert job.restarts == 1
        stop, finish = run.events("stop")
        assert (stop["status"], stop["reason"], finish["status"]) == (
            75,
            "stopped, asked by SIGUSR1",
            0,
        )
        # the save was of that very step
        assert [event["step"] for event in run.events("resume")] == [stop["step"]]
        logs = rank_logs(run, job)
        assert set(logs) == {0, 1}
        for rank, log in logs.items():
            headers = re.findall(
                r"^== .* job (\d+), start (\d), rank (\d) on (\w+), GPU (\d),", log, re.MULTILINE
            )
            assert [header[:4] for header in headers] == [
                (str(job.id), start, str(rank), f"node{rank + 1}") for start in ("0", "1")
            ]
            used |= {(headers[0][3], headers[0][4])}
    assert len(used) == 6  # three jobs shared two nodes at once, and no GPU or port


def test_a_fine_tuning_is_requeued_like_a_pretraining(
    cluster: Cluster, tiny: Path, uninterrupted: Folder, tmp_path: Path
) -> None:
    """The recipe says that it is one; nobody names its module."""
    recipe = recipe_of(tiny, tmp_path, uninterrupted.path, "finetune", smoothing=0.1)
    whole, run = Folder(tmp_path / "whole"), Folder(tmp_path / "run")
    two = ["engine.name=fsdp2", "batch.per_device=2"]
    job = cluster.submit("pretrain.sbatch", recipe, *two, f"run.dir={run.path}", of="1-2")
    job.until(lambda: len(run.steps()) >= 2)
    job.warn()
    assert start_classifier(recipe, whole.path) == 0
    job.ends("COMPLETED")
    assert equals(run, whole)
    assert job.restarts == 1
    assert run.events("evaluate")[-1]["scores"]["student"]["images"] == 40


def test_segmentation_and_detection_are_requeued_like_a_pretraining(
    cluster: Cluster, tmp_path: Path
) -> None:
    """One is warned, the other preempted; the recipes say what they are."""
    (tmp_path / "objects").mkdir()
    segmenting, detecting = write_scenes(tmp_path / "scenes"), write_recipe(tmp_path / "objects")
    two = ["engine.name=fsdp2", "batch.per_device=2", "data.workers=0"]
    longer = {segmenting: "schedule.steps=60", detecting: "schedule.steps=20"}
    runs = {recipe: Folder(tmp_path / recipe.stem) for recipe in longer}
    jobs = {}
    for (recipe, steps), of in zip(longer.items(), ("1-2", "3-4"), strict=True):
        where = f"run.dir={runs[recipe].path}"
        jobs[recipe] = cluster.submit("pretrain.sbatch", recipe, *two, steps, where, of=of)
    for recipe, job in jobs.items():
        job.until(lambda run=runs[recipe]: len(run.steps()) >= 3)
    jobs[segmenting].warn()
    first = ("--partition=high", "--exclusive", "--nodes=2", "--exclude=node[1-2,5-8]")
    words = ("sbatch", "--parsable", *first, "--output=/dev/null", "--wrap=sleep 1")
    urgent = Job(cluster, int(cluster.run(*words)))
    whole = Folder(tmp_path / "whole")
    with keeping_handlers():
        alone = [str(segmenting), f"run.dir={whole.path}", longer[segmenting]]
        assert segment.main(alone) == 0
    urgent.ends("COMPLETED")
    for recipe, job in jobs.items():
        job.ends("COMPLETED")
        run = runs[recipe]
        assert job.restarts == 1, job.said()
        assert run.steps() == list(range(1, int(longer[recipe].rpartition("=")[2]) + 1))
        stop, finish = run.events("stop")
        assert (stop["status"], finish["status"]) == (75, 0)
        assert run.events("resume")[0]["step"] == stop["step"]
        assert run.events("evaluate")
        assert run.outcome()["status"] == "finished"
    assert equals(runs[segmenting], whole)


def test_a_preempted_job_goes_on_when_the_other_is_done(
    cluster: Cluster, tiny: Path, uninterrupted: Folder, tmp_path: Path
) -> None:
    run = Folder(tmp_path / "run")
    job = cluster.submit("pretrain.sbatch", tiny, *TWO, f"run.dir={run.path}", of="1-2")
    job.until(lambda: len(run.steps()) >= 3)
    whole = (
        "--partition=high",
        "--exclusive",
        "--nodes=2",
        "--exclude=node[3-8]",
        "--output=/dev/null",
    )
    urgent = Job(cluster, int(cluster.run("sbatch", "--parsable", *whole, "--wrap=sleep 1")))
    urgent.ends("COMPLETED")
    job.ends("COMPLETED")
    assert equals(run, uninterrupted)
    assert job.restarts == 1
    # in the grace time: nothing is done twice
    assert run.events("stop")[0]["reason"] == "stopped, asked by SIGTERM"
    assert run.events("resume")[0]["step"] == run.events("stop")[0]["step"]


def test_a_lost_node_costs_the_steps_since_the_last_checkpoint(
    cluster: Cluster, tiny: Path, uninterrupted: Folder, tmp_path: Path
) -> None:
    run = Folder(tmp_path / "run")
    cluster.idle("3-4")
    job = cluster.submit(
        "pretrain.sbatch", tiny, *TWO, f"run.dir={run.path}", nodes="1-2", of="3-4"
    )
    job.until(lambda: run.committed() == [10] and len(run.steps()) > 10)
    cluster.lab("kill", 4)
    try:
        job.ends("COMPLETED")
    finally:
        cluster.lab("start", 4)
    assert equals(run, uninterrupted)
    assert job.restarts == 1
    (started,), (resumed,) = run.events("start"), run.events("resume")
    # on what is left, with the same batch
    assert (started["sizes"]["world"], resumed["sizes"]["world"]) == (2, 1)
    assert resumed["step"] == 10
    assert resumed["sizes"]["images_per_step"] == started["sizes"]["images_per_step"] == 32


def test_scancel_ends_a_run_cleanly_and_for_good(
    cluster: Cluster, tiny: Path, tmp_path: Path
) -> None:
    run = Folder(tmp_path / "run")
    job = cluster.submit("pretrain.sbatch", tiny, *TWO, f"run.dir={run.path}", of="5-6")
    job.until(lambda: len(run.steps()) >= 3)
    job.scancel()
    job.ends("CANCELLED")
    job.until(lambda: "ended by scancel" in job.said())
    assert job.restarts == 0
    assert (run.outcome()["exit_status"], run.outcome()["step"]) == (75, run.committed()[-1])
    assert run.steps() == list(range(1, run.outcome()["step"] + 1))


def test_what_cannot_run_is_not_requeued(cluster: Cluster, tiny: Path, tmp_path: Path) -> None:
    run = Folder(tmp_path / "run")
    wrong = cluster.submit(
        "pretrain.sbatch", tiny, "model.nam=x", f"run.dir={tmp_path / 'wrong'}", of="5-6"
    )
    late = cluster.submit(
        "pretrain.sbatch", tiny, "model.name=vit_x", f"run.dir={run.path}", nodes="1", of="5-6"
    )
    uneven = cluster.submit(
        "pretrain.sbatch", tiny, f"run.dir={run.path}", nodes="1", ranks=3, of="5-6"
    )
    for job, words in (
        (wrong, "did you mean 'name'"),
        (late, "unknown architecture"),
        (uneven, "use 30 or 33"),
    ):
        job.ends("FAILED")
        shown = job.show()
        assert (shown["ExitCode"], shown["Restarts"]) == ("2:0", "0")
        assert words in job.said()
    assert not (tmp_path / "wrong").exists()


def test_templates_that_were_copied_out_of_a_package_run_where_they_lie(
    cluster: Cluster, tiny: Path, tmp_path: Path
) -> None:
    """No checkout in sight: neither where the job is submitted nor in its environment."""
    assert slurm_templates.main([str(tmp_path / "my-jobs")]) == 0
    run = Folder(tmp_path / "run")
    nowhere = {"RCMAE_HOME": str(tmp_path), "PYTHONPATH": python_path()}  # as if it were installed
    short = ["schedule.steps=6", "schedule.warmup_steps=1", "run.stop_after_steps=3"]
    job = cluster.submit(
        tmp_path / "my-jobs" / "pretrain.sbatch",
        tiny,
        *short,
        f"run.dir={run.path}",
        nodes="1",
        of="7-8",
        **nowhere,
    )
    job.ends("COMPLETED")
    assert job.restarts == 1
    assert run.steps() == list(range(1, 7))


def test_a_sweep_is_an_array_of_runs(cluster: Cluster, tiny: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "rates.yaml"
    sweep.write_text(
        f"recipe: {tiny}\ndir: {tmp_path / 'runs'}\n"
        "set: {schedule.steps: 6, schedule.warmup_steps: 1}\n"
        "runs:\n  low: {schedule.lr: 1.0e-4}\n  high: {schedule.lr: 1.0e-3, "
        "run.stop_after_steps: 3}\n"
    )
    tasks = cluster.run(cluster.python, "-m", "rcmae", "slurm-job", "sweep", sweep).splitlines()[0]
    job = cluster.submit("sweep.sbatch", sweep, nodes="1", of="7-8", options=(f"--array={tasks}",))
    runs = {name: Folder(tmp_path / "runs" / name) for name in ("low", "high")}
    job.until(lambda: [len(run.events("stop")) for run in runs.values()] == [1, 2])
    for name, lr, statuses in (("low", 1e-4, [0]), ("high", 1e-3, [75, 0])):
        # that task alone was requeued
        assert runs[name].steps() == list(range(1, 7))
        assert [stop["status"] for stop in runs[name].events("stop")] == statuses
        assert max(row["lr"] for row in runs[name].rows()) == lr


def test_a_side_car_sees_each_checkpoint_once_over_requeues_of_both(
    cluster: Cluster, tiny: Path, photo_shards: str, tmp_path: Path
) -> None:
    run = Folder(tmp_path / "run")
    train = photo_shards.replace("000005}", "000003}")
    often = ["schedule.steps=90", "checkpoint.every_steps=4", "checkpoint.keep=99"]
    job = cluster.submit(
        "pretrain.sbatch", tiny, *often, f"run.dir={run.path}", nodes="1", of="5-6"
    )
    labelled = [
        f"evaluate.train_shards={train}",
        f"evaluate.test_shards={photo_shards}",
        "evaluate.k=[3]",
        "evaluate.held_images=0",  # the training would be over before two evaluations
    ]
    beside = cluster.submit(
        "evaluate.sbatch",
        run.path,
        *labelled,
        "--patience-s=3",
        "--poll-s=0.2",
        nodes="1",
        of="7-8",
        options=(f"--dependency=after:{job.id}",),
    )
    evaluations = Folder(run.path / "evaluations")
    job.until(lambda: len(evaluations.events("evaluate")) >= 2)
    beside.warn()
    job.warn()
    job.ends("COMPLETED")
    beside.ends("COMPLETED")
    assert (job.restarts, beside.restarts >= 1) == (1, True)
    assert [event["step"] for event in evaluations.events("evaluate")] == run.committed()
    assert len(run.committed()) >= 90 / 4
    assert "the run is finished, and evaluated up to step 90" in rank_logs(evaluations, beside)[0]
