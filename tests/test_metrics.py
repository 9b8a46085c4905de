"""metrics.jsonl has each step once whatever happened, and the meter and the progress tell the
truth.
"""

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rcmae import files
from rcmae.files import json_lines_back
from rcmae.planning.hardware import peak_flops
from rcmae.run.ending import closing_summary
from rcmae.run.loop.meter import Meter
from rcmae.run.records import board, metrics
from rcmae.run.records.metrics import MetricsLog, cut_back, events_of, undone
from runs import Folder, start


def rows_of(path: Path) -> list[dict]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def a_log(run: Path, *, resume_step: int = 0, total_steps: int = 10, **more) -> MetricsLog:
    more.setdefault("console", Console(file=io.StringIO()))
    return MetricsLog(
        run, resume_step=resume_step, total_steps=total_steps, bar=more.pop("bar", False), **more
    )


def test_each_step_is_there_once_after_resumes(tmp_path):
    for resume, stop in ((0, 7), (4, 6), (4, 10)):
        with a_log(tmp_path, resume_step=resume) as log:
            for step in range(resume + 1, stop + 1):
                log.step({"step": step, "loss": 1.0 / step, "resumed_from": resume})
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["resumed_from"] for row in rows] == [0] * 4 + [4] * 6
    assert all(row["time"] > 0 for row in rows)


def test_torn_doubled_and_foreign_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    steps = ['{"step": 1}', '{"step": 2}', '{"step": 2}', '{"step": 3}', '{"step": 4, "lo']
    path.write_text("\n".join([*steps[:3], "\0\0\0", "[3]", '{"loss": 1}', *steps[3:]]))
    assert cut_back(path, 100) == 5
    assert [row["step"] for row in rows_of(path)] == [1, 2, 3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_whole_line_without_its_end_counts_as_torn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')  # the next line would be glued to it
    assert cut_back(path, 2) == 1
    assert path.read_text() == '{"step": 1}\n'


def test_the_cut_leaves_a_late_writer_of_the_old_file_behind(tmp_path):
    old = a_log(tmp_path, tensorboard=False)
    old.step({"step": 1})
    with a_log(tmp_path, resume_step=1, tensorboard=False) as new:
        old.step({"step": 2, "loss": -1.0})
        new.step({"step": 2, "loss": 1.0})
    old.close()
    assert [row.get("loss") for row in rows_of(tmp_path / "metrics.jsonl")] == [None, 1.0]


KILLED = """
import sys
from pathlib import Path
from rcmae.run.records.metrics import MetricsLog
folder, step = Path(sys.argv[1]), int(sys.argv[2])
log = MetricsLog(folder, resume_step=step, total_steps=10**6, tensorboard=False)
log.event("start", step=int(sys.argv[2]))
for step in range(int(sys.argv[2]) + 1, 10**6):
    log.step({"step": step, "loss": 0.5, "padding": "x" * 500})
"""


def test_kill_9_leaves_whole_lines_and_the_resume_goes_on(tmp_path):
    path, events = tmp_path / "metrics.jsonl", tmp_path / "events.jsonl"
    for round_, resume in enumerate((0, 100)):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path), str(resume)],
            stdout=subprocess.DEVNULL,
            cwd=Path(__file__).parent.parent,
        )
        try:
            end = time.monotonic() + 120
            while child.poll() is None and time.monotonic() < end:
                # the file is cut back by now
                started = events.exists() and events.read_bytes().count(b"\n") > round_
                if started and path.read_bytes().count(b"\n") > resume + 200:
                    break
                time.sleep(0.02)
        finally:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        assert len(path.read_bytes().splitlines()) > resume + 200
    with a_log(tmp_path, resume_step=200, total_steps=201) as log:
        log.step({"step": 201})
    assert [row["step"] for row in rows_of(path)] == list(range(1, 202))
    assert [row["step"] for row in rows_of(events)] == [0, 100]


