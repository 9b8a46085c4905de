"""Pictures of what a network sees and does: what it reconstructs, where it looks, how its features
lie, what its first layer has learnt; and all pictures of a run on one page.

Of a run, a checkpoint or a file of any family; drawn by one process on the CPU."""

from __future__ import annotations

import base64
import contextlib
import html
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from rcmae.data.batch import Batch
from rcmae.data.masking import random_ids, visible_count
from rcmae.errors import Refused
from rcmae.evaluation.attention import attention_maps, class_attention, rollout
from rcmae.evaluation.images import Shown, load_images
from rcmae.evaluation.pictures import (
    BLACK,
    WHITE,
    hidden_patches,
    masked_column,
    sheet,
    to_uint8,
)
from rcmae.models.build import Network
from rcmae.models.classifier import Classifier
from rcmae.models.patches import patchify, unpatchify
from rcmae.models.protocol import Output, Outputs
from rcmae.objectives import pixel_options
from rcmae.objectives.mae import PixelNorm, pixel_statistics
from rcmae.weights.classifiers import load_classifier
from rcmae.weights.encoder import (
    load_autoencoder,
    load_encoder,
    pixels_of,
    recipe_of,
    statistics_of,
)
from rcmae.weights.layouts import Which
from rcmae.weights.reading import NetworkWeights

Pictures = dict[str, np.ndarray]  # name -> pixels uint8 [H, W, 3]
Columns = list[tuple[str, np.ndarray]]  # captions, and pixels uint8 [B, H, W, 3]

STATISTICS = {
    "visible": "mean and deviation: those of the visible patches, averaged; nothing hidden is used",
    "true": "mean and deviation: the true ones of each hidden patch, which the network never saw",
    "none": "pixels as predicted",
}
NORMS: dict[str, PixelNorm | None] = {
    "unbiased": "unbiased",
    "biased": "biased",
    "channel": "channel",
    "none": None,
}
TRAINED = {  # what the network learnt to predict
    "unbiased": "trained on patches less their mean, over their deviation",
    "biased": "trained on patches less their mean, over their biased deviation",
    "channel": "trained on patches less each channel's mean, over each channel's deviation",
    None: "trained on plain pixels",
}


class Images(NamedTuple):
    """Which images are drawn."""

    paths: Sequence[Path]  # files, folders of them, shards
    limit: int  # the first so many


# -------------------------------------------------------------------------------------- reconstruct


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

    MAE's where no recipe tells.
    """
    if "recipe" not in source.metadata:
        return NORMS["unbiased"]
    pixel = pixel_options(recipe_of(source).objective)
    return pixel.norm if pixel.norm_pix_loss else None


def reconstruct(
    source: Path,
    images: Images,
    *,
    seed: int = 0,
    mask_ratio: float = 0.75,
    statistics: str = "visible",
    pixel_norm: str | None = None,
) -> Pictures:
    """A row an image: input, masked, what student and teacher make of it, pasted and raw.

    Args:
        source: a run, a checkpoint or a file with a whole network.
        images: to draw.
        seed: of the masks.
        mask_ratio: share of the patches that is hidden.
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
    batch = _masked(shown, model.num_patches, seed, mask_ratio)
    inputs = to_uint8(shown.pixels, *channels)
    columns = [("input", inputs), masked_column(batch, inputs)]
    for name, network in networks.items():
        for kind, raw in (("pasted", False), ("raw", True)):
            filled = pasted(network, batch, norm=norm, statistics=statistics, raw=raw)
            columns.append((f"{name}, {kind}", to_uint8(filled, *channels)))
    note = f"{TRAINED[norm]}; {STATISTICS[statistics if norm else 'none']}"
    return {"reconstruction": _sheet(columns, f"{about.about}. {note}", shown)}


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


def _sheet(columns: Columns, note: str, shown: Shown) -> np.ndarray:
    return sheet(columns, f"{note}. Images: {', '.join(shown.names)}")


# ---------------------------------------------------------------------------------------- attention


def heat(values: Tensor, size: tuple[int, int]) -> np.ndarray:
    """A map [rows, columns] of numbers, the largest brightest, as pixels uint8 [*size, 3], each
    number a square.
    """
    low = values.min()
    scaled = ((values - low) / (values.max() - low).clamp(min=1e-12)).numpy()
    channels = [np.clip(3 * scaled - step, 0, 1) for step in range(3)]  # red, green, blue
    pixels = (255 * np.stack(channels, axis=-1)).round().astype(np.uint8)
    return _enlarged(pixels, size)


def _enlarged(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.NEAREST))


