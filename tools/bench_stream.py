#!/usr/bin/env python3
"""How many photographs a second become training views: this package's stream beside torchvision,
webdataset and, where they are installed, litdata, mosaicml-streaming and OpenCV.

    python tools/bench_stream.py SHARDS [--image-size N] [--longer-side N] [--samples N] \\
        [--restart-markers] [--decode-margin X] [--rounds N] [--workers N] [--json [FILE]]

The samples are copied to a temporary folder, as one tar and as an image folder, so that all sides
read the same bytes from the page cache; with --longer-side they are resized to that many pixels and
encoded anew (JPEG, quality 90). With --restart-markers the stream reads them with restart markers
added, as `rcmae shards make --restart-markers` does: other bytes, the same pixels. `torchvision` is
ImageFolder with the published pipeline: PIL decode, RandomResizedCrop (0.2 to 1, bicubic), flip, to
tensor, normalise. `webdataset` is its tar reader and PIL decode with the same transforms. `uint8
v2` is the fastest of torchvision's own: a DataLoader over the files, libjpeg-turbo to uint8
(torchvision.io where its compiled part loads, else simplejpeg, which decodes alike), transforms.v2
on uint8. It, the packages that are tried where they are installed (`tools/stream_peers.py`; the
report names those left out) and the stream normalise on the device, which is not in their time.
`workers, data.resize=device` is what the stream's workers do where the device resizes and flips;
that part is not in its time.

Rates of one core are images per CPU second of one process with one thread, the sides in turn, round
after round: the median, and the ratio to torchvision as the median of the rounds' ratios with its
range. Others are wall-clock, once. Likeness is the PSNR of views to PIL's of the same boxes. Exit
status: 0 done; 2 unusable input."""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import math
import statistics
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import count, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import stream_peers
import torch
from PIL import Image
from torch.utils.data import DataLoader

from rcmae.commands.arguments import add_json, told
from rcmae.data import jpeg
from rcmae.data.cache import Reader
from rcmae.data.device_decode import DeviceResizer, pack_boxes
from rcmae.data.index import ShardIndex
from rcmae.data.masking import RandomMask, visible_count
from rcmae.data.plan import Plan, Requests
from rcmae.data.stream import Readers, Share, Stream
from rcmae.data.transforms import FORMATS, TrainTransform, View, decode
from rcmae.data.views import Asked, TrainReading, Views
from rcmae.errors import Refused
from rcmae.models.precision import INSTRUCTIONS, cpu_instructions
from rcmae.planning.hardware import cpu_name
from rcmae.process import cores
from rcmae.process.extensions import guard_torchvision

guard_torchvision()
import webdataset  # noqa: E402

from torchvision import transforms  # noqa: E402
from torchvision.datasets import ImageFolder  # noqa: E402

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
BATCH = 32
PACKAGES = ("torch", "torchvision", "pillow", "simplejpeg", "webdataset")
QUALITY = 90
SLOWER = "uint8 v2"


def copy_samples(
    index: ShardIndex, samples: int, longer_side: int | None, folder: Path
) -> list[bytes]:
    """Lay samples, spread over the index, into folder/set.tar and folder/images/one/*.

    Gives their bytes.
    """
    (folder / "images" / "one").mkdir(parents=True)
    count = min(samples, len(index)) // BATCH * BATCH
    if not count:
        raise Refused(
            f"the shards hold {len(index)} samples, --samples asks for {samples}; at least "
            f"{BATCH} are needed"
        )
    files: list[bytes] = []
    reader = Reader()
    for number in np.linspace(0, len(index) - 1, count).round().astype(int).tolist():
        sample = index[number]
        data = reader.read(sample.shard, sample.offset, sample.size)
        if longer_side is not None:
            image = Image.fromarray(decode(data))
            factor = longer_side / max(image.size)
            file = io.BytesIO()
            size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
            image.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=QUALITY)
            data = file.getvalue()
        (folder / "images" / "one" / f"{len(files):06d}.jpg").write_bytes(data)
        files.append(data)
    write_tar(folder / "set.tar", files)
    return files


