"""Judge features quickly: k-NN, logistic regression and few labels, on features extracted once.

    rcmae probes RUN --train 'train-*.tar' --test 'val-*.tar' [--random [SEED]] [--json]

RUN is a run, a checkpoint or a file of any family. Features of both sets are extracted once and
kept beside it (or in --cache), so a second call needs no forward pass. k-NN is exact, by a weighted
vote and a plain one; logistic regression is L-BFGS on standardised features; few labels are drawn
--draws times; mean and standard deviation are shown. Exit status: 0 done; 2 these do not go
together; 1 the checkpoint is damaged.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcmae.commands.arguments import above_zero
from rcmae.errors import Refused

if TYPE_CHECKING:
    from rcmae.models.classifier import Classifier


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    options = _parser().parse_args(arguments)
    from rcmae.checkpoint import CheckpointError
    from rcmae.evaluation.probes import answers_table

    try:
        rows = {name: _answers(model, options) for name, model in _models(options).items()}
    except (Refused, CheckpointError, OSError) as error:
        print(f"rcmae: {error}", file=sys.stderr)
        return 2 if isinstance(error, Refused) else 1
    print(json.dumps(rows, indent=1) if options.json else answers_table(rows))
    return 0


def _models(options: argparse.Namespace) -> dict[str, Classifier]:
    import torch

    from rcmae.weights.encoder import load_encoder

    models = {"trained": load_encoder(options.source, network=options.what, pool=options.pool)}
    if options.random is not None:
        fresh = load_encoder(options.source, network=options.what, pool=options.pool)
        fresh.draw_weights(torch.Generator().manual_seed(options.random))
        models["random"] = fresh
    return models


def _answers(model: Classifier, options: argparse.Namespace) -> dict[str, Any]:
    from rcmae.data.index import ShardIndex
    from rcmae.data.sets import labelled, refuse_meeting
    from rcmae.evaluation.probes import FeatureCache, answers

    opened = {"--train": options.train, "--test": options.test}
    refuse_meeting(*[labelled(key, ShardIndex.open(each)) for key, each in opened.items()])
    is_run = (options.source / "checkpoints").is_dir()
    folder = options.cache or (options.source / "features" if is_run else None)
    cache = FeatureCache(model, folder, options.workers)
    train = cache.features(options.train)
    test = cache.features(options.test)
    return answers(train, test, k=options.k, draws=options.draws, strength=options.strength)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rcmae probes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="RUN_OR_FILE")
    parser.add_argument("--train", nargs="+", required=True, metavar="SHARDS")
    parser.add_argument("--test", nargs="+", required=True, metavar="SHARDS")
    parser.add_argument(
        "--what", choices=("student", "teacher"), help="default: the teacher, if there is one"
    )
    parser.add_argument("--pool", choices=("mean", "cls"), default="mean")
    parser.add_argument("--k", type=int, nargs="+", default=[10, 20, 100, 200])
    parser.add_argument("--draws", type=int, default=5, help="draws of few labels (5)")
    parser.add_argument(
        "--strength", type=above_zero, default=0.01, help="inverse of the L2 penalty"
    )
    parser.add_argument(
        "--random",
        type=int,
        nargs="?",
        const=0,
        metavar="SEED",
        help="compare with the same architecture at random weights",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="folder for features (RUN/features; none for a file)",
    )
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser
