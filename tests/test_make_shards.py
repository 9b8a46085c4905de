"""Shards from an image folder: reproducible, whole or not there, labelled, indexed.

And the index of anyone's tars.
"""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from sklearn.datasets import load_sample_images

from rcmae.commands import shards as command
from rcmae.commands.shards import making
from rcmae.data.index import ShardIndex
from rcmae.data.packing import writer
from rcmae.data.packing.encoding import Encoding
from rcmae.data.transforms import decode
from runs import hear_ctrl_c

TOOLS = Path(__file__).parent.parent / "tools"


def make_shards(images, out, **options):
    stored = {name: options.pop(name) for name in Encoding._fields if name in options}
    options["images"] = Encoding(**stored)
    return writer.make_shards(images, out, writer.PackingOptions(**options))


def photograph(number, kind="JPEG"):
    top, left = 13 * number % 300, 29 * number % 500
    file = io.BytesIO()
    Image.fromarray(
        load_sample_images().images[number % 2][top : top + 80, left : left + 120]
    ).save(file, kind)
    return file.getvalue()


@pytest.fixture
def images(tmp_path):
    """A folder of 3 classes with 8, 5 and 4 images, one of them damaged, one a PNG."""
    folder = tmp_path / "images"
    for name, count in (("ant", 8), ("bee", 5), ("cat dog", 4)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"{name}.{number}.jpg").write_bytes(photograph(number))
    (folder / "ant" / "grey.PNG").write_bytes(photograph(3, "PNG"))
    (folder / "bee" / "broken.jpg").write_bytes(photograph(4)[:600])
    (folder / "bee" / "notes.txt").write_text("no image")
    return folder


