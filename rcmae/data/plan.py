"""Who reads which sample when: a pure function of (sample counts, seed, batch, streams, window).

Any position is reached without replaying those before it, and the order is the same for every
number of ranks. We do not shuffle through a buffer, whose state would have to be saved and would
depend on the ranks. numpy only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rcmae.data.draws import Purpose, permutation, uniform
from rcmae.errors import Refused

_MIXED = 3_000_000_000  # samples of a mixture's epoch: their square still fits into 64 bits


class Requests(NamedTuple):
    """What a rank reads, in order of position."""

    positions: NDArray[np.int64]  # [n] absolute position in the run: keys the crop and the mask
    samples: NDArray[np.int64]  # [n] number of the sample in the index


@dataclass(frozen=True, eq=False)
class Plan:
    """Which sample stands at which absolute position of a run.

    A pass is a seeded order of the shards laid in a circle and entered at a seeded point. An epoch
    is the largest multiple of `images` that a pass holds (what is left over is another part each
    time); with `epoch_samples` it is that many samples of passes laid end to end, nothing left
    over. It is cut into `streams` contiguous streams, a stream into blocks of `window` samples,
    each in an order of its own. Position g of an epoch is item g // streams of stream g % streams.
    A rank reads the positions g % world == rank, so `world` has to divide `streams` and `images`.

    A mixture's sets are dealt out evenly along the epoch, each in proportion to its weight, so
    every block of every stream has its part of each; the passes of each set are its own, laid end
    to end over all epochs."""

    counts: NDArray[np.int64]  # [shards] samples of each
    seed: int
    images: int  # samples of an optimizer step over all ranks
    streams: int
    window: int
    epoch_samples: int | None = None
    # of a mixture: (shards, weight) of each set, in their order
    weights: tuple[tuple[int, float], ...] = ()
    _passes: dict[tuple[int, int], tuple[NDArray[np.int64], NDArray[np.int64], int]] = field(
        default_factory=dict, repr=False
    )
    _blocks: dict[tuple[int, int, int], NDArray[np.int64]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        available = self._pass_samples
        problems = []
        for key, value in (
            ("batch.images", self.images),
            ("data.canonical_streams", self.streams),
            ("data.shuffle_window", self.window),
        ):
            if value < 1:
                problems.append(f"{key}={value} must be at least 1")
        if available == 0:
            problems.append("the shards hold no samples")
        elif self.epoch_samples is None and available < self.images:
            problems.append(
                f"batch.images={self.images} is more than the {available} samples of an "
                "epoch; use fewer,"
                f" or set data.epoch_samples (at least {self.images}) so that several passes "
                "make an epoch"
            )
        elif self.epoch_samples is not None and self.epoch_samples < self.images:
            problems.append(
                f"data.epoch_samples={self.epoch_samples} is less than "
                f"batch.images={self.images}: no step fits in it"
            )
        elif self.weights and (self.epoch_samples or available) > _MIXED:
            problems.append(
                f"an epoch of a mixture has at most {_MIXED:,} samples; set data.epoch_samples "
                "to less"
            )
        if problems:
            raise Refused("\n".join(problems))
        for number, (part, (_, weight)) in enumerate(zip(self._parts, self.weights, strict=False)):
            if part.samples == 0 or part.share == 0:
                what = (
                    "holds no samples"
                    if part.samples == 0
                    else f"with weight {weight:g} has no sample in an epoch"
                )
                problems.append(f"data.shards: set {number} {what}; leave it out, or give it more")
        if problems:
            raise Refused("\n".join(problems))

    @property
    def samples_per_epoch(self) -> int:
        """Samples of an epoch, a multiple of `images`."""
        return self.steps_per_epoch * self.images

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return (self.epoch_samples or self._pass_samples) // self.images

    def requests(self, first: int, stop: int, rank: int = 0, world: int = 1) -> Requests:
        """What `rank` of `world` reads of the absolute positions first ... stop - 1, in order of
        position.

        Raises:
            Refused: `world` does not divide the batch and the streams.
        """
        if self.images % world or self.streams % world:
            raise Refused(
                f"{world} ranks must divide batch.images={self.images} and "
                f"data.canonical_streams={self.streams};"
                f" use multiples of {world}, or another number of ranks"
            )
        positions = np.arange(first + (rank - first) % world, stop, world, dtype=np.int64)
        samples = np.empty_like(positions)
        parts, places = self._dealt(positions)
        for number, part in enumerate(self._parts):
            chosen = np.flatnonzero(parts == number)
            passes, within = np.divmod(places[chosen], max(part.samples, 1))
            for which in np.unique(passes).tolist():
                mine = passes == which
                samples[chosen[mine]] = self._pass_sample(number, which, within[mine])
        return Requests(positions, samples)

    def substitutes(self, position: int, sample: int) -> Iterator[int]:
        """What to try in place of an unreadable sample: its shard from there on, all round, then
        the next shards.
        """
        (number,), (place,) = self._dealt(np.array([position], np.int64))
        order, _, _ = self._pass(int(number), int(place) // self._parts[number].samples)
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        start = int(self._starts[shard])
        count = int(self.counts[shard])
        yield from range(sample + 1, start + count)
        yield from range(start, sample)
        turn = int(np.flatnonzero(order == shard)[0])
        for following in np.roll(order, -turn)[1:].tolist():
            start = int(self._starts[following])
            yield from range(start, start + int(self.counts[following]))

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum(self.counts) - self.counts

    @cached_property
    def _pass_samples(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def _parts(self) -> list[_Part]:
        epoch = self.samples_per_epoch
        ends = np.cumsum([0, *self.counts]).tolist()
        if not self.weights:
            moves = epoch if self.epoch_samples is not None else self._pass_samples
            return [_Part(0, len(self.counts), self._pass_samples, epoch, moves)]
        whole = sum(weight for _, weight in self.weights)
        exact = [epoch * weight / whole for _, weight in self.weights]
        shares = [math.floor(share) for share in exact]
        # the largest remainders
        rest = sorted(range(len(exact)), key=lambda number: shares[number] - exact[number])
        for number in rest[: epoch - sum(shares)]:
            shares[number] += 1
        parts = []
        first = 0
        for (count, _), share in zip(self.weights, shares, strict=True):
            parts.append(
                _Part(first, first + count, ends[first + count] - ends[first], share, share)
            )
            first += count
        return parts

    def _dealt(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """([n] the set that stands at each position, [n] its place in the set's passes laid end to
        end).

        Of the first p samples of an epoch floor(p x A / B) are of the first sets, where these have
        A samples of the B that they have with the next set: so counts are exact, and never more
        than one off in between."""
        epochs, rank = self._laid(positions)
        number = np.zeros_like(positions)
        ends = np.cumsum([part.share for part in self._parts]).tolist()
        undecided = np.ones(len(positions), bool)
        for last in range(len(self._parts) - 1, 0, -1):
            below = rank * ends[last - 1] // ends[last]
            above = (rank + 1) * ends[last - 1] // ends[last] == below
            number[undecided & above] = last
            rank = np.where(undecided, np.where(above, rank - below, below), rank)
            undecided &= ~above
        moves = np.array([part.moves for part in self._parts])
        return number, rank + epochs * moves[number]

    def _laid(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """([n] the epoch of each position, [n] where it lies in the epoch before blocks are
        shuffled).
        """
        per_epoch = self.samples_per_epoch
        epochs, within = np.divmod(positions, per_epoch)
        items, streams = np.divmod(within, self.streams)
        # the first `longer` streams have one sample more
        short, longer = divmod(per_epoch, self.streams)
        starts = streams * short + np.minimum(streams, longer)
        lengths = short + (streams < longer)
        blocks, places = np.divmod(items, self.window)
        ends = np.minimum((blocks + 1) * self.window, lengths)

        # Samples of one block stand together, so that each block's order is made once.
        grouped = np.lexsort((blocks, streams, epochs))
        changes = np.flatnonzero(
            np.diff(epochs[grouped], prepend=-1)
            | np.diff(streams[grouped], prepend=-1)
            | np.diff(blocks[grouped], prepend=-1)
        )
        for group in np.split(grouped, changes[1:]):
            if group.size:
                one = group[0]
                epoch = int(epochs[one])
                stream = int(streams[one])
                block = int(blocks[one])
                size = int(ends[one]) - block * self.window
                places[group] = self._block(epoch, stream, block, size)[places[group]]
        return epochs, starts + blocks * self.window + places

    def _block(self, epoch: int, stream: int, block: int, size: int) -> NDArray[np.int64]:
        key = (epoch, stream, block)
        if key not in self._blocks:
            while len(self._blocks) >= 2 * self.streams:
                # the open blocks and as many of the last ones
                del self._blocks[next(iter(self._blocks))]
            self._blocks[key] = permutation(self.seed, Purpose.BLOCK, *key, count=size)
        return self._blocks[key]

    def _pass(self, number: int, which: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """(order of a set's shards, [shards] where each ends in it, where the circle is
        entered).
        """
        if (number, which) not in self._passes:
            # The streams of an epoch stand in all its passes at once.
            kept = sum(2 + part.share // max(part.samples, 1) for part in self._parts)
            while len(self._passes) >= kept:
                del self._passes[next(iter(self._passes))]
            part = self._parts[number]
            order = part.first + permutation(
                self.seed, Purpose.SHARDS, which, number, count=part.stop - part.first
            )
            turn = math.floor(
                uniform(self.seed, Purpose.ROTATION, which, number, count=1)[0] * part.samples
            )
            self._passes[number, which] = (order, np.cumsum(self.counts[order]), turn)
        return self._passes[number, which]

    def _pass_sample(self, number: int, which: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        order, ends, turn = self._pass(number, which)
        places = (places + turn) % self._parts[number].samples
        slots = np.searchsorted(ends, places, side="right")
        shards = order[slots]
        rows = places - (ends[slots] - self.counts[shards])
        return self._starts[shards] + rows


class _Part(NamedTuple):
    """A set of a mixture; the only one where there is none."""

    first: int  # of its shards
    stop: int
    samples: int  # of a pass
    share: int  # samples of an epoch
    moves: int  # samples of its passes that an epoch goes through or leaves out
