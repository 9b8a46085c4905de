"""How features lie: tokens of an image as colours, images as points in the plane."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from rcmae.errors import Refused
from rcmae.evaluation.images import Shown, load_images
from rcmae.evaluation.pictures import Tile, enlarged, plotted, sheet, to_uint8
from rcmae.evaluation.visualisation.sources import Images, Pictures, named
from rcmae.weights.encoder import load_encoder, pixels_of

COLOURED = 12  # images whose tokens are shown as colours
PAIRS = 2  # of photograph and colours, side by side
IN_PLANE = 30  # images that a picture of vectors in the plane needs
IN_LEGEND = 20  # classes that are named


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
    statistics = (model.mean, model.std)
    shown = load_images(images.paths, pixels_of(model), statistics, images.limit)
    with torch.no_grad():
        tokens = torch.cat([model.forward_features(part) for part in shown.pixels.split(64)])
    patches = tokens[:, model.num_prefix_tokens :]
    first = min(len(shown.names), COLOURED)
    photographs = to_uint8(shown.pixels[:first], *statistics)
    colours = principal_colours(patches[:first]).view(first, *model.grid, 3)
    network = named(model.about)
    pictures = {"features": _coloured(shown, photographs, colours, network)}
    if len(shown.names) >= IN_PLANE and all(shown.classes):
        vectors = patches.mean(1).numpy()
        for plane in planes:
            points = PLANES[plane](vectors, seed)
            title = f"{TITLES[plane]} of {len(vectors)} images\n{network}"
            pictures[plane] = scatter(points, shown.classes, title)
    return pictures


def _coloured(shown: Shown, photographs: np.ndarray, colours: Tensor, network: str) -> np.ndarray:
    """Photographs beside their tokens' colours [B, rows, columns, 3], 0 to 1, as a grid."""
    size = (photographs.shape[1], photographs.shape[2])
    pixels = (255 * colours).round().byte().numpy()
    tiles = []
    for image, photograph in enumerate(photographs):
        tiles.append(Tile(shown.names[image], photograph))
        tiles.append(Tile("its patch tokens", enlarged(pixels[image], size)))
    rows = [tiles[at : at + 2 * PAIRS] for at in range(0, len(tiles), 2 * PAIRS)]
    note = (
        "Red, green and blue are the first three principal components over the patch tokens of all "
        "these images: patches of one colour have similar features."
    )
    return sheet(rows, title=f"Features of patches: {network}", note=note)


def scatter(points: np.ndarray, classes: Sequence[str], title: str) -> np.ndarray:
    """Points [n, 2] coloured by class, with a legend, as a picture."""
    names = sorted(set(classes))
    figure = Figure(figsize=(7.2, 5.4), dpi=100, layout="constrained")
    axis = figure.subplots()
    palette = colormaps["tab20" if len(names) > 10 else "tab10"]
    for index, name in enumerate(names):
        mine = points[[each == name for each in classes]]
        label = name if index < IN_LEGEND else None
        axis.scatter(
            mine[:, 0],
            mine[:, 1],
            s=22,
            color=palette(index % palette.N),
            label=label,
            linewidths=0,
        )
    axis.set(xticks=[], yticks=[], xlabel="no unit: near points have similar features")
    axis.set_title(title)
    more = len(names) - IN_LEGEND
    legend = axis.legend(
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        title=f"class (and {more} more)" if more > 0 else "class",
        markerscale=1.6,
        frameon=False,
    )
    legend.set_in_layout(True)
    return plotted(figure)


def tsne(vectors: np.ndarray, seed: int) -> np.ndarray:
    """Vectors [n, D] as points [n, 2] by t-SNE (van der Maaten and Hinton, 2008).

    Raises Refused where its package is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise Refused("--plane tsne needs another package: pip install scikit-learn")
    from sklearn.manifold import TSNE  # for this picture alone

    nearest = min(30, len(vectors) // 4)
    return TSNE(perplexity=nearest, init="pca", random_state=seed).fit_transform(vectors)


def umap(vectors: np.ndarray, seed: int) -> np.ndarray:
    """Vectors [n, D] as points [n, 2] by UMAP (McInnes et al., 2018).

    Raises Refused where it is not installed.
    """
    if importlib.util.find_spec("umap") is None:
        raise Refused("--plane umap needs another package: pip install umap-learn; or --plane tsne")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its packages about themselves
        from umap import UMAP  # seconds, and a compiler: for this picture alone

        nearest = min(15, len(vectors) - 1)
        return UMAP(n_neighbors=nearest, random_state=seed, n_jobs=1).fit_transform(vectors)


PLANES: Mapping[str, Callable[[np.ndarray, int], np.ndarray]] = {"tsne": tsne, "umap": umap}
TITLES = {"tsne": "t-SNE", "umap": "UMAP"}
