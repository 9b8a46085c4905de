"""A batch says once what its fields are; moving, cutting and recording follow from that."""

import dataclasses
import io
import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from streams import flat_stream

from rcmae.data.batch import Batch, Kind, fields_of
from rcmae.data.index import ShardIndex
from rcmae.data.masking import RandomMask
from rcmae.data.members.protocol import Seen, beside, stacked
from rcmae.data.members.whole import whole_samples
from rcmae.data.plan import Plan
from rcmae.data.stream import Readers
from rcmae.data.transforms import FORMATS, BadImage, TrainTransform, View, decode
from rcmae.run.judge import all_without, some_without
from rcmae.tasks.protocol import Evaluating, Interrupted

META = torch.device("meta")


def batch_of(count, **more):
    return Batch(
        images=torch.arange(count * 12, dtype=torch.uint8).view(count, 3, 2, 2),
        ids_shuffle=torch.arange(count * 4).view(count, 4),
        num_visible=1,
        labels=torch.arange(count),
        keys=tuple(f"x/{row}" for row in range(count)),
        positions=torch.arange(count) + 100,
        crops=torch.zeros(count, 5, dtype=torch.int64),
        **more,
    )


def full(count):
    """A batch with all that one can have."""
    return batch_of(
        count,
        teacher_ids=torch.arange(count * 4).view(count, 4).flip(1),
        targets=torch.rand(count, 7),
        mate=batch_of(count),
        extra={
            "map": torch.arange(count * 4).view(count, 2, 2),
            "boxes": tuple(torch.full((row, 4), row) for row in range(count)),
        },
    )


def test_each_field_says_what_it_is():
    assert set(fields_of()) == {field.name for field in dataclasses.fields(Batch)}
    assert all(getattr(full(2), name) is not None for name in fields_of())


def test_a_part_has_the_rows_of_every_field():
    batch = full(5)
    part = batch.part(slice(1, 4))
    assert len(part) == len(part.mate) == 3
    for name, kind in fields_of().items():
        if Kind.NAMED in kind or Kind.NESTED in kind or kind == Kind.WHOLE:
            continue
        value = getattr(batch, name)[1:4]
        same = part_is = getattr(part, name)
        assert torch.equal(part_is, value) if isinstance(value, torch.Tensor) else same == value
    assert part.num_visible == 1
    assert torch.equal(part.extra["map"], batch.extra["map"][1:4])
    assert [len(boxes) for boxes in part.extra["boxes"]] == [1, 2, 3]


def test_what_objectives_read_moves_and_bookkeeping_stays():
    moved = full(3).to(META)
    for one in (moved, moved.mate):
        assert one.images.device == one.ids_shuffle.device == one.labels.device == META
        assert one.positions.device == one.crops.device == torch.device("cpu")
        assert one.keys == ("x/0", "x/1", "x/2")
    assert moved.teacher_ids.device == moved.targets.device == META
    assert moved.extra["map"].device == META
    assert {boxes.device for boxes in moved.extra["boxes"]} == {META}


def test_a_batch_without_what_it_may_lack_stays_so():
    plain = dataclasses.replace(batch_of(2), labels=None)
    for made in (plain.to(META), plain.part(slice(0, 1))):
        assert (made.labels, made.targets, made.mate, made.extra) == (None,) * 4


def test_the_record_of_a_batch_says_which_samples_and_masks_these_were():
    record = json.loads(json.dumps(full(2).record()))
    assert record == {"keys": ["x/0", "x/1"], "positions": [100, 101], "masks": [[0], [4]]}


class Maps:
    """Where a map lies under a view, and what an annotation says of it."""

    kinds = ("map", "annotation")
    optional = ("label",)
    transform = TrainTransform((8, 8))

    def views(self, image, content, seed, positions):
        return beside(self.transform, self.read, image, content, seed, positions)

    def read(self, content, view):
        with Image.open(io.BytesIO(content["map"]), formats=FORMATS) as image:
            pixels = torch.from_numpy(np.array(image))
        top, left, height, width, _ = view.crop
        boxes = torch.tensor(json.loads(content["annotation"])["boxes"]).view(-1, 4)
        return {"mean": pixels[top : top + height, left : left + width].float().mean(), "b": boxes}

    def collate(self, rows):
        return {
            "mean": stacked([row["mean"] for row in rows]),
            "boxes": tuple(row["b"] for row in rows),
        }


