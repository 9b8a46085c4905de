"""Logistic regression is scikit-learn's, on one rank and on the shares of several."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from rcmae.evaluation.logistic import logistic


def clusters(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three overlapping classes in 10 dimensions of very different scales."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, count)
    centres = np.random.default_rng(9).normal(0, 0.7, (3, 10))
    vectors = (centres[labels] + draw.normal(0, 1, (count, 10))) * 10.0 ** np.arange(-4, 6) + 5
    return torch.from_numpy(vectors).float(), torch.from_numpy(labels)


@pytest.mark.parametrize("strength", [0.001, 0.01, 1.0])
@pytest.mark.parametrize("count", [12, 400])
def test_it_predicts_as_scikit_learn(strength: float, count: int) -> None:
    (train, labels), (test, right) = clusters(count, 0), clusters(1000, 1)
    mean, spread = train.mean(0), train.std(0)
    oracle = LogisticRegression(C=strength, max_iter=2000, tol=1e-8)
    oracle.fit(((train - mean) / spread).numpy(), labels.numpy())
    wanted = 100 * (oracle.predict(((test - mean) / spread).numpy()) == right.numpy()).mean()
    # one of 1,000
    assert logistic(train, labels, test, right, strength=strength) == pytest.approx(
        wanted, abs=0.11
    )
    assert count == 12 or wanted > 60  # chance is 33


def test_a_class_in_the_test_set_alone_is_never_right_and_one_class_alone_is_refused() -> None:
    (train, labels), (test, right) = clusters(100, 0), clusters(50, 1)
    assert logistic(train, labels, test, right + 3) == 0
    with pytest.raises(ValueError, match="two classes or more, got 1"):
        logistic(train, labels * 0, test, right)
