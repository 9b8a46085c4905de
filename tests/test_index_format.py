"""The index on disk: what it says of members, what of it is believed, and when it is not."""

import copy
import io
import json
import logging
import os
import random
import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest

from rcmae.data import patterns
from rcmae.data.cache import Reader
from rcmae.data.index import INDEX, ShardIndex
from rcmae.data.members.reading import image_bytes
from rcmae.data.packing.indexing import refresh
from rcmae.data.tars import KINDS, ROW
from rcmae.data.transforms import BadImage
from rcmae.errors import Refused


def write(path, members, format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def samples(count, *, shift=0, name="s"):
    for number in range(count):
        yield f"{name}{number}.jpg", f"image {number}".encode()
        yield f"{name}{number}.cls", str((number + shift) % 7).encode()


@pytest.fixture
def folder(tmp_path):
    """Two shards of 6 and 3 samples, without an index."""
    write(tmp_path / "x-0.tar", samples(6))
    write(tmp_path / "x-1.tar", samples(3, name="t"))
    return tmp_path


def pattern(folder):
    return f"{folder}/x-*.tar"


def older(index, folder):
    """Write an index as versions of before did: format 1."""
    parts = []
    entries = []
    for shard in index.shards:
        keys = sum(int(size) for size in shard.rows["key_size"])
        parts.append(shard.part[: ROW.itemsize * shard.samples + keys])
        entries.append(
            {
                "name": os.path.basename(shard.path),
                "bytes": shard.size,
                "samples": shard.samples,
                "table_bytes": len(parts[-1]),
                "fingerprint": shard.fingerprint,
            }
        )
    (folder / "index-0123456789abcdef.bin").write_bytes(b"".join(parts))
    head = {
        "format": "rcmae shard index",
        "version": 1,
        "fingerprint": index.fingerprint,
        "samples": len(index),
        "table": "index-0123456789abcdef.bin",
        "bytes": sum(map(len, parts)),
        "shards": entries,
    }
    (folder / INDEX).write_text(json.dumps(head, indent=1))


def rewrite(path, *args, **options):
    """Another tar of the same size in the place of one, a moment later."""
    before = os.stat(path)
    write(path, *args, **options)
    assert os.path.getsize(path) == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


def touch(path):
    stat = os.stat(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def test_the_fingerprint_of_shards_is_the_same_in_both_formats(folder):
    built = ShardIndex.open(pattern(folder))
    older(built, folder)
    first = ShardIndex.open(pattern(folder))
    assert first.is_saved
    assert first.shards[0].digest == ""
    assert refresh(folder, [shard.path for shard in built.shards]).fingerprint == built.fingerprint
    second = ShardIndex.open(pattern(folder))
    assert second.is_saved
    assert second.shards[0].digest
    assert first.fingerprint == second.fingerprint == built.fingerprint
    assert [first[n][1:5] for n in range(9)] == [second[n][1:5] for n in range(9)]


def test_an_index_says_where_each_member_lies_and_what_it_is(tmp_path):
    content = {"jpg": b"picture", "cls": b"4", "seg.png": b"map", "json": b"{}", "txt": b"words"}
    path = write(tmp_path / "x.tar", [(f"a.{name}", data) for name, data in content.items()])
    write(tmp_path / "y.tar", samples(2))
    index = ShardIndex.open(f"{tmp_path}/*.tar")
    members = index.members(0)
    assert [member.kind for member in members] == ["image", "label", "map", "annotation"]
    assert {member.kind for member in members} == set(KINDS)
    data = (tmp_path / "x.tar").read_bytes()
    assert [data[m.offset : m.offset + m.size] for m in members] == list(content.values())[:4]
    with tarfile.open(path) as tar:
        sums = {member.name: member.chksum for member in tar}
    assert [m.checksum for m in members] == [sums[f"a.{name}"] for name in list(content)[:4]]
    index.save(tmp_path)
    saved = ShardIndex.open(f"{tmp_path}/*.tar")
    assert [saved.members(n) for n in range(3)] == [index.members(n) for n in range(3)]
    assert [member.kind for member in saved.members(2)] == ["image", "label"]


def test_an_index_of_the_first_format_is_made_anew_where_a_task_needs_more(folder, caplog):
    older(ShardIndex.open(pattern(folder)), folder)
    assert ShardIndex.open(pattern(folder), needs=["image", "label"]).is_saved
    assert not caplog.messages
    index = ShardIndex.open(pattern(folder), needs=["image", "map"])
    assert "x-0.tar: its index lacks where the image and map lie; read again" in caplog.text
    assert index.shards[0].kinds == KINDS


def test_a_newer_format_is_refused_by_name(folder):
    path = ShardIndex.open(pattern(folder)).save(folder)
    path.write_text(path.read_text().replace('"version": 2', '"version": 3'))
    with pytest.raises(Refused, match=r"index\.json: is of index format 3, this rcmae reads 1 to"):
        ShardIndex.open(pattern(folder))


BAD = [True, -5, 10**12, 10**30, "9", float("nan"), None, [], 1.5]


@pytest.mark.parametrize("name", ["bytes", "samples", "table_bytes", "others", "kinds"])
@pytest.mark.parametrize("value", BAD, ids=repr)
def test_counts_that_cannot_be_are_refused(folder, name, value):
    path = ShardIndex.open(pattern(folder)).save(folder)
    head = json.loads(path.read_text())
    head["shards"][0][name] = value
    path.write_text(json.dumps(head))
    if name in ("kinds", "bytes") and isinstance(value, int) and value == 10**12:
        return  # more kinds than are known, and a tar of a terabyte, may be
    with pytest.raises(Refused, match=r"index\.json: cannot be used"):
        ShardIndex.load(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("table", "../index-0.bin"),
        ("table", "/etc/passwd"),
        ("table", 7),
        ("bytes", -1),
        ("shards", {}),
        ("shards", [7]),
        ("version", True),
        ("version", 1.5),
    ],
)
def test_a_head_that_cannot_be_is_refused(folder, name, value):
    path = ShardIndex.open(pattern(folder)).save(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(Refused, match=r"index\.json: cannot be used"):
        ShardIndex.load(folder)


@pytest.mark.parametrize("name", ["../x-0.tar", "a/x-0.tar", "..", "", 7, "x\0.tar"])
def test_a_shard_that_leads_out_of_the_folder_is_refused(folder, name):
    path = ShardIndex.open(pattern(folder)).save(folder)
    head = json.loads(path.read_text())
    head["shards"][0]["name"] = name
    path.write_text(json.dumps(head))
    with pytest.raises(Refused, match=r"index\.json: cannot be used"):
        ShardIndex.load(folder)


def damage(folder):
    """Raise the label of the first sample in a table."""
    (table,) = folder.glob("index-*.bin")
    data = bytearray(table.read_bytes())
    data[ROW.fields["label"][1]] += 1
    table.write_bytes(data)


@pytest.mark.parametrize("save", [lambda i, f: i.save(f), older], ids=["format 2", "format 1"])
def test_a_changed_table_is_made_anew_and_said(folder, caplog, save):
    built = ShardIndex.open(pattern(folder))
    save(built, folder)
    damage(folder)
    index = ShardIndex.open(pattern(folder))
    assert index.labels.tolist() == built.labels.tolist()
    assert "x-0.tar is damaged; its headers are read again" in caplog.text
    assert "x-1.tar" not in caplog.text
    refresh(folder, [shard.path for shard in built.shards])
    assert ShardIndex.open(pattern(folder)).is_saved


def test_a_table_too_large_to_read_on_opening_is_checked_where_it_is_used(folder, monkeypatch):
    ShardIndex.open(pattern(folder)).save(folder)
    damage(folder)
    monkeypatch.setattr(patterns, "_CHECKED_AT_ONCE", 0)
    index = ShardIndex.open(pattern(folder))
    assert index[7].key == "t1"
    with pytest.raises(Refused, match=r"index-.*\.bin: what it says of .*x-0\.tar is damaged"):
        index[0]
    with pytest.raises(Refused, match="is damaged"):
        index.labels  # noqa: B018


@pytest.mark.parametrize("save", [lambda i, f: i.save(f), older], ids=["format 2", "format 1"])
def test_a_shard_that_was_written_again_is_stale_and_named_with_the_way_out(folder, save):
    save(ShardIndex.open(pattern(folder)), folder)
    rewrite(folder / "x-0.tar", samples(6, shift=1))
    if (folder / INDEX).stat().st_mtime_ns >= os.stat(folder / "x-0.tar").st_mtime_ns:
        pytest.fail("the shard is to be the newer file")
    with pytest.raises(
        Refused,
        match=r"x-0\.tar: was written after it was indexed, and 6 of its 6 samples lie at other "
        r"offsets or have other labels; run rcmae shards index .*x-0\.tar --rebuild",
    ):
        ShardIndex.open(pattern(folder))
    rewritten = refresh(folder, [f"{folder}/x-0.tar", f"{folder}/x-1.tar"])
    assert rewritten.labels.tolist()[:6] == [1, 2, 3, 4, 5, 6]
    assert ShardIndex.open(pattern(folder)).is_saved


def test_a_shard_with_another_time_alone_is_believed_once_its_headers_were_read(folder, tmp_path):
    built = ShardIndex.open(pattern(folder))
    built.save(folder)
    touch(folder / "x-1.tar")
    index = ShardIndex.open(pattern(folder))
    assert not index.is_saved  # x-1.tar was read
    assert isinstance(index.shards[0].kept.table, str)
    assert index.fingerprint == built.fingerprint
    run = tmp_path / "run"
    index.save(run)
    assert ShardIndex.open(pattern(folder), cache=run).is_saved
    copy = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert ShardIndex.open(pattern(copy)).fingerprint == built.fingerprint


def test_the_newer_of_two_indexes_is_used_and_said(folder, tmp_path_factory, caplog):
    run = tmp_path_factory.mktemp("run")
    ShardIndex.open(pattern(folder)).save(run)
    rewrite(folder / "x-0.tar", samples(6, shift=1))
    refresh(folder, [f"{folder}/x-0.tar", f"{folder}/x-1.tar"], rebuild=True)
    index = ShardIndex.open(pattern(folder), cache=run)
    assert index.labels.tolist()[:6] == [1, 2, 3, 4, 5, 6]
    (said,) = caplog.messages
    assert f"x-0.tar: the index in {run} differs from the newer one in {folder}" in said


def test_an_image_is_read_only_behind_the_header_that_was_indexed(folder):
    index = ShardIndex.open(pattern(folder))
    reader = Reader()
    assert image_bytes(reader, index[1]) == b"image 1"
    older(index, folder)
    first = ShardIndex.load(folder)
    assert image_bytes(reader, first[1]) == b"image 1"
    rewrite(folder / "x-0.tar", samples(6, name="u"))
    for one in (index[1], first[1]):
        with pytest.raises(BadImage, match=r"x-0\.tar is not the tar that was indexed.* --rebuild"):
            image_bytes(reader, one)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_every_length_and_alphabet_pass_in_both_formats(tmp_path, format):
    names = ["a", "./b", "d/e.f/g", "n" * 85, "käse", "deep/" * 12 + "n" * 60]
    if format != tarfile.USTAR_FORMAT:
        names += ["deep/" * 60 + "n" * 120, "n" * 98, "n" * 200]
    members = [(f"{name}.jpg", name.encode()) for name in names]
    write(tmp_path / "x-0.tar", members, format)
    second = ShardIndex.open(pattern(tmp_path))
    older(second, tmp_path)
    first = ShardIndex.load(tmp_path)
    assert len(first) == len(names)
    for number, name in enumerate(names):
        for index in (first, second):
            assert image_bytes(Reader(), index[number]) == name.encode()


def test_an_index_of_a_mixture_is_read_again(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    sets = [
        SimpleNamespace(shards=f"{folder}/x-{number}.tar", weight=1.0 + number)
        for number in range(2)
    ]
    built = ShardIndex.open(sets)
    built.save(run)
    again = ShardIndex.open(sets, cache=run)
    assert again.is_saved
    assert again.fingerprint == built.fingerprint


def test_what_a_table_says_lies_within_its_tar(folder):
    """Also of a table whose hashes were made for it."""
    built = ShardIndex.open(pattern(folder))
    built.save(folder)
    shard = ShardIndex.load(folder).shards[0]
    shard.check_table()
    with pytest.raises(Refused, match="is damaged"):
        type(shard)(**{**vars(shard), "size": 600}).check_table()


def test_nothing_is_said_of_an_index_that_fits(folder, caplog):
    caplog.set_level(logging.INFO)
    ShardIndex.open(pattern(folder)).save(folder)
    index = ShardIndex.open(pattern(folder))
    assert np.array_equal(index.labels, [0, 1, 2, 3, 4, 5, 0, 1, 2])
    assert not caplog.messages


ODD = (True, None, -1, 0, 10**12, 10**30, 2**63, 1.5, float("nan"), float("inf"), "", "../x", "\0")
ODD += ("a" * 70_000, "\ud800", "http://x/y.tar", "index-x.bin", [], {}, [1, "x"], {"a": 1})


def test_whatever_an_index_says_it_is_refused_or_read(folder):
    ShardIndex.open(pattern(folder)).save(folder)
    head = json.loads((folder / "index.json").read_text())
    draw = random.Random(1)
    refused = 0
    for _ in range(400):
        changed = copy.deepcopy(head)
        place = draw.choice([changed, *changed["shards"]])
        place[draw.choice([*place, "keys", "not_used", "digest"])] = draw.choice(ODD)
        (folder / "index.json").write_text(json.dumps(changed))
        try:
            index = ShardIndex.load(folder)
            _ = index.labels, index.notes, [index.members(number) for number in range(len(index))]
        except Refused:
            refused += 1
    assert 250 < refused < 400


@pytest.mark.parametrize("text", ["[" * 10**5, "9" * 5000, "1e999", "\xff", '{"a":' * 10**4])
def test_an_index_that_is_hard_to_parse_is_refused(folder, text):
    ShardIndex.open(pattern(folder)).save(folder)
    (folder / "index.json").write_text('{"format": "rcmae shard index", "version": ' + text)
    with pytest.raises(Refused, match=r"index\.json: cannot be used"):
        ShardIndex.load(folder)
