"""What fine-tuning does to images beyond crop and flip: timm's RandAugment and random erasing,
Mixup and CutMix.

timm draws from global generators. Here they are set, for the moment, from the key of what is drawn
for (a sample's position, a step), so that a training is the same on any number of ranks, workers
and jobs. Images are mixed with those half a step further on of the same rank, which is the same
pairing at any number of ranks and micro-batches; the published code mixes a micro-batch with its
own mirror image. The mixing factor and the box are one for a whole step."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from rcmae.data.batch import Batch
from rcmae.data.draws import Purpose, raw
from rcmae.data.transforms import TrainTransform, View
from rcmae.errors import Refused
from rcmae.process import extensions  # noqa: F401, it makes timm importable beside a CPU torch

from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target
from timm.data.random_erasing import RandomErasing


@contextlib.contextmanager
def drawing(seed: int, purpose: Purpose, *where: int) -> Iterator[None]:
    """Python's, numpy's and torch's global CPU generators, set for this place and put back
    afterwards.
    """
    words = raw(seed, purpose, *where, count=3)
    before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(int(words[0]))
    np.random.seed(int(words[1] & np.uint64(0xFFFFFFFF)))
    torch.default_generator.manual_seed(int(words[2] >> np.uint64(1)))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.random.set_rng_state(before[2])


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


@dataclass(frozen=True)
class AugmentTransform:
    """A random box, flipped, then RandAugment on its pixels (Cubuk et al., 2020).

    Args:
        base: the box.
        policy: in timm's words, such as "rand-m9-mstd0.5-inc1".
        mean: of the images, 0 to 1; fills what is shifted in from outside.
    """

    base: TrainTransform
    policy: str
    mean: Sequence[float]

    def __post_init__(self) -> None:
        if self.base.in_channels != 3:
            raise Refused(
                "classify.rand_augment works on 3 channels, "
                f"model.in_channels={self.base.in_channels}"
            )
        try:
            self._make()
        except (AssertionError, ValueError, KeyError) as error:
            raise Refused(
                f"classify.rand_augment={self.policy!r} is not a policy that timm knows: {error}"
            ) from error

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of every view."""
        return self.base.image_size

    @property
    def in_channels(self) -> int:
        """Channels of every view."""
        return self.base.in_channels

    def _make(self) -> object:
        fill = tuple(round(255 * value) for value in self.mean)
        shift = int(min(self.image_size) * 0.45)  # pixels, timm's share of the image
        if not self.policy.startswith("rand"):
            raise Refused("it does not begin with rand")
        augment = rand_augment_transform(self.policy, {"translate_const": shift, "img_mean": fill})
        for op in augment.ops:
            if op.name.startswith("Posterize"):
                # timm can ask for 0 bits, which Pillow 13 refuses: black, as before
                op.aug_fn = _posterize
        return augment

    def __call__(self, data: bytes, seed: int, position: int, draw: int = 0) -> View:
        """The view of an encoded image at an absolute position of the run. Raises BadImage."""
        return self._changed(self.base(data, seed, position, draw), seed, position, draw)

    def views(self, data: bytes, seed: int, positions: Sequence[int]) -> list[View]:
        """Views of one image at several positions. Raises BadImage."""
        views = self.base.views(data, seed, positions)
        return [
            self._changed(view, seed, position, 0)
            for view, position in zip(views, positions, strict=True)
        ]

    def _changed(self, view: View, seed: int, position: int, draw: int) -> View:
        with drawing(seed, Purpose.AUGMENT, draw, position):
            changed = self._make()(Image.fromarray(view.image.permute(1, 2, 0).numpy()))  # type: ignore[operator]
        return View(torch.from_numpy(np.array(changed)).permute(2, 0, 1), view.crop)


def erase(batch: Batch, *, probability: float, seed: int) -> Batch:
    """The batch with a random rectangle of some images, in place, replaced by noise (Zhong et al.,
    2020).

    Args:
        batch: normalised images.
        probability: of an image; its draws are keyed by its position.
        seed: of the draws.
    """
    eraser = RandomErasing(probability, mode="pixel", device="cpu")
    for image, position in zip(batch.images, batch.positions.tolist(), strict=True):
        with drawing(seed, Purpose.ERASE, position):
            eraser(image)
    return batch


class Mix(NamedTuple):
    """How a step's images are mixed."""

    share: float  # of an image itself; the rest is its mate's
    # top, bottom, left, right: what is the mate's in CutMix; None: Mixup
    box: tuple[int, int, int, int] | None


@dataclass(frozen=True)
class Mixing:
    """Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019).

    Args:
        mixup: both parameters of the beta distribution of Mixup's share; 0 is never.
        cutmix: the same of CutMix.
        probability: that a step's images are mixed at all.
        switch: share of the mixed steps that CutMix gets where there are both.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0
    switch: float = 0.5

    @property
    def is_on(self) -> bool:
        """Whether anything is ever mixed."""
        return self.probability > 0 and (self.mixup > 0 or self.cutmix > 0)

    def draw(self, seed: int, step: int, size: tuple[int, int]) -> Mix:
        """How the images of a step are mixed, the same on every rank.

        `size` is theirs (height, width).
        """
        with drawing(seed, Purpose.MIX, step):
            if not self.is_on or np.random.rand() >= self.probability:
                return Mix(1.0, None)
            cut = self.cutmix > 0 and (self.mixup <= 0 or np.random.rand() < self.switch)
            alpha = self.cutmix if cut else self.mixup
            share = float(np.random.beta(alpha, alpha))
            if not cut:
                return Mix(share, None)
            box, share = cutmix_bbox_and_lam((1, 1, *size), share)
            top, bottom, left, right = (int(side) for side in box)
            return Mix(float(share), (top, bottom, left, right))


def mixed(images: Tensor, mates: Tensor, mix: Mix) -> Tensor:
    """The images [B, C, H, W], each with its share of its mate."""
    if mix.box is None:
        return images if mix.share == 1.0 else images * mix.share + mates * (1.0 - mix.share)
    top, bottom, left, right = mix.box
    images = images.clone()
    images[:, :, top:bottom, left:right] = mates[:, :, top:bottom, left:right]
    return images


def mixed_targets(
    labels: Tensor, mates: Tensor, mix: Mix, *, num_classes: int, smoothing: float
) -> Tensor:
    """What mixed images show [B, num_classes]: smoothed labels of both, by their shares."""
    both = torch.cat([labels, mates.flip(0)])  # timm mixes with the mirror image
    return mixup_target(both, num_classes, mix.share, smoothing)[: len(labels)]


def mates_of(micros: Sequence[Batch]) -> list[Batch]:
    """A rank's micro-batches of a step, each with those that it is mixed with: half the rank's
    images further on.

    Position i of a step meets position i + half a step, whatever the number of ranks and
    micro-batches."""
    images = torch.cat([batch.images for batch in micros])
    labels = torch.cat([batch.labels for batch in micros if batch.labels is not None])
    positions = torch.cat([batch.positions for batch in micros])
    half = len(images) // 2
    paired = []
    start = 0
    for batch in micros:
        rows = (torch.arange(start, start + len(batch)) + half) % len(images)
        start += len(batch)
        mate = replace(batch, images=images[rows], labels=labels[rows], positions=positions[rows])
        paired.append(replace(batch, mate=mate))
    return paired
