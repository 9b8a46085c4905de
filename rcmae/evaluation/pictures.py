"""What the networks reconstruct, as a picture; and sheets of pictures with captions, as PNG."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

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
LINE = 18  # pixels of a line of small text
LEAST_WIDTH = 480  # pixels of a sheet: titles need some
RAMP = 160  # pixels of the scale of colours
NEAREST = Image.Resampling.NEAREST

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


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
    title: str = "Reconstruction of hidden patches",
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
        title: of the picture.
    """
    fill = functools.partial(reconstruct, norm_pix_loss=norm_pix_loss, pixel_norm=pixel_norm)
    with evaluating(student, teacher):
        filled = {"input": batch.images.float(), "student": fill(student, batch)}
        if teacher is not None:
            filled["teacher"] = fill(teacher, batch)
    shown = {name: to_uint8(images, mean, std) for name, images in filled.items()}
    inputs = shown.pop("input")
    cells = [("input", inputs), masked_column(batch, inputs), *shown.items()]
    note = "Student and teacher: visible patches are pasted in, hidden ones are predicted."
    if norm_pix_loss:
        note += (
            " With norm_pix_loss the networks predict the structure of a patch; its true mean and "
            "standard deviation are put back."
        )
    return sheet(captioned(cells), title=title, note=note)


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


class Tile(NamedTuple):
    """A picture of a sheet."""

    caption: str  # above it; "": none
    pixels: np.ndarray  # uint8 [H, W, 3]; all of a sheet have one size


def captioned(columns: Sequence[tuple[str, np.ndarray]]) -> list[list[Tile]]:
    """Columns of pictures [B, H, W, 3] as rows of tiles, the captions above the first row."""
    rows = []
    for row in range(len(columns[0][1])):
        rows.append([Tile("" if row else caption, each[row]) for caption, each in columns])
    return rows


def sheet(
    rows: Sequence[Sequence[Tile]], *, title: str, note: str, scale: tuple[str, str] | None = None
) -> np.ndarray:
    """Rows of pictures under a title, uint8 [height, width, 3].

    Args:
        rows: the tiles; small ones are enlarged by a whole factor.
        title: at the top.
        note: at the bottom.
        scale: what the darkest and the brightest colour of `heat` mean; None: no scale is drawn.
    """
    height, width = rows[0][0].pixels.shape[:2]
    factor = max(1, -(-CELL_SIDE // min(height, width)))
    height *= factor
    width *= factor
    across = GAP + max(len(row) for row in rows) * (width + GAP)
    canvas = Canvas(max(across, LEAST_WIDTH))
    canvas.write(title, canvas.size + 3)
    for row in rows:
        canvas.captions([tile.caption for tile in row], width)
        for column, tile in enumerate(row):
            enlarged = Image.fromarray(tile.pixels).resize((width, height), NEAREST)
            canvas.parts.append(((GAP + column * (width + GAP), canvas.top), enlarged))
        canvas.top += height + GAP
    if scale is not None:
        canvas.ramp(*scale)
    canvas.write(note, canvas.size - 1)
    return canvas.drawn()


class Canvas:
    """A white sheet that is filled from the top. Texts are as large as its width makes readable
    where it is shown small.

    Args:
        width: pixels.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.top = GAP  # where the next part goes
        self.size = min(26, max(14, width // 42))  # pixels of a text
        self.parts: list[tuple[tuple[int, int], Image.Image]] = []
        self._texts: list[tuple[tuple[int, int], str, Font]] = []

    def write(self, text: str, size: int) -> None:
        """Add lines of text over the whole width."""
        font = ImageFont.load_default(size)
        for line in _wrapped(text, font, self.width - 2 * GAP):
            self._texts.append(((GAP, self.top), line, font))
            self.top += round(1.35 * size)
        self.top += GAP

    def captions(self, texts: Sequence[str], width: int) -> None:
        """Add a caption to each of the pictures that come next, `width` pixels wide."""
        font = ImageFont.load_default(self.size)
        wrapped = [_wrapped(text, font, width) for text in texts]
        deepest = max(len(lines) for lines in wrapped)
        step = round(1.25 * self.size)
        for column, lines in enumerate(wrapped):
            first = self.top + step * (deepest - len(lines))  # down at the picture
            for row, line in enumerate(lines):
                place = (GAP + column * (width + GAP), first + step * row)
                self._texts.append((place, line, font))
        self.top += step * deepest + (GAP if deepest else 0)

    def ramp(self, lowest: str, highest: str) -> None:
        """Add the scale of `heat`'s colours between what its ends mean."""
        font = ImageFont.load_default(self.size)
        height = round(1.25 * self.size)
        colours = heat(torch.linspace(0, 1, RAMP)[None], (1, RAMP))
        left = 2 * GAP + int(font.getlength(lowest))
        self._texts.append(((GAP, self.top), lowest, font))
        self.parts.append(((left, self.top), Image.fromarray(colours).resize((RAMP, height))))
        self._texts.append(((left + RAMP + GAP, self.top), highest, font))
        self.top += height + GAP

    def drawn(self) -> np.ndarray:
        """The sheet, uint8 [height, width, 3]."""
        picture = Image.new("RGB", (self.width, self.top), WHITE)
        draw = ImageDraw.Draw(picture)
        for place, part in self.parts:
            picture.paste(part, place)
        for place, text, font in self._texts:
            draw.text(place, text, BLACK, font)
        return np.asarray(picture)


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    """The text in lines no wider than `width` pixels; words that are too long are cut."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        while font.getlength(word) > width:
            most = next(n for n in range(len(word), 0, -1) if font.getlength(word[:n]) <= width)
            breaks = [at + 1 for at in range(most // 2, most) if word[at] in "_-./"]
            cut = breaks[-1] if breaks else most
            lines.append(word[:cut])
            word = word[cut:]
        lines.append(word)
    return lines


def heat(values: Tensor, size: tuple[int, int]) -> np.ndarray:
    """A map [rows, columns] of numbers, the largest brightest, as pixels uint8 [*size, 3], each
    number a rectangle. The scale goes from the lowest number of the map to its highest.
    """
    low = values.min()
    scaled = ((values - low) / (values.max() - low).clamp(min=1e-12)).numpy()
    red, green = np.clip(2 * scaled, 0, 1), np.clip(2 * scaled - 1, 0, 1)
    channels = [red, green, np.zeros_like(red)]  # black, red, yellow
    pixels = (255 * np.stack(channels, axis=-1)).round().astype(np.uint8)
    return enlarged(pixels, size)


def enlarged(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture in another size (height, width), each pixel a rectangle."""
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), NEAREST))


def plotted(figure: Any) -> np.ndarray:
    """The pixels uint8 [H, W, 3] of a figure of matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second, where it is needed

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def save_png(picture: np.ndarray, path: Path) -> None:
    """Write uint8 [height, width, 3] as PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path, durable=False) as file:
        Image.fromarray(picture).save(file, format="PNG")
