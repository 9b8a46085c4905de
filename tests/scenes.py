"""Small photographs with maps, packed as anybody's tar, and a recipe that segments them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import sklearn
from numpy.typing import NDArray
from PIL import Image

CLASSES = ("dark left", "dark right", "bright left", "bright right", "unseen")


def scene(number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A tile of a photograph of odd size, and its map: classes by side and brightness, none in the
    topmost rows."""
    folder = Path(sklearn.__file__).parent / "datasets" / "images"
    name = ("china.jpg", "flower.jpg")[number % 2]
    photograph = np.asarray(Image.open(folder / name, formats=["JPEG"]))
    draw = np.random.default_rng(number)
    height, width = draw.integers(21, 50, 2)
    top, left = draw.integers(0, 427 - height), draw.integers(0, 640 - width)
    image = photograph[top : top + height, left : left + width]
    bright = image.mean(axis=2) > np.median(image.mean(axis=2))
    right = np.arange(width)[None] >= width // 2
    values = (2 * bright + right).astype(np.uint8)
    values[:2] = 255
    return image, values


def png(values: NDArray[np.generic]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def pack(path: Path, members: dict[str, bytes]) -> None:
    """A tar of these members, in their order."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def members(numbers: range) -> dict[str, bytes]:
    """Of scenes: image and map."""
    found = {}
    for number in numbers:
        image, values = scene(number)
        found[f"{number:04d}.png"] = png(image)
        found[f"{number:04d}.seg.png"] = png(values)
    return found


def write_scenes(folder: Path) -> Path:
    """A folder with train.tar, val.tar, classes.txt and the recipe, whose path it gives."""
    folder.mkdir(parents=True, exist_ok=True)
    pack(folder / "train.tar", members(range(24)))
    pack(folder / "val.tar", members(range(100, 107)))
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    recipe = folder / "scenes.yaml"
    recipe.write_text(
        f"""
task: {{name: segment}}
model: {{name: vit_tiny_patch16, patch_size: 4, embed_dim: 16, depth: 4, num_heads: 2}}
engine: {{name: local, precision: fp32}}
data: {{shards: {folder}/train.tar, workers: 0, canonical_streams: 8, shuffle_window: 8}}
batch: {{images: 4}}
schedule: {{shape: poly, steps: 6, warmup: multiply, warmup_steps: 2, warmup_from: 1.0e-6,
            lr: 2.0e-3, betas: [0.9, 0.999], clip_grad: 3.0}}
segment: {{crop: 16, levels: [0, 1, 2, 3], width: 8, drop_path: 0.2, layer_decay: 0.8}}
checkpoint: {{every_steps: 2, background: false}}
evaluate: {{every_steps: 6, test_shards: {folder}/val.tar, batch: 4}}
log: {{every_steps: 1, tensorboard: false, report: false}}
"""
    )
    return recipe
