"""How good the features are, and what the networks see: k-NN on labelled images, and the
reconstruction picture.

Features are taken from whole images, nothing hidden, and judged by a weighted vote of the nearest
training images: no training, no setting to tune. Two rows tell what they are worth: the same
architecture with fresh weights, and the pixels themselves. Everything that calls a network is
collective: under ZeRO-3 and FSDP2 a forward gathers weights, so every rank runs the same number of
forwards, always through the engine's own wrapper."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from rcmae import dist
from rcmae.data.batch import Batch
from rcmae.errors import Refused
from rcmae.evaluation.logistic import logistic
from rcmae.models.vit import patchify, unpatchify
from rcmae.objectives.mae import PixelNorm, pixel_statistics

Network = Callable[[Tensor], Tensor]  # normalised images [B, C, H, W] -> one vector each [B, D]

PIXELS_SIDE = 32  # the raw-pixels row looks at images of at most this many pixels a side
# elements of the chunk [test, train] that is alive at a time: 256 MiB in float32
SIMILARITIES_AT_ONCE = 2**26


# ----------------------------------------------------------------------------------------- features


def pooled(model: nn.Module, pool: str) -> Network:
    """The model as a feature extractor.

    Args:
        model: the wrapper whose forward takes `what="features"` and gives [B, 1 + L, D], class
            token first.
        pool: "cls" for the class token, "mean" for the mean over the patches.

    Raises:
        ValueError: another pool.
    """
    if pool not in ("cls", "mean"):
        raise Refused(f"pool={pool!r} is unknown; use 'cls' or 'mean'")

    def features(images: Tensor) -> Tensor:
        tokens = model(images, what="features").float()  # [B, 1 + L, D]
        return tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)

    return features


def pixels(images: Tensor) -> Tensor:
    """The images themselves as features [B, C*h*w], brought down to at most PIXELS_SIDE a side
    by averaging.
    """
    height, width = (min(side, PIXELS_SIDE) for side in images.shape[-2:])
    return F.adaptive_avg_pool2d(images.float(), (height, width)).flatten(1)


@contextlib.contextmanager
def evaluating(*models: nn.Module | None) -> Iterator[None]:
    """The models in evaluation mode (no drop path) and without gradients, and back as they were."""
    there = [(model, model.training) for model in models if model is not None]
    for model, _ in there:
        model.eval()
    try:
        with torch.no_grad():  # not inference_mode: FSDP2 would keep what it gathers there
            yield
    finally:
        for model, was_training in there:
            model.train(was_training)


@dataclass(frozen=True)
class Features:
    """One rank's share, or after `gathered` all of it, ordered by sample number. On the CPU."""

    vectors: dict[str, Tensor]  # network -> [n, D] float32
    labels: Tensor  # [n] int64
    samples: Tensor  # [n] int64, number of the sample in its set

    def gathered(self) -> Features:
        """The shares of all ranks, the same on every rank. Collective: every rank calls."""
        samples = _gather_rows(self.samples)
        order = torch.argsort(samples)  # the order, and so every tie, is that of one process
        vectors = {name: _gather_rows(rows)[order] for name, rows in self.vectors.items()}
        return Features(vectors, _gather_rows(self.labels)[order], samples[order])


def extract_features(
    networks: Mapping[str, Network],
    batches: Iterable[Batch],
    *,
    device: torch.device,
    normalise: Network,
) -> Features:
    """What each network makes of this rank's share of the images, read once for all networks.

    Collective: every rank calls with as many batches, the last ones padded with samples of position
    -1, which are run and left out.

    Args:
        networks: name -> extractor; the models in them are to be in evaluation mode.
        batches: labelled, each as the data helper gives it: uint8 images.
        device: where the networks compute.
        normalise: uint8 images on the device -> what the networks were trained on.

    Raises:
        ValueError: the images have no labels.
    """
    vectors: dict[str, list[Tensor]] = {name: [] for name in networks}
    labels, samples = [], []
    unlabelled = False
    with torch.no_grad():
        for batch in batches:
            real = batch.positions >= 0
            if batch.labels is None:
                unlabelled = True
                break
            labels.append(batch.labels[real])
            samples.append(batch.positions[real])
            images = normalise(batch.images.to(device, non_blocking=True))
            for name, network in networks.items():
                vectors[name].append(network(images).float().cpu()[real])
    if unlabelled or any(bool((part < 0).any()) for part in labels):
        raise Refused(
            "k-NN needs a label for every image; give evaluate.train_shards and test_shards with "
            ".cls"
        )
    return Features(
        {name: torch.cat(parts) if parts else torch.zeros(0, 0) for name, parts in vectors.items()},
        torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64),
        torch.cat(samples) if samples else torch.zeros(0, dtype=torch.int64),
    )


