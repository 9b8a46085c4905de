"""What lies in a tar is found or told: every form of headers, names, links and ends."""

import contextlib
import gzip
import io
import os
import random
import subprocess
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from rcmae.commands.shards import check, index
from rcmae.data.index import ShardIndex
from rcmae.data.tars import BrokenTar, Contents, scan
from rcmae.data.tars.headers import HARD_LINK, SYMBOLIC_LINK, Walk
from rcmae.errors import Refused
from rcmae.run.judge import members_unused
from rcmae.tasks.protocol import Data


def photo(seed: int) -> bytes:
    """A small JPEG of its own."""
    colours = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize((40, 40)).save(file, "JPEG")
    return file.getvalue()


def labelled(count: int, *, key="s{:04d}", start=0) -> list[tuple[str, bytes]]:
    """Members of labelled samples."""
    members = []
    for number in range(start, start + count):
        name = key.format(number)
        members += [(f"{name}.jpg", photo(number)), (f"{name}.cls", str(number % 4).encode())]
    return members


def write(path, members, form=tarfile.USTAR_FORMAT):
    """A tar of (name, bytes), or (name, type, target) of links."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, *rest in members:
            info = tarfile.TarInfo(name)
            if len(rest) == 2:
                info.type, info.linkname = rest
                tar.addfile(info)
                continue
            info.size = len(rest[0])
            tar.addfile(info, io.BytesIO(rest[0]))
    return path


def notes_of(path) -> dict[str, int]:
    """What is said of a tar -> how often."""
    return {note.what: note.number for note in scan(str(path)).notes}


def labels_of(path) -> list[int]:
    return ShardIndex.build([str(path)]).labels.tolist()


# ------------------------------------------------------------------------------------------ headers


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_members_are_those_of_tarfile(tmp_path, form):
    draw = random.Random(form)
    longest = 90 if form == tarfile.USTAR_FORMAT else 700
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=form, errors="surrogateescape") as tar:
        for number in range(200):
            name = f"{number}-" + "".join(draw.choices("aé. _", k=draw.randrange(longest // 2)))
            info = tarfile.TarInfo(name + draw.choice([".jpg", ".cls", "", "/x.png", "\udcff.png"]))
            kinds = [*[tarfile.REGTYPE] * 6, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE]
            info.type = draw.choice(kinds)
            info.linkname = "é" * draw.randrange(48) if info.type == tarfile.SYMTYPE else ""
            info.mtime = draw.choice([0, 1.5]) if form == tarfile.PAX_FORMAT else 0
            info.size = draw.randrange(1500) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    with tarfile.open(path, errors="surrogateescape") as tar:
        theirs = []
        for member in tar:
            offset = (member.offset_data, member.size, member.chksum)
            theirs.append((member.name, member.type, *offset, member.linkname))
    with path.open("rb") as file:
        mine = [(*header[:1], *header[1:]) for header in Walk(file.fileno())]
    assert [(name.rstrip("/"), *rest) for name, *rest in mine] == theirs


def test_files_of_every_type_and_age_are_files(tmp_path):
    data = photo(0)
    path = tmp_path / "x.tar"
    blocks = []
    for number, kind in enumerate((b"0", b"\0", b"7")):
        blocks.append(bytes(header(f"s{number}.jpg", kind, b"%011o\0" % len(data))))
        blocks.append(data + bytes(-len(data) % 512))
    blocks.append(bytes(header("folder.jpg/", b"\0")))
    signed = header("s\u00e9.jpg", b"0", b"%011o\0" % len(data))  # as some add the bytes of old
    signed[148:156] = b" " * 8
    signed[148:156] = b"%06o\0 " % sum(byte - 256 * (byte > 127) for byte in signed)
    blocks += [bytes(signed), data + bytes(-len(data) % 512)]
    path.write_bytes(b"".join(blocks) + bytes(1024))
    with tarfile.open(path) as tar:
        theirs = [member.offset_data for member in tar if member.isreg()]
    found = ShardIndex.build([str(path)])
    assert [found[number].offset for number in range(len(found))] == theirs
    assert len(theirs) == 4


@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_tars_of_gnu_tar_are_read_to_their_end(tmp_path, form):
    top = tmp_path / "in"
    (top / "deep").mkdir(parents=True)
    longest = {"v7": 60, "ustar": 90}.get(form, 150)
    for number in range(12):
        (top / "deep" / f"{'n' * longest}{number}.jpg").write_bytes(photo(number))
    (top / "b.jpg").hardlink_to(top / "deep" / f"{'n' * longest}3.jpg")
    (top / "c.jpg").symlink_to("b.jpg")
    with (top / "deep" / "hole.npy").open("wb") as file:
        for part in range(30):  # more parts than a first map has room for
            file.seek(part * 2**17)
            file.write(b"x" * 4096)
    path = tmp_path / "x.tar"
    more = [] if form in ("v7", "ustar") else ["--sparse"]
    more += ["--label=name"] if form not in ("v7", "ustar") else []
    names = sorted(os.listdir(top), reverse=True)
    subprocess.run(
        ["tar", f"--format={form}", "--sort=name", *more, "-cf", path, "-C", top, *names],
        check=True,
    )
    with tarfile.open(path) as tar:
        theirs = {
            (each.offset_data, each.size) for each in tar if each.isreg() and not each.issparse()
        }
    found = ShardIndex.build([str(path)])
    samples = [found[number] for number in range(len(found))]
    assert {(sample.offset, sample.size) for sample in samples} == theirs
    assert len(samples) == 14 + (not more)
    assert ("sparse" in notes_of(path)) == bool(more)
    content = path.read_bytes()
    link = next(sample for sample in samples if sample.key == "c")
    assert content[link.offset : link.offset + link.size] == photo(3)


def header(name="x.jpg", kind=b"0", size=b"00000000000\0", **at) -> bytearray:
    """A header with a right checksum, whatever its fields say."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT)[:512])
    block[156:157] = kind
    block[124:136] = size
    for start, data in at.items():
        block[int(start[1:]) : int(start[1:]) + len(data)] = data
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return block


