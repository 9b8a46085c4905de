"""What `pip install` gives: outside the checkout, in an environment of its own, the commands work.

The wheel is built and installed as a user does it, without an index: the dependencies are those of
the environment that runs the tests.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT

SOURCES = ("rcmae", "ds_configs", "slurm", "tools/results", "setup.py", "pyproject.toml")
SOURCES += ("README.md", "LICENSE")
SMALL = (  # over a recipe of ViT-B
    "model.image_size=32",
    "model.patch_size=8",
    "model.embed_dim=32",
    "model.depth=2",
    "model.num_heads=2",
    "model.decoder_dim=16",
    "model.decoder_depth=1",
    "model.decoder_heads=2",
    "batch.images=8",
    "batch.per_device=8",
    "schedule.epochs=null",
    "schedule.warmup_epochs=null",
    "schedule.steps=3",
    "data.workers=0",
    "data.canonical_streams=8",
    "log.every_steps=1",
)
Run = Callable[..., str]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: what an earlier build left in the checkout must not get into it."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        here, there = ROOT / name, source / name
        there.parent.mkdir(parents=True, exist_ok=True)
        if here.is_dir():
            shutil.copytree(here, there, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(here, there)
    (source / "slurm" / "env.sh").write_text("# settings of a site, and nobody else's\n")
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(out)]
    subprocess.run([*pip, "wheel", str(source), *options], check=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def rcmae(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The installed command, run in a folder that has nothing to do with the checkout."""
    place = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "venv"], check=True)
    python = place / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "-q", wheel], check=True)
    (packages,) = (place / "venv" / "lib").glob("python*/site-packages")
    # a path alone: what .pth files in there say, such as where this checkout is, does not count
    dependencies = [path for path in site.getsitepackages() if Path(path).is_dir()]
    (packages / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

    asked = [str(python), "-c", "import rcmae; print(rcmae.__file__)"]
    found = subprocess.run(asked, cwd=place, env=env, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(packages)), "that is not the package that was installed"

    def run(*words: object) -> str:
        command = [str(place / "venv" / "bin" / "rcmae"), *map(str, words)]
        done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


def test_the_wheel_has_every_module_and_what_belongs_to_them(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA")))
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "rcmae").rglob("*.py")}
    assert modules <= names
    for folder, inside in (("ds_configs", "ds_configs"), ("slurm", "slurm")):
        ours = {path.name for path in (ROOT / folder).iterdir() if path.suffix != ".md"}
        theirs = {name.split("/")[-1] for name in names if name.startswith(f"rcmae/{inside}/")}
        assert ours - {"env.sh"} <= theirs
        assert "env.sh" not in theirs, "it has the settings of somebody's site"
    recipes = {path.name for path in (ROOT / "rcmae" / "recipes").glob("*.yaml")}
    assert {f"rcmae/recipes/{name}" for name in recipes} <= names
    assert any(name.startswith("rcmae/results/step_") for name in names)
    assert not any(name.startswith(("tests/", "tools/")) for name in names)
    text = metadata.decode()
    assert "Author: the rcmae developers" in text
    assert "Classifier: Topic :: Scientific/Engineering :: Image Recognition" in text
    for extra in ("s3", "gs", "azure", "parquet", "onnx", "umap"):
        assert f"Provides-Extra: {extra}" in text


def test_a_recipe_trains_and_its_run_is_exported(rcmae: Run, tmp_path: Path) -> None:
    """From images to weights, by the commands alone, with engine.config as the recipe has it."""
    generator = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(8):
            pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{number}.jpg")
    rcmae("shards", "make", tmp_path / "images", tmp_path / "shards", "--samples", 8, "--jobs", 1)
    recipe = ("rcmae_vit_b_16", f"data.shards={tmp_path}/shards/train-{{000000..000001}}.tar")
    where = f"run.dir={tmp_path}/run"
    rcmae("plan", *recipe, "batch.images=8", *SMALL, "--gpus", 1)
    assert "green" in rcmae("doctor", *recipe, *SMALL, where)
    rcmae("train", *recipe, *SMALL, where)
    outcome = (tmp_path / "run" / "outcome.json").read_text()
    assert "finished" in outcome
    assert "config: zero1.json" in (tmp_path / "run" / "recipe.yaml").read_text()
    rcmae("export", tmp_path / "run", "--format", "timm", "--out", tmp_path / "encoder.safetensors")
    assert (tmp_path / "encoder.safetensors").stat().st_size > 0


def test_templates_recipes_and_the_version_are_there(rcmae: Run, tmp_path: Path) -> None:
    rcmae("slurm-templates", tmp_path / "jobs")
    shipped = (ROOT / "slurm" / "pretrain.sbatch").read_text()
    assert (tmp_path / "jobs" / "pretrain.sbatch").read_text() == shipped
    assert "rcmae_vit_b_16" in rcmae("recipe")
    assert rcmae("--version").startswith("rcmae ")


def test_an_editable_install_is_found_beside_the_checkout(tmp_path: Path) -> None:
    """A script beside a checkout called rcmae: its folder is no package, that within it is."""
    checkout = tmp_path / "rcmae"
    (checkout / "rcmae").mkdir(parents=True)
    (checkout / "rcmae" / "__init__.py").write_text("load_encoder = 1\n")
    for name in ("ds_configs", "slurm", "tools/results"):
        (checkout / name).mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
    command = [sys.executable, "-W", "ignore", "-c", build, str(tmp_path)]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "packages")
    script = tmp_path / "try.py"
    script.write_text("import rcmae\nprint(rcmae.load_encoder)\n")
    start = f"import site; site.addsitedir({str(tmp_path / 'packages')!r}); import runpy, sys; "
    start += f"sys.path.insert(0, {str(tmp_path)!r}); runpy.run_path({str(script)!r})"
    done = subprocess.run(
        [sys.executable, "-S", "-I", "-c", start], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "1\n", done.stderr
