"""The pictures of a run, small enough to travel within a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from rcmae.run.report.reading import Picture, Seen

OF_A_NAME = 4  # the first, the last, and as many between
_WIDEST = 1600  # pixels
_PLAIN_BYTES = 300_000  # a PNG up to here stays as it is
_ALL_BYTES = 8_000_000  # of a page
# of a picture's name, what it shows where the picture itself does not say it
_TOLD = {
    "segments": "image, labels, prediction, and red where they differ",
    "detections": "what is there, and what was found",
}


class Shown(NamedTuple):
    """A picture of the page."""

    step: int
    source: str  # a data: address
    width: int
    height: int


class Strip(NamedTuple):
    """A picture, as it was at some steps."""

    name: str
    shown: list[Shown]  # the newest first
    total: int  # of all that there are
    told: str = ""  # what it shows


def strips(runs: Sequence[Seen]) -> list[list[Strip]]:
    """The pictures of each run, the newest before older ones where a page would be too large."""
    left = _ALL_BYTES
    found = []
    for run in runs:
        mine = []
        for name in dict.fromkeys(picture.name for picture in run.pictures):
            same = [picture for picture in run.pictures if picture.name == name]
            shown = []
            for picture in _some(same)[::-1]:
                one = _shown(picture)
                if one is not None and len(one.source) <= left:
                    left -= len(one.source)
                    shown.append(one)
            about = _TOLD.get(name.split("-")[0], "")
            mine.append(Strip(name.replace("-", " "), shown, len(same), about))
        found.append(mine)
    return found


def _some(pictures: Sequence[Picture]) -> list[Picture]:
    """The first, the last and a few between."""
    last = len(pictures) - 1
    numbers = {round(number * last / (OF_A_NAME - 1)) for number in range(OF_A_NAME)}
    return [pictures[number] for number in sorted(numbers)]


def _shown(picture: Picture) -> Shown | None:
    """A picture as it is, or made smaller; None: it cannot be read, as where it is being pruned."""
    try:
        content = picture.path.read_bytes()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            width, height = image.size
            kind = "png"
            if len(content) > _PLAIN_BYTES:
                image.thumbnail((_WIDEST, 4 * _WIDEST))
                out = io.BytesIO()
                image.convert("RGB").save(out, "WEBP", quality=85)
                content, kind = out.getvalue(), "webp"
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    text = base64.b64encode(content).decode()
    return Shown(picture.step, f"data:image/{kind};base64,{text}", width, height)