def test_a_torn_event_is_dropped_and_earlier_ones_stay(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "start"}\n{"event": "chec' + "k" * 10_000)
    with a_log(tmp_path) as log:
        log.event("bad_sample", key="a/b", path=Path("x"), reason=float("nan"))
    assert [row["event"] for row in rows_of(path)] == ["start", "bad_sample"]
    path.write_text("torn without any line")
    a_log(tmp_path).close()
    assert path.read_text() == ""


def test_the_end_of_a_long_file_is_found_from_its_end(tmp_path):
    path = tmp_path / "events.jsonl"
    rows = [{"event": f"kind{n % 3}", "n": n, "text": "x" * (n * 37 % 3000)} for n in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"event": "kind0", "to')
    assert list(json_lines_back(path)) == rows[::-1]
    assert [row["n"] for row in events_of(tmp_path, "kind1", last=2)] == [295, 298]
    assert [row["n"] for row in events_of(tmp_path, "kind2")] == list(range(2, 300, 3))
    assert events_of(tmp_path / "none", "kind1", last=2) == []
    for text in ("", "torn", "\n", "3\n"):
        path.write_text(text)
        assert list(json_lines_back(path)) == []


def test_a_million_lines_are_not_read_to_know_what_was_undone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 33)  # 8 GB of nothing, which no disk holds
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"step": 7, "time": 5.0}\n{"step": 8, "time": 6.0}\n{"step": 9, "ti')
    assert undone(path, 7) == {"step": 8, "time": 6.0}
    assert undone(path, 8) is None


def test_a_full_disk_keeps_lines_waiting_and_is_told_once(tmp_path, monkeypatch):
    out = io.StringIO()
    log = a_log(tmp_path, console=Console(file=out, width=200), tensorboard=False)
    log.step({"step": 1})
    written = files.Lines._write_waiting
    taken = [b'{"step": 2, "']  # of a line, before the disk is full

    def full(self):
        if taken:
            self._file.write(taken.pop())
            self._file.truncate(os.fstat(self._file.fileno()).st_size - 13)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.Lines, "_write_waiting", full)
    for step in (2, 3, 4):
        log.step({"step": step})
        log.event("bad_sample", step=step)
    assert log.problem == f"{tmp_path}/metrics.jsonl: No space left on device"
    assert [row["step"] for row in rows_of(tmp_path / "metrics.jsonl")] == [1]
    monkeypatch.setattr(files.Lines, "_write_waiting", written)
    log.step({"step": 5})
    log.event("checkpoint")
    assert log.problem is None
    log.close()
    assert [row["step"] for row in rows_of(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert len(rows_of(tmp_path / "events.jsonl")) == 4
    said = out.getvalue()
    assert said.count("metrics.jsonl: No space left on device; its lines are kept") == 1
    assert said.count("metrics.jsonl is written again") == 1


def test_a_line_that_went_in_half_is_cut_off_again(tmp_path):
    lines = files.Lines(tmp_path / "metrics.jsonl")
    lines.write('{"step": 1}')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        lines.write('{"step": 2}')
        told = lines.problem
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert told is not None
    assert lines.path.read_text() == '{"step": 1}\n'
    lines.write('{"step": 3}')
    assert [row["step"] for row in rows_of(lines.path)] == [1, 2, 3]
    assert (lines.problem, lines.waiting) == (None, 0)
    lines.close()


def test_a_file_that_was_deleted_is_begun_anew_and_one_that_was_replaced_is_not(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    lines = files.Lines(path)
    lines.write('{"step": 1}')
    shutil.rmtree(path.parent)
    lines.write('{"step": 2}')
    assert lines.problem == f"{path} was deleted, and is started again"
    lines.write('{"step": 3}')
    assert lines.problem is None
    assert [row["step"] for row in rows_of(path)] == [2, 3]
    path.with_name("of another job").write_text("")
    os.replace(path.with_name("of another job"), path)
    lines.write('{"step": 4}')
    lines.close()
    lines.close()
    assert path.read_text() == ""


def test_trouble_with_tensorboard_is_told_and_ends_nothing(tmp_path, monkeypatch):
    out = io.StringIO()
    (tmp_path / "tensorboard").write_text("no folder")
    with a_log(tmp_path, console=Console(file=out, width=200)) as log:
        for step in (1, 2):
            log.step({"step": step, "loss": 1.0})
        assert len(rows_of(tmp_path / "events.jsonl")) == 1
        (tmp_path / "tensorboard").unlink()
        monkeypatch.setattr(board, "AGAIN_S", 0.0)
        log._board._retry_at = 0.0
        log.step({"step": 3, "loss": 3.0})
        worker = log._board._writer._get_file_writer().event_writer._async_writer._worker
        worker.exception = OSError(28, "No space left on device")
        log.step({"step": 4, "loss": 4.0})
        log.step({"step": 5, "loss": 5.0})
    assert out.getvalue().count("continuing without") == 2
    assert [row["event"] for row in rows_of(tmp_path / "events.jsonl")] == ["not_written"] * 2
    seen = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in seen] == [3, 5]


def test_numbers_that_json_lacks_become_null(tmp_path):
    with a_log(tmp_path) as log:
        log.step(
            {
                "step": 1,
                "loss": float("nan"),
                "grad_norm": float("inf"),
                "nested": {"list": [float("-inf"), 1.5]},
            }
        )
        log.step({"step": 2, "loss": None})
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert (rows[0]["loss"], rows[0]["grad_norm"], rows[0]["nested"]) == (
        None,
        None,
        {"list": [None, 1.5]},
    )


def test_a_rank_that_does_not_write_leaves_nothing(tmp_path):
    with a_log(tmp_path / "run", writes=False) as log:
        log.step({"step": 1})
        log.event("start")
        log.scalars("knn", {"teacher": 1.0}, 1)
        log.say("nothing")
        log.sync()
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_the_same_numbers_and_forgets_the_steps_that_were_cut(tmp_path):
    with a_log(tmp_path) as log:
        for step in (1, 2, 3):
            log.step({"step": step, "loss": float(step), "name": "text"})
    time.sleep(1.1)  # event files are named and read by the second
    with a_log(tmp_path, resume_step=2) as log:
        log.step({"step": 3, "loss": 30.0})
        log.scalars("knn", {"teacher": 50.0}, 3)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
    assert board.Scalars("knn/teacher")[0].value == 50.0
    assert "train/name" not in board.Tags()["scalars"]


def test_a_log_file_gets_one_plain_line_a_step(tmp_path):
    out = io.StringIO()
    with a_log(tmp_path, console=Console(file=out, width=20)) as log:
        log.step(
            {
                "step": 3,
                "epoch": 0.25,
                "loss": 0.81234,
                "loss_reconstruction": 0.5,
                "loss_consistency": 0.31234,
                "lr": 1.5e-4,
                "images_per_s": 512.3,
                "data_wait_s": 0.0123,
                "memory_peak_gib": 1.25,
                "mfu": 0.412,
            }
        )
        log.step({"step": 10, "loss": float("nan")})
        log.say("[not markup] :x:")
    first, second, said = out.getvalue().splitlines()
    assert first.startswith(
        "step 3/10  epoch 0.25  loss 0.8123 (reconstruction 0.5000, consistency 0.3123)  lr "
        "1.50e-04  512 img/s  "
        "wait 0.012 s  1.2 GiB  MFU 41.2%  0:00:0"
    )
    assert first.endswith("left")
    assert second == "step 10/10  loss nan"
    assert said == "[not markup] :x:"


def test_a_terminal_gets_a_bar(tmp_path):
    out = io.StringIO()
    with a_log(
        tmp_path, bar=True, console=Console(file=out, force_terminal=True, width=100)
    ) as log:
        log.step({"step": 4, "loss": 0.5})
        log.say("said above")
    text = out.getvalue()
    assert "4/10" in text
    assert "loss 0.5000" in text
    assert "said above" in text


def test_the_meter_counts_images_waits_and_leaves_out_what_is_not_training():
    meter = Meter(device=torch.device("cpu"), world=2, step_flops_per_image=1e9, precision="fp32")
    for _ in range(2):
        with meter.waiting():
            time.sleep(0.05)
        meter.step(64)
    with meter.away():
        time.sleep(0.5)
    seen = meter.read()
    assert 0.05 <= seen["data_wait_s"] <= seen["step_s"] < 0.25
    assert seen["images_per_s"] == pytest.approx(64 / seen["step_s"])
    assert seen["model_tflops"] == pytest.approx(seen["images_per_s"] * 1e9 / 2 / 1e12)
    assert 0.01 < seen["memory_peak_gib"] < 100
    assert "mfu" not in seen  # a CPU's peak is not known
    assert meter.read()["images_per_s"] == 0  # restarted


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", False, 989.4),
        ("NVIDIA H100 PCIe", "bf16", False, 756.0),
        ("NVIDIA H200", "bf16", True, 989.4),
        ("NVIDIA H200", "fp32", False, 66.9),
        ("NVIDIA H200", "fp32", True, 494.7),
        ("NVIDIA B200", "bf16", False, 2250.0),
        ("NVIDIA A100-SXM4-80GB", "bf16", False, 312.0),
        ("NVIDIA A100-SXM4-80GB", "fp32", True, 156.0),
        ("NVIDIA RTX A6000", "bf16", False, 154.8),
        ("NVIDIA A10G", "bf16", False, 70.0),
        ("NVIDIA L40S", "bf16", False, 362.1),
        ("NVIDIA L4", "bf16", False, 121.0),
        ("Tesla V100-SXM2-32GB", "fp32", True, 15.7),
        ("Tesla V100-SXM2-32GB", "bf16", False, None),
        ("NVIDIA B300 SXM6 AC", "bf16", False, 2250.0),
        ("NVIDIA GB300", "bf16", False, 2500.0),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "bf16", False, 503.8),
        ("AMD Instinct MI325X", "bf16", False, 1307.4),
        ("AMD Instinct MI355X", "fp32", True, 157.3),
        ("NVIDIA A100-PCIE-40GB", "bf16", False, 312.0),
        # another chip under a name that begins alike, or a part of one
        ("NVIDIA RTX A1000", "bf16", False, None),
        ("NVIDIA RTX A3000 Laptop GPU", "bf16", False, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", False, None),
        ("NVIDIA GeForce RTX 4090 D", "bf16", False, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", False, None),
        ("Some Device of 2031", "bf16", False, None),
    ],
)
def test_peaks_by_device_name(name, precision, tf32, tflops):
    peak = peak_flops(name, precision, tf32=tf32)
    assert peak == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_the_closing_summary_names_only_what_is_there(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    text = closing_summary(
        "quickstart: finished at step 10",
        ran={"objective": "rcmae"},
        table="         k=20\nteacher 50.00",
        places={"metrics": tmp_path / "metrics.jsonl", "picture": tmp_path / "missing.png"},
        commands=[("curves", "tensorboard --logdir runs")],
    )
    assert "teacher 50.00" in text
    assert str(tmp_path / "metrics.jsonl") in text
    assert "missing.png" not in text
    assert text.splitlines()[-1].strip() == "tensorboard --logdir runs    # curves"


def test_the_bar_moves_at_each_step_and_ends_above_the_summary(tmp_path):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with a_log(tmp_path, bar=True, console=console) as log:
        log.moved(1, 100.0)
        log.tell({"step": 1, "loss": 0.75, "images_per_s": 100.0})
        log.moved(2, 321.0)
        log._bar.refresh()
        log.conclude("the last word")
    text = out.getvalue()
    assert "step 1/10  loss 0.7500" in text
    assert "2/10" in text
    assert "321 img/s" in text
    assert "left" in text.partition("321 img/s")[2]
    assert "/10" not in text.partition("the last word")[2]


def test_a_narrow_terminal_shows_the_step_the_loss_the_speed_and_the_time_left(tmp_path):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None)
    figures = {"lr": 1e-3, "images_per_s": 12345.0, "loss_one": 0.5, "loss_two": 0.25, "mfu": 0.4}
    with a_log(tmp_path, bar=True, console=console, total_steps=312_000) as log:
        log.step({"step": 12_345, "epoch": 1.25, "loss": 0.75, **figures})
        log.moved(12_346, 12345.0)
        log._bar.refresh()
    drawn = [line for line in out.getvalue().replace("\r", "\n").splitlines() if "12346/" in line]
    assert re.search(r"step +12346/312000 .* loss 0\.7500  12345 img/s  \S+ left", drawn[-1])
    assert len(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn[-1])) <= 80


