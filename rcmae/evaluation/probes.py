"""Cheap answers to how good features are: k-NN, logistic regression and few labels, on features
extracted once.

Local: one process does all of it. Few labels are drawn several times; mean and deviation are
reported."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from rcmae.data.cache import node_cache
from rcmae.data.draws import Purpose, permutation
from rcmae.data.index import ShardIndex
from rcmae.data.stream import Readers, labelled_batches
from rcmae.data.transforms import CentreTransform, Normalise
from rcmae.errors import Refused
from rcmae.evaluation.embedding import fingerprint, versions_of
from rcmae.evaluation.features import extract_features
from rcmae.evaluation.knn import knn
from rcmae.evaluation.logistic import logistic
from rcmae.files import write_aside
from rcmae.models.classifier import Classifier
from rcmae.weights.encoder import pixels_of

BATCH = 128  # images of a forward
PER_CLASS = (1, 5, 10)  # few labels, of each class
SHARES = (0.01, 0.1)  # few labels, of all there are


class LabelledFeatures(NamedTuple):
    """Features of a labelled set."""

    vectors: Tensor  # [n, D] float32
    labels: Tensor  # [n] int64

    def to(self, device: torch.device) -> LabelledFeatures:
        """The same on a device."""
        return LabelledFeatures(self.vectors.to(device), self.labels.to(device))


class FeatureCache:
    """Features of sets by one model, kept in a folder so that asking again costs no forward.

    Args:
        model: images to vectors, in evaluation mode.
        folder: made when the first features are kept; None keeps nothing.
        workers: decoding processes.
    """

    def __init__(self, model: Classifier, folder: Path | None = None, workers: int = 0) -> None:
        self._model = model
        self._folder = folder
        self._workers = workers
        self._fingerprint = fingerprint(model)

    def features(self, shards: Sequence[str]) -> LabelledFeatures:
        """The features of a set, kept before or computed now.

        Raises:
            Refused: the shards cannot be read or have no labels.
            OSError: the folder cannot be written.
        """
        index = ShardIndex.open(list(shards))
        index.tell_unused()
        size = pixels_of(self._model)
        told = [self._fingerprint, index.fingerprint, *versions_of(index)]
        key = f"{' '.join(told)} {size} {self._model.global_pool}"
        name = hashlib.sha256(key.encode()).hexdigest()[:16]
        file = self._folder / f"features-{name}.safetensors" if self._folder else None
        if file is not None and file.is_file():
            kept = load_file(file)
            return LabelledFeatures(kept["vectors"], kept["labels"])
        found = extracted(self._model, index, self._workers)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_aside(file, save(found._asdict()), durable=False)
        return found


def extracted(model: Classifier, index: ShardIndex, workers: int = 0) -> LabelledFeatures:
    """The features of a labelled set, computed on the accelerator where there is one.

    Raises:
        Refused: there are no labels.
    """
    device = _device()
    model.to(device)
    batches = labelled_batches(
        index,
        CentreTransform(pixels_of(model), model.in_chans),
        batch=BATCH,
        readers=Readers(workers, cache=node_cache([index])),
    )
    config = model.pretrained_cfg
    normalise = Normalise(config["mean"], config["std"], device)
    found = extract_features({"model": model}, batches, device=device, normalise=normalise.images)
    return LabelledFeatures(found.vectors["model"].contiguous(), found.labels)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def few(
    train: LabelledFeatures, *, per_class: int | None, share: float | None, draw: int
) -> LabelledFeatures:
    """Some labels of a set, as many of each class: `per_class`, or a `share` of them and one at
    least.
    """
    chosen = []
    for label in train.labels.unique().tolist():
        rows = (train.labels == label).nonzero()[:, 0]
        wanted = per_class if per_class is not None else max(1, round((share or 0.0) * len(rows)))
        order = permutation(0, Purpose.BLOCK, draw, label, count=len(rows))
        chosen.append(rows[torch.from_numpy(order[: min(len(rows), wanted)])])
    at = torch.cat(chosen)
    return LabelledFeatures(train.vectors[at], train.labels[at])


def answers(
    train: LabelledFeatures,
    test: LabelledFeatures,
    *,
    k: Sequence[int],
    draws: int,
    strength: float,
) -> dict[str, Any]:
    """Every figure, top-1 in percent; of few labels mean and deviation over the draws.

    Args:
        train: what is learnt from.
        test: what is judged on.
        k: neighbours; numbers above the training set are left out.
        draws: of few labels.
        strength: inverse of the L2 penalty of the logistic regression.

    Raises:
        Refused: the test set has classes that the training set lacks.
    """
    new = sorted(set(test.labels.tolist()) - set(train.labels.tolist()))
    if new:
        raise Refused(
            f"the test set has classes {', '.join(map(str, new[:10]))} that the training set has "
            "not"
        )
    classes = 1 + int(max(train.labels.max(), test.labels.max()))
    ks = [each for each in k if each <= len(train.labels)]
    on_device = test.to(_device())

    def linear(some: LabelledFeatures) -> float:
        return logistic(*some.to(_device()), *on_device, strength=strength)

    found: dict[str, Any] = {
        "knn weighted": knn(*train, *test, k=ks, num_classes=classes),
        "knn plain": knn(*train, *test, k=ks, num_classes=classes, temperature=None),
        "logistic": linear(train),
    }
    for count in PER_CLASS:
        tries = [
            linear(few(train, per_class=count, share=None, draw=draw)) for draw in range(draws)
        ]
        found[f"{count} per class"] = _spread(tries)
    for share in SHARES:
        tries = [
            linear(few(train, per_class=None, share=share, draw=draw)) for draw in range(draws)
        ]
        found[f"{share:.0%} of labels"] = _spread(tries)
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "deviation": float(np.std(values))}


def answers_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as text: a line each, a column a network."""
    width = 8 + max(len(name) for name in rows)
    lines = [_line("", rows, width)]
    first = next(iter(rows.values()))
    for figure, value in first.items():
        if figure.startswith("knn"):
            for k in value:
                cells = [f"{row[figure][k]:.2f}" for row in rows.values()]
                lines.append(_line(f"{figure}, k={k}", cells, width))
        elif isinstance(value, dict):
            spreads = [row[figure] for row in rows.values()]
            cells = [f"{each['mean']:.2f} +- {each['deviation']:.2f}" for each in spreads]
            lines.append(_line(figure, cells, width))
        else:
            cells = [f"{row[figure]:.2f}" for row in rows.values()]
            lines.append(_line(figure, cells, width))
    return "\n".join(lines)


def _line(head: str, cells: Sequence[str] | Mapping[str, Any], width: int) -> str:
    return f"{head:<22}" + "".join(f"{cell:>{width}}" for cell in cells)
