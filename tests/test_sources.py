"""Remote shards: the same stream as from disk through whatever a server does, a cache
that keeps its limit.
"""

import contextlib
import dataclasses
import email.utils
import errno
import hashlib
import io
import itertools
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import tarfile
import tempfile
import threading
import time
import urllib.parse
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import fsspec
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image
from sklearn.datasets import load_sample_images
from streams import flat_stream

from rcmae.commands.shards import index as main
from rcmae.data import sources
from rcmae.data.cache import Cache, CacheTooSmall, Reader, cache_problem, open_bytes
from rcmae.data.cache import store as cache_store
from rcmae.data.index import ShardIndex
from rcmae.data.masking import RandomMask
from rcmae.data.plan import Plan
from rcmae.data.sources import (
    Patience,
    SourceGone,
    basename,
    folder_of,
    identity,
    redacted,
)
from rcmae.data.transforms import TrainTransform
from runs import Folder, start

PATIENT = Patience(timeout_s=0.5, attempts=12, pause_s=0.01)
SHARDS, SAMPLES = 5, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five shards of twelve photographs."""
    folder = tmp_path_factory.mktemp("shards")
    photographs, noise = load_sample_images().images, np.random.RandomState(0)
    for shard in range(SHARDS):
        with tarfile.open(
            folder / f"photo-{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT
        ) as tar:
            for number in range(SAMPLES):
                top, left = noise.randint(0, 360), noise.randint(0, 540)
                file = io.BytesIO()
                Image.fromarray(photographs[number % 2][top : top + 60, left : left + 90]).save(
                    file, "JPEG"
                )
                for suffix, data in (("jpg", file.getvalue()), ("cls", str(number).encode())):
                    info = tarfile.TarInfo(f"p{shard}_{number}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


class Server:
    """Serves a folder by HTTP with ranges, and does to a request what `fault(method, path)`
    says.
    """

    def __init__(self, folder):
        self.folder, self.fault, self.requests = Path(folder), lambda method, path: None, []
        self.stalling = threading.Event()
        self.tags = False  # whether files have an ETag
        self.heeds_conditions = True
        self.dates = False  # whether files have a Last-Modified
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.answer(self)

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass  # clients that were dropped, or gave up

        self.server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request):
        name = urllib.parse.urlsplit(request.path).path.lstrip("/")
        fault = self.fault(request.command, name)
        self.requests.append((request.command, name, fault))
        path = self.folder / name
        if fault == "drop":
            request.close_connection = True
            return
        if fault in ("500", "429", "403"):
            request.send_response(int(fault))
            request.send_header("Retry-After", "0.02")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if not path.is_file():
            request.send_error(404)
            return
        body, status = path.read_bytes(), 200
        tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        date = email.utils.formatdate(path.stat().st_mtime, usegmt=True)
        conditions = []
        if self.heeds_conditions and self.tags:
            conditions.append(request.headers.get("If-Match", tag) == tag)
        if self.heeds_conditions and self.dates:
            conditions.append(request.headers.get("If-Unmodified-Since", date) == date)
        if not all(conditions):
            request.send_error(412)
            return
        whole = len(body)
        if (wanted := request.headers.get("Range")) and fault != "no ranges":
            first, last = wanted.removeprefix("bytes=").split("-")
            body, status = body[int(first) : int(last) + 1], 206
        if fault == "short":
            body = body[: len(body) // 2]
        request.send_response(status)
        if status == 206:
            request.send_header("Content-Range", f"bytes {first}-{last}/{whole}")
        if self.tags:
            request.send_header("ETag", tag)
        if self.dates:
            request.send_header("Last-Modified", date)
        request.send_header("Accept-Ranges", "bytes")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "HEAD":
            return
        if fault in ("truncate", "stall"):
            request.wfile.write(body[: len(body) // 2])
            request.wfile.flush()
            if fault == "stall":
                self.stalling.set()
                time.sleep(1.0)
            request.close_connection = True
            return
        request.wfile.write(body)

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server(folder):
    server = Server(folder)
    yield server
    server.close()


def cache_in(path, limit=10**9, patience=PATIENT):
    path.mkdir(exist_ok=True)
    return Cache(path, limit, patience)


def opened(patterns, **options):
    return ShardIndex.open(patterns, patience=PATIENT, **options)


def record(index, steps=10, world=1, first=0, **changes):
    """What stands at each position: everything that a batch tells of it, over all ranks."""
    plan = Plan(index.counts, seed=3, images=8, streams=8, window=3)
    seen = {}
    for rank in range(world):
        stream = flat_stream(
            index=index,
            plan=plan,
            transform=TrainTransform((16, 24)),
            mask=RandomMask(24, 6),
            seed=5,
            micro=2,
            rank=rank,
            world=world,
            ranks_of_node=world,
            **changes,
        )
        for _, batches in zip(range(steps), stream.steps(first), strict=False):
            for batch in batches:
                for row, position in enumerate(batch.positions.tolist()):
                    assert position not in seen
                    pixels = hashlib.sha256(batch.images[row].numpy()).hexdigest()
                    seen[position] = (
                        batch.keys[row],
                        pixels,
                        tuple(batch.ids_shuffle[row].tolist()),
                    )
        assert stream.drain_bad() == []
        stream.close()
    return seen


@pytest.fixture(scope="module")
def from_disk(folder):
    return record(ShardIndex.open(f"{folder}/*.tar"))


def faults(share, kinds=("drop", "500", "429", "truncate", "short", "stall", "no ranges"), seed=0):
    """Of requests so many go wrong, in turn each way."""
    draw, ways, lock = random.Random(seed), itertools.cycle(kinds), threading.Lock()

    def fault(method, path):
        with lock:
            return next(ways) if draw.random() < share else None

    return fault


# --------------------------------------------------------------------------------------------- HTTP


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (2, 2)])
def test_through_a_faulty_server_the_stream_is_that_from_disk(
    folder, server, from_disk, tmp_path, world, workers
):
    server.fault = faults(0.4)
    index = opened(f"{server.url}/photo-{{000000..00000{SHARDS - 1}}}.tar")
    assert index.fingerprint == ShardIndex.open(f"{folder}/*.tar").fingerprint
    got = record(index, cache=cache_in(tmp_path / "cache"), world=world, workers=workers)
    assert got == from_disk
    assert {fault for _, _, fault in server.requests} >= {"drop", "500", "429", "truncate", "short"}


def test_a_drop_costs_a_piece_not_the_shard(folder, server, monkeypatch):
    monkeypatch.setattr(sources.asking, "PIECE", 4096)
    server.fault = faults(0.3, ("drop", "truncate", "short", "no ranges"))
    name = "photo-000001.tar"
    with sources.fetched(f"{server.url}/{name}", PATIENT) as (file, copied):
        data = file.read()
    assert data == (folder / name).read_bytes()
    assert copied.sha256 == hashlib.sha256(data).hexdigest()
    failed = sum(fault is not None for method, _, fault in server.requests if method == "GET")
    asked = sum(method == "GET" for method, _, _ in server.requests)
    pieces = -(-len(data) // 4096)
    # What came is not asked for again; but the first piece of a server without versions is.
    assert asked - failed <= pieces + 1


def test_training_through_a_faulty_server_gives_the_losses_from_disk(
    tiny, uninterrupted, photo_shards, tmp_path
):
    server = Server(Path(photo_shards).parent)
    server.fault = faults(0.15, ("drop", "500", "truncate"))
    shards = f"{server.url}/{Path(photo_shards).name}"
    status = start(
        tiny, tmp_path / "run", f"data.shards={shards}", f"data.cache_dir={tmp_path / 'cache'}"
    )
    server.close()
    assert status == 0
    assert Folder(tmp_path / "run").losses() == uninterrupted.losses()
    assert any(fault for _, _, fault in server.requests)


def test_a_server_that_dies_ends_the_training_with_one_message(
    tiny, photo_shards, tmp_path, capsys
):
    server = Server(Path(photo_shards).parent)
    shards = f"{server.url}/{Path(photo_shards).name}"
    index = ShardIndex.build([f"{server.url}/photo-{shard:06d}.tar" for shard in range(6)])
    index.save(tmp_path / "index")
    fetched = set()

    def only_two(method, path):  # shards; the rest of the world is gone
        if method == "GET" and path.endswith(".tar"):
            fetched.add(path)
        return None if len(fetched) <= 2 else "drop"

    server.fault = only_two
    status = start(
        tiny,
        tmp_path / "run",
        f"data.shards={shards}",
        f"data.index={tmp_path / 'index'}",
        "data.source_attempts=2",
        f"data.cache_dir={tmp_path / 'cache'}",
    )
    server.close()
    assert status == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "unreachable after" in line]
    assert len(said) == 1
    assert "unreachable after 2 attempts" in said[0]
    assert f"{server.url}/photo-" in said[0]


def test_a_server_that_is_not_there_is_told_before_the_training(tiny, tmp_path, capsys):
    began = time.monotonic()
    status = start(
        tiny,
        tmp_path / "run",
        "data.shards=http://127.0.0.1:9/x-{0..50}.tar",
        "data.source_attempts=2",
        f"data.cache_dir={tmp_path / 'cache'}",
    )
    assert status == 2
    assert time.monotonic() - began < 15  # not 51 shards one after the other
    assert "http://127.0.0.1:9/index.json: unreachable after 2 attempts" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_missing_and_refused_shards_are_named_at_once(server):
    server.fault = lambda method, path: "403" if "3" in path else None
    with pytest.raises(ValueError, match="cannot be used") as caught:
        opened([f"{server.url}/photo-000000.tar", f"{server.url}/photo-{{000007..000009}}.tar"])
    for number in (7, 8, 9):
        assert f"{server.url}/photo-00000{number}.tar: there is no such file" in str(caught.value)
    with pytest.raises(SourceGone, match=r"photo-000003\.tar: is refused \(403"):
        sources.part(f"{server.url}/photo-000003.tar", 0, 10, PATIENT)
    # not tried again and again
    assert [fault for _, path, fault in server.requests if "3" in path].count("403") <= 2


def test_who_waits_for_a_server_is_told_why_once(caplog):
    def away():
        raise ConnectionError("no route to host")

    with pytest.raises(SourceGone, match=r"unreachable after 5 attempts .* no route to host"):
        sources.asking.persist(
            "https://user:hush@host/x.tar", Patience(attempts=5, pause_s=0.01), away
        )
    assert [record.getMessage() for record in caplog.records] == [
        "https://***@host/x.tar: no answer yet (no route to host); attempt 4 of 5 is next"
    ]


def test_a_server_that_redirects_in_a_circle_is_told_at_once():
    class TooManyRedirects(Exception):
        """aiohttp's says nothing."""

        status = 0

    asked = []

    def circle():
        asked.append(1)
        raise FileNotFoundError("x.tar") from TooManyRedirects()

    with pytest.raises(SourceGone, match=r"x\.tar\?\.\.\.: its server redirects in a circle"):
        sources.asking.persist("https://h/x.tar?sig=hush", Patience(attempts=5), circle)
    assert len(asked) == 1


