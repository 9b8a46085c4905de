"""A training from Python: a handle on a process of its own, and no second one by accident."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import rcmae
from rcmae.errors import Refused
from runs import Folder, python_path
from tests.conftest import ROOT


def test_dir_shows_what_there_is() -> None:
    assert dir(rcmae) == ["__doc__", *rcmae.__all__]
    assert {"load_encoder", "load_classifier", "start"} <= set(rcmae.__all__)
    assert all(hasattr(rcmae, name) for name in rcmae.__all__)


def test_a_run_is_started_watched_stopped_and_resumed(tiny: Path, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run")
    keys = {"run.dir": str(folder.path), "schedule.steps": 400, "log.every_steps": 1}
    run = rcmae.start(tiny, keys)
    run.wait_for_step(2)
    assert run.is_running
    with pytest.raises(TimeoutError, match="still trains"):
        run.wait(timeout_s=0.01)
    assert run.stop() == 75
    step = folder.outcome()["step"]
    assert run.metrics["step"] == list(range(1, step + 1))
    assert run.metrics["loss"] == folder.losses()
    assert "<th>loss</th>" in run.metrics._repr_html_()
    assert f"ended with 75, step {step}" in repr(run)

    again = rcmae.start(tiny, keys | {"run.stop_after_steps": 2})
    assert again.wait() == 75
    assert again.metrics["step"][-1] == step + 2
    assert "resum" in again.said


def test_two_ranks_train_from_python(tiny: Path, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run")
    keys = {"run.dir": str(folder.path), "engine.name": "fsdp2", "schedule.steps": 2}
    run = rcmae.start(tiny, keys | {"schedule.warmup_steps": 1}, ranks=2)
    assert run.wait() == 0
    assert folder.outcome()["status"] == "finished"
    assert "finished, step 2" in repr(run)
    once_more = rcmae.start(tiny, keys | {"schedule.warmup_steps": 1, "engine.name": "local"})
    assert "finished, step 2" in repr(once_more), "at once: no step is left"


def test_a_wrong_recipe_starts_nothing(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="did you mean 'depth'"):
        rcmae.start(tiny, {"run.dir": str(tmp_path / "run"), "model.dpeth": 2})
    with pytest.raises(Refused, match=r"/nowhere/a\.tar"):  # at once, not at the first wait
        rcmae.start(tiny, {"run.dir": str(tmp_path / "run"), "data.shards": "/nowhere/a.tar"})
    assert not (tmp_path / "run").exists()


def test_a_program_without_a_guard_trains_once(tiny: Path, tmp_path: Path) -> None:
    """Workers would import the program again: it is refused before one starts."""
    tree = yaml.safe_load(tiny.read_text())
    tree["data"]["workers"] = 1
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    program = tmp_path / "program.py"
    program.write_text(
        "from rcmae import train\n"
        f"status = train.main([{str(recipe)!r}, 'run.dir={tmp_path}/run', 'schedule.steps=2',"
        " 'schedule.warmup_steps=1'])\n"
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
    assert 'put the call under if __name__ == "__main__":' in done.stderr
    assert not (tmp_path / "run").exists()
    program.write_text(program.read_text().replace("status", "if __name__ == '__main__': status"))
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Folder(tmp_path / "run").outcome()["status"] == "finished"


def test_the_notebook_ends_with_a_picture_of_neighbours(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    draw = np.random.default_rng(0)
    for name in ("dark", "light"):
        (photos / name).mkdir(parents=True)
        for number in range(20):
            pixels = draw.integers(0, 128, (64, 64, 3), np.uint8) + 127 * (name == "light")
            Image.fromarray(pixels.astype(np.uint8)).save(photos / name / f"{number}.png")
    whole = (photos / "dark" / "0.png").read_bytes()
    (photos / "dark" / "0.png").rename(photos / "dark" / "0.PNG")
    (photos / "dark" / "torn.png").write_bytes(whole[: len(whole) // 2])
    (photos / "dark" / "._0.png").write_bytes(b"Mac OS X")  # a companion, no image
    (photos / ".hidden").mkdir()
    (photos / ".hidden" / "0.png").write_bytes(whole)
    command = [sys.executable, str(ROOT / "tools" / "notebook.py"), str(photos), "3"]
    paths = os.environ | {"PYTHONPATH": python_path(), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "40 vectors of 96 numbers" in done.stdout
    assert "left out: dark/torn.png" in done.stdout
    (picture,) = (tmp_path / "runs").glob("notebook-photos-*-3/neighbours.png")
    with Image.open(picture, formats=["PNG"]) as sheet:
        assert sheet.size == (576, 576)
    assert {path.name for path in photos.iterdir()} == {".hidden", "dark", "light"}
    command[2] = str(tmp_path / "photoes")
    wrong = subprocess.run(command, cwd=tmp_path, env=paths, capture_output=True, text=True)
    assert wrong.returncode == 1
    assert f"no such folder: {tmp_path / 'photoes'}" in wrong.stderr
    assert not (tmp_path / "photoes").exists()
