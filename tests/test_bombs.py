"""What one sample may ask of a machine: no other program, little memory, little time."""

import ast
import io
import os
import resource
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streams import flat_stream

from rcmae.config.sections import DataOptions
from rcmae.data.index import ShardIndex
from rcmae.data.masking import NoMask
from rcmae.data.plan import Plan
from rcmae.data.stream import labelled_batches
from rcmae.data.transforms import (
    MAX_PIXELS,
    BadImage,
    CentreTransform,
    TrainTransform,
    decode,
)
from rcmae.evaluation.corruptions import opened

ROOT = Path(__file__).parent.parent
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def saved(size, kind, mode="RGB", **options):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def calls(path):
    """(name of what is called, names of its keyword arguments, line) of each call in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {each.arg for each in node.keywords}, node.lineno


def test_every_image_that_is_opened_is_of_a_closed_list_of_formats():
    wanted = {"Image.open": "formats", "PIL.Image.open": "formats", "ImageFolder": "loader"}
    met = 0
    for part in ("rcmae", "tools", "tests"):
        for path in sorted((ROOT / part).rglob("*.py")):
            for name, given, line in calls(path):
                if name in wanted:
                    met += 1
                    assert wanted[name] in given, f"{path}:{line}: {name} without {wanted[name]}="
    assert met > 10


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_postscript_starts_no_program(tmp_path, monkeypatch, channels):
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\necho called >> {tmp_path}/called\necho 10.0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for strict in (False, True):
        with pytest.raises(BadImage, match="no image of a format"):
            decode(EPS, channels, strict=strict)
    assert not (tmp_path / "called").exists()


def gif(width, height):
    head = b"GIF89a" + struct.pack("<HH", width, height) + b"\xf0\0\0" + bytes(6)
    return head + b"," + struct.pack("<HHHH", 0, 0, 1, 1) + b"\0\x02\x02D\x01\0;"


def jpeg_that_says(height, width):
    data = bytearray(saved((64, 64), "JPEG", progressive=True))
    at = data.index(b"\xff\xc2")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


BOMBS = {
    "gif": gif(13_000, 13_000),
    "gif below the limit": gif(9_000, 9_000),
    "jpeg": jpeg_that_says(13_000, 13_700),
    "jpeg below the limit": jpeg_that_says(9_000, 9_000),
    "png": saved((9_000, 9_000), "PNG", mode="1"),
    "webp": saved((9_000, 9_000), "WEBP", mode="RGB", lossless=True, method=0),
    "tiff": saved((9_000, 9_000), "TIFF", mode="1", compression="group4"),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_small_file_of_many_pixels_is_a_bad_image(name, channels):
    began = time.process_time()
    with pytest.raises(BadImage, match="pixels"):
        decode(BOMBS[name], channels)
    assert time.process_time() - began < 0.2


def test_the_limit_on_pixels_is_the_recipe_s():
    assert DataOptions().max_pixels == MAX_PIXELS
    for kind in ("JPEG", "PNG"):
        data = saved((60, 40), kind)
        assert decode(data, max_pixels=2400).shape == (40, 60, 3)
        for transform in (TrainTransform, CentreTransform):
            with pytest.raises(
                BadImage, match=r"40 x 60 pixels are more than data\.max_pixels=2399"
            ):
                transform((16, 16), max_pixels=2399)(data, 0, 0)


def of_scans(count):
    """A progressive JPEG with its last scan repeated."""
    data = saved((48, 48), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (count - data.count(b"\xff\xda") + 1) + data[-2:]


def test_a_jpeg_of_more_than_a_hundred_scans_is_a_bad_image():
    assert decode(of_scans(100)).shape == (48, 48, 3)
    for channels in (1, 3, 4):
        with pytest.raises(BadImage, match="101 scans"):
            decode(of_scans(101), channels)
    with pytest.raises(BadImage, match="4000 scans"):
        TrainTransform((16, 16))(of_scans(4000), 0, 0)


def test_what_looks_like_scans_in_a_comment_is_none():
    comment = b"\xff\xda\0\x02" * 500
    assert decode(saved((48, 48), "JPEG", comment=comment)).shape == (48, 48, 3)


@pytest.mark.parametrize("size", [(16_000, 1), (1, 16_000), (16_000, 2), (3, 9_000)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_a_thread_of_pixels_is_cut_before_it_is_resized(size, kind):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    view = CentreTransform((224, 224))(saved(size, kind), 0, 0)
    assert view.image.shape == (3, 224, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
    top, left, height, width, _ = view.crop
    assert top + height / 2 == pytest.approx(size[1] / 2, abs=1)
    assert left + width / 2 == pytest.approx(size[0] / 2, abs=1)
    assert TrainTransform((224, 224))(saved(size, kind), 0, 0).image.shape == (3, 224, 224)


def test_a_photograph_of_frost_is_no_thread(tmp_path):
    path = tmp_path / "frost.png"
    path.write_bytes(saved((16_000, 1), "PNG"))
    with pytest.raises(ValueError, match=r"frost\.png: 1 x 16000 pixels are too thin"):
        opened(path)


class Greedy(CentreTransform):
    """Finds no memory for one image in three."""

    def __call__(self, data, seed, position, draw=0):
        if len(data) % 3 == 0:
            raise MemoryError
        return super().__call__(data, seed, position, draw)

    def views(self, data, seed, positions):
        return [self(data, seed, position) for position in positions]


def test_a_sample_without_memory_is_a_bad_sample(photo_shards):
    index = ShardIndex.open(photo_shards)
    plan = Plan(index.counts, seed=0, images=8, streams=2, window=16)
    stream = flat_stream(
        index=index,
        plan=plan,
        transform=Greedy((16, 16)),
        mask=NoMask(),
        seed=0,
        micro=8,
        max_bad_fraction=1.0,
    )
    steps = stream.steps(0)
    assert sum(len(batch) for _ in range(5) for batch in next(steps)) == 40
    reasons = {each.reason for each in stream.drain_bad()}
    assert reasons == {"there is not enough memory for it"}
    bad = []
    batches = list(labelled_batches(index, Greedy((16, 16)), batch=40, on_bad=bad.append))
    assert sum(int((batch.positions >= 0).sum()) for batch in batches) == 240 - len(bad)
    assert {each.reason for each in bad} == reasons


def test_memory_that_a_decoder_is_refused_makes_a_bad_image(monkeypatch):
    def no_memory(*_, **__):
        raise MemoryError

    monkeypatch.setattr("rcmae.data.transforms.decode_box", no_memory)
    monkeypatch.setattr(np, "array", no_memory)
    with pytest.raises(BadImage, match="memory"):
        decode(saved((16, 16), "JPEG"))
    with pytest.raises(BadImage, match="memory"):
        decode(saved((16, 16), "PNG"))
