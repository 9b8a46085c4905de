"""JPEGs that the device decodes: the same stream as the workers', here with libjpeg-turbo
standing in for nvJPEG.
"""

from __future__ import annotations

import io
import math
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from streams import flat_stream
from torch import Tensor

from rcmae.data.batch import Batch
from rcmae.data.cache import Reader
from rcmae.data.device_decode import DeviceDecoder, DeviceResizer, OnDevice, nvjpeg, pack_boxes
from rcmae.data.index import ShardIndex
from rcmae.data.masking import RandomMask
from rcmae.data.plan import Plan
from rcmae.data.transforms import FORMATS, TrainTransform
from rcmae.data.views import BadSample, TooManyBadSamples
from runs import Folder, start

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def libjpeg(files: list[Tensor]) -> list[Tensor]:
    """Decodes as nvJPEG's door does: all files or, with a RuntimeError, none."""
    try:
        return [
            torch.from_numpy(simplejpeg.decode_jpeg(bytes(file.numpy()))).permute(2, 0, 1)
            for file in files
        ]
    except ValueError as error:
        raise RuntimeError(str(error)) from error


def read(
    index: ShardIndex, decode: object, *, first_step: int = 0, steps: int = 6, **options: object
) -> tuple[list[Batch], list[BadSample]]:
    plan = Plan(
        index.counts, seed=3, images=8 // int(options.get("repeats", 1)), streams=8, window=3
    )  # type: ignore[call-overload]
    stream = flat_stream(
        index=index,
        plan=plan,
        transform=TrainTransform((16, 24), margin=math.inf),
        mask=RandomMask(24, 6),
        seed=5,
        **{"micro": 4, **options},  # type: ignore[arg-type]
        max_bad_fraction=0.5,
        on_device=DeviceDecoder(decode, CPU) if callable(decode) else decode,  # type: ignore[arg-type]
    )
    running = stream.steps(first_step)
    batches = [batch for _ in range(steps) for batch in next(running)]
    bad = stream.drain_bad()
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "decode on the device"]
    return batches, bad


def assert_same(batches: list[Batch], expected: list[Batch], *, levels: float) -> None:
    """All but the pixels are equal.

    Those differ by at most so many levels in the mean of any image.
    """
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys == other.keys
        for part in ("positions", "ids_shuffle", "labels", "crops"):
            assert torch.equal(getattr(batch, part), getattr(other, part)), part
        assert (batch.images.float() - other.images.float()).abs().mean(
            dim=(1, 2, 3)
        ).max() <= levels


@pytest.fixture(scope="module")
def index(photo_shards: str) -> ShardIndex:
    return ShardIndex.open(photo_shards)


