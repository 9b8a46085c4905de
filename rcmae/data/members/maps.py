"""Maps: a PNG beside an image with a class for each pixel.

One channel of 8 or 16 bits, or a palette, of which the numbers count and not the colours. The
largest number (255, or 65535 of 16 bits) is no label."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rcmae.data.members.kinds import Beside, Facts
from rcmae.data.sets import lines_of
from rcmae.data.transforms import MAX_PIXELS, BadImage

_PNG = b"\x89PNG\r\n\x1a\n"
_IHDR = 8 + 8 + 13  # bytes up to the end of the fields that are read
_GREY, _PALETTE = 0, 3
_COLOURS = {2: "RGB", 4: "grey with transparency", 6: "RGBA"}
_NAMED = 3  # classes that a message names


class _Header(NamedTuple):
    """What a PNG begins with."""

    height: int
    width: int
    depth: int  # bits of a channel
    colours: int


def decode_map(
    data: bytes,
    size: tuple[int, int] | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
    strict: bool = False,
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """The numbers of a map, [H, W] uint8, or uint16 of a file of 16 bits.

    Args:
        data: the file.
        size: (height, width) that it must have, its image's; None: any up to max_pixels.
        max_pixels: a larger one is refused before it takes memory.
        strict: refuse a wrong CRC, too.

    Raises:
        BadImage: it is no map, of another size than its image, cut short or damaged.
    """
    head = _header(data)
    if size is not None and (head.height, head.width) != size:
        raise BadImage(
            f"its map has {head.width} x {head.height} pixels, its image {size[1]} x {size[0]}"
        )
    if head.height * head.width > max_pixels:
        raise BadImage(f"its map has {head.width} x {head.height} pixels, more than {max_pixels:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on large images below our limit, odd metadata
            if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
                Image.MAX_IMAGE_PIXELS = max_pixels
            if strict:
                with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                    image.verify()
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                numbers = np.array(image)
    except MemoryError as error:
        raise BadImage("there is not enough memory to decode its map") from error
    except Exception as error:  # Pillow raises whatever damaged bytes lead it to
        raise BadImage(f"its map does not decode ({type(error).__name__}: {error})") from error
    if head.depth == 16:
        return np.ascontiguousarray(numbers, dtype=np.uint16)
    return np.ascontiguousarray(numbers, dtype=np.uint8)


def _header(data: bytes) -> _Header:
    """The header of a map. Raises BadImage where it is none."""
    if not data.startswith(_PNG) or len(data) < _IHDR or data[12:16] != b"IHDR":
        raise BadImage("its map is no PNG")
    width = int.from_bytes(data[16:20], "big")
    height = int.from_bytes(data[20:24], "big")
    head = _Header(height, width, data[24], data[25])
    if head.colours in _COLOURS:
        raise BadImage(
            f"its map is {_COLOURS[head.colours]}; wanted is one channel of 8 or 16 bits, or a "
            "palette, a class a pixel"
        )
    if head.colours not in (_GREY, _PALETTE) or (head.colours == _GREY and head.depth < 8):
        raise BadImage(
            f"its map has {head.depth} bits a pixel; wanted is one channel of 8 or 16 bits, or a "
            "palette"
        )
    return head


def encode_map(numbers: NDArray[np.uint8] | NDArray[np.uint16]) -> bytes:
    """A map as a PNG of one channel."""
    file = io.BytesIO()
    Image.fromarray(numbers).save(file, "PNG", optimize=False)
    return file.getvalue()


def no_label(numbers: NDArray[np.unsignedinteger]) -> int:
    """The number that is no label in a map of this type."""
    return int(np.iinfo(numbers.dtype).max)


def nearest(
    numbers: NDArray[np.unsignedinteger], size: tuple[int, int]
) -> NDArray[np.unsignedinteger]:
    """A map at another size: the number of the pixel whose middle is nearest."""
    places = [
        np.minimum(((np.arange(new) + 0.5) * (old / new)).astype(np.int64), old - 1)
        for old, new in zip(numbers.shape, size, strict=True)
    ]
    return numbers[places[0]][:, places[1]]


class Maps:
    """The kind `map`."""

    name = "map"
    suffix = "seg.png"
    beside = "classes.txt"

    def read_beside(self, text: str) -> Sequence[str]:
        """The names of the classes."""
        return lines_of(text)

    def verify(self, data: bytes, size: tuple[int, int] | None, beside: Beside) -> Facts:
        """Pixels and images of each class. Raises BadImage."""
        numbers = decode_map(data, size, strict=True)
        counts = np.bincount(numbers.reshape(-1))
        classes = {each: int(counts[each]) for each in np.flatnonzero(counts).tolist()}
        pixels = Counter({str(each): count for each, count in classes.items()})
        if (unlabelled := pixels.pop(str(no_label(numbers)), 0)) > 0:
            classes.pop(no_label(numbers))
        if beside is not None:
            self._refuse_beyond(classes, len(beside))
        return {
            "pixels": pixels,
            "images": Counter(dict.fromkeys(pixels, 1)),
            "no_label": Counter({"pixels": unlabelled} if unlabelled else {}),
        }

    def _refuse_beyond(self, classes: Mapping[int, int], known: int) -> None:
        beyond = [each for each in classes if each >= known]
        if not beyond:
            return
        named = ", ".join(f"{each} ({classes[each]:,} pixels)" for each in beyond[:_NAMED])
        hint = ""
        if beyond == [known]:
            hint = f"; they run to {known}: if zero is no label, set segment.map_zero=none"
        raise BadImage(
            f"its map has {len(beyond)} numbers that {self.beside} with its {known} classes does "
            f"not name: {named}{hint}"
        )

    def resized(self, data: bytes, old: tuple[int, int], new: tuple[int, int]) -> bytes:
        """The map at another size, nearest. Raises BadImage."""
        return encode_map(nearest(decode_map(data, old), new))

    def report(self, facts: Facts, beside: Beside) -> list[str]:
        """Pixels and images of each class, for people."""
        pixels = facts.get("pixels", Counter())
        unlabelled = facts.get("no_label", Counter())["pixels"]
        whole = pixels.total() + unlabelled
        lines = [f"{len(pixels)} classes in maps; {unlabelled / max(whole, 1):.1%} without label"]
        for number in sorted(map(int, pixels)):
            count = pixels[str(number)]
            name = f" {beside[number]}" if beside is not None and number < len(beside) else ""
            lines.append(
                f"class {number}{name}: {count:,} pixels ({count / whole:.2%}) in "
                f"{facts['images'][str(number)]:,} images"
            )
        return lines
