"""The first half hour on a GPU, with small sizes on the CPU: every case runs, and the same command
goes on where it was stopped."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_cases
import pytest
import torch

from rcmae.process.alive import boot, died_here
from tools import gpu_day


def test_every_case_runs_and_is_not_measured_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "day.json"
    words = ["--tiny", "--for-s", "800", "--out", str(out)]
    whole = gpu_day.cases_of

    def with_a_broken_one(part: str, tiny: bool) -> list[dict[str, Any]]:
        broken = {"name": "broken", "kind": "none such", "about_s": 1}
        return [broken, *whole(part, tiny)] if part == "ceilings" else whole(part, tiny)

    monkeypatch.setattr(gpu_day, "cases_of", with_a_broken_one)
    assert gpu_day.main(words) == 1
    report = json.loads(out.read_text())
    assert "KeyError" in report["cases"]["broken"]["error"]
    others = {name: row for name, row in report["cases"].items() if name != "broken"}
    assert {name.split("/")[0] for name in others} == set(gpu_day.PARTS)
    failed = {name: row["error"] for name, row in others.items() if "error" in row}
    assert not failed
    step = report["cases"]["steps/L/local/128/compiled/rcmae"]["result"]
    assert sum(step["phases_s"].values()) == pytest.approx(step["step_s"]["median"], rel=0.4)
    assert step["told"] is step["hours_over_told"] is step["mfu"] is None  # of a GPU alone
    assert step["images_per_s"] > 0
    of = {key: step["of"][key] for key in ("model", "placement")}
    assert of == {"model": "vit_large_patch16", "placement": "local"}
    assert step["of"]["variant"].startswith("rcmae-lean-")
    assert step["of"]["step_flops"] * step["images_per_s"] == pytest.approx(step["flops_per_s"])
    engines = {name for name in others if name.startswith("engines/")}
    assert set(report["summary"]["engine_over_local"]) == engines
    assert "failed: KeyError" in capsys.readouterr().out

    def again(*_: object) -> None:
        raise AssertionError("it was measured already")

    monkeypatch.setattr(gpu_day, "cases_of", whole)
    monkeypatch.setattr(gpu_day, "run_cases", again)
    monkeypatch.setattr(gpu_day, "about", lambda tiny: report)
    capsys.readouterr()
    assert gpu_day.main(words) == 0
    assert "every case runs" in capsys.readouterr().out.splitlines()[-1]


def test_what_the_plan_says_is_of_this_gpu_or_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    case = {"recipe": "rcmae_vit_l_16", "images": 128, "engine": "local", "compile": True}
    recipe = gpu_cases.recipe_of(case, tiny=False)

    def on(device_name: str) -> dict[str, Any]:
        monkeypatch.setattr(gpu_cases, "device_name", lambda: device_name)
        return gpu_cases.against_plan(recipe, seconds=0.1)

    known = on("NVIDIA A100-SXM4-80GB")
    assert known["told"]["gpu"] == "a100-80g"
    assert known["told"]["from"] == "stated"  # no measured one: it would be this very file
    assert known["hours_over_told"] == pytest.approx(known["told"]["images_per_s"] / 1280)
    only_its_peak = on("NVIDIA A100-PCIE-40GB")
    assert only_its_peak["mfu"] == known["mfu"] > 0
    unknown = on("NVIDIA Something 1000")
    assert unknown["flops_per_s"] == known["flops_per_s"]
    assert unknown["mfu"] is None
    for row in (only_its_peak, unknown):
        assert row["told"] is row["hours_over_told"] is None


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is known of this machine, without asking it."""
    found = {"hardware": {"cpu": "a CPU"}, "versions": {"torch": "2.11"}, "commit": None}
    monkeypatch.setattr(gpu_day, "about", lambda tiny: found)
    return found


