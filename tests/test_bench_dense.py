"""The benchmark of images with maps or objects runs, and its shares are of one whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scenes import members, pack

from tools import bench_dense


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "scenes.tar"
    pack(path, members(range(8)))
    return path


@pytest.mark.parametrize(
    ("what", "side", "sides"),
    [("segment", "--crop=64", ["stream", "torchvision"]), ("detect", "--canvas=128", ["stream"])],
)
def test_rates_and_shares_are_reported(
    what: str,
    side: str,
    sides: list[str],
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = tmp_path / "report.json"
    few = ["--samples=8", "--rounds=1", f"--json={report}"]
    assert bench_dense.main([what, str(shards), side, *few]) == 0
    found = json.loads(report.read_text())
    assert list(found["one_core"]) == sides
    assert all(row["images_per_cpu_s"] > 0 for row in found["one_core"].values())
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["shares"][next(iter(found["shares"]))] > 0
    assert "images/CPU s" in capsys.readouterr().out


def test_detections_are_made_up_and_judged(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_dense.main(["judge", "--images=3", "--detections=20"]) == 0
    assert "3 images, 60 detections" in capsys.readouterr().out
    assert bench_dense.main(["judge", "--images=3", "--detections=20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["what"] == "judge"


def test_shards_that_are_not_there_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_dense.main(["segment", str(tmp_path / "none.tar")]) == 2
    assert "none.tar" in capsys.readouterr().err
