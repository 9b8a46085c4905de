"""However a run ends, what it has is kept, and a word is left for who starts it again."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rcmae import config, train
from rcmae.checkpoint import saver
from rcmae.files import Lines
from rcmae.models.tuning import compiling
from rcmae.process import waits
from rcmae.run import build, ending
from rcmae.run.guard import NonFiniteLoss
from rcmae.run.loop import saving, schedule
from rcmae.run.loop.batches import Batches, Trouble
from rcmae.run.presence import Presence
from rcmae.tasks.protocol import Ended
from rcmae.tasks.registry import task_named
from runs import Folder, at_step, python_path, start
from tests.conftest import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "run")


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint's file takes a second to reach the disk."""
    fsync = os.fsync

    def slow(file: int) -> None:
        if os.readlink(f"/proc/self/fd/{file}").endswith("safetensors"):
            time.sleep(1.0)
        fsync(file)

    monkeypatch.setattr(os, "fsync", slow)


def failing_at(step: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the schedule of the rate raise in this step."""
    rate = schedule.learning_rate

    def asked(now: int, **named: Any) -> float:
        if now == step:
            raise error
        return rate(now, **named)

    monkeypatch.setattr(schedule, "learning_rate", asked)


OFTEN = "checkpoint.every_steps=4"


@pytest.mark.usefixtures("slow_disk")
def test_samples_that_cannot_be_read_lose_no_save_under_way(
    tiny: Path, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Batches._micros

    def troubled(self: Batches, step: int) -> Any:
        if step == 5:
            self.trouble = Trouble("the disk is gone", may_pass=False)
            return []
        return read(self, step)

    monkeypatch.setattr(Batches, "_micros", troubled)
    assert start(tiny, folder.path, OFTEN) == 1
    assert 4 in folder.committed()
    assert folder.leftovers() == []
    assert folder.events("checkpoint")[0]["step"] == 4
    assert folder.events("stop")[0]["time"] >= folder.events("checkpoint")[0]["time"]


@pytest.mark.usefixtures("slow_disk")
def test_an_error_that_all_ranks_raise_loses_no_save_under_way(
    tiny: Path, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_at(5, NonFiniteLoss("it jumped"), monkeypatch)
    assert start(tiny, folder.path, OFTEN) == 1
    assert folder.committed() == [4]
    assert folder.outcome()["status"] == "failed"
    assert (folder.path / "leases" / "00000001.beat").read_text() == "released"


@pytest.mark.usefixtures("slow_disk")
def test_a_mistake_of_the_program_loses_no_save_under_way(
    tiny: Path, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_at(5, KeyError("a mistake"), monkeypatch)
    with pytest.raises(AssertionError, match="ended its process with 1"):
        start(tiny, folder.path, OFTEN)
    assert folder.committed() == [4]
    assert folder.outcome()["reason"] == "rank 0: KeyError('a mistake')"
    assert folder.outcome()["again"] is False


GIVES_UP = """
import sys, time
from pathlib import Path
from rcmae.checkpoint.lease import Lease
from rcmae.run.presence import Presence
run = Path(sys.argv[1])
lease = Lease(run, timeout_s=60, wait_s=0, newest_step=lambda: 0)
mine = Presence(run, generation=int(sys.argv[2]), rank=0, world=2, timeout_s=1.0, interval_s=0.1)
mine.at(7, "computing the step")
if sys.argv[3] == "deaf":
    sys.stderr.close()
time.sleep(60)
"""


@pytest.mark.parametrize("ears", ["hearing", "deaf"])
def test_a_rank_that_waits_in_vain_for_a_peer_leaves_an_outcome_that_says_again(
    tmp_path: Path, ears: str
) -> None:
    command = [sys.executable, "-c", GIVES_UP, str(tmp_path), "1", ears]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 1
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    told = {key: outcome[key] for key in ("status", "exit_status", "step", "again")}
    assert told == {"status": "failed", "exit_status": 1, "step": 7, "again": True}
    assert outcome["reason"].startswith("lost rank 1 silent")
    assert b"lost rank 1 silent" in done.stderr or ears == "deaf"


def test_who_comes_first_writes_the_outcome_and_only_of_its_own_job(tmp_path: Path) -> None:
    (tmp_path / "leases").mkdir()
    (tmp_path / "leases" / "00000002.json").write_text("whoever took it over")
    for generation, reason in ((1, "of the job before"), (2, "the first"), (2, "the second")):
        alone = Presence(tmp_path, generation=generation, rank=0, world=1, timeout_s=10.0)
        alone.write_outcome(reason, again=True)
    assert json.loads((tmp_path / "outcome.json").read_text())["reason"] == "the first"


@pytest.mark.parametrize("step", [4, 20])
def test_a_step_that_the_guard_skips_keeps_its_save_its_row_and_its_evaluation(
    tiny: Path, folder: Folder, photo_shards: str, step: int
) -> None:
    settings = [
        "guard.action=skip",
        f"guard.drill_nan_position={32 * (step - 1) + 5}",
        "checkpoint.keep=9",
        "evaluate.every_steps=4",
        f"evaluate.train_shards={photo_shards.replace('000005', '000004')}",
        f"evaluate.test_shards={photo_shards}",
    ]
    assert start(tiny, folder.path, OFTEN, *settings) == 0
    assert folder.events("not_finite")[0]["step"] == step - 1
    assert step in folder.committed()
    assert folder.steps() == list(range(1, 21))
    skipped = folder.rows()[step - 1]
    assert (skipped["loss"], skipped["skipped"]) == (None, 1.0)
    assert sum("skipped" in row for row in folder.rows()) == 1
    assert [event["step"] for event in folder.events("evaluate")] == [4, 8, 12, 16, 20]


def disk_full_while(is_full: Callable[[], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have lines and checkpoints meet a full disk while a condition holds."""
    lines, checkpoint = Lines._write_waiting, saver.write_safetensors

    def refuse(path: Path) -> None:
        if is_full():
            raise OSError(28, "No space left on device", str(path))

    def write_lines(self: Lines) -> None:
        refuse(self.path)
        lines(self)

    def write_checkpoint(path: Path, entries: Any) -> Any:
        refuse(path)
        return checkpoint(path, entries)

    monkeypatch.setattr(Lines, "_write_waiting", write_lines)
    monkeypatch.setattr(saver, "write_safetensors", write_checkpoint)
    monkeypatch.setattr(saving, "AGAIN_S", 0.0)


RARELY = "checkpoint.every_steps=1000"


def test_a_disk_that_is_full_for_a_while_loses_no_line_and_a_save_is_tried(
    tiny: Path, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    write = Lines.write

    def count(self: Lines, line: str) -> None:
        tried.extend(["checkpoint_failed"] * ("checkpoint_failed" in line))
        write(self, line)

    monkeypatch.setattr(Lines, "write", count)
    rows = folder.path / "metrics.jsonl"
    disk_full_while(lambda: rows.exists() and bool(folder.rows()) and not tried, monkeypatch)
    assert start(tiny, folder.path, RARELY) == 0
    assert folder.steps() == list(range(1, 21))
    assert len(folder.events("checkpoint_failed")) == 1
    assert folder.committed()[-1] == 20


def test_a_disk_that_stays_full_ends_the_run_with_one_message_that_names_it(
    tiny: Path, folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = folder.path / "metrics.jsonl"
    disk_full_while(lambda: rows.exists() and len(folder.rows()) > 2, monkeypatch)
    assert start(tiny, folder.path, RARELY, "schedule.steps=100000") == 1
    said = capsys.readouterr()
    assert f"{rows}: No space left on device" in said.out
    assert "was not written" in said.err
    assert "No space left on device" in said.err
    assert "Traceback" not in said.err
    assert folder.outcome()["status"] == "failed"
    monkeypatch.undo()
    assert start(tiny, folder.path, RARELY, "schedule.steps=100000", "run.stop_after_steps=3") == 75
    assert folder.steps() == [1, 2, 3]


def test_a_folder_that_is_deleted_while_the_run_trains_is_begun_anew_and_saved_into(
    tiny: Path, folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rate = schedule.learning_rate

    def asked(now: int, **named: Any) -> float:
        if now == 9:
            shutil.rmtree(folder.path)
        return rate(now, **named)

    monkeypatch.setattr(schedule, "learning_rate", asked)
    lease = "run.lease_timeout_s=0.6"
    assert start(tiny, folder.path, RARELY, lease, "run.stop_after_steps=12") == 75
    assert folder.steps() == [10, 11, 12]
    assert "metrics.jsonl was deleted, and is started again" in capsys.readouterr().out
    assert folder.committed()[-1] == 12
    assert folder.outcome()["status"] == "stopped"
    monkeypatch.undo()
    again = [str(folder.path / "recipe.yaml"), folder.path, "run.stop_after_steps=null"]
    assert start(*again) == 0
    assert folder.steps() == list(range(10, 21))


def test_the_exit_status_stands_whatever_a_launcher_sends_while_python_ends(tmp_path: Path) -> None:
    """srun sends TERM to the peers of a rank that was refused: the job ends with 2, not 143."""
    program = tmp_path / "rcmae"  # as the command is called
    program.write_text(
        """
import os, signal, time
import rcmae.process.early

class Late:
    def __del__(self):
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        time.sleep(0.1)

late = Late()
raise SystemExit(2)
"""
    )
    done = subprocess.run(
        [sys.executable, program], env={**os.environ, "PYTHONPATH": python_path()}
    )
    assert done.returncode == 2


def test_under_slurm_the_hints_name_the_jobs_own_way_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = "run/recipe.yaml"

    def shown(world: int) -> str:
        ended = Ended(config.Recipe(), tmp_path, False, ending.launcher(world))
        return ended.start("rcmae.train", words)

    assert shown(1) == "rcmae train run/recipe.yaml"
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert shown(2) == "srun --nodes=2 --ntasks=2 python -m rcmae.train run/recipe.yaml"
    monkeypatch.setenv("RCMAE_TEMPLATES", str(tmp_path / "slurm"))
    monkeypatch.chdir(tmp_path)
    assert shown(2) == "sbatch --nodes=2 slurm/pretrain.sbatch run/recipe.yaml"


@pytest.mark.parametrize("compiles", [True, False])
def test_the_first_step_of_a_compiled_network_says_what_it_does(
    compiles: bool,
    tiny: Path,
    folder: Folder,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """torch.compile takes minutes, in which no bar moves; here a pause stands for it."""
    monkeypatch.setattr(compiling, "compile_blocks", lambda *models: None)
    monkeypatch.setattr(schedule, "learning_rate", at_step(0, lambda: time.sleep(1.0)))
    monkeypatch.setattr(waits, "SPEAKS_AFTER_S", 0.3)
    keys = [f"engine.compile={compiles}", "schedule.steps=2", "schedule.warmup_steps=1"]
    assert start(tiny, folder.path, *keys) == 0
    told = "waiting for the first step, for which torch.compile builds kernels"
    assert capfd.readouterr().err.count(told) == compiles


def test_blocks_that_cannot_be_compiled_are_a_warning_once(
    tiny: Path,
    folder: Folder,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def broken(graph: object, inputs: object) -> object:
        raise OSError("no space left")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    keys = ["schedule.steps=3", "schedule.warmup_steps=1"]
    assert start(tiny, folder.path, "engine.compile=true", *keys) == 0
    (warning,) = [line for line in folder.events("warning") if "compile" in line["told"]]
    assert "OSError: no space left; blocks compute eagerly" in warning["told"]
    assert capfd.readouterr().out.count("no space left") == 1
    plain = Folder(folder.path.parent / "plain")
    assert start(tiny, plain.path, *keys) == 0
    assert folder.losses() == plain.losses()
    torch.compiler.reset()


def test_a_wait_that_is_ended_before_the_first_step_leaves_its_own_outcome(
    tiny: Path, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier job left says nothing of this one; another job's folder is left alone."""
    task = task_named("pretrain")
    verdict = train.judged(config.load(str(tiny), [f"run.dir={folder.path}"]), task)
    earlier = '{"status": "failed", "again": false}'
    folder.path.mkdir()
    (folder.path / "outcome.json").write_text(earlier)

    def broken(*_: Any) -> Any:
        raise waits.StopAsked("SIGTERM")

    monkeypatch.setattr(build, "assemble", broken)
    stop: Any = None
    with pytest.raises(waits.StopAsked):
        build.build(verdict, task, stop)
    found = folder.outcome()
    assert (found["status"], found["again"], found["step"]) == ("stopped", True, 0)
    (folder.path / "outcome.json").write_text(earlier)
    monkeypatch.setattr(build, "hold", broken)
    with pytest.raises(waits.StopAsked):
        build.build(verdict, task, stop)
    assert folder.outcome()["again"] is False


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["data.shardz=1"], 2, "unknown key 'shardz' in data"),
        (
            ["run.stop_after_steps=2"],
            75,
            "stopped, run.stop_after_steps=2, at step 2: run the same",
        ),
        (["schedule.steps=1", "schedule.warmup_steps=0"], 0, None),
    ],
)
def test_torchrun_is_told_why_a_rank_ended(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    status: int,
    said: str | None,
) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert start(tiny, tmp_path / "run", *words) == status
    if said is None:
        assert not file.exists()
    else:
        assert said in json.loads(file.read_text())["message"]