def test_no_case_begins_that_may_end_too_late(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    here: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    seconds = [0.0]
    limits = []

    def took(
        cases: list[dict[str, Any]],
        tiny: bool,
        limit_s: float,
        keep: Callable[[dict[str, Any]], None],
    ) -> None:
        limits.append(limit_s)
        seconds[0] += 100
        for case in cases:
            keep({"name": case["name"], "result": {}, "seconds": 100})

    monkeypatch.setattr(gpu_day, "run_cases", took)
    monkeypatch.setattr(gpu_day.time, "monotonic", lambda: seconds[0])
    out = tmp_path / "day.json"
    calls = 0
    while (status := gpu_day.main(["--out", str(out)])) == gpu_day.AGAIN:
        calls += 1
        assert seconds[0] <= 540 * calls
        last = capsys.readouterr().out.splitlines()[-1]
        assert re.search(r"\d+ cases? waits?; run it again for the rest", last)
    assert status == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"gpu_day: all is measured; now: rcmae plan RECIPE --measured {out}"
    assert calls > 5
    assert max(limits) <= 530
    every = [case["name"] for part in gpu_day.PARTS for case in gpu_day.cases_of(part, False)]
    assert len(every) == len(set(every))
    assert set(json.loads(out.read_text())["cases"]) == set(every)


def test_the_first_cases_of_all_parts_come_first() -> None:
    names = [case["name"] for case in gpu_day.in_order(gpu_day.PARTS, False)]
    assert [name.split("/")[0] for name in names[: len(gpu_day.PARTS)]] == list(gpu_day.PARTS)
    assert len(names) == len(set(names)) > 30


def assert_ends(process: int) -> None:
    """A process that was killed is gone a moment later."""
    end = time.monotonic() + 30
    while not died_here(socket.gethostname(), boot(), process):
        assert time.monotonic() < end
        time.sleep(0.05)


ENDLESS = """
import json, subprocess, sys, time
case = json.loads(sys.argv[1])[0]
beside = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("CASE " + json.dumps({"name": case["name"], "result": {"beside": beside.pid}}), flush=True)
print("CASE {", end="", flush=True)
time.sleep(600)
"""


def test_what_a_case_leaves_behind_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "gpu_cases.py").write_text(ENDLESS)
    monkeypatch.setattr(gpu_day, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_day, "LEAVES_S", 0.1)
    done, missing = {"name": "done"}, {"name": "missing"}
    begin = time.monotonic()
    rows: list[dict[str, Any]] = []
    gpu_day.run_cases([done], False, 60.0, rows.append)
    assert time.monotonic() - begin < 30  # it says all that it has to, and does not end
    (row,) = rows
    assert_ends(row["result"]["beside"])
    rows.clear()
    gpu_day.run_cases([done, missing], False, 4.0, rows.append)
    assert [row["name"] for row in rows] == ["done", "missing"]
    assert rows[1]["error"].startswith("over 4 s")


FIRST_OF_TWO = """
import json, pathlib, subprocess, sys, time
case = json.loads(sys.argv[1])[0]
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
row = {"name": case["name"], "result": {"beside": child.pid}}
print("CASE " + json.dumps(row), flush=True)
time.sleep(600)
"""
DAY = """
import pathlib, sys
from tools import gpu_day
root, out = map(pathlib.Path, sys.argv[1:3])
gpu_day.ROOT = root
found = {"hardware": {"cpu": "a CPU"}, "versions": {"torch": "2.11"}, "commit": None}
gpu_day.about = lambda tiny: found
sys.exit(gpu_day.main(["--tiny", "--parts", "ceilings", "tests", "--out", str(out)]))
"""