def base256(value: int) -> bytes:
    return (b"\xff" if value < 0 else b"\x80") + value.to_bytes(11, "big", signed=True)


PAX_SIZE = b"13 size=-512\n"
HOSTILE = {
    "back to itself": header(size=base256(-512)),
    "back to the start": header(size=base256(-1536)),
    "beyond 64 bits": header(size=base256(2**80)),
    "octal minus": header(size=b"-0000001000\0"),
    "octal words": header(size=b"0x10_0 0o7 \0"),
    "huge": header(size=base256(2**62)),
    "long name of 2^62 bytes": header(kind=b"L", size=base256(2**62)),
    "long name of -512 bytes": header(kind=b"L", size=base256(-512)),
    "pax of -512 bytes": header(kind=b"x", size=base256(-512)),
    "pax size of -512": header(kind=b"x", size=b"00000000015\0") + PAX_SIZE.ljust(512, b"\0"),
    "pax record of 0": header(kind=b"x", size=b"00000000010\0") + b"0 a=b\n\0\0".ljust(512, b"\0"),
    "pax record too long": header(kind=b"x", size=b"00000000010\0")
    + b"999 a=b\n".ljust(512, b"\0"),
    "unknown type, back": header(kind=b"D", size=base256(-512)),
    "endless sparse map": header(kind=b"S", _482=b"\1") + (bytes(504) + b"\1" + bytes(7)) * 40,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_leads_nowhere_is_refused_with_the_tars_name(tmp_path, name):
    good = header("a.jpg", size=b"00000000144\0") + photo(0)[:100].ljust(512, b"\0")
    path = tmp_path / "train-000000.tar"
    follower = b"" if "sparse" in name else bytes(header("b.jpg")) + bytes(1024)
    path.write_bytes(bytes(good + HOSTILE[name]) + follower)
    begin = time.monotonic()
    with pytest.raises(Refused, match=r"train-000000\.tar: is not a complete tar"):
        ShardIndex.build([str(path)])
    assert time.monotonic() - begin < 2


def test_no_bytes_make_the_reader_run_on_or_fail_otherwise(tmp_path):
    draw = random.Random(5)
    members = [*labelled(3), ("s0003.jpg", tarfile.LNKTYPE, "s0000.jpg")]
    forms = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    whole = [write(tmp_path / "x.tar", members, form).read_bytes() for form in forms]
    path = tmp_path / "y.tar"
    outcomes = set()
    for _ in range(600):
        data = bytearray(draw.choice(whole))
        at = draw.randrange(0, len(data) - 512, 512)
        field, width = draw.choice(
            [(0, 100), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)]
        )
        junk = draw.choice([draw.randbytes(width), base256(-512)[:width], b"\xff" * width])
        data[at + field : at + field + width] = junk.ljust(width, b"\0")[:width]
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        path.write_bytes(data)
        told = scan(str(path))
        outcomes.add(told.shard is not None)
        assert told.shard is not None or "y.tar" in told.problem
        with path.open("rb") as file:
            seen = Contents(file.fileno()).surveyed()
            with contextlib.suppress(BrokenTar):
                assert len(list(seen)) < 20
    assert outcomes == {True, False}


