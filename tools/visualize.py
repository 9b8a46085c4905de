#!/usr/bin/env python3
"""Pictures of what a network sees and does, of a run, a checkpoint or a file of any family.

    python tools/visualize.py reconstruct RUN --images photos/ --out pictures/
        input, masked, student, teacher
    python tools/visualize.py attention RUN --images photo.jpg --out pictures/
        heads of the last block, rollout
    python tools/visualize.py features RUN --images shard.tar --out pictures/
        tokens by PCA, images by t-SNE, UMAP
    python tools/visualize.py filters RUN --out pictures/
        patch embedding, positions
    python tools/visualize.py page RUN
        RUN/pictures as one HTML file

Images are files, folders of them, or shards. Exit status: 0 written; 2 these do not go together; 1
anything else."""

from __future__ import annotations

import argparse
import base64
import contextlib
import html
import importlib.util
import sys
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from rcmae.checkpoint import CheckpointError
from rcmae.data.batch import Batch
from rcmae.data.masking import random_ids, visible_count
from rcmae.data.transforms import CentreTransform, Normalise
from rcmae.errors import Refused
from rcmae.evaluation.attention import attention_maps, class_attention, rollout
from rcmae.evaluation.pictures import GREY, hidden_patches, save_png, sheet, to_uint8
from rcmae.models.vit import patchify, unpatchify
from rcmae.objectives import pixel_options
from rcmae.objectives.mae import PixelNorm, pixel_statistics
from rcmae.weights.encoder import (
    load_autoencoder,
    load_classifier,
    load_encoder,
    recipe_of,
    statistics_of,
)
from rcmae.weights.reading import NetworkWeights

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")
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


Statistics = tuple[Sequence[float], Sequence[float]]  # mean and deviation of each channel, 0 to 1


class Shown(NamedTuple):
    """Images to draw."""

    pixels: Tensor  # [B, C, H, W] normalised
    names: list[str]
    labels: list[int]  # -1 where there is none


# ------------------------------------------------------------------------------------------- images


def encoded(paths: Sequence[Path]) -> Iterator[tuple[str, bytes, int]]:
    """(name, bytes, label or -1) of every image under these files, folders and shards, in the
    order of their names.
    """
    for path in paths:
        if path.is_dir():
            yield from encoded(
                sorted(
                    each for each in path.iterdir() if each.suffix.lower() in (*SUFFIXES, ".tar")
                )
            )
        elif path.suffix == ".tar":
            yield from in_shard(path)
        else:
            yield path.name, path.read_bytes(), -1


