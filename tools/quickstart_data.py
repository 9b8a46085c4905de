#!/usr/bin/env python3
"""Make small labelled shards from the photographs that scikit-image and scikit-learn ship.

    python tools/quickstart_data.py OUT [--json]

OUT gets train-*.tar and val-*.tar of 32-pixel tiles with their index; the label of a tile is the
photograph that it was cut from (OUT/classes.txt). Each photograph is divided into squares of 64
pixels. A quarter of them, spread evenly, give the val tiles and the others the train tiles, so no
pixel is in both; the question is whether other places of the same thing are recognised, say the
moon by craters that were not seen. Nothing is downloaded or drawn at random: every call writes the
same bytes. Photographs, not digits: 8x8 digits are told apart by their pixels alone (96 % by
nearest neighbour), so a first run on them would show nothing.
Exit status: 0 written; 2 OUT cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import sklearn.datasets
from PIL import Image

from rcmae.data.packing.writer import PackingOptions, make_shards
from rcmae.errors import Refused

TILE = 32  # pixels
SQUARE = 64  # pixels
STEP = 16  # pixels by which the tiles of a square stand apart
TRAIN_TILES = 150  # of each photograph, at most
VAL_TILES = 50
# standard deviation of a tile's brightness, of 255: less is empty sky or shadow, and is left out
CONTRAST = 8.0


def photographs() -> dict[str, np.ndarray]:
    """The photographs, uint8 [H, W, 3], grey ones too.

    Their owners gave them to all: see the packages' notes.
    """
    found = {
        "astronaut": skimage.data.astronaut(),
        "bricks": skimage.data.brick(),
        "cameraman": skimage.data.camera(),
        "cat": skimage.data.chelsea(),
        "coffee": skimage.data.coffee(),
        "coins": skimage.data.coins(),
        "flower": sklearn.datasets.load_sample_image("flower.jpg"),
        "galaxies": skimage.data.hubble_deep_field(),
        "grass": skimage.data.grass(),
        "gravel": skimage.data.gravel(),
        "moon": skimage.data.moon(),
        "motorcycle": skimage.data.stereo_motorcycle()[0],
        "retina": skimage.data.retina(),
        "rocket": skimage.data.rocket(),
        "temple": sklearn.datasets.load_sample_image("china.jpg"),
        "tissue": skimage.data.immunohistochemistry(),
    }
    return {
        name: pixels if pixels.ndim == 3 else np.stack([pixels] * 3, axis=2)
        for name, pixels in found.items()
    }


def corners(height: int, width: int, *, val: bool) -> Iterator[tuple[int, int]]:
    """(top, left) of every tile of the val squares, or of the train squares, of a photograph."""
    for row in range(height // SQUARE):
        for column in range(width // SQUARE):
            if ((row + 2 * column) % 4 == 0) == val:
                for top in range(row * SQUARE, (row + 1) * SQUARE - TILE + 1, STEP):
                    for left in range(column * SQUARE, (column + 1) * SQUARE - TILE + 1, STEP):
                        yield top, left


def write_tiles(photos: Mapping[str, np.ndarray], folder: Path, *, val: bool) -> None:
    """The tiles as JPEG files, in a folder of its own for each photograph."""
    wanted = VAL_TILES if val else TRAIN_TILES
    for name, pixels in photos.items():
        (folder / name).mkdir(parents=True)
        places = corners(*pixels.shape[:2], val=val)
        tiles = {(top, left): pixels[top : top + TILE, left : left + TILE] for top, left in places}
        useful = [place for place, tile in tiles.items() if tile.mean(axis=2).std() >= CONTRAST]
        count = min(wanted, len(useful))
        for at in range(count):  # spread over the photograph
            top, left = place = useful[at * len(useful) // count]
            file = folder / name / f"{name}_{top:04d}_{left:04d}.jpg"
            Image.fromarray(tiles[place]).save(file, quality=95, subsampling=0)


def quickstart_data(out: Path) -> dict[str, Any]:
    """Write the shards, over those of an earlier call; what was made, as plain values.

    Raises:
        Refused: OUT has other shards named train or val, or another index.
        OSError: OUT cannot be a folder.
    """
    out.mkdir(parents=True, exist_ok=True)  # before the work of cutting
    photos = photographs()
    class_file = out / "classes.txt"
    ours = class_file.exists() and class_file.read_text().split() == sorted(photos)
    others = (
        []
        if ours
        else sorted(path.name for name in ("train", "val") for path in out.glob(f"{name}-*.tar"))
    )
    if others:
        raise Refused(
            f"{out} has shards of something else ({others[0]}, {len(others)} in all); take "
            "another folder"
        )
    made: dict[str, Any] = {}
    for name in ("train", "val"):
        with tempfile.TemporaryDirectory() as folder:
            write_tiles(photos, Path(folder) / name, val=name == "val")
            options = PackingOptions(name=name, samples=600, overwrite=ours)
            report = make_shards(Path(folder) / name, out, options)
        made[name] = {"shards": report.shards, "samples": report.samples, "bytes": report.bytes}
        made["classes"] = report.classes
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    try:
        made = quickstart_data(options.out)
    except (Refused, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(made, indent=1))
        return 0
    print(
        f"{options.out}: tiles of {len(made['classes'])} photographs ({', '.join(made['classes'])})"
    )
    for name in ("train", "val"):
        part = made[name]
        print(
            f"  {name}: {part['samples']:,} in {len(part['shards'])} shards, "
            f"{part['bytes'] / 1e6:.1f} MB"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
