"""The batches of a run are the same on any ranks and workers; bad samples are replaced.

Workers come and go cleanly.
"""

import contextlib
import hashlib
import io
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from streams import flat_stream

from rcmae.data.index import ShardIndex
from rcmae.data.masking import RandomMask
from rcmae.data.plan import Plan
from rcmae.data.stream import BadLimits, Limits, Readers, labelled_batches
from rcmae.data.transforms import CentreTransform, TrainTransform, View
from rcmae.data.views import TooManyBadSamples
from rcmae.tasks.protocol import Evaluating
from runs import Folder, python_path, start

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"
)  # more workers than this machine has cores

COUNTS = (11, 20, 6)
REPOSITORY = Path(__file__).parent.parent
REAL = REPOSITORY.parent / "shared" / "data" / "imagenet-sample"


def write_shards(folder, counts=COUNTS, labels=True):
    """Shards of small photographs: pieces of scikit-learn's two."""
    photographs, noise = load_sample_images().images, np.random.RandomState(0)
    for shard, count in enumerate(counts):
        with tarfile.open(
            folder / f"photo-{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT
        ) as tar:
            for number in range(count):
                top, left = noise.randint(0, 360), noise.randint(0, 540)
                height, width = noise.randint(30, 64), noise.randint(30, 90)
                file = io.BytesIO()
                piece = photographs[number % 2][top : top + height, left : left + width]
                Image.fromarray(piece).save(file, "PNG" if number % 5 == 0 else "JPEG")
                members = {("png" if number % 5 == 0 else "jpg"): file.getvalue()}
                if labels:
                    members["cls"] = str((shard + number) % 10).encode()
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"p{shard}_{number}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return f"{folder}/photo-*.tar"


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return ShardIndex.open(write_shards(tmp_path_factory.mktemp("photographs")))


def stream_of(index, *, images=8, **changes):
    plan = Plan(index.counts, seed=3, images=images, streams=8, window=3)
    settings = {
        "transform": TrainTransform((16, 24)),
        "mask": RandomMask(24, 6),
        "seed": 5,
        "micro": 2,
    }
    return flat_stream(index=index, plan=plan, **{**settings, **changes})


def record(index, first_step, steps, *, world=1, killed_in=0, **changes):
    """What stands at each position: everything that a batch tells of it, over all ranks.

    With `killed_in`, ranks of at least as many have seen one step more than the others, and are
    dropped there."""
    seen = {}
    for rank in range(world):
        stream = stream_of(index, rank=rank, world=world, **changes)
        running = stream.steps(first_step)
        for _ in range(steps + (0 < killed_in <= rank)):
            for batch in next(running):
                for row, position in enumerate(batch.positions.tolist()):
                    assert position not in seen
                    seen[position] = (
                        batch.keys[row],
                        int(batch.labels[row]),
                        tuple(batch.crops[row].tolist()),
                        tuple(batch.ids_shuffle[row].tolist()),
                        hashlib.sha256(batch.images[row].numpy()).hexdigest(),
                    )
        stream.close()
    return seen


# ---------------------------------------------------------------------------------------- one order


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ids_crops_masks_and_pixels_are_the_same_on_any_ranks_and_workers(index, world, workers):
    expected = record(index, 0, 10)  # an epoch has 4 steps: over its end twice
    assert sorted(expected) == list(range(80))
    assert record(index, 0, 10, world=world, workers=workers) == expected


def test_fifty_random_schedules_of_kills_and_resumes_give_one_stream(index):
    """1, 2, 4 or 8 ranks with 0, 2 or 5 workers.

    Killed at any micro-batch, back to any step since, over epoch ends.
    """
    last, draw, met = 14, np.random.RandomState(7), set()
    expected = record(index, 0, last + 1)
    assert len(index) // 8 == 4  # steps of an epoch: the schedules go over three ends
    for _ in range(50):
        step = 0
        while step < last:
            world, workers = int(draw.choice([1, 2, 4, 8])), int(draw.choice([0, 2, 5]))
            workers = 0 if (world, workers) in met else workers  # processes take most of the time
            reached = min(last, step + draw.randint(1, 8))
            got = record(
                index,
                step,
                reached - step,
                world=world,
                workers=workers,
                micro=1,
                killed_in=draw.randint(4),
            )
            assert got == {position: expected[position] for position in got}
            assert set(range(8 * step, 8 * reached)) <= got.keys()
            met.add((world, workers))
            step = draw.randint(step, reached) + 1  # of the last checkpoint
    assert len(met) == 12


