"""Index: what lies where in anyone's tars.

Plan: who reads what, swept over worlds without processes.
"""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from webdataset.tariterators import group_by_keys, tar_file_iterator

from rcmae.data import tars, workers
from rcmae.data.index import INDEX, ShardIndex
from rcmae.data.patterns import expand, flat
from rcmae.data.plan import Plan
from rcmae.data.tars import NO_LABEL, scan
from runs import hear_ctrl_c

ROOT = Path(__file__).parent.parent


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    """A tar of (name, bytes) pairs."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def samples(count, shard=0):
    """`count` samples of an "image" and a label each."""
    for number in range(count):
        yield f"s{shard}_{number}.jpg", f"image {shard} {number}".encode()
        yield f"s{shard}_{number}.cls", str(number % 7).encode()


@pytest.fixture
def folder(tmp_path):
    """Three shards of 5, 3 and 4 samples."""
    for shard, count in enumerate((5, 3, 4)):
        write_tar(tmp_path / f"train-{shard:06d}.tar", samples(count, shard))
    return tmp_path


def read(sample):
    with open(sample.path, "rb") as file:
        return os.pread(file.fileno(), sample.size, sample.offset)


# ----------------------------------------------------------------------------------------- patterns


def test_patterns_expand_braces_globs_and_lists_in_order(folder):
    names = [str(folder / f"train-{shard:06d}.tar") for shard in range(3)]
    assert expand(f"{folder}/train-{{000000..000002}}.tar") == names
    assert expand(f"{folder}/*.tar") == names
    assert expand([names[2], f"{folder}/train-00000[01].tar"]) == [names[2], names[0], names[1]]
    assert expand(f"{folder}/train-00000{{2,0}}.tar") == [names[2], names[0]]


def test_every_unusable_pattern_and_shard_is_named_at_once(folder):
    (folder / "empty.tar").touch()
    patterns = [
        f"{folder}/none-*.tar",
        f"{folder}/train-{{000001..000004}}.tar",
        f"{folder}/empty.tar",
        str(folder),
        f"{folder}/train-000001.tar",
        f"{folder}/{{a",
        "nosuch://bucket/x.tar",
    ]
    with pytest.raises(ValueError, match="cannot be used") as caught:
        ShardIndex.open(patterns)
    message = str(caught.value)
    for line in (
        "none-*.tar: matches no file",
        "train-000003.tar: No such file",
        "train-000004.tar: No such file",
        "empty.tar: is empty",
        f"{folder}: is a folder",
        "train-000001.tar: is named 2 times",
        "unbalanced braces",
        "nosuch://bucket/x.tar: no client for it",
    ):
        assert line in message
    with pytest.raises(ValueError, match="no shards are named"):
        expand([])


def test_every_file_that_is_no_whole_tar_of_images_is_named_at_once(folder):
    whole = (folder / "train-000000.tar").read_bytes()
    (folder / "text.tar").write_text("not a tar\n" * 100)
    (folder / "packed.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    (folder / "zeros.tar").write_bytes(bytes(10240))
    with pytest.raises(ValueError, match="cannot be used") as caught:
        ShardIndex.open(f"{folder}/*.tar")
    for line in (
        "text.tar: is not a tar",
        "packed.tar: is compressed",
        "zeros.tar: holds no files",
    ):
        assert line in str(caught.value)

    for name in ("text", "packed", "zeros"):
        (folder / f"{name}.tar").unlink()
    for place, cut in {
        "header": 2055,
        "data": 2563,
        "between": 2048,
        "padding": 10239,
        "end": 10240,
    }.items():
        (folder / f"cut-{place}.tar").write_bytes(whole[:cut])
    write_tar(folder / "words.tar", [("a.txt", b"words")])
    with pytest.raises(ValueError, match="cannot be used") as caught:
        ShardIndex.open(f"{folder}/*.tar")
    for place in ("header", "data", "between", "padding", "end"):
        assert f"cut-{place}.tar: is not a complete tar" in str(caught.value)
    assert "words.tar: holds no image (its first members: a.txt)" in str(caught.value)


# -------------------------------------------------------------------------------------------- index


def test_each_sample_is_found_by_offset(folder):
    index = ShardIndex.open(f"{folder}/*.tar")
    assert len(index) == 12
    assert index.counts.tolist() == [5, 3, 4]
    assert [read(index[number]) for number in (0, 4, 5, 8, 11)] == [
        b"image 0 0",
        b"image 0 4",
        b"image 1 0",
        b"image 2 0",
        b"image 2 3",
    ]
    assert index[7].id == "train-000001/s1_2"
    assert index[7].label == 2
    assert index.labels.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]
    assert index.place(5) == (1, 0)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_those_of_webdataset(tmp_path, format):
    long = "deep/" * 12 + "n" * 60 if format == tarfile.USTAR_FORMAT else "deep/" * 60 + "n" * 120
    members = [
        ("a/b.c/one.jpg", b"1"),
        ("a/b.c/one.cls", b"3"),
        ("a/b.c/one.json", b"{}"),
        ("two.seg.png", b"mask"),
        ("two.PNG", b"2"),
        ("two.cls", b" 12\n"),
        ("only_text.txt", b"no image"),
        (f"{long}.jpeg", b"3"),
        ("käse.jpg", b"4"),
        ("käse.cls", b"dog"),
        ("__meta__", b"x"),
        (".hidden.jpg", b"x"),
        ("five.webp", b"5" * 1500),
    ]
    path = write_tar(tmp_path / "x.tar", members, format)
    index = ShardIndex.build([path])
    mine = [(index[number].id, read(index[number])) for number in range(len(index))]

    theirs = []
    with open(path, "rb") as file:
        for sample in group_by_keys(
            {**entry, "__url__": path} for entry in tar_file_iterator(file)
        ):
            image = next(
                (sample[suffix] for suffix in ("jpg", "jpeg", "png", "webp") if suffix in sample),
                None,
            )
            if image is not None:
                theirs.append((f"x/{sample['__key__']}", image))
    assert mine == theirs
    assert index.labels.tolist() == [3, 12, NO_LABEL, NO_LABEL, NO_LABEL]
    assert scan(path).without_image == 1
    assert scan(path).bad_labels == 1


def test_links_folders_and_sparse_files_are_not_images(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("d.jpg", tarfile.DIRTYPE),
            ("l.jpg", tarfile.SYMTYPE),
            ("h.jpg", tarfile.LNKTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../../etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("real.jpg")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"real"))
    index = ShardIndex.build([str(path)])
    assert [index[number].id for number in range(len(index))] == ["x/real"]


def test_a_saved_index_is_the_built_one_and_moves_with_its_shards(folder, tmp_path_factory):
    built = ShardIndex.open(f"{folder}/*.tar")
    built.save(folder)
    elsewhere = tmp_path_factory.mktemp("moved") / "data"
    folder.rename(elsewhere)
    loaded = ShardIndex.load(elsewhere)
    assert loaded.fingerprint == built.fingerprint
    assert [loaded[n][1:] for n in range(12)] == [built[n][1:] for n in range(12)]
    assert all(read(loaded[number]) == f"image 1 {number - 5}".encode() for number in range(5, 8))


def test_an_index_may_cover_more_than_is_asked_and_part_of_it_has_the_fingerprint_of_that_part(
    folder,
):
    patterns = [str(folder / "train-000002.tar"), str(folder / "train-000000.tar")]
    built = ShardIndex.open(patterns)
    ShardIndex.open(f"{folder}/*.tar").save(folder)
    opened = ShardIndex.open(patterns)
    assert opened.shards[0].kept.table != built.shards[0].kept.table  # this one came from the file
    assert opened.fingerprint == built.fingerprint
    assert opened[0].id == "train-000002/s2_0"
    assert opened.fingerprint != ShardIndex.open(patterns[::-1]).fingerprint


def test_the_fingerprint_tells_names_counts_and_labels_apart(tmp_path):
    def print_of(name, members):
        path = write_tar(tmp_path / name, members)
        return ShardIndex.build([path]).fingerprint

    base = print_of("a.tar", samples(3))
    assert print_of("a.tar", samples(3)) == base
    assert print_of("b.tar", samples(3)) != base
    assert print_of("a.tar", samples(4)) != base
    assert print_of("a.tar", [(n, b"6" if n == "s0_2.cls" else d) for n, d in samples(3)]) != base


def test_an_index_is_handed_to_another_process_by_the_name_of_its_table(folder):
    ShardIndex.open(f"{folder}/*.tar").save(folder)
    opened = ShardIndex.open(f"{folder}/*.tar")
    sent = pickle.dumps(opened)
    assert b"s0_3" not in sent
    received = pickle.loads(sent)
    assert received[3] == opened[3]
    assert (
        pickle.loads(pickle.dumps(ShardIndex.build([str(folder / "train-000001.tar")])))[2].id
        == "train-000001/s1_2"
    )


def test_a_cache_folder_holds_the_index_of_shards_that_lie_elsewhere(folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("run")
    built = ShardIndex.open(f"{folder}/*.tar", cache=cache)
    built.save(cache)
    opened = ShardIndex.open(f"{folder}/*.tar", cache=cache)
    assert isinstance(opened.shards[0].kept.table, str)
    assert [opened[number][1:] for number in range(12)] == [
        built[number][1:] for number in range(12)
    ]


def test_a_damaged_or_newer_index_is_refused_and_another_programs_is_left_alone(folder):
    path = ShardIndex.open(f"{folder}/*.tar").save(folder)
    good = path.read_text()
    for bad in (
        good[:-40],
        good.replace('"version": 2', '"version": true'),
        good.replace('"samples": 5', '"samples": "x"'),
    ):
        path.write_text(bad)
        with pytest.raises(ValueError, match=r"index\.json: cannot be used.*--rebuild"):
            ShardIndex.open(f"{folder}/*.tar")
    path.write_text(good)
    table = next(folder.glob("index-*.bin"))
    table.write_bytes(table.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"index\.json: cannot be used"):
        ShardIndex.open(f"{folder}/*.tar")
    path.write_text('{"shards": []}')
    index = ShardIndex.open(f"{folder}/*.tar")
    assert len(index) == 12
    with pytest.raises(ValueError, match="another program"):
        index.save(folder)


def test_a_rewritten_shard_is_refused_and_a_shortened_one_is_known(folder):
    ShardIndex.open(f"{folder}/*.tar").save(folder)
    first, second = folder / "train-000000.tar", folder / "train-000001.tar"
    first.write_bytes(first.read_bytes()[:3000])
    assert ShardIndex.open(f"{folder}/*.tar").short == (str(first),)
    second.write_bytes(second.read_bytes() * 2)
    with pytest.raises(ValueError, match=r"train-000001\.tar: is not the file that its index"):
        ShardIndex.open(f"{folder}/*.tar")


def test_shards_are_indexed_by_several_processes_alike(folder, monkeypatch):
    paths = expand(f"{folder}/*.tar")
    alone = ShardIndex.build(paths, jobs=2)  # reading a few takes less time than starting processes
    pools = []
    monkeypatch.setattr(tars.scanning, "_ALONE_S", 0)
    monkeypatch.setattr(tars.scanning, "mapped", lambda *a: pools.append(1) or workers.mapped(*a))
    assert ShardIndex.build(paths, jobs=2).fingerprint == alone.fingerprint
    assert pools == [1]


@pytest.mark.parametrize("kind", ["spawn", "forkserver"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("after_s", [0.05, 0.1])  # while the workers are being born
def test_workers_end_with_their_owner_and_leave_ctrl_c_to_it(kind, how, after_s):
    program = (
        "import time, multiprocessing, rcmae.data.workers as w; "
        f"context = w.fork_server() if {kind!r} == 'forkserver' else "
        "multiprocessing.get_context('spawn'); "
        "list(w.mapped(time.sleep, [0, 0, 60, 60], 2, context, print('started', flush=True)))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_ctrl_c,
    ) as owner:
        assert owner.stdout.readline() == "started\n"
        time.sleep(after_s)
        # as a terminal does
        os.kill(owner.pid, how) if how == signal.SIGKILL else os.killpg(owner.pid, how)
        _, said = owner.communicate(timeout=20)  # the workers have its pipes
    if how == signal.SIGINT:
        assert said.count("Traceback") == said.count("KeyboardInterrupt") == 1


def test_index_files_are_the_same_bytes_each_time(folder):
    index = ShardIndex.open(f"{folder}/*.tar")
    first = index.save(folder).read_bytes()
    assert index.save(folder).read_bytes() == first
    assert json.loads(first)["samples"] == 12
    assert sorted(path.name for path in folder.iterdir())[0].startswith("index-")
    assert len(list(folder.glob("*"))) == 3 + 2
    assert (folder / INDEX).exists()


# --------------------------------------------------------------------------------------------- plan

COUNTS = {
    "uneven": [7, 31, 1, 12, 50, 3],
    "one shard": [97],
    "one-sample shards": [1] * 40,
    "fewer shards than streams": [60, 61],
}


def plan(counts, **changes):
    return Plan(
        np.array(counts, np.int64),
        **{"seed": 1, "images": 8, "streams": 16, "window": 4, **changes},
    )


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_an_epoch_has_no_repeat_and_drops_less_than_a_batch_another_part_each_time(counts):
    total, made, dropped = sum(counts), plan(counts), []
    assert made.samples_per_epoch == total // 8 * 8
    for epoch in range(6):
        seen = made.requests(
            epoch * made.samples_per_epoch, (epoch + 1) * made.samples_per_epoch
        ).samples
        assert len(set(seen.tolist())) == made.samples_per_epoch
        assert seen.min() >= 0
        assert seen.max() < total
        dropped.append(frozenset(range(total)) - set(seen.tolist()))
    if total % 8:
        assert len(set(dropped)) > 1


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_the_order_is_the_same_for_every_world(counts):
    made = plan(counts)
    stop = 3 * made.samples_per_epoch
    whole = made.requests(0, stop)
    assert whole.positions.tolist() == list(range(stop))
    for world in (1, 2, 4, 8):
        merged = np.full(stop, -1)
        for rank in range(world):
            part = plan(counts).requests(0, stop, rank, world)
            assert (part.positions % world == rank).all()
            assert len(part.positions) == stop // world
            merged[part.positions] = part.samples
            later = plan(counts).requests(13, stop, rank, world)
            np.testing.assert_array_equal(later.positions, part.positions[part.positions >= 13])
        np.testing.assert_array_equal(merged, whole.samples)


def test_a_rank_reads_its_own_streams_only():
    made = plan([1000] * 4, images=16, streams=16, window=8)
    for rank in range(4):
        streams = made.requests(0, 4000, rank, 4).positions % made.samples_per_epoch % 16
        assert set((streams % 4).tolist()) == {rank}


@pytest.mark.parametrize("epoch_samples", [None, 50, 1000])
def test_any_position_is_reached_without_those_before_it(epoch_samples):
    counts = COUNTS["uneven"]
    whole = plan(counts, epoch_samples=epoch_samples).requests(0, 5000).samples
    jumps = np.random.RandomState(0).randint(0, 4900, 40)
    made = plan(counts, epoch_samples=epoch_samples)
    for first in jumps.tolist():
        np.testing.assert_array_equal(
            made.requests(first, first + 100).samples, whole[first : first + 100]
        )


def test_epochs_of_a_given_length_go_through_whole_passes():
    for epoch_samples in (24, 104, 333, 1000):
        made = plan(COUNTS["uneven"], epoch_samples=epoch_samples)
        assert made.samples_per_epoch == epoch_samples // 8 * 8
        epochs = 104 * 3 // made.samples_per_epoch + 1
        seen = made.requests(0, epochs * made.samples_per_epoch).samples
        times = np.bincount(seen, minlength=104)
        # passes are laid end to end: none is begun before the last is through
        assert times.max() - times.min() <= 1


def test_fewer_samples_than_streams_still_make_an_epoch():
    made = plan([5, 6], streams=256)
    assert sorted(made.requests(0, 8).positions) == list(range(8))
    assert len(set(made.requests(0, 8).samples.tolist())) == 8


def test_seeds_and_epochs_give_other_orders():
    first = plan([100]).requests(0, 96).samples
    assert not np.array_equal(first, plan([100], seed=2).requests(0, 96).samples)
    assert not np.array_equal(first, plan([100]).requests(96, 192).samples)


def test_the_order_stays_what_it_was():
    """Changing these numbers changes the data of every run that was started before."""
    made = plan(COUNTS["uneven"])
    assert made.requests(1_000_000_007, 1_000_000_015).samples.tolist() == [
        94,
        101,
        9,
        15,
        22,
        28,
        33,
        1,
    ]


# ----------------------------------------------------------------------------------------- mixtures

MIXED = [*COUNTS["uneven"], 40, 9, 300]  # sets of 104, 49 and 300 samples
WEIGHTS = ((6, 2.0), (2, 1.0), (1, 0.5))


def set_of(samples):
    return np.searchsorted([104, 153], samples, side="right")


def test_a_mixture_gives_each_set_its_part_of_every_epoch_and_no_sample_twice_in_a_pass():
    made = plan(MIXED, weights=WEIGHTS, epoch_samples=210)
    per_epoch = made.samples_per_epoch
    assert per_epoch == 208
    whole = made.requests(0, 40 * per_epoch).samples
    for epoch in range(40):
        parts = set_of(whole[epoch * per_epoch : (epoch + 1) * per_epoch])
        # 208 x 4/7, 2/7, 1/7, rounded to their sum
        assert np.bincount(parts).tolist() == [119, 59, 30]
    for number, size in enumerate((104, 49, 300)):
        times = np.bincount(whole[set_of(whole) == number])
        assert times.max() - times[times.nonzero()[0][0] :].min() <= 1, size


def test_the_sets_of_a_mixture_are_mixed_in_every_block():
    made = plan(MIXED, weights=WEIGHTS, epoch_samples=2080, window=26)
    # 130 samples: five blocks of one stream
    stream = made.requests(0, made.samples_per_epoch).samples[5::16]
    for block in stream.reshape(5, 26):
        drawn = np.bincount(set_of(block), minlength=3)
        assert np.abs(drawn - np.array([4, 2, 1]) * 26 / 7).max() <= 1.5


def test_a_mixture_is_the_same_for_every_world_and_from_any_position():
    made = plan(MIXED, weights=WEIGHTS)
    stop = 3 * made.samples_per_epoch
    whole = made.requests(0, stop).samples
    for world in (2, 4, 8):
        for rank in range(world):
            part = plan(MIXED, weights=WEIGHTS).requests(77, stop, rank, world)
            np.testing.assert_array_equal(part.samples, whole[part.positions])


def test_a_set_with_all_the_weight_is_read_as_alone_and_substitutes_stay_in_their_set():
    made = plan(MIXED, weights=WEIGHTS)
    for position in range(0, 400, 7):
        sample = int(made.requests(position, position + 1).samples[0])
        others = list(made.substitutes(position, sample))
        assert (
            sorted([*others, sample])
            == np.flatnonzero(set_of(np.arange(453)) == set_of(sample)).tolist()
        )
    one = plan(COUNTS["uneven"], weights=((6, 3.0),), epoch_samples=104)
    np.testing.assert_array_equal(
        one.requests(0, 500).samples,
        plan(COUNTS["uneven"], epoch_samples=104).requests(0, 500).samples,
    )


def test_a_set_without_a_sample_in_an_epoch_is_refused():
    with pytest.raises(ValueError, match=r"set 2 with weight 0\.0001 has no sample in an epoch"):
        plan(MIXED, weights=((6, 1.0), (2, 1.0), (1, 0.0001)))


def test_an_epoch_of_a_mixture_is_exact_up_to_its_limit():
    made = Plan(np.array([2 * 10**9, 10**9]), 0, 100_000, 1000, 4096, weights=((1, 2.0), (1, 1.0)))
    last = made.requests(made.samples_per_epoch - 100_000, made.samples_per_epoch).samples
    assert ((last >= 0) & (last < 3 * 10**9)).all()
    assert abs(np.count_nonzero(last < 2 * 10**9) - 66_667) <= 1000
    with pytest.raises(ValueError, match=r"at most 3,000,000,000 samples; set data\.epoch_samples"):
        Plan(np.array([2 * 10**9, 10**9 + 1]), 0, 8, 8, 8, weights=((1, 2.0), (1, 1.0)))


def test_an_index_of_a_mixture_knows_its_sets(folder):
    def sets(*weights):
        named = (f"{folder}/train-00000{{0,2}}.tar", f"{folder}/train-000001.tar")
        return [
            SimpleNamespace(shards=shards, weight=weight)
            for shards, weight in zip(named, weights, strict=True)
        ]

    index = ShardIndex.open(sets(1.0, 2.0))
    assert index.counts.tolist() == [5, 4, 3]
    assert index.weights == ((2, 1.0), (1, 2.0))
    assert index.fingerprint == ShardIndex.open(sets(1.0, 2.0)).fingerprint
    assert index.fingerprint != ShardIndex.open(sets(1.0, 3.0)).fingerprint
    assert flat(sets(1.0, 2.0)) == [
        f"{folder}/train-00000{{0,2}}.tar",
        f"{folder}/train-000001.tar",
    ]
    with pytest.raises(ValueError, match=r"train-000001\.tar: is named 2 times"):
        ShardIndex.open(
            [*sets(1, 1), SimpleNamespace(shards=[f"{folder}/train-000001.tar"], weight=1)]
        )


def test_substitutes_are_the_rest_of_the_shard_then_each_other_sample_once():
    made = plan(COUNTS["uneven"])
    assert made.samples_per_epoch == 104
    for position in (0, 31, 103, 104, 777):
        sample = int(made.requests(position, position + 1).samples[0])
        found = list(made.substitutes(position, sample))
        assert sorted([*found, sample]) == list(range(104))
        starts = np.cumsum([0, *COUNTS["uneven"]])
        shard = int(np.searchsorted(starts, sample, side="right")) - 1
        first, stop = starts[shard], starts[shard + 1]
        assert found[: stop - first - 1] == [*range(sample + 1, stop), *range(first, sample)]


def test_a_plan_that_cannot_work_is_refused_with_the_way_out():
    with pytest.raises(
        ValueError, match=r"batch\.images=105.*data\.epoch_samples \(at least 105\)"
    ):
        plan(COUNTS["uneven"], images=105)
    with pytest.raises(ValueError, match=r"data\.epoch_samples=4 is less"):
        plan(COUNTS["uneven"], epoch_samples=4)
    with pytest.raises(
        ValueError, match=r"(?s)batch\.images=0.*canonical_streams=0.*shuffle_window=0"
    ):
        plan(COUNTS["uneven"], images=0, streams=0, window=0)
    with pytest.raises(
        ValueError, match=r"3 ranks must divide batch\.images=8 and data\.canonical_streams=16"
    ):
        plan(COUNTS["uneven"]).requests(0, 8, 0, 3)
