"""What the templates in slurm/ ask: answered without a scheduler."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rcmae.commands import slurm_job
from rcmae.config import batch_problems, load
from rcmae.errors import Refused
from rcmae.run import jobs, preempt
from tests.conftest import ROOT

SHAPE = ["--nodes=6", "--ranks-per-node=8"]


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder, inside a job of the scheduler."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    return tmp_path / "run"


def begin(run_dir: Path, *overrides: str, shape: list[str] = SHAPE) -> int:
    recipe = ["rcmae_vit_l_16", "data.shards=x.tar", f"run.dir={run_dir}"]
    return slurm_job.main(["begin", *shape, "--idle-starts=3", "--", *recipe, *overrides])


def end(run_dir: Path, status: int) -> int:
    return slurm_job.main(
        ["end", str(run_dir), f"--status={status}", "--idle-starts=3", "--backoff-s=60"]
    )


def answers(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    return dict(
        word.split("=", 1) for word in shlex.split(capsys.readouterr().out.splitlines()[-1])
    )


def commit(run_dir: Path, step: int, streams: int = 256) -> None:
    """A checkpoint as far as the templates look at it."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(
        json.dumps({"meta": {"sizes": {"canonical_streams": streams}}})
    )
    (run_dir / "checkpoints" / "LATEST").write_text(folder.name + "\n")


# -------------------------------------------------------------------------------------------- begin


@pytest.mark.parametrize(
    ("images", "streams"), [(4096, None), (4096, 256), (4608, 288), (960, 240)]
)
def test_the_largest_number_of_nodes_that_divides_is_used(images: int, streams: int | None) -> None:
    recipe = load("rcmae_vit_l_16", ["data.shards=x.tar", f"batch.images={images}"])
    data = recipe.data.model_copy(update={"canonical_streams": streams})
    recipe = recipe.model_copy(update={"data": data})
    for nodes, ranks in itertools.product(range(1, 13), (1, 3, 4, 5, 6, 8)):
        worlds = [n * ranks for n in range(1, nodes + 1)]
        fit = [world for world in worlds if images % world == 0 and (streams or world) % world == 0]
        if fit:
            assert jobs.nodes_that_fit(recipe, nodes=nodes, ranks_per_node=ranks) * ranks == max(
                fit
            )
            assert not batch_problems(recipe, max(fit))
        else:
            with pytest.raises(ValueError, match=f"no number of nodes of {ranks} ranks fits"):
                jobs.nodes_that_fit(recipe, nodes=nodes, ranks_per_node=ranks)