def write_tar(path: Path, files: Sequence[bytes]) -> None:
    """A shard of these images."""
    with tarfile.open(path, "w") as tar:
        for number, data in enumerate(files):
            member = tarfile.TarInfo(f"{number:06d}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def view_on_device(transform: TrainTransform, data: bytes, seed: int, position: int) -> View:
    """The view as a device resizes it, here the CPU."""
    box = transform.parts(data, seed, [position])[0]
    device = DeviceResizer(torch.device("cpu"), transform.image_size, transform.in_channels)
    images = device.images(torch.tensor([box.crop]), pack_boxes([box.image]))
    return View(images[0], box.crop)


def likeness(
    files: list[bytes], transform: TrainTransform, view_of: Callable[[bytes, int, int], View]
) -> dict[str, float]:
    """PSNR in dB of views to PIL's resize of the same boxes, and the share of views decoded at
    less than full size.

    Args:
        files: the photographs.
        transform: of the views.
        view_of: (file, seed, position) -> its view.
    """
    height, width = transform.image_size
    found = []
    shrunk = 0
    for position, data in enumerate(files):
        view = view_of(data, 0, position)
        top, left, rows, columns, flipped = view.crop
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            theirs = image.convert("RGB").crop((left, top, left + columns, top + rows))
        pixels = np.asarray(theirs.resize((width, height), Image.Resampling.BICUBIC))
        mine = (view.image.flip(-1) if flipped else view.image).permute(1, 2, 0).numpy()
        error = float(((pixels.astype(float) - mine) ** 2).mean())
        found.append(10 * math.log10(255**2 / error) if error else 100.0)
        shrunk += min(rows / height, columns / width) >= 2 * transform.margin
    return {
        "mean_db": statistics.fmean(found),
        "min_db": min(found),
        "shrunken_share": shrunk / len(files),
    }


def opened(path: str) -> Image.Image:
    """What torchvision's own loader gives, of the formats that are read here."""
    with Image.open(path, formats=FORMATS) as image:
        return image.convert("RGB")


def theirs_of(size: int) -> Callable[[Image.Image], torch.Tensor]:
    """The published pipeline after the decode."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                size, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def plan_and_views(index: ShardIndex, transform: TrainTransform) -> tuple[Plan, Views]:
    """Steps of one batch, three quarters of the patches hidden."""
    patches = (transform.image_size[0] // 16) ** 2
    mask = RandomMask(patches, visible_count(patches, 0.75))
    plan = Plan(index.counts, seed=0, images=BATCH, streams=8, window=4096)
    return plan, Views(transform, mask, seed=0)


def stream_of(index: ShardIndex, transform: TrainTransform, workers: int) -> Stream:
    """A stream of steps of one batch."""
    plan, views = plan_and_views(index, transform)
    return Stream(index=index, plan=plan, views=views, share=Share(BATCH), readers=Readers(workers))


def boxes_of(index: ShardIndex, transform: TrainTransform) -> Callable[[Requests], None]:
    """What a worker does of a batch where the device resizes."""
    plan, views = plan_and_views(index, transform)
    reading = TrainReading(index, plan, views, None, max_bad_in_a_row=100, leaves="boxes")

    def read(requests: Requests) -> None:
        found = reading[Asked(requests)]
        if isinstance(found, Exception):
            raise found

    return read


def one_core(
    files: list[bytes], folder: Path, index: ShardIndex, transform: TrainTransform, rounds: int
) -> tuple[dict[str, dict[str, Any]], stream_peers.Peers]:
    """Images per CPU second of each side, its ratio to torchvision's, and that to uint8 v2's.

    And what others there were.
    """
    size = transform.image_size[0]
    theirs = theirs_of(size)
    photographs = stream_peers.Photographs(
        sorted((folder / "images").rglob("*.jpg")), folder, size, BATCH
    )
    faster = stream_peers.uint8_side(photographs)
    peers = stream_peers.peers(photographs)
    plan, _ = plan_and_views(index, transform)
    boxes = boxes_of(index, transform)
    images = ImageFolder(str(folder / "images"), theirs, loader=opened)
    steps = len(files) // BATCH
    stream = stream_of(index, transform, 0)
    tar = (
        webdataset.WebDataset(str(folder / "set.tar"), shardshuffle=False)
        .decode("pil")
        .to_tuple("jpg")
    )
    tar = tar.map_tuple(theirs).batched(BATCH)

    def consume(items: Iterator[Any]) -> None:
        for _ in items:
            pass

    def epoch_of(batches: Iterable[torch.Tensor], turn: int) -> None:
        whole = sum(map(len, batches))
        assert whole == len(files), f"{whole} of {len(files)} photographs"

    def pil_decode(data: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(data), formats=FORMATS).convert("RGB"))

    sides: dict[str, Callable[[int], None]] = {
        "torchvision": lambda turn: consume(iter(DataLoader(images, BATCH, shuffle=True))),
        "webdataset": lambda turn: consume(iter(tar)),
        SLOWER: lambda turn: consume(iter(faster)),
        **{name: partial(epoch_of, batches) for name, batches in peers.sides.items()},
        "PIL decode alone": lambda turn: consume(map(pil_decode, files)),
        "decode alone": lambda turn: consume(map(decode, files)),
        "decode and crop": lambda turn: consume(map(transform, files, repeat(turn), count())),
        "stream": lambda turn: consume(islice(stream.steps(turn * steps), steps)),
        "workers, data.resize=device": lambda turn: consume(
            boxes(plan.requests((turn * steps + step) * BATCH, (turn * steps + step + 1) * BATCH))
            for step in range(steps)
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            start = time.process_time()
            run(turn)
            if turn:  # the first round warms up
                seconds[name].append(time.process_time() - start)
    stream.close()
    out = {}
    for name, mine in seconds.items():
        ratios = [base / own for base, own in zip(seconds["torchvision"], mine, strict=True)]
        to_uint8 = [base / own for base, own in zip(seconds[SLOWER], mine, strict=True)]
        out[name] = {
            "images_per_cpu_s": len(files) / statistics.median(mine),
            "ratio_to_uint8_v2": statistics.median(to_uint8),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    return out, peers


def all_cores(
    files: list[bytes], folder: Path, index: ShardIndex, transform: TrainTransform, workers: int
) -> dict[str, float]:
    """Wall-clock images/s with worker processes, after the first batch.

    And how long first batches take.
    """
    steps = len(files) // BATCH
    size = transform.image_size[0]
    stream = stream_of(index, transform, workers)
    start = time.perf_counter()
    running = stream.steps(0)
    next(running)
    first = time.perf_counter()
    for _ in islice(running, 2 * steps):
        pass
    end = time.perf_counter()
    next(stream.steps(steps // 2))
    resumed = time.perf_counter()
    stream.close()
    images = ImageFolder(str(folder / "images"), theirs_of(size), loader=opened)
    loader = DataLoader(images, BATCH, shuffle=True, num_workers=workers, persistent_workers=True)
    for _ in loader:
        pass
    begun = time.perf_counter()
    for _ in range(2):
        for _ in loader:
            pass
    return {
        "stream_images_per_s": 2 * steps * BATCH / (end - first),
        "torchvision_images_per_s": 2 * len(files) / (time.perf_counter() - begun),
        "first_batch_s": first - start,
        "resume_s": resumed - end,
    }


def main() -> int:
    """Run the command line."""
    args = arguments()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        report = measure(args)
    except Refused as error:
        print(error, file=sys.stderr)
        return 2
    if not told(report, args.json):
        print_report(report)
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", nargs="+", help="paths, brace patterns or globs")
    parser.add_argument(
        "--image-size", type=int, default=224, metavar="N", help="pixels of a view's side"
    )
    parser.add_argument(
        "--longer-side",
        type=int,
        metavar="N",
        help="resize the photographs to this many pixels first",
    )
    parser.add_argument(
        "--decode-margin", type=float, default=2.5, metavar="X", help="data.decode_margin"
    )
    parser.add_argument(
        "--restart-markers",
        action="store_true",
        help="the stream's JPEGs have them (needs jpegtran or libjpeg-turbo 3.1)",
    )
    parser.add_argument("--samples", type=int, default=200, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--workers", type=int, default=cores.usable(), metavar="N")
    add_json(parser)
    return parser.parse_args()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures.

    Raises:
        Refused: the shards cannot be used.
    """
    source = ShardIndex.open(args.shards)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = copy_samples(source, args.samples, args.longer_side, folder)
        own = folder / "set.tar"
        if args.restart_markers:
            files = [jpeg.with_restarts(data) for data in files]
            own = folder / "own.tar"
            write_tar(own, files)
        index = ShardIndex.open(str(own))
        transform = TrainTransform((args.image_size, args.image_size), margin=args.decode_margin)
        library = jpeg.library()
        rates, peers = one_core(files, folder, index, transform, args.rounds)
        return {
            "images": len(files),
            "mean_bytes": statistics.fmean(map(len, files)),
            "image_size": args.image_size,
            "longer_side": args.longer_side,
            "restart_markers": args.restart_markers,
            "decode_margin": args.decode_margin,
            "machine": ", ".join(
                [cpu_name(), *(INSTRUCTIONS[each] for each in sorted(cpu_instructions()))]
            ),
            "cores": cores.usable(),
            "parts_of_jpegs": jpeg.decodes_parts(),
            "libjpeg_turbo": ".".join(map(str, library.version)) if library else None,
            "uint8_v2_decodes": stream_peers.uint8_decoder()[0],
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
            | peers.versions,
            "left_out": peers.left_out,
            "notes": {side: note for side, note in stream_peers.NOTES.items() if side in rates},
            "likeness": likeness(files, transform, transform),
            "likeness_on_device": likeness(files, transform, partial(view_on_device, transform)),
            "one_core": rates,
            "workers": args.workers,
            "all_cores": all_cores(files, folder, index, transform, args.workers),
        }


def print_report(report: dict[str, Any]) -> None:
    """The figures for people."""
    print(
        f"{report['images']} photographs of {report['mean_bytes'] / 1000:.0f} kB to "
        f"{report['image_size']} px; a uint8 pipeline decodes by {report['uint8_v2_decodes']}"
    )
    if report["restart_markers"]:
        version = report["libjpeg_turbo"]
        library = "no libjpeg-turbo 3" if version is None else f"libjpeg-turbo {version or '3'}"
        print(f"the stream's JPEGs have restart markers (--restart-markers); {library}")
    print(f"{'one core':30}{'images/CPU s':>14}{'x torchvision':>15}   range{'x uint8 v2':>20}")
    for side, row in report["one_core"].items():
        print(
            f"{side:30}{row['images_per_cpu_s']:14.0f}{row['ratio']:15.2f}"
            f"   {row['ratio_min']:.2f} to {row['ratio_max']:.2f}{row['ratio_to_uint8_v2']:13.2f}"
        )
    for side, note in report["notes"].items():
        print(f"{side}: {note}")
    for package, why in report["left_out"].items():
        print(f"left out: {package}: {why}")
    for key, value in report["all_cores"].items():
        print(f"{key:30}{value:14.2f}   ({report['workers']} workers)")
    like, other = report["likeness"], report["likeness_on_device"]
    print(
        f"likeness to PIL: mean {like['mean_db']:.1f} dB, least {like['min_db']:.1f} dB; "
        f"resized on the device {other['mean_db']:.1f} and {other['min_db']:.1f} dB"
    )
    print(
        f"decoded at half size or less: {like['shrunken_share']:.0%}; parts alone: "
        f"{report['parts_of_jpegs']}"
    )


if __name__ == "__main__":
    sys.exit(main())
