"""`data.images=FOLDER`: packed once, reused, and packed again where the folder has changed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rcmae import config
from rcmae.data.index import ShardIndex
from rcmae.data.packing import once
from rcmae.data.patterns import expand
from rcmae.errors import Refused
from rcmae.run.look import note_use
from runs import Folder, start


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 12 images of two classes."""
    folder = tmp_path / "my photos"
    draw = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for number in range(6):
            pixels = draw.integers(0, 256, (40, 48, 3), np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")
    return folder


def test_a_folder_is_packed_once_and_anew_when_it_has_changed(photos: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    first = once.pack_once(str(photos), cache, side=32)
    index = ShardIndex.open(first.shards)
    assert (len(index), set(index.labels.tolist())) == (12, {0, 1})
    assert "packed once" in first.note
    again = once.pack_once(str(photos), cache, side=32)
    assert (again.shards, "packed before" in again.note) == (first.shards, True)
    (photos / "cat" / "0.png").unlink()
    changed = once.pack_once(str(photos), cache, side=32)
    assert "has changed" in changed.note
    assert len(ShardIndex.open(changed.shards)) == 11
    assert len(ShardIndex.open(first.shards)) == 12  # for the runs that use it
    assert not list(Path(cache).glob("*.part"))


def test_what_was_packed_before_goes_when_no_run_has_used_it_for_long(
    photos: Path, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    packs = [once.pack_once(str(photos), cache, side=32)]
    for number in range(2):
        (photos / "cat" / f"{number}.png").unlink()
        packs.append(once.pack_once(str(photos), cache, side=32))
    assert "lies beside it" in packs[-1].note
    folders = [Path(packed.shards).parent for packed in packs]
    long_ago = time.time() - 86400 * (once.UNUSED_DAYS + 1)
    for folder in folders:
        os.utime(folder, (long_ago, long_ago))
    note_use(packs[0].shards)  # a run resumes by its own recipe.yaml
    (photos / "cat" / "2.png").unlink()
    last = once.pack_once(str(photos), cache, side=32)
    assert [folder.is_dir() for folder in folders] == [True, False, False]
    assert len(ShardIndex.open(packs[0].shards)) == 12
    assert len(ShardIndex.open(last.shards)) == 9


def test_a_job_that_was_killed_leaves_nothing_that_is_used(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            once.pack_once(str(photos), str(tmp_path / "cache"), side=32)
    packed = once.pack_once(str(photos), str(tmp_path / "cache"), side=32)
    assert len(ShardIndex.open(packed.shards)) == 12


def test_ranks_do_not_wait_for_a_large_folder(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(once, "BY_ITSELF", 10)
    with pytest.raises(Refused, match=r"rcmae shards make '.*my photos' '.*my photos-shards'"):
        once.pack_once(str(photos), str(tmp_path / "cache"), side=32, world=2)


def test_a_training_takes_a_folder_in_the_place_of_shards(
    tiny: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Folder(tmp_path / "run")
    words = [f"data.images={photos}", f"data.cache_dir={tmp_path / 'cache'}", "schedule.steps=2"]
    words += ["schedule.warmup_steps=1", "batch.images=4"]
    assert start(tiny, run.path, *words) == 0
    assert "packed once" in capfd.readouterr().out
    written = config.load(str(run.path / "recipe.yaml"))
    assert written.data.images is None
    assert str(written.data.shards).endswith("/images-*.tar")


def test_a_folder_in_the_place_of_shards_is_told_what_to_do(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"rcmae shards make '.*my photos' .*data\.images="):
        expand(str(photos))
    (photos / "val").mkdir()
    (photos / "cat" / "0.png").rename(photos / "val" / "0.png")
    with pytest.raises(Refused, match=r"val' '.*val-shards' --name val --size 256, .*val-\*\.tar"):
        expand(str(photos / "val"))
    tars = tmp_path / "tars"
    tars.mkdir()
    for name in ("train-000000.tar", "val-000000.tar"):
        (tars / name).write_bytes(b"")
    with pytest.raises(Refused, match=r"tars/train-\*\.tar or .*tars/val-\*\.tar"):
        expand(str(tars))
    with pytest.raises(Refused, match="give shards or images, got both"):
        config.load("quickstart", ["data.shards=a.tar", "data.images=b"])
