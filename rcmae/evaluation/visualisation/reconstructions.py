"""What student and teacher reconstruct of images whose patches are hidden."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rcmae.data.batch import Batch
from rcmae.data.masking import random_ids, visible_count
from rcmae.errors import Refused
from rcmae.evaluation.images import Shown, load_images
from rcmae.evaluation.pictures import captioned, hidden_patches, masked_column, sheet, to_uint8
from rcmae.evaluation.visualisation.sources import Images, Pictures, named
from rcmae.models.build import Network
from rcmae.models.patches import patchify, unpatchify
from rcmae.models.protocol import Output, Outputs
from rcmae.objectives import pixel_options
from rcmae.objectives.mae import PixelNorm, pixel_statistics
from rcmae.weights.encoder import load_autoencoder, recipe_of, statistics_of
from rcmae.weights.layouts import Which
from rcmae.weights.reading import NetworkWeights

MASK_RATIO = 0.75  # of a network that says nothing of its training
STATISTICS = {
    "visible": "put back: mean and standard deviation of the visible patches, averaged",
    "true": "put back: the true mean and standard deviation of each hidden patch, which the "
    "network never saw",
    "none": "shown as predicted",
}
NORMS: dict[str, PixelNorm | None] = {
    "unbiased": "unbiased",
    "biased": "biased",
    "channel": "channel",
    "none": None,
}
TRAINED = {  # what the network learnt to predict
    "unbiased": "It was trained on patches normalised by their mean and standard deviation",
    "biased": "It was trained on patches normalised by their mean and biased standard deviation",
    "channel": "It was trained on patches of which each channel was normalised by its mean and "
    "standard deviation",
    None: "It was trained on plain pixels",
}


class Reconstructs(Protocol):
    """What `pasted` asks of a network."""

    patch_size: int
    image_size: tuple[int, int]
    in_channels: int

    def __call__(
        self, images: Tensor, ids_shuffle: Tensor, num_visible: int, outputs: tuple[Output, ...]
    ) -> Outputs:
        """The outputs asked for."""


def pasted(
    model: Reconstructs,
    batch: Batch,
    *,
    norm: PixelNorm | None,
    statistics: str,
    raw: bool = False,
) -> Tensor:
    """The images [B, C, H, W] as the model fills them in.

    Args:
        model: a whole network in evaluation mode.
        batch: normalised images and their masks.
        norm: by which mean and deviation the patches that it predicts are normalised; None: by
            none.
        statistics: one of STATISTICS: what puts mean and deviation back.
        raw: show the prediction of every patch; otherwise the visible ones are pasted in.
    """
    images = batch.images
    with torch.no_grad():
        every = model(images, batch.ids_shuffle, batch.num_visible, ("all_pixels",))
    predicted = every["all_pixels"]  # [B, L, p*p*C]
    true = patchify(images, model.patch_size)
    hidden = hidden_patches(batch)[..., None]  # [B, L, 1], True = hidden
    if norm is not None and statistics != "none":
        mean, variance = pixel_statistics(true, model.in_channels, norm)
        if statistics == "visible":
            mean = _mean_of_visible(mean, hidden)
            variance = _mean_of_visible(variance, hidden)
        predicted = predicted * variance.sqrt() + mean
    filled = predicted if raw else torch.where(hidden, predicted, true)
    return unpatchify(filled, model.patch_size, model.image_size, model.in_channels)


def _mean_of_visible(values: Tensor, hidden: Tensor) -> Tensor:
    """[B, 1, ...] of [B, L, ...]: over the visible patches."""
    visible = (~hidden).float()
    return (values * visible).sum(1, keepdim=True) / visible.sum(1, keepdim=True)


def norm_of(source: NetworkWeights) -> PixelNorm | None:
    """By which mean and deviation the patches that a network predicts are normalised.

    MAE's where there is no recipe.
    """
    if "recipe" not in source.metadata:
        return NORMS["unbiased"]
    pixel = pixel_options(recipe_of(source).objective)
    return pixel.norm if pixel.norm_pix_loss else None


def mask_ratio_of(source: NetworkWeights) -> float:
    """The share of the patches that the training hid; MAE's where there is no recipe."""
    if "recipe" not in source.metadata:
        return MASK_RATIO
    return float(getattr(recipe_of(source).objective, "mask_ratio", MASK_RATIO))


def reconstruct(
    source: Path,
    images: Images,
    *,
    seed: int = 0,
    mask_ratio: float | None = None,
    statistics: str = "visible",
    pixel_norm: str | None = None,
) -> Pictures:
    """A row an image: input, masked, what student and teacher make of it, pasted and raw.

    Args:
        source: a run, a checkpoint or a file with a whole network.
        images: to draw.
        seed: of the masks.
        mask_ratio: share of the patches that is hidden; None: as in the run.
        statistics: one of STATISTICS.
        pixel_norm: one of NORMS; None: as the recipe has it.

    Raises:
        Refused: there is no such network, or no image.
    """
    networks, about = _networks_of(source)
    model = next(iter(networks.values()))
    norm = NORMS[pixel_norm] if pixel_norm else norm_of(about)
    channels = statistics_of(about, model.in_channels)
    shown = load_images(images.paths, model.image_size, channels, images.limit)
    hidden = mask_ratio if mask_ratio is not None else mask_ratio_of(about)
    batch = _masked(shown, model.num_patches, seed, hidden)
    inputs = to_uint8(shown.pixels, *channels)
    columns = [("input", inputs), masked_column(batch, inputs)]
    for name, network in networks.items():
        for kind, raw in (("predicted", False), ("output", True)):
            filled = pasted(network, batch, norm=norm, statistics=statistics, raw=raw)
            columns.append((f"{name}, {kind}", to_uint8(filled, *channels)))
    rows = captioned(columns)
    for name, row in zip(shown.names, rows, strict=True):
        row[0] = row[0]._replace(caption=f"{row[0].caption} {name}".strip())
    note = (
        "Predicted: hidden patches as the network predicts them, visible ones pasted in. Output: "
        f"its prediction of every patch. {TRAINED[norm]}; "
        f"{STATISTICS[statistics if norm else 'none']}."
    )
    title = f"Reconstruction by the {named(about.about)}"
    if len(networks) == 2:
        title = title.replace("the teacher", "student and teacher", 1)
    return {"reconstruction": sheet(rows, title=title, note=note)}


def _networks_of(source: Path) -> tuple[dict[str, Network], NetworkWeights]:
    """Student and teacher, or what there is, and what is known of the last of them."""
    networks: dict[str, Network] = {}
    about = None
    both: tuple[Which, ...] = ("student", "teacher")
    for which in both:
        with contextlib.suppress(Refused):
            networks[which], about = load_autoencoder(source, network=which)
    if about is None:
        networks["network"], about = load_autoencoder(source)
    return networks, about


def _masked(shown: Shown, num_patches: int, seed: int, mask_ratio: float) -> Batch:
    orders = [random_ids(seed, index, num_patches) for index in range(len(shown.names))]
    nothing = torch.empty(0)
    return Batch(
        images=shown.pixels,
        ids_shuffle=torch.from_numpy(np.stack(orders)),
        num_visible=visible_count(num_patches, mask_ratio),
        labels=None,
        keys=tuple(shown.names),
        positions=nothing,
        crops=nothing,
    )
