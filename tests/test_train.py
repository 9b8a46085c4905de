"""A run is one thing, whatever happens to the jobs that carry it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
import yaml
from PIL import Image

from rcmae import train
from rcmae.checkpoint import read_manifest
from rcmae.config import load
from rcmae.run import preempt
from rcmae.tasks.pretrain import Pretraining
from runs import (
    Folder,
    distance,
    equal,
    finite,
    keeping_handlers,
    once,
    python_path,
    send,
    start,
    wait_for,
)
from tests.conftest import ROOT, Ranks, free_port

MANY = str(Path(__file__).parent / "programs" / "train_many.py")
ZERO1, ZERO2, ZERO3 = (
    [f"engine.config=zero{stage}.json", "engine.name=deepspeed"] for stage in (1, 2, 3)
)
FSDP2 = ["engine.name=fsdp2"]
DDP = ["engine.name=ddp", "engine.shard_ranks=2"]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "run")


# --------------------------------------------------------------------------------- a run to its end


def test_a_run_leaves_what_it_promises(uninterrupted: Folder) -> None:
    rows = uninterrupted.rows()
    assert [row["step"] for row in rows] == list(range(1, 21))
    promised = {
        "step",
        "images_seen",
        "epoch",
        "loss",
        "loss_reconstruction",
        "loss_consistency",
        "lr",
        "momentum",
        "grad_norm",
        "images_per_s",
        "data_wait_s",
        "time",
    }
    assert all(promised <= row.keys() and finite(row) for row in rows)
    assert all(
        row["loss"] == pytest.approx(row["loss_reconstruction"] + row["loss_consistency"])
        for row in rows
    )
    assert [row["images_seen"] for row in rows] == [32 * step for step in range(1, 21)]
    assert [row["epoch"] for row in rows] == [pytest.approx(step / 7) for step in range(1, 21)]
    assert rows[-1]["loss_reconstruction"] < 0.8 * rows[0]["loss_reconstruction"]  # it learns
    assert max(row["lr"] for row in rows) == 1e-3
    assert (
        uninterrupted.outcome() | {"status": "finished", "exit_status": 0, "step": 20}
        == uninterrupted.outcome()
    )
    assert uninterrupted.committed() == [10, 20]
    assert (uninterrupted.checkpoints / "LATEST").read_text().strip() == "step-00000020"
    assert [uninterrupted.events(kind)[0]["step"] for kind in ("start", "checkpoint", "stop")] == [
        0,
        10,
        20,
    ]


def test_the_recipe_in_the_folder_goes_on_with_the_run(
    tiny: Path, folder: Folder, uninterrupted: Folder
) -> None:
    assert start(tiny, folder.path, "run.stop_after_steps=3") == 75
    written = folder.path / "recipe.yaml"
    assert load(str(written)) == load(
        str(tiny), [f"run.dir={folder.path}", "run.stop_after_steps=3"]
    )
    with keeping_handlers():
        assert train.main([str(written), "run.stop_after_steps=null"]) == 0
    assert folder.losses() == uninterrupted.losses()


def test_evaluation_and_picture_are_written(
    tiny: Path, photo_shards: str, folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    train_shards = photo_shards.replace("000005", "000003")
    test_shards = photo_shards.replace("000000..", "000004..")
    evaluated = [
        "schedule.steps=7",
        "schedule.warmup_steps=1",
        "log.tensorboard=true",
        "evaluate.every_steps=4",
        "evaluate.picture_every_steps=4",
        "evaluate.picture_images=3",
        "evaluate.k=[1, 5]",
        f"evaluate.train_shards={train_shards}",
        f"evaluate.test_shards={test_shards}",
    ]
    assert start(tiny, folder.path, *evaluated) == 0
    found = folder.events("evaluate")
    assert [event["step"] for event in found] == [4, 7]  # every fourth, and the last
    for event in found:
        assert list(event["knn"]) == ["student", "teacher", "random", "pixels"]
        for row in event["knn"].values():
            assert row.keys() == {"1", "5"}
            assert all(0 <= top1 <= 100 for top1 in row.values())
    assert found[0]["knn"]["pixels"] == found[1]["knn"]["pixels"]
    assert found[0]["knn"]["random"] == found[1]["knn"]["random"]
    pictures = sorted(path.name for path in (folder.path / "pictures").iterdir())
    assert pictures == ["step-00000004.png", "step-00000007.png"]
    with Image.open(folder.path / "pictures" / pictures[0], formats=["PNG"]) as sheet:
        assert sheet.width >= 4 * 32  # input, masked, student, teacher
        assert sheet.height >= 3 * 32
    assert list((folder.path / "tensorboard").glob("events.out.*"))
    said = capsys.readouterr().out
    for text in (
        "finished at step 7 of 7",
        "k-NN at step 7, top-1 in %",
        str(folder.checkpoints),
        "tensorboard --logdir",
    ):
        assert text in said


def test_evaluating_and_logging_change_nothing_in_the_training(
    tiny: Path, photo_shards: str, folder: Folder, uninterrupted: Folder
) -> None:
    test = photo_shards.replace("000000..", "000004..")
    shards = [f"evaluate.train_shards={photo_shards}", f"evaluate.test_shards={test}"]
    seen = [
        "evaluate.every_steps=6",
        "evaluate.picture_every_steps=5",
        "log.every_steps=3",
        "checkpoint.every_steps=7",
    ]
    assert start(tiny, folder.path, *shards, *seen) == 0
    assert folder.steps() == [3, 6, 9, 12, 15, 18, 20]  # the last is always logged
    assert equal(folder.state(), uninterrupted.state())


# ---------------------------------------------------------------------------------------- bad input


def make_shard(path: Path, jpegs: int, broken: Sequence[int] = ()) -> str:
    """A shard of grey squares, some of which are not images."""
    square = path.with_suffix(".jpg")
    Image.new("RGB", (40, 40), (90, 120, 150)).save(square)
    garbage = path.with_suffix(".garbage")
    garbage.write_bytes(b"no image" * 20)
    with tarfile.open(path, "w") as tar:
        for number in range(jpegs):
            tar.add(garbage if number in broken else square, f"{path.stem}_{number:03d}.jpg")
    return str(path)


def contradicting_json(folder: Path) -> Path:
    path = folder / "contradicts.json"
    path.write_text(
        json.dumps(
            {"train_batch_size": 64, "gradient_clipping": 3.0, "zero_optimization": {"stage": 2}}
        )
    )
    return path


def test_bad_input_is_refused_with_every_problem_and_nothing_written(
    tiny: Path, tmp_path: Path, folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.tar").touch()
    (tmp_path / "text.tar").write_text("no tar\n" * 200)
    cases: list[tuple[list[str], list[str]]] = [
        (
            ["modle.depth=2", "batch.images=many", "log.zzz=1"],
            [
                "unknown key 'modle'; did you mean 'model'?",
                "batch.images: ",
                "unknown key 'zzz' in log",
            ],
        ),
        (
            [
                "data.shards=[nowhere/*.tar, 'a-{0..1}.tar']",
                "model.image_size=33",
                "model.embed_dim=65",
            ],
            [
                "nowhere/*.tar: matches no file",
                "a-0.tar: No such file",
                "a-1.tar: No such file",
                "image",
                "65",
            ],
        ),
        (
            [
                f"data.shards=[{tmp_path}/empty.tar, {tmp_path}/text.tar]",
                "model.name=vit_smal_patch16",
            ],
            [
                "empty.tar: is empty",
                "text.tar: is not a tar file",
                "did you mean 'vit_small_patch16'?",
            ],
        ),
        (["batch.images=4096"], ["batch.images=4096 is more than the 240 samples"]),
        (
            ["schedule.warmup_steps=20"],
            ["before the last of 20 steps; set schedule.warmup_steps to less (0: none)"],
        ),
        (
            ["schedule.epochs=1", "schedule.steps=9", "schedule.base_lr=1", "schedule.lr=1"],
            ["one of epochs and steps", "one of base_lr and lr"],
        ),
        (["checkpoint.resume=must"], ["has no valid checkpoint; use auto to start from scratch"]),
        (
            ["checkpoint.resume=elsewhere"],
            ["checkpoint.resume=elsewhere: there is no such folder; give auto, never, must or"],
        ),
        (
            ["data.index=typo"],
            ["data.index=typo: no index is there; make it: rcmae shards index SHARDS --out typo"],
        ),
    ]
    for overrides, wanted in cases:
        assert start(tiny, folder.path, *overrides) == 2, overrides
        said = capsys.readouterr().err
        assert said.count("rcmae:") == 1, said
        assert [text for text in wanted if text not in said] == [], said
        assert "Traceback" not in said
        assert not folder.path.exists()


def test_bad_input_under_a_launcher_ends_every_rank_with_2_and_one_message(
    tiny: Path, tmp_path: Path, folder: Folder, ranks: Callable[..., Ranks]
) -> None:
    wrong = [
        f"run.dir={folder.path}",
        "batch.images=31",
        "engine.name=deepspeed",
        "model.patch_size=7",
        f"engine.config={contradicting_json(tmp_path)}",
        "data.shards=nowhere.tar",
    ]
    started = ranks("-m", "rcmae.train", tiny, *wrong, world=2)
    assert started.wait() == [2, 2]
    said = started.said(0)
    for text in (
        "batch.images=31 is not divisible by 2 ranks; use 30 or 32",
        "nowhere.tar: No such file",
        "patch",
    ):
        assert text in said
    told = [re.findall(r"^rcmae: (?!waiting)", started.said(rank), re.M) for rank in (0, 1)]
    assert [len(each) for each in told] == [1, 0]
    assert not folder.path.exists()


def test_launcher_variables_that_are_incomplete_are_named(
    tiny: Path, folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("RANK", "0")
    assert start(tiny, folder.path) == 2
    assert (
        "RANK or WORLD_SIZE is set but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"
        in capsys.readouterr().err
    )
    assert not folder.path.exists()


def test_a_folder_of_another_recipe_or_other_data_is_refused_with_the_difference(
    tiny: Path, photo_shards: str, folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tiny, folder.path, "run.stop_after_steps=2") == 75
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    fewer = photo_shards.replace("000005", "000004")
    cases = [
        (
            ["model.depth=2", "schedule.lr=5e-4", "data.seed=3"],
            [
                "model.depth=3, but this recipe has 2\n",
                "schedule.lr=0.001, but this recipe has 0.0005\n",
                "data.seed=0, but",
                "pass checkpoint.allow=[data.seed,schedule.lr] to override",
            ],
        ),
        (["model.depth=2"], ["this recipe has 2. Use 3, or choose another run.dir"]),
        ([f"data.shards={fewer}"], ["data.shards are not those of", "give the same shards"]),
        (
            ["checkpoint.resume=must", "run.seed=1"],
            ["was written with run.seed=0, but this recipe has 1. Use 0, choose another run.dir"],
        ),
    ]
    for overrides, wanted in cases:
        capsys.readouterr()
        assert start(tiny, folder.path, *overrides) == 2, overrides
        said = capsys.readouterr().err
        assert [text for text in wanted if text not in said] == [], said
        assert "allow=[model" not in said, "other weights cannot be allowed"
        assert {
            path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()
        } == before


def test_what_a_resume_may_not_change_it_may_when_it_is_allowed_by_name(
    tiny: Path, photo_shards: str, folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tiny, folder.path, "run.stop_after_steps=2") == 75
    fewer, changed = (
        photo_shards.replace("000005", "000004"),
        ["schedule.lr=5e-4", "teacher.momentum=0.9"],
    )
    assert (
        start(tiny, folder.path, *changed, f"data.shards={fewer}", "checkpoint.allow=[schedule.lr]")
        == 2
    )
    said = capsys.readouterr().err
    assert "teacher.momentum=0.996, but this recipe has 0.9. Use 0.996, " in said
    assert "pass checkpoint.allow=[teacher.momentum]" in said
    assert "or checkpoint.allow=[data.shards]" in said
    assert "schedule.lr=" not in said
    allow = "checkpoint.allow=[schedule.lr, teacher, data.shards]"
    assert start(tiny, folder.path, *changed, f"data.shards={fewer}", allow) == 0
    assert max(row["lr"] for row in folder.rows()[2:]) == 5e-4
    assert [event["step"] for event in folder.events("resume")] == [2]


def test_a_teacher_updated_with_every_micro_batch_wants_as_many_of_them(
    tiny: Path, folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    micro = ["teacher.update=micro_step", "run.stop_after_steps=2"]
    assert start(tiny, folder.path, *micro, "batch.per_device=8") == 75
    assert start(tiny, folder.path, *micro, "batch.per_device=16") == 2
    said = capsys.readouterr().err
    assert "updates the teacher 4 times a step" in said
    assert "so that ranks x per_device x 4 = 32" in said
    assert start(tiny, folder.path, *micro, "batch.per_device=8") == 75


BATCH_NORM = [
    "objective.name=supmae",
    "model.num_classes=8",
    "model.class_hidden=16",
    "run.stop_after_steps=2",
]


def test_a_batch_norm_wants_as_many_images_at_once(
    tiny: Path, folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tiny, folder.path, *BATCH_NORM, "batch.per_device=16") == 75
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    assert start(tiny, folder.path, *BATCH_NORM, "batch.per_device=8") == 2
    said = capsys.readouterr().err
    assert "normalised 16 images at once, this start would normalise 8" in said
    assert "use batch.per_device=16, or checkpoint.allow=[batch.per_device]" in said
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before
    allowed = ["batch.per_device=8", "checkpoint.allow=[batch.per_device]"]
    assert start(tiny, folder.path, *BATCH_NORM, *allowed) == 75
    linear = [*BATCH_NORM, "model.class_hidden=0"]  # a head without one does not care
    assert start(tiny, tmp_path / "linear", *linear, "batch.per_device=16") == 75
    assert start(tiny, tmp_path / "linear", *linear, "batch.per_device=8") == 75


@pytest.mark.slow
def test_a_batch_norm_counts_the_images_of_all_ranks(
    tiny: Path, folder: Folder, ranks: Callable[..., Ranks]
) -> None:
    assert start(tiny, folder.path, *BATCH_NORM, "batch.per_device=16") == 75
    job = [
        "-m",
        "rcmae.train",
        str(tiny),
        f"run.dir={folder.path}",
        *BATCH_NORM,
        "engine.name=fsdp2",
    ]
    wrong = ranks(*job, "batch.per_device=16")
    assert wrong.wait() == [2, 2]
    assert "normalised 16 images at once, this start would normalise 32" in wrong.said()
    assert "use batch.per_device=8" in wrong.said()
    assert ranks(*job, "batch.per_device=8").wait() == [75, 75]
    assert folder.committed()[-1] == 4


# ------------------------------------------------------------------------------------ asked to stop


def test_a_run_asked_to_stop_after_steps_is_finished_by_the_same_command(
    tiny: Path, folder: Folder, uninterrupted: Folder
) -> None:
    for step in (8, 16):
        assert start(tiny, folder.path, "run.stop_after_steps=8") == 75
        assert (
            folder.outcome() | {"status": "stopped", "exit_status": 75, "step": step}
            == folder.outcome()
        )
        assert "run.stop_after_steps=8" in folder.outcome()["reason"]
        assert folder.committed()[-1] == step
    assert start(tiny, folder.path, "run.stop_after_steps=8") == 0
    assert (
        folder.outcome() | {"status": "finished", "exit_status": 0, "step": 20} == folder.outcome()
    )
    assert [event["step"] for event in folder.events("resume")] == [8, 16]
    assert folder.steps() == list(range(1, 21))
    assert folder.losses() == uninterrupted.losses()
    assert equal(folder.state(), uninterrupted.state())
    assert start(tiny, folder.path) == 0  # there is nothing left to do
    assert folder.losses() == uninterrupted.losses()


def test_a_shipped_recipe_with_every_default_left_alone_goes_on(
    photo_shards: str, folder: Folder
) -> None:
    """What a recipe leaves open the first start decides; the same command finds it as it was."""
    small = [
        f"data.shards={photo_shards}",
        "data.workers=0",
        "model.image_size=32",
        "model.patch_size=8",
        "model.embed_dim=64",
        "model.depth=1",
        "model.num_heads=4",
        "model.decoder_dim=32",
        "model.decoder_depth=1",
        "model.decoder_heads=4",
        "engine.name=local",
        "engine.config=null",
        "batch.images=16",
        "schedule.epochs=1",
        "schedule.warmup_epochs=0.1",
        "log.every_steps=1",
        "log.tensorboard=false",
        "log.report=false",
    ]
    assert start(Path("rcmae_vit_s_16"), folder.path, *small, "run.stop_after_steps=3") == 75
    assert start(Path("rcmae_vit_s_16"), folder.path, *small, "run.stop_after_steps=3") == 75
    # as the summary says
    assert start(folder.path / "recipe.yaml", folder.path, "run.stop_after_steps=3") == 75
    assert start(Path("rcmae_vit_s_16"), folder.path, *small, "data.canonical_streams=8") == 2
    assert folder.steps() == list(range(1, 10))
    manifest = read_manifest(folder.path / "checkpoints" / "step-00000009")
    assert (
        manifest.meta["recipe"]["data"]["canonical_streams"]
        == manifest.meta["sizes"]["canonical_streams"]
        == 16  # of so small a set
    )


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_commits_the_step_and_asks_to_be_run_again(
    tiny: Path, folder: Folder, uninterrupted: Folder, number: signal.Signals
) -> None:
    with once(lambda: len(folder.rows()) >= 3, send(number)):
        assert start(tiny, folder.path) == 75
    stopped = folder.outcome()
    assert (stopped["status"], stopped["exit_status"]) == ("stopped", 75)
    assert number.name in stopped["reason"]
    assert folder.events("signal")[0]["asked"] == {"0": number.name}
    assert folder.committed()[-1] == stopped["step"] == folder.steps()[-1]
    assert 3 <= stopped["step"] < 20
    assert start(tiny, folder.path) == 0
    assert equal(folder.state(), uninterrupted.state())


def test_a_signal_before_the_first_step_loses_nothing(
    tiny: Path, folder: Folder, uninterrupted: Folder
) -> None:
    with keeping_handlers():
        stop = preempt.StopRequest()
        send(signal.SIGUSR1)()
        recipe = load(str(tiny), [f"run.dir={folder.path}"])
        assert train.train(recipe, stop, Pretraining()) == 75
    assert (folder.outcome()["step"], folder.committed()) == (0, [0])
    assert start(tiny, folder.path) == 0
    assert equal(folder.state(), uninterrupted.state())


def test_signals_during_a_save_do_not_break_it(
    tiny: Path, folder: Folder, uninterrupted: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, sent = os.fsync, []

    def signalled(file: int) -> None:
        if "/checkpoints/" in os.readlink(f"/proc/self/fd/{file}") and len(sent) < 3:
            # a first and two impatient ones
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        fsync(file)

    monkeypatch.setattr(os, "fsync", signalled)
    assert start(tiny, folder.path) == 75
    assert len(sent) == 3
    assert folder.outcome()["step"] == folder.committed()[-1] >= 10
    assert folder.leftovers() == []
    assert start(tiny, folder.path) == 0
    assert equal(folder.state(), uninterrupted.state())


# ---------------------------------------------------------------------------- where it goes on from


def test_never_starts_anew_and_keeps_the_old_checkpoints_aside(
    tiny: Path, folder: Folder, uninterrupted: Folder
) -> None:
    assert start(tiny, folder.path, "run.stop_after_steps=12", "run.seed=5") == 75
    assert start(tiny, folder.path, "checkpoint.resume=never") == 0
    assert folder.steps() == list(range(1, 21))
    assert equal(folder.state(), uninterrupted.state())
    aside = [
        path.parent for path in folder.path.rglob("manifest.json") if "step-00000012" in str(path)
    ]
    assert len(aside) == 1
    assert read_manifest(aside[0]).meta["recipe"]["run"]["seed"] == 5


def test_must_goes_on_and_a_path_begins_a_new_run_there(
    tiny: Path, folder: Folder, uninterrupted: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    first = uninterrupted.checkpoints / "step-00000010"
    assert start(tiny, folder.path, f"checkpoint.resume={uninterrupted.path}") == 2
    last = uninterrupted.checkpoints / "step-00000020"
    said = capsys.readouterr().err
    assert f"this is a run; give the checkpoint of it that you mean, such as {last}" in said
    assert start(tiny, folder.path, f"checkpoint.resume={first}", "run.stop_after_steps=2") == 75
    assert folder.events("resume")[0]["step"] == 10
    assert start(tiny, folder.path, "checkpoint.resume=must", "run.stop_after_steps=3") == 75
    # a requeued job repeats its command: it must go on from its own checkpoint, not begin again at
    # the path
    assert start(tiny, folder.path, f"checkpoint.resume={first}") == 0
    assert [event["step"] for event in folder.events("resume")] == [10, 12, 15]
    assert folder.steps() == list(range(11, 21))
    assert equal(folder.state(), uninterrupted.state())


def test_a_path_to_a_damaged_checkpoint_is_an_error_that_names_the_file(
    tiny: Path,
    tmp_path: Path,
    folder: Folder,
    uninterrupted: Folder,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = shutil.copytree(uninterrupted.checkpoints / "step-00000010", tmp_path / "broken")
    (broken / "rank-00000.safetensors").write_bytes(b"")
    assert start(tiny, folder.path, f"checkpoint.resume={broken}") == 1
    assert str(broken / "rank-00000.safetensors") in capsys.readouterr().err
    assert folder.steps() == []


# ------------------------------------------------------------------------------------------- killed


def test_a_run_killed_and_started_again_is_the_uninterrupted_one_bit_for_bit(
    tiny: Path, folder: Folder, uninterrupted: Folder
) -> None:
    often = "checkpoint.every_steps=3"
    assert start(tiny, folder.path, often, "run.stop_after_steps=1") == 75
    with subprocess.Popen(
        [sys.executable, "-m", "rcmae.train", str(tiny), f"run.dir={folder.path}", often],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    ) as killed:
        latest = folder.checkpoints / "LATEST"
        wait_for(lambda: latest.read_text() > "step-00000001\n", lambda: killed.poll() is None)
        killed.kill()
        assert killed.wait() == -signal.SIGKILL
    assert folder.steps()[-1] < 20
    assert not (folder.path / "outcome.json").exists()  # "stopped" was the job before
    assert start(tiny, folder.path, often) == 0
    assert folder.events("resume")[-1]["step"] >= 3
    assert folder.steps() == list(range(1, 21))
    assert folder.losses() == uninterrupted.losses()
    assert equal(folder.state(), uninterrupted.state())


def rank_processes(launcher: subprocess.Popen[str], world: int) -> dict[int, psutil.Process]:
    """The launcher's descendants that are ranks, by rank."""
    found = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        try:
            if "--multiprocessing-fork" not in process.cmdline() and "RANK" in process.environ():
                found[int(process.environ()["RANK"])] = process
        except psutil.Error:
            continue
    assert len(found) == world
    return found