def test_a_log_file_has_a_line_of_the_first_steps_and_then_of_each_that_is_logged(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Folder(tmp_path / "run")
    overrides = ("schedule.steps=12", "log.every_steps=6", "run.stop_after_steps=7")
    assert start(tiny, run.path, *overrides) == 75
    shown = [line.split()[1] for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert shown == ["1/12", "2/12", "5/12", "6/12"]
    assert start(tiny, run.path, *overrides[:2]) == 0
    shown = [line.split()[1] for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert shown == ["8/12", "9/12", "12/12"], "a job that resumes looks alive, too"
    assert run.steps() == [6, 12], "metrics.jsonl has those that are logged"


def test_a_long_silence_is_broken_by_a_line(tmp_path, monkeypatch):
    out = io.StringIO()
    clock = [1000.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    with a_log(tmp_path, console=Console(file=out), total_steps=40) as log:
        for step in range(21, 26):  # 12 s each, none logged
            clock[0] += 12.0
            log.moved(step, 3.0)
            log.mention(step, 3.0)
    shown = re.findall(r"step (\d+)/40  3 img/s", out.getvalue())
    assert shown == ["23"], "after half a minute"
    assert not rows_of(tmp_path / "metrics.jsonl"), "on the console alone"
    assert json.loads((tmp_path / "progress.json").read_text())["step"] == 25
