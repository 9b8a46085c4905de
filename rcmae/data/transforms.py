"""From the bytes of an image to uint8 [C, H, W]: decode, random-resized-crop or centre crop, flip;
keyed per sample.

Resizing is torch's antialiased bicubic on uint8, which is within rounding of PIL's and several
times as fast. JPEG goes through libjpeg-turbo (bit-equal to PIL at full size; at half or less where
a random box is several times the target), all else through PIL. As in the published pipelines an
EXIF rotation is not applied and transparency is dropped, so the pixels are theirs; unlike there,
16-bit grey is scaled to 8 bits instead of clipped to white. Images of other than 1 or 3 channels
are `.npy` arrays or multi-band TIFF of uint8 or uint16, with the channels last or first.
Normalisation happens on the device, where it is cheap: a quarter of the bytes travel.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from rcmae.data.batch import Batch
from rcmae.data.draws import Purpose, random_box, uniform
from rcmae.data.jpeg import Box, Header, decode_box, decode_cmyk, header, is_whole, scans
from rcmae.errors import Refused

MAX_PIXELS = 100_000_000  # of an encoded image: the default of data.max_pixels
# A file of more pixels to the byte than a photograph ever has, and of more than these in all, is
# empty, or made to fill the memory.
_MAX_PIXELS_A_BYTE = 2000
_FEW_PIXELS = 2**24
_MAX_SCANS = 100  # of a JPEG: each goes over all pixels
# All formats that are ever opened. Pillow goes by the content, whatever a file is called, and of
# some kinds it starts other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
_MAX_ASPECT = 64  # of an image over its view's; beyond, only its middle is resized
CENTRE_SHARE = 0.875  # of the shorter side that a centre crop keeps, as the field evaluates
Crop = tuple[int, int, int, int, int]  # top, left, height, width in the source image, 1 = flipped
_TRIES = 10  # random boxes that may stick out before the centre is taken
# channels -> PIL's name of the colour space; others have to be there as they are asked for
_MODES = {1: "L", 3: "RGB"}
NPY = b"\x93NUMPY"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class BadImage(ValueError):
    """The bytes are not an image that can be decoded; the message says why."""


class View(NamedTuple):
    """What a transform makes of an image."""

    image: Tensor  # [C, H, W] uint8; [C, height, width] of the box where a device resizes
    crop: Crop


class Transform(Protocol):
    """What the stream asks of a transform. The outcome depends on the arguments alone."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of every view."""

    @property
    def in_channels(self) -> int:
        """Channels of every view."""

    def __call__(self, data: bytes, seed: int, position: int, draw: int = 0) -> View:
        """The view of an encoded image at an absolute position of the run. Raises BadImage."""

    def views(self, data: bytes, seed: int, positions: Sequence[int]) -> list[View]:
        """Views of one image at several positions. Raises BadImage."""