def in_shard(path: Path) -> Iterator[tuple[str, bytes, int]]:
    """The images of a WebDataset shard with their labels."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            file = tar.extractfile(member)
            if file is not None:
                if found and key not in found:
                    yield from of_sample(found)
                    found = {}
                found.setdefault(key, {})[suffix] = file.read()
    yield from of_sample(found)


def of_sample(found: dict[str, dict[str, bytes]]) -> Iterator[tuple[str, bytes, int]]:
    """The image of a sample."""
    for key, parts in found.items():
        for suffix, data in parts.items():
            if f".{suffix}" in SUFFIXES:
                yield key, data, int(parts["cls"]) if "cls" in parts else -1


def load_images(
    paths: Sequence[Path], size: tuple[int, int], statistics: Statistics, count: int
) -> Shown:
    """The first `count` images, cut at the centre to `size`, normalised by mean and deviation of
    each channel.

    Raises:
        ValueError: there is none, or one is no image.
    """
    transform, pixels, names, labels = CentreTransform(size, len(statistics[0])), [], [], []
    for name, data, label in encoded(paths):
        pixels.append(transform(data, 0, 0).image)
        names.append(name)
        labels.append(label)
        if len(names) == count:
            break
    if not names:
        raise Refused(
            f"no image in {', '.join(map(str, paths))}; give files ending in {', '.join(SUFFIXES)}"
        )
    return Shown(Normalise(*statistics).images(torch.stack(pixels)), names, labels)


# -------------------------------------------------------------------------------------- reconstruct


def pasted(
    model: Any, batch: Batch, *, norm: PixelNorm | None, statistics: str, raw: bool = False
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
        predicted = model(images, batch.ids_shuffle, batch.num_visible, what="all")  # [B, L, p*p*C]
    true = patchify(images, model.patch_size)
    hidden = hidden_patches(batch)[..., None]  # [B, L, 1], True = hidden
    if norm is not None and statistics != "none":
        mean, variance = pixel_statistics(true, model.in_channels, norm)
        if statistics == "visible":
            share = (~hidden).float()
            mean, variance = (
                (part * share).sum(1, keepdim=True) / share.sum(1, keepdim=True)
                for part in (mean, variance)
            )
        predicted = predicted * variance.sqrt() + mean
    filled = predicted if raw else torch.where(hidden, predicted, true)
    return unpatchify(filled, model.patch_size, model.image_size, model.in_channels)


def norm_of(source: NetworkWeights) -> PixelNorm | None:
    """By which mean and deviation the patches that a network predicts are normalised.

    MAE's where no recipe tells.
    """
    if "recipe" not in source.metadata:
        return NORMS["unbiased"]
    pixel = pixel_options(recipe_of(source).objective)
    return pixel.norm if pixel.norm_pix_loss else None


def reconstruct(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """A row an image: input, masked, what student and teacher make of it, pasted and raw."""
    networks, source = {}, None
    for which in ("student", "teacher"):
        with contextlib.suppress(ValueError):
            networks[which], source = load_autoencoder(options.source, network=which)
    if not networks:
        networks["network"], source = load_autoencoder(options.source)
    assert source is not None
    model = next(iter(networks.values()))
    norm = NORMS[options.pixel_norm] if options.pixel_norm else norm_of(source)
    statistics = statistics_of(source, model.in_channels)
    shown = load_images(options.images, model.image_size, statistics, options.count)
    ids = np.stack(
        [random_ids(options.seed, index, model.num_patches) for index in range(len(shown.names))]
    )
    nothing = torch.empty(0)
    batch = Batch(
        shown.pixels,
        torch.from_numpy(ids),
        visible_count(model.num_patches, options.mask_ratio),
        None,
        tuple(shown.names),
        nothing,
        nothing,
    )
    columns = [("input", to_uint8(shown.pixels, *statistics))]
    cover = hidden_patches(batch).view(len(ids), -1, model.image_size[1] // model.patch_size)
    cover = cover.repeat_interleave(model.patch_size, 1).repeat_interleave(model.patch_size, 2)
    masked = np.where(cover[..., None].numpy(), np.uint8(GREY[0]), columns[0][1])
    columns.append((f"masked, {1 - batch.num_visible / model.num_patches:.0%} hidden", masked))
    for name, network in networks.items():
        for what, raw in ((f"{name}, pasted", False), (f"{name}, raw", True)):
            filled = pasted(network, batch, norm=norm, statistics=options.statistics, raw=raw)
            columns.append((what, to_uint8(filled, *statistics)))
    note = f"{TRAINED[norm]}; {STATISTICS[options.statistics if norm else 'none']}"
    return {
        "reconstruction": sheet(
            columns, f"{source.about}. {note}. Images: {', '.join(shown.names)}"
        )
    }


# ---------------------------------------------------------------------------------------- attention


def heat(values: Tensor, size: tuple[int, int]) -> np.ndarray:
    """A map [rows, columns] of numbers, the largest brightest, as pixels uint8 [*size, 3], each
    number a square.
    """
    low, high = values.min(), values.max()
    scaled = ((values - low) / (high - low).clamp(min=1e-12)).numpy()
    red, green, blue = (
        np.clip(3 * scaled, 0, 1),
        np.clip(3 * scaled - 1, 0, 1),
        np.clip(3 * scaled - 2, 0, 1),
    )
    pixels = (255 * np.stack([red, green, blue], axis=-1)).round().astype(np.uint8)
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.NEAREST))


def attention(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """What the class token reads, or the patches in the mean where there is none: each head of the
    last block, and rollouts; per class where there is a head."""
    load = load_classifier if options.classes else load_encoder
    model: Any = load(options.source)
    token = model.has_class_token
    size = tuple(side * model.patch_embed.patch_size[0] for side in model.grid)
    statistics = (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    shown = load_images(options.images, (size[0], size[1]), statistics, options.count)
    maps = attention_maps(model, shown.pixels)  # [depth, B, heads, N, N]
    columns: list[tuple[str, np.ndarray]] = [("input", to_uint8(shown.pixels, *statistics))]

    def drawn(rows: list[Tensor]) -> np.ndarray:
        return np.stack([heat(row.view(model.grid), (size[0], size[1])) for row in rows])

    last = maps[-1, :, :, 0, 1:] if token else maps[-1].mean(dim=2)  # [B, heads, L]
    for head in range(maps.shape[2]):
        columns.append((f"head {head}", drawn(list(last[:, head]))))
    for fusion in ("mean", "max", "min"):
        rolled = [
            rollout(maps[:, image], fusion=fusion, discard=options.discard, class_token=token)
            for image in range(len(shown.names))
        ]
        columns.append((f"rollout, {fusion}", drawn(rolled)))
    for label in options.classes or []:
        weighted = class_attention(model, shown.pixels, torch.full((len(shown.names),), label))
        rolled = [
            rollout(weighted[:, image], class_token=token) for image in range(len(shown.names))
        ]
        columns.append((f"class {label}", drawn(rolled)))
    reader = "the class token reads" if token else "the patches read, in the mean"
    note = f"what {reader}; rollout with {options.discard:.0%} of the weakest entries left out"
    return {
        "attention": sheet(columns, f"{options.source}: {note}. Images: {', '.join(shown.names)}")
    }


# ----------------------------------------------------------------------------------------- features


def principal_colours(tokens: Tensor) -> Tensor:
    """[B, L, D] as colours [B, L, 3] in 0 to 1: the first three principal components over all
    tokens together.
    """
    flat = tokens.flatten(0, 1).double()
    centred = flat - flat.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    three = centred @ axes[:3].T
    low, high = three.quantile(0.02, dim=0), three.quantile(0.98, dim=0)
    return ((three - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).view(*tokens.shape[:2], 3)


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


def scatter(points: np.ndarray, labels: Sequence[int], side: int = 640) -> np.ndarray:
    """Points [n, 2] as dots, coloured by label, with a legend, uint8 [side, side + 80, 3]."""
    picture = Image.new("RGB", (side + 80, side), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    low, high = points.min(0), points.max(0)
    at = 12 + (points - low) / np.maximum(high - low, 1e-12) * (side - 24)
    for (x, y), label in zip(at, labels, strict=True):
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), PALETTE[label % len(PALETTE)])
    for row, label in enumerate(sorted(set(labels))[: (side - 20) // 16]):
        draw.rectangle(
            (side + 8, 12 + 16 * row, side + 18, 22 + 16 * row), PALETTE[label % len(PALETTE)]
        )
        draw.text((side + 24, 10 + 16 * row), str(label), (0, 0, 0))
    return np.asarray(picture)


def features(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Patch tokens of the first images as colours; of labelled ones the vectors in the plane."""
    model = load_encoder(options.source)
    size = (
        model.grid[0] * model.patch_embed.patch_size[0],
        model.grid[1] * model.patch_embed.patch_size[1],
    )
    statistics = (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    shown = load_images(options.images, size, statistics, options.count)
    with torch.no_grad():
        tokens = torch.cat([model.forward_features(part) for part in shown.pixels.split(64)])
    first = min(len(shown.names), 12)
    patches = tokens[:, model.num_prefix_tokens :]
    colours = (
        (255 * principal_colours(patches[:first]))
        .round()
        .byte()
        .view(first, *model.grid, 3)
        .numpy()
    )
    enlarged = [
        np.asarray(Image.fromarray(each).resize((size[1], size[0]), Image.Resampling.NEAREST))
        for each in colours
    ]
    columns = [
        ("input", to_uint8(shown.pixels[:first], *statistics)),
        ("patch tokens, PCA", np.stack(enlarged)),
    ]
    note = "the first three principal components over all these images as red, green, blue"
    found = {"features": sheet(columns, f"{options.source}: {note}")}
    if len(shown.names) >= 30 and min(shown.labels) >= 0:
        vectors = patches.mean(1).numpy()
        for how in options.plane:
            found[how] = scatter(PLANES[how](vectors, options.seed), shown.labels)
    return found


def tsne(vectors: np.ndarray, seed: int) -> np.ndarray:
    """Vectors [n, D] as points [n, 2] by t-SNE (van der Maaten and Hinton, 2008)."""
    from sklearn.manifold import TSNE  # for this picture alone

    return TSNE(perplexity=min(30, len(vectors) // 4), init="pca", random_state=seed).fit_transform(
        vectors
    )


def umap(vectors: np.ndarray, seed: int) -> np.ndarray:
    """Vectors [n, D] as points [n, 2] by UMAP (McInnes et al., 2018).

    Raises ValueError where it is not installed.
    """
    if importlib.util.find_spec("umap") is None:
        raise Refused("--plane umap needs a package more: pip install umap-learn; or --plane tsne")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its packages about themselves
        from umap import UMAP  # seconds, and a compiler: for this picture alone

        return UMAP(
            n_neighbors=min(15, len(vectors) - 1), random_state=seed, n_jobs=1
        ).fit_transform(vectors)


PLANES = {"tsne": tsne, "umap": umap}


# ------------------------------------------------------------------------------------------ filters


def filters(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """The kernels of the patch embedding, and how alike the positions are."""
    model = load_encoder(options.source)
    kernels = model.patch_embed.proj.weight.detach()  # [D, C, p, p]
    low, high = kernels.amin((1, 2, 3), keepdim=True), kernels.amax((1, 2, 3), keepdim=True)
    scaled = ((kernels - low) / (high - low).clamp(min=1e-12) * 255).round().byte()[:, :3]
    if scaled.shape[1] < 3:
        scaled = scaled[:, :1].expand(-1, 3, -1, -1)
    tiles, patch = scaled.permute(0, 2, 3, 1).numpy(), kernels.shape[-1]
    across = int(np.ceil(np.sqrt(len(tiles))))
    picture = np.full((across * (patch + 1), across * (patch + 1), 3), 255, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // across * (patch + 1), index % across * (patch + 1)
        picture[top : top + patch, left : left + patch] = tile
    factor = max(1, 640 // len(picture))
    picture = np.repeat(np.repeat(picture, factor, 0), factor, 1)
    table = torch.nn.functional.normalize(
        model.pos_embed.detach()[0, model.num_prefix_tokens :], dim=1
    )
    rows, columns = model.grid
    places = [
        (r, c)
        for r in np.linspace(0, rows - 1, min(rows, 5)).astype(int)
        for c in np.linspace(0, columns - 1, min(columns, 5)).astype(int)
    ]
    alike = [
        heat((table @ table[r * columns + c]).view(rows, columns), (8 * rows, 8 * columns))
        for r, c in places
    ]
    wide = min(columns, 5)
    grid = np.concatenate(
        [np.concatenate(alike[i : i + wide], 1) for i in range(0, len(alike), wide)], 0
    )
    return {"filters": picture, "positions": grid}


# --------------------------------------------------------------------------------------------- page


def page(run: Path) -> str:
    """One HTML document with every picture of a run in it, the newest of a kind first."""
    pictures = sorted((run / "pictures").glob("*.png"), reverse=True)
    if not pictures:
        raise Refused(
            f"{run / 'pictures'} has no pictures; draw some, such as: tools/visualize.py filters "
            f"{run}"
        )
    parts = [
        "<!doctype html><meta charset=utf-8>",
        f"<title>{html.escape(run.name)}</title><style>body{{font:14px "
        f"sans-serif;margin:2em}}img{{max-width:100%}}"
        "</style>",
        f"<h1>{html.escape(str(run))}</h1>",
    ]
    for path in pictures:
        data = base64.b64encode(path.read_bytes()).decode()
        name = html.escape(path.stem)
        parts.append(f'<h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{data}">')
    return "\n".join(parts) + "\n"


KINDS = {
    "reconstruct": reconstruct,
    "attention": attention,
    "features": features,
    "filters": filters,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=[*KINDS, "page"])
    parser.add_argument("source", type=Path, metavar="RUN_OR_FILE")
    parser.add_argument(
        "--images", type=Path, nargs="+", metavar="PATH", help="files, folders, shards"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: RUN/pictures")
    parser.add_argument("--count", type=int, help="images; default 4, of features 200")
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    parser.add_argument("--mask-ratio", type=float, default=0.75)
    parser.add_argument(
        "--pixel-norm", choices=NORMS, help="of what it predicts; default: as its recipe has it"
    )
    parser.add_argument(
        "--plane",
        choices=PLANES,
        nargs="+",
        default=["tsne"],
        help="how features puts labelled images in the plane",
    )
    parser.add_argument(
        "--statistics", choices=STATISTICS, default="visible", help="what un-normalises the pixels"
    )
    parser.add_argument(
        "--discard", type=float, default=0.0, help="share of the weakest attention left out"
    )
    parser.add_argument(
        "--classes", type=int, nargs="+", help="gradient rollout for these classes of a classifier"
    )
    options = parser.parse_args(arguments)
    options.count = options.count or (200 if options.kind == "features" else 4)
    try:
        if options.kind == "page":
            out = options.source / "pictures.html"
            out.write_text(page(options.source))
            print(out)
            return 0
        if options.images is None and options.kind != "filters":
            raise Refused(f"{options.kind} needs --images: files, folders or shards")
        folder = options.out or options.source / "pictures"
        if options.source.is_file() and options.out is None:
            raise Refused("give --out: a file of weights has no folder for pictures")
        for name, picture in KINDS[options.kind](options).items():
            save_png(picture, folder / f"{name}.png")
            print(folder / f"{name}.png")
    except (ValueError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