@pytest.mark.slow
def test_a_run_goes_on_over_launchers_engines_kills_and_a_signal_to_one_rank(
    tiny: Path, folder: Folder, tmp_path: Path
) -> None:
    """deepspeed, killed -> deepspeed, asked to stop -> torchrun, one rank signalled -> one
    process, to the end.
    """
    recipe = yaml.safe_load(tiny.read_text())
    recipe["schedule"]["steps"] = 60
    long = tmp_path / "long.yaml"
    long.write_text(yaml.safe_dump(recipe))
    oracle = Folder(tmp_path / "oracle")
    assert start(long, oracle.path) == 0

    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": python_path(),
    }
    bin_dir = Path(sys.executable).parent
    job = [
        str(long),
        f"run.dir={folder.path}",
        "checkpoint.every_steps=4",
        "run.stop_after_steps=16",
    ]

    def launch(*command: str) -> subprocess.Popen[str]:
        log = (tmp_path / f"{Path(command[0]).name}.log").open("a")
        with log:
            return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, text=True)

    def deepspeed() -> subprocess.Popen[str]:
        return launch(
            str(bin_dir / "deepspeed"),
            "--num_gpus",
            "2",
            "--master_port",
            str(free_port()),
            "--module",
            "rcmae.train",
            *job,
            "--deepspeed_config",
            "ds_configs/zero2.json",
        )

    with deepspeed() as launcher:
        wait_for(lambda: (folder.checkpoints / "LATEST").exists(), lambda: launcher.poll() is None)
        for process in rank_processes(launcher, 2).values():
            process.kill()
        assert launcher.wait() != 0
    assert folder.steps()[-1] < 16

    with deepspeed() as launcher:
        assert launcher.wait() == 75, (tmp_path / "deepspeed.log").read_text()
    resumed = folder.events("resume")[-1]["step"]
    assert resumed >= 4
    assert folder.outcome()["step"] == resumed + 16

    job[-1] = "run.stop_after_steps=null"
    with launch(
        str(bin_dir / "torchrun"),
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
        "-m",
        "rcmae.train",
        *job,
        *FSDP2,
    ) as launcher:
        wait_for(lambda: folder.steps()[-1] > resumed + 16, lambda: launcher.poll() is None)
        rank_processes(launcher, 2)[1].send_signal(signal.SIGUSR1)
        assert launcher.wait() == 1  # torchrun turns 75 into 1 ...
    stopped = folder.outcome()
    assert (stopped["status"], stopped["exit_status"]) == ("stopped", 75)  # ... so this says it
    assert folder.events("signal")[-1]["asked"] == {"1": "SIGUSR1"}
    assert folder.committed()[-1] == stopped["step"] == folder.steps()[-1] < 60

    assert start(long, folder.path) == 0
    assert folder.steps() == list(range(1, 61))
    assert folder.losses() == pytest.approx(oracle.losses(), rel=1e-5)
    for kind in ("weight", "teacher"):
        assert distance(folder.state(), oracle.state(), kind) < 1e-5


