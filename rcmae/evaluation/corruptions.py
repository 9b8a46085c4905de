"""The fifteen corruptions of ImageNet-C, computed on the fly at five severities (Hendrycks and
Dietterich, 2019).

Kinds and strengths are the publication's (section 3.1, and its code, Apache-2.0). Lengths are in
pixels of an image whose shorter side has 224; on another size they scale with it, and textures and
displacements are made at 224 and resized, so that a severity looks the same at every size. The
strength of noise is each pixel's own. What a sample gets follows from its number in its set, the
kind and the severity alone: the same on any number of ranks and workers.

Not as published: images are not stored as JPEG afterwards; displacements fall between pixels where
ImageMagick rounds; frost is drawn unless photographs of it are given, because the published ones
come without a licence."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rcmae.data.draws import Purpose, raw
from rcmae.data.transforms import BadImage, decode, resize
from rcmae.errors import Refused
from rcmae.evaluation.warping import (
    convolved,
    own_places,
    reference,
    resized,
    sampled,
    scale_of,
    smoothed,
    trail,
    zoomed,
)

SEVERITIES = (1, 2, 3, 4, 5)
Draw = np.random.RandomState  # numpy promises that its numbers never change
Setting = tuple[float, ...]


@dataclass(frozen=True)
class Corruption:
    """Changes an image, the same way whenever it is asked for the same sample.

    Args:
        name: one of KINDS.
        severity: 1 to 5.
        frost: photographs for the kind "frost"; none: it is drawn.
        seed: of all draws.
    """

    name: str
    severity: int
    frost: tuple[Path, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise Refused(f"no corruption {self.name!r}; known: {', '.join(KINDS)}")
        if self.severity not in SEVERITIES:
            raise Refused(f"severity={self.severity} of {self.name}; use 1 to 5")

    def __call__(self, image: Tensor, number: int) -> Tensor:
        """The corrupted image [C, H, W] uint8 of a sample.

        Args:
            image: [C, H, W] uint8, as it is shown to the classifier: already cut to size.
            number: of the sample in its set.
        """
        kind = KINDS[self.name]
        words = raw(self.seed, Purpose.CORRUPTION, kind.number, self.severity, number, count=2)
        draw = Draw(words.view(np.uint32))
        setting = kind.settings[self.severity - 1]
        pixels = image.float() / 255
        if self.name == "frost" and self.frost:
            shown = photograph(self.frost, draw, reference(pixels))
            changed = frosted(pixels, shown, *setting)
        else:
            changed = kind.change(pixels, draw, *setting)
        return (changed * 255).round().clamp(0, 255).byte()


# ----------------------------------------------------------------------------------------- textures


def height_map(draw: Draw, size: tuple[int, int], decay: float) -> Tensor:
    """A random landscape [h, w] from 0 to 1 by the diamond-square algorithm.

    A large `decay` makes it smooth.
    """
    side = 1 << (max(size) - 1).bit_length()
    heights = np.zeros((side, side))
    step = side
    rough = 100.0

    def middle(total: np.ndarray) -> np.ndarray:
        return total / 4 + rough * draw.uniform(-rough, rough, total.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, 0)
        heights[half::step, half::step] = middle(pairs + np.roll(pairs, -1, 1))
        middles = heights[half::step, half::step]
        heights[::step, half::step] = middle(
            middles + np.roll(middles, 1, 0) + corners + np.roll(corners, -1, 1)
        )
        heights[half::step, ::step] = middle(
            middles + np.roll(middles, 1, 1) + corners + np.roll(corners, -1, 0)
        )
        step = half
        rough /= decay
    heights = (heights - heights.min()) / (heights.max() - heights.min())
    return torch.from_numpy(heights[: size[0], : size[1]]).float()


def drawn_frost(draw: Draw, size: tuple[int, int]) -> Tensor:
    """A picture [3, h, w] of ice on a window: pale blue, thick in places, bright veins along a
    landscape's lines.
    """
    thick = height_map(draw, size, 1.9)
    fine = height_map(draw, size, 1.6)
    veins = (1 - (2 * fine - 1).abs()) ** 8
    light = (0.25 + 0.45 * thick + 0.45 * veins * thick + 0.1 * fine).clamp(0, 1)
    return light * torch.tensor([0.88, 0.94, 1.0])[:, None, None]


def photograph(files: Sequence[Path], draw: Draw, size: tuple[int, int]) -> Tensor:
    """A random part [3, *size] of a random one of some photographs, each at least of that size or
    enlarged to it.

    Raises:
        Refused: it is not an image.
    """
    pixels = opened(files[draw.randint(len(files))])
    room = max(1.0, *(side / there for side, there in zip(size, pixels.shape[:2], strict=True)))
    shown = resize(pixels, (math.ceil(pixels.shape[0] * room), math.ceil(pixels.shape[1] * room)))
    top = draw.randint(shown.shape[1] - size[0] + 1)
    left = draw.randint(shown.shape[2] - size[1] + 1)
    return shown[:, top : top + size[0], left : left + size[1]].float() / 255


_MAX_ASPECT = 16  # of a photograph of frost: it is resized until it covers the image


@functools.lru_cache(maxsize=16)
def opened(file: Path) -> np.ndarray:
    """The pixels [H, W, 3] of a photograph. Raises Refused, naming it."""
    try:
        pixels = decode(file.read_bytes())
    except (OSError, BadImage) as error:
        raise Refused(f"{file}: {error}") from error
    height, width = pixels.shape[:2]
    if max(height, width) > _MAX_ASPECT * min(height, width):
        raise Refused(f"{file}: {height} x {width} pixels are too thin for a photograph of frost")
    return pixels


# -------------------------------------------------------------------------------------- the fifteen


def gaussian_noise(image: Tensor, draw: Draw, deviation: float) -> Tensor:
    """As of too little light."""
    return image + deviation * torch.from_numpy(draw.standard_normal(tuple(image.shape))).float()


def shot_noise(image: Tensor, draw: Draw, photons: float) -> Tensor:
    """As of light that comes in quanta: so many for white."""
    return torch.from_numpy(draw.poisson((image * photons).numpy())).float() / photons


def impulse_noise(image: Tensor, draw: Draw, share: float) -> Tensor:
    """Values that are 0 or 1 for no reason."""
    fate = torch.from_numpy(draw.random_sample(tuple(image.shape))).float()
    return torch.where(fate < share / 2, 1.0, torch.where(fate < share, 0.0, image))


def defocus_blur(image: Tensor, draw: Draw, radius: float, soft: float) -> Tensor:
    """Out of focus: each point becomes a disc with a soft rim."""
    line = torch.arange(-radius - 2, radius + 3)
    disc = (line[:, None].square() + line.square() <= radius**2).float()
    disc = smoothed(disc / disc.sum(), soft, reach=(1 if radius <= 8 else 2) / soft)
    places = own_places(disc) - (radius + 2)
    kept = disc > 1e-6
    weights = disc[kept]
    return convolved(image, places[:, kept].T * scale_of(image), weights / weights.sum())


def glass_blur(image: Tensor, draw: Draw, sigma: float, reach: float, times: float) -> Tensor:
    """Through frosted glass: blurred, each pixel replaced by a near one, blurred again."""
    height, width = reference(image)
    scale = scale_of(image)
    far = int(reach)
    source = list(range(height * width))
    rows = np.arange(height - far, far, -1)
    columns = np.arange(width - far, far, -1)
    targets = (rows[:, None] * width + columns).reshape(-1)
    for _ in range(int(times)):  # one after the other: a pixel passes on what it has got
        steps = draw.randint(-far, far, size=(len(targets), 2))
        nearby = targets + steps[:, 0] * width + steps[:, 1]
        for target, near in zip(targets.tolist(), nearby.tolist(), strict=True):
            source[target] = source[near]
    at = torch.tensor(source).view(height, width)
    moved = torch.stack([at // width, at % width]) - own_places(at)  # pixels at 224
    moved = F.interpolate(moved[None], image.shape[1:], mode="nearest-exact")[0] * scale
    return smoothed(
        sampled(smoothed(image, sigma * scale), own_places(image) + moved), sigma * scale
    )


def motion_blur(image: Tensor, draw: Draw, radius: float, sigma: float) -> Tensor:
    """The camera moves, within 45 degrees of sideways."""
    taps, weights = trail(radius, sigma, draw.uniform(-45, 45))
    return convolved(image, taps * scale_of(image), weights)


def zoom_blur(image: Tensor, draw: Draw, last: float, step: float) -> Tensor:
    """The camera comes nearer: the mean of the image and of enlarged ones."""
    factors = np.arange(1, last, step).tolist()
    return (image + zoomed(image, factors).sum(0)) / (len(factors) + 1)


class Snow(NamedTuple):
    """How heavily it snows."""

    mean: float  # of the noise that flakes are made of
    deviation: float
    zoom: float  # size of a flake
    least: float  # noise below this is not a flake
    radius: float  # of the blur by the fall, pixels at 224
    sigma: float
    kept: float  # share of the image that is not whitened


def snow(image: Tensor, draw: Draw, *setting: float) -> Tensor:
    """Falling flakes, blurred by their fall, on a whitened image."""
    how = Snow(*setting)
    noise = draw.normal(how.mean, how.deviation, (1, *reference(image)))
    flakes = zoomed(torch.from_numpy(noise).float(), [how.zoom])[0]
    flakes = torch.where(flakes < how.least, 0.0, flakes).clamp(0, 1)
    flakes = convolved(flakes, *trail(how.radius, how.sigma, draw.uniform(-135, -45)))
    white = torch.maximum(image, 1.5 * grey(image) + 0.5)
    mixed = how.kept * image + (1 - how.kept) * white
    return mixed + resized(flakes + flakes.flip(1, 2), image)


def grey(image: Tensor) -> Tensor:
    """[1, H, W]: the luminance of red, green and blue, or the mean of other channels."""
    if len(image) != 3:
        return image.mean(0, keepdim=True)
    return (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)


def frost(image: Tensor, draw: Draw, kept: float, added: float) -> Tensor:
    """Ice on the window, drawn."""
    return frosted(image, drawn_frost(draw, reference(image)), kept, added)


def frosted(image: Tensor, ice: Tensor, kept: float, added: float) -> Tensor:
    """The image under a picture [3, h, w] of ice, grey where it has not three channels."""
    ice = resized(ice, image)
    return kept * image + added * (ice if len(image) == 3 else grey(ice))


def fog(image: Tensor, draw: Draw, strength: float, decay: float) -> Tensor:
    """Haze of uneven thickness; the brightest stays as bright as it was."""
    haze = resized(height_map(draw, reference(image), decay)[None], image)
    most = image.max()
    return (image + strength * haze) * most / (most + strength)


def brightness(image: Tensor, draw: Draw, more: float) -> Tensor:
    """Brighter at the same hue and saturation: the value of HSV is raised."""
    value = image.amax(0, keepdim=True)
    raised = (value + more).clamp(max=1)
    return torch.where(value > 0, image * raised / value.clamp(min=1e-6), raised)


def contrast(image: Tensor, draw: Draw, share: float) -> Tensor:
    """Nearer to each channel's mean."""
    mean = image.mean((1, 2), keepdim=True)
    return (image - mean) * share + mean


