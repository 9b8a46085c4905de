"""A set of whole pictures judged by windows: each once over all ranks, windows of several pictures
in full batches, as many forwards on every rank."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from rcmae import dist
from rcmae.data.dense import geometry
from rcmae.data.dense.crops import Labels
from rcmae.data.dense.maps import read_map
from rcmae.data.members.whole import Whole
from rcmae.data.transforms import MAX_PIXELS, decode
from rcmae.evaluation.dense.scores import confusion
from rcmae.evaluation.dense.windows import Canvas, Size, Window, predicted
from rcmae.models.segmentation.heads import resized

_MOST_WAITING = 4  # batches of windows on a rank, before the others compute along
Score = Callable[[Tensor], Tensor]  # normalised [B, C, H, W] -> logits [B, classes, h, w]


@dataclass(frozen=True)
class Sight:
    """How pictures are seen."""

    crop: Size  # of a window
    stride: float = 2 / 3  # of the windows, as a part of the crop
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False  # the mirror image, too
    antialias: bool = False
    in_channels: int = 3

    @property
    def stride_pixels(self) -> Size:
        """Down and across."""
        height, width = (max(1, int(side * self.stride)) for side in self.crop)
        return height, width

    def sizes(self, size: Size) -> list[Size]:
        """What a picture of a size is resized to: the shorter side is the crop's (less, where it is
        over four times as long as wide); with several scales at least that of each."""
        side = min(self.crop)
        if self.scales == (1.0,):
            return [geometry.within(size, geometry.limits_of(self.crop))]
        return [geometry.at_least(size, max(side, int(side * scale))) for scale in self.scales]


class Picture(NamedTuple):
    """A sample as a worker hands it over."""

    number: int  # in its set
    size: Size
    views: list[Tensor]  # [C, h, w] uint8, one a scale
    labels: Tensor  # [height, width] uint8, of more than 255 classes int16


@dataclass(frozen=True)
class Prepare:
    """What workers make of a sample. Raises BadImage."""

    sight: Sight
    labels: Labels
    max_pixels: int = MAX_PIXELS

    def __call__(self, sample: Whole) -> Picture:
        """The picture at each scale, and its map."""
        pixels = decode(sample.image, self.sight.in_channels, max_pixels=self.max_pixels)
        size = (pixels.shape[0], pixels.shape[1])
        labels = read_map(
            sample.content["map"],
            size,
            self.labels.num_classes,
            zero_is_none=self.labels.zero_is_none,
            max_pixels=self.max_pixels,
        )
        views = scaled(torch.from_numpy(pixels).permute(2, 0, 1), self.sight)
        return Picture(sample.number, size, views, torch.from_numpy(labels))


def scaled(image: Tensor, sight: Sight) -> list[Tensor]:
    """The image [C, h, w] uint8 at each scale."""
    sizes = sight.sizes((image.shape[1], image.shape[2]))
    return [geometry.resize_image(image, size, antialias=sight.antialias) for size in sizes]


@dataclass
class _Open:
    """A picture whose windows are not all there yet."""

    picture: Picture
    canvases: list[Canvas] = field(default_factory=list)

    def prediction(self) -> Tensor:
        """[height, width] as `predicted` gives it, on the CPU."""
        logits = [canvas.logits() for canvas in self.canvases]
        return predicted(logits, self.picture.size).cpu()


class _Piece(NamedTuple):
    """A window that waits for its forward."""

    canvas: Canvas
    window: Window
    pixels: Tensor  # [C, h, w] uint8


def predictions(
    score: Score,
    pictures: Iterable[Picture | None],
    sight: Sight,
    *,
    batch: int,
    normalise: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Iterator[tuple[Picture, Tensor]]:
    """What is predicted [height, width] of each of this rank's pictures.

    Collective: every rank calls with as many turns (None: without a picture), and iterates to the
    end. The device holds the logits of the pictures that are open, in float32: classes x the pixels
    of the resized picture, for each scale and flip (1.1 GB of 150 classes at 2,048 x 512 and six
    scales), and one strip of the full-size ones.

    Args:
        score: a network; called with full batches, the last filled up with zeros.
        pictures: of this rank.
        sight: how they are seen.
        batch: windows at once.
        normalise: uint8 images on the device -> what the network was trained on.
        device: where it computes.
    """
    waiting: deque[_Piece] = deque()
    opened: deque[_Open] = deque()

    def compute(rounds: int) -> None:
        for _ in range(rounds):
            some = [waiting.popleft() for _ in range(min(batch, len(waiting)))]
            _run(score, some, sight, batch, normalise, device)

    def finished() -> Iterator[tuple[Picture, Tensor]]:
        while opened and all(canvas.is_full for canvas in opened[0].canvases):
            done = opened.popleft()
            yield done.picture, done.prediction()

    for picture in pictures:
        if picture is not None:
            opened.append(_opened(picture, sight, waiting))
        lengths = dist.gather(len(waiting))
        full = [length // batch for length in lengths]
        compute(max(full) if max(lengths) > _MOST_WAITING * batch else min(full))
        yield from finished()
    compute(max(-(-length // batch) for length in dist.gather(len(waiting))))
    yield from finished()
    assert not opened, "every window had its forward"


def _opened(picture: Picture, sight: Sight, waiting: deque[_Piece]) -> _Open:
    """The picture with its canvases, its windows at the end of those that wait."""
    opened = _Open(picture)
    for view in picture.views:
        for flipped in (False, True) if sight.flip else (False,):
            pixels = view.flip(-1) if flipped else view
            size = (pixels.shape[1], pixels.shape[2])
            canvas = Canvas(size, sight.crop, sight.stride_pixels, flipped=flipped)
            opened.canvases.append(canvas)
            for window in canvas.windows:
                part = pixels[:, window.top : window.bottom, window.left : window.right]
                waiting.append(_Piece(canvas, window, part))
    return opened


def _run(
    score: Score,
    some: list[_Piece],
    sight: Sight,
    batch: int,
    normalise: Callable[[Tensor], Tensor],
    device: torch.device,
) -> None:
    """A forward of a batch of windows; of none where the other ranks have some. What is smaller
    than the crop is padded with the mean.
    """
    images = torch.zeros(batch, sight.in_channels, *sight.crop, device=device)
    for row, piece in enumerate(some):
        pixels = normalise(piece.pixels[None].to(device))[0]
        images[row, :, : pixels.shape[1], : pixels.shape[2]] = pixels
    logits = resized(score(images).float(), sight.crop)
    for piece, row in zip(some, logits, strict=False):
        piece.canvas.add(piece.window, row)


class Shown(NamedTuple):
    """A picture to be drawn."""

    number: int
    image: Tensor  # [C, h, w] uint8
    labels: Tensor  # [height, width] uint8
    prediction: Tensor


def judge(
    score: Score,
    pictures: Iterable[Picture | None],
    sight: Sight,
    *,
    num_classes: int,
    batch: int,
    normalise: Callable[[Tensor], Tensor],
    device: torch.device,
    show: int = 0,
) -> tuple[Tensor, list[Shown]]:
    """The confusion matrix [classes, classes] int64 over the pictures of all ranks, and the first
    few pictures on rank 0. Collective: every rank calls.

    Args:
        score, pictures, sight, batch, normalise, device: as `predictions` takes them.
        num_classes: that the network tells apart.
        show: how many are to be drawn.
    """
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    shown: list[Shown] = []
    found = predictions(score, pictures, sight, batch=batch, normalise=normalise, device=device)
    for picture, prediction in found:
        matrix += confusion(picture.labels, prediction, num_classes)
        if picture.number < show:
            shown.append(Shown(picture.number, picture.views[0], picture.labels, prediction))
    every = [each for rank in dist.to_first(shown) for each in rank]
    return dist.all_sum(matrix), sorted(every, key=lambda each: each.number)