@pytest.fixture(scope="module")
def damaged(photo_shards: str, tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """A shard with a PNG, a CMYK JPEG, one that ends too early, one with noise in the middle,
    and text.
    """
    folder, draw = tmp_path_factory.mktemp("damaged"), np.random.default_rng(0)
    with tarfile.open(next(Path(photo_shards).parent.glob("photo-000000.tar"))) as source:
        jpegs = [
            source.extractfile(m).read() for m in source.getmembers() if m.name.endswith("jpg")
        ]  # type: ignore[union-attr]
    image = Image.open(io.BytesIO(jpegs[0]), formats=FORMATS)
    png, cmyk = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG")
    image.convert("CMYK").save(cmyk, "JPEG")
    jpegs[3], jpegs[5], jpegs[7] = png.getvalue(), cmyk.getvalue(), jpegs[7][:-400]
    middle = len(jpegs[9]) // 2
    jpegs[9] = (
        jpegs[9][:middle]
        + bytes(draw.integers(0, 255, 60, dtype=np.uint8))
        + jpegs[9][middle + 60 :]
    )
    jpegs[11] = b"not an image"
    with tarfile.open(folder / "damaged-000000.tar", "w") as tar:
        for number, data in enumerate(jpegs):
            member = tarfile.TarInfo(f"{number:02d}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return ShardIndex.open(f"{folder}/damaged-000000.tar")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("repeats", [1, 2])
def test_the_device_gives_the_workers_stream(index: ShardIndex, workers: int, repeats: int) -> None:
    expected, _ = read(index, None, repeats=repeats)
    batches, bad = read(index, libjpeg, workers=workers, repeats=repeats)
    assert bad == []
    # the same resizing, rounded once instead of at each of its two passes
    assert_same(batches, expected, levels=0.6)
    assert any(
        not torch.equal(mine.images, other.images)
        for mine, other in zip(batches, expected, strict=True)
    )
    assert_same(
        read(index, libjpeg, repeats=repeats, first_step=3, steps=3)[0], batches[-6:], levels=0
    )


def test_what_the_device_refuses_is_read_as_the_workers_read_it(
    damaged: ShardIndex, caplog: pytest.LogCaptureFixture
) -> None:
    expected, ledger = read(damaged, None, steps=10)
    alone = []

    def refusing(files: list[Tensor]) -> list[Tensor]:
        if any(len(file) % 2 for file in files):
            raise RuntimeError("not those of odd length")
        if len(files) == 1:
            alone.append(files)
        return libjpeg(files)

    batches, bad = read(damaged, refusing, steps=10)
    assert {sample.key for sample in ledger} >= {"11"}
    assert bad == ledger
    assert_same(batches, expected, levels=0.6)
    assert [record.getMessage().partition(":")[2] for record in caplog.records] == [
        " not those of odd length"
    ]
    assert alone  # those beside a refused one were decoded all the same
    nothing, bad = read(damaged, lambda files: libjpeg([files[0][:0]]), steps=10)  # refuses all
    assert bad == ledger
    assert_same(nothing, expected, levels=0)


def test_a_device_that_breaks_ends_the_run_with_its_message(
    index: ShardIndex, damaged: ShardIndex
) -> None:
    def breaking(files: list[Tensor]) -> list[Tensor]:
        raise OSError("the device is gone")

    with pytest.raises(OSError, match="the device is gone"):
        read(index, breaking)
    with pytest.raises(TooManyBadSamples, match="max_bad_in_a_row"):
        read(damaged, libjpeg, steps=10, max_bad_in_a_row=0)


def test_decoding_runs_ahead_of_the_trainer_but_not_far() -> None:
    made: list[int] = []
    ahead = OnDevice(iter(range(100)), lambda number: made.append(number) or number, CPU, ahead=3)
    assert next(ahead) == 0
    end = time.monotonic() + 10
    while len(made) < 5 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3, 4]  # the one taken, three kept, and one in hand
    ahead.close()
    few = OnDevice(iter(range(2)), lambda number: number, CPU, ahead=3)
    assert list(few) == [0, 1]
    assert list(few) == []  # still at its end
    few.close()


@pytest.mark.parametrize("choice", ["gpu", "auto"])
def test_without_a_gpu_the_workers_decode_and_gpu_says_so(
    tiny: Path, tmp_path: Path, choice: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Folder(tmp_path / "run")
    assert (
        start(
            tiny, run.path, "schedule.steps=2", "schedule.warmup_steps=0", f"data.decode={choice}"
        )
        == 0
    )
    said = capfd.readouterr().err
    warning = (
        "data.decode=gpu: the GPU decodes no JPEG here, the workers do (rank 0: it needs a "
        "CUDA device"
    )
    assert (warning in said) == (choice == "gpu")
    with pytest.raises(RuntimeError, match="it needs a CUDA device"):
        nvjpeg(CPU, 3)
    with pytest.raises(RuntimeError, match="in_channels=4"):
        nvjpeg(torch.device("cuda"), 4)


RESIZER = DeviceResizer(CPU, (16, 24), 3)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("repeats", [1, 2])
def test_crops_resized_on_the_device_are_the_workers(
    index: ShardIndex, workers: int, repeats: int
) -> None:
    expected, _ = read(index, None, repeats=repeats)
    batches, bad = read(index, RESIZER, workers=workers, repeats=repeats)
    assert bad == []
    assert_same(batches, expected, levels=0.6)
    assert any(1 in batch.crops[:, 4] for batch in batches)  # some are flipped
    resumed, _ = read(index, RESIZER, repeats=repeats, first_step=3, steps=3)
    assert_same(resumed, batches[-6:], levels=0)


def test_a_resized_crop_does_not_depend_on_its_batch(index: ShardIndex) -> None:
    """Nor, so, on how many ranks there are."""
    halves, _ = read(index, RESIZER, micro=2)
    wholes, _ = read(index, RESIZER)
    for number, whole in enumerate(wholes):
        joined = torch.cat([half.images for half in halves[2 * number : 2 * number + 2]])
        assert torch.equal(joined, whole.images)


def test_bad_samples_are_replaced_alike_where_the_device_resizes(damaged: ShardIndex) -> None:
    expected, ledger = read(damaged, None, steps=10)
    batches, bad = read(damaged, RESIZER, steps=10)
    assert bad == ledger != []
    assert_same(batches, expected, levels=0.6)


def test_a_resized_crop_is_as_pil_has_it(photo_shards: str) -> None:
    """Each over 50 dB, those that are flipped, too."""
    size = (48, 56)
    transform = TrainTransform(size, margin=math.inf)
    resizer = DeviceResizer(CPU, size, 3)
    index = ShardIndex.open(photo_shards)
    for number in range(8):
        sample = index[number]
        data = Reader().read(sample.shard, sample.offset, sample.size)
        (view,) = transform.parts(data, 0, [number])
        images = resizer.images(torch.tensor([view.crop]), pack_boxes([view.image]))
        top, left, rows, columns, flipped = view.crop
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            part = image.convert("RGB").crop((left, top, left + columns, top + rows))
        theirs = np.asarray(part.resize(size[::-1], Image.Resampling.BICUBIC)).astype(float)
        mine = images[0].permute(1, 2, 0).numpy()
        error = ((theirs[:, ::-1] if flipped else theirs) - mine) ** 2
        assert error.mean() < 255**2 / 10**5  # 50 dB


def test_a_run_whose_crops_the_device_resizes_goes_on_as_it_began(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Folder(tmp_path / "run")
    options = ("schedule.warmup_steps=0", "schedule.steps=2")
    assert start(tiny, run.path, *options, "data.resize=device") == 0
    assert "resized on the device" in capsys.readouterr().out
    assert start(tiny, run.path, *options, "data.resize=workers") == 2
    assert "data.resize" in capsys.readouterr().err
    both = ("data.resize=device", "data.decode=auto")
    assert start(tiny, tmp_path / "other", *options, *both) == 2
    assert "leave data.resize out" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_gpu_resizes_as_the_cpu_does(index: ShardIndex) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    expected, _ = read(index, RESIZER)
    batches, _ = read(index, DeviceResizer(device, (16, 24), 3))
    on_cpu = [batch.to("cpu") for batch in batches]
    assert_same(on_cpu, expected, levels=0.01)


@pytest.mark.gpu
def test_nvjpeg_gives_nearly_the_workers_pixels(index: ShardIndex) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    expected, _ = read(index, None)
    batches, bad = read(index, nvjpeg(device, 3))
    assert bad == []
    for batch, other in zip(batches, expected, strict=True):
        error = (batch.images.cpu().double() - other.images.double()).square().mean(dim=(1, 2, 3))
        # dB; the chroma is interpolated otherwise
        assert (20 * math.log10(255) - 10 * error.log10()).min() > 38