def elastic_transform(
    image: Tensor, draw: Draw, strength: float, sigma: float, shift: float
) -> Tensor:
    """Stretched and sheared: three points move by up to `shift`, then every pixel by a smooth
    random field.
    """
    size = reference(image)
    scale = scale_of(image)
    middle = torch.tensor([size[0] // 2, size[1] // 2]).float()
    arm = min(size) // 3
    points = middle + arm * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    moved = points + torch.from_numpy(draw.uniform(-shift, shift, (3, 2))).float()
    # [3, 2]: from moved places to true ones
    back = torch.linalg.solve(torch.cat([moved, torch.ones(3, 1)], 1), points)
    field = torch.from_numpy(draw.uniform(-1, 1, (2, *size))).float()
    field = smoothed(field, sigma, reach=3.0) * strength  # pixels at 224
    field = F.interpolate(field[None], image.shape[1:], mode="bilinear", align_corners=False)[0]
    places = (own_places(image) + 0.5) / scale - 0.5 + field
    places = torch.einsum("ahw,ab->bhw", places, back[:2]) + back[2][:, None, None]
    return sampled(image, (places + 0.5) * scale - 0.5)


def pixelate(image: Tensor, draw: Draw, share: float) -> Tensor:
    """Stored at a share of its size."""
    height, width = image.shape[1:]
    small = max(1, int(width * share)), max(1, int(height * share))

    def through(layer: Image.Image) -> Image.Image:
        return layer.resize(small, Image.Resampling.BOX).resize(
            (width, height), Image.Resampling.BOX
        )

    return by_pillow(image, through)


def jpeg_compression(image: Tensor, draw: Draw, quality: float) -> Tensor:
    """Stored as JPEG of this quality."""

    def through(layer: Image.Image) -> Image.Image:
        file = io.BytesIO()
        layer.save(file, "JPEG", quality=int(quality))
        return Image.open(file, formats=["JPEG"])

    return by_pillow(image, through)


def by_pillow(image: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """What Pillow makes of the image: of red, green and blue together, of other channels one by
    one.
    """
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    layers = (
        [pixels] if len(image) == 3 else [pixels[..., channel] for channel in range(len(image))]
    )
    changed = [
        np.atleast_3d(np.asarray(change(Image.fromarray(np.ascontiguousarray(layer)))))
        for layer in layers
    ]
    return torch.from_numpy(np.concatenate(changed, axis=2)).permute(2, 0, 1).float() / 255


class Kind(NamedTuple):
    """A corruption: what it does, with which settings at severities 1 to 5."""

    number: int  # part of every draw's key: never renumber
    group: Literal["noise", "blur", "weather", "digital"]
    # (image [C, H, W] from 0 to 1, Draw, *setting) -> the same, perhaps beyond 0 to 1
    change: Callable[..., Tensor]
    settings: tuple[Setting, Setting, Setting, Setting, Setting]


KINDS = {
    "gaussian_noise": Kind(
        1, "noise", gaussian_noise, ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,))
    ),
    "shot_noise": Kind(2, "noise", shot_noise, ((60,), (25,), (12,), (5,), (3,))),
    "impulse_noise": Kind(3, "noise", impulse_noise, ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,))),
    "defocus_blur": Kind(
        4, "blur", defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))
    ),
    "glass_blur": Kind(
        5, "blur", glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))
    ),
    "motion_blur": Kind(6, "blur", motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": Kind(
        7, "blur", zoom_blur, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
    ),
    "snow": Kind(
        8,
        "weather",
        snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": Kind(
        9, "weather", frost, ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))
    ),
    "fog": Kind(10, "weather", fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": Kind(11, "weather", brightness, ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,))),
    "contrast": Kind(12, "digital", contrast, ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,))),
    "elastic_transform": Kind(
        13,
        "digital",
        elastic_transform,
        (
            (488, 170.8, 24.4),
            (488, 19.52, 48.8),
            (12.2, 2.44, 4.88),
            (17.08, 2.44, 4.88),
            (29.28, 2.44, 4.88),
        ),
    ),
    "pixelate": Kind(14, "digital", pixelate, ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,))),
    "jpeg_compression": Kind(15, "digital", jpeg_compression, ((25,), (18,), (15,), (10,), (7,))),
}