def test_idle_nodes_are_said_and_the_start_is_noted(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert begin(run_dir) == 0
    heard = capsys.readouterr()
    assert heard.out == f"run_dir={run_dir} nodes=4 module=rcmae.train\n"
    assert "2 of 6 nodes stay idle" in heard.err
    (start,) = jobs.starts(run_dir, "17")
    assert (start.restart, start.nodes, start.used, start.ranks, start.step) == (0, 6, 4, 32, 0)


def test_the_streams_that_a_run_chose_at_its_first_start_count(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nine = ["--nodes=9", "--ranks-per-node=8"]
    assert begin(run_dir, "batch.images=4608", shape=nine) == 0  # 72 ranks: 288 streams will do
    assert answers(capsys)["nodes"] == "9"
    commit(run_dir, 10, streams=256)
    assert begin(run_dir, "batch.images=4608", shape=nine) == 0
    assert answers(capsys)["nodes"] == "8"
    assert begin(run_dir, "batch.images=4608", "checkpoint.resume=never", shape=nine) == 0
    assert answers(capsys)["nodes"] == "9"
    other = [
        f"run.dir={run_dir.parent / 'other'}",
        f"checkpoint.resume={run_dir}/checkpoints/step-00000010",
    ]
    assert begin(run_dir, "batch.images=4608", *other, shape=nine) == 0
    assert answers(capsys)["nodes"] == "8"


def test_a_recipe_that_fits_no_node_or_is_wrong_is_refused(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for overrides, words in (
        (["batch.images=4100"], "use 4096 or 5120"),
        (["batch.imagse=4096", "data.shrads=x"], "did you mean 'images'"),
        (["--deepspeed"], "'--deepspeed' is not of the form key=value"),
    ):
        assert begin(run_dir, *overrides) == 2
        assert words in capsys.readouterr().err
    assert not run_dir.exists()


@pytest.mark.parametrize("name", ["finetune", "probe"])
def test_a_recipe_that_classifies_is_started_by_its_own_module(
    name: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = f"{name}_rcmae_vit_b_16"
    assert (
        slurm_job.main(["begin", *SHAPE, "--", recipe, "data.shards=x.tar", f"run.dir={run_dir}"])
        == 0
    )
    assert answers(capsys)["module"] == f"rcmae.{name}"


def test_outside_a_job_nothing_is_written(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    assert begin(run_dir) == 0
    assert answers(capsys) == {"run_dir": str(run_dir), "nodes": "4", "module": "rcmae.train"}
    assert not run_dir.exists()


# ---------------------------------------------------------------------------------------------- end


@pytest.mark.parametrize(
    ("launcher", "told", "status", "again"),
    [
        (75, 75, 75, "yes"),
        (1, 75, 75, "yes"),  # torchrun
        (143, 75, 75, "yes"),  # a rank was ended while it left, after the commit
        (134, 0, 0, "no"),  # or aborted
        (75, None, 75, "yes"),
        (1, 1, 1, "no"),
        (2, None, 2, "no"),
        (1, None, 1, "no"),
        (0, 0, 0, "no"),
    ],
)
def test_a_training_is_started_again_if_and_only_if_it_stopped_on_request(
    run_dir: Path,
    capsys: pytest.CaptureFixture[str],
    launcher: int,
    told: int | None,
    status: int,
    again: str,
) -> None:
    run_dir.mkdir()
    preempt.write_outcome(run_dir, status=preempt.STOPPED, step=4, reason="of an earlier job")
    assert begin(run_dir) == 0
    commit(run_dir, 8)
    if told is not None:
        preempt.write_outcome(run_dir, status=told, step=8, reason="of this one")
    capsys.readouterr()
    assert end(run_dir, launcher) == 0
    assert answers(capsys) == {"status": str(status), "again": again, "delay_s": "0", "step": "8"}


def test_a_training_that_lost_a_rank_is_started_again_while_it_makes_progress(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for restart in range(4):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        assert begin(run_dir) == 0
        if restart == 0:
            commit(run_dir, 8)
        preempt.write_outcome(
            run_dir, status=preempt.FAILED, step=9, reason="lost rank 3 on n2", again=True
        )
        capsys.readouterr()
        assert end(run_dir, 1) == 0
        heard = capsys.readouterr()
        told = dict(word.split("=") for word in heard.out.split())
        assert told["status"] == "1"
        assert "lost rank 3 on n2" in heard.err
        assert told["again"] == ("yes" if restart < 3 else "no")


def test_starts_without_progress_wait_longer_each_time_and_then_end(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(run_dir, 8)
    for restart, delay in enumerate((60, 120)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        assert begin(run_dir) == end(run_dir, preempt.STOPPED) == 0
        assert answers(capsys) == {
            "status": "75",
            "again": "yes",
            "delay_s": str(delay),
            "step": "8",
        }
    assert begin(run_dir) == end(run_dir, preempt.STOPPED) == 0
    assert answers(capsys)["again"] == "no"
    assert begin(run_dir) == 1  # and where SLURM starts it again itself, after lost nodes
    assert "3 restarts in a row without progress beyond step 8" in capsys.readouterr().err
    commit(run_dir, 9)
    assert begin(run_dir) == 0
    monkeypatch.setenv("SLURM_JOB_ID", "18")  # who submits anew means it
    commit(run_dir, 10)
    assert begin(run_dir) == end(run_dir, preempt.STOPPED) == 0
    assert answers(capsys) == {"status": "75", "again": "yes", "delay_s": "60", "step": "10"}


def test_a_start_that_another_of_its_job_has_replaced_asks_for_nothing(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert begin(run_dir) == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert begin(run_dir) == 0
    commit(run_dir, 8)
    # the first start's shell is back from where nobody could reach it
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    capsys.readouterr()
    assert end(run_dir, preempt.STOPPED) == 0
    heard = capsys.readouterr()
    assert heard.out.split()[:2] == ["status=75", "again=no"]
    assert "start 1 of this job has resumed the run: start 0 does nothing" in heard.err


def test_steps_of_each_start_and_how_to_submit_are_told(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert slurm_job.main(["submit", "--help"]) == 0
    assert "GPU=h200" in capsys.readouterr().out
    assert begin(run_dir, "run.stop_after_steps=7") == 0
    assert "run.stop_after_steps=7: so many steps a start" in capsys.readouterr().err


def test_torn_lines_and_files_are_no_history(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert begin(run_dir) == 0
    with (run_dir / "jobs.jsonl").open("a") as file:
        file.write('{"job": "17", "res')
    (run_dir / "outcome.json").write_text('{"sta')
    assert len(jobs.starts(run_dir, "17")) == 1
    assert end(run_dir, 75) == 0
    assert answers(capsys)["again"] == "yes"


def test_nothing_that_lies_in_a_runs_folder_is_run_as_a_command(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    owned = tmp_path / "OWNED"
    command = f"1;touch${{IFS}}{owned};"
    assert begin(run_dir) == 0
    start = jobs.starts(run_dir)[0]._asdict()
    (run_dir / "evaluations").mkdir()
    for row in ({"job": command}, {"step": command}, {"job": [command]}, {"restart": None}):
        with (run_dir / "jobs.jsonl").open("a") as file:
            file.write(json.dumps({**start, **row}) + "\n")
    (run_dir / "outcome.json").write_text(json.dumps({"exit_status": command, "reason": command}))
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints" / "LATEST").write_text(command)
    assert len(jobs.starts(run_dir)) == 1
    capsys.readouterr()
    assert slurm_job.main(["follow", str(run_dir), "--status=75"]) == 0
    said = capsys.readouterr().out
    assert end(run_dir, 75) == 0
    assert begin(run_dir.parent / command.replace("/", "_")) == 0
    said += capsys.readouterr().out
    shell = subprocess.run(
        ["bash", "-euc", 'eval "$SAID"; echo "$followed $status $run_dir"'],
        env={**os.environ, "SAID": said},
        capture_output=True,
        text=True,
    )
    assert shell.stdout.splitlines()[-1].startswith("17 75 "), shell.stderr
    assert command.replace("/", "_") in shell.stdout
    assert not owned.exists()


def sourced(run_dir: Path, script: str) -> subprocess.CompletedProcess[str]:
    """A line of a template, behind what all of them begin with."""
    env = {
        **os.environ,
        "SLURM_JOB_ID": "17",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_END_TIME": "4000000000",
        "PYTHON": sys.executable,
        "RUN": str(run_dir),
    }
    command = ["bash", "-c", f"templates=slurm; source slurm/job.sh; {script}"]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_templates_take_their_answers_and_evaluate_nothing(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (ROOT / "slurm").iterdir():
        assert not re.search(r"^\s*eval\b|[;&|(]\s*eval\b", path.read_text(), re.MULTILINE), path
    owned = tmp_path / "OWNED"
    hostile = run_dir.parent / f"$(touch {owned}); ' \" `touch {owned}`".replace("/", "_")
    show = 'printf "%s|" "$status" "$again" "$step" "$followed"'
    assert begin(hostile) == 0
    capsys.readouterr()
    done = sourced(hostile, f'take follow "$RUN" --status 75 || exit 9; {show}')
    assert done.stdout == "75|yes|0|17|", done.stderr
    (hostile / "jobs.jsonl").write_text("")
    assert slurm_job.main(["end", str(hostile), "--status=1", "--lines"]) == 0
    assert capsys.readouterr().out == "status=1\nagain=no\ndelay_s=0\nstep=0\n"
    assert sourced(hostile, "take end --status 1 || exit 9").returncode == 9
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(f"recipe: quickstart\nruns: {{low: {{run.name: '; touch {owned}  x'}}}}\n")
    script = f'words=$(ask sweep --lines {sweep} --task 0); mapfile -t words <<< "$words"'
    done = sourced(run_dir, script + '; printf "%s|" "${words[@]}"')
    assert done.stdout.startswith(f'quickstart|run.name="; touch {owned}  x"|run.dir='), done
    assert not owned.exists()
    with pytest.raises(Refused, match="has a line end in it"):
        slurm_job._print_lines(["run_dir=two\nlines"])


REFUSED_LOG = """== 2026-11-26 10:00:00 job 7, start 0, rank 0 on node1, GPU 0, cores 0
rcmae: the first start's
== 2026-11-26 11:00:00 job 7, start 1, rank 0 on node1, GPU 0, cores 0
a library's warning
rcmae: /scratch/run is being trained by job 6 on node2; wait for it
data.shards: a.tar: No such file
"""


def test_a_jobs_log_says_why_it_was_refused_and_who_ended_it(run_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "rank-00000.log"
    log.write_text(REFUSED_LOG)
    said = sourced(run_dir, f"said {log}").stdout.splitlines()
    assert [line.partition(" ")[0] for line in said] == ["rcmae:", "data.shards:"]
    log.write_text(REFUSED_LOG.replace("rcmae: ", ""))
    assert sourced(run_dir, f"said {log} 2").stdout.startswith("/scratch/run is being trained")
    assert sourced(run_dir, f"said {tmp_path}/none").returncode == 0
    ended = 'ended_by "JobId=7 JobState={} PreemptTime={} StdOut={} x"; run_dir=$RUN; committed'
    steps = [f"*** JOB 7 ON n1 CANCELLED AT {at} ***" for at in ("10:00 DUE TO JOB REQUEUE", "11")]
    job_log = tmp_path / "vit-7.log"
    job_log.write_text(f"x job 7, start 0: y\n{steps[0]}\nx job 7, start 1: y\n{steps[1]}\n")
    told = [
        sourced(run_dir, ended.format("COMPLETING", preempted, job_log)).stdout
        for preempted in ("None", "2026-11-26T11:00:00")
    ]
    job_log.write_text(job_log.read_text() + f"x job 7, start 2: y\n{steps[0]}\n")
    told.append(sourced(run_dir, ended.format("COMPLETING", "None", job_log)).stdout)
    assert "requeued by SLURM: it comes back" in told[2]
    assert "ended by scancel: submit it again" in told[0]
    assert "no checkpoint is committed yet" in told[0]
    assert "preempted: SLURM requeues it" in told[1]
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "checkpoints" / "LATEST").write_text("step-00000017\n")
    told = sourced(run_dir, "run_dir=$RUN; committed").stdout
    assert told == "the next start resumes from step-00000017\n"


def test_the_status_of_run_me_again_is_the_trainers() -> None:
    assert jobs.STOPPED == preempt.STOPPED


def test_the_answer_comes_without_torch() -> None:
    probe = (
        "import sys; from rcmae.run import jobs; from rcmae import config; "
        "config.load('rcmae_vit_s_16', ['data.shards=x.tar']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT).returncode == 0


# -------------------------------------------------------------------------------------------- sweep


def test_a_sweep_gives_each_task_its_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "rates.yaml"
    sweep.write_text(
        "recipe: rcmae_vit_s_16\n"
        "set: {data.shards: '/x/{000..003}.tar', schedule.epochs: 10, schedule.warmup_epochs: 1}\n"
        "runs: {low: {schedule.base_lr: 1e-5}, wide: {model.image_size: [32, 64], "
        "schedule.epochs: 20}, same: }\n"
    )
    assert slurm_job.main(["sweep", str(sweep)]) == 0
    assert capsys.readouterr().out == "0-2\n"
    recipes = []
    for task in range(3):
        assert slurm_job.main(["sweep", str(sweep), f"--task={task}"]) == 0
        name, *overrides = shlex.split(capsys.readouterr().out)
        recipes.append(load(name, overrides))
    low, wide, same = recipes
    assert [recipe.run.dir for recipe in recipes] == [
        "runs/rates/low",
        "runs/rates/wide",
        "runs/rates/same",
    ]
    assert (low.schedule.base_lr, low.schedule.epochs, low.data.shards) == (
        1e-5,
        10,
        "/x/{000..003}.tar",
    )
    assert (wide.model.image_hw, wide.schedule.epochs) == ((32, 64), 20)
    assert same.schedule.base_lr == 1.5e-4
    assert slurm_job.main(["sweep", str(sweep), "--task=3"]) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("runs: {a: {}}", "a sweep has 'recipe'"),
        ("recipe: rcmae_vit_s_16\nruns: {a: {}}\nrun: 3", "a sweep has 'recipe'"),
        ("recipe: rcmae_vit_s_16\nruns: {a/b: {}}", "names a folder"),
        ("recipe: rcmae_vit_s_16\nruns: {a: {data.shards: x, schedule.base_rl: 1}}", ", run a: "),
        ("recipe: [", "cannot be read"),
    ],
)
def test_a_wrong_sweep_is_refused_before_it_is_queued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(text)
    assert slurm_job.main(["sweep", str(sweep)]) == 2
    assert words in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- follower


def test_a_side_car_is_started_again_until_its_starts_come_to_nothing(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "evaluations").mkdir(parents=True)
    (run_dir / "jobs.jsonl").write_text('{"job": "5"}\n')
    follow = ["follow", str(run_dir), "--idle-starts=2", "--backoff-s=60"]
    assert begin(run_dir) == 0
    seen = []
    for step, status in ((0, 75), (4, 75), (4, 75), (4, 75)):
        with (run_dir / "evaluations" / "events.jsonl").open("a") as file:
            file.write(json.dumps({"event": "evaluate", "step": step}) + "\n" if step else "")
        assert slurm_job.main(follow) == 0
        if step == 4 and not seen[1:]:  # this start evaluates one
            with (run_dir / "evaluations" / "events.jsonl").open("a") as file:
                file.write(json.dumps({"event": "evaluate", "step": 8}) + "\n")
        capsys.readouterr()
        assert slurm_job.main([*follow, f"--status={status}"]) == 0
        seen.append(answers(capsys))
    assert [each["again"] for each in seen[:2]] == ["yes", "yes"]
    assert [each["delay_s"] for each in seen] == ["60", "0", "60", "0"]
    assert seen[-1]["again"] == "no"
    assert {each["followed"] for each in seen} == {"17"}
    assert slurm_job.main(follow) == 1
    assert slurm_job.main([*follow, "--status=0"]) == 0
    assert answers(capsys)["again"] == "no"


def test_a_follower_hears_of_every_job_that_came_to_the_run(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for job in ("17", "17", "21"):  # 21 is refused: 17 holds the run, or waits for its requeue
        monkeypatch.setenv("SLURM_JOB_ID", job)
        assert begin(run_dir) == 0
    capsys.readouterr()
    assert slurm_job.main(["follow", str(run_dir), "--job=30", "--status=75"]) == 0
    assert answers(capsys)["followed"] == "21,17"


# ------------------------------------------------------------------------------------------- submit


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with what an sbatch in the PATH was called with, if it was."""
    called, program = tmp_path / "called", tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {called}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("GPU", "a10g")
    return called


def test_what_the_planner_refuses_is_not_submitted(
    sbatch: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    template = str(ROOT / "slurm" / "pretrain_vit_l.sbatch")
    words = ["submit", "--nodes=1", template, "data.shards=x.tar"]
    assert slurm_job.main([*words, "batch.per_device=512"]) == 2
    assert "use batch.per_device=" in capfd.readouterr().out
    assert slurm_job.main([*words, "batch.images=4100"]) == 2
    assert "no number of nodes of 8 ranks fits" in capfd.readouterr().err
    assert slurm_job.main(["submit", "--nodes=1"]) == 2
    assert not sbatch.exists()
    assert slurm_job.main([*words, "batch.per_device=64"]) == 0
    assert sbatch.read_text().splitlines() == [
        "--nodes=1",
        template,
        "data.shards=x.tar",
        "batch.per_device=64",
    ]
    assert "on 1 x 8 a10g" in capfd.readouterr().out
    assert (
        slurm_job.main(
            ["submit", "--nodes=3", template, "data.shards=x.tar", "batch.per_device=64"]
        )
        == 0
    )
    assert (
        "1 of 3 nodes would stay idle: the batch and the streams divide over 2"
        in capfd.readouterr().err
    )


def test_the_planner_judges_a_fine_tuning_before_it_is_submitted(
    sbatch: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPU", "v100-32g")
    words = ["submit", "--gpus-per-node=1", str(ROOT / "slurm" / "pretrain.sbatch")]
    assert slurm_job.main([*words, "finetune_cifar10_demo", "engine.precision=bf16"]) == 2
    assert "has no bf16; use engine.precision=fp32" in capfd.readouterr().out
    assert not sbatch.exists()


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ([], (4, 8)),
        (["--nodes=2-6"], (6, 8)),
        (["-N", "3"], (3, 8)),
        (["-N2", "--gpus-per-node=h100:4"], (2, 4)),
        (["--nodes", "2", "--gpus-per-node", "6", "--time=1:00"], (2, 6)),
    ],
)
def test_the_shape_of_a_job_is_sbatchs_or_the_templates(
    asked: list[str], shape: tuple[int, int]
) -> None:
    assert jobs.shape_of(asked, (ROOT / "slurm" / "pretrain_vit_l.sbatch").read_text()) == shape


def test_a_sweep_is_submitted_as_the_array_of_its_runs(sbatch: Path, tmp_path: Path) -> None:
    sweep, template = tmp_path / "s.yaml", str(ROOT / "slurm" / "sweep.sbatch")
    sweep.write_text(
        "recipe: rcmae_vit_s_16\nset: {data.shards: x.tar}\nruns: {low: {schedule.base_lr: "
        "1e-5}, same: }"
    )
    assert slurm_job.main(["submit", template, str(sweep)]) == 0
    assert sbatch.read_text().splitlines() == ["--array=0-1", template, str(sweep)]
    sweep.write_text(
        "recipe: rcmae_vit_s_16\nset: {data.shards: x.tar}\nruns: {low: {batch.images: 4100}}"
    )
    assert slurm_job.main(["submit", "--array=0-0%4", template, str(sweep)]) == 2


# -------------------------------------------------------------------------------------------- shell


def scripts() -> list[str]:
    found = [path for folder in ("slurm", "tests/slurm") for path in (ROOT / folder).iterdir()]
    return sorted(
        str(path.relative_to(ROOT)) for path in found if path.suffix in (".sh", ".sbatch")
    )


@pytest.mark.parametrize("script", scripts())
def test_shell_is_clean(script: str) -> None:
    assert subprocess.run(["bash", "-n", script], cwd=ROOT).returncode == 0
    assert max(map(len, (ROOT / script).read_text().splitlines())) <= 120
    if shutil.which("shellcheck"):  # tests/slurm/install.sh puts it there
        done = subprocess.run(
            ["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout
