"""The output is never a reason to stop."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from rcmae import cli
from rcmae.commands import shards
from rcmae.process import console
from rcmae.process.console import Lasting
from runs import Folder, python_path
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
from rcmae import cli
from rcmae.process import console
from rcmae.commands import shards
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
    env = {**os.environ, "PYTHONPATH": python_path()}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env=env) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.stdout.close()
        assert child.wait(timeout=120) == 0
    assert run.steps() == list(range(1, 21))
    assert run.outcome()["status"] == "finished"
    assert "Broken pipe" in run.events("console_lost")[0]["reason"]


# ------------------------------------------------------------------------- what a terminal obeys

EVIL = "a\x1b]0;title\x07\x1b[31m\x9b\u202eb"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_a_terminal_obeys_is_shown_escaped() -> None:
    assert console.printable("two\nlines\tand é 漢") == "two\nlines\tand é 漢"
    assert console.printable(EVIL) == r"a\x1b]0;title\x07\x1b[31m\x9b\u202eb"
    assert console.printable("\udc9b\r\x7f") == r"\udc9b\r\x7f"


def test_streams_show_names_escaped_and_let_bars_be_drawn() -> None:
    file, terminal = io.StringIO(), Terminal()
    for stream in (file, terminal):
        print(EVIL, file=console.Shown(stream))
        console.Shown(stream).write("\x1b[2K\r\x1b[32mok\x1b[0m\x1b[1A\x1b[?25l")
    assert not set(file.getvalue()) & set("\x1b\x07\x9b\u202e")
    drawn = terminal.getvalue()
    assert "\x1b]0;" not in drawn
    assert not set(drawn) & set("\x07\x9b\u202e")
    assert drawn.endswith("\x1b[2K\r\x1b[32mok\x1b[0m\x1b[1A\x1b[?25l")


def test_a_command_line_shows_names_escaped(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in ((f"{EVIL}.jpg", b"\xff\xd8"), (f"{EVIL}/x.txt", b"x")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    folder = tmp_path / f"in{EVIL}".replace("/", "")
    (folder / "x\x1b[31m").mkdir(parents=True)
    (folder / "x\x1b[31m" / "1.jpg").write_bytes(b"no image")
    commands = (
        ["shards", "check", "verify", str(path), "--jobs", "1"],
        ["shards", "index", str(path), "--jobs", "1"],
        ["shards", "make", str(folder), str(tmp_path / "out"), "--jobs", "1"],
        ["train", "tiny", f"data.shards={EVIL}"],
        [EVIL],
        ["probes", f"no{EVIL}", "--train", EVIL, "--test", EVIL],
    )
    for words in commands:
        if words[0] == "shards":
            shards.main(words[1:])
            told = capsys.readouterr()
            assert not set(told.out + told.err) & set("\x1b\x07\x9b\u202e"), words
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", io.StringIO())
            patch.setattr(sys, "stderr", io.StringIO())
            out, err = sys.stdout, sys.stderr
            cli.main(words)
            said = out.getvalue() + err.getvalue()
        assert said, words
        assert not set(said) & set("\x1b\x07\x9b\u202e"), words


def test_a_line_end_in_a_key_begins_no_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "bad\nrcmae: FORGED\t"
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for member, data in (("ok.pgm", b"P5 1 1 255 x"), (f"{name}.jpg", b"no picture")):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert shards.check(["verify", str(tmp_path / "x.tar"), "--jobs", "1"]) == 1
    event = {"event": "bad_sample", "position": 1, "shard": "x", "key": name, "offset": 0}
    event |= {"reason": "r\nrcmae: FORGED", "replaced_by": name}
    (tmp_path / "events.jsonl").write_text(
        json.dumps(event) + "\n" + json.dumps({"event": "bad_sample", "position": 2}) + "\n"
    )
    assert shards.check(["report", "--ledger", str(tmp_path / "events.jsonl")]) == 1
    said = capsys.readouterr().out.splitlines()
    assert sum("bad\\nrcmae: FORGED\\t" in line for line in said) == 2
    assert not [line for line in said if line.startswith("rcmae: FORGED")]