def test_an_index_beside_remote_shards_saves_reading_them_and_tells_when_they_changed(
    folder, server, tmp_path
):
    copy = shutil.copytree(folder, tmp_path / "copy")
    built = ShardIndex.build(
        [f"{server.url}/photo-{shard:06d}.tar" for shard in range(SHARDS)], patience=PATIENT
    )
    assert all(
        shard.sha256
        == hashlib.sha256((folder / shard.name).with_suffix(".tar").read_bytes()).hexdigest()
        for shard in built.shards
    )
    local = ShardIndex.open(f"{copy}/*.tar")
    local.save(copy)
    server.folder = copy
    index = opened(f"{server.url}/photo-{{000000..000004}}.tar")
    assert index.fingerprint == local.fingerprint == built.fingerprint
    assert not [
        path
        for method, path, _ in server.requests[SHARDS * 2 :]
        if method == "GET" and path.endswith(".tar")
    ]
    (copy / "photo-000002.tar").write_bytes((copy / "photo-000002.tar").read_bytes() + bytes(512))
    with pytest.raises(ValueError, match=r"photo-000002\.tar: is not the file that its index"):
        opened(f"{server.url}/photo-{{000000..000004}}.tar")


def test_bytes_that_are_not_those_of_the_index_are_never_used(folder, server, tmp_path):
    index = opened(f"{server.url}/photo-000000.tar")
    server.folder = tmp_path / "changed"
    shutil.copytree(folder, server.folder)
    data = bytearray((folder / "photo-000000.tar").read_bytes())
    data[1000] ^= 1
    (server.folder / "photo-000000.tar").write_bytes(data)
    cache = cache_in(tmp_path / "cache")
    with pytest.raises(SourceGone, match=r"its bytes differ from the index \(SHA-256"):
        cache.fetch(index.shards[0])
    assert not list(cache.folder.glob("*.tar"))
    assert cache.shards() == []


