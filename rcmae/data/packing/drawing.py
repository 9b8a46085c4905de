"""A picture of the sizes of a set's images."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from rcmae.files import aside

# pixels: classes of sizes
SIDES = (32, 64, 96, 128, 160, 224, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048)


def draw_sides(sides: dict[str, int], path: Path) -> None:
    """Draw how many images have which shorter side, as a PNG."""
    edges = [0, *SIDES, 10**9]
    counts, _ = np.histogram([int(side) for side in sides], edges, weights=list(sides.values()))
    names = [f"< {SIDES[0]}"]
    names += [f"{low} to {high - 1}" for low, high in pairwise(SIDES)]
    names += [f"{SIDES[-1]} and more"]
    image = Image.new("RGB", (640, 22 * len(names) + 40), "white")
    pen = ImageDraw.Draw(image)
    pen.text((10, 8), f"{int(counts.sum()):,} images by their shorter side in pixels", "black")
    for row, (name, count) in enumerate(zip(names, counts.tolist(), strict=True)):
        top = 32 + 22 * row
        pen.text((10, top + 3), name, "black")
        pen.rectangle((120, top, 120 + 420 * count / max(counts.max(), 1), top + 16), "steelblue")
        pen.text((550, top + 3), f"{int(count):,}", "black")
    with aside(path) as file:
        image.save(file, "PNG")
