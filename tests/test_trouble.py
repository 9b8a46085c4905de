"""Trouble with data costs no good state: killed workers are replaced, a disk's hiccup is read
again, and what cannot be had ends the run with its last step committed.
"""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from streams import flat_stream

from rcmae import checkpoint, config, files
from rcmae.data import cache, loading
from rcmae.data.index import ShardIndex
from rcmae.data.loading import WorkersLost
from rcmae.data.masking import RandomMask
from rcmae.data.plan import Plan
from rcmae.data.sets import class_lists
from rcmae.data.sources import stat_here
from rcmae.data.stream import Readers, Stream, labelled_batches
from rcmae.data.tars import scan
from rcmae.data.transforms import CentreTransform, TrainTransform
from rcmae.data.workers import Flag
from rcmae.run.loop import schedule
from runs import Folder, at_step, equal, start


@pytest.fixture
def index(photo_shards: str) -> ShardIndex:
    return ShardIndex.open(photo_shards)


def stream_of(index: ShardIndex, **changes: Any) -> Stream:
    plan = Plan(index.counts, seed=3, images=16, streams=8, window=8)
    settings = {"transform": TrainTransform((16, 16)), "mask": RandomMask(4, 1), "micro": 4}
    return flat_stream(index=index, plan=plan, seed=5, **settings, **changes)


def keys_of(stream: Stream, steps: int, after_first: Callable[[], object]) -> list[tuple[str, ...]]:
    seen = []
    for number, micros in zip(range(steps), stream.steps(2), strict=False):
        seen += [batch.keys for batch in micros]
        if number == 0:
            after_first()
    stream.close()
    return seen


def workers_of() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


def kill_workers() -> None:
    for pid in workers_of():
        os.kill(pid, signal.SIGKILL)


def kill_server() -> None:
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)  # type: ignore[attr-defined]


@pytest.mark.parametrize("mishap", [kill_workers, kill_server])
def test_killed_workers_are_replaced_and_bring_the_same_batches(
    index: ShardIndex, mishap: Callable[[], None]
) -> None:
    wanted = keys_of(stream_of(index), 6, lambda: None)
    stream = stream_of(index, workers=2)
    assert keys_of(stream, 6, mishap) == wanted
    told = stream.drain_losses()
    assert len(told) == 1
    assert "data worker" in told[0]
    assert "restarted (1 of 50 times)" in told[0]


def test_workers_that_are_killed_every_time_end_the_reading(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "LOSSES", 2)
    stream = stream_of(index, workers=1)

    def read_on() -> None:
        for _ in stream.steps(0):
            kill_workers()

    with pytest.raises(WorkersLost, match=r"lost 3 times in this job.*lower data.workers"):
        read_on()
    stream.close()


def _ends_when_told(flag: Flag) -> None:
    while not flag.is_set():
        time.sleep(0.01)


def test_a_worker_killed_while_it_looks_whether_to_end_keeps_nobody_waiting(
    index: ShardIndex,
) -> None:
    """An event of multiprocessing's has a lock, which such a worker would hold for good."""
    stream = stream_of(index, workers=1)
    context = stream._workers._make().multiprocessing_context
    stream.close()
    flag = context.Event()
    assert type(flag) is Flag
    processes = [context.Process(target=_ends_when_told, args=(flag,)) for _ in range(2)]
    for process in processes:
        process.start()
    processes[0].kill()
    flag.set()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0]


def test_an_evaluation_outlives_a_killed_worker(
    index: ShardIndex, caplog: pytest.LogCaptureFixture
) -> None:
    seen = []
    for batch in labelled_batches(
        index, CentreTransform((16, 16)), batch=32, readers=Readers(workers=1)
    ):
        if not seen:
            kill_workers()
        seen += batch.positions.tolist()
    assert [number for number in seen if number >= 0] == list(range(len(index)))
    assert "killed by SIGKILL" in caplog.text


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_hiccup_of_a_file_system_is_read_again_in_a_file_opened_anew(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(files, "_PAUSES_S", (0.0, 0.0))
    pread, opened, left = os.pread, [], [2]

    def failing(file: int, size: int, offset: int) -> bytes:
        opened.append(file)
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    shard = index.shards[0]
    assert len(cache.Reader().read(shard, 0, 512)) == 512
    left[0] = 3
    with pytest.raises(OSError, match=os.strerror(number)):
        cache.Reader().read(shard, 0, 512)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_hiccup_makes_no_checkpoint_damaged_no_index_unread_and_no_classes_unknown(
    tiny: Path,
    uninterrupted: Folder,
    photo_shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    monkeypatch.setattr(files, "_PAUSES_S", (0.0, 0.0))
    shard = Path(photo_shards.replace("{000000..000005}", "000000"))
    shutil.copy(shard, tmp_path)
    ShardIndex.open(str(tmp_path / shard.name)).save(tmp_path)
    (tmp_path / "classes.txt").write_text("cat\n")
    failed: set[str] = set()
    opened, looked = io.open, os.stat

    def once(path: Any) -> None:
        if isinstance(path, str | Path) and str(path) not in failed:
            failed.add(str(path))
            raise OSError(number, os.strerror(number), str(path))

    def hiccup(path: Any, *args: Any, **options: Any) -> Any:
        once(path)
        return opened(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", hiccup)
        patch.setattr("builtins.open", hiccup)
        index = ShardIndex.load(tmp_path)
        assert index.labels.tolist() == ShardIndex.load(tmp_path).labels.tolist()
        assert class_lists(index)[0].names == ("cat",)
        assert scan(str(tmp_path / shard.name)).problem == ""
        assert config.load(str(tiny), ["run.dir=x"]).run.dir == "x"
        newest = checkpoint.step_folders(uninterrupted.checkpoints)[-1]
        assert checkpoint.open_verified(newest).step == 20
    names = {Path(path).name for path in failed}
    assert {"index.json", "classes.txt", shard.name, "tiny.yaml", "manifest.json"} <= names
    assert len([name for name in names if name.startswith("index-")]) == 1
    failed.clear()

    def hiccup_of_stat(path: Any, *args: Any, **options: Any) -> Any:
        once(path)
        return looked(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", hiccup_of_stat)
        assert stat_here(str(shard)) is not None


@pytest.mark.parametrize(("error", "again"), [(errno.EIO, True), (errno.EACCES, False)])
def test_shards_that_cannot_be_read_commit_the_last_step_and_say_whether_to_start_again(
    tiny: Path,
    uninterrupted: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: int,
    again: bool,
) -> None:
    folder = Folder(tmp_path / "run")

    def failing(*_: Any) -> bytes:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(files, "_PAUSES_S", (0.0,))
    monkeypatch.setattr(
        schedule,
        "learning_rate",
        at_step(6, lambda: monkeypatch.setattr(cache.Reader, "_read", failing)),
    )
    assert start(tiny, folder.path) == 1
    outcome = folder.outcome()
    assert (outcome["exit_status"], outcome["again"], outcome["step"]) == (1, again, 7)
    assert folder.committed() == [7]
    monkeypatch.undo()
    assert start(tiny, folder.path) == 0
    assert equal(folder.state(), uninterrupted.state())


def test_a_killed_worker_is_noted_and_the_run_goes_on(
    tiny: Path, uninterrupted: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path / "run")
    monkeypatch.setattr(schedule, "learning_rate", at_step(3, kill_workers))
    assert start(tiny, folder.path, "data.workers=1") == 0
    events = folder.events("worker_lost")
    assert [event["rank"] for event in events] == [0]
    assert "killed by SIGKILL" in events[0]["reason"]
    assert equal(folder.state(), uninterrupted.state())