def _gather_rows(rows: Tensor) -> Tensor:
    """All ranks' rows of a CPU tensor, in rank order.

    Collective: every rank calls; the numbers of rows may differ.
    """
    if dist.world() == 1:
        return rows
    shapes = dist.gather(tuple(rows.shape))
    most = max(shape[0] for shape in shapes)
    # padded to the longest; a rank without rows learns their width
    mine = rows.new_zeros(most, *max(shapes)[1:])
    if len(rows):
        mine[: len(rows)] = rows
    parts = [torch.empty_like(mine) for _ in shapes]
    torch_dist.all_gather(parts, mine, group=dist.control())
    return torch.cat([part[: shape[0]] for part, shape in zip(parts, shapes, strict=True)])


# --------------------------------------------------------------------------------------------- k-NN


def votes(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    k: Sequence[int],
    num_classes: int,
    temperature: float | None = 0.07,
) -> dict[int, Tensor]:
    """For each k, the score of each class for each test row: [m, num_classes].

    The k training rows of the largest cosine similarity each vote for their class with weight
    exp(similarity / temperature) (Wu et al., 2018, section 3.4). Exact: every pair is compared. Of
    rows that are equally similar the first ones count, whatever the device and the chunk.

    Args:
        train_features: [n, D], any length; test_features: [m, D] of the same type.
        train_labels: [n] int64.
        test_features: what is asked about.
        k: numbers of neighbours, none above n.
        num_classes: labels are below this.
        temperature: of the weights; None: each vote counts 1.

    Raises:
        ValueError: a k, a label or the shapes do not fit.
    """
    problems = []
    n = len(train_features)
    if not k or min(k) < 1 or max(k) > n:
        problems.append(f"k={list(k)} neighbours of {n} training images; use between 1 and {n}")
    if (
        train_features.ndim != 2
        or test_features.ndim != 2
        or train_features.shape[1:] != test_features.shape[1:]
    ):
        problems.append(
            f"features of shapes {list(train_features.shape)} and "
            f"{list(test_features.shape)}; wanted [n, D] and [m, D]"
        )
    if len(train_labels) != n:
        problems.append(f"{len(train_labels)} labels for {n} training images; wanted one each")
    elif n and not (int(train_labels.min()) >= 0 and int(train_labels.max()) < num_classes):
        problems.append(
            f"labels from {int(train_labels.min())} to {int(train_labels.max())}; wanted 0 "
            f"to {num_classes - 1}"
        )
    if temperature is not None and temperature <= 0:
        problems.append(f"temperature={temperature}; use a value above 0, such as 0.07")
    if problems:
        raise Refused("k-NN: " + "; ".join(problems))
    train = F.normalize(train_features, dim=1)
    scores = {each: train.new_zeros(len(test_features), num_classes) for each in k}
    rows_at_once = max(1, SIMILARITIES_AT_ONCE // n)
    for start in range(0, len(test_features), rows_at_once):
        test = F.normalize(test_features[start : start + rows_at_once], dim=1)
        similarity, nearest = _nearest(test @ train.T, k)
        weights = torch.ones_like(similarity)  # [rows, max(k)]
        if temperature is not None:
            weights = (similarity / temperature).exp()
        classes = train_labels[nearest]
        for each in scores:
            scores[each][start : start + len(test)].scatter_add_(
                1, classes[:, :each], weights[:, :each]
            )
    return scores


def _nearest(similarity: Tensor, k: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The max(k) largest of each row, descending, with their columns.

    Ties go to the lower column.
    """
    most = max(k)
    top = similarity.topk(min(most + 1, similarity.shape[1]), dim=1)
    values, columns = top.values, top.indices
    # topk takes any of equal values. That matters only where the last that counts equals the first
    # that does not.
    ends = torch.tensor(
        [each for each in k if each < values.shape[1]], device=values.device, dtype=torch.int64
    )
    tied = (values[:, ends - 1] == values[:, ends]).any(dim=1).nonzero()[:, 0]
    values, columns = values[:, :most], columns[:, :most]
    if len(tied):
        ordered = similarity[tied].sort(dim=1, descending=True, stable=True)
        values[tied], columns[tied] = ordered.values[:, :most], ordered.indices[:, :most]
    return values, columns


def knn(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: Sequence[int],
    num_classes: int,
    temperature: float | None = 0.07,
) -> dict[int, float]:
    """Top-1 accuracy in percent for each k.

    Arguments and errors as `votes`; the lower class wins an equal score.
    """
    correct = _correct(
        train_features, train_labels, test_features, test_labels, k, num_classes, temperature
    )
    return {each: 100.0 * hits / max(len(test_labels), 1) for each, hits in correct.items()}


def _correct(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: Sequence[int],
    num_classes: int,
    temperature: float | None,
) -> dict[int, int]:
    """How many test rows get their own label, for each k."""
    scores = votes(
        train_features,
        train_labels,
        test_features,
        k=k,
        num_classes=num_classes,
        temperature=temperature,
    )
    return {each: int((rows.argmax(dim=1) == test_labels).sum()) for each, rows in scores.items()}


Rows = dict[str, dict[int, float]]  # network -> k -> top-1 in %


def features_of_both(
    networks: Mapping[str, Network],
    train: Iterable[Batch],
    test: Iterable[Batch],
    *,
    device: torch.device,
    normalise: Network,
) -> tuple[Features, Features]:
    """This rank's share of the features of a training and a test set. Collective: every rank calls.

    Args:
        networks: name -> extractor, as `pooled(engine.student, pool)`, and `pixels`; models in
            evaluation mode.
        train: this rank's batches of the labelled training images, as many on every rank.
        test: the same of the test images.
        device: where the networks compute.
        normalise: uint8 images on the device -> what the networks were trained on.

    Raises:
        ValueError: labels are missing; the same on every rank.
    """
    problem = None
    try:
        known = extract_features(networks, train, device=device, normalise=normalise)
        asked = extract_features(networks, test, device=device, normalise=normalise)
    except ValueError as error:
        problem = str(error)
    dist.together(problem)
    return known, asked


def knn_rows(
    known: Features,
    asked: Features,
    *,
    k: Sequence[int],
    device: torch.device,
    temperature: float | None = 0.07,
) -> Rows:
    """k-NN of every network on the same images. Collective: every rank calls, and gets the same
    rows.

    Each rank votes for its share of the test images against all training ones.

    Args:
        known: this rank's share of the training set.
        asked: of the test set.
        k: numbers of neighbours.
        device: where the votes are counted.
        temperature: of the votes; None: each counts 1.

    Raises:
        ValueError: a k is larger than the training set; the same on every rank.
    """
    known = known.gathered()
    num_classes = 1 + max(dist.gather(max([0, *known.labels.tolist(), *asked.labels.tolist()])))
    total = sum(dist.gather(len(asked.labels)))
    labels, asked_labels = known.labels.to(device), asked.labels.to(device)
    rows: Rows = {}
    for name in known.vectors:
        mine = _correct(
            known.vectors[name].to(device),
            labels,
            asked.vectors[name].to(device),
            asked_labels,
            k,
            num_classes,
            temperature,
        )
        rows[name] = {
            each: 100.0 * sum(hits[each] for hits in dist.gather(mine)) / total for each in k
        }
    return rows


def logistic_rows(known: Features, asked: Features, *, device: torch.device) -> dict[str, float]:
    """Top-1 in percent of logistic regression on each network's features. Collective: every rank
    calls.

    Args:
        known: this rank's share of the training set.
        asked: of the test set.
        device: where it computes.

    Raises:
        ValueError: the training set has fewer than two classes; the same on every rank.
    """
    labels, asked_labels = known.labels.to(device), asked.labels.to(device)
    return {
        name: logistic(vectors.to(device), labels, asked.vectors[name].to(device), asked_labels)
        for name, vectors in known.vectors.items()
    }


def knn_table(rows: Rows, linear: Mapping[str, float] | None = None) -> str:
    """The rows as text: a line a network, a column a k, and one of logistic regression where
    there is any.
    """
    width = max((len(name) for name in rows), default=0)
    ks = sorted({each for row in rows.values() for each in row})
    lines = [
        " " * width
        + "".join(f"  {f'k={each}':>6}" for each in ks)
        + ("  logistic" if linear else "")
    ]
    for name, row in rows.items():
        lines.append(f"{name:<{width}}" + "".join(f"  {row[each]:6.2f}" for each in ks))
        lines[-1] += f"  {linear[name]:8.2f}" if linear else ""
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ picture


CELL_SIDE = 160  # pixels: smaller images are enlarged by a whole factor to at least this
GAP = 6
WHITE, GREY, BLACK = (255, 255, 255), (128, 128, 128), (0, 0, 0)


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
    predicted = model(images, batch.ids_shuffle, batch.num_visible, what="all").float()
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
        student: the wrapper of the student; teacher: that of the teacher.
        teacher: None leaves its column out.
        batch: few images, normalised, on the models' device. One channel is shown grey, of more
            than three the first three.
        mean: per channel, what the images were normalised by; std: alike.
        std: in the units of pixels/255.
        norm_pix_loss: as trained; the picture says that true means and deviations were put back.
        pixel_norm: as trained.
    """
    fill = functools.partial(reconstruct, norm_pix_loss=norm_pix_loss, pixel_norm=pixel_norm)
    with evaluating(student, teacher):
        filled = {"input": batch.images.float(), "student": fill(student, batch)}
        if teacher is not None:
            filled["teacher"] = fill(teacher, batch)
    shown = {name: to_uint8(images, mean, std) for name, images in filled.items()}
    hidden = hidden_patches(batch)
    share = 1 - batch.num_visible / hidden.shape[1]
    height, width = batch.images.shape[-2:]
    patch = math.isqrt(height * width // hidden.shape[1])
    cover = hidden.reshape(len(batch), height // patch, width // patch)
    # [B, H, W]
    covered = cover.repeat_interleave(patch, 1).repeat_interleave(patch, 2).cpu().numpy()
    masked = np.where(covered[..., None], np.uint8(GREY[0]), shown["input"])
    cells = [("input", shown.pop("input")), (f"masked, {share:.0%} hidden", masked), *shown.items()]
    note = "visible patches pasted in"
    if norm_pix_loss:
        note += (
            "; hidden ones: predicted structure, true mean and deviation of each patch "
            "(norm_pix_loss)"
        )
    return sheet(cells, note)


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
    height, width = height * factor, width * factor
    font = ImageFont.load_default(13)
    sheet_width = GAP + len(columns) * (width + GAP)
    lines = _wrapped(note, font, sheet_width - 2 * GAP)
    line = 18
    sheet = Image.new(
        "RGB",
        (sheet_width, line + 2 * GAP + count * (height + GAP) + line * len(lines) + GAP),
        WHITE,
    )
    draw = ImageDraw.Draw(sheet)
    for column, (caption, pictures) in enumerate(columns):
        left = GAP + column * (width + GAP)
        draw.text((left, GAP), caption, BLACK, font)
        for row, picture in enumerate(pictures):
            enlarged = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left, line + 2 * GAP + row * (height + GAP)))
    below = line + 2 * GAP + count * (height + GAP)
    for row, text in enumerate(lines):
        draw.text((GAP, below + row * line), text, BLACK, font)
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
    aside = path.with_name(path.name + ".aside")
    Image.fromarray(picture).save(aside, format="PNG")
    aside.replace(path)