def test_a_chain_of_extended_headers_is_no_recursion(tmp_path):
    links = bytes(header(kind=b"x", size=b"00000000014\0")) + b"12 a=bcdefg\n".ljust(512, b"\0")
    path = tmp_path / "x.tar"
    path.write_bytes(links * 3000 + bytes(1024))
    assert "is missing behind an extended one" in scan(str(path)).problem


def test_what_a_row_has_no_room_for_is_a_bad_sample(tmp_path):
    members = [
        ("a.jpg", photo(0)),
        ("a.cls", b"10153826047"),
        ("b.jpg", photo(1)),
        ("b.cls", b"-1"),
    ]
    members += [("k" * 70000 + ".jpg", photo(2)), ("c.jpg", photo(3)), ("c.cls", b"1_0")]
    path = write(tmp_path / "x.tar", members, tarfile.PAX_FORMAT)
    assert labels_of(path) == [-100, -100, -100]
    assert notes_of(path) == {"too_large": 1, "bad_labels": 2, "negative_labels": 1}


# ---------------------------------------------------------------------------- what is found or told


def test_joined_tars_are_read_on_and_junk_behind_the_end_is_told(tmp_path, capsys):
    a = write(tmp_path / "a.tar", labelled(12)).read_bytes()
    b = write(tmp_path / "b.tar", labelled(12, start=12)).read_bytes()
    joined = tmp_path / "joined.tar"
    joined.write_bytes(a + b)
    assert labels_of(joined) == [0, 1, 2, 3] * 6
    assert notes_of(joined) == {"behind": 24}
    joined.write_bytes(a + b"more" * 500)
    assert notes_of(joined) == {"junk": 2000}
    assert check(["verify", str(joined), "--jobs", "1"]) == 1
    assert "2,000 bytes behind the end mark are not part of the tar" in capsys.readouterr().out
    joined.write_bytes(a + bytes(10_240))  # padding
    assert not notes_of(joined)


DOTTED = {
    "plain": [(f"trip v1.{number:02d}.jpg", photo(number)) for number in range(20)],
    "labels": labelled(20, key="scan_22.{:02d}"),
    "slices": [(f"study{n // 4}.slice{n % 4}.png", photo(n)) for n in range(20)],
    "one a key": labelled(20, key="s{:04d}.v1"),
}