@pytest.mark.parametrize("tells", ["tags", "dates", "tags, not heeded", "nothing"])
def test_an_object_that_is_replaced_while_it_is_copied_is_no_mixture(
    folder, server, monkeypatch, tmp_path, tells
):
    monkeypatch.setattr(sources.asking, "PIECE", 4096)
    server.tags = tells.startswith("tags")
    server.dates = tells == "dates"
    server.heeds_conditions = "not heeded" not in tells
    server.folder = Path(shutil.copytree(folder, tmp_path / "replaced"))
    path = server.folder / "photo-000000.tar"
    size = path.stat().st_size

    class Changing(io.BytesIO):
        def write(self, piece):
            path.write_bytes(bytes(size))
            os.utime(path, (10**9, 10**9))
            return super().write(piece)

    with pytest.raises(SourceGone, match=r"photo-000000\.tar: changed while it was copied"):
        sources.copy(f"{server.url}/photo-000000.tar", Changing(), PATIENT, size)


def test_a_shard_of_another_version_is_told_apart_by_its_tag(folder, server, tmp_path):
    server.tags = True
    server.folder = Path(shutil.copytree(folder, tmp_path / "store"))
    url = f"{server.url}/photo-000000.tar"
    index = opened(url)
    (shard,) = index.shards
    assert shard.stamp.startswith('etag "')
    plain = dataclasses.replace(shard, sha256="")
    ShardIndex([plain]).save(tmp_path / "index")
    assert opened(url, cache=tmp_path / "index").is_saved
    path = server.folder / "photo-000000.tar"
    data = bytearray(path.read_bytes())
    data[-2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"photo-000000\.tar: is not the file that its index"):
        opened(url, cache=tmp_path / "index")
    with pytest.raises(SourceGone, match=r"is not what was indexed \(etag"):
        cache_in(tmp_path / "cache").fetch(plain)
    index.save(tmp_path / "hashed")
    assert opened(url, cache=tmp_path / "hashed").is_saved  # its copy will be compared by hash


