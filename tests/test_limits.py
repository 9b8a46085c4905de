"""What no training could work with is refused at once, by its key; paths know the user's home."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest

from rcmae import config
from rcmae.config import Recipe
from rcmae.data import loading
from rcmae.data.packing import once
from rcmae.errors import Refused
from rcmae.planning import node
from rcmae.run import jobs
from runs import python_path


def load(*overrides: str) -> Recipe:
    return config.load("quickstart", [f"data.shards={os.devnull}", *overrides])


def numbers() -> Iterator[tuple[str, bool]]:
    """Each key of a recipe that is one number, and whether it is whole."""
    for section, field in Recipe.model_fields.items():
        if section in ("objective", "task"):
            continue
        for key, each in field.annotation.model_fields.items():  # type: ignore[union-attr]
            kinds = {kind for kind in (each.annotation, *_inner(each.annotation)) if kind}
            if kinds & {int, float} and not kinds & {str, bool, list, tuple}:
                yield f"{section}.{key}", int in kinds


def _inner(kind: Any) -> Iterator[Any]:
    for each in get_args(kind):
        yield each
        yield from _inner(each)


NUMBERS = dict(numbers())


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_at_its_limits_is_refused_by_its_key(key: str) -> None:
    assert len(NUMBERS) > 50
    values = [str(10**26), "1" + "0" * 5000]
    if not NUMBERS[key]:
        values = [".inf", "-.inf", ".nan", "1.0e+300", str(10**26)]
    for value in values:
        if key == "data.decode_margin" and value[0] in ".1" and value != ".nan":
            continue  # never
        with pytest.raises(Refused, match=re.escape(key)) as caught:
            load(f"{key}={value}")
        assert len(str(caught.value)) < 3000


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("data.std=[.inf,1,1]", "data.std"),
        ("model.embed_dim=2147483648", "model.embed_dim: must be at most 2"),
        ("model.image_size=[32,2147483648]", "model.image_size: must be at most 2"),
        ("model.depth=100000", "model.depth: must be at most 10,000"),
        ("detect.box_width=9007199254740992", "detect.box_width: must be at most 2"),
        ("segment.crop=2147483648", "segment.crop: must be at most 2"),
        ("evaluate.picture_images=2147483648", "evaluate.picture_images: must be at most 2"),
        ("run.lease_timeout_s=1.0e-9", "run.lease_timeout_s: must be at least 0.1"),
        ("schedule.min_lr=2.0", "schedule.min_lr=2 is above schedule.lr"),
        ("evaluate.dense.k=200000", "evaluate.dense.k=200000 neighbours of evaluate.dense.bank"),
        ("run.name=2024-01-01", "run.name"),
        ("data.shards=" + "[" * 5000, "data.shards"),
        ("data.shards=" + "[" * 20000 + "]" * 20000, "data.shards"),
        ("data." + "x" * 70_000 + "=1", "unknown key"),
        ("x" * 70_000 + "=1", "unknown key"),
        ("a." * 5000 + "b=1", "sections"),
    ],
)
def test_odd_values_are_refused_by_their_key(override: str, named: str) -> None:
    with pytest.raises(Refused, match=named) as caught:
        load(override)
    assert len(str(caught.value)) < 5000


def test_a_training_has_a_last_position() -> None:
    with pytest.raises(Refused, match=r"schedule\.steps=9007199254740991 of batch\.images=4096"):
        load("schedule.steps=9007199254740991", "schedule.epochs=null", "batch.images=4096")


def test_a_sweep_says_which_value_is_no_text_or_number(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("recipe: quickstart\nruns:\n  a: {run.name: 2024-01-01}\n")
    with pytest.raises(Refused, match=r"the run 'a' has run.name: 2024-01-01.*\(date\).*quotes"):
        jobs.read_sweep(path)
    path.write_text("recipe: quickstart\nset: [1]\nruns:\n  a: {run.seed: 1}\n")
    with pytest.raises(Refused, match="'set' and the run 'a' have keys"):
        jobs.read_sweep(path)


PATHS = ("run.dir", "data.index", "data.cache_dir", "checkpoint.resume", "checkpoint.init")
PATHS += ("classify.init", "classify.class_names")


@pytest.mark.parametrize("key", PATHS)
def test_a_path_may_begin_with_the_home(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/the/home")
    section, name = key.split(".")
    assert getattr(getattr(load(f"{key}=~/x"), section), name) == "/the/home/x"


@pytest.mark.parametrize("key", [key for key in PATHS if key != "data.index"])
@pytest.mark.parametrize("url", ["s3://bucket/x", "memory://x", "gs://b/x"])
def test_a_url_is_no_place_on_this_machine(key: str, url: str) -> None:
    """Of run.dir=s3://bucket/x a folder `s3:` was made in the current one."""
    with pytest.raises(Refused, match=rf"{key}: a URL is no place here .*give a path"):
        load(f"{key}={url}")
    section, name = key.split(".")
    assert getattr(getattr(load(f"{key}=file:///a/x"), section), name) == "/a/x"


