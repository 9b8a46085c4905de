"""How much a node's cache has to hold, and the cache of a node."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from rcmae.data import sources
from rcmae.data.cache.store import Cache
from rcmae.data.index import ShardIndex
from rcmae.data.sources import USUAL, Patience


def open_bytes(index: ShardIndex, *, streams: int, window: int, nodes: int) -> int:
    """Bytes of the shards that a node reads at the same time, on average: of each of its streams a
    window and a shard (of a mixture a shard of each set).

    It is what a cache has to hold for no shard to be copied twice in a pass.
    """
    sizes = np.array([shard.size for shard in index.shards])
    samples = min(window, math.ceil(len(index) / streams))
    sets = index.weights or [(len(sizes), 1.0)]
    weight = sum(weight for _, weight in sets)
    each = 0.0
    first = 0
    for count, share in sets:
        mine = slice(first, first + count)
        each += (
            samples * share / weight * sizes[mine].sum() / index.counts[mine].sum()
            + sizes[mine].max()
        )
        first += count
    return min(int(sizes.sum()), math.ceil(math.ceil(streams / nodes) * each))


def cache_problem(
    index: ShardIndex, *, streams: int, window: int, nodes: int, world: int, limit: int
) -> str | None:
    """Why a node's cache of `limit` bytes is too small for this order, with settings that would
    fit; None if it is not.

    Args:
        index: the shards.
        streams, window: data.canonical_streams and data.shuffle_window.
        nodes, world: of the run; the ranks must divide the streams.
        limit: bytes.
    """

    def needed(streams: int, window: int) -> int:
        return open_bytes(index, streams=streams, window=window, nodes=nodes)

    if (
        not any(sources.is_remote(shard.path) for shard in index.shards)
        or needed(streams, window) <= limit
    ):
        return None
    ways = [f"data.cache_gb={math.ceil(needed(streams, window) / 1e8) / 10:g}"]
    halves = [window >> shift for shift in range(1, 7)]
    ways += [
        f"data.shuffle_window={half}"
        for half in halves
        if half >= 64 and needed(streams, half) <= limit
    ][:1]
    halves = [
        streams >> shift
        for shift in range(1, 12)
        if (streams >> shift) % world == 0 < streams >> shift
    ]
    ways += [f"data.canonical_streams={half}" for half in halves if needed(half, window) <= limit][
        :1
    ]
    return (
        f"data.cache_gb={limit / 1e9:g} is less than the {needed(streams, window) / 1e9:.3g} "
        "GB of shards that a node "
        f"reads at once ({math.ceil(streams / nodes)} streams x (a window of {window} "
        "samples + a shard)); "
        f"use {' or '.join(ways)}, or smaller shards"
    )


def node_cache(
    indexes: Iterable[ShardIndex],
    folder: str | None = None,
    gigabytes: float = 100.0,
    patience: Patience = USUAL,
) -> Cache | None:
    """This node's cache for their shards, if any is remote.

    Arguments and errors as `Cache.of` has them.
    """
    if not any(sources.is_remote(shard.path) for index in indexes for shard in index.shards):
        return None
    return Cache.of(folder, gigabytes, patience)