def attention(
    source: Path, images: Images, *, discard: float = 0.0, classes: Sequence[int] = ()
) -> Pictures:
    """What the class token reads, or the patches in the mean where there is none: each head of the
    last block, and rollouts; per class where there is a head.

    Args:
        source: a run, a checkpoint or a file; with `classes` of a classifier.
        images: to draw.
        discard: share of the weakest attention left out of rollouts.
        classes: gradient rollout for each of these.

    Raises:
        Refused: there is no such network, or no image.
    """
    model = load_classifier(source) if classes else load_encoder(source)
    token = model.has_class_token
    size = pixels_of(model)
    statistics = (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    shown = load_images(images.paths, size, statistics, images.limit)
    maps = attention_maps(model, shown.pixels)  # [depth, B, heads, N, N]

    def drawn(rows: Sequence[Tensor]) -> np.ndarray:
        return np.stack([heat(row.view(model.grid), size) for row in rows])

    columns: Columns = [("input", to_uint8(shown.pixels, *statistics))]
    last = maps[-1, :, :, 0, 1:] if token else maps[-1].mean(dim=2)  # [B, heads, L]
    for head in range(maps.shape[2]):
        columns.append((f"head {head}", drawn(list(last[:, head]))))
    each = range(len(shown.names))
    for fusion in ("mean", "max", "min"):
        rows = [
            rollout(maps[:, image], fusion=fusion, discard=discard, class_token=token)
            for image in each
        ]
        columns.append((f"rollout, {fusion}", drawn(rows)))
    for label in classes:
        weighted = class_attention(model, shown.pixels, torch.full((len(each),), label))
        rows = [rollout(weighted[:, image], class_token=token) for image in each]
        columns.append((f"class {label}", drawn(rows)))
    reader = "the class token reads" if token else "the patches read, in the mean"
    note = f"what {reader}; rollout with {discard:.0%} of the weakest entries left out"
    return {"attention": _sheet(columns, f"{source}: {note}", shown)}


# ----------------------------------------------------------------------------------------- features


COLOURED = 12  # images whose tokens are shown as colours
IN_PLANE = 30  # images that a picture of vectors in the plane needs
PALETTE = (
    (31, 119, 180),
    (255, 127, 14),
    (44, 160, 44),
    (214, 39, 40),
    (148, 103, 189),
    (140, 86, 75),
    (227, 119, 194),
    (127, 127, 127),
    (188, 189, 34),
    (23, 190, 207),
)


def principal_colours(tokens: Tensor) -> Tensor:
    """[B, L, D] as colours [B, L, 3] in 0 to 1: the first three principal components over all
    tokens together.
    """
    flat = tokens.flatten(0, 1).double()
    centred = flat - flat.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    three = centred @ axes[:3].T
    low = three.quantile(0.02, dim=0)
    high = three.quantile(0.98, dim=0)
    scaled = (three - low) / (high - low).clamp(min=1e-12)
    return scaled.clamp(0, 1).view(*tokens.shape[:2], 3)


def scatter(points: np.ndarray, labels: Sequence[int], side: int = 640) -> np.ndarray:
    """Points [n, 2] as dots, coloured by label, with a legend, uint8 [side, side + 80, 3]."""
    picture = Image.new("RGB", (side + 80, side), WHITE)
    draw = ImageDraw.Draw(picture)
    low = points.min(0)
    high = points.max(0)
    at = 12 + (points - low) / np.maximum(high - low, 1e-12) * (side - 24)
    for (x, y), label in zip(at, labels, strict=True):
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), PALETTE[label % len(PALETTE)])
    for row, label in enumerate(sorted(set(labels))[: (side - 20) // 16]):
        top = 12 + 16 * row
        colour = PALETTE[label % len(PALETTE)]
        draw.rectangle((side + 8, top, side + 18, top + 10), colour)
        draw.text((side + 24, top - 2), str(label), BLACK)
    return np.asarray(picture)


def features(
    source: Path, images: Images, *, planes: Sequence[str] = ("tsne",), seed: int = 0
) -> Pictures:
    """Patch tokens of the first images as colours; of labelled ones the vectors in the plane.

    Args:
        source: a run, a checkpoint or a file.
        images: to draw.
        planes: some of PLANES.
        seed: of how these begin.

    Raises:
        Refused: there is no such network, or no image; or a package is not installed.
    """
    model = load_encoder(source)
    size = pixels_of(model)
    statistics = (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    shown = load_images(images.paths, size, statistics, images.limit)
    with torch.no_grad():
        tokens = torch.cat([model.forward_features(part) for part in shown.pixels.split(64)])
    patches = tokens[:, model.num_prefix_tokens :]

    first = min(len(shown.names), COLOURED)
    colours = (255 * principal_colours(patches[:first])).round().byte()
    squares = colours.view(first, *model.grid, 3).numpy()
    columns = [
        ("input", to_uint8(shown.pixels[:first], *statistics)),
        ("patch tokens, PCA", np.stack([_enlarged(each, size) for each in squares])),
    ]
    note = "the first three principal components over all these images as red, green, blue"
    pictures = {"features": sheet(columns, f"{source}: {note}")}
    if len(shown.names) >= IN_PLANE and min(shown.labels) >= 0:
        vectors = patches.mean(1).numpy()
        for plane in planes:
            pictures[plane] = scatter(PLANES[plane](vectors, seed), shown.labels)
    return pictures


def tsne(vectors: np.ndarray, seed: int) -> np.ndarray:
    """Vectors [n, D] as points [n, 2] by t-SNE (van der Maaten and Hinton, 2008).

    Raises Refused where its package is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise Refused("--plane tsne needs a package more: pip install scikit-learn")
    from sklearn.manifold import TSNE  # for this picture alone

    nearest = min(30, len(vectors) // 4)
    return TSNE(perplexity=nearest, init="pca", random_state=seed).fit_transform(vectors)


def umap(vectors: np.ndarray, seed: int) -> np.ndarray:
    """Vectors [n, D] as points [n, 2] by UMAP (McInnes et al., 2018).

    Raises Refused where it is not installed.
    """
    if importlib.util.find_spec("umap") is None:
        raise Refused("--plane umap needs a package more: pip install umap-learn; or --plane tsne")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its packages about themselves
        from umap import UMAP  # seconds, and a compiler: for this picture alone

        nearest = min(15, len(vectors) - 1)
        return UMAP(n_neighbors=nearest, random_state=seed, n_jobs=1).fit_transform(vectors)


PLANES: Mapping[str, Callable[[np.ndarray, int], np.ndarray]] = {"tsne": tsne, "umap": umap}


# ------------------------------------------------------------------------------------------ filters


def filters(source: Path) -> Pictures:
    """The kernels of the patch embedding, and how alike the positions are. Raises Refused."""
    model = load_encoder(source)
    return {"filters": kernels_picture(model), "positions": positions_picture(model)}


def kernels_picture(model: Classifier) -> np.ndarray:
    """The kernels of the patch embedding side by side, each scaled to the whole range."""
    kernels = model.patch_embed.proj.weight.detach()  # [D, C, p, p]
    low = kernels.amin((1, 2, 3), keepdim=True)
    high = kernels.amax((1, 2, 3), keepdim=True)
    scaled = ((kernels - low) / (high - low).clamp(min=1e-12) * 255).round().byte()[:, :3]
    if scaled.shape[1] < 3:
        scaled = scaled[:, :1].expand(-1, 3, -1, -1)
    tiles = scaled.permute(0, 2, 3, 1).numpy()
    patch = kernels.shape[-1]
    cell = patch + 1
    across = int(np.ceil(np.sqrt(len(tiles))))
    picture = np.full((across * cell, across * cell, 3), 255, np.uint8)
    for index, tile in enumerate(tiles):
        top = index // across * cell
        left = index % across * cell
        picture[top : top + patch, left : left + patch] = tile
    factor = max(1, 640 // len(picture))
    return np.repeat(np.repeat(picture, factor, 0), factor, 1)


def positions_picture(model: Classifier) -> np.ndarray:
    """For up to 5 x 5 places, how alike the embeddings of all positions are to that one's."""
    rows, columns = model.grid
    table = model.pos_embed.detach()[0, model.num_prefix_tokens :]
    table = torch.nn.functional.normalize(table, dim=1)
    size = (8 * rows, 8 * columns)
    lines = []
    for row in np.linspace(0, rows - 1, min(rows, 5)).astype(int):
        line = []
        for column in np.linspace(0, columns - 1, min(columns, 5)).astype(int):
            alike = table @ table[row * columns + column]
            line.append(heat(alike.view(rows, columns), size))
        lines.append(np.concatenate(line, 1))
    return np.concatenate(lines, 0)


# --------------------------------------------------------------------------------------------- page


def page(run: Path) -> str:
    """One HTML document with every picture of a run in it, the newest of a kind first.

    Raises Refused where there is none.
    """
    pictures = sorted((run / "pictures").glob("*.png"), reverse=True)
    if not pictures:
        raise Refused(
            f"{run / 'pictures'} has no pictures; draw some, such as: rcmae visualize filters {run}"
        )
    style = "body{font:14px sans-serif;margin:2em}img{max-width:100%}"
    parts = [
        "<!doctype html><meta charset=utf-8>",
        f"<title>{html.escape(run.name)}</title><style>{style}</style>",
        f"<h1>{html.escape(str(run))}</h1>",
    ]
    for path in pictures:
        data = base64.b64encode(path.read_bytes()).decode()
        name = html.escape(path.stem)
        parts.append(f'<h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{data}">')
    return "\n".join(parts) + "\n"
