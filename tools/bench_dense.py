#!/usr/bin/env python3
"""How fast images with maps or objects become training views, and detections are judged.

    python tools/bench_dense.py segment SHARDS [--crop N] [--samples N] [--rounds N]
    python tools/bench_dense.py detect SHARDS [--canvas N] [--samples N] [--rounds N]
    python tools/bench_dense.py judge [--images N] [--detections N]
    --json [FILE] of any

`segment` resizes photographs and maps of the shards to 683 x 512 and encodes them anew (JPEG of
quality 90, PNG). `torchvision` is a plain pipeline of its v2 transforms on `tv_tensors`: Pillow
decodes; random resize, crop, flip and distortion follow; its batches are not normalised, as the
stream's are not: that is done on the device.
`detect` resizes photographs to 500 x 375 and gives each seven polygons.
`judge` makes up detections in memory and counts COCO's twelve numbers of boxes and of masks.

Rates are images per CPU second of one process with one thread, the sides in turn, round after
round: the median, with its range. Shares of a stage are of the time that one sample takes. Exit
status: 0 done; 2 unusable input."""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import platform
import resource
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from rcmae.commands.arguments import add_json, told
from rcmae.data.cache import Reader
from rcmae.data.dense.annotated import Canvas, Jittered
from rcmae.data.dense.crops import Augment, Crops, Labels
from rcmae.data.dense.jitter import seen
from rcmae.data.dense.maps import read_map
from rcmae.data.dense.objects import objects_on
from rcmae.data.index import ShardIndex
from rcmae.data.masking import NoMask
from rcmae.data.members.annotations import objects_of
from rcmae.data.members.maps import decode_map, encode_map, nearest
from rcmae.data.members.protocol import Members
from rcmae.data.members.reading import image_bytes, member_bytes
from rcmae.data.plan import Plan
from rcmae.data.stream import Readers, Share, Stream
from rcmae.data.transforms import FORMATS, TrainTransform, decode
from rcmae.data.views import Views
from rcmae.errors import Refused
from rcmae.process import cores
from rcmae.process.extensions import guard_torchvision

guard_torchvision()
from torchvision import tv_tensors  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

BATCH = 8
QUALITY = 90
PHOTOGRAPH = (512, 683)  # height and width in `segment`
SOURCE = (375, 500)  # in `detect`
OBJECTS = 7  # of an image, as COCO has
POINTS = 20  # of a polygon
LARGEST_CLASS = 254  # a map of 8 bits has no more
PACKAGES = ("torch", "torchvision", "pillow", "simplejpeg", "pycocotools", "faster-coco-eval")


class Sample(NamedTuple):
    """An encoded image, and what lies beside it."""

    image: bytes
    content: dict[str, bytes]  # kind -> bytes


# -------------------------------------------------------------------------------------- the samples


def photographs(index: ShardIndex, count: int, kinds: Sequence[str]) -> Iterator[Sample]:
    """Samples spread over the shards.

    Raises:
        Refused: there are too few.
    """
    count = min(count, len(index)) // BATCH * BATCH
    if not count:
        raise Refused(f"the shards hold {len(index)} samples; at least {BATCH} are needed")
    reader = Reader()
    for number in np.linspace(0, len(index) - 1, count).round().astype(int).tolist():
        content = member_bytes(reader, index, number, kinds)
        yield Sample(image_bytes(reader, index[number]), content)


def jpeg_of(data: bytes, size: tuple[int, int]) -> bytes:
    """A photograph at a height and width."""
    file = io.BytesIO()
    image = Image.fromarray(decode(data)).resize(size[::-1], Image.Resampling.LANCZOS)
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def with_maps(index: ShardIndex, count: int) -> list[Sample]:
    """Photographs with their maps, of one size."""
    found = []
    for image, content in photographs(index, count, ("map",)):
        numbers = nearest(decode_map(content["map"]), PHOTOGRAPH)
        found.append(Sample(jpeg_of(image, PHOTOGRAPH), {"map": encode_map(numbers)}))
    return found