class Chosen(Maps):
    """The view goes where the map says: its first row of ones. Without one: a bad sample."""

    kinds = ("map",)
    optional = ("annotation",)

    def views(self, image, content, seed, positions):
        pixels = decode(image)
        with Image.open(io.BytesIO(content["map"]), formats=FORMATS) as opened:
            where = torch.from_numpy(np.array(opened))
        if not where.any():
            raise BadImage("its map shows nothing")
        top = min(int(where.any(1).nonzero()[0]), 12)
        boxes = torch.zeros(len(content), 4)
        cut = torch.from_numpy(pixels[top : top + 8, :8].copy()).permute(2, 0, 1)
        extra = {"mean": where[top : top + 8, :8].float().mean(), "b": boxes}
        return [Seen(View(cut, (top, 0, 8, 8, 0)), extra) for _ in positions]


def encoded(value, mode, form):
    file = io.BytesIO()
    Image.new(mode, (20, 20), value).save(file, form)
    return file.getvalue()


def write_tar(path, samples):
    """A tar of samples: each suffix -> bytes."""
    with tarfile.open(path, "w") as tar:
        for number, content in enumerate(samples):
            for suffix, data in content.items():
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def stream_with(index, members, workers, **options):
    return flat_stream(
        index=index,
        plan=Plan(index.counts, seed=0, images=6, streams=2, window=6),
        transform=TrainTransform((8, 8)),
        mask=RandomMask(4, 1),
        seed=0,
        micro=3,
        workers=workers,
        max_bad_fraction=1.0,
        members=members,
        **options,
    )


def sample(number, mode="RGB"):
    boxes = {"boxes": [[0, 0, number, number]] * number}
    return {
        "jpg": encoded((number, 0, 0), mode, "JPEG"),
        "seg.png": encoded(number, "L", "PNG"),
        "json": json.dumps(boxes).encode(),
    }


def test_a_task_reads_other_members_of_its_samples_by_the_index(tmp_path):
    samples = [sample(number) for number in range(6)]
    del samples[5]["json"]
    write_tar(tmp_path / "x-0.tar", samples)
    ShardIndex.open(f"{tmp_path}/*.tar").save(tmp_path)
    index = ShardIndex.open(f"{tmp_path}/*.tar", needs=Maps.kinds)
    assert index.is_saved
    assert index.without("annotation").tolist() == [5]
    assert index.without("label").tolist() == [*range(6)]
    assert index.without("map").tolist() == []
    records = []
    for workers in (0, 2):
        stream = stream_with(index, Maps(), workers)
        micros = next(stream.steps(0))
        for batch in micros:
            numbers = [int(key.rpartition("/")[2]) for key in batch.keys]
            assert batch.extra["mean"].tolist() == numbers
            assert [len(boxes) for boxes in batch.extra["boxes"]] == numbers
            assert batch.extra["mean"].is_shared() == (workers > 0)
            apart = {boxes.untyped_storage().data_ptr() for boxes in batch.extra["boxes"]}
            assert workers == 0 or len(apart) == 1  # they travelled as one
        (bad,) = stream.drain_bad()
        assert (bad.key, bad.reason) == ("5", "it has no annotation")
        records.append([batch.record() for batch in micros])
        stream.close()
    assert records[0] == records[1]


def test_a_view_goes_where_the_map_says_and_a_map_that_cannot_be_used_is_a_bad_sample(tmp_path):
    samples = [sample(number) for number in range(6)]
    for number in range(1, 6):
        pixels = np.zeros((20, 20), np.uint8)
        pixels[2 * number :] = 1
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        samples[number]["seg.png"] = file.getvalue()
    del samples[2]["json"]  # it may be absent
    write_tar(tmp_path / "x-0.tar", samples)
    index = ShardIndex.open(f"{tmp_path}/*.tar", needs=Chosen.kinds)
    stream = stream_with(index, Chosen(), 0, repeats=3)
    batches = [batch for step in range(2) for batch in next(stream.steps(step))]
    ledger = {(bad.key, bad.reason) for bad in stream.drain_bad()}
    assert ledger == {("0", "its map shows nothing")}
    seen = set()
    for batch in batches:
        for key, crop, boxes in zip(batch.keys, batch.crops, batch.extra["boxes"], strict=True):
            number = int(key.rpartition("/")[2])
            seen.add(number)
            assert int(crop[0]) == 2 * number
            assert len(boxes) == (1 if number == 2 else 2)
    assert seen >= {1, 2, 3, 4, 5}


