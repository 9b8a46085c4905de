"""The benchmark of the stream runs, compares like with like, and finds the views like PIL's."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import stream_peers
from PIL import Image
from sklearn.datasets import load_sample_images

TOOL = Path(__file__).parent.parent / "tools" / "bench_stream.py"


def run(*args):
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, args)], capture_output=True, text=True, timeout=240
    )


def test_it_reports_rates_of_every_side_and_the_likeness_of_the_views(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(32):
            file = io.BytesIO()
            Image.fromarray(load_sample_images().images[number % 2]).save(
                file, "JPEG", quality=90 - number % 8
            )
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = file.tell()
            tar.addfile(member, io.BytesIO(file.getvalue()))
    done = run(
        tmp_path / "a.tar",
        "--image-size",
        48,
        "--longer-side",
        500,
        "--samples",
        32,
        "--rounds",
        1,
        "--workers",
        1,
        "--json",
        tmp_path / "out.json",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["images"] == 32
    assert report["one_core"]["torchvision"]["ratio"] == 1
    for side, row in report["one_core"].items():
        assert row["images_per_cpu_s"] > 0
        assert side in done.stdout
    for package in stream_peers.PEERS:
        assert (package in report["versions"]) != (package in report["left_out"])
        assert package in report["versions"] or f"left out: {package}" in done.stdout
    assert min(report["all_cores"].values()) > 0
    assert report["likeness"]["min_db"] > 45
    assert report["likeness"]["shrunken_share"] > 0


def test_a_package_that_cannot_be_imported_is_left_out_and_said(tmp_path, monkeypatch):
    for module in ("litdata", "streaming", "cv2"):
        monkeypatch.setitem(sys.modules, module, None)
    found = stream_peers.peers(stream_peers.Photographs([], tmp_path, 32, 2))
    assert not found.sides
    assert not found.versions
    assert list(found.left_out) == ["litdata", "mosaicml-streaming", "opencv-python-headless"]
    for package, why in found.left_out.items():
        assert why.endswith(f"pip install {package}")


def test_crops_are_one_batch_after_another_of_whole_epochs(tmp_path):
    for number in range(5):
        picture = Image.fromarray(load_sample_images().images[number % 2])
        picture.save(tmp_path / f"{number}.jpg")
    files = sorted(tmp_path.glob("*.jpg"))
    side = stream_peers.uint8_side(stream_peers.Photographs(files, tmp_path, 32, 2))
    for _ in range(2):
        assert [tuple(crops.shape) for crops in side] == [(2, 3, 32, 32)] * 2 + [(1, 3, 32, 32)]


def test_shards_that_are_not_there_are_named(tmp_path):
    done = run(tmp_path / "none.tar")
    assert done.returncode == 2
    assert "none.tar" in done.stderr
    assert "Traceback" not in done.stderr