def with_polygons(index: ShardIndex, count: int) -> list[Sample]:
    """Photographs of one size, each with as many polygons of a made-up shape."""
    found = []
    draw = np.random.default_rng(0)
    height, width = SOURCE
    angles = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
    for number, (image, _) in enumerate(photographs(index, count, ())):
        objects = []
        for place in range(OBJECTS):
            radius = draw.uniform(10, 90)
            x, y = draw.uniform(radius, (width - radius, height - radius))
            around = radius * draw.uniform(0.5, 1.0, POINTS)
            points = np.stack([x + around * np.cos(angles), y + around * np.sin(angles)], axis=1)
            low, high = points.min(axis=0), points.max(axis=0)
            each: dict[str, Any] = {
                "id": place + 1,
                "category_id": 1,
                "iscrowd": 0,
                "area": float(radius**2),
            }
            each["bbox"] = [*low.tolist(), *(high - low).tolist()]
            objects.append(each | {"segmentation": [points.round(2).reshape(-1).tolist()]})
        document = {"image_id": number, "height": height, "width": width, "annotations": objects}
        beside = {"annotation": json.dumps(document).encode()}
        found.append(Sample(jpeg_of(image, SOURCE), beside))
    return found


def packed(samples: Sequence[Sample], suffix: str, folder: Path) -> ShardIndex:
    """The samples as one tar, indexed."""
    with tarfile.open(folder / "set.tar", "w") as tar:
        for number, (image, content) in enumerate(samples):
            (beside,) = content.values()
            for name, data in (("jpg", image), (suffix, beside)):
                member = tarfile.TarInfo(f"{number:06d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return ShardIndex.open(str(folder / "set.tar"))


def stream_of(index: ShardIndex, members: Members, size: tuple[int, int]) -> Stream:
    """A stream of steps of one batch, in this process."""
    plan = Plan(index.counts, seed=0, images=BATCH, streams=1, window=64)
    views = Views(TrainTransform(size), NoMask(), seed=0, members=members)
    return Stream(index=index, plan=plan, views=views, share=Share(BATCH), readers=Readers(0))


# ------------------------------------------------------------------------------------------ measure


def rates(
    sides: dict[str, Callable[[int], None]], images: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Images per CPU second of each side; each is called with the number of the round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            start = time.process_time()
            run(turn)
            if turn:  # the first round warms up
                seconds[name].append(time.process_time() - start)
    found = {}
    for name, mine in seconds.items():
        found[name] = {
            "images_per_cpu_s": images / statistics.median(mine),
            "least": images / max(mine),
            "most": images / min(mine),
        }
    return found


def shares(
    stages: dict[str, Callable[[Sample, int], object]], samples: Sequence[Sample], rounds: int
) -> dict[str, float]:
    """Milliseconds that each stage takes of a sample, the median over rounds."""
    spent: dict[str, list[float]] = {name: [] for name in stages}
    for turn in range(rounds + 1):
        for name, run in stages.items():
            start = time.process_time()
            for number, sample in enumerate(samples):
                run(sample, turn * len(samples) + number)
            if turn:
                spent[name].append((time.process_time() - start) / len(samples))
    return {name: 1000 * statistics.median(mine) for name, mine in spent.items()}


class Plain(Dataset[Any]):
    """Image and map by Pillow and torchvision's v2 transforms."""

    def __init__(self, samples: Sequence[Sample], crop: int) -> None:
        self._samples = samples
        fill: dict[Any, int] = {tv_tensors.Image: 0, tv_tensors.Mask: 255}
        self._transform = v2.Compose(
            [
                v2.RandomResize(crop // 2, 2 * crop, antialias=False),
                v2.RandomCrop(crop, pad_if_needed=True, fill=fill),
                v2.RandomHorizontalFlip(),
                v2.RandomPhotometricDistort(),
            ]
        )

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: int) -> Any:
        sample = self._samples[number]
        pixels = Image.open(io.BytesIO(sample.image), formats=FORMATS).convert("RGB")
        values = Image.open(io.BytesIO(sample.content["map"]), formats=("PNG",))
        image = tv_tensors.Image(torch.from_numpy(np.array(pixels)).permute(2, 0, 1))
        mask = tv_tensors.Mask(torch.from_numpy(np.array(values)))
        return self._transform(image, mask)


def segment(options: argparse.Namespace) -> dict[str, Any]:
    """The stream of a segmentation beside torchvision's. Raises Refused."""
    index = ShardIndex.open(options.shards, needs=("map",))
    samples = with_maps(index, options.samples)
    side = (options.crop, options.crop)
    crops = Crops(side, Labels(LARGEST_CLASS))
    undistorted = replace(crops, augment=Augment(distort=False))
    steps = len(samples) // BATCH
    with tempfile.TemporaryDirectory() as folder:
        stream = stream_of(packed(samples, "seg.png", Path(folder)), crops, side)
        loader: DataLoader[Any] = DataLoader(Plain(samples, options.crop), BATCH, shuffle=True)
        sides: dict[str, Callable[[int], None]] = {
            "stream": lambda turn: consume(islice(stream.steps(turn * steps), steps)),
            "torchvision": lambda turn: consume(iter(loader)),
        }
        found = rates(sides, len(samples), options.rounds)
        stream.close()
    stages = shares(
        {
            "decode the image": lambda sample, position: decode(sample.image),
            "decode the map": lambda sample, position: read_map(
                sample.content["map"], PHOTOGRAPH, LARGEST_CLASS
            ),
            "all but distort": lambda sample, position: undistorted.views(*sample, 0, [position]),
            "all": lambda sample, position: crops.views(*sample, 0, [position]),
        },
        samples,
        options.rounds,
    )
    decoded = stages["decode the image"] + stages["decode the map"]
    parts = {
        "decode the image": stages["decode the image"],
        "decode the map": stages["decode the map"],
        "resize, cut, flip": stages["all but distort"] - decoded,
        "distort": stages["all"] - stages["all but distort"],
    }
    return {
        **about(options, samples, PHOTOGRAPH),
        "one_core": found,
        "ratio": ratio(found, "stream", "torchvision"),
        "milliseconds": stages["all"],
        "shares": {name: each / stages["all"] for name, each in parts.items()},
    }


def detect(options: argparse.Namespace) -> dict[str, Any]:
    """The stream of a detection. Raises Refused."""
    samples = with_polygons(ShardIndex.open(options.shards), options.samples)
    side = (options.canvas, options.canvas)
    members = Jittered(Canvas(side), (1,))
    steps = len(samples) // BATCH
    with tempfile.TemporaryDirectory() as folder:
        stream = stream_of(packed(samples, "json", Path(folder)), members, side)
        sides: dict[str, Callable[[int], None]] = {
            "stream": lambda turn: consume(islice(stream.steps(turn * steps), steps)),
        }
        found = rates(sides, len(samples), options.rounds)
        stream.close()

    def annotations(sample: Sample) -> Any:
        return objects_of(sample.content["annotation"], SOURCE, {1: ""})

    stages = shares(
        {
            "read the annotation": lambda sample, position: annotations(sample),
            "decode, resize, cut": lambda sample, position: seen(
                sample.image, members.jitter(SOURCE, 0, position), 3, members.margin
            ),
            "read and draw masks": lambda sample, position: objects_on(
                annotations(sample), members.jitter(SOURCE, 0, position), {1: 0}
            ),
            "all": lambda sample, position: members.views(*sample, 0, [position]),
        },
        samples,
        options.rounds,
    )
    whole = stages["all"]
    read = stages["read the annotation"]
    parts = {
        "read the annotation": read,
        "decode, resize, cut": stages["decode, resize, cut"],
        "draw masks": stages["read and draw masks"] - read,
    }
    parts["canvas and the rest"] = whole - sum(parts.values())
    return {
        **about(options, samples, SOURCE),
        "polygons": OBJECTS,
        "one_core": found,
        "milliseconds": whole,
        "shares": {name: each / whole for name, each in parts.items()},
    }


def judge(options: argparse.Namespace) -> dict[str, Any]:
    """COCO's numbers of a set as large as its validation."""
    from rcmae.evaluation.detection.precision import judge as judged

    truth, detections = made_up(options.images, options.detections)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    numbers = {kind: judged(truth, detections, kind).numbers for kind in ("bbox", "segm")}
    seconds = time.process_time() - start
    return {
        **about(options, (), None),
        "images": options.images,
        "detections": len(detections),
        "cpu_s": seconds,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "peak_before_gib": before / 2**20,
        "AP": {kind: each["AP"] for kind, each in numbers.items()},
    }


def made_up(images: int, each: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Objects and detections near them, masks out of a pool of ellipses: 80 categories."""
    from pycocotools import mask as coco_mask

    draw = np.random.default_rng(0)
    height, width = 480, 640
    rows, columns = np.mgrid[:height, :width]
    pool: list[tuple[list[float], float, dict[str, Any]]] = []
    for _ in range(500):
        radii = draw.uniform(8, 120, 2)
        centre = draw.uniform(radii, (height, width) - radii)
        inside = ((rows - centre[0]) / radii[0]) ** 2 + ((columns - centre[1]) / radii[1]) ** 2 < 1
        code = coco_mask.encode(np.asfortranarray(inside.astype(np.uint8)))
        box = [float(value) for value in coco_mask.toBbox(code)]
        text = {"size": [height, width], "counts": code["counts"].decode("ascii")}
        pool.append((box, float(coco_mask.area(code)), text))
    objects: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for number in range(1, images + 1):
        places = draw.integers(len(pool), size=OBJECTS)
        kinds = draw.integers(1, 81, size=OBJECTS)
        for place, kind in zip(places.tolist(), kinds.tolist(), strict=True):
            box, area, code = pool[place]
            one = {"id": len(objects) + 1, "image_id": number, "category_id": kind, "bbox": box}
            objects.append(one | {"area": area, "iscrowd": 0, "segmentation": code})
        of_object = draw.random(each) < 0.3
        chosen = draw.integers(OBJECTS, size=each)
        others = draw.integers(len(pool), size=each)
        their_kinds = draw.integers(1, 81, size=each)
        scores = draw.random(each)
        for row in range(each):
            place = places[chosen[row]] if of_object[row] else others[row]
            kind = kinds[chosen[row]] if of_object[row] else their_kinds[row]
            box, _, code = pool[int(place)]
            found = {"image_id": number, "category_id": int(kind), "score": float(scores[row])}
            detections.append(found | {"bbox": list(box), "segmentation": dict(code)})
    sides = {"height": height, "width": width}
    document = {
        "info": {},
        "images": [{"id": number, **sides} for number in range(1, images + 1)],
        "categories": [{"id": kind, "name": str(kind)} for kind in range(1, 81)],
        "annotations": objects,
    }
    return document, detections


def consume(items: Iterator[Any]) -> None:
    """Take all."""
    for _ in items:
        pass


def ratio(found: dict[str, dict[str, float]], one: str, other: str) -> float:
    """How many times as fast the first is."""
    return found[one]["images_per_cpu_s"] / found[other]["images_per_cpu_s"]


def about(
    options: argparse.Namespace, samples: Sequence[Sample], size: tuple[int, int] | None
) -> dict[str, Any]:
    """What was measured, where."""
    found: dict[str, Any] = {
        "what": options.what,
        "machine": platform.processor() or platform.machine(),
        "cores": cores.usable(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    if size is not None:
        found |= {"images": len(samples), "height_width": list(size)}
        found["mean_bytes"] = statistics.fmean(len(each.image) for each in samples)
        found["view"] = options.crop if options.what == "segment" else options.canvas
    return found


# --------------------------------------------------------------------------------- the command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    options = parse(arguments)
    torch.set_num_threads(1)
    try:
        report = {"segment": segment, "detect": detect, "judge": judge}[options.what](options)
    except Refused as error:
        print(error, file=sys.stderr)
        return 2
    if not told(report, options.json):
        show(report)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="what", required=True)
    for name, key, side in (("segment", "--crop", 512), ("detect", "--canvas", 1024)):
        part = parts.add_parser(name)
        part.add_argument("shards", nargs="+", help="paths, brace patterns or globs")
        part.add_argument(key, type=int, default=side, metavar="N", help="pixels of a view's side")
        part.add_argument("--samples", type=int, default=64, metavar="N")
        part.add_argument("--rounds", type=int, default=5, metavar="N")
    part = parts.add_parser("judge")
    part.add_argument("--images", type=int, default=5000, metavar="N")
    part.add_argument("--detections", type=int, default=100, metavar="N", help="of an image")
    for part in parts.choices.values():
        add_json(part)
    return parser.parse_args(arguments)


def show(report: dict[str, Any]) -> None:
    """The figures for people."""
    if report["what"] == "judge":
        print(
            f"{report['images']:,} images, {report['detections']:,} detections, boxes and masks: "
            f"{report['cpu_s']:.1f} CPU s, at most {report['peak_gib']:.2f} GiB"
        )
        return
    height, width = report["height_width"]
    print(f"{report['images']} photographs of {width} x {height} to {report['view']} pixels")
    for side, row in report["one_core"].items():
        print(
            f"{side:22}{row['images_per_cpu_s']:8.1f} images/CPU s   ({row['least']:.1f} to "
            f"{row['most']:.1f})"
        )
    if "ratio" in report:
        print(f"{report['ratio']:.2f} x torchvision")
    print(f"of {report['milliseconds']:.1f} ms of a sample:")
    for name, share in report["shares"].items():
        print(f"  {name:22}{share:6.0%}")


if __name__ == "__main__":
    sys.exit(main())