@pytest.mark.parametrize("name", DOTTED)
def test_names_with_dots_are_told_and_another_rule_of_keys_is_remembered(tmp_path, capsys, name):
    path = str(write(tmp_path / "x.tar", DOTTED[name]))
    assert index([path]) == 0
    assert "first dot" in capsys.readouterr().out
    assert check(["verify", path, "--jobs", "1"]) == 1
    assert "first dot" in capsys.readouterr().out
    assert check(["repair", path, "--out", str(tmp_path / "out"), "--jobs", "1"]) == 1
    assert "not written" in capsys.readouterr().out
    assert not (tmp_path / "out" / "x.tar").exists()

    assert index([path, "--keys", "last-dot"]) == 0
    found = ShardIndex.open(path)
    assert len({found[number].id for number in range(len(found))}) == 20
    assert ("labels" in name) <= (found.labels.tolist() == [0, 1, 2, 3] * 5)
    path_there = tmp_path / "x.tar"
    path_there.touch()  # another time: the headers are read again, by the same rule
    assert ShardIndex.open(path).fingerprint == found.fingerprint
    assert check(["verify", path, "--jobs", "1"]) == 0
    assert check(["repair", path, "--out", str(tmp_path / "out"), "--jobs", "1"]) == 0
    assert len(ShardIndex.load(tmp_path / "out")) == 20


def test_suffixes_with_dots_stay_welcome(tmp_path):
    members = []
    for number in range(4):
        for suffix in ("jpg", "cls", "seg.png", "depth.png", "json", "feature.npy"):
            members.append((f"s{number}.{suffix}", photo(number) if "g" in suffix else b"1"))
    assert not notes_of(write(tmp_path / "x.tar", members))


def test_links_are_the_members_that_they_lead_to(tmp_path):
    members = []
    for number in range(12):
        name = f"d/s{number:04d}"
        if number % 3:
            members.append((f"{name}.jpg", HARD_LINK, f"d/s{number - 1:04d}.jpg"))
        else:
            members.append((f"{name}.jpg", photo(number)))
        members.append((f"{name}.cls", SYMBOLIC_LINK, f"../labels/{number % 4}"))
    members += [(f"labels/{number}", str(number).encode()) for number in range(4)]
    members += [
        ("d/gone.jpg", SYMBOLIC_LINK, "/etc/passwd"),
        ("d/loop.jpg", HARD_LINK, "d/loop.jpg"),
    ]
    path = write(tmp_path / "x.tar", members)
    assert labels_of(path) == [0, 1, 2, 3] * 3
    assert notes_of(path) == {"links": 2, "unnamed": 4, "linked": 20}
    found = ShardIndex.build([str(path)])
    content = path.read_bytes()
    for number in range(12):
        sample = found[number]
        data = content[sample.offset : sample.offset + sample.size]
        assert data == photo(number - number % 3)


def test_a_link_that_has_its_bytes_once_more_is_a_file(tmp_path):
    data = photo(1)
    link = header("b.jpg", HARD_LINK, b"%011o\0" % len(data), _157=b"a.jpg\0")
    first = header("a.jpg", size=b"%011o\0" % len(photo(0)))
    path = tmp_path / "x.tar"
    blocks = [
        first,
        photo(0),
        link,
        data,
        header("c.jpg", HARD_LINK, first[124:136], _157=b"a.jpg\0"),
    ]
    path.write_bytes(b"".join(bytes(b) + bytes(-len(b) % 512) for b in blocks) + bytes(1024))
    found = ShardIndex.build([str(path)])
    assert [found[number].size for number in range(3)] == [len(photo(0)), len(data), len(photo(0))]


def test_companions_of_operating_systems_are_no_members(tmp_path):
    members = []
    for name, data in labelled(6, key="cats/s{:04d}"):
        members += [(name.replace("cats/", "cats/._"), b"\0\5\x16\7"), (name, data)]
        members += [(f"__MACOSX/{name}", b"x"), (f"@eaDir/{name}", b"x")]
    members += [("cats/.DS_Store", b"x"), ("Thumbs.db", b"x")]
    path = write(tmp_path / "x.tar", members)
    assert labels_of(path) == [0, 1, 2, 3, 0, 1]
    assert notes_of(path) == {"system": 38}