@pytest.fixture
def day(tmp_path: Path) -> list[str]:
    """A day of two cases in one process, of which the second does not end."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "gpu_cases.py").write_text(FIRST_OF_TWO)
    return [sys.executable, "-c", DAY, str(tmp_path), str(tmp_path / "day.json")]


def first_row(out: Path) -> dict[str, Any]:
    """That of the first case, as soon as it is kept."""
    end = time.monotonic() + 60
    while not out.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    cases = json.loads(out.read_text())["cases"]
    assert list(cases) == ["ceilings"]
    result: dict[str, Any] = cases["ceilings"]["result"]
    return result


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_case_with_what_it_started_and_what_is_done_is_kept(
    number: signal.Signals, tmp_path: Path, day: list[str]
) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(day, env=env, stderr=subprocess.PIPE, text=True)
    row = first_row(tmp_path / "day.json")
    process.send_signal(number)
    assert process.communicate(timeout=60)[1].splitlines()[1:] == [
        "gpu_day: stopped; run it again for the rest"
    ]
    assert process.returncode == 128 + number
    assert_ends(row["beside"])
    assert first_row(tmp_path / "day.json") == row


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_is_closed_ends_the_case_unless_nohup_holds_it(
    ignored: bool, tmp_path: Path, day: list[str]
) -> None:
    terminal, inside = pty.openpty()
    # these tests may be run under nohup themselves, which children inherit
    held = ["nohup"] if ignored else ["env", "--default-signal=HUP"]
    command = ["setsid", "--ctty", *held, *day]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdin=inside, stdout=inside, stderr=inside
    )
    os.close(inside)
    row = first_row(tmp_path / "day.json")
    os.close(terminal)
    if ignored:
        time.sleep(0.5)
        assert process.poll() is None
        process.terminate()
    number = signal.SIGTERM if ignored else signal.SIGHUP
    assert process.wait(timeout=60) == 128 + number
    assert_ends(row["beside"])


def test_a_call_too_short_for_any_case_says_what_is_needed(
    tmp_path: Path, here: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "day.json"
    with pytest.raises(SystemExit) as left:
        gpu_day.main(["--out", str(out), "--for-s", "20", "--parts", "ceilings"])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "ceilings may take 30 s" in said
    assert "give at least --for-s 40" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_without_a_gpu_it_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        gpu_day.main(["--out", str(tmp_path / "day.json")])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert (
        said == f"gpu_day: no GPU is seen (torch {torch.__version__}); --tiny tries it on the CPU\n"
    )


def test_ceilings_attention_and_tests_are_lines_to_read(capsys: pytest.CaptureFixture[str]) -> None:
    ceilings = {
        "products_flops_per_s": {"bf16 4096": 5e14, "bf16 8192": 6.5e14, "fp32 4096": 4e13},
        "told_peak_flops_per_s": {"bf16": 9.89e14, "fp32": None},
        "copy_bytes_per_s": 2.4e12,
        "upload_bytes_per_s": 5e10,
    }
    shapes = {
        "197 tokens": {"backend": "flash", "ms": {"flash": 0.5}, "flops_per_s": {"flash": 3e14}},
        "50 tokens": {"backend": "own", "ms": {}, "flops_per_s": {}},
    }
    results = {
        "ceilings": ceilings,
        "attention": {"images": 128, "shapes": shapes},
        "tests": {"told": "3 passed, 1 skipped in 9.1s", "skipped": []},
        "tiny": {"told": "5/310 tests collected (305 deselected) in 2.0s", "skipped": []},
    }
    cases = {name: {"result": result} for name, result in results.items()}
    report = {"cases": cases, "summary": {}, "hardware": {"cpu": "x"}, "versions": {"torch": "2"}}
    gpu_day.print_report(report)
    said = capsys.readouterr().out
    assert "bf16 650 of 989 stated TFLOP/s, fp32 40 TFLOP/s, copies 2,400 GB/s" in said
    assert "flash 0.5 ms, 300 TFLOP/s" in said
    assert "own\n" in said
    assert "3 passed, 1 skipped" in said
    assert "5 collected, not run (--tiny)" in said
    assert "{" not in said


def test_a_batch_that_does_not_fit_is_an_answer_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(case: dict[str, Any], tiny: bool) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand more")

    def broken(case: dict[str, Any], tiny: bool) -> dict[str, Any]:
        raise KeyError("something")

    kinds = {"full": full, "broken": broken, "well": lambda case, tiny: {"a": 1}}
    monkeypatch.setattr(gpu_cases, "KINDS", kinds)
    for name in ("start", "finish"):
        monkeypatch.setattr(gpu_cases.dist, name, lambda **_: None)
    cases = [{"name": kind, "kind": kind, "images": 7} for kind in kinds]
    assert gpu_cases.main([json.dumps(cases)]) == 0
    rows = [json.loads(line.removeprefix("CASE ")) for line in capsys.readouterr().out.splitlines()]
    assert rows[0]["result"]["out_of_memory"].endswith("Tried to allocate 9 GiB")
    assert rows[0]["result"]["images"] == 7
    assert "something" in rows[1]["error"]
    assert rows[2]["result"] == {"a": 1}
    report = {"cases": {row.pop("name"): row for row in rows}, "summary": {}}
    gpu_day.print_report({**report, "hardware": {"cpu": "x"}, "versions": {"torch": "2"}})
    said = capsys.readouterr().out
    assert "out of memory: CUDA out of memory" in said
    assert "failed: KeyError" in said


def test_a_steps_time_is_kept_where_the_rest_is_not_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    failures: dict[str, str] = {}
    with gpu_cases.noting(failures, "kernels"):
        raise RuntimeError("torch's profiler saw no kernels")
    result = {"step_s": {"median": 0.1}, "images_per_s": 10.0, "kernels_s": None, "host_s": 0.02}
    result |= {"news": ["torch.compile: no"], "not_measured": failures}
    report: dict[str, Any] = {"cases": {"steps/L": {"result": result}}, "summary": {}}
    gpu_day.print_report({**report, "hardware": {"cpu": "x"}, "versions": {"torch": "2"}})
    said = capsys.readouterr().out
    assert "no kernels: RuntimeError: torch's profiler saw no kernels" in said
    assert "torch.compile: no" in said


def test_numbers_of_another_machine_are_not_mixed_in(
    tmp_path: Path, here: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "day.json"
    out.write_text(json.dumps({**here, "tiny": False, "hardware": {"gpu": "another"}, "cases": {}}))
    with pytest.raises(SystemExit) as left:
        gpu_day.main(["--out", str(out)])
    assert left.value.code == 2
    assert "is of another hardware" in capsys.readouterr().err


def test_what_the_parts_say_together() -> None:
    def step(seconds: float, **phases: float) -> dict[str, Any]:
        return {"result": {"step_s": {"median": seconds}, "phases_s": phases}}

    found = gpu_day.summary(
        {
            "steps/L/local/128/compiled/rcmae": step(0.04, teacher=0.001),
            "steps/L/local/128/compiled/mae": step(0.032),
            "steps/L/local/128/eager/rcmae": step(0.06),
            "engines/L/ddp/128/compiled": step(0.05),
            "tests": {"error": "no pytest"},
        }
    )
    whole = "steps/L/local/128/compiled/rcmae"
    assert found["rcmae_over_mae"] == {whole: pytest.approx(1.25)}
    assert found["teacher_share"] == {whole: pytest.approx(0.025)}
    assert found["eager_over_compiled"] == {whole: pytest.approx(1.5)}
    assert found["engine_over_local"] == {"engines/L/ddp/128/compiled": pytest.approx(1.25)}


def wheel(folder: Path, name: str, content: str) -> None:
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", content)
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


def test_what_is_missing_comes_from_a_folder_of_wheels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_day.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("PYTHONPATH", "/given")
    with pytest.raises(SystemExit):
        gpu_day.use_wheels(tmp_path)
    assert "--make-wheels" in capsys.readouterr().err
    wheel(tmp_path, "rcmae_missing_here", "ANSWER = 42\n")
    wheel(tmp_path, "torch", "this one is here already")
    gpu_day.use_wheels(tmp_path)
    root, target, given = gpu_day.os.environ["PYTHONPATH"].split(":")
    assert (root, given) == (str(gpu_day.ROOT), "/given")
    assert (Path(target) / "rcmae_missing_here.py").read_text() == "ANSWER = 42\n"
    assert not (Path(target) / "torch.py").exists()
