#!/usr/bin/env python3
"""Cheap answers to how good features are: k-NN, logistic regression and few labels, on features
extracted once.

    python tools/probes.py RUN --train 'train-*.tar' --test 'val-*.tar' [--random [SEED]] [--json]

RUN is a run, a checkpoint or a file of any family. Features of both sets are extracted once and
kept beside it (or in --cache), so asking again costs no forward. k-NN is exact, by a weighted vote
and a plain one; logistic regression is L-BFGS on standardised features; few labels are drawn
--draws times and their spread is told.
Exit status: 0 done; 2 these do not go together; 1 the checkpoint is damaged.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rcmae.checkpoint import CheckpointError
from rcmae.data.cache import node_cache
from rcmae.data.draws import Purpose, permutation
from rcmae.data.index import ShardIndex
from rcmae.data.stream import labelled_batches
from rcmae.data.transforms import Normalise
from rcmae.errors import Refused
from rcmae.evaluation.features import extract_features
from rcmae.evaluation.knn import knn
from rcmae.evaluation.logistic import logistic
from rcmae.models.classifier import Classifier
from rcmae.weights.encoder import load_encoder


class Set(NamedTuple):
    """Features of a labelled set."""

    vectors: Tensor  # [n, D] float32
    labels: Tensor  # [n] int64


def extracted(
    model: Classifier, shards: Sequence[str], cache: Path | None, key: str, workers: int
) -> Set:
    """The features of a set, from the cache or computed and put there.

    Args:
        model: images to vectors, in evaluation mode.
        shards: labelled.
        cache: a folder; None keeps nothing.
        key: what names the model.
        workers: decoding processes.

    Raises:
        ValueError: the shards cannot be read or have no labels.
    """
    index = ShardIndex.open(list(shards))
    size = tuple(side * model.patch_embed.patch_size[0] for side in model.grid)
    name = hashlib.sha256(
        f"{key} {index.fingerprint} {size} {model.global_pool}".encode()
    ).hexdigest()[:16]
    file = cache / f"features-{name}.safetensors" if cache else None
    if file is not None and file.is_file():
        kept = load_file(file)
        return Set(kept["vectors"], kept["labels"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    channels = model.in_chans
    batches = labelled_batches(
        index,
        image_size=(size[0], size[1]),
        in_channels=channels,
        batch=128,
        workers=workers,
        cache=node_cache([index]),
    )
    config = model.pretrained_cfg
    normalise = Normalise(config["mean"], config["std"], device)
    found = extract_features({"model": model}, batches, device=device, normalise=normalise.images)
    result = Set(found.vectors["model"].contiguous(), found.labels)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(".aside")
        save_file({"vectors": result.vectors, "labels": result.labels}, aside)
        aside.replace(file)
    return result


def few(train: Set, *, per_class: int | None, share: float | None, draw: int) -> Set:
    """Some labels of a set, as many of each class: `per_class`, or a `share` of them and one at
    least.
    """
    rows = []
    for label in train.labels.unique().tolist():
        of = (train.labels == label).nonzero()[:, 0]
        count = min(
            len(of), per_class if per_class is not None else max(1, round((share or 0.0) * len(of)))
        )
        order = permutation(0, Purpose.BLOCK, draw, label, count=len(of))
        rows.append(of[torch.from_numpy(order[:count])])
    chosen = torch.cat(rows)
    return Set(train.vectors[chosen], train.labels[chosen])


def answers(
    train: Set, test: Set, *, k: Sequence[int], draws: int, strength: float
) -> dict[str, Any]:
    """Every figure, top-1 in percent; of few labels mean and deviation over the draws."""
    classes = 1 + int(max(train.labels.max(), test.labels.max()))
    new = sorted(set(test.labels.tolist()) - set(train.labels.tolist()))
    if new:
        raise Refused(
            f"the test set has classes {', '.join(map(str, new[:10]))} that the training set has "
            "not"
        )
    fitting = [each for each in k if each <= len(train.labels)]
    sets = (train.vectors, train.labels, test.vectors, test.labels)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {
        "knn weighted": knn(*sets, k=fitting, num_classes=classes),
        "knn plain": knn(*sets, k=fitting, num_classes=classes, temperature=None),
        "logistic": logistic(*(each.to(device) for each in sets), strength=strength),
    }
    kinds: list[tuple[str, int | None, float | None]] = [
        (f"{n} per class", n, None) for n in (1, 5, 10)
    ]
    kinds += [(f"{share:.0%} of labels", None, share) for share in (0.01, 0.1)]
    for name, per_class, share in kinds:
        drawn = [few(train, per_class=per_class, share=share, draw=draw) for draw in range(draws)]
        tries = [
            logistic(
                *(each.to(device) for each in (*some, test.vectors, test.labels)), strength=strength
            )
            for some in drawn
        ]
        found[name] = {"mean": float(np.mean(tries)), "deviation": float(np.std(tries))}
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The figures as text: a line each, a column a network."""
    width = max(len(name) for name in rows)
    lines = [f"{'':<22}" + "".join(f"{name:>{width + 8}}" for name in rows)]
    first = next(iter(rows.values()))
    for name, value in first.items():
        if name.startswith("knn"):
            for k in value:
                lines.append(
                    f"{f'{name}, k={k}':<22}"
                    + "".join(f"{row[name][k]:>{width + 8}.2f}" for row in rows.values())
                )
        elif isinstance(value, dict):
            cells = [
                f"{row[name]['mean']:.2f} +- {row[name]['deviation']:.2f}" for row in rows.values()
            ]
            lines.append(f"{name:<22}" + "".join(f"{cell:>{width + 8}}" for cell in cells))
        else:
            lines.append(
                f"{name:<22}" + "".join(f"{row[name]:>{width + 8}.2f}" for row in rows.values())
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="RUN_OR_FILE")
    parser.add_argument("--train", nargs="+", required=True, metavar="SHARDS")
    parser.add_argument("--test", nargs="+", required=True, metavar="SHARDS")
    parser.add_argument(
        "--what", choices=("student", "teacher"), help="default: the teacher where there is one"
    )
    parser.add_argument("--pool", choices=("mean", "cls"), default="mean")
    parser.add_argument("--k", type=int, nargs="+", default=[10, 20, 100, 200])
    parser.add_argument("--draws", type=int, default=5, help="of few labels")
    parser.add_argument("--strength", type=float, default=0.01, help="inverse of the L2 penalty")
    parser.add_argument(
        "--random",
        type=int,
        nargs="?",
        const=0,
        metavar="SEED",
        help="beside it the architecture with fresh weights",
    )
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="default: RUN/features, of a file none"
    )
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    run = options.source if (options.source / "checkpoints").is_dir() else None
    cache = options.cache or (run / "features" if run else None)
    try:
        model = load_encoder(options.source, network=options.what, pool=options.pool)
        models = {"trained": model}
        if options.random is not None:
            models["random"] = load_encoder(options.source, network=options.what, pool=options.pool)
            models["random"].draw_weights(torch.Generator().manual_seed(options.random))
        rows = {}
        for name, each in models.items():
            key = hashlib.sha256(
                b"".join(p.detach().numpy().tobytes() for p in each.parameters())
            ).hexdigest()
            sets = [
                extracted(each, shards, cache, key, options.workers)
                for shards in (options.train, options.test)
            ]
            rows[name] = answers(*sets, k=options.k, draws=options.draws, strength=options.strength)
    except (ValueError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(json.dumps(rows, indent=1) if options.json else table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