# --------------------------------------------------------------------- any engine opens any other's


@pytest.mark.slow
def test_any_engine_goes_on_from_any_others_checkpoint(
    tiny: Path, tmp_path: Path, ranks: Callable[..., Ranks]
) -> None:
    engines = {"zero1": ZERO1, "zero3": ZERO3, "fsdp2": FSDP2, "ddp": DDP}
    small = ["model.depth=2", "model.decoder_depth=1", "batch.images=16"]
    small += ["schedule.steps=14", "checkpoint.every_steps=8"]
    whole = Folder(tmp_path / "whole")
    assert start(tiny, whole.path, *small) == 0
    saved = {name: tmp_path / name / "checkpoints" / "step-00000008" for name in engines}
    saved["local"] = whole.checkpoints / "step-00000008"

    def job(name: str, *overrides: str) -> list[str]:
        return [str(tiny), f"run.dir={tmp_path / name}", *small, *overrides]

    jobs = [job(name, "run.stop_after_steps=8", *engine) for name, engine in engines.items()]
    jobs += [
        job(f"{saver}-{loader}", f"checkpoint.resume={path}", *engine)
        for loader, engine in engines.items()
        for saver, path in saved.items()
    ]
    said = ranks(MANY, json.dumps(jobs), world=2).succeed()
    assert f"STATUS {[75] * 4 + [0] * 20}" in said
    for saver in engines:
        resume = f"checkpoint.resume={saved[saver]}"
        assert start(tiny, tmp_path / f"{saver}-local", *small, resume) == 0

    oracle = dict(zip(whole.steps(), whole.losses(), strict=True))
    state = whole.state()
    pairs = [f"{saver}-{loader}" for saver in saved for loader in (*engines, "local")]
    pairs.remove("local-local")
    assert len(pairs) == 24
    for pair in pairs:
        went_on = Folder(tmp_path / pair)
        assert went_on.steps() == list(range(9, 15)), pair
        assert went_on.losses() == pytest.approx(
            [oracle[step] for step in went_on.steps()], rel=1e-5
        ), pair
        for kind in ("weight", "teacher"):
            assert distance(went_on.state(), state, kind) < 1e-5, (pair, kind)


