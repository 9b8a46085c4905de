"""What the first layer has learnt: the kernels of the patch embedding, and the positions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from rcmae.evaluation.pictures import GAP, Canvas, plotted
from rcmae.evaluation.visualisation.sources import Pictures, named
from rcmae.models.classifier import Classifier
from rcmae.weights.encoder import load_encoder

SIDE = 640  # pixels of the kernels together, about
PLACES = 5  # rows and columns of positions that are drawn


def filters(source: Path) -> Pictures:
    """The kernels of the patch embedding, and how similar positions are. Raises Refused."""
    model = load_encoder(source)
    network = named(model.about)
    return {
        "filters": kernels_picture(model, network),
        "positions": positions_picture(model, network),
    }


def kernels_picture(model: Classifier, network: str) -> np.ndarray:
    """The kernels of the patch embedding side by side, each scaled to the whole range."""
    kernels = model.patch_embed.proj.weight.detach()  # [D, C, p, p]
    low = kernels.amin((1, 2, 3), keepdim=True)
    high = kernels.amax((1, 2, 3), keepdim=True)
    scaled = ((kernels - low) / (high - low).clamp(min=1e-12) * 255).round().byte()[:, :3]
    if scaled.shape[1] < 3:
        scaled = scaled[:, :1].expand(-1, 3, -1, -1)
    tiles = scaled.permute(0, 2, 3, 1).numpy()
    patch = kernels.shape[-1]
    across = int(np.ceil(np.sqrt(len(tiles))))
    side = max(patch, SIDE // across // patch * patch)  # a whole factor
    cell = side + 2
    canvas = Canvas(across * cell + 2 * GAP)
    canvas.write(f"Kernels of the patch embedding: {network}", canvas.size + 3)
    for index, tile in enumerate(tiles):
        place = (GAP + index % across * cell, canvas.top + index // across * cell)
        enlarged = Image.fromarray(tile).resize((side, side), Image.Resampling.NEAREST)
        canvas.parts.append((place, enlarged))
    canvas.top += -(-len(tiles) // across) * cell + GAP
    channels = "" if kernels.shape[1] == 3 else f"; of {kernels.shape[1]} channels: some"
    note = (
        f"{len(tiles)} kernels of {patch} x {patch} pixels{channels}, each scaled from its lowest "
        "weight (dark) to its highest (bright). Trained kernels show edges and colours, untrained "
        "ones noise."
    )
    canvas.write(note, canvas.size - 1)
    return canvas.drawn()


def positions_picture(model: Classifier, network: str) -> np.ndarray:
    """For up to 5 x 5 places, how similar the embeddings of all positions are to that one's."""
    rows, columns = model.grid
    table = model.pos_embed.detach()[0, model.class_tokens :]
    table = torch.nn.functional.normalize(table, dim=1)
    down = np.linspace(0, rows - 1, min(rows, PLACES)).astype(int)
    across = np.linspace(0, columns - 1, min(columns, PLACES)).astype(int)
    lowest = float((table @ table.T).min())
    figure = Figure(figsize=(6.4, 6.2), dpi=100, layout="constrained")
    axes = figure.subplots(len(down), len(across), squeeze=False)
    for row, axes_of_row in zip(down, axes, strict=True):
        for column, axis in zip(across, axes_of_row, strict=True):
            alike = (table @ table[row * columns + column]).view(rows, columns)
            shown = axis.imshow(alike.numpy(), vmin=lowest, vmax=1)
            axis.plot(column, row, marker="x", color="red", markersize=6)
            axis.set(xticks=[], yticks=[])
    figure.suptitle(f"Position embeddings: {network}", fontsize=13)
    note = f"{rows} x {columns} positions: how similar each is to the one marked x"
    figure.supxlabel(note, fontsize=11)
    figure.colorbar(shown, ax=axes, label="cosine similarity", shrink=0.8)
    return plotted(figure)
