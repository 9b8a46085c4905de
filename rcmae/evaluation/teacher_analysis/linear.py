"""The paper's linear model: one matrix that maps a masked image to the image, and its average.

There the consistency's gradient is by algebra the sum of all earlier gradients, each times the
momentum so often, projected on the input: at an input b, of the gradient left by an input a, it
takes back the share rate x momentum x |b|^2 x cos(a, b)^2."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rcmae.data.batch import Batch
from rcmae.evaluation.teacher_analysis.gradients import KINDS, OTHER, cosine
from rcmae.evaluation.teacher_analysis.statistics import shares_of
from rcmae.models.patches import patchify


@dataclass(frozen=True)
class Descent:
    """How it is trained: plain gradient descent, one image a step."""

    steps: int = 200
    rate: float = 0.5  # below 1 it is stable for images of length 1
    momentum: float = 0.99  # of the teacher
    seed: int = 0  # of the order of the images


def linear_model(
    images: Tensor, ids: Tensor, other_ids: Tensor, num_visible: int, descent: Descent
) -> dict[str, Any]:
    """The linear model, trained.

    Loss at an image x whose visible part is a: |Sa - x|^2 / 2 + |Sa - Ta|^2 / 2; after each step
    T = momentum x T + (1 - momentum) x S.

    Args:
        images: [n, d], scaled to a length of 1 each.
        ids: [n, d] order of the numbers, of which the first `num_visible` are seen.
        other_ids: alike, another one.
        num_visible: how many.
        descent: its settings.

    Returns:
        points: after each step, for each of KINDS, the cosine of the two masked inputs, and what
        share of the step just taken the consistency takes back: all of it, and the part that stems
        from that step, both over rate x momentum x |b|^2. error: largest relative difference, over
        the training, of the consistency's gradient from the sum of the earlier gradients that it is
        by algebra.
    """
    count, size = images.shape
    images = images.double()
    masked = _masked(images, ids[:, :num_visible])
    remasked = _masked(images, other_ids[:, :num_visible])
    draw = torch.Generator().manual_seed(descent.seed)
    order = torch.randint(count, (descent.steps + 1,), generator=draw).tolist()

    rate = descent.rate
    momentum = descent.momentum
    student = torch.zeros(size, size, dtype=torch.float64)
    teacher = student.clone()
    past = torch.zeros_like(student)  # sum over earlier steps of momentum^age x gradient
    points: list[dict[str, Any]] = []
    error = 0.0
    for now, after in pairwise(order):
        a = masked[now]
        residual = 2 * student @ a - images[now] - teacher @ a  # of it the gradient is made
        gradient = torch.outer(residual, a)
        student = student - rate * gradient
        teacher = momentum * teacher + (1 - momentum) * student
        past = momentum * (past + gradient)
        for kind, b in zip(KINDS, (a, remasked[now], masked[after]), strict=True):
            if after == now and kind == OTHER:
                continue
            # the consistency's gradient is the outer product of either with b
            pull = (student - teacher) @ b
            by_algebra = -rate * past @ b
            error = max(error, float((pull - by_algebra).norm() / by_algebra.norm()))
            points.append({"kind": kind, **_point(a, b, residual, pull, descent)})
    return {
        "points": points,
        "error": error,
        "steps": descent.steps,
        "rate": rate,
        "momentum": momentum,
        "taken_back": shares_of(points, KINDS),
    }


def _point(
    a: Tensor, b: Tensor, residual: Tensor, pull: Tensor, descent: Descent
) -> dict[str, float]:
    """What is taken back, at b, of the step just taken at a."""
    step = descent.rate * descent.momentum
    unit = step * b.square().sum() * residual.square().sum() * a.square().sum()
    of_last = -descent.rate * descent.momentum * residual * (a @ b)
    return {
        "similarity": cosine(a, b),
        "share": float(-(pull @ residual) * (a @ b) / unit),
        "share_of_last": float(-(of_last @ residual) * (a @ b) / unit),
    }


def _masked(images: Tensor, visible: Tensor) -> Tensor:
    """[n, d]: the visible numbers, the others 0."""
    return torch.zeros_like(images).scatter(1, visible, images.gather(1, visible))


def linear_of(
    batch: Batch, remasked: Batch, patch_size: int, descent: Descent | None = None
) -> dict[str, Any]:
    """`linear_model` on a batch's images and masks, each patch brought down to the mean of each
    channel.
    """
    pixels = patchify(batch.images, patch_size)
    patches = pixels.unflatten(2, (-1, batch.images.shape[1])).mean(2)  # [B, L, C]
    channels = patches.shape[2]
    flat = patches.flatten(1)
    return linear_model(
        flat / flat.norm(dim=1, keepdim=True),
        _of_channels(batch.ids_shuffle, channels),
        _of_channels(remasked.ids_shuffle, channels),
        batch.num_visible * channels,
        descent or Descent(),
    )


def _of_channels(ids: Tensor, channels: int) -> Tensor:
    """[B, L * C]: an order of patches as one of all their channels."""
    return (ids[:, :, None] * channels + torch.arange(channels)).flatten(1)
