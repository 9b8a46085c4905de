"""What the networks reconstruct, as a picture; and sheets of pictures with captions, as PNG."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from rcmae.data.batch import Batch
from rcmae.evaluation.features import evaluating
from rcmae.files import aside
from rcmae.models.patches import patchify, unpatchify
from rcmae.objectives.mae import PixelNorm, pixel_statistics

CELL_SIDE = 160  # pixels: smaller images are enlarged by a whole factor to at least this

GAP = 6

WHITE = (255, 255, 255)
GREY = (128, 128, 128)
BLACK = (0, 0, 0)
LINE = 18  # pixels of a line of text


def reconstruct(
    model: nn.Module, batch: Batch, *, norm_pix_loss: bool, pixel_norm: PixelNorm = "unbiased"
) -> Tensor:
    """The images [B, C, H, W] as the model fills them in: visible patches as they are, hidden ones
    as predicted.

    With `norm_pix_loss` the model predicts patches normalised by their own mean and deviation,
    which it never sees: the true ones are put back, so brightness and contrast of each patch are
    given, only its structure is predicted.
    Collective: every rank calls.

    Args:
        model: the wrapper, in evaluation mode.
        batch: normalised float images, on the model's device.
        norm_pix_loss: as trained.
        pixel_norm: as trained.
    """
    images = batch.images
    _, channels, height, width = images.shape
    # [B, L, p*p*C]
    every = model(images, batch.ids_shuffle, batch.num_visible, ("all_pixels",))
    predicted = every["all_pixels"].float()
    patch_size = math.isqrt(predicted.shape[-1] // channels)
    true = patchify(images.float(), patch_size)
    if norm_pix_loss:
        mean, variance = pixel_statistics(true, channels, pixel_norm)
        predicted = predicted * variance.sqrt() + mean
    hidden = hidden_patches(batch)[..., None]  # [B, L, 1], True = hidden
    return unpatchify(torch.where(hidden, predicted, true), patch_size, (height, width), channels)


def hidden_patches(batch: Batch) -> Tensor:
    """[B, L] bool, True = hidden from the encoder."""
    hidden = torch.ones_like(batch.ids_shuffle, dtype=torch.bool)
    return hidden.scatter(1, batch.ids_shuffle[:, : batch.num_visible], False)


def reconstruction_picture(
    student: nn.Module,
    teacher: nn.Module | None,
    batch: Batch,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix_loss: bool,
    pixel_norm: PixelNorm = "unbiased",
) -> np.ndarray:
    """A picture uint8 [height, width, 3]: a row an image; columns input, masked, student, and
    teacher if there is one.

    Collective: every rank calls, with a batch of the same size.

    Args:
        student: its wrapper.
        teacher: its wrapper; None leaves its column out.
        batch: few images, normalised, on the models' device. One channel is shown grey, of more
            than three the first three.
        mean: of each channel, that the images were normalised by, 0 to 1.
        std: alike, their deviation.
        norm_pix_loss: as trained; the picture says that true means and deviations were put back.
        pixel_norm: as trained.
    """
    fill = functools.partial(reconstruct, norm_pix_loss=norm_pix_loss, pixel_norm=pixel_norm)
    with evaluating(student, teacher):
        filled = {"input": batch.images.float(), "student": fill(student, batch)}
        if teacher is not None:
            filled["teacher"] = fill(teacher, batch)
    shown = {name: to_uint8(images, mean, std) for name, images in filled.items()}
    inputs = shown.pop("input")
    cells = [("input", inputs), masked_column(batch, inputs), *shown.items()]
    note = "visible patches pasted in"
    if norm_pix_loss:
        note += (
            "; hidden ones: predicted structure, true mean and deviation of each patch "
            "(norm_pix_loss)"
        )
    return sheet(cells, note)


def masked_column(batch: Batch, inputs: np.ndarray) -> tuple[str, np.ndarray]:
    """The column of what the encoder sees: a caption, and pixels [B, H, W, 3] with hidden patches
    grey.
    """
    hidden = hidden_patches(batch)
    height, width = batch.images.shape[-2:]
    patch = math.isqrt(height * width // hidden.shape[1])
    grid = hidden.reshape(len(batch), height // patch, width // patch)
    covered = grid.repeat_interleave(patch, 1).repeat_interleave(patch, 2).cpu().numpy()
    share = 1 - batch.num_visible / hidden.shape[1]
    return f"masked, {share:.0%} hidden", np.where(covered[..., None], np.uint8(GREY[0]), inputs)


def to_uint8(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised [B, C, H, W] as pixels [B, H, W, 3]."""
    scale = images.new_tensor(list(std))[:, None, None]
    shift = images.new_tensor(list(mean))[:, None, None]
    shown = (images * scale + shift)[:, :3]
    if shown.shape[1] < 3:
        shown = shown[:, :1].expand(-1, 3, -1, -1)
    return (shown * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def sheet(columns: Sequence[tuple[str, np.ndarray]], note: str) -> np.ndarray:
    """Columns of pictures [B, H, W, 3] under their captions, with a note below."""
    count, height, width, _ = columns[0][1].shape
    factor = max(1, -(-CELL_SIDE // min(height, width)))
    height = height * factor
    width = width * factor
    font = ImageFont.load_default(13)
    sheet_width = GAP + len(columns) * (width + GAP)
    lines = _wrapped(note, font, sheet_width - 2 * GAP)
    top = LINE + 2 * GAP
    below = top + count * (height + GAP)
    sheet = Image.new("RGB", (sheet_width, below + LINE * len(lines) + GAP), WHITE)
    draw = ImageDraw.Draw(sheet)
    for column, (caption, pictures) in enumerate(columns):
        left = GAP + column * (width + GAP)
        draw.text((left, GAP), caption, BLACK, font)
        for row, picture in enumerate(pictures):
            enlarged = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left, top + row * (height + GAP)))
    for row, text in enumerate(lines):
        draw.text((GAP, below + row * LINE), text, BLACK, font)
    return np.asarray(sheet)


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    """The text in lines no wider than `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def save_png(picture: np.ndarray, path: Path) -> None:
    """Write uint8 [height, width, 3] as PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path, durable=False) as file:
        Image.fromarray(picture).save(file, format="PNG")