@dataclass(frozen=True)
class TrainTransform:
    """A random box of the image, resized and flipped at random, with the statistics of
    torchvision's transforms.
    """

    image_size: tuple[int, int]  # (height, width) in pixels
    in_channels: int = 3
    scale: tuple[float, float] = (0.2, 1.0)  # area of the box over the image's
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height of the box
    flip: float = 0.5  # probability
    # JPEGs are decoded at 1/2, 1/4 or 1/8 where the box keeps this many times the target's pixels
    margin: float = 2.5
    max_pixels: int = MAX_PIXELS  # of the image

    def __post_init__(self) -> None:
        _check_channels(self.in_channels)
        for name, (low, high), limit in (
            ("crop_scale", self.scale, 1.0),
            ("crop_ratio", self.ratio, math.inf),
        ):
            if not 0 < low <= high <= limit:
                raise Refused(
                    f"data.{name}=({low}, {high}) must be two numbers in order, above 0 and up "
                    f"to {limit}"
                )
        if not self.margin >= 1:
            raise Refused(
                f"data.decode_margin={self.margin} must be at least 1; .inf decodes all at full "
                "size"
            )

    def __call__(self, data: bytes, seed: int, position: int, draw: int = 0) -> View:
        """The view of an encoded image at an absolute position of the run. Raises BadImage."""
        pixels, box = self._part(data, self._draws(seed, position, draw))
        return self._view(pixels, box, seed, position, draw)

    def views(self, data: bytes, seed: int, positions: Sequence[int]) -> list[View]:
        """Views of one image at several positions, decoded once, at full size where there are
        several.

        Raises:
            BadImage: as the call.
        """
        return [
            self._view(pixels, box, seed, position, 0)
            for position, (pixels, box) in zip(
                positions, self._parts(data, seed, positions), strict=True
            )
        ]

    def parts(self, data: bytes, seed: int, positions: Sequence[int]) -> list[View]:
        """The boxes of the views at several positions, neither resized nor flipped: for a device
        that does both.

        Raises:
            BadImage: as the call.
        """
        views = []
        for position, (pixels, box) in zip(
            positions, self._parts(data, seed, positions), strict=True
        ):
            image = torch.from_numpy(pixels).permute(2, 0, 1)
            views.append(View(image, (*box, self._flips(seed, position, 0))))
        return views

    def crops(self, data: bytes, seed: int, positions: Sequence[int]) -> list[Crop] | None:
        """What the views at several positions show of an image that a GPU may decode; None where it
        should not.

        Raises:
            BadImage: it would take more than max_pixels.
        """
        head = plain_jpeg(data, self.max_pixels) if self.in_channels in _MODES else None
        if head is None or head.colours == "RGB" or not is_whole(data):
            # YCbCr and grey are what all decoders know
            return None
        boxes = [
            self._box(head.height, head.width, self._draws(seed, position, 0))
            for position in positions
        ]
        return [
            (*box, self._flips(seed, position, 0))
            for box, position in zip(boxes, positions, strict=True)
        ]

    def _draws(self, seed: int, position: int, draw: int) -> list[float]:
        return uniform(seed, Purpose.CROP, draw, position, count=4 * _TRIES).tolist()

    def _box(self, height: int, width: int, draws: Sequence[float]) -> Box:
        return Box(*random_box(height, width, self.scale, self.ratio, draws))

    def _flips(self, seed: int, position: int, draw: int) -> int:
        return int(uniform(seed, Purpose.FLIP, draw, position, count=1)[0] < self.flip)

    def _view(
        self, pixels: NDArray[np.uint8], box: Box, seed: int, position: int, draw: int
    ) -> View:
        flipped = self._flips(seed, position, draw)
        image = resize(pixels, self.image_size)
        return View(image.flip(-1) if flipped else image, (*box, flipped))

    def _parts(
        self, data: bytes, seed: int, positions: Sequence[int]
    ) -> list[tuple[NDArray[np.uint8], Box]]:
        """Pixels and place of the boxes at several positions."""
        if len(positions) == 1:
            return [self._part(data, self._draws(seed, positions[0], 0))]
        pixels = decode(data, self.in_channels, max_pixels=self.max_pixels)
        draws = [self._draws(seed, position, 0) for position in positions]
        boxes = [self._box(pixels.shape[0], pixels.shape[1], each) for each in draws]
        return [(box.of(pixels), box) for box in boxes]

    def _part(self, data: bytes, draws: Sequence[float]) -> tuple[NDArray[np.uint8], Box]:
        """The pixels of a random box, shrunken or not, and the box."""
        head = plain_jpeg(data, self.max_pixels) if self.in_channels in _MODES else None
        if head is None:
            pixels = decode(data, self.in_channels, max_pixels=self.max_pixels)
            box = self._box(pixels.shape[0], pixels.shape[1], draws)
            return box.of(pixels), box
        box, shrink = shrunken(
            self._box(head.height, head.width, draws), self.image_size, self.margin
        )
        try:
            return decode_box(data, box, shrink, self.in_channels, head), box
        except ValueError:
            pixels = decode(data, self.in_channels, max_pixels=self.max_pixels)  # if PIL can
            return box.of(pixels), box


@dataclass(frozen=True)
class CentreTransform:
    """The centre of the image, for evaluation: shorter side resized to the target's / 0.875, then
    cut.

    An image smaller than that is not blown up further than the target needs, so 32-pixel images
    stay what they are."""

    image_size: tuple[int, int]  # (height, width) in pixels
    in_channels: int = 3
    max_pixels: int = MAX_PIXELS  # of the image

    def __post_init__(self) -> None:
        _check_channels(self.in_channels)

    def __call__(self, data: bytes, seed: int, position: int, draw: int = 0) -> View:
        """The view of an encoded image, the same at every position. Raises BadImage."""
        return self.of(decode(data, self.in_channels, max_pixels=self.max_pixels))

    def of(self, pixels: NDArray[np.uint8]) -> View:
        """The view of decoded pixels [h, w, C]. Raises MemoryError."""
        height, width = self.image_size
        middle = _middle(pixels.shape[0], pixels.shape[1], height / width)
        pixels = middle.of(pixels)
        rows, columns = pixels.shape[:2]
        needed = max(height / rows, width / columns)
        factor = max(needed, min(needed / CENTRE_SHARE, 1.0))
        # As torchvision's Resize: the longer side is rounded down; the tolerance keeps the shorter
        # one exact.
        size = (math.floor(rows * factor + 1e-6), math.floor(columns * factor + 1e-6))
        top = round((size[0] - height) / 2)
        left = round((size[1] - width) / 2)
        image = resize(pixels, size)[:, top : top + height, left : left + width]
        box = tuple(round(length / factor) for length in (top, left, height, width))
        return View(image, (box[0] + middle.top, box[1] + middle.left, box[2], box[3], 0))