@pytest.mark.parametrize(("micro", "workers"), [(8, 0), (4, 1), (1, 2)])
def test_the_size_of_a_micro_batch_changes_nothing(index, micro, workers):
    assert record(index, 2, 3, micro=micro, workers=workers) == record(index, 2, 3)


def test_a_stream_goes_on_from_any_step_on_another_number_of_ranks(index):
    whole = record(index, 0, 12)
    went = {}
    for first, steps, world in ((0, 3, 2), (3, 1, 4), (4, 5, 1), (9, 3, 2)):
        went |= record(index, first, steps, world=world)
    assert went == whole


def test_one_stream_can_be_asked_again_from_another_step(index):
    stream = stream_of(index, workers=2, micro=8)
    first = next(stream.steps(0))[0].keys
    fifth = next(stream.steps(5))[0].keys
    steps = stream.steps(0)
    assert next(steps)[0].keys == first
    assert [next(steps)[0].keys for _ in range(5)][-1] == fifth
    stream.close()


def test_a_batch_is_what_the_plan_the_index_and_the_transform_say(index):
    stream = stream_of(index)
    requests = Plan(index.counts, seed=3, images=8, streams=8, window=3).requests(8, 16)
    batches = next(stream.steps(1))
    assert [len(batch) for batch in batches] == [2, 2, 2, 2]
    for batch, positions, samples in zip(
        batches, requests.positions.reshape(4, 2), requests.samples.reshape(4, 2), strict=True
    ):
        assert batch.images.shape == (2, 3, 16, 24)
        assert batch.images.dtype == torch.uint8
        assert batch.num_visible == 6
        assert batch.positions.tolist() == positions.tolist()
        for row in range(2):
            sample = index[int(samples[row])]
            assert (batch.keys[row], int(batch.labels[row])) == (sample.id, sample.label)
            data = Path(sample.path).read_bytes()[sample.offset : sample.offset + sample.size]
            view = TrainTransform((16, 24))(data, 5, int(positions[row]))
            assert torch.equal(batch.images[row], view.image)
            assert tuple(batch.crops[row].tolist()) == view.crop
            assert (
                batch.ids_shuffle[row].tolist()
                == RandomMask(24, 6).ids(5, int(positions[row])).tolist()
            )


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (4, 2)])
def test_repeats_give_several_views_of_each_sample_each_with_its_own_key(index, world, workers):
    plan = Plan(index.counts, seed=3, images=4, streams=8, window=3)
    order = plan.requests(0, 24).samples
    seen = {}
    for rank in range(world):
        stream = flat_stream(
            index=index,
            plan=plan,
            transform=TrainTransform((16, 24)),
            mask=RandomMask(24, 6),
            seed=5,
            micro=2,
            repeats=2,
            rank=rank,
            world=world,
            workers=workers,
        )
        for _, batches in zip(range(6), stream.steps(0), strict=False):
            assert sum(map(len, batches)) == 8 // world
            for batch in batches:
                for row, position in enumerate(batch.positions.tolist()):
                    seen[position] = (
                        batch.keys[row],
                        tuple(batch.crops[row].tolist()),
                        batch.ids_shuffle[row].tolist(),
                    )
        stream.close()
    assert sorted(seen) == list(range(48))
    for position, (key, crop, ids) in seen.items():
        sample = index[int(order[position // 2])]
        data = Path(sample.path).read_bytes()[sample.offset : sample.offset + sample.size]
        assert key == sample.id
        assert crop == TrainTransform((16, 24))(data, 5, position).crop
        assert ids == RandomMask(24, 6).ids(5, position).tolist()
    with pytest.raises(ValueError, match=r"or that not of data\.repeats=2"):
        stream_of(index, micro=1, repeats=2)


def test_the_first_images_are_those_of_the_first_positions_on_every_rank(index):
    expected = record(index, 0, 1)
    for rank in (0, 1):
        batch = stream_of(index, rank=rank, world=2).first_images(3)
        assert batch.positions.tolist() == [0, 1, 2]
        assert list(batch.keys) == [expected[position][0] for position in range(3)]


def test_reading_leaves_the_generators_of_the_run_alone(index):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    record(index, 0, 2, workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_and_micro_batches_that_do_not_divide_are_refused(index):
    with pytest.raises(ValueError, match=r"3 ranks must divide batch\.images=8"):
        stream_of(index, world=3)
    with pytest.raises(
        ValueError, match=r"4 images a step and rank \(batch\.images=8\) are not a multiple of 3"
    ):
        stream_of(index, world=2, micro=3)


def test_only_what_the_model_needs_moves_to_the_device(index):
    batch = next(stream_of(index).steps(0))[0].to("meta")
    assert {batch.images.device.type, batch.ids_shuffle.device.type, batch.labels.device.type} == {
        "meta"
    }
    assert batch.positions.device.type == "cpu"


# -------------------------------------------------------------------------------------- bad samples


@pytest.fixture
def damaged(tmp_path):
    """Indexed shards of which some samples were damaged afterwards: (index, numbers of the bad
    samples).
    """
    pattern = write_shards(tmp_path)
    index = ShardIndex.open(pattern)
    index.save(tmp_path)
    index = ShardIndex.open(pattern)
    bad = {2, 3, 10}
    for number in bad:
        sample = index[number]
        with open(sample.path, "r+b") as file:
            file.seek(sample.offset)
            file.write((b"text in place of a photograph. " * 500)[: sample.size])
    last = index[30]  # the second shard is cut from its last sample on
    os.truncate(last.path, last.offset + 5)
    return index, bad | {30}


def test_bad_samples_are_replaced_by_the_next_of_their_shard_and_the_others_stay(damaged, index):
    bad_index, bad = damaged
    loose = {"max_bad_fraction": 0.5}
    good, got = record(index, 0, 16), record(bad_index, 0, 16, **loose)
    names = {index[number].id: number for number in range(len(index))}
    changed = {position for position in good if good[position] != got[position]}
    assert changed == {position for position in good if names[good[position][0]] in bad}
    # 10 and 30 are the last of their shards: round to the first
    successor = {2: 4, 3: 4, 10: 0, 30: 11}
    for position in changed:
        assert names[got[position][0]] == successor[names[good[position][0]]]
        assert got[position][3] == good[position][3]  # the mask is the position's own
    for world, workers in ((2, 0), (4, 2)):
        assert record(bad_index, 0, 16, world=world, workers=workers, **loose) == got


@pytest.mark.parametrize("workers", [0, 2])
def test_the_ledger_names_each_bad_sample(damaged, workers):
    index, bad = damaged
    stream = stream_of(index, max_bad_fraction=0.5, workers=workers)
    expected = record(index, 0, 8, max_bad_fraction=0.5)
    steps = stream.steps(0)
    ledger = []
    for _ in range(8):
        next(steps)
        ledger += stream.drain_bad()
    stream.close()
    assert stream.drain_bad() == []
    named = {(entry.shard, entry.key, entry.offset) for entry in ledger}
    assert named <= {(*index[number].id.split("/"), index[number].offset) for number in bad}
    assert len(named) >= 3  # in two epochs of 32 of the 37 samples
    for entry in ledger:
        assert entry.replaced_by == expected[entry.position][0]
        assert entry.reason.startswith(
            "only 5 of its" if entry.shard == "photo-000001" else "no image of a format"
        )


@pytest.mark.parametrize("workers", [0, 1])
def test_by_default_so_many_bad_samples_stop_the_run_with_the_list(damaged, workers):
    stream = stream_of(damaged[0], workers=workers)
    with pytest.raises(
        TooManyBadSamples,
        match=r"(?s)max_bad_fraction=0\.001:\n  photo-00000\d/p\d_\d+ at byte \d+",
    ):
        for _ in zip(range(8), stream.steps(0), strict=False):
            pass
    stream.close()


def test_a_dead_source_stops_the_run(tmp_path):
    index = ShardIndex.open(write_shards(tmp_path, (30, 30)))
    for shard in index.shards:
        size = os.path.getsize(shard.path)
        Path(shard.path).write_bytes(bytes(size))
    with pytest.raises(
        TooManyBadSamples,
        match=r"^nothing can be read in place of photo-00000\d/p\d_\d+.*max_bad_in_a_row=7",
    ):
        next(stream_of(index, max_bad_fraction=1.0, max_bad_in_a_row=7).steps(0))


def bomb():
    """A small PNG that says it is 30,000 pixels square."""
    chunks = [
        b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0),
        b"IDAT" + zlib.compress(bytes(10_000)),
    ]
    parts = [
        struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each))
        for each in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture(scope="module", params=[0, 1])
def hit_at_random(request, tmp_path_factory):
    """Six shards of 100 photographs, and the same with damage at random: (clean index, damaged
    pattern, names of bad).

    A hundredth of the samples, each in another way; and of one shard the end is missing, from a
    random place on."""
    clean, hit = tmp_path_factory.mktemp("clean"), tmp_path_factory.mktemp("hit")
    index = ShardIndex.open(write_shards(clean, (100,) * 6))
    draw = np.random.default_rng(request.param)
    ways = [
        lambda data: b"",
        lambda data: b"text in place of a photograph",
        lambda data: data[: len(data) // 3],
        lambda data: bomb(),
        lambda data: bytes(len(data)),
        lambda data: data[:2] + data[30:][::-1],
    ]
    damage = dict(zip(draw.choice(600, 6, replace=False).tolist(), ways, strict=True))
    for shard in index.shards:
        with (
            tarfile.open(shard.path) as source,
            tarfile.open(hit / Path(shard.path).name, "w") as tar,
        ):
            for member in source.getmembers():
                data = source.extractfile(member).read()
                number = next(
                    (
                        n
                        for n in damage
                        if index[n].id == f"{shard.name}/{member.name.split('.')[0]}"
                    ),
                    None,
                )
                if number is not None and not member.name.endswith("cls"):
                    data = damage[number](data)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    pattern = f"{hit}/photo-*.tar"
    indexed = ShardIndex.open(pattern)
    indexed.save(hit)
    cut = indexed[int(draw.integers(600))]
    os.truncate(cut.path, cut.offset + cut.size // 2)
    lost = [
        n for n in range(600) if indexed[n].path == cut.path and indexed[n].offset >= cut.offset
    ]
    return index, pattern, {index[n].id for n in {*damage, *lost}}


def test_whatever_hits_a_hundredth_of_the_samples_and_a_shard_moves_no_other(hit_at_random):
    clean, pattern, bad = hit_at_random
    index = ShardIndex.open(pattern)
    assert len(index.short) == 1
    wanted = record(clean, 0, 75)
    # an epoch
    assert {entry[0] for entry in wanted.values()} == {clean[number].id for number in range(600)}
    for world, workers in ((1, 0), (4, 2)):
        got = record(index, 0, 75, world=world, workers=workers, max_bad_fraction=0.3)
        assert {position for position in wanted if wanted[position] != got[position]} == {
            position for position in wanted if wanted[position][0] in bad
        }


def test_a_training_on_damaged_shards_ends_as_on_whole_ones_or_says_why_not(
    hit_at_random, tiny, tmp_path, capsys
):
    _, pattern, bad = hit_at_random
    epoch = [
        f"data.shards={pattern}",
        "batch.images=24",
        "schedule.steps=25",
        "run.lease_timeout_s=5",
    ]
    run, stopped = Folder(tmp_path / "run"), Folder(tmp_path / "stopped")
    assert start(tiny, run.path, *epoch, f"data.max_bad_fraction={len(bad) / 600 + 0.01}") == 0
    assert run.steps() == list(range(1, 26))
    assert {f"{line['shard']}/{line['key']}" for line in run.events("bad_sample")} == bad
    assert len(run.events("short_shards")) == 1
    capsys.readouterr()
    assert start(tiny, stopped.path, *epoch) == 1
    said = capsys.readouterr()
    assert "more than data.max_bad_fraction=0.001" in said.out + said.err
    assert stopped.outcome()["status"] == "failed"


def test_a_whole_dead_shard_is_replaced_by_the_next(tmp_path):
    index = ShardIndex.open(write_shards(tmp_path, (12, 12)))
    Path(index.shards[0].path).write_bytes(bytes(os.path.getsize(index.shards[0].path)))
    got = record(index, 0, 3, max_bad_fraction=1.0, max_bad_in_a_row=24)
    assert {entry[0].split("/")[0] for entry in got.values()} == {"photo-000001"}


def test_limits_count_samples_in_a_row_and_a_share_of_at_least_an_epoch(damaged):
    stream = stream_of(damaged[0], max_bad_fraction=1.0)
    entries = []
    for _ in zip(range(8), stream.steps(0), strict=False):
        entries += stream.drain_bad()
    one = entries[0]

    def check(limits, bad_positions, positions):
        limits.check([one._replace(position=position) for position in bad_positions], positions)

    limits = Limits(BadLimits(1.0, 3), 100)
    check(limits, [1, 2, 3], [0, 1, 2, 3])
    check(limits, [], [4])
    check(limits, [6, 7], [5, 6, 7])
    check(limits, [8], [8])
    with pytest.raises(TooManyBadSamples, match=r"max_bad_in_a_row=3"):
        check(limits, [9], [9])

    limits = Limits(BadLimits(0.1, 100), 50)
    for position in range(5):
        check(limits, [position], [position])
    with pytest.raises(TooManyBadSamples, match=r"6 of 50 samples"):
        check(limits, [5], [5])
    limits = Limits(BadLimits(0.1, 100), 50)
    for position in range(0, 200, 10):
        # exactly a tenth, beyond an epoch
        check(limits, [position], list(range(position, position + 10)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes_is_an_error_that_names_the_sample(tmp_path, workers):
    index = ShardIndex.open(write_shards(tmp_path, (16,)))
    Path(index.shards[0].path).unlink()
    stream = stream_of(index, workers=workers)
    with pytest.raises(
        OSError, match=r"^photo-000000/p0_\d+ at position 0 cannot be read: .*photo-000000\.tar'$"
    ):
        next(stream.steps(0))
    stream.close()


@dataclass(frozen=True)
class FailingTransform:
    """A transform with a bug."""

    image_size: tuple[int, int] = (16, 24)
    in_channels: int = 3

    def __call__(self, data: bytes, seed: int, position: int, draw: int = 0) -> View:
        raise KeyError("a bug")

    def views(self, data: bytes, seed: int, positions: Sequence[int]) -> list[View]:
        raise KeyError("a bug")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_in_a_worker_surfaces_with_the_sample_named(index, workers):
    stream = stream_of(index, workers=workers, transform=FailingTransform())
    with pytest.raises(
        RuntimeError, match=r"photo-00000\d/p\d_\d+ at position 0: KeyError\('a bug'\)"
    ):
        next(stream.steps(0))
    stream.close()
    assert not multiprocessing.active_children()


# --------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize(
    ("world", "batch", "workers"), [(1, 8, 0), (2, 8, 2), (4, 3, 0), (5, 64, 0), (40, 4, 0)]
)
def test_every_labelled_sample_is_seen_once_with_equal_batches_on_all_ranks(
    index, world, batch, workers
):
    seen, shapes = {}, set()
    for rank in range(world):
        batches = list(
            labelled_batches(
                index,
                CentreTransform((16, 24)),
                batch=batch,
                rank=rank,
                world=world,
                readers=Readers(workers),
            )
        )
        shapes.add(tuple(tuple(batch.images.shape) for batch in batches))
        for got in batches:
            for row, number in enumerate(got.positions.tolist()):
                if number >= 0:
                    assert number not in seen
                    seen[number] = (got.keys[row], int(got.labels[row]))
    assert len(shapes) == 1
    assert len(set(shapes.pop())) == 1
    assert seen == {number: (index[number].id, index[number].label) for number in range(len(index))}


def test_an_unreadable_labelled_sample_is_left_out_and_told(damaged, caplog):
    index, bad = damaged
    told = []
    batches = list(labelled_batches(index, CentreTransform((16, 16)), batch=8, on_bad=told.append))
    numbers = [number for batch in batches for number in batch.positions.tolist() if number >= 0]
    assert sorted(numbers) == sorted(set(range(len(index))) - bad)
    assert {f"{entry.shard}/{entry.key}" for entry in told} == {index[number].id for number in bad}
    list(labelled_batches(index, CentreTransform((16, 16)), batch=8))
    assert "left out of the evaluation: photo-000000/p0_2" in caplog.text


def test_an_evaluation_counts_what_it_leaves_out_once(damaged, caplog):
    index, bad = damaged
    recipe = SimpleNamespace(
        model=SimpleNamespace(image_hw=(16, 16), in_channels=3),
        data=SimpleNamespace(workers=0, max_pixels=10**8),
        evaluate=SimpleNamespace(batch=8),
    )
    unread = ("student", "teacher", "objective", "found", "normalise", "device")
    nothing = dict.fromkeys(unread)
    context = Evaluating(recipe=recipe, step=1, sets=[index], cache=None, **nothing)
    for _ in ("student", "teacher"):
        list(context.batches(0))
    assert context.left_out.of == {0: len(index)}
    assert len(context.left_out.samples[0]) == len(bad) > 0
    assert len(caplog.records) == len(bad)


def test_samples_without_labels_cannot_be_evaluated(tmp_path):
    index = ShardIndex.open(write_shards(tmp_path, (4,), labels=False))
    with pytest.raises(
        ValueError, match=r"4 of 4 samples have no label \(\.cls\): photo-000000/p0_0"
    ):
        next(labelled_batches(index, CentreTransform((16, 16)), batch=2))


# ---------------------------------------------------------------------------------------- processes

SCRIPT = """
import multiprocessing, sys, time
from rcmae.data.masking import RandomMask
from rcmae.data.index import ShardIndex
from rcmae.data.plan import Plan
from rcmae.data.stream import Readers, Share, Stream
from rcmae.data.transforms import TrainTransform
from rcmae.data.views import Views

if __name__ == "__main__":
    index = ShardIndex.open(sys.argv[1])
    plan = Plan(index.counts, 0, 8, 8, 4)
    transform = TrainTransform((16, 16))
    views = Views(transform, RandomMask(16, 4), seed=0)
    stream = Stream(index=index, plan=plan, views=views, share=Share(8), readers=Readers(2))
    steps = stream.steps(0)
    next(steps)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    sys.stdin.readline()
    for _ in range(40):
        next(steps)
    print("read on", flush=True)
    if sys.argv[2] == "close":
        stream.close()
        print("left", len(multiprocessing.active_children()), flush=True)
"""


@pytest.fixture
def reader(tmp_path):
    """Starts a process that reads with two workers; gives it and its workers."""
    (tmp_path / "reader.py").write_text(SCRIPT)
    pattern = write_shards(tmp_path, (16, 16))
    started, others = [], []

    def start(how):
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "reader.py"), pattern, how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": python_path()},
        )
        started.append(process)
        workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        others.extend([*workers, workers[0].parent()])
        return process, others

    yield start
    for one in [*started, *others]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    for process in started:
        process.communicate()  # ends once nobody has its pipes


def gone(processes, within_s=10):
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(
            process.is_running() and process.status() != psutil.STATUS_ZOMBIE
            for process in processes
        ):
            return True
        time.sleep(0.1)
    return False


def test_a_killed_trainer_leaves_no_worker_behind(reader):
    process, others = reader("close")
    process.kill()
    assert gone(others)


@pytest.mark.parametrize("how", ["close", "leave"])
def test_workers_outlive_a_signal_to_all_and_end_with_the_stream_or_the_process(reader, how):
    process, others = reader(how)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        for worker in others[:2]:
            worker.send_signal(number)
    others[2].send_signal(signal.SIGTERM)
    out, err = process.communicate("go on\n", timeout=30)
    assert "read on" in out, err
    assert how == "leave" or "left 0" in out
    # Python's tracker of semaphores may be told of one after it is gone, on a busy machine
    ours = [line for line in err.splitlines() if "resource_tracker" not in line]
    assert [line for line in ours if not line.lstrip().startswith("warnings.warn(")] == []
    assert process.returncode == 0
    assert gone(others)


@pytest.mark.skipif(
    not REAL.is_dir(), reason="the real photographs do not lie beside the repository"
)
def test_real_photographs_make_an_epoch():
    index = ShardIndex.open(f"{REAL}/imagenet-sample-{{000000..000001}}.tar")
    plan = Plan(index.counts, seed=0, images=50, streams=8, window=16)
    stream = flat_stream(
        index=index,
        plan=plan,
        transform=TrainTransform((224, 224)),
        mask=RandomMask(196, 49),
        seed=0,
        micro=50,
        workers=2,
    )
    keys = [
        key for _, (batch,) in zip(range(4), stream.steps(0), strict=False) for key in batch.keys
    ]
    stream.close()
    assert len(set(keys)) == 200
    assert stream.drain_bad() == []
