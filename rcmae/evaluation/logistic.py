"""Logistic regression on features, where they lie: on the device, each rank with its share, at any
size.

scikit-learn's L-BFGS finds the same weights, but on the CPU of one process: for ImageNet's 1.3
million images that takes hours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rcmae import dist
from rcmae.errors import Refused
from rcmae.evaluation.features import Features

_ROWS = 65_536  # that compute at once: their logits are the largest tensor


class _Ranks(NamedTuple):
    """What joins the shares of all ranks, as `dist` has it."""

    gather: Callable[[Any], list[Any]]
    sum_numbers: Callable[[Sequence[float]], list[float]]
    all_sum: Callable[[Tensor], Tensor]


_ALONE = _Ranks(lambda item: [item], list, lambda values: values)
_TOGETHER = _Ranks(dist.gather, dist.sum_numbers, dist.all_sum)


def logistic(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    strength: float = 0.01,
    iterations: int = 300,
) -> float:
    """Top-1 in percent of multinomial logistic regression by L-BFGS on standardised features.

    Local: of this process's features alone, computed where they are.

    Args:
        train: [n, D] float32 features that it learns from.
        train_labels: [n] int64.
        test: [m, D] float32 features that it is judged on.
        test_labels: [m] int64.
        strength: inverse of the L2 penalty, scikit-learn's C: strength x (sum of losses) +
            |weights|^2 / 2 is smallest.
        iterations: of L-BFGS, at most.

    Raises:
        Refused: there are fewer than two classes.
    """
    labels = (train_labels, test_labels)
    return _top1(train, test, labels, _ALONE, strength=strength, iterations=iterations)


def logistic_together(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    strength: float = 0.01,
    iterations: int = 300,
) -> float:
    """`logistic` of the shares of both sets that all ranks have, the same figure on each.

    Collective: every rank calls. Arguments and errors as there.
    """
    labels = (train_labels, test_labels)
    return _top1(train, test, labels, _TOGETHER, strength=strength, iterations=iterations)


def _top1(
    train: Tensor,
    test: Tensor,
    labels: tuple[Tensor, Tensor],
    ranks: _Ranks,
    *,
    strength: float,
    iterations: int,
) -> float:
    train_labels, test_labels = labels
    classes = set().union(*ranks.gather(train_labels.unique().tolist()))
    if len(classes) < 2:
        raise Refused(f"logistic regression needs two classes or more, got {len(classes)}")
    train_images, test_images = ranks.sum_numbers([len(train_labels), len(test_labels)])

    mean = ranks.all_sum(train.double().sum(0)) / train_images
    squares = ranks.all_sum((train.double() - mean).square().sum(0))
    deviation = (squares / (train_images - 1)).sqrt().clamp(min=1e-6)
    train = ((train.double() - mean) / deviation).float()
    test = ((test.double() - mean) / deviation).float()

    # its last row is the bias
    weight = train.new_zeros(train.shape[1] + 1, max(classes) + 1, requires_grad=True)
    penalty = 1 / (2 * strength * train_images)
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=iterations,
        tolerance_grad=1e-6,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        # the mean over all ranks' images, and its gradient: alike on every rank, bit for bit
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device=train.device)
        for rows, right in zip(train.split(_ROWS), train_labels.split(_ROWS), strict=True):
            logits = rows @ weight[:-1] + weight[-1]
            part = cross_entropy(logits, right, reduction="sum") / train_images
            part.backward()
            total += part.detach()
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        weight.grad = ranks.all_sum(gradient)
        weight.grad[:-1] += 2 * penalty * weight.detach()[:-1]
        size = weight.detach()[:-1].double().square().sum()
        return (ranks.all_sum(total) + penalty * size).float()

    optimizer.step(loss)
    correct = 0
    with torch.no_grad():
        for rows, right in zip(test.split(_ROWS), test_labels.split(_ROWS), strict=True):
            logits = rows @ weight[:-1] + weight[-1]
            correct += int((logits.argmax(1) == right).sum())
    return 100.0 * ranks.sum_numbers([correct])[0] / test_images


def logistic_rows(train: Features, test: Features, *, device: torch.device) -> dict[str, float]:
    """Top-1 in percent of logistic regression on each network's features. Collective: every rank
    calls.

    Args:
        train: this rank's share of the training set.
        test: of the test set.
        device: where it computes.

    Raises:
        Refused: the training set has fewer than two classes; the same on every rank.
    """
    train_labels = train.labels.to(device)
    test_labels = test.labels.to(device)
    rows = {}
    for name, vectors in train.vectors.items():
        test_vectors = test.vectors[name].to(device)
        rows[name] = logistic_together(vectors.to(device), train_labels, test_vectors, test_labels)
    return rows
