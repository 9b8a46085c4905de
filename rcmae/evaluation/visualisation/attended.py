"""Where a network attends, over the photograph: heads of the last block, and rollouts."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rcmae.evaluation.attention import Fusion, attention_maps, class_attention, rollout
from rcmae.evaluation.images import load_images
from rcmae.evaluation.pictures import Tile, heat, sheet, to_uint8
from rcmae.evaluation.visualisation.sources import Images, Pictures, named
from rcmae.weights.classifiers import WholeClassifier, load_classifier
from rcmae.weights.encoder import Encoder, load_encoder, pixels_of

ACROSS = 4  # pictures side by side
OVER = 0.6  # opacity of a map over the photograph
FUSIONS: tuple[Fusion, ...] = ("mean", "max", "min")  # of the heads, in rollouts


def attention(
    source: Path, images: Images, *, discard: float = 0.0, classes: Sequence[int] = ()
) -> Pictures:
    """What the class token attends to, or the patches on average where there is none: each head of
    the last block, and rollouts; per class where there is a head.

    Args:
        source: a run, a checkpoint or a file; with `classes` of a classifier.
        images: to draw.
        discard: share of the weakest attention left out of rollouts.
        classes: gradient rollout for each of these.

    Raises:
        Refused: there is no such network, or no image.
    """
    model = load_classifier(source) if classes else load_encoder(source)
    statistics = (model.mean, model.std)
    shown = load_images(images.paths, pixels_of(model), statistics, images.limit)
    photographs = to_uint8(shown.pixels, *statistics)
    maps = attention_maps(model, shown.pixels)  # [depth, B, heads, N, N]
    of_classes = {}
    names = model.class_names if isinstance(model, WholeClassifier) else ()
    for label in classes:
        wanted = torch.full((len(shown.names),), label)
        name = names[label] if label < len(names) else str(label)
        of_classes[name] = class_attention(model, shown.pixels, wanted)
    rows = []
    for image, name in enumerate(shown.names):
        tiles = [Tile(name, photographs[image])]
        weighted = {label: found[:, image] for label, found in of_classes.items()}
        for caption, values in _maps_of(model, maps[:, image], discard, weighted):
            pixels = _over(photographs[image], values.view(model.grid))
            tiles.append(Tile(caption, pixels))
        rows += [tiles[at : at + ACROSS] for at in range(0, len(tiles), ACROSS)]
    reader = "the class token attends to" if model.class_tokens else "the patches attend to"
    if model.class_tokens > 1:
        reader = f"the {model.class_tokens} class tokens attend to, in the mean"
    left_out = f", without the weakest {discard:.0%}" if discard else ""
    note = (
        f"Heads: attention in block {len(maps)}, the last. Rollout: the product over all blocks, "
        f"by the {', '.join(FUSIONS)} of the heads{left_out}. Each map has its own scale."
    )
    title = f"What {reader}: {named(model.about)}"
    scale = ("lowest", "highest weight of a map")
    return {"attention": sheet(rows, title=title, note=note, scale=scale)}


def _maps_of(
    model: Encoder, maps: Tensor, discard: float, weighted: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Caption and weight of each patch [L], for each map of an image.

    Args:
        model: whose attention it is.
        maps: [depth, heads, N, N].
        discard: share of the weakest attention left out of rollouts.
        weighted: by class, such maps weighted by the gradient of its score.
    """
    rolled = functools.partial(
        rollout, class_tokens=model.class_tokens, registers=model.num_reg_tokens
    )
    first = model.num_prefix_tokens
    readers = maps[-1, :, : model.class_tokens] if model.class_tokens else maps[-1, :, first:]
    last = readers[:, :, first:].mean(dim=1)  # [heads, L]
    for head, values in enumerate(last):
        yield f"head {head + 1}", values
    for fusion in FUSIONS:
        yield f"rollout, {fusion}", rolled(maps, fusion=fusion, discard=discard)
    for label, each in weighted.items():
        yield f"class {label}", rolled(each)


def _over(photograph: np.ndarray, values: Tensor) -> np.ndarray:
    """The photograph [H, W, 3] in grey under the colours of a map [rows, columns]."""
    height, width = photograph.shape[:2]
    grey = photograph.mean(axis=2, keepdims=True)
    colours = heat(values, (height, width))
    return ((1 - OVER) * grey + OVER * colours).round().astype(np.uint8)