class Normalise:
    """uint8 images on a device -> float32 with the given mean and standard deviation of each
    channel taken out.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu"
    ) -> None:
        self._mean = torch.tensor(mean, dtype=torch.float32, device=device)[:, None, None]
        self._std = torch.tensor(std, dtype=torch.float32, device=device)[:, None, None]

    def images(self, images: Tensor) -> Tensor:
        """[B, C, H, W] uint8 -> float32."""
        return images.float().div_(255).sub_(self._mean).div_(self._std)

    def __call__(self, batch: Batch) -> Batch:
        """The batch with its images normalised."""
        return replace(batch, images=self.images(batch.images))


def channels_of(data: bytes) -> int:
    """Channels of an encoded image: an array's own (.npy, or TIFF of other than 1 or 3 bands), 3 of
    all else.

    Channels are the last axis of an array, or the first where that is shorter.
    """
    try:
        if data.startswith(NPY):
            shape = _array(data).shape
        elif data[:4] in TIFF:
            with tifffile.TiffFile(io.BytesIO(data)) as tiff:
                shape = tiff.series[0].shape
        else:
            return 3
    except Exception:  # damaged: decode() says how
        return 3
    channels = 1 if len(shape) == 2 else min(shape[-1], shape[0]) if len(shape) == 3 else 3
    return 3 if channels in _MODES and not data.startswith(NPY) else channels


def decode(
    data: bytes, channels: int = 3, *, strict: bool = False, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """The pixels of an encoded image, [H, W, channels].

    Args:
        data: the file.
        channels: as many are wanted.
        strict: refuse damage that decoders can get over: a JPEG that libjpeg-turbo warns of, a PNG
            with a wrong CRC.
        max_pixels: an image of more is refused before it takes memory.

    Raises:
        BadImage: the bytes are not an image, are cut short or damaged, or would take more pixels or
            more memory than there is.
    """
    head = plain_jpeg(data, max_pixels)
    if channels not in _MODES:
        head = None
    if head is not None:
        try:
            whole = Box(0, 0, head.height, head.width)
            return decode_box(data, whole, channels=channels, head=head)
        except (ValueError, MemoryError) as error:
            if strict:
                raise BadImage(str(error)) from None
            # PIL has the last word on what is readable
    try:
        if data.startswith(NPY):
            values = _array(data)
            _refuse_bombs(values.shape, channels, len(data), max_pixels)
            return _bands(values, channels)
        if channels not in _MODES and data[:4] in TIFF:
            with tifffile.TiffFile(io.BytesIO(data)) as tiff:
                _refuse_bombs(tiff.series[0].shape, channels, len(data), max_pixels)
                return _bands(tiff.series[0].asarray(), channels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd metadata, and on large images below the limit
            if strict:
                if data.startswith(b"\xff\xd8"):
                    decode_cmyk(data)
                with _opened(data, max_pixels) as image:
                    image.verify()  # reads the CRCs; nothing can be read of the image then
            with _opened(data, max_pixels) as image:
                return (
                    _pixels(image, channels)
                    if channels in _MODES
                    else _bands(np.array(image), channels)
                )
    except BadImage:
        raise
    except MemoryError as error:
        raise BadImage("there is not enough memory to decode it") from error
    except UnidentifiedImageError:  # its message is the address of our buffer
        raise BadImage(f"no image of a format that is read ({', '.join(FORMATS)})") from None
    except Exception as error:  # PIL's plugins raise whatever damaged bytes lead them to
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    """An image of one of the FORMATS, of which only the header is read. Raises as Pillow does."""
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # the user's limit, not Pillow's
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _refuse_bombs((image.height, image.width), 1, len(data), max_pixels)
    return image


def _array(data: bytes) -> NDArray[np.generic]:
    """The array of a `.npy` file, a view of its bytes.

    Objects are refused, they would need pickle.
    """
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran, kind = read_header(file)
    if kind.hasobject:
        raise BadImage("its array holds objects, not numbers")
    values = np.frombuffer(data, kind, math.prod(shape), file.tell())
    return values.reshape(shape, order="F" if fortran else "C")


def _refuse_bombs(shape: Sequence[int], channels: int, size: int, max_pixels: int) -> None:
    """Raise BadImage where an image would fill the memory.

    Args:
        shape: its sides in pixels, or of an array with its channels.
        channels: that are in `shape`; 1: none.
        size: bytes of the file.
        max_pixels: the limit.
    """
    pixels = math.prod(shape) // channels
    told = " x ".join(map(str, shape))
    if pixels > max_pixels:
        raise BadImage(f"{told} pixels are more than data.max_pixels={max_pixels}")
    if pixels > max(_FEW_PIXELS, _MAX_PIXELS_A_BYTE * size):
        raise BadImage(f"{told} pixels in {size} bytes: it is empty, or made to fill the memory")


def _bands(values: NDArray[np.generic], channels: int) -> NDArray[np.uint8]:
    """[H, W, channels] uint8 of an array with the channels last or first.

    16-bit values are scaled to 8.
    """
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim == 3 and values.shape[2] != channels and values.shape[0] == channels:
        values = values.transpose(1, 2, 0)
    if values.ndim != 3 or values.shape[2] != channels or 0 in values.shape:
        shape = " x ".join(map(str, values.shape))
        raise BadImage(
            f"it is an array of {shape}, expected height x width x {channels} (model.in_channels)"
        )
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) + 128) // 257
    elif values.dtype != np.uint8:
        raise BadImage(f"its values are {values.dtype}, of unknown range; store uint8 or uint16")
    # a copy: what lies in the file's bytes cannot be written to
    return np.array(values, np.uint8, order="C")


def plain_jpeg(data: bytes, max_pixels: int = MAX_PIXELS) -> Header | None:
    """The header of a JPEG that libjpeg-turbo turns into RGB or grey; None for all else.

    Raises:
        BadImage: it would take more pixels, or goes over them more often, than any image needs.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        head = header(data)
    except ValueError:
        head = None
    if head is None or head.layout is None:
        try:
            found = scans(data, above=_MAX_SCANS)
        except ValueError as error:
            raise BadImage(f"a JPEG with {error}") from None
        if found > _MAX_SCANS:
            raise BadImage(f"a JPEG of {found} scans, more than {_MAX_SCANS}")
    if head is None:
        return None
    _refuse_bombs((head.height, head.width), 1, len(data), max_pixels)
    return head if head.plain else None