def test_members_apart_from_their_images_are_joined_to_them(tmp_path, capsys):
    members = labelled(8)
    members = [*members[1::2][:4], *members[0::2], *members[1::2][4:], ("nobody.cls", b"1")]
    path = write(tmp_path / "x.tar", members)
    assert labels_of(path) == [0, 1, 2, 3] * 2
    assert notes_of(path) == {"without_image": 1, "apart": 8}
    assert check(["verify", str(path), "--jobs", "1", "--json"]) == 1  # nobody.cls
    out = str(tmp_path / "out")
    assert check(["repair", str(path), "--out", out, "--drop", "--jobs", "1"]) == 1
    assert ShardIndex.load(out).labels.tolist() == [0, 1, 2, 3] * 2


def test_what_is_not_used_is_said_again_where_an_index_is_opened(tmp_path, caplog):
    members = [*labelled(2), ("a.jpg", photo(0)), ("a.jpg", photo(1)), ("README", b"x")]
    path = write(tmp_path / "x.tar", members)
    ShardIndex.open(str(path)).save(tmp_path)
    caplog.clear()
    ShardIndex.open(str(path)).tell_unused()
    assert "1 members have the key and suffix of the one before" in caplog.text
    assert "'x/a.jpg'" in caplog.text
    assert "1 files without a dot in their names" in caplog.text


def test_a_copy_never_loses_what_is_not_understood_without_being_asked(tmp_path, capsys):
    path = write(tmp_path / "x.tar", [*labelled(2), ("README", b"x")])
    out = tmp_path / "out"
    assert check(["repair", str(path), "--out", str(out), "--jobs", "1"]) == 1
    assert "not written" in capsys.readouterr().out
    assert not list(out.glob("*.tar"))
    assert check(["repair", str(path), "--out", str(out), "--drop", "--jobs", "1"]) == 0
    assert len(ShardIndex.load(out)) == 2


def test_compressed_tars_are_refused_by_name(tmp_path, capsys):
    whole = write(tmp_path / "x.tar", labelled(3)).read_bytes()

    (tmp_path / "x.tar").write_bytes(gzip.compress(whole))
    assert "x.tar: is compressed" in scan(str(tmp_path / "x.tar")).problem
    assert check(["verify", str(tmp_path / "x.tar"), "--jobs", "1"]) == 1
    assert "x.tar: it is compressed" in capsys.readouterr().out
    (tmp_path / "x.tar").write_bytes(whole + gzip.compress(whole))
    assert set(notes_of(tmp_path / "x.tar")) == {"junk"}


@pytest.mark.parametrize("command", ["verify", "repair"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, capsys, command):
    os.mkfifo(tmp_path / "train-000000.tar")
    words = [command, str(tmp_path / "train-*.tar"), "--jobs", "1"]
    assert check([*words, *(["--out", str(tmp_path / "out")] if command == "repair" else [])]) == 2
    assert "train-000000.tar: is a pipe, socket or device" in capsys.readouterr().err


def test_a_training_warns_of_what_it_does_not_use(tmp_path):
    write(tmp_path / "x.tar", [*labelled(2), *DOTTED["plain"]])
    data = Data(ShardIndex.open(str(tmp_path / "x.tar")), ())
    (told,) = members_unused(data)
    assert told.startswith("shards: 1 samples have several images under one key")
    assert "'x/trip v1'" in told


def test_labels_are_numbers_however_they_are_spelled_and_others_are_told(tmp_path):
    spelled = [b"3", b"3\n", b"3.0", b"\xef\xbb\xbf3\r\n", b"+3.", b" 3.000 "]
    members = []
    for number, text in enumerate(spelled):
        members += [(f"s{number}.jpg", photo(number)), (f"s{number}.cls", text)]
    path = write(tmp_path / "spelled.tar", members)
    assert ShardIndex.open(str(path)).labels.tolist() == [3] * len(spelled)
    assert notes_of(path) == {}
    members = [("a.jpg", photo(0)), ("a.label", b"1"), ("b.jpg", photo(1)), ("b.cls", b"3.5")]
    path = write(tmp_path / "others.tar", members)
    assert notes_of(path) == {"other_labels": 1, "bad_labels": 1}
