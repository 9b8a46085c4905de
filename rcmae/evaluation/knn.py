"""k-NN on labelled features: a weighted vote of the nearest training images, exact.

No training, no setting to tune: what says most cheaply how good features are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rcmae import dist
from rcmae.errors import Refused
from rcmae.evaluation.features import Features

# elements of the chunk [test, train] that is alive at a time: 256 MiB in float32
SIMILARITIES_AT_ONCE = 2**26


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
        train_features: [n, D], of any length.
        train_labels: [n] int64.
        test_features: [m, D] of the same type.
        k: numbers of neighbours, none above n.
        num_classes: labels are below this.
        temperature: of the weights; None: each vote counts 1.

    Raises:
        Refused: a k, a label or the shapes do not fit.
    """
    problems = _problems(train_features, train_labels, test_features, k, num_classes)
    if temperature is not None and temperature <= 0:
        problems.append(f"temperature={temperature}; use a value above 0, such as 0.07")
    if problems:
        raise Refused("k-NN: " + "; ".join(problems))

    train = F.normalize(train_features, dim=1)
    scores = {each: train.new_zeros(len(test_features), num_classes) for each in k}
    rows_at_once = max(1, SIMILARITIES_AT_ONCE // len(train))
    for start in range(0, len(test_features), rows_at_once):
        test = F.normalize(test_features[start : start + rows_at_once], dim=1)
        similarity, nearest = nearest_of(test @ train.T, k)
        weights = torch.ones_like(similarity)  # [rows, max(k)]
        if temperature is not None:
            weights = (similarity / temperature).exp()
        classes = train_labels[nearest]
        for each in scores:
            scores[each][start : start + len(test)].scatter_add_(
                1, classes[:, :each], weights[:, :each]
            )
    return scores


def _problems(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    k: Sequence[int],
    num_classes: int,
) -> list[str]:
    """What does not fit, one line each."""
    problems = []
    count = len(train_features)
    if not k or min(k) < 1 or max(k) > count:
        problems.append(
            f"k={list(k)} neighbours of {count} training images; use between 1 and {count}"
        )
    shapes = (train_features.shape, test_features.shape)
    if any(len(shape) != 2 for shape in shapes) or shapes[0][1:] != shapes[1][1:]:
        problems.append(
            f"features of shapes {list(shapes[0])} and {list(shapes[1])}; expected [n, D] and "
            "[m, D]"
        )
    if len(train_labels) != count:
        problems.append(
            f"{len(train_labels)} labels for {count} training images; expected one each"
        )
    elif count and not (train_labels.min() >= 0 and train_labels.max() < num_classes):
        problems.append(
            f"labels from {int(train_labels.min())} to {int(train_labels.max())}; expected 0 "
            f"to {num_classes - 1}"
        )
    return problems


def nearest_of(similarity: Tensor, k: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The max(k) largest of each row, descending, with their columns.

    Ties go to the lower column.
    """
    most = max(k)
    top = similarity.topk(min(most + 1, similarity.shape[1]), dim=1)
    values = top.values
    columns = top.indices
    # topk takes any of equal values. That matters only where the last that counts equals the first
    # that does not.
    ends = torch.tensor(
        [each for each in k if each < values.shape[1]], device=values.device, dtype=torch.int64
    )
    tied = (values[:, ends - 1] == values[:, ends]).any(dim=1).nonzero()[:, 0]
    values = values[:, :most]
    columns = columns[:, :most]
    if len(tied):
        ordered = similarity[tied].sort(dim=1, descending=True, stable=True)
        values[tied] = ordered.values[:, :most]
        columns[tied] = ordered.indices[:, :most]
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
    """Top-1 accuracy in percent for each k, on this process's features alone.

    Arguments and errors as `votes`; the lower class wins an equal score.
    """
    scores = votes(
        train_features,
        train_labels,
        test_features,
        k=k,
        num_classes=num_classes,
        temperature=temperature,
    )
    correct = _correct(scores, test_labels)
    return {each: 100.0 * hits / max(len(test_labels), 1) for each, hits in correct.items()}


def _correct(scores: Mapping[int, Tensor], test_labels: Tensor) -> dict[int, int]:
    """How many test rows get their own label, for each k."""
    return {each: int((rows.argmax(dim=1) == test_labels).sum()) for each, rows in scores.items()}


Rows = dict[str, dict[int, float]]  # network -> k -> top-1 in %


def knn_rows(
    train: Features,
    test: Features,
    *,
    k: Sequence[int],
    device: torch.device,
    temperature: float | None = 0.07,
) -> Rows:
    """k-NN of every network on the same images. Collective: every rank calls, and gets the same
    rows.

    Each rank votes for its share of the test images against all training ones.

    Args:
        train: this rank's share of the training set.
        test: of the test set.
        k: numbers of neighbours.
        device: where the votes are counted.
        temperature: of the votes; None: each counts 1.

    Raises:
        Refused: a k is larger than the training set; the same on every rank.
    """
    train = train.gathered()
    largest = max([0, *train.labels.tolist(), *test.labels.tolist()])
    num_classes = 1 + max(dist.gather(largest))
    total = sum(dist.gather(len(test.labels)))
    train_labels = train.labels.to(device)
    test_labels = test.labels.to(device)
    rows: Rows = {}
    for name, vectors in train.vectors.items():
        scores = votes(
            vectors.to(device),
            train_labels,
            test.vectors[name].to(device),
            k=k,
            num_classes=num_classes,
            temperature=temperature,
        )
        shares = dist.gather(_correct(scores, test_labels))
        rows[name] = {}
        for each in k:
            hits = sum(share[each] for share in shares)
            rows[name][each] = 100.0 * hits / total
    return rows


def knn_table(rows: Rows, logistic: Mapping[str, float] | None = None) -> str:
    """The rows as text: a line a network, a column a k, and one of logistic regression where
    there is any.
    """
    width = max((len(name) for name in rows), default=0)
    ks = sorted(set().union(*rows.values()))
    heads = "".join(f"  {f'k={each}':>6}" for each in ks)
    lines = [" " * width + heads + ("  logistic" if logistic else "")]
    for name, row in rows.items():
        line = f"{name:<{width}}" + "".join(f"  {row[each]:6.2f}" for each in ks)
        lines.append(line + (f"  {logistic[name]:8.2f}" if logistic else ""))
    return "\n".join(lines)
