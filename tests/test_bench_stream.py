"""The benchmark of the stream runs, compares like with like, and finds the views like PIL's."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

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
    assert min(report["all_cores"].values()) > 0
    assert report["likeness"]["min_db"] > 45
    assert report["likeness"]["shrunken_share"] > 0


def test_shards_that_are_not_there_are_named(tmp_path):
    done = run(tmp_path / "none.tar")
    assert done.returncode == 2
    assert "none.tar" in done.stderr
    assert "Traceback" not in done.stderr