def test_an_index_may_lie_at_a_url() -> None:
    assert load("data.index=s3://bucket/x").data.index == "s3://bucket/x"


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("~/x", r"run\.dir: no home folder is known of this user; set HOME, .* got '~/x'"),
        ("~nobody-at-all/x", r"run\.dir: no home folder is known"),
        ("$SCRATCH/x", r"run\.dir: variables of a shell stay as they are here; give the path"),
        ("${SCRATCH}/x", r"run\.dir: variables of a shell"),
    ],
)
def test_no_folder_is_made_of_a_name_that_a_shell_would_replace(
    path: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose user has no home."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(Refused, match=told):
        load(f"run.dir={path}")
    assert load(f"run.dir=./{path}").run.dir == f"./{path}"


def test_caches_of_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert node.caches(None)["TORCH_EXTENSIONS_DIR"].parts[-1] == "torch_extensions"
    with pytest.raises(Refused, match=r"set HOME or XDG_CACHE_HOME, or give data\.cache_dir"):
        once.user_cache()


def test_deepspeeds_file_may_begin_with_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/the/home")
    recipe = load("engine.name=deepspeed", "engine.config=~/x.json")
    assert recipe.engine.config == "/the/home/x.json"


class Usage(NamedTuple):
    free: int


def test_a_node_that_cannot_have_workers_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/tmp")
    assert loading.workers_amiss(2, 1, 6 * 10**5) is None
    told = loading.workers_amiss(2, 2, 6 * 10**5)
    assert told is not None
    assert re.search(r"/dev/shm has 1 MB .* data.workers=2 need 1.2: .*--shm-size", told)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/" + "x" * 75)
    told = loading.workers_amiss(1, 1, 0)
    assert told is not None
    assert "export a shorter TMPDIR" in told
    assert loading.workers_amiss(0, 1, 0) is None


def test_what_a_rank_has_in_shared_memory_is_counted() -> None:
    sizes = ["model.image_size=32", "batch.images=64", "batch.per_device=4", "data.workers=3"]
    recipe = load(*sizes)
    batch = 4 * 3 * 32 * 32
    assert loading.shared_bytes(recipe, 2, pins=True) == 3 * 3 * batch
    # without a GPU the 8 micro-batches of this step and the 8 of the next stay there
    assert loading.shared_bytes(recipe, 2, pins=False) == (3 * 3 + 2 * 8) * batch
    assert loading.shared_bytes(load(*sizes, "data.workers=0"), 2, pins=False) == 0


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_a_length_that_is_no_number_is_refused_with_its_key(value: str) -> None:
    with pytest.raises(Refused, match=r"schedule\.steps"):
        config.load("rcmae_vit_b_16", ["data.shards=x", f"schedule.steps={value}"])


@pytest.mark.parametrize(
    "item", ["schedule.lr=true", "data.std=[true,1.0,1.0]", "teacher.momentum=false"]
)
def test_truth_is_no_number(item: str) -> None:
    key = item.partition("=")[0]
    with pytest.raises(Refused, match=f"{key}: wants a number, got (true|false)"):
        load(item)
    assert load("data.flip=0.5", "checkpoint.background=false").data.flip == 0.5


@pytest.mark.parametrize("key", ["run.dir", "checkpoint.init", "data.cache_dir", "data.shards"])
def test_text_with_a_zero_byte_is_refused_with_its_key(key: str) -> None:
    with pytest.raises(Refused, match=f"{key}: has a zero byte"):
        load(f'{key}="a\\0b"')


def test_a_training_under_a_long_temporary_folder_is_refused_not_broken(
    tiny: Path, tmp_path: Path
) -> None:
    place = tmp_path / "a-folder-of-this-job" / ("x" * 90)
    place.mkdir(parents=True)
    job = [sys.executable, "-m", "rcmae", "train", str(tiny), f"run.dir={tmp_path / 'run'}"]
    env = {**os.environ, "TMPDIR": str(place), "PYTHONPATH": python_path()}
    found = subprocess.run([*job, "data.workers=1"], env=env, capture_output=True, text=True)
    assert found.returncode == 2, found.stderr
    assert "export a shorter TMPDIR" in found.stderr
    assert "Traceback" not in found.stderr
