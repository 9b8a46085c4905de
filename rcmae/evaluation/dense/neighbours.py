"""k-NN for every pixel: patches of labelled pictures vote for the patches of others.

What dense features are worth without training anything. Each patch of the training pictures keeps
the shares of the classes in it; a patch of a test picture takes the mean of its nearest ones,
weighted by exp(similarity / temperature), and the picture's shares are brought to its map's size
(Balazevic et al. 2023, "Towards In-Context Scene Understanding", section 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmae import dist
from rcmae.data import draws
from rcmae.data.dense import geometry
from rcmae.data.dense.crops import Labels
from rcmae.data.dense.maps import Classes, none_of, read_map
from rcmae.data.members.whole import Whole
from rcmae.data.transforms import MAX_PIXELS, decode
from rcmae.errors import Refused
from rcmae.evaluation.dense.scores import confusion
from rcmae.evaluation.dense.windows import predicted
from rcmae.evaluation.features import Extractor, gather_rows
from rcmae.evaluation.knn import nearest_of

Grid = tuple[int, int]  # patches down and across


def patches(model: nn.Module) -> Extractor:
    """The patches [B, L, D] of a network that pretrains, nothing hidden."""

    def features(images: Tensor) -> Tensor:
        tokens: Tensor = model(images, outputs=("encoded",))["encoded"]  # [B, 1 + L, D]
        return tokens[:, 1:].float()

    return features


def patch_pixels(patch: int) -> Extractor:
    """The pixels of each patch [B, L, C * patch * patch]."""
    return lambda images: F.unfold(images.float(), patch, stride=patch).transpose(1, 2)


class Seen(NamedTuple):
    """A sample as a worker hands it over."""

    number: int  # in its set
    image: Tensor  # [C, h, w] uint8, the network's size
    labels: Tensor  # [height, width] of a test picture; [L, classes] int64 pixels of others


@dataclass(frozen=True)
class Look:
    """What workers make of a sample: the whole picture, squeezed to the network's size.

    Raises BadImage.
    """

    size: tuple[int, int]  # of the network's images
    grid: Grid
    labels: Labels
    counted: bool  # the map as pixels of each class in each patch
    in_channels: int = 3
    max_pixels: int = MAX_PIXELS

    def __call__(self, sample: Whole) -> Seen:
        """The picture and its map."""
        pixels = decode(sample.image, self.in_channels, max_pixels=self.max_pixels)
        found = read_map(
            sample.content["map"],
            (pixels.shape[0], pixels.shape[1]),
            self.labels.num_classes,
            zero_is_none=self.labels.zero_is_none,
            max_pixels=self.max_pixels,
            section=self.labels.section,
        )
        whole = torch.from_numpy(pixels).permute(2, 0, 1)
        image = geometry.resize_image(whole, self.size, antialias=True)
        if self.counted:
            found = class_counts(found, self.grid, self.labels.num_classes)
        return Seen(sample.number, image, torch.from_numpy(found))


def class_counts(labels: Classes, grid: Grid, num_classes: int) -> np.ndarray:
    """Pixels of each class in each patch [L, classes] int64, of a map [height, width]."""
    rows = np.arange(labels.shape[0]) * grid[0] // labels.shape[0]
    columns = np.arange(labels.shape[1]) * grid[1] // labels.shape[1]
    patch = rows[:, None] * grid[1] + columns
    there = labels != none_of(torch.from_numpy(labels))
    pairs = patch[there] * num_classes + labels[there]
    counts = np.bincount(pairs, minlength=grid[0] * grid[1] * num_classes)
    return counts.reshape(-1, num_classes)


@dataclass(frozen=True)
class Bank:
    """Labelled patches of the training pictures, the same on every rank."""

    vectors: dict[str, Tensor]  # network -> [n, D] float32, of length 1
    shares: Tensor  # [n, classes] float32, of the classes in each patch


@dataclass(frozen=True)
class Reading:
    """How pictures come to the networks."""

    networks: Mapping[str, Extractor]
    batch: int  # pictures of a forward
    normalise: Callable[[Tensor], Tensor]
    device: torch.device

    def features(
        self, pictures: Iterable[Seen | None]
    ) -> Iterator[tuple[list[Seen], dict[str, Tensor]]]:
        """Some of this rank's pictures, and what each network makes of them [B, L, D], on the
        device. Collective: as many turns on every rank; turns without a picture are black.
        """
        turns = iter(pictures)
        while some := list(islice(turns, self.batch)):
            there = [each for each in some if each is not None]
            shape = there[0].image.shape if there else None
            shape = next((each for each in dist.gather(shape) if each is not None), None)
            if shape is None:
                continue
            images = torch.zeros(len(some), *shape, dtype=torch.uint8)
            for row, each in enumerate(there):
                images[row] = each.image
            normal = self.normalise(images.to(self.device))
            yield there, {name: network(normal) for name, network in self.networks.items()}


def fill_bank(
    reading: Reading, pictures: Iterable[Seen | None], *, size: int, num_pictures: int, seed: int
) -> Bank:
    """The patches that vote. Collective: every rank calls, and gets the same.

    Args:
        reading: of the networks, in evaluation mode.
        pictures: this rank's of the training set, with counts.
        size: patches at most; of each picture as many, drawn by its number.
        num_pictures: of the whole set.
        seed: of the draw.

    Raises:
        Refused: on every rank; no patch has a label.
    """
    per_picture = max(1, size // max(1, num_pictures))
    vectors: dict[str, list[Tensor]] = {name: [] for name in reading.networks}
    shares: list[Tensor] = []
    places: list[Tensor] = []
    for some, features in reading.features(pictures):
        for row, seen in enumerate(some):
            chosen = _chosen(seen, per_picture, seed)
            counts = seen.labels[chosen].float()
            shares.append(counts / counts.sum(dim=1, keepdim=True))
            places.append(seen.number * len(seen.labels) + chosen)
            for name, each in features.items():
                vectors[name].append(F.normalize(each[row, chosen], dim=1).cpu())
    empty = torch.zeros(0, 0)
    place = gather_rows(torch.cat(places) if places else torch.zeros(0, dtype=torch.int64))
    if not len(place):
        raise Refused(
            "evaluate.dense.train_shards: no patch of it has a label; give shards whose maps have "
            "numbers of the test set's classes"
        )
    order = torch.argsort(place)  # the order, and so every tie, is that of one process
    gathered = {
        name: gather_rows(torch.cat(parts) if parts else empty)[order]
        for name, parts in vectors.items()
    }
    return Bank(gathered, gather_rows(torch.cat(shares) if shares else empty)[order])


def _chosen(seen: Seen, most: int, seed: int) -> Tensor:
    """Numbers of the patches of a picture that go into the bank, ascending."""
    labelled = seen.labels.sum(dim=1).nonzero()[:, 0]
    order = draws.permutation(seed, draws.Purpose.BANK, seen.number, count=len(labelled))
    return labelled[torch.from_numpy(order[:most])].sort().values


def vote(vectors: Tensor, bank: Tensor, shares: Tensor, *, k: int, temperature: float) -> Tensor:
    """The share of each class in each patch [n, classes].

    Args:
        vectors: [n, D], of any length.
        bank: [m, D], of length 1.
        shares: [m, classes] of the bank's patches.
        k: neighbours that count, m at most.
        temperature: of their weights.
    """
    similarity, nearest = nearest_of(F.normalize(vectors, dim=1) @ bank.T, [k])
    weights = (similarity / temperature).softmax(dim=1)
    return torch.einsum("nk,nkc->nc", weights, shares[nearest])


def judge_patches(
    reading: Reading,
    bank: Bank,
    pictures: Iterable[Seen | None],
    *,
    grid: Grid,
    k: int,
    temperature: float,
) -> dict[str, Tensor]:
    """The confusion matrix [classes, classes] int64 of each network over the pictures of all ranks.

    Collective: every rank calls, and gets the same.

    Args:
        reading: as the bank was filled with.
        bank: the patches that vote.
        pictures: this rank's of the test set, with their maps.
        grid: patches of a picture.
        k: neighbours that count.
        temperature: of their weights.

    Raises:
        Refused: on every rank; the bank has fewer patches than k.
    """
    count, num_classes = bank.shares.shape
    if k > count:
        raise Refused(f"evaluate.dense.k={k} neighbours of {count} labelled patches; use fewer")
    shares = bank.shares.to(reading.device)
    vectors = {name: rows.to(reading.device) for name, rows in bank.vectors.items()}
    matrices = {name: torch.zeros(num_classes, num_classes, dtype=torch.int64) for name in vectors}
    for some, features in reading.features(pictures):
        for row, seen in enumerate(some):
            size = (seen.labels.shape[0], seen.labels.shape[1])
            for name, each in features.items():
                found = vote(each[row], vectors[name], shares, k=k, temperature=temperature)
                prediction = predicted([found.T.reshape(-1, *grid)], size).cpu()
                matrices[name] += confusion(seen.labels, prediction, num_classes)
    return {name: dist.all_sum(matrix) for name, matrix in matrices.items()}