def test_a_copy_that_went_bad_is_copied_anew(folder, server, tmp_path, caplog):
    index = opened(f"{server.url}/photo-{{000000..000001}}.tar")
    expected = record(index, cache=cache_in(tmp_path / "whole"))
    cache = cache_in(tmp_path / "cache")
    for shard in index.shards:
        cache.fetch(shard)
        place = cache.place(shard)
        whole = place.read_bytes()
        place.write_bytes(whole[:3000] + bytes(len(whole) - 3000))
    server.requests.clear()
    assert record(index, cache=cache) == expected  # and no sample is a bad one
    assert "is damaged" in caplog.text
    read = [path for method, path, _ in server.requests if method == "GET"]
    assert sorted(read) == ["photo-000000.tar", "photo-000001.tar"]


@pytest.mark.parametrize("knows", ["its hash", "nothing"])
def test_a_bad_sample_of_a_good_copy_stays_one(folder, server, tmp_path, knows):
    server.folder = Path(shutil.copytree(folder, tmp_path / "store"))
    path = server.folder / "photo-000000.tar"
    index = opened(f"{server.url}/photo-000000.tar")
    sample = index[3]
    data = bytearray(path.read_bytes())
    data[sample.offset : sample.offset + 300] = bytes(300)
    path.write_bytes(data)
    index = opened(f"{server.url}/photo-000000.tar")
    if knows == "nothing":  # as after make_shards and an upload
        index = ShardIndex([dataclasses.replace(shard, sha256="") for shard in index.shards])
    cache = cache_in(tmp_path / "cache")
    server.requests.clear()
    reader = Reader(cache)
    reader.read(index.shards[0], 0, 10)
    assert not reader.renewed(index.shards[0])
    assert not reader.renewed(index.shards[0])
    assert len([1 for method, *_ in server.requests if method == "GET"]) == 1
    if knows == "nothing":  # a copy of an older version, without a note
        (note,) = cache.folder.glob("*.sha256")
        note.unlink()
        reader = Reader(cache)
        reader.read(index.shards[0], 0, 10)
        assert reader.renewed(index.shards[0])
        reader.read(index.shards[0], 0, 10)
        assert not reader.renewed(index.shards[0])


def test_a_full_disk_is_met_by_deleting_copies_and_named(folder, server, tmp_path, monkeypatch):
    index = opened(f"{server.url}/photo-{{000000..000002}}.tar")
    cache = cache_in(tmp_path / "cache")
    cache.fetch(index.shards[0])
    copy = sources.copy

    def full(*args):
        if list(cache.folder.glob("*.tar")):
            raise OSError(errno.ENOSPC, "No space left on device")
        return copy(*args)

    monkeypatch.setattr(sources, "copy", full)
    cache.fetch(index.shards[1])
    assert [path for *_, path in cache.shards()] == [cache.place(index.shards[1])]

    def always(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sources, "copy", always)
    with pytest.raises(OSError, match=r"cache .*/cache cannot hold .*photo-000002\.tar") as caught:
        cache.fetch(index.shards[2])
    assert caught.value.errno == errno.ENOSPC
    assert not list(cache.folder.iterdir()) or {".lock"} == set(os.listdir(cache.folder))


