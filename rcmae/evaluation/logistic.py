"""Logistic regression on features, where they lie: on the device, each rank with its share, at any
size.

scikit-learn's L-BFGS finds the same weights, but on the CPU of one process: for ImageNet's 1.3
million images that takes hours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rcmae import dist
from rcmae.errors import Refused
from rcmae.evaluation.features import Features

_ROWS = 65_536  # that compute at once: their logits are the largest tensor


def logistic(
    known: Tensor,
    labels: Tensor,
    asked: Tensor,
    asked_labels: Tensor,
    *,
    strength: float = 0.01,
    iterations: int = 300,
) -> float:
    """Top-1 in percent of multinomial logistic regression by L-BFGS on standardised features.

    Collective: every rank calls with its share of both sets, and gets the same figure. Computes
        where the features are.

    Args:
        known: [n, D] float32 features that it learns from.
        labels: [n] int64.
        asked: [m, D] float32 features that it is judged on.
        asked_labels: [m] int64.
        strength: inverse of the L2 penalty, scikit-learn's C: strength x (sum of losses) +
            |weights|^2 / 2 is smallest.
        iterations: of L-BFGS, at most.

    Raises:
        ValueError: on every rank; there are fewer than two classes.
    """
    seen = {label for share in dist.gather(labels.unique().tolist()) for label in share}
    if len(seen) < 2:
        raise Refused(f"logistic regression needs two classes or more, got {len(seen)}")
    images = dist.sum_numbers([len(labels), len(asked_labels)])
    mean = dist.all_sum(known.double().sum(0)) / images[0]
    spread = (
        (dist.all_sum((known.double() - mean).square().sum(0)) / (images[0] - 1))
        .sqrt()
        .clamp(min=1e-6)
    )
    known, asked = (((each.double() - mean) / spread).float() for each in (known, asked))
    # its last row is the bias
    weight = known.new_zeros(known.shape[1] + 1, max(seen) + 1, requires_grad=True)
    penalty = 1 / (2 * strength * images[0])
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
        total = torch.zeros((), dtype=torch.float64, device=known.device)
        for rows, right in zip(known.split(_ROWS), labels.split(_ROWS), strict=True):
            part = (
                cross_entropy(rows @ weight[:-1] + weight[-1], right, reduction="sum") / images[0]
            )
            part.backward()
            total += part.detach()
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        weight.grad = dist.all_sum(gradient)
        weight.grad[:-1] += 2 * penalty * weight.detach()[:-1]
        return (
            dist.all_sum(total) + penalty * weight.detach()[:-1].double().square().sum()
        ).float()

    optimizer.step(loss)
    with torch.no_grad():
        right = sum(
            int(((rows @ weight[:-1] + weight[-1]).argmax(1) == of).sum())
            for rows, of in zip(asked.split(_ROWS), asked_labels.split(_ROWS), strict=True)
        )
    return 100.0 * dist.sum_numbers([right])[0] / images[1]


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
