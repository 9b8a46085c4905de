"""Numbers on a command line, and files that are no files."""

from __future__ import annotations

import argparse
import os
import threading
from pathlib import Path

import pytest

from rcmae.commands import follow, runs
from rcmae.commands.again import reproduce
from rcmae.commands.arguments import above_zero, from_zero
from rcmae.files import json_lines, json_lines_back, write_aside


def test_numbers_are_finite_and_in_order() -> None:
    assert (from_zero("0"), above_zero("1e-3")) == (0.0, 0.001)
    for text in ("nan", "inf", "-1", "-1e-9"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a finite number, 0 or more"):
            from_zero(text)
    with pytest.raises(argparse.ArgumentTypeError, match="must be above 0"):
        above_zero("0")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (reproduce.main, ["RUN", "--tolerance", "nan"]),
        (follow.main, ["RUN", "--poll-s", "nan"]),
        (follow.main, ["RUN", "--patience-s=-1"]),
        (runs.main, ["status", "RUN", "--every-s", "0"]),
    ],
)
def test_a_wait_or_a_tolerance_that_is_none_is_refused(command, words, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        command(words)
    assert ended.value.code == 2
    assert f"argument {words[-2 if words[-1] in ('nan', '0') else -1].partition('=')[0]}:" in (
        capsys.readouterr().err
    )


def test_a_pipe_or_a_device_is_written_to_and_never_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reading = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reading.start()
    write_aside(pipe, "text")
    assert pipe.is_fifo()
    reading.join(timeout=10)
    assert read == ["text"]
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_file_in_the_place_of_a_run_has_no_lines(tmp_path: Path, capsys) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    assert list(json_lines(file / "events.jsonl")) == []
    assert list(json_lines_back(file / "events.jsonl")) == []
    assert runs.main(["status", str(file)]) == 2
    assert "is not a run" in capsys.readouterr().err