@pytest.mark.parametrize("what", ["lock", "part", "copy", "part is a link", "copy is a link"])
def test_what_lies_in_a_caches_way_is_passed_over(folder, server, tmp_path, what):
    index = opened(f"{server.url}/photo-000000.tar")
    cache = cache_in(tmp_path / "cache")
    place = cache.place(index.shards[0])
    part = place.with_name(f".{place.stem}.part")
    path = {"lock": cache.folder / ".lock", "part": part, "copy": place}[what.split()[0]]
    if "link" in what:
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.mkdir()
    whole = (folder / "photo-000000.tar").read_bytes()
    for _ in range(2):
        assert Reader(cache).read(index.shards[0], 0, 10**6) == whole
    assert not (tmp_path / "elsewhere").exists()


def as_user(user, umask, act) -> int:
    """The exit status of a process of another user."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgid(1000)
            os.setuid(user)
            os.umask(umask)
            act()
            status = 0
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("mode", [0o2777, 0o3777])  # and one where nobody deletes others' files
@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_a_cache_of_two_users_works_for_both(folder, server, tmp_path, umask, mode):
    if os.getuid():
        pytest.skip("2030-01-01: needs root, to be two users")
    index = opened(f"{server.url}/photo-{{000000..000002}}.tar")
    size = max(shard.size for shard in index.shards)
    place = Path(tempfile.mkdtemp())
    place.chmod(mode)
    cache = Cache(place, 5 * size, PATIENT)

    whole = [path.read_bytes() for path in sorted(folder.glob("*.tar"))]

    def read(numbers):
        for number in numbers:
            data = Reader(cache).read(index.shards[number], 0, 10**6)
            assert data == whole[number], number

    try:
        assert as_user(1000, umask, lambda: read((0, 1))) == 0
        for part in place.glob("*0.tar"):  # as if killed in a copy
            torn = place / f".{part.name.removesuffix('.tar')}.part"
            torn.touch()
            os.chown(torn, 1000, 1000)
            torn.chmod(0o600)
            part.unlink()
        assert as_user(1001, umask, lambda: read((0, 1, 2))) == 0
        assert as_user(1000, umask, lambda: read((2, 0, 1))) == 0
    finally:
        shutil.rmtree(place)


def test_a_cache_full_of_others_files_is_no_endless_wait(folder, server, tmp_path, monkeypatch):
    index = opened(f"{server.url}/photo-{{000000..000001}}.tar")
    cache = cache_in(tmp_path / "cache", limit=int(1.5 * max(s.size for s in index.shards)))
    cache.fetch(index.shards[0])
    monkeypatch.setattr(cache_store, "delete", lambda place: False)
    with pytest.raises(CacheTooSmall, match="of other users that cannot be deleted"):
        cache.fetch(index.shards[1])


# ------------------------------------------------------------------------------------ other clients


def test_s3_gives_the_stream_from_disk(folder, from_disk, tmp_path, monkeypatch):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        for key, value in (
            ("AWS_ENDPOINT_URL", endpoint),
            ("AWS_ACCESS_KEY_ID", "user"),
            ("AWS_SECRET_ACCESS_KEY", "hidden-key"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(key, value)
        store = boto3.client("s3")
        store.create_bucket(Bucket="photographs")
        for path in folder.glob("*.tar"):
            store.upload_file(str(path), "photographs", f"train/{path.name}")
        index = opened("s3://photographs/train/*.tar")
        assert record(index, cache=cache_in(tmp_path / "cache")) == from_disk
        with pytest.raises(
            ValueError, match=r"s3://photographs/train/none\.tar: there is no such file"
        ):
            opened("s3://photographs/train/none.tar")
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        fsspec.filesystem("s3").clear_instance_cache()
        with pytest.raises(ValueError, match="unreachable after 2 attempts") as caught:
            ShardIndex.open(
                "s3://photographs/train/photo-000000.tar", patience=Patience(2.0, 2, 0.01)
            )
        assert "hidden-key" not in str(caught.value)
    finally:
        server.stop()
        fsspec.filesystem("s3").clear_instance_cache()


def test_any_file_system_of_fsspec_will_do(folder, from_disk, tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    for path in folder.glob("*.tar"):
        memory.pipe(f"/sources/{path.name}", path.read_bytes())
    index = opened("memory://sources/photo-*.tar")
    assert record(index, cache=cache_in(tmp_path / "cache")) == from_disk
    reader = Reader()  # without a cache: a part at a time
    assert reader.read(index[3].shard, index[3].offset, 4) == b"\xff\xd8\xff\xe0"
    memory.rm("/sources", recursive=True)
    monkeypatch.setattr(memory, "store", {})
    with pytest.raises(ValueError, match="is the memory of this very process"):
        ShardIndex.open("memory://sources/photo-*.tar")
    with pytest.raises(ValueError, match=r"no client for it"):
        ShardIndex.open("nosuch://x/y.tar")
    opened_as_file = ShardIndex.open(f"file://{folder}/photo-000000.tar")
    assert opened_as_file.shards[0].path == f"{folder}/photo-000000.tar"


def test_a_command_is_a_source_as_in_webdataset(folder, from_disk, tmp_path):
    index = opened(f"pipe:cat {folder}/photo-{{000000..000004}}.tar")
    assert index[0].id == "photo-000000/p0_0"
    assert record(index, cache=cache_in(tmp_path / "cache")) == from_disk
    assert sources.part(index[3].path, index[3].offset, 2) == b"\xff\xd8"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("pipe:cat none-{0..1}.tar 2>/dev/null", "the command ended with status 1 after 0 bytes"),
        ("pipe:printf abc; sleep 5", "said nothing for 0.3 s"),
    ],
)
def test_a_command_that_fails_or_stalls_is_told_without_its_words(command, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        ShardIndex.open(command, patience=Patience(0.3, 2, 0.01))
    assert "printf abc" not in str(caught.value)
    assert "2>/dev/null" not in str(caught.value)


def test_a_command_that_gives_more_or_less_than_indexed_is_not_used(folder, tmp_path):
    copy = tmp_path / "copy.tar"
    shutil.copy(folder / "photo-000000.tar", copy)
    index = opened(f"pipe:cat {copy}")
    whole, cache = copy.read_bytes(), cache_in(tmp_path / "cache", patience=Patience(1, 2, 0.01))
    for data, reason in ((whole + b"x", "more than the"), (whole[:-1], "bytes of")):
        copy.write_bytes(data)
        with pytest.raises(SourceGone, match=reason):
            cache.fetch(index.shards[0])
    assert cache.shards() == []
    copy.write_bytes(whole)
    cache.fetch(index.shards[0])
    assert cache.place(index.shards[0]).read_bytes() == whole


# -------------------------------------------------------------------------------- names and secrets


def test_no_message_shows_a_password_or_a_query(server, caplog, capsys):
    url = f"{server.url}/photo-000099.tar?X-Amz-Signature=hush&Expires=1"
    caplog.set_level(logging.DEBUG, "rcmae")
    messages = []
    for fault in (None, "403", "500", "drop"):
        server.fault = lambda method, path, fault=fault: fault if path.endswith(".tar") else None
        with pytest.raises(ValueError, match=r"photo-000099\.tar\?\.\.\.") as caught:
            ShardIndex.open(url, patience=Patience(1, 2, 0.01))
        messages.append(str(caught.value))
    with pytest.raises(ValueError, match="holds a password") as caught:
        ShardIndex.open("https://user:hush@host/x.tar")
    messages += [str(caught.value), caplog.text, *capsys.readouterr()]
    assert not [text for text in messages if "hush" in text]
    assert (
        redacted("a https://u:hush@h/p?hush=1, b s3://bucket/key")
        == "a https://***@h/p?... b s3://bucket/key"
    )
    assert redacted("pipe:curl -H 'Auth: hush' https://h/x.tar") == "pipe:curl ... (x.tar)"


def test_queries_are_no_part_of_a_shards_name_nor_of_its_index(folder, server, tmp_path):
    one, other = (f"{server.url}/photo-000000.tar?signature={number}" for number in (1, 2))
    assert identity(one) == identity(other) == f"{server.url}/photo-000000.tar"
    index = opened(one)
    index.save(tmp_path)
    assert "signature" not in (tmp_path / "index.json").read_text()
    server.requests.clear()
    again = opened(other, cache=tmp_path)
    assert again.shards[0].path == other
    assert [method for method, path, _ in server.requests if path.endswith("000.tar")] == ["HEAD"]
    assert Cache(tmp_path, 1).place(index.shards[0]) == Cache(tmp_path, 1).place(again.shards[0])


QUERIES = "https://host/download?path=/{0}&files=x-{1}.tar"


def test_urls_that_name_their_file_in_the_query_are_told_apart(folder, server, tmp_path):
    one, other = QUERIES.format("a", 0), QUERIES.format("a", 1)
    assert identity(one) != identity(other) != identity(QUERIES.format("b", 1))
    signed = "&X-Amz-Signature=hush&Expires=9&response-content-disposition=filename%3Dy.tar"
    assert identity(one + signed) == identity(one)
    assert basename(one + signed) == "x-0.tar"
    assert redacted(other + signed) == "https://host/download?...x-1.tar"
    assert identity("https://host/get?id=17&token=hush") == "https://host/get?id=17"
    plain = "https://host/a/x-0.tar"
    assert identity(plain + "?" + signed) == plain
    # Tencent's, Akamai's, nginx's
    for signing in (
        "q-ak=K&q-sign-time=1;2&q-signature=S",
        "hdnts=exp=1~hmac=2",
        "md5=S&e=1795709810",
    ):
        assert identity(f"{plain}?{signing}") == plain
    assert identity(f"{plain}?e=3") == f"{plain}?e=3"
    assert (basename(plain), folder_of(one)) == ("x-0.tar", "https://host")

    url = f"{server.url}/photo-{{000000,000001}}.tar?path=a&files={{x-0,x-1}}.tar"
    index = opened(url)  # each of two by two names
    assert [shard.name for shard in index.shards] == ["x-0", "x-1"] * 2
    index.save(tmp_path)
    assert opened(f"{url}&signature=5", cache=tmp_path).is_saved


def test_an_index_of_before_knows_urls_without_their_queries(folder, server, tmp_path):
    opened(f"{server.url}/photo-000000.tar").save(tmp_path)
    assert opened(f"{server.url}/photo-000000.tar?download=1", cache=tmp_path).is_saved


@pytest.mark.parametrize(
    "name", ["../../etc/passwd.tar", "/etc/passwd.tar", "%2e%2e/x.tar", "x/../../y.tar", "a\nb.tar"]
)
def test_no_name_leads_out_of_the_cache(folder, tmp_path, name):
    index = ShardIndex.open(f"{folder}/photo-000000.tar")
    shard = index.shards[0].__class__(f"http://host/{name}", 1, 1, "print", b"")
    assert Cache(tmp_path, 1).place(shard).parent == tmp_path
    assert ".." not in Cache(tmp_path, 1).place(shard).name


# ---------------------------------------------------------------------------------------- the cache


def read_all(folder, limit, path, originals):
    """A process that reads every sample, in an order of its own, through the shared cache."""
    index, reader = ShardIndex.load(path), Reader(Cache(folder, limit, PATIENT))
    numbers = list(range(len(index)))
    random.Random(os.getpid()).shuffle(numbers)
    for number in numbers[::2]:
        sample = index[number]
        data = reader.read(sample.shard, sample.offset, sample.size)
        whole = (originals / f"{sample.shard.name}.tar").read_bytes()
        assert data == whole[sample.offset : sample.offset + sample.size]


def test_two_processes_share_a_cache_smaller_than_the_data(folder, server, tmp_path):
    index = opened(f"{server.url}/photo-{{000000..000004}}.tar")
    index.save(tmp_path / "index")
    largest = max(shard.size for shard in index.shards)
    limit = int(2.5 * largest)
    assert limit < sum(shard.size for shard in index.shards)
    cache = cache_in(tmp_path / "cache", limit)
    context = multiprocessing.get_context("spawn")
    readers = [
        context.Process(target=read_all, args=(cache.folder, limit, tmp_path / "index", folder))
        for _ in range(2)
    ]
    for reader in readers:
        reader.start()
    most = 0
    while any(reader.is_alive() for reader in readers):
        sizes = []
        for path in cache.folder.glob("*"):
            with contextlib.suppress(FileNotFoundError):
                sizes.append(path.stat().st_size)
        most = max(most, sum(sizes))
        time.sleep(0.005)
    assert [reader.exitcode for reader in readers] == [0, 0]  # each said why on standard error
    assert largest < most <= limit + largest
    assert sum(size for _, size, _ in cache.shards()) <= limit
    assert not list(cache.folder.glob(".*.part"))


def fetch_one(folder, path):
    Cache(Path(folder), 10**9, Patience(30, 2, 0.01)).fetch(ShardIndex.load(path).shards[0])


def test_a_process_killed_in_a_copy_leaves_nothing_that_is_read(folder, server, tmp_path):
    index = opened(f"{server.url}/photo-{{000000..000001}}.tar")
    index.save(tmp_path / "index")
    cache = cache_in(tmp_path / "cache")
    server.fault = lambda method, path: "stall" if method == "GET" else None
    server.stalling.clear()
    process = multiprocessing.get_context("spawn").Process(
        target=fetch_one, args=(cache.folder, tmp_path / "index")
    )
    process.start()
    assert server.stalling.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (left,) = cache.folder.glob(".*.part")
    assert cache.shards() == []
    server.fault = lambda method, path: None
    cache.fetch(index.shards[1])  # makes room: what was left behind goes
    assert not left.exists()
    for shard in index.shards:
        with cache.opened(shard) as file:
            assert os.pread(file, shard.size, 0) == (folder / f"{shard.name}.tar").read_bytes()


def test_the_least_recently_used_goes_first_and_a_torn_file_is_copied_again(
    folder, server, tmp_path
):
    index = opened(f"{server.url}/photo-{{000000..000003}}.tar")
    cache = cache_in(tmp_path / "cache", limit=int(3.2 * max(shard.size for shard in index.shards)))
    for number in (0, 1, 2):
        cache.fetch(index.shards[number])
        os.utime(cache.place(index.shards[number]), (number, number))
    Reader(cache).read(index.shards[0], 0, 1)
    cache.fetch(index.shards[3])
    held = {path for _, _, path in cache.shards()}
    assert held == {cache.place(index.shards[number]) for number in (0, 2, 3)}
    torn = cache.place(index.shards[2])
    torn.write_bytes(b"half")
    assert (
        Reader(cache).read(index.shards[2], 0, 100)
        == (folder / "photo-000002.tar").read_bytes()[:100]
    )


def test_a_cache_that_cannot_hold_what_is_read_at_once_is_refused_with_settings_that_fit(
    server, tmp_path
):
    index = opened(f"{server.url}/photo-{{000000..000004}}.tar")
    with pytest.raises(CacheTooSmall, match=r"raise data\.cache_gb"):
        cache_in(tmp_path / "small", limit=100).fetch(index.shards[0])

    big = [
        shard.__class__(f"s3://bucket/{n}.tar", 10**9, 8000, "p", b"")
        for n, shard in enumerate(index.shards * 40)
    ]
    index = ShardIndex(big)
    settings = {"streams": 256, "window": 4096, "nodes": 8}
    # 32 streams of a node x (a window of half a shard + a shard)
    assert open_bytes(index, **settings) == pytest.approx(32 * (4096 / 8000 + 1) * 1e9, rel=1e-6)
    assert cache_problem(index, **settings, world=64, limit=50 * 10**9) is None
    problem = cache_problem(index, **settings, world=64, limit=40 * 10**9)
    assert "data.cache_gb=40 is less than the 48.4 GB" in problem
    assert (
        "use data.cache_gb=48.4 or data.shuffle_window=1024 or data.canonical_streams=128"
        in problem
    )
    assert open_bytes(index, streams=256, window=1024, nodes=8) <= 40 * 10**9
    here = ShardIndex(
        [shard.__class__(f"/data/{n}.tar", 10**9, 8000, "p", b"") for n, shard in enumerate(big)]
    )
    assert cache_problem(here, **settings, world=64, limit=1) is None


def test_the_cache_is_refused_where_it_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data\.cache_dir=.*/file/x cannot be used"):
        Cache.of(str(tmp_path / "file" / "x"), 1.0)
    assert Cache.of(str(tmp_path / "new"), 1.5).limit == 1_500_000_000


def test_shards_are_copied_ahead_of_the_reader(folder, server, tmp_path):
    """While the first steps are read, what comes later arrives.

    Never more than the rank's part of the cache.
    """
    index = opened(f"{server.url}/photo-{{000000..000004}}.tar")
    plan = Plan(index.counts, seed=3, images=4, streams=1, window=4)
    make = partial(
        flat_stream,
        index=index,
        plan=plan,
        transform=TrainTransform((16, 16)),
        mask=RandomMask(16, 4),
        seed=0,
        micro=4,
    )
    total = sum(shard.size for shard in index.shards)
    for limit, least, most in ((2 * total, SHARDS, SHARDS), (int(0.7 * total), 2, 3)):
        cache = cache_in(tmp_path / f"cache-{limit}", limit)
        stream = make(cache=cache)
        next(stream.steps(0))
        end = time.monotonic() + 20
        while len(cache.shards()) < least and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.2)
        assert least <= len(cache.shards()) <= most
        stream.close()


def test_the_index_tool_reads_shards_from_elsewhere_once(folder, server, tmp_path, capsys):
    pattern = f"{server.url}/photo-{{000000..000004}}.tar"
    assert main([pattern, "--jobs", "1"]) == 2
    assert "give --out, the folder for its index" in capsys.readouterr().err
    assert main([pattern, "--jobs", "1", "--out", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["indexes"][0]["samples"] == SHARDS * SAMPLES
    assert main([pattern, "--jobs", "1", "--out", str(tmp_path)]) == 0
    assert "(0 read now)" in capsys.readouterr().out
    index = opened(pattern, cache=tmp_path, scan=False)
    assert all(shard.sha256 for shard in index.shards)
