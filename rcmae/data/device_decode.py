"""Work of the workers that a device does: JPEGs decoded on the GPU, where workers hand over bytes
and boxes; or boxes resized and flipped, where they hand over decoded ones (`data.resize`).

For nodes with too few cores for their GPUs. Decoding is opt-in (`data.decode`): nvJPEG's pixels
differ from libjpeg-turbo's in their last bits, each image is decoded whole, and the time is taken
from the training's GPU. What nvJPEG is not sure to decode as libjpeg-turbo does (no plain JPEG, its
end missing) stays with the workers, and what it refuses is decoded again on the CPU, which has the
last word on what is readable."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Generic, Literal, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from rcmae import dist
from rcmae.config import Recipe
from rcmae.data.members.protocol import empty
from rcmae.process import extensions  # noqa: F401, torchvision imports beside a CPU torch

# encoded bytes [N] uint8 -> pixels [C, H, W] uint8 on the device
Decode = Callable[[list[Tensor]], list[Tensor]]
# what workers leave to the device: plain JPEGs to decode, or all images to resize and flip
Leaves = Literal["nothing", "jpegs", "boxes"]
Item = TypeVar("Item")
_log = logging.getLogger(__name__)


# pixels of a box to one of the image, along a side; beyond it the host resizes: a block of torch's
# CUDA kernel keeps what it reads in 48 KiB, which are full at 46
MOST_SHRUNK = 40


class Encoded(NamedTuple):
    """Images of a batch that the device is to decode. All tensors are on the CPU."""

    data: Tensor  # [bytes] uint8, the files one after the other
    ends: Tensor  # [files] int64, where each ends in `data`
    rows: Tensor  # [views] int64, row of the batch of each view
    files: Tensor  # [views] int64, which file it is of


class Boxes(NamedTuple):
    """Boxes of images, one for each row of a batch, that the device is to resize. On the CPU."""

    pixels: Tensor  # [bytes] uint8, the boxes one after the other, each [height, width, C]
    sizes: Tensor  # [B, 2] int64: height and width of each


def pack_boxes(boxes: Sequence[Tensor]) -> Boxes:
    """Boxes [C, height, width], channels last in memory, ready to travel."""
    pixels = empty((sum(box.numel() for box in boxes),), torch.uint8)
    start = 0
    for box in boxes:
        channels, height, width = box.shape
        end = start + box.numel()
        pixels[start:end].view(height, width, channels).copy_(box.permute(1, 2, 0))
        start = end
    return Boxes(pixels, torch.tensor([box.shape[1:] for box in boxes]))


def resized(box: Tensor, size: tuple[int, int]) -> Tensor:
    """A box [1, C, h, w] in another size, [C, *size] float32: bicubic, antialiased, not rounded."""
    shrinks = max(box.shape[2] / size[0], box.shape[3] / size[1])
    place = box.to("cpu") if shrinks > MOST_SHRUNK else box
    return interpolate(place.float(), size, mode="bicubic", antialias=True)[0].to(box.device)


class DeviceResizer:
    """Makes a batch's images from boxes: bicubic, antialiased, as the workers do, but rounded once
    instead of at each of its two passes (56 dB to theirs and to PIL's).

    Each image is resized by itself, so that its pixels do not depend on what lies beside it in a
    batch, thus neither on the ranks.
    """

    leaves: ClassVar[Leaves] = "boxes"

    def __init__(self, device: torch.device, image_size: tuple[int, int], channels: int) -> None:
        self.device = device
        self._size = image_size
        self._channels = channels

    def images(self, crops: Tensor, boxes: Boxes) -> Tensor:
        """[B, C, H, W] uint8 on the device.

        Args:
            crops: [B, 5] as in a batch: whether each is flipped.
            boxes: of the rows.
        """
        pixels = boxes.pixels.to(self.device, non_blocking=True)
        shape = (len(crops), self._channels, *self._size)
        images = torch.empty(shape, device=self.device)
        start = 0
        for row, (height, width) in enumerate(boxes.sizes.tolist()):
            end = start + height * width * self._channels
            box = pixels[start:end].view(1, height, width, self._channels).permute(0, 3, 1, 2)
            images[row] = resized(box, self._size)
            start = end
        rounded = images.round_().clamp_(0, 255).to(torch.uint8)
        flipped = (crops[:, 4] == 1).to(self.device, non_blocking=True)
        return torch.where(flipped[:, None, None, None], rounded.flip(-1), rounded)


def pack(files: list[tuple[bytes, list[int]]]) -> Encoded | None:
    """Files and the batch's rows that each gives, ready to travel; None if there are none."""
    if not files:
        return None
    joined = bytearray()
    ends: list[int] = []
    rows: list[int] = []
    numbers: list[int] = []
    for number, (data, views) in enumerate(files):
        joined += data
        ends.append(len(joined))
        rows += views
        numbers += [number] * len(views)
    return Encoded(
        data=torch.frombuffer(joined, dtype=torch.uint8),
        ends=torch.tensor(ends),
        rows=torch.tensor(rows),
        files=torch.tensor(numbers),
    )


def nvjpeg(device: torch.device, channels: int) -> Decode:
    """torchvision's door to nvJPEG, tried on a small image.

    Raises:
        RuntimeError: it does not decode here; says why.
    """
    if device.type != "cuda":
        raise RuntimeError(f"it needs a CUDA device, this rank trains on {device.type}")
    if channels not in (1, 3):
        raise RuntimeError(f"it decodes 1 or 3 channels, model.in_channels={channels}")
    # here: its extension is of use on CUDA alone
    from torchvision.io import ImageReadMode, decode_jpeg

    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB

    def decode(files: list[Tensor]) -> list[Tensor]:
        pixels: list[Tensor] = decode_jpeg(files, mode, device)
        return pixels

    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    decode([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)])
    return decode