def whole(sample):
    """What the tests make of a whole sample."""
    if sample.number == 4:
        raise BadImage("it is the fourth")
    height, width = decode(sample.image).shape[:2]
    return sample.number, height, width, sorted(sample.content)


@pytest.mark.parametrize("workers", [0, 1])
def test_seven_whole_images_on_three_ranks_come_once_each_in_as_many_turns(tmp_path, workers):
    samples = [sample(number) for number in range(7)]
    del samples[6]["json"]
    write_tar(tmp_path / "x-0.tar", samples)
    index = ShardIndex.open(f"{tmp_path}/*.tar")
    told = []
    ranks = [
        list(
            whole_samples(
                index,
                whole,
                kinds=["map"],
                optional=["annotation"],
                rank=rank,
                world=3,
                readers=Readers(workers),
                on_bad=told.append,
            )
        )
        for rank in range(3)
    ]
    assert [len(turns) for turns in ranks] == [3, 3, 3]
    numbers = [[made[0] if made else None for made in turns] for turns in ranks]
    assert numbers == [[0, 3, 6], [1, None, None], [2, 5, None]]
    assert told == ["x-0/4 (it is the fourth)"]
    assert ranks[0][0] == (0, 20, 20, ["annotation", "map"])
    assert ranks[0][2] == (6, 20, 20, ["map"])


def evaluating(index, pause):
    """What an evaluation may use, as far as it reads whole samples."""
    recipe = SimpleNamespace(data=SimpleNamespace(workers=0))
    names = ("student", "teacher", "objective", "found", "normalise", "device")
    nothing = dict.fromkeys(names)
    return Evaluating(recipe=recipe, step=1, sets=[index], cache=None, pause=pause, **nothing)


def test_a_stop_is_heard_between_whole_samples(tmp_path):
    write_tar(tmp_path / "x-0.tar", [sample(number) for number in range(4)])
    index = ShardIndex.open(f"{tmp_path}/*.tar")
    heard = []

    def pause():
        heard.append(True)
        if len(heard) == 3:
            raise Interrupted

    made = []
    with pytest.raises(Interrupted):
        made.extend(evaluating(index, pause).whole(0, whole, ["map"]))
    assert len(heard) == 3
    context = evaluating(index, lambda: None)
    assert [turn[0] for turn in context.whole(0, whole, ["map"])] == [0, 1, 2, 3]


def test_a_start_says_which_samples_lack_what_a_task_reads(tmp_path):
    samples = [sample(number) for number in range(3)]
    del samples[1]["seg.png"]
    for each in samples:
        del each["json"]
    write_tar(tmp_path / "x-0.tar", samples)
    index = ShardIndex.open(f"{tmp_path}/*.tar")
    kinds = ("map", "annotation")
    assert all_without("data.shards", index, kinds) == [
        "data.shards: no sample has a .json (annotation), which the task reads"
    ]
    (told,) = some_without("data.shards", index, kinds, "replaced")
    assert "1 of 3 samples have no .seg.png (map) and are replaced: x-0/1" in told


class Nothing(Maps):
    """Every image without an object."""

    kinds = ("map",)
    optional = ()

    def read(self, content, view):
        return {"mean": torch.zeros(()), "b": torch.zeros(0, 4)}


def test_images_without_any_object_travel_too(tmp_path):
    write_tar(tmp_path / "x-0.tar", [sample(number) for number in range(6)])
    index = ShardIndex.open(f"{tmp_path}/*.tar", needs=Nothing.kinds)
    stream = stream_with(index, Nothing(), 1)
    for batch in next(stream.steps(0)):
        assert [boxes.shape for boxes in batch.extra["boxes"]] == [(0, 4)] * 3
    stream.close()
