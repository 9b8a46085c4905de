"""Maps and annotations: what is one, what is wrong with one, and what a set of them holds."""

import io
import json
import struct
import tarfile
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from rcmae.commands.shards import check, index, make
from rcmae.data.index import ShardIndex
from rcmae.data.members import registry
from rcmae.data.members.annotations import Annotations, code_of, mask_of, objects_of, scaled
from rcmae.data.members.maps import Maps, decode_map, encode_map, nearest
from rcmae.data.members.registry import register
from rcmae.data.packing.members import beside_of
from rcmae.data.tars import KIND_OF_SUFFIX
from rcmae.data.transforms import BadImage
from rcmae.errors import Refused
from rcmae.tasks.detect import categories_beside


def png(pixels, mode=None):
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, "PNG") if mode is None else pixels.save(file, "PNG")
    return file.getvalue()


def photo(height=12, width=20):
    file = io.BytesIO()
    pixels = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def map_of(*numbers, height=12, width=20, kind=np.uint8):
    return np.resize(np.array(numbers, kind), (height, width))


def bomb(height, width):
    """A PNG of grey that says it has so many pixels, all of them 0, in few bytes."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(10_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_map_is_one_channel_of_8_or_16_bits_or_a_palette():
    eight = map_of(0, 3, 255)
    assert (decode_map(png(eight), (12, 20)) == eight).all()
    sixteen = map_of(0, 300, 65535, kind=np.uint16)
    found = decode_map(png(sixteen), (12, 20))
    assert found.dtype == np.uint16
    assert (found == sixteen).all()
    palette = Image.fromarray(eight).convert("P")
    palette.putdata(eight.reshape(-1).tolist())
    palette.putpalette([value % 251 for value in range(768)])
    assert (decode_map(png(palette, "P")) == eight).all()
    few = palette.point(lambda number: number % 4)
    file = io.BytesIO()
    few.save(file, "PNG", bits=2)
    assert (decode_map(file.getvalue()) == eight % 4).all()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (png(np.zeros((12, 20, 3), np.uint8)), "its map is RGB; wanted is one channel"),
        (png(np.zeros((12, 20, 4), np.uint8)), "its map is RGBA"),
        (png(np.zeros((12, 20), bool)), "its map has 1 bits a pixel"),
        (png(map_of(1, height=13)), "its map has 20 x 13 pixels, its image 20 x 12"),
        (png(map_of(1))[:60], "its map does not decode"),
        (photo(), "its map is no PNG"),
        (bomb(50_000, 50_000), "its map has 50000 x 50000 pixels, its image 20 x 12"),
    ],
)
def test_what_is_no_map_of_its_image_says_why(data, said):
    with pytest.raises(BadImage, match=said):
        Maps().verify(data, (12, 20), None)


def test_a_decompression_bomb_takes_no_memory():
    with pytest.raises(BadImage, match="more than 100,000,000"):
        decode_map(bomb(50_000, 50_000))


def test_a_map_is_made_smaller_without_a_number_between():
    numbers = np.kron(np.arange(12, dtype=np.uint8).reshape(3, 4), np.ones((4, 5), np.uint8))
    assert nearest(numbers, (3, 4)).tolist() == np.arange(12).reshape(3, 4).tolist()
    smaller = decode_map(Maps().resized(encode_map(numbers), (12, 20), (6, 10)))
    assert set(np.unique(smaller)) <= set(range(12))


def objects(*changes, **document):
    base = {"id": 7, "bbox": [2, 3, 4, 5], "category_id": 3, "iscrowd": 0, "area": 20}
    base["segmentation"] = [[2, 3, 6, 3, 6, 8, 2, 8]]
    each = [{**base, **change} for change in changes]
    found = {"image_id": 1, "height": 12, "width": 20, "annotations": each, **document}
    return json.dumps(found).encode()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"{", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (objects(height=13), "its annotation is of 20 x 13 pixels, its image has 20 x 12"),
        (objects({"bbox": [18, 3, 4, 5]}), "lies outside the image of 20 x 12"),
        (objects({"bbox": [18, 3, -1, 5]}), "negative side"),
        (objects({"bbox": [18, 3, 1]}), "wanted are x, y, width, height"),
        (objects({"category_id": 5}), "its category 5 is none of categories.json"),
        (objects({"segmentation": [[1, 2, 3, 4]]}), "no polygon of it has three points"),
        (objects({"segmentation": []}), "it has no polygon"),
        (objects({"segmentation": [[1, 1, 1e300, 2, 3, 4]]}), "leads far out of the image"),
        (objects({"segmentation": [[1, 1, 2, 2, 3, 4, 5]]}), "odd number of coordinates"),
        (objects({"segmentation": [["1", 1, 2, 2, 3, 4]]}), "no list of numbers"),
        (objects({"area": -1}), "its area is -1"),
        (objects({"iscrowd": 2}), "its iscrowd is 2"),
        (
            objects({"segmentation": {"size": [20, 12], "counts": [240]}}),
            r"its mask is of \[20, 12\], its image of \[12, 20\]",
        ),
        (
            objects({"segmentation": {"size": [12, 20], "counts": [239]}}),
            "runs do not add up to 12 x 20",
        ),
        (
            objects({"segmentation": {"size": [12, 20], "counts": "~~~"}}),
            "no run-length code",
        ),
        (
            objects({"segmentation": {"size": [12, 20], "counts": "\xe9" * 16}}),
            "no run-length code",
        ),
        (
            objects({"segmentation": {"size": [12.0, 20.0], "counts": [240]}}),
            r"its mask is of \[12.0, 20.0\]",
        ),
        (objects({"bbox": [10**400, 3, 4, 5]}), "wanted are x, y, width, height"),
        (objects({"area": 10**400}), "its area is 1000"),
        (objects(*[{}] * 10_001), "10,001 objects, more than 10,000"),
        (
            objects({"segmentation": [[0, 0, 19, 11] * 20_000]}),
            "polygons of its annotation are 760,000 pixels long",
        ),
    ],
)
def test_what_is_wrong_with_an_annotation_is_said(data, said):
    with pytest.raises(BadImage, match=said):
        Annotations().verify(data, (12, 20), {3: "cat"})


def test_run_length_codes_that_take_minutes_are_refused():
    code = {"segmentation": {"size": [4000, 3000], "counts": [12_000_000]}}
    data = objects(*[code | {"bbox": [0, 0, 1, 1]}] * 900, height=4000, width=3000)
    with pytest.raises(BadImage, match="900 run-length codes of 3000 x 4000 pixels"):
        objects_of(data, (4000, 3000))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "5",
        '{"7": "cat"}',
        '[{"id": 7}]',
        '[{"id": 7.5, "name": "cat"}]',
        '[{"id": 1e400, "name": "cat"}]',
        '[{"id": 7, "name": "cat"}, {"id": 7, "name": "dog"}]',
    ],
)
def test_categories_that_are_none_are_refused(text, tmp_path):
    (tmp_path / "categories.json").write_text(text)
    with pytest.raises(Refused, match=r"categories\.json"):
        beside_of(str(tmp_path))
    with pytest.raises(Refused, match=r"categories\.json has no categories"):
        categories_beside("data.shards", f"{tmp_path}/x-0.tar")


def test_lists_beside_shards_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "categories.json").write_bytes(b'\xef\xbb\xbf[{"id": 7, "name": "cat"}]')
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfsky\r\nroad\r\n")
    assert beside_of(str(tmp_path)) == {"annotation": {7: "cat"}, "map": ("sky", "road")}


def test_boxes_without_area_and_crowds_are_counted_and_other_json_is_let_be():
    flat = {"bbox": [2, 3, 0, 5]}
    facts = Annotations().verify(objects({}, flat, {"iscrowd": 1}), (12, 20), {3: "cat"})
    assert facts["boxes"] == {"3": 2}
    assert facts["objects"] == {"crowds": 1, "without area": 1}
    lines = Annotations().report(facts, {3: "cat"})
    assert "1 boxes without area" in lines[0]
    assert lines[1] == "boxes without area: object 7 of image 1"
    assert Annotations().verify(b'{"caption": "a cat"}', (12, 20), None) == {
        "others": Counter({"files": 1})
    }


def test_a_run_length_code_is_cocos():
    mask = np.zeros((12, 20), bool)
    mask[3:8, 2:6] = True
    mask[0, 0] = True
    code = code_of(mask)
    assert (mask_of(code, (12, 20)) == mask).all()
    # one of the published implementation: an object of 398 pixels
    counts = "bh2e0T4000000000000000000000000000000J6O100O7Idi`0"
    mask = mask_of({"size": [153, 152], "counts": counts}, (153, 152))
    assert mask.sum() == 398
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (18, 80, 38, 100)
    assert code_of(mask)["counts"] == counts


def test_an_object_of_a_smaller_image_is_scaled():
    each = json.loads(objects({}))["annotations"][0]
    half = scaled(each, (12, 20), (6, 10))
    assert half["bbox"] == [1, 1.5, 2, 2.5]
    assert half["area"] == 5
    assert half["segmentation"] == [[1, 1.5, 3, 1.5, 3, 4, 1, 4]]
    smaller = json.loads(Annotations().resized(objects({}), (12, 20), (6, 10)))
    assert (smaller["height"], smaller["width"]) == (6, 10)
    mask = np.zeros((12, 20), bool)
    mask[2:8, 4:10] = True
    coded = scaled({**each, "segmentation": code_of(mask)}, (12, 20), (6, 10))
    assert mask_of(coded["segmentation"], (6, 10)).sum() == 9


def write_tar(path, samples):
    with tarfile.open(path, "w") as tar:
        for key, content in samples.items():
            for suffix, data in content.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    """Two good samples, a map beyond the classes, one of another size, and an unknown category."""
    write_tar(
        tmp_path / "x-0.tar",
        {
            "a": {"jpg": photo(), "seg.png": png(map_of(0, 1, 255)), "json": objects({})},
            "b": {"jpg": photo(), "seg.png": png(map_of(1))},
            "c": {"jpg": photo(), "seg.png": png(map_of(0, 1, 2))},
            "d": {"jpg": photo(), "seg.png": png(map_of(0, width=21))},
            "e": {"jpg": photo(), "json": objects({"category_id": 4})},
        },
    )
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    (tmp_path / "categories.json").write_text(json.dumps([{"id": 3, "name": "cat"}]))
    return tmp_path


def run(command, arguments, capsys):
    status = command([*map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_verify_and_repair_read_maps_and_annotations(shards, tmp_path, capsys):
    status, told = run(check, ["verify", shards / "x-0.tar", "--jobs", 1], capsys)
    assert status == 1
    why = {row["key"]: row["reason"] for row in told["rejected"]}
    assert sorted(why) == ["c", "d", "e"]
    assert "2 (80 pixels); they run to 2: if zero is no label, set segment.map_zero" in why["c"]
    assert "21 x 12 pixels, its image 20 x 12" in why["d"]
    assert "its category 4 is none of categories.json" in why["e"]
    held = told["members"]["map"]
    assert (held["samples"], held["pixels"]) == (2, {"0": 80, "1": 320})
    assert held["no_label"] == {"pixels": 80}
    assert held["images"] == {"0": 1, "1": 2}
    assert "class 1 road: 320 pixels (66.67%) in 2 images" in held["lines"]
    assert told["members"]["annotation"]["boxes"] == {"3": 1}
    out = tmp_path / "clean"
    run(check, ["repair", shards / "x-0.tar", "--out", out, "--jobs", 1], capsys)
    status, clean = run(check, ["verify", out / "x-0.tar", "--jobs", 1], capsys)
    assert (status, clean["samples"], clean["members"]["map"]["pixels"]) == (0, 2, held["pixels"])


def test_report_counts_classes_without_reading_images(shards, capsys):
    told = run(index, [shards / "x-0.tar", "--jobs", 1], capsys)[1]
    assert told["indexes"][0]["members"] == {"annotation": 2, "map": 4}
    status, told = run(check, ["report", shards / "x-0.tar", "--jobs", 1], capsys)
    assert status == 1
    assert sorted(row["key"] for row in told["rejected"]) == ["c", "e"]  # d fits no image: not seen
    assert told["members"]["map"]["samples"] == 3
    assert "class 0 sky" in told["members"]["map"]["lines"][2]


class Depth:
    """A kind of a task from outside."""

    name = "depth"
    suffix = "depth.npy"
    beside = None

    def read_beside(self, text):
        raise AssertionError

    def verify(self, data, size, beside):
        if len(data) < 3:
            raise BadImage("its depth is too short")
        return {"bytes": Counter({"all": len(data)})}

    def resized(self, data, old, new):
        return data

    def report(self, facts, beside):
        return [f"{facts['bytes']['all']} bytes of depth"]


def test_a_kind_from_outside_is_indexed_and_checked(tmp_path, capsys):
    path = tmp_path / "x-0.tar"
    good = {"jpg": photo(), "depth.npy": b"12345"}
    write_tar(path, {"a": good, "b": {**good, "depth.npy": b"1"}, "c": {"jpg": photo()}})
    before = ShardIndex.open(str(path))
    before.save(tmp_path)
    register(Depth())
    try:
        again = ShardIndex.open(str(path), needs=["depth"])  # the index did not look for it
        assert [member.kind for member in again.members(0)] == ["image", "depth"]
        again.save(tmp_path)
        saved = ShardIndex.open(str(path), needs=["depth"])
        assert saved.is_saved
        assert saved.without("depth").tolist() == [2]
        assert saved.fingerprint == before.fingerprint
        told = run(check, ["verify", path, "--jobs", 1], capsys)[1]
        assert [row["reason"] for row in told["rejected"]] == ["its depth is too short"]
        assert "5 bytes of depth" in told["members"]["depth"]["lines"]
        again = run(make, [path, tmp_path / "again", "--jobs", 1], capsys)[1]
        assert (again["samples"], len(again["rejected"])) == (2, 1)
        anew = ShardIndex.open(f"{tmp_path}/again/*.tar", needs=["depth"])
        assert len(anew.without("depth")) == 1
    finally:
        registry._KINDS.clear()
        del KIND_OF_SUFFIX["depth.npy"]


def test_an_annotation_of_the_tests_is_sound():
    assert len(objects_of(objects({}, {}), None)) == 2