# -------------------------------------------------------------------------------------- bad samples


@pytest.mark.slow
def test_unreadable_samples_are_reported_whichever_rank_meets_them_and_too_many_stop_all(
    tiny: Path, photo_shards: str, tmp_path: Path, ranks: Callable[..., Ranks]
) -> None:
    shards = (
        f"data.shards=['{photo_shards}', "
        f"{make_shard(tmp_path / 'bad.tar', 40, broken=range(0, 40, 2))}]"
    )
    evaluated = [
        "evaluate.every_steps=7",
        "evaluate.picture_every_steps=7",
        f"evaluate.train_shards={photo_shards}",
        f"evaluate.test_shards={photo_shards.replace('000000..', '000004..')}",
    ]
    short = [str(tiny), "schedule.steps=7", "schedule.warmup_steps=1", "checkpoint.every_steps=5"]
    bearable, stopped, after = (
        Folder(tmp_path / name) for name in ("bearable", "stopped", "after")
    )
    jobs = [
        [*short, shards, f"run.dir={bearable.path}", "data.max_bad_fraction=0.5", *ZERO1],
        [*short, shards, f"run.dir={stopped.path}", "data.max_bad_fraction=0.01", *ZERO1],
        [*short, *evaluated, f"run.dir={after.path}", *ZERO3],
        [*short, *evaluated, f"run.dir={tmp_path / 'after-fsdp2'}", *FSDP2],
    ]
    started = ranks(MANY, json.dumps(jobs), world=2)
    assert "STATUS [0, 1, 0, 0]" in started.succeed()

    known = {f"bad_{number:03d}" for number in range(0, 40, 2)}
    reported = bearable.events("bad_sample")
    assert {line["key"] for line in reported} <= known
    assert {line["position"] % 2 for line in reported} == {0, 1}  # ranks 0 and 1 both met some
    one = Folder(tmp_path / "one")
    assert start(short[0], one.path, *short[1:], shards, "data.max_bad_fraction=0.5") == 0
    assert sorted(line["position"] for line in reported) == sorted(
        e["position"] for e in one.events("bad_sample")
    )
    assert bearable.losses() == pytest.approx(one.losses(), rel=1e-5)

    assert stopped.outcome()["status"] == "failed"
    message = started.said(0)
    assert "could not be read, more than data.max_bad_fraction=0.01" in message
    assert re.search(r"bad/bad_\d+ at byte \d+, position \d+", message)

    for name in ("after", "after-fsdp2"):  # evaluation and pictures are collective
        assert Folder(tmp_path / name).events("evaluate")[0]["knn"].keys() == {
            "student",
            "teacher",
            "random",
            "pixels",
        }
        assert (tmp_path / name / "pictures" / "step-00000007.png").is_file()


# ----------------------------------------------------------------------------------- its last words


def test_what_it_says_to_run_next_runs(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, words = (
        Folder(tmp_path / "a run"),  # a shell takes it for two words
        ["schedule.steps=2", "schedule.warmup_steps=0", "run.stop_after_steps=1"],
    )
    assert start(tiny, run.path, *words) == 75
    resume = r"rcmae train (.*?)    # resume"
    (command,) = re.findall(resume, capsys.readouterr().out)
    recipe, *overrides = shlex.split(command)
    assert start(recipe, run.path, *overrides) == 0  # it does not stop after another step
    (command,) = re.findall(r"(rcmae export .*?)    # the encoder", capsys.readouterr().out)
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": python_path()},
    )
    assert done.returncode == 0
    assert (tmp_path / "a run.safetensors").is_file()
