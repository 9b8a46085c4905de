"""A batch says once what its fields are; moving, cutting and recording follow from that."""

import dataclasses
import io
import json
import tarfile

import numpy as np
import torch
from PIL import Image
from streams import flat_stream

from rcmae.data.batch import Batch, Kind, fields_of
from rcmae.data.index import ShardIndex
from rcmae.data.masking import RandomMask
from rcmae.data.plan import Plan
from rcmae.data.transforms import FORMATS, TrainTransform

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


def whole(count):
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
    assert all(getattr(whole(2), name) is not None for name in fields_of())


def test_a_part_has_the_rows_of_every_field():
    batch = whole(5)
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
    moved = whole(3).to(META)
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
    record = json.loads(json.dumps(whole(2).record()))
    assert record == {"keys": ["x/0", "x/1"], "positions": [100, 101], "masks": [[0], [4]]}


class Maps:
    """Where a map lies under a view, and what an annotation says of it."""

    kinds = ("map", "annotation")

    def read(self, content, view):
        with Image.open(io.BytesIO(content["map"]), formats=FORMATS) as image:
            pixels = torch.from_numpy(np.array(image))
        top, left, height, width, _ = view.crop
        boxes = torch.tensor(json.loads(content["annotation"])["boxes"]).view(-1, 4)
        return {"mean": pixels[top : top + height, left : left + width].float().mean(), "b": boxes}

    def collate(self, rows):
        return {
            "mean": torch.stack([row["mean"] for row in rows]),
            "boxes": tuple(row["b"] for row in rows),
        }


def encoded(value, mode, form):
    file = io.BytesIO()
    Image.new(mode, (20, 20), value).save(file, form)
    return file.getvalue()


def test_a_task_reads_other_members_of_its_samples_by_the_index(tmp_path):
    with tarfile.open(tmp_path / "x-0.tar", "w") as tar:
        for number in range(6):
            boxes = {"boxes": [[0, 0, number, number]] * number}
            for suffix, data in (
                ("jpg", encoded((number, 0, 0), "RGB", "JPEG")),
                ("seg.png", encoded(number, "L", "PNG")),
                ("json", json.dumps(boxes).encode()),
            ):
                if (number, suffix) == (5, "json"):
                    continue
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    ShardIndex.open(f"{tmp_path}/*.tar").save(tmp_path)
    index = ShardIndex.open(f"{tmp_path}/*.tar", needs=Maps.kinds)
    assert index.is_saved
    records = []
    for workers in (0, 2):
        stream = flat_stream(
            index=index,
            plan=Plan(index.counts, seed=0, images=6, streams=2, window=6),
            transform=TrainTransform((8, 8)),
            mask=RandomMask(4, 1),
            seed=0,
            micro=3,
            workers=workers,
            max_bad_fraction=1.0,
            members=Maps(),
        )
        micros = next(stream.steps(0))
        for batch in micros:
            numbers = [int(key.rpartition("/")[2]) for key in batch.keys]
            assert batch.extra["mean"].tolist() == numbers
            assert [len(boxes) for boxes in batch.extra["boxes"]] == numbers
        (bad,) = stream.drain_bad()
        assert (bad.key, bad.reason) == ("5", "it has no annotation")
        records.append([batch.record() for batch in micros])
        stream.close()
    assert records[0] == records[1]
