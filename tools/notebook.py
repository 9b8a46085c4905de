"""A notebook as a script: train, watch, load the encoder, look for neighbours.

Editors that know cells (`# %%`) run it cell by cell; `python tools/notebook.py` runs it whole.

    python tools/notebook.py [PHOTOS] [STEPS]
        PHOTOS: a folder of photographs; without it some are cut from those of scikit-learn

The run and the picture of neighbours go to the current folder's runs/.
"""

# %% Photographs: a folder of yours
from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import rcmae
from rcmae.data.packing.folders import walked
from rcmae.data.transforms import BadImage, decode

arguments = sys.argv[1:]
photos = Path(arguments[0] if arguments else "data/notebook/photos")
steps = int(arguments[1]) if len(arguments) > 1 else 200
if arguments and not photos.is_dir():
    sys.exit(f"no such folder: {photos}")
# one for each folder and length: another training does not meet this one
same = hashlib.sha256(str(photos.resolve()).encode()).hexdigest()[:6]
folder = Path("runs") / f"notebook-{photos.resolve().name}-{same}-{steps}"
if folder.is_dir():
    print(f"{folder} is there: it goes on, or is shown if it is finished")


def tiles_of_two_photographs(folder: Path) -> None:
    """64 tiles of each of scikit-learn's two photographs."""
    import sklearn

    draw = np.random.default_rng(0)
    for name in ("china", "flower"):
        path = Path(sklearn.__file__).parent / "datasets" / "images" / f"{name}.jpg"
        photograph = np.asarray(Image.open(path, formats=["JPEG", "PNG"]))
        (folder / name).mkdir(parents=True)
        for number in range(64):
            top, left = int(draw.integers(427 - 96)), int(draw.integers(640 - 96))
            tile = photograph[top : top + 96, left : left + 96]
            Image.fromarray(tile).save(folder / name / f"{number:02d}.jpg", quality=95)


if not photos.is_dir():
    tiles_of_two_photographs(photos)

# %% Train: a process of its own, which the kernel of a notebook does not end
run = rcmae.start(
    "rcmae_vit_s_16",
    {
        "data.images": str(photos),  # packed into shards once
        "data.workers": 1,
        "run.dir": str(folder),
        "engine.name": "local",
        "model.image_size": 64,
        "model.patch_size": 8,
        "model.embed_dim": 96,
        "model.depth": 4,
        "model.num_heads": 3,
        "model.decoder_dim": 48,
        "model.decoder_depth": 1,
        "model.decoder_heads": 3,
        "batch.images": 32,
        "schedule.steps": steps,
        "schedule.lr": 1e-3,
        "log.every_steps": 1,
    },
)

# %% Follow it: run this cell as often as you like
run.wait_for_step(min(5, steps))
print(run)
run.metrics  # a table; pandas.DataFrame(run.metrics) takes it  # noqa: B018
for step, loss in zip(run.metrics["step"][-5:], run.metrics["loss"][-5:], strict=True):
    print(f"step {step}: loss {loss:.4f}")

# %% Wait for its end (0), or stop it: run.stop() commits, and the same call of start goes on
run.wait()

# %% The encoder, and a vector of each photograph
encoder = rcmae.load_encoder(run.folder)
paths, pictures = [], []
for name in sorted(walked(photos).images):  # as the training reads a folder
    try:
        pictures.append(Image.fromarray(decode((photos / name).read_bytes())))
        paths.append(photos / name)
    except BadImage as error:
        print(f"left out: {name} ({error})")
with torch.inference_mode():
    vectors = torch.cat([encoder(encoder.transform(picture)[None]) for picture in pictures])
print(f"{len(vectors)} vectors of {vectors.shape[1]} numbers")

# %% Nearest neighbours by the cosine
directions = torch.nn.functional.normalize(vectors - vectors.mean(0))
likeness = directions @ directions.T
likeness.fill_diagonal_(-1.0)
queries = list(range(0, len(paths), max(1, len(paths) // 6)))[:6]
rows = {query: likeness[query].topk(min(5, len(paths) - 1)).indices.tolist() for query in queries}
alike = [paths[query].parent == paths[near].parent for query in queries for near in rows[query]]
print(f"{sum(alike)} of {len(alike)} neighbours lie in the photograph's own folder")

# %% A picture of them: the first of each row is the photograph, the others its neighbours
side = 96
sheet = Image.new("RGB", (6 * side, len(queries) * side))
for row, query in enumerate(queries):
    for column, number in enumerate([query, *rows[query]]):
        tile = pictures[number].resize((side, side))
        sheet.paste(tile, (column * side, row * side))
out = folder / "neighbours.png"
sheet.save(out)
print(out)