class DeviceDecoder:
    """Makes a batch's images from encoded ones."""

    leaves: ClassVar[Leaves] = "jpegs"

    def __init__(self, decode: Decode, device: torch.device) -> None:
        self._decode = decode
        self.device = device
        self._refused = False

    def images(self, images: Tensor, crops: Tensor, encoded: Encoded) -> tuple[Tensor, list[int]]:
        """The images on the device, and the rows that could not be decoded there.

        Args:
            images: [B, C, H, W] uint8 on the CPU; the rows of `encoded` are to be filled.
            crops: [B, 5] as in a batch: where the box lies in the source image, and whether it is
                flipped.
            encoded: the files.
        """
        out = images.to(self.device, non_blocking=True)
        bad = []
        decoded = self._pixels(encoded)
        for row, number in zip(encoded.rows.tolist(), encoded.files.tolist(), strict=True):
            pixels = decoded[number]
            if pixels is None or pixels.shape[0] != images.shape[1]:
                bad.append(row)
                continue
            top, left, height, width, flipped = crops[row].tolist()
            box = pixels[None, :, top : top + height, left : left + width]
            size = (images.shape[2], images.shape[3])
            view = resized(box, size).round_().clamp_(0, 255)
            out[row] = (view.flip(-1) if flipped else view).to(torch.uint8)
        return out, bad

    def _pixels(self, encoded: Encoded) -> list[Tensor | None]:
        """Each file's pixels, None where the device refuses it.

        One refusal fails a whole call: then one by one.
        """
        starts = [0, *encoded.ends.tolist()]
        files = [encoded.data[start:end] for start, end in itertools.pairwise(starts)]
        try:
            return list(self._decode(files))
        except RuntimeError:
            return [self._alone(file) for file in files]

    def _alone(self, file: Tensor) -> Tensor | None:
        try:
            return self._decode([file])[0]
        except RuntimeError as error:
            if not self._refused:  # once: of a broken device every image would say it
                _log.warning(
                    "the GPU refuses a JPEG, which the CPU then decodes, as any more: %s", error
                )
            self._refused = True
            return None


class OnDevice(Generic[Item]):
    """Items of an iterator with `make` called on each, a few ahead, in a thread with a CUDA stream
    of its own.

    So decoding continues while the trainer waits for its step. What `make` or the iterator raises
    comes out in its place."""

    def __init__(
        self, items: Iterator[Item], make: Callable[[Item], Item], device: torch.device, ahead: int
    ) -> None:
        self._items = items
        self._make = make
        self._device = device
        self._made: queue.Queue[tuple[Item | None, Exception | None, torch.cuda.Event | None]] = (
            queue.Queue(ahead)
        )
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="decode on the device")
        self._thread.start()

    def __iter__(self) -> OnDevice[Item]:
        return self

    def __next__(self) -> Item:
        item, error, done = self._made.get()
        if error is not None:
            self._put((None, error, None))  # and again, if asked again
            raise error
        assert item is not None
        if done is not None:
            torch.cuda.current_stream(self._device).wait_event(done)
        return item

    def close(self) -> None:
        """End the thread and release the iterator."""
        self._closed.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._made.get_nowait()
        self._thread.join()

    def _run(self) -> None:
        cuda = self._device.type == "cuda"
        stream = torch.cuda.Stream(self._device) if cuda else None
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            while not self._closed.is_set():
                try:
                    item = self._make(next(self._items))
                except Exception as error:
                    self._put((None, error, None))
                    return
                self._put((item, None, stream.record_event() if stream is not None else None))

    def _put(self, entry: tuple[Item | None, Exception | None, torch.cuda.Event | None]) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._made.put(entry, timeout=0.1)
                return


def device_resizer(recipe: Recipe) -> DeviceResizer | None:
    """What resizes boxes where the training runs; None: data.resize leaves it to the workers."""
    if recipe.data.resize == "workers":
        return None
    return DeviceResizer(dist.device(), recipe.model.image_hw, recipe.model.in_channels)


def device_decoder(recipe: Recipe) -> DeviceDecoder | None:
    """What decodes JPEGs on the GPU; None where data.decode, or what is missing on any rank, leaves
    it to the workers.

    Collective: every rank calls.
    """
    if recipe.data.decode == "cpu":
        return None
    decode = None
    why = None
    try:
        decode = nvjpeg(dist.device(), recipe.model.in_channels)
    except (RuntimeError, ImportError, OSError) as error:
        why = str(error).splitlines()[0]
    missing = [f"rank {rank}: {text}" for rank, text in enumerate(dist.gather(why)) if text]
    if missing and recipe.data.decode == "gpu" and dist.rank() == 0:
        print(
            "warning: data.decode=gpu: the GPU decodes no JPEG here, the workers do "
            f"({missing[0]})",
            file=sys.stderr,
        )
    return None if missing or decode is None else DeviceDecoder(decode, dist.device())
