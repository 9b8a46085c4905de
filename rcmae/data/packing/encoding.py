"""An image as it goes into a shard: its own bytes, or smaller; with restart markers, if asked."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
import tifffile
from numpy.typing import NDArray
from PIL import Image

from rcmae.data.jpeg import has_restarts, restart_interval, with_restarts
from rcmae.data.packing.folders import ALIASES
from rcmae.data.packing.found import Source
from rcmae.data.tars import IMAGE_SUFFIXES
from rcmae.data.transforms import FORMATS, NPY, TIFF, BadImage, channels_of, decode, resize


class Encoding(NamedTuple):
    """How images are stored."""

    size: int | None = None  # make images smaller whose shorter side has more pixels than this
    quality: int = 90  # of the JPEG that these become
    min_size: int = 1  # leave out images whose shorter side has fewer pixels
    restart_markers: bool = False  # in JPEGs: a crop then decodes little beside itself


AS_THEY_ARE = Encoding()
# what became of an image that was to get restart markers
ADDED, HAD = "added", "there before"
NO_JPEG, DAMAGED, OTHERWISE = "no JPEG", "damaged", "the pixels would change"


class Packed(NamedTuple):
    """An image as it goes into a tar."""

    suffix: str
    data: bytes
    old: tuple[int, int]  # height and width as it was found
    new: tuple[int, int]
    restarts: str = ""  # what became of its restart markers; empty: none are asked for


def encoded(source: Source, how: Encoding) -> Packed:
    """An image: its own bytes, or a smaller JPEG. Raises BadImage, OSError."""
    size = how.size
    data = source.read()
    pixels = decode(data, channels_of(data))
    rows, columns, channels = pixels.shape
    if min(rows, columns) < how.min_size:
        raise BadImage(
            f"its shorter side has {min(rows, columns)} pixels, --min-size={how.min_size}"
        )
    old = (rows, columns)
    if size is None or min(rows, columns) <= size:
        restarts = ""
        if how.restart_markers:
            data, restarts = _with_restarts(data, pixels)
        if source.size >= 0:
            return Packed(kind_of(data), data, old, old, restarts)
        own = Path(source.path).suffix[1:].lower()
        return Packed(ALIASES.get(own, own), data, old, old, restarts)
    factor = size / min(rows, columns)
    new = (round(rows * factor), round(columns * factor))
    smaller = resize(pixels, new).permute(1, 2, 0).contiguous().numpy()
    no_jpeg = NO_JPEG if how.restart_markers else ""
    if data.startswith(NPY):
        file = io.BytesIO()
        np.save(file, smaller)
        return Packed("npy", file.getvalue(), old, new, no_jpeg)
    if channels != 3:
        file = io.BytesIO()
        tifffile.imwrite(
            file,
            smaller,
            photometric="rgb" if channels == 4 else "minisblack",
            planarconfig="contig",
        )
        return Packed("tif", file.getvalue(), old, new, no_jpeg)
    if how.restart_markers:
        return Packed("jpg", _jpeg_with_restarts(smaller, how.quality), old, new, ADDED)
    return Packed("jpg", simplejpeg.encode_jpeg(smaller, how.quality, "RGB", "420"), old, new)


def _with_restarts(data: bytes, pixels: NDArray[np.uint8]) -> tuple[bytes, str]:
    """A JPEG with restart markers and the same pixels, else itself; and which, or why not."""
    if not data.startswith(b"\xff\xd8"):
        return data, NO_JPEG
    if has_restarts(data):
        return with_restarts(data), HAD
    try:
        made = with_restarts(data)
        same = np.array_equal(decode(made, pixels.shape[2]), pixels)
    except ValueError:  # damaged, if readable
        return data, DAMAGED
    return (made, ADDED) if same else (data, OTHERWISE)


def _jpeg_with_restarts(pixels: NDArray[np.uint8], quality: int) -> bytes:
    """Pixels [H, W, 3] as a JPEG with restart markers. Pillow writes them, simplejpeg does not."""
    height, width = pixels.shape[:2]
    length = height * width // 2  # about
    interval = restart_interval((height, width), (16, 16), length)
    file = io.BytesIO()
    Image.fromarray(pixels).save(
        file, "JPEG", quality=quality, subsampling="4:2:0", restart_marker_blocks=interval
    )
    return with_restarts(file.getvalue())


def kind_of(data: bytes) -> str:
    """The suffix of an encoded image."""
    if data.startswith(NPY):
        return "npy"
    if data[:4] in TIFF:
        return "tif"  # Pillow does not know all of them
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        name = (image.format or "jpeg").lower()
    return {"jpeg": "jpg", "mpo": "jpg"}.get(name, name if name in IMAGE_SUFFIXES else "png")