def contents(folder):
    """Name -> bytes of the files of a folder; of an index without the times of its shards."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    if "index.json" in found:
        found["index.json"] = re.sub(rb'"stamp": "mtime \d+"', b"", found["index.json"])
    return found


def test_a_class_folder_becomes_labelled_indexed_shards(images, tmp_path):
    out = tmp_path / "shards"
    report = make_shards(images, out, samples=7)
    assert sorted(contents(out)) == sorted(
        [
            "train-000000.tar",
            "train-000001.tar",
            "train-000002.tar",
            "classes.txt",
            "index.json",
            *(p.name for p in out.glob("*.bin")),
        ]
    )
    assert (report.samples, report.other_files, report.classes) == (
        18,
        1,
        ["ant", "bee", "cat dog"],
    )
    assert report.such_as == ["bee/notes.txt"]
    assert (out / "classes.txt").read_text() == "ant\nbee\ncat dog\n"
    assert [Path(reject.path).name for reject in report.rejected] == ["broken.jpg"]
    index = ShardIndex.load(out)
    assert sum(index.counts) == 18
    assert index.counts.max() - index.counts.min() <= 2  # 19 in three shards, one of them left out
    names = {"ant": 0, "bee": 1, "cat dog": 2}
    for number in range(18):
        sample = index[number]
        key = sample.id.split("/", 1)[1]
        assert "." not in key
        assert sample.label == names[key.split("_")[0]]
        data = Path(sample.path).read_bytes()[sample.offset : sample.offset + sample.size]
        assert data in {path.read_bytes() for path in images.glob("*/*")}
    assert len({index[number].id for number in range(18)}) == 18
    assert np.count_nonzero(np.diff(index.labels)) > 4  # class after class there would be 2 changes


def test_the_same_images_give_the_same_bytes_with_any_number_of_processes(images, tmp_path):
    make_shards(images, tmp_path / "one", samples=7, size=64)
    moved = shutil.copytree(images, tmp_path / "moved")  # other times, other order of the folder
    make_shards(moved, tmp_path / "two", samples=7, size=64, jobs=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    with tarfile.open(tmp_path / "one" / "train-000000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (
                0,
                0,
                0,
                "",
                0o644,
            )
    assert (tmp_path / "one" / "train-000000.tar").read_bytes()[257:263] == b"ustar\0"


def test_large_images_are_made_smaller_and_small_ones_left(images, tmp_path):
    make_shards(images, tmp_path / "shards", size=64, quality=95)
    index = ShardIndex.load(tmp_path / "shards")
    for number in range(len(index)):
        sample = index[number]
        data = Path(sample.path).read_bytes()[sample.offset : sample.offset + sample.size]
        assert data.startswith(b"\xff\xd8")
        assert decode(data).shape == (64, 96, 3)
    make_shards(images, tmp_path / "shards", name="same", size=80)
    index = ShardIndex.open(str(tmp_path / "shards" / "same-*.tar"))
    sample = index[0]
    data = Path(sample.path).read_bytes()[sample.offset : sample.offset + sample.size]
    assert data in {path.read_bytes() for path in images.glob("*/*")}


def test_a_flat_folder_has_no_labels(images, tmp_path):
    report = make_shards(images / "ant", tmp_path / "shards")
    assert report.classes == []
    assert not (tmp_path / "shards" / "classes.txt").exists()
    assert set(ShardIndex.load(tmp_path / "shards").labels.tolist()) == {-100}


def test_two_sets_share_a_folder_its_index_and_its_classes(images, tmp_path):
    out = tmp_path / "shards"
    make_shards(images, out)
    shutil.rmtree(images / "bee")
    with pytest.raises(ValueError, match="names other classes; pass it as --classes"):
        make_shards(images, out, name="val")
    make_shards(images, out, name="val", classes=(out / "classes.txt").read_text().splitlines())
    index = ShardIndex.load(out)
    assert [shard.name for shard in index.shards] == ["train-000000", "val-000000"]
    assert set(ShardIndex.open(f"{out}/val-*.tar").labels.tolist()) == {0, 2}
    with pytest.raises(ValueError, match="not known classes: cat dog"):
        make_shards(images, out, name="other", classes=["ant"])


def test_shards_are_overwritten_only_on_request_and_then_all(images, tmp_path):
    out = tmp_path / "shards"
    make_shards(images, out, samples=4)
    with pytest.raises(ValueError, match=r"has 5 shards named train-\*\.tar"):
        make_shards(images, out)
    (out / ".train-000009.tar.123").write_bytes(b"left by a job that was killed")
    make_shards(images, out, overwrite=True)
    assert [path.name for path in out.glob("*.tar")] == ["train-000000.tar"]
    assert len(ShardIndex.load(out)) == 18
    assert not list(out.glob(".*"))


def test_colliding_and_long_names_get_keys_of_their_own(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in (
        "a.b.jpg",
        "a_b.jpg",
        "a_b.jpeg",
        f"{'n' * 180}.jpg",
        f"{'n' * 181}.jpg",
        "käse.jpg",
    ):
        (folder / name).write_bytes(photograph(len(name)))
    make_shards(folder, tmp_path / "shards")
    index = ShardIndex.load(tmp_path / "shards")
    keys = [index[number].id for number in range(len(index))]
    assert len(set(keys)) == 6
    assert "train-000000/käse" in keys


def test_a_folder_that_makes_no_sense_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match="is not a folder of images"):
        make_shards(tmp_path / "none", tmp_path / "shards")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        make_shards(tmp_path / "empty", tmp_path / "shards")
    (images / "top.jpg").write_bytes(photograph(0))
    with pytest.raises(ValueError, match="holds 1 image beside class folders"):
        make_shards(images, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.jpg").write_bytes(b"text")
    with pytest.raises(
        ValueError, match=r"none of the 1 images of train-000000\.tar can be read, such as .*a\.jpg"
    ):
        make_shards(broken, tmp_path / "shards")
    assert contents(tmp_path / "shards") == {}


def contents_of(out):
    """(label, bytes) of every sample, in order."""
    index = ShardIndex.load(out)
    samples = [index[number] for number in range(len(index))]
    return [
        (one.label, Path(one.path).read_bytes()[one.offset : one.offset + one.size])
        for one in samples
    ]


def test_a_list_names_images_and_classes(images, tmp_path):
    lines = [
        f"{path.relative_to(images)}\t{path.parent.name}" for path in sorted(images.glob("*/*.jpg"))
    ]
    (images / "list.tsv").write_text("path\tlabel\n" + "\n".join(lines))
    report = make_shards(images / "list.tsv", tmp_path / "shards", samples=7)
    assert (report.samples, report.classes) == (17, ["ant", "bee", "cat dog"])
    numbered = [
        f"{path.relative_to(images)},{number}"
        for number, path in enumerate(sorted(images.glob("ant/*.jpg")))
    ]
    (images / "list.csv").write_text("path,label\n" + "\n".join(numbered))
    report = make_shards(images / "list.csv", tmp_path / "numbered")
    assert report.classes == []
    assert sorted(label for label, _ in contents_of(tmp_path / "numbered")) == list(range(8))
    for text, reason in (
        ("name\nx", "needs a first line with the columns path"),
        ("path\nnone.jpg", r"names 1 file not there: none.jpg \(line 2\)"),
        ("path,label\n,1\nant/ant.1.jpg,1\n,2", "has 2 lines with an empty path: line 2, 4"),
        ("path,label\nant/ant.0.jpg,1\nant/ant.1.jpg,", "no label for 1 of 2 images"),
        ("path\nant/ant.0.jpg\nant/ant.0.jpg", "more than once, such as ant/ant.0.jpg"),
    ):
        (images / "bad.csv").write_text(text)
        with pytest.raises(ValueError, match=reason):
            make_shards(images / "bad.csv", tmp_path / "none")


def test_parquet_with_image_bytes_becomes_shards(images, tmp_path):
    import pyarrow
    from pyarrow import parquet

    files = [path.read_bytes() for path in sorted(images.glob("ant/*"))]
    rows = {"image": [{"bytes": data, "path": None} for data in files], "label": list(range(9))}
    parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    parquet.write_table(
        pyarrow.table({"image": files[:3], "label": [0, 1, 2]}), tmp_path / "b.parquet"
    )
    report = make_shards(
        [tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path / "shards", samples=5
    )
    assert (report.samples, len(report.shards)) == (12, 3)
    assert sorted(contents_of(tmp_path / "shards")) == sorted(
        [*enumerate(files), *enumerate(files[:3])]
    )
    with tarfile.open(report.shards[0]) as tar:
        assert {name.rpartition(".")[2] for name in tar.getnames()} <= {"jpg", "png", "cls"}
    assert not list((tmp_path / "shards").glob(".*"))
    parquet.write_table(pyarrow.table({"picture": files[:1]}), tmp_path / "c.parquet")
    with pytest.raises(
        ValueError, match=r"c\.parquet cannot be used \(no column image; it has picture\)"
    ):
        make_shards(tmp_path / "c.parquet", tmp_path / "none")


def test_tars_are_merged_laid_out_anew_and_filtered_by_size(images, tmp_path):
    make_shards(images, tmp_path / "one", samples=5)
    make_shards(images, tmp_path / "two", name="small", samples=9, size=40)
    patterns = [f"{tmp_path}/one/*.tar", f"{tmp_path}/two/*.tar"]
    report = make_shards(patterns, tmp_path / "merged", samples=12, min_size=50)
    assert len(report.shards) == 3
    assert report.samples == 18
    assert len(report.rejected) == 18
    assert report.rejected[0].path.startswith("small-00000")
    assert "its shorter side has 40 pixels, --min-size=50" in report.rejected[0].reason
    assert sorted(contents_of(tmp_path / "merged")) == sorted(contents_of(tmp_path / "one"))
    report = make_shards(patterns, tmp_path / "all", samples=12)
    assert report.samples == 36
    both = contents_of(tmp_path / "one") + contents_of(tmp_path / "two")
    assert sorted(contents_of(tmp_path / "all")) == sorted(both)
    assert report.classes == ["ant", "bee", "cat dog"]
    assert (tmp_path / "all" / "classes.txt").read_text() == "ant\nbee\ncat dog\n"
    (tmp_path / "one" / "classes.txt").write_text("bee\nant\ncat dog\n")
    report = make_shards(patterns, tmp_path / "unlike")
    assert report.classes == []
    assert report.notes[0].startswith("labels up to 2, without names: the tars are of other")
    (tmp_path / "one" / "classes.txt").unlink()
    (tmp_path / "two" / "classes.txt").unlink()
    report = make_shards(patterns, tmp_path / "nameless")
    assert "the tars have no classes.txt beside them" in report.notes[0]
    with pytest.raises(ValueError, match="several inputs are"):
        make_shards([images, f"{tmp_path}/one/*.tar"], tmp_path / "none")


def test_a_job_that_was_killed_goes_on_and_gives_the_same_bytes(images, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    make_shards(images, whole, samples=4, size=64)
    written = []

    def killed(task, **options):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(task[0])
        return writer.Written(*write(task, **options))

    write = writer.write_shard
    monkeypatch.setattr(writer, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        make_shards(images, out, samples=4, size=64)
    monkeypatch.undo()
    assert not (out / "index.json").exists()
    with pytest.raises(
        ValueError,
        match=r"has 2 shards .* an unfinished job, --size=64 instead of --size=32; that job",
    ):
        make_shards(images, out, samples=4, size=32)
    with pytest.raises(
        ValueError,
        match=r"an unfinished job, with other images, with other classes, --size=64 instead",
    ):
        make_shards(images / "ant", out, samples=4)
    before = {path: os.stat(path).st_mtime_ns for path in written}
    report = make_shards(images, out, samples=4, size=64)
    assert report.kept == 2
    assert {path: os.stat(path).st_mtime_ns for path in written} == before
    assert contents(out) == contents(whole)
    # also of the shards that were kept
    assert [Path(one.path).name for one in report.rejected] == ["broken.jpg"]


@pytest.mark.parametrize("suffix", ["npy", "tif"])
@pytest.mark.parametrize("bands", [2, 4, 5])
def test_images_of_any_number_of_bands_are_packed_and_made_smaller(tmp_path, suffix, bands):
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for number in range(4):
        kind = np.uint16 if number % 2 else np.uint8
        values = rng.integers(0, np.iinfo(kind).max, (48, 60, bands), kind)
        path = folder / f"{number}.{suffix}"
        np.save(path, values) if suffix == "npy" else tifffile.imwrite(
            path, values, planarconfig="contig"
        )
    report = make_shards(folder, tmp_path / "shards")
    assert (report.samples, report.rejected) == (4, [])
    assert sorted(data for _, data in contents_of(tmp_path / "shards")) == sorted(
        contents(folder).values()
    )
    make_shards(f"{tmp_path}/shards/*.tar", tmp_path / "again", samples=2)
    assert sorted(contents_of(tmp_path / "again")) == sorted(contents_of(tmp_path / "shards"))
    make_shards(folder, tmp_path / "small", size=24)
    assert {decode(data, bands).shape for _, data in contents_of(tmp_path / "small")} == {
        (24, 30, bands)
    }
    with tarfile.open(tmp_path / "small" / "train-000000.tar") as tar:
        assert {name.rpartition(".")[2] for name in tar.getnames()} == {suffix}


@pytest.fixture
def many(tmp_path):
    """A folder with more images than are packed in a moment."""
    folder = tmp_path / "many"
    folder.mkdir()
    Image.fromarray(np.tile(load_sample_images().images[0], (3, 3, 1))).save(folder / "0.jpg")
    for number in range(1, 2000):
        os.link(folder / "0.jpg", folder / f"{number}.jpg")
    return folder


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_job_that_is_killed_or_stopped_leaves_no_process_behind(many, tmp_path, how):
    out = tmp_path / "out"
    command = [
        sys.executable,
        TOOLS / "make_shards.py",
        many,
        out,
        "--samples",
        "4",
        "--size",
        "64",
        "--jobs",
        "2",
    ]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_ctrl_c,
    ) as job:
        until = time.monotonic() + 60
        while not list(out.glob("*.tar")):
            assert time.monotonic() < until
            assert job.poll() is None
            time.sleep(0.05)
        if how == signal.SIGINT:
            os.killpg(job.pid, how)  # as a terminal does
        else:
            job.kill()
        _, said = job.communicate(timeout=20)  # it would wait for workers: they have the pipe
    if how == signal.SIGINT:
        assert job.returncode == 130
        assert said == "stopped; run the same command again to resume\n"
    count = len(list(out.glob("*.tar")))
    assert count < 500
    time.sleep(0.5)
    assert len(list(out.glob("*.tar"))) == count


def test_the_commands_tell_what_they_made(images, tmp_path, capsys):
    out = tmp_path / "shards"
    done = subprocess.run(
        [sys.executable, TOOLS / "make_shards.py", images, out, "--samples", "7", "--jobs", "1"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert "18 images of 3 classes in 3 shards" in done.stdout
    assert "left out:" in done.stdout
    assert "1 other file was not looked at: bee/notes.txt" in done.stdout
    assert done.stderr == ""
    assert command.make([str(images), str(out)]) == 2
    assert "rcmae: " in capsys.readouterr().err
    assert command.make([str(images), str(out), "--overwrite", "--jobs", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 18


# ------------------------------------------------------------------------------------- index_shards


def test_anyones_tars_get_an_index_that_training_finds(images, tmp_path, capsys):
    folder = tmp_path / "theirs"
    folder.mkdir()
    for shard in range(3):
        with tarfile.open(folder / f"x-{shard}.tar", "w") as tar:
            for number in range(4):
                for suffix, data in (
                    ("jpg", photograph(number)),
                    ("cls", b"cat" if number == 0 else b"1"),
                ):
                    info = tarfile.TarInfo(f"k{shard}{number}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    built = ShardIndex.open(f"{folder}/x-*.tar")
    assert command.index([f"{folder}/x-{{0..1}}.tar", "--jobs", "1"]) == 0
    told = capsys.readouterr().out
    assert "8 samples in 2 shards (2 read now)" in told
    assert "2 samples have no label" in told
    assert "2 samples have a .cls that is not a class number" in told

    assert command.index([f"{folder}/x-*.tar", "--jobs", "2", "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)["indexes"]
    assert (facts["read"], facts["shards"], facts["samples"]) == (1, 3, 12)
    assert facts["fingerprint"] == built.fingerprint
    opened = ShardIndex.open(f"{folder}/x-*.tar")
    assert isinstance(opened.shards[0].kept.table, str)
    np.testing.assert_array_equal(opened.labels, built.labels)

    # A shard that was rewritten is read again on request, and one that is gone is forgotten.
    with tarfile.open(folder / "x-0.tar", "a") as tar:
        info = tarfile.TarInfo("more.jpg")
        info.size = len(photograph(9))
        tar.addfile(info, io.BytesIO(photograph(9)))
    os.truncate(folder / "x-0.tar", max(os.path.getsize(folder / "x-0.tar"), 30720))
    os.unlink(folder / "x-2.tar")
    assert command.index([f"{folder}/x-*.tar", "--rebuild", "--jobs", "1"]) == 0
    assert "9 samples in 2 shards (2 read now)" in capsys.readouterr().out
    assert ShardIndex.open(f"{folder}/x-*.tar")[4].id == "x-0/more"


def test_an_unusable_shard_leaves_the_index_as_it_was(images, tmp_path, capsys):
    out = tmp_path / "shards"
    make_shards(images, out, samples=7)
    before = contents(out)
    (out / "bad.tar").write_bytes((out / "train-000000.tar").read_bytes()[:5000])
    assert command.index([f"{out}/*.tar", "--jobs", "1"]) == 2
    assert "bad.tar: is not a complete tar" in capsys.readouterr().err
    (out / "bad.tar").unlink()
    assert contents(out) == before
    (out / "index.json").write_text((out / "index.json").read_text()[:-50])
    assert command.index([f"{out}/*.tar", "--jobs", "1"]) == 2
    assert "--rebuild" in capsys.readouterr().err
    assert command.index([f"{out}/*.tar", "--jobs", "1", "--rebuild"]) == 0
    assert contents(out) == before


def test_a_part_of_one_folder_is_held_out(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    for number in range(40):
        picture = photos / "ab"[number % 2] / f"{number}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(picture)
    words = [str(photos), str(out), "--hold-out", "0.25", "--jobs", "1"]
    assert making.make(words) == 0

    def names(folder: Path, kind: str) -> set[str]:
        found = ShardIndex.open([f"{folder}/{kind}-*.tar"])
        return {found[number].id.partition("/")[2] for number in range(len(found))}

    train, held = names(out, "train"), names(out, "val")
    assert len(train) + len(held) == 40
    assert not train & held
    assert 3 <= len(held) <= 18
    assert (out / "classes.txt").read_text() == "a\nb\n"
    (photos / "a" / "0.png").unlink()  # others stay on their side
    assert making.make([str(photos), str(tmp_path / "less"), *words[2:]]) == 0
    assert names(tmp_path / "less", "val") == held - {"a_0"}
    assert making.make(words) == 2, "both names are taken"
    assert making.make([*words, "--name", "val", "--overwrite"]) == 2
    with pytest.raises(SystemExit):
        making.make([*words[:2], "--hold-out", "1.5"])


def test_photographs_of_a_phone_are_named_with_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "IMG_1.HEIC").write_bytes(b"ftypheic")
    assert making.make([str(photos), str(tmp_path / "out")]) == 2
    assert "1 photograph in HEIC is not read" in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save(photos / "a.png")
    assert making.make([str(photos), str(tmp_path / "out"), "--jobs", "1"]) == 0
    told = capsys.readouterr().out
    assert "1 photograph in HEIC is not read" in told
    assert "1 image of no classes in 1 shard," in told
    assert "1 other file was not looked at" in told
