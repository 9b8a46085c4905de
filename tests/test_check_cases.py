"""The runner of cases tells right from wrong, and what has another name."""

import json
from pathlib import Path

import pytest

from tools import check_cases


def test_each_case_has_its_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    programs = {
        "good": "",
        "bad": "print('why'); raise SystemExit(1)",
        "gone": "raise SystemExit(2)",
    }
    programs["slow"] = "import time; time.sleep(60)"
    for name, text in programs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.py").write_text(text)
    assert check_cases.main([str(tmp_path), "--json", "--timeout-s=2"]) == 1
    said = capsys.readouterr()
    found = {each["name"]: each["verdict"] for each in json.loads(said.out)}
    assert found == {"good": "right", "bad": "WRONG", "gone": "moved", "slow": "not done after 2 s"}
    assert "1 of 4 cases are right" in said.err
    assert check_cases.main([str(tmp_path), "good"]) == 0
    assert check_cases.main([str(tmp_path), "none"]) == 2
