"""Damage of every kind: a run continues or stops as configured, and the tool names, counts and
mends it.
"""

import io
import json
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from streams import flat_stream

from rcmae.commands.shards import check as main
from rcmae.commands.shards import index as index_command
from rcmae.data.index import ShardIndex
from rcmae.data.plan import Plan
from rcmae.data.tars import forget_table
from rcmae.data.transforms import FORMATS
from runs import Folder, start


def bomb():
    """A JPEG that says it has 30,000 x 30,000 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    data = bytearray(file.getvalue())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 30_000, 30_000)
    return bytes(data)


@pytest.fixture(scope="module")
def damaged(photo_shards, tmp_path_factory):
    """(index as it was, ids of what was damaged): one sample of each kind, and the second half
    of one shard.
    """
    folder = tmp_path_factory.mktemp("damaged")
    for path in Path(photo_shards).parent.glob("*.tar"):
        shutil.copy(path, folder)
    noise, bad = np.random.RandomState(3), set()
    index = ShardIndex.open(f"{folder}/*.tar")
    index.save(folder)
    index = ShardIndex.load(folder)
    # Keep what an index saw: the same sizes, other bytes.
    for kind in ("flipped", "text", "zeros", "bomb"):
        sample = index[int(noise.randint(40, 240))]
        with open(sample.path, "r+b") as file:
            file.seek(sample.offset)
            data = bytearray(file.read(sample.size))
            if kind == "flipped":
                for at in (0, 1, *noise.randint(0, sample.size, 50)):
                    data[at] ^= 0x55
            elif kind == "bomb":
                data[: len(bomb())] = bomb()[: len(data)]
            else:
                data[:] = (b"no photograph " * 9000 if kind == "text" else bytes(sample.size))[
                    : sample.size
                ]
            file.seek(sample.offset)
            file.write(data)
        bad.add(sample.id)
    first = index.shards[0]
    cut = index[20]
    with open(first.path, "r+b") as file:
        file.truncate(cut.offset + 7)
    return index, bad | {index[number].id for number in range(20, 40)}


def test_a_run_over_damage_has_all_its_steps_and_names_each_sample(
    tiny, damaged, uninterrupted, tmp_path, capsys
):
    index, bad = damaged
    shards = f"data.shards={Path(index.shards[0].path).parent}/photo-*.tar"
    run = Folder(tmp_path / "run")
    assert start(tiny, run.path, shards, "data.max_bad_fraction=0.2") == 0
    assert run.steps() == uninterrupted.steps()
    plan = Plan(index.counts, seed=0, images=32, streams=8, window=4096)
    order = [index[number].id for number in plan.requests(0, 20 * 32).samples.tolist()]
    expected = {position: name for position, name in enumerate(order) if name in bad}
    told = run.events("bad_sample")
    # and no other moved
    assert {entry["position"]: f"{entry['shard']}/{entry['key']}" for entry in told} == expected
    assert set(expected.values()) == bad  # each was met in the 20 steps
    assert run.events("short_shards")

    assert main(["report", "--ledger", str(run.path)]) == 1
    said = capsys.readouterr().out
    assert f"{len(bad)} samples could not be read, {len(expected)} times:" in said
    assert all(name in said for name in bad)
    assert "30000 x 30000 pixels are more than data.max_pixels" in said
    assert main(["report", "--ledger", str(run.path / "events.jsonl"), "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["bad_samples"]) == len(expected)


def test_by_default_it_stops_and_says_why(tiny, damaged, tmp_path, capsys):
    shards = f"data.shards={Path(damaged[0].shards[0].path).parent}/photo-*.tar"
    assert start(tiny, tmp_path / "run", shards) == 1
    assert "could not be read, more than data.max_bad_fraction=0.001" in capsys.readouterr().err


def test_a_sample_of_no_bytes_is_replaced_too(tmp_path):
    from rcmae.data.masking import RandomMask
    from rcmae.data.transforms import TrainTransform

    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number, data in enumerate([file.getvalue(), b"", file.getvalue()]):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    index = ShardIndex.open(str(tmp_path / "x.tar"))
    stream = flat_stream(
        index=index,
        plan=Plan(index.counts, 0, 3, 1, 3),
        transform=TrainTransform((8, 8)),
        mask=RandomMask(4, 1),
        seed=0,
        micro=3,
        max_bad_fraction=1.0,
    )
    (batch,) = next(stream.steps(0))
    assert sorted(batch.keys) == ["x/0", "x/2", "x/2"]
    assert [entry.key for entry in stream.drain_bad()] == ["1"]


# ----------------------------------------------------------------------------------------- the tool


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_verify_names_what_is_wrong_and_repair_leaves_it_out(damaged, tmp_path, capsys, jobs):
    index, bad = damaged
    pattern = f"{Path(index.shards[0].path).parent}/photo-*.tar"
    picture = tmp_path / "sizes.png"
    assert main(["verify", pattern, "--jobs", jobs, "--json", "--picture", str(picture)]) == 1
    told = json.loads(capsys.readouterr().out)
    named = {
        f"{row['shard'].removesuffix('.tar')}/{row['key']}"
        for row in told["rejected"]
        if row["offset"] >= 0
    }
    assert named | {index[number].id for number in range(20, 40)} == bad
    assert [row["reason"] for row in told["rejected"] if row["shard"] == "photo-000000.tar"] == [
        "only 7 of the 3876 bytes of 0_20.jpg are there",
        "the tar breaks off: ends within '0_20.jpg'",
        "its index names 40 samples: 19 of them were not found, and 0 were that it does not name;"
        f" get the tar again, or run rcmae shards index {index.shards[0].path} --rebuild",
    ]
    assert (
        told["samples"]
        == 240 - len(bad)
        == sum(told["classes"].values())
        == sum(told["shorter_sides"].values())
    )
    with Image.open(picture, formats=FORMATS) as drawn:
        assert drawn.size[0] == 640

    clean = tmp_path / "clean"
    assert main(["repair", pattern, "--out", str(clean), "--jobs", jobs, "--json"]) == 1
    fingerprint = json.loads(capsys.readouterr().out)["fingerprint"]
    assert main(["verify", f"{clean}/*.tar", "--jobs", jobs]) == 0
    mended = ShardIndex.load(clean)
    assert mended.fingerprint == fingerprint
    assert {mended[number].id for number in range(len(mended))} == {
        index[n].id for n in range(240)
    } - bad
    one = mended[100]
    original = next(index[number] for number in range(240) if index[number].id == one.id)
    assert one.label == original.label
    content = [
        Path(each.path).read_bytes()[each.offset : each.offset + each.size]
        for each in (one, original)
    ]
    assert content[0] == content[1]
    assert main(["repair", pattern, "--out", str(clean)]) == 2
    assert "has photo-000000.tar already" in capsys.readouterr().err


def test_verify_finds_keys_that_are_there_twice_and_bytes_that_changed(
    photo_shards, tmp_path, capsys
):
    source = Path(photo_shards).parent / "photo-000001.tar"
    with tarfile.open(source) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()[:6]]
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for member, data in [*members, *(members[:2] if name == "a" else [])]:
                tar.addfile(member, io.BytesIO(data))
    assert main(["verify", f"{tmp_path}/*.tar", "--jobs", "1", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [row["reason"] for row in told["rejected"]] == ["its key is there before in this shard"]
    assert told["keys_in_several_shards"] == {f"1_{n:02d}": ["a.tar", "b.tar"] for n in range(3)}

    shutil.copy(source, tmp_path / "c.tar")
    built = ShardIndex.open(str(tmp_path / "c.tar"))
    whole = built.shards[0].__class__(**{**vars(built.shards[0]), "sha256": "0" * 64})
    ShardIndex([whole]).save(tmp_path)
    assert main(["verify", str(tmp_path / "c.tar"), "--jobs", "1"]) == 1
    assert "c.tar: its bytes are not those that were indexed" in capsys.readouterr().out


def jpeg(number, mode="RGB"):
    """A JPEG of noise."""
    file = io.BytesIO()
    pixels = Image.fromarray(np.random.RandomState(number).randint(0, 255, (64, 64, 3), np.uint8))
    pixels.convert(mode).save(file, "JPEG")
    return file.getvalue()


def tar_of(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_verify_sees_flaws_that_decoders_get_over(tmp_path, capsys):
    photo, inks, png = bytearray(jpeg(0)), bytearray(jpeg(0, "CMYK")), io.BytesIO()
    for damaged in (photo, inks):
        for at in np.random.RandomState(0).randint(1000, len(damaged) - 100, 40):
            damaged[at] ^= 0xFF
        with Image.open(io.BytesIO(damaged), formats=FORMATS) as image:
            image.load()  # training reads it
    Image.new("RGB", (64, 64), "red").save(png, "PNG")
    flipped = bytearray(png.getvalue())
    flipped[flipped.index(b"IEND") - 5] ^= 0xFF  # the CRC of the pixels
    with Image.open(io.BytesIO(flipped), formats=FORMATS) as image:
        image.load()
    tar_of(
        tmp_path / "x.tar",
        {
            "a.jpg": jpeg(0),
            "b.jpg": photo,
            "c.png": png.getvalue(),
            "d.png": flipped,
            "e.jpg": jpeg(0, "CMYK"),
            "f.jpg": inks,
        },
    )
    assert main(["verify", f"{tmp_path}/x.tar", "--jobs", "1", "--json"]) == 1
    rejected = json.loads(capsys.readouterr().out)["rejected"]
    assert [row["key"] for row in rejected] == ["b", "d", "f"]
    assert "Corrupt JPEG data" in rejected[0]["reason"]


def test_images_of_any_number_of_bands_are_verified(tmp_path, capsys):
    files = {"a.jpg": jpeg(0)}
    for suffix, write in (("npy", np.save), ("tif", tifffile.imwrite)):
        file = io.BytesIO()
        write(file, np.random.RandomState(0).randint(0, 65535, (24, 32, 5), np.uint16))
        files |= {
            f"{suffix}.{suffix}": file.getvalue(),
            f"{suffix}cut.{suffix}": file.getvalue()[:5000],
        }
    tar_of(tmp_path / "x.tar", files)
    assert main(["verify", f"{tmp_path}/x.tar", "--jobs", "1", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [row["key"] for row in told["rejected"]] == ["npycut", "tifcut"]
    assert told["channels"] == {"3": 1, "5": 2}
    assert told["shorter_sides"] == {"24": 2, "64": 1}


def test_tars_without_anything_in_them_are_damaged_like_others(tmp_path, capsys):
    (tmp_path / "empty.tar").touch()
    tar_of(tmp_path / "end.tar", {})
    tar_of(tmp_path / "whole.tar", {"a.jpg": jpeg(0)})
    tar_of(tmp_path / "flawed.tar", {"b.jpg": jpeg(1)[:600], "c.jpg": jpeg(2)})
    assert main(["verify", f"{tmp_path}/*.tar", "--jobs", "1", "--json"]) == 1
    rejected = {
        row["shard"]: row["reason"] for row in json.loads(capsys.readouterr().out)["rejected"]
    }
    assert rejected.keys() == {"empty.tar", "end.tar", "flawed.tar"}
    assert (rejected["empty.tar"], rejected["end.tar"]) == (
        "the tar breaks off: empty file",
        "the tar holds no files",
    )
    assert main(["repair", f"{tmp_path}/*.tar", "--out", f"{tmp_path}/clean", "--jobs", "1"]) == 1
    assert (
        "left out, for nothing in them can be read: empty.tar, end.tar" in capsys.readouterr().out
    )
    assert sorted(path.name for path in (tmp_path / "clean").glob("*.tar")) == [
        "flawed.tar",
        "whole.tar",
    ]
    assert main(["verify", f"{tmp_path}/clean/*.tar", "--jobs", "1"]) == 0
    assert main(["repair", f"{tmp_path}/e*.tar", "--out", f"{tmp_path}/none", "--jobs", "1"]) == 1
    assert not list((tmp_path / "none").iterdir())


@pytest.mark.parametrize("where", ["{}/x.tar", "x.tar", "./*.tar"])
def test_verify_tells_where_the_index_disagrees(tmp_path, monkeypatch, capsys, where):
    path = tmp_path / "x.tar"
    tar_of(path, {f"{number}.jpg": jpeg(number) for number in range(5)})
    index = ShardIndex.open(str(path))
    index.save(tmp_path)
    assert main(["verify", str(path), "--jobs", "1"]) == 0
    data = bytearray(path.read_bytes())
    data[index[3].offset - 400] ^= 0xFF  # of a header
    path.write_bytes(data)
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert main(["verify", where.format(tmp_path), "--jobs", "1"]) == 1
    assert "its index names 5 samples: 2 of them were not found" in capsys.readouterr().out


def test_verify_compares_labels_and_keys_with_the_index(tmp_path, capsys):
    path = tmp_path / "x.tar"
    tar_of(path, {"a.jpg": jpeg(0), "a.cls": b"1", "b.jpg": jpeg(1), "b.cls": b"1"})
    ShardIndex.open(str(path)).save(tmp_path)
    tar_of(path, {"a.jpg": jpeg(0), "a.cls": b"2", "c.jpg": jpeg(1), "c.cls": b"1"})
    assert main(["verify", str(path), "--jobs", "1"]) == 1
    assert "x.tar: its index gives 2 samples another key or label" in capsys.readouterr().out
    assert index_command([str(path), "--jobs", "1"]) == 0
    assert main(["verify", str(path), "--jobs", "1"]) == 0
    (table,) = tmp_path.glob("index-*.bin")
    data = bytearray(table.read_bytes())
    data[3] ^= 1
    table.write_bytes(data)
    forget_table(str(table))
    assert main(["verify", str(path), "--jobs", "1"]) == 1
    assert "what it says of" in capsys.readouterr().out


def test_a_reader_of_the_report_may_go_early(tmp_path):
    tar_of(tmp_path / "x.tar", {f"{number}.jpg": b"text" for number in range(5000)})
    tool = Path(__file__).parent.parent / "tools" / "check_shards.py"
    command = [sys.executable, tool, "verify", tmp_path / "x.tar", "--jobs", "1", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        job.stdout.readline()
        job.stdout.close()
        assert job.stderr.read() == ""
    assert job.returncode == 1


def test_a_run_without_bad_samples_and_classes_of_one_size_are_told_shortly(tmp_path, capsys):
    (tmp_path / "events.jsonl").write_text("")
    assert main(["report", "--ledger", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no bad samples\n"
    tar_of(tmp_path / "x.tar", {"a.jpg": jpeg(0), "a.cls": b"6", "b.jpg": jpeg(1), "b.cls": b"7"})
    assert main(["report", f"{tmp_path}/x.tar"]) == 0
    assert "2 classes of 1 samples\n" in capsys.readouterr().out


def test_report_tells_what_the_index_says(photo_shards, capsys):
    assert main(["report", photo_shards]) == 0
    assert "report: 240 samples in 6 shards" in capsys.readouterr().out
    assert main(["report", photo_shards, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sum(told["classes"].values()) == told["samples"] == 240
    assert told["fingerprint"] == ShardIndex.open(photo_shards).fingerprint


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["verify", "none.tar"], "No such file"),
        (["repair", "none.tar"], "give --out"),
        (["verify", "x.tar", "--ledger", "."], "--ledger belongs to report"),
        (["report", "--ledger", "none"], "is not a run's events.jsonl"),
        (["report"], "no shards are named"),
    ],
)
def test_input_that_cannot_be_used_is_told(arguments, reason, capsys):
    assert main(arguments) == 2
    assert reason in capsys.readouterr().err
