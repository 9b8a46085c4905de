"""A held set, looked at in one pass: effective ranks of the networks' features, and the loss.

Views and masks of an image are drawn by its number in the set alone: the same at each step, in
each run and on any number of ranks, so that what changes is the networks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmae import dist
from rcmae.data.batch import NO_LABEL, Batch
from rcmae.data.draws import Purpose, random_box, uniform
from rcmae.data.masking import Mask
from rcmae.evaluation.features import Extractor, Features
from rcmae.evaluation.unlabelled.spectra import effective_rank, lidar, singular_values
from rcmae.objectives import Objective

VIEWS = 8  # of an image, for LiDAR
_SEED = 0  # of views and masks
# as the crops and flips of a pretraining
_SCALE, _RATIO, _FLIP, _TRIES = (0.2, 1.0), (3 / 4, 4 / 3), 0.5, 10


@dataclass(frozen=True)
class Looking:
    """What looks at a held set. Models are in evaluation mode."""

    networks: Mapping[str, Extractor]  # name -> a vector for each image
    normalise: Extractor  # uint8 images on the device -> what the networks were trained on
    device: torch.device
    mask: Mask
    teacher_masks: bool  # whether the teacher sees other patches than the student


@dataclass(frozen=True)
class Losing:
    """What the loss is computed by. Models are in evaluation mode."""

    student: nn.Module
    teacher: nn.Module | None
    objective: Objective


@dataclass(frozen=True)
class Held:
    """What was found; the same on every rank."""

    images: int
    rankme: dict[str, float]  # by network
    lidar: dict[str, float]
    # "loss", and each term that counts something without labels, as metrics.jsonl calls them
    losses: dict[str, float]
    spectra: dict[str, list[float]]  # singular values of a network's features, descending

    def table(self) -> str:
        """For people: a line a network, and the loss."""
        width = max(map(len, self.rankme))
        lines = [f"{'':<{width}}  {'RankMe':>8}  {'LiDAR':>8}   of {self.images} held images"]
        for name, rank in self.rankme.items():
            lines.append(f"{name:<{width}}  {rank:8.2f}  {self.lidar[name]:8.2f}")
        terms = [f"{name} {value:.4f}" for name, value in self.losses.items()]
        return "\n".join([*lines, "  ".join(terms)])


def look_at_held(batches: Iterable[Batch], looking: Looking, losing: Losing) -> Held:
    """Effective ranks and loss on a held set. Collective: every rank calls.

    Args:
        batches: this rank's share, as many on every rank, as the data helper gives it: uint8, the
            last ones padded with samples of position -1, which are run and left out.
        looking, losing: what is asked.
    """
    vectors: dict[str, list[Tensor]] = {}
    samples: list[Tensor] = []
    totals = dict.fromkeys(losing.objective.weights, 0.0)
    counts = dict.fromkeys(losing.objective.weights, 0.0)
    with torch.no_grad():
        for batch in batches:
            real = batch.positions >= 0
            samples.append(batch.positions[real])
            images = batch.images.to(looking.device, non_blocking=True)
            for name, rows in _features(looking, images, batch.positions).items():
                vectors.setdefault(name, []).append(rows[real])
            masked = _masked(batch, images, looking)
            sums = losing.objective(losing.student, losing.teacher, masked, 1.0)
            if not real.any():  # its forward was for the other ranks
                continue
            for term, count in losing.objective.counts(masked).items():
                totals[term] += float(sums[term])
                counts[term] += count
    joined = {name: torch.cat(parts) for name, parts in vectors.items()}
    numbers = torch.cat(samples)
    features = Features(joined, torch.zeros_like(numbers), numbers).gathered()
    losses = _means(totals, counts, losing.objective.weights)
    return dist.from_first(_found(looking, features, losses))


def _features(looking: Looking, images: Tensor, positions: Tensor) -> dict[str, Tensor]:
    """Of each network the features of the images [B, D], and those of their views [B, q * D]."""
    whole = looking.normalise(images)
    found = {name: network(whole).float().cpu() for name, network in looking.networks.items()}
    seen: dict[str, list[Tensor]] = {name: [] for name in looking.networks}
    for number in range(VIEWS):  # one at a time: all of them may not fit into memory
        view = looking.normalise(_view(images, positions, number))
        for name, network in looking.networks.items():
            seen[name].append(network(view).float().cpu())
    return found | {_views_of(name): torch.cat(views, dim=1) for name, views in seen.items()}


def _views_of(name: str) -> str:
    return f"views of {name}"


def _view(images: Tensor, positions: Tensor, number: int) -> Tensor:
    """A random part of each image, resized, flipped or not: [B, C, H, W] uint8."""
    rows, columns = images.shape[2:]
    views = torch.empty_like(images)
    for at, position in enumerate(positions.clamp(0).tolist()):
        draws = uniform(_SEED, Purpose.HELD, number, position, count=4 * _TRIES + 1).tolist()
        top, left, height, width = random_box(rows, columns, _SCALE, _RATIO, draws[1:])
        part = images[at : at + 1, :, top : top + height, left : left + width].float()
        view = F.interpolate(part, (rows, columns), mode="bicubic", antialias=True)[0]
        view = view.flip(-1) if draws[0] < _FLIP else view
        views[at] = view.round_().clamp_(0, 255).to(torch.uint8)
    return views


def _masked(batch: Batch, images: Tensor, looking: Looking) -> Batch:
    """The images that are there with their masks, as the objective takes them, without labels;
    all of the padding, where there is nothing else.
    """
    real = (batch.positions >= 0).nonzero()[:, 0]
    rows = real if len(real) else torch.arange(len(batch))
    numbers = batch.positions[rows].clamp(0).tolist()
    masked = Batch(
        images=looking.normalise(images[rows.to(images.device)]),
        ids_shuffle=_ids(looking.mask, numbers, draw=0),
        num_visible=looking.mask.num_visible,
        labels=torch.full((len(rows),), NO_LABEL),
        keys=tuple(batch.keys[row] for row in rows.tolist()),
        positions=batch.positions[rows],
        crops=batch.crops[rows],
    )
    if looking.teacher_masks:
        masked = replace(masked, teacher_ids=_ids(looking.mask, numbers, draw=1))
    return masked.to(looking.device)


def _ids(mask: Mask, numbers: list[int], *, draw: int) -> Tensor:
    return torch.from_numpy(np.stack([mask.ids(_SEED, number, draw) for number in numbers]))


def _means(
    totals: Mapping[str, float], counts: Mapping[str, float], weights: Mapping[str, float]
) -> dict[str, float]:
    """The loss over all ranks and its terms. Collective."""
    summed = dist.sum_numbers([*totals.values(), *counts.values()])
    means = {
        term: total / count
        for term, total, count in zip(
            totals, summed[: len(totals)], summed[len(totals) :], strict=True
        )
        if count
    }
    loss = sum(weights[term] * mean for term, mean in means.items())
    return {"loss": loss, **{f"loss_{term}": mean for term, mean in means.items()}}


def _found(looking: Looking, features: Features, losses: dict[str, float]) -> Held:
    """What the features of all ranks give."""
    held = Held(len(features.samples), {}, {}, losses, {})
    for name in looking.networks:
        spectrum = singular_values(features.vectors[name].to(looking.device))
        views = features.vectors[_views_of(name)].to(looking.device).unflatten(1, (VIEWS, -1))
        held.rankme[name] = effective_rank(spectrum)
        held.lidar[name] = lidar(views)
        held.spectra[name] = [float(f"{value:.6g}") for value in spectrum.tolist()]
    return held