def shrunken(box: Box, target: tuple[int, int], margin: float) -> tuple[Box, int]:
    """By how much a box may be shrunk in decoding (1, 2, 4 or 8) to keep `margin` times the target
    on both sides.

    The box is moved to whole pixels of the shrunken image, by less than one of them, so that
    nothing has to be resampled at a fraction of a pixel: a random box of a large photograph is as
    good there as where it was."""
    room = min(box.height / target[0], box.width / target[1]) / margin
    shrink = max(factor for factor in (1, 2, 4, 8) if factor == 1 or factor <= room)
    top, left, height, width = (number // shrink * shrink for number in box)
    return Box(top, left, height, width), shrink


def _pixels(image: Image.Image, channels: int) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion would clip it at 255
        grey = (np.array(image).astype(np.int64).clip(0, 65535) + 128) // 257
        return np.repeat(grey.astype(np.uint8)[:, :, None], channels, axis=2)
    if image.mode == "F":
        raise BadImage("its pixels are floating-point numbers of unknown range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    pixels = np.array(image.convert(_MODES[channels]))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def resize(pixels: NDArray[np.uint8], size: tuple[int, int]) -> Tensor:
    """[h, w, C] resized to [C, *size] uint8: bicubic, antialiased.

    Raises MemoryError.
    """
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    if image.shape[1:] == size:
        return image
    try:
        return interpolate(image[None], size, mode="bicubic", antialias=True)[0]
    except RuntimeError as error:
        if "alloc" in str(error):  # torch has no class of its own for it
            raise MemoryError(str(error)) from error
        raise


def _middle(rows: int, columns: int, aspect: float) -> Box:
    """The part of an image that a centre crop looks at: all, but of a thread of pixels, whose
    resized length no memory would hold, the middle.

    Args:
        rows, columns: size of the image.
        aspect: height over width of the view.
    """
    height = min(rows, math.ceil(columns * aspect * _MAX_ASPECT))
    width = min(columns, math.ceil(rows / aspect * _MAX_ASPECT))
    return Box((rows - height) // 2, (columns - width) // 2, height, width)


def _check_channels(channels: int) -> None:
    if channels < 1:
        raise Refused(f"model.in_channels={channels} must be at least 1")
