#!/usr/bin/env python3
"""How well an epoch is mixed: this package's order beside webdataset's shuffle buffer and a full
permutation.

    python tools/bench_shuffle.py [--shards 1281] [--samples 1000] \\
        [--classes 1000] [--batch 4096] [--streams 256]
                                  [--window 4096] [--buffer 1000] [--seed 0] [--json]

No data is read: shards of so many samples are imagined, once in an order that mixes the classes,
once sorted by class, the hardest case. Of one epoch are told: how far the next sample of the same
shard ends up (median, and the nearest hundredth, in batches), how many pairs of one batch come from
one shard, in multiples of chance, and how far the classes of a batch are from those of the set
(total variation, 0 to 1; of the permutation this is chance alone). `webdataset` is its default:
shards in random order through a buffer (its own code), here of one reader.

At ImageNet's size with the defaults (E = 1,281,000 samples, batches of 4,096):

    order             next in shard  nearest 1 %  pairs of a shard  classes, mixed  classes, sorted
    permutation                91.4         1.53              1.00           0.195            0.194
    this package               56.2         0.81              1.45           0.195            0.269
    this package, 16,384       91.4         1.62              0.94           0.194            0.182
    webdataset                 0.17        0.002               233           0.195            0.983

(the third with --window 16384: each stream is one block then).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rcmae.data.plan import Plan


class Epoch(NamedTuple):
    """The size of what is shuffled."""

    shards: int
    samples: int  # of a shard
    classes: int
    batch: int

    @property
    def length(self) -> int:
        """Samples in whole batches."""
        return self.shards * self.samples // self.batch * self.batch


def ours(epoch: Epoch, streams: int, window: int, seed: int) -> NDArray[np.int64]:
    """[length] the numbers of the samples in the order of training."""
    counts = np.full(epoch.shards, epoch.samples)
    return Plan(counts, seed, epoch.batch, streams, window).requests(0, epoch.length).samples


def webdataset(epoch: Epoch, buffer: int, seed: int) -> NDArray[np.int64]:
    """The same of webdataset's shuffled shards and its buffer."""
    from webdataset.filters import shuffle

    order = np.random.default_rng(seed).permutation(epoch.shards)
    numbers = (int(shard) * epoch.samples + row for shard in order for row in range(epoch.samples))
    mixed = shuffle(buffer, initial=min(100, buffer), rng=random.Random(seed))(numbers)
    return np.fromiter(mixed, np.int64)[: epoch.length]


def permutation(epoch: Epoch, seed: int) -> NDArray[np.int64]:
    """The same of a full permutation."""
    return np.random.default_rng(seed).permutation(epoch.shards * epoch.samples)[: epoch.length]


def quality(order: NDArray[np.int64], epoch: Epoch) -> dict[str, float]:
    """The figures of an order; each is explained in this file's header."""
    total = epoch.shards * epoch.samples
    place = np.full(total, -1)
    place[order] = np.arange(len(order))
    here = place[:-1]
    following = place[1:]
    pairs = (here >= 0) & (following >= 0) & ((np.arange(1, total) % epoch.samples) != 0)
    apart = np.abs(here - following)[pairs] / epoch.batch
    batches = order.reshape(-1, epoch.batch)
    same = 0.0
    for batch in batches:
        times = np.bincount(batch // epoch.samples)
        same += float((times * (times - 1)).sum())
    chance = len(batches) * epoch.batch * (epoch.batch - 1) * (epoch.samples - 1) / (total - 1)
    mixed = np.random.default_rng(1).permutation(total) % epoch.classes
    in_rows = np.arange(total) * epoch.classes // total
    return {
        "neighbours_median_batches": float(np.median(apart)),
        "neighbours_nearest_hundredth_batches": float(np.quantile(apart, 0.01)),
        "pairs_of_a_shard_over_chance": same / chance,
        "classes_when_mixed": _imbalance(mixed[batches], epoch.classes),
        "classes_when_sorted": _imbalance(in_rows[batches], epoch.classes),
    }


def _imbalance(labels: NDArray[np.int64], classes: int) -> float:
    """Mean total variation between the classes of a batch and equal shares."""
    shares = [np.bincount(batch, minlength=classes) / len(batch) for batch in labels]
    return float(np.mean([np.abs(share - 1 / classes).sum() / 2 for share in shares]))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for name, value in (
        ("shards", 1281),
        ("samples", 1000),
        ("classes", 1000),
        ("batch", 4096),
        ("streams", 256),
        ("window", 4096),
        ("buffer", 1000),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    epoch = Epoch(options.shards, options.samples, options.classes, options.batch)
    if epoch.length < 1:
        print(
            f"error: {epoch.shards} shards of {epoch.samples} samples hold no batch",
            file=sys.stderr,
        )
        return 2
    told = {
        "permutation": quality(permutation(epoch, options.seed), epoch),
        "this package": quality(ours(epoch, options.streams, options.window, options.seed), epoch),
        "webdataset": quality(webdataset(epoch, options.buffer, options.seed), epoch),
    }
    if options.json:
        print(json.dumps({"settings": vars(options), "orders": told}, indent=1))
        return 0
    heads = (
        "next in shard",
        "nearest 1 %",
        "pairs of a shard",
        "classes, mixed",
        "classes, sorted",
    )
    print(f"{'order':14}" + "".join(f"{head:>18}" for head in heads))
    for name, row in told.items():
        print(f"{name:14}" + "".join(f"{value:18.3g}" for value in row.values()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
