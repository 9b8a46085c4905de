"""The output is never a reason to stop."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rcmae import console
from rcmae.console import Lasting
from runs import Folder
from tests.conftest import ROOT


class Full(io.StringIO):
    """A log on a disk that is full for a while."""

    full = True

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


def test_what_cannot_be_written_is_dropped_and_the_rest_comes_when_there_is_room() -> None:
    stream = Full()
    lasting = Lasting(stream)
    print("dropped", file=lasting, flush=True)
    stream.full = False
    print("written", file=lasting, flush=True)
    assert stream.getvalue() in ("written\n", "\nwritten\n")
    assert lasting.lost is not None
    assert "No space left" in lasting.lost
    stream.close()
    print("dropped", file=lasting, flush=True)
    assert "closed file" in lasting.lost


def test_a_letter_that_a_terminal_lacks_is_escaped() -> None:
    raw = io.BytesIO()
    lasting = Lasting(io.TextIOWrapper(raw, encoding="ascii"))
    print("k\u00f6nnen", file=lasting, flush=True)
    assert raw.getvalue() == b"k\\xf6nnen\n"
    assert lasting.lost is None


def test_it_is_the_stream_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", mine := io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    console.outlive()
    console.outlive()
    assert isinstance(sys.stdout, Lasting)
    assert sys.stdout.stream is mine
    assert not sys.stdout.isatty()
    print("heard nowhere", file=sys.stderr, flush=True)
    assert console.lost() is None
    sys.stderr.close()


DEAF = """
import os, sys
from rcmae import console
console.outlive()
print("seen", flush=True)
sys.stdin.read()
for name in ("stdout", "stderr"):
    print("x" * 100_000, file=getattr(sys, name))
os.system("echo a child that writes")
os.kill(os.getpid(), 1)
with open(sys.argv[1], "w") as file:
    print(console.lost(), file=file)
raise SystemExit(75)
"""


def test_a_process_outlives_its_reader_and_its_terminal(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", DEAF, str(tmp_path / "told")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    assert child.stdout.readline() == b"seen\n"
    child.stdout.close()
    child.stderr.close()
    child.stdin.close()
    assert child.wait(timeout=60) == 75
    assert "Broken pipe" in (tmp_path / "told").read_text()


def test_a_training_goes_on_without_its_reader(tiny: Path, tmp_path: Path) -> None:
    run = Folder(tmp_path / "run")
    command = [sys.executable, "-m", "rcmae.train", str(tiny), f"run.dir={run.path}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env=env) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.stdout.close()
        assert child.wait(timeout=120) == 0
    assert run.steps() == list(range(1, 21))
    assert run.outcome()["status"] == "finished"
    assert "Broken pipe" in run.events("console_lost")[0]["reason"]
