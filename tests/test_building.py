"""One process compiles at a time, and a lock that a killed one left holds nobody up in silence."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Ranks
from torch.utils import cpp_extension

from rcmae.errors import Refused
from rcmae.process import building
from rcmae.process.alive import boot
from rcmae.process.building import Baton
from runs import python_path

PROGRAM = ROOT / "tests/programs/compiling.py"
STOPPED = 75


@pytest.fixture
def compiling(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process that compiles, or waits, in the test's folder."""
    with ExitStack() as stack:

        def start(how: str = "deaf") -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, str(PROGRAM), str(tmp_path / "lock"), how],
                env={**os.environ, "PYTHONPATH": python_path()},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def says(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == line + "\n"


def test_a_lock_of_a_process_that_was_killed_is_taken_away(
    tmp_path: Path,
    compiling: Callable[..., subprocess.Popen[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    lock = tmp_path / "lock"
    killed = compiling()
    says(killed, "compiles")
    baton = Baton(str(lock))
    assert not baton.try_acquire()
    assert building.opened_by(lock) == [killed.pid]
    assert f"process {killed.pid} of host {socket.gethostname()} compiles" in building.about(lock)
    compiler = subprocess.Popen(["sleep", "60"], cwd=tmp_path)  # as what it started
    killed.kill()
    killed.wait()
    threading.Timer(0.5, compiler.kill).start()
    began = time.monotonic()
    assert baton.try_acquire()
    assert time.monotonic() - began > 0.4
    compiler.wait()
    assert f"{lock} was left by process {killed.pid}, which is gone" in capsys.readouterr().err
    assert building.maker_of(lock) == (socket.gethostname(), boot(), os.getpid())
    baton.release()
    assert not lock.exists()


def test_a_process_that_is_stopped_leaves_no_lock(
    tmp_path: Path, compiling: Callable[..., subprocess.Popen[str]]
) -> None:
    process = compiling("listening")
    says(process, "compiles")
    waiting = compiling("listening")
    assert waiting.stderr is not None
    told = waiting.stderr.readline()
    assert f"rcmae: waiting for {tmp_path}/lock: process {process.pid} of host" in told
    assert "remove that file and start again" in told
    process.send_signal(signal.SIGTERM)
    says(waiting, "waited")
    assert process.wait(30) == STOPPED
    assert not (tmp_path / "lock").exists()


def test_a_process_that_dies_while_others_wait_is_told(
    tmp_path: Path, compiling: Callable[..., subprocess.Popen[str]]
) -> None:
    process = compiling()
    says(process, "compiles")
    baton = Baton(str(tmp_path / "lock"))
    threading.Timer(0.3, process.kill).start()
    # in the thread of Popen's owner: a zombie is no process that compiles
    with pytest.raises(building.BuilderGone, match=f"process {process.pid}.*start again"):
        baton.wait()


@pytest.mark.parametrize(
    ("content", "who"),
    [
        ("", "another process compiles, none that can be seen from this host"),
        (json.dumps(["elsewhere", "boot", 7]), "process 7 of host elsewhere compiles"),
        (json.dumps([socket.gethostname(), "before", 7]), "process 7 of host "),
    ],
)
def test_a_lock_whose_process_cannot_be_seen_stays_and_is_told_in_the_end(
    tmp_path: Path, content: str, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of torch itself, of another host, and of this one before it started again."""
    lock = tmp_path / "lock"
    lock.write_text(content)
    baton = Baton(str(lock))
    assert not baton.try_acquire()
    threading.Timer(0.3, lambda: os.utime(lock, (0, time.time() - 1801))).start()
    with pytest.raises(Refused, match=rf"lock: {who}.*since 180. s; .* remove that file and start"):
        baton.wait()
    assert lock.exists()
    with lock.open():  # somebody here compiles, however slowly
        assert building.opened_by(lock) == [os.getpid()]
        threading.Timer(0.3, lock.unlink).start()
        baton.wait()


def test_torch_takes_turns_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some.cpp").write_text("int main() { return 0; }")
    dead = subprocess.Popen(["true"])
    dead.wait()
    lock = tmp_path / "lock"
    lock.write_text(json.dumps([socket.gethostname(), boot(), dead.pid]))
    compiled: list[Any] = []

    def compiles(**_: object) -> None:
        compiled.append(building.maker_of(lock))

    monkeypatch.setattr(cpp_extension, "_write_ninja_file_and_build_library", compiles)
    asked: dict[str, Any] = {"build_directory": str(tmp_path), "is_standalone": True}
    with building.batons():
        cpp_extension.load(
            "rcmae_some", [str(tmp_path / "some.cpp")], is_python_module=False, **asked
        )
    assert compiled == [(socket.gethostname(), boot(), os.getpid())]
    assert not lock.exists()
    assert cpp_extension.FileBaton is not Baton


def test_ranks_refuse_a_lock_that_is_left_together(
    tiny: Path, tmp_path: Path, ranks: Callable[..., Ranks]
) -> None:
    lock = tmp_path / "extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    words = ["engine.name=deepspeed", "engine.config=zero3_offload", f"run.dir={tmp_path / 'run'}"]
    folder = str(lock.parent.parent)
    started = ranks("-m", "rcmae.train", str(tiny), *words, TORCH_EXTENSIONS_DIR=folder)
    assert started.wait(120) == [2, 2]
    assert f"{lock}: another process compiles, none that can be seen" in started.said()
