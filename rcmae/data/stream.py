"""From shards to batches, prefetched: the same batches on any number of ranks and workers, resumed
from one integer.

The main process only decides who reads what (the plan); workers are stateless readers of (position,
sample) requests, so it does not matter which of them serves a request, or when. The state of a
stream is the number of the next step. A sample that cannot be read is replaced by the next readable
one and written to a ledger; too many stop the run. Workers come from a fork server, not from a fork
of the training process: that one has threads (gloo, NCCL, a checkpoint writer) and pinned or
registered memory, which a fork can deadlock or corrupt. The server imports torch once for all."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from rcmae.data.batch import NO_LABEL, Batch
from rcmae.data.cache import Cache
from rcmae.data.device_decode import DeviceDecoder, DeviceResizer, OnDevice
from rcmae.data.index import ShardIndex
from rcmae.data.loading import Workers, WorkersLost, loader
from rcmae.data.plan import Plan, Requests
from rcmae.data.sources import is_remote
from rcmae.data.transforms import CentreTransform, TrainTransform
from rcmae.data.views import (
    Asked,
    BadSample,
    Change,
    LabelledReading,
    Read,
    TooManyBadSamples,
    TrainReading,
    Views,
)
from rcmae.errors import Refused
from rcmae.process.console import in_line

_STEPS_AHEAD = 4096  # at most so far are shards looked for to copy
_NAMED = 20  # bad samples that a message lists before it counts the rest
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """Which part of the steps a rank reads, and in what pieces."""

    micro: int  # images of a micro-batch of this rank
    rank: int = 0
    world: int = 1
    ranks_of_node: int = 1  # that share a cache


@dataclass(frozen=True)
class Readers:
    """Who reads and decodes."""

    workers: int = 0  # processes of this rank; 0: this one
    prefetch: int = 2  # micro-batches that each worker keeps ready
    # of the node, for remote shards; what comes next is copied there while training continues
    cache: Cache | None = None


@dataclass(frozen=True)
class BadLimits:
    """How many unreadable samples stop a run."""

    fraction: float = 0.001  # more than this, of an epoch's or of all read so far
    in_a_row: int = 100  # more than these one after the other


class Stream:
    """This rank's micro-batches of every optimizer step, prefetched by worker processes.

    At any time there are at most the micro-batches of two steps and prefetch more for each worker,
    in shared memory (150 kB an image at 224 px); a worker has besides one encoded image and its
    pixels, the rank the order of two blocks of each canonical stream (8 bytes a sample).
    """

    def __init__(
        self,
        *,
        index: ShardIndex,
        plan: Plan,
        views: Views,
        share: Share,
        readers: Readers = Readers(),
        bad: BadLimits = BadLimits(),
        on_device: DeviceDecoder | DeviceResizer | None = None,
    ) -> None:
        """Nothing is read and no worker started before the first step is asked for.

        Args:
            index: the samples.
            plan: their order; the same on every rank.
            views: what becomes of a sample.
            share: what this rank reads.
            readers: who reads and decodes.
            bad: when unreadable samples stop the run.
            on_device: with a TrainTransform, decodes what it can of the JPEGs, or resizes all
                images; the batches' images are then on its device.

        Raises:
            Refused: micro-batches do not divide this rank's part of a step, or ranks the batch
                and the streams.
        """
        per_rank = _images_of_a_rank(plan, share, views.repeats)
        self._plan = plan
        self._micros = per_rank // share.micro
        self._limits = Limits(bad, plan.samples_per_epoch // share.world)
        self._repeats = views.repeats
        assert on_device is None or (
            isinstance(views.transform, TrainTransform) and views.members is None
        ), "the device cuts boxes of images alone"
        self._on_device = on_device
        cache = readers.cache
        leaves = on_device.leaves if on_device else "nothing"
        self._reading = TrainReading(
            index, plan, views, cache, max_bad_in_a_row=bad.in_a_row, leaves=leaves
        )
        remote = any(is_remote(shard.path) for shard in index.shards)
        assert not remote or cache is not None, "remote shards need a cache"
        ahead = None
        if remote and cache is not None:
            ahead = _Ahead(index, cache.limit // share.ranks_of_node)
        self._order = _MicroOrder(plan, share, share.micro // views.repeats, ahead)
        self._workers = Workers(
            lambda: loader(
                self._reading,
                self._order,
                readers.workers,
                readers.prefetch,
                persistent=True,
                preload=__name__,
            )
        )
        self._running: Generator[list[Batch], None, None] | None = None
        self._bad: list[BadSample] = []

    def steps(self, first_step: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each optimizer step from `first_step` on, without end; an
        earlier call's end.

        The whole state is that number: asked again with it, the same batches come, also on other
        ranks and workers.

        Raises:
            TooManyBadSamples: on this rank; the others do not know.
            OSError: a shard is gone or cannot be read; names the sample.
            WorkersLost: workers were killed again and again.
        """
        if self._running is not None:
            self._running.close()
        self._running = self._steps(first_step)
        return self._running

    def _steps(self, first_step: int) -> Generator[list[Batch], None, None]:
        def start_at(micro: int) -> None:
            self._order.first_micro = first_step * self._micros + micro

        with contextlib.ExitStack() as stack:
            reads: Iterator[Read | Exception] = self._workers.reads(start_at)
            on_device = self._on_device
            if on_device is not None:
                made = OnDevice(reads, self._made, on_device.device, ahead=self._micros)
                stack.callback(made.close)
                reads = made
            while True:
                batches = []
                for read in islice(reads, self._micros):
                    if isinstance(read, Exception):
                        raise read
                    self._bad += read.bad
                    self._limits.check(read.bad, read.batch.positions[:: self._repeats].tolist())
                    if read.batch.images.is_cuda:
                        # made on another CUDA stream: not to be reused before ours is done
                        read.batch.images.record_stream(torch.cuda.current_stream())
                    batches.append(read.batch)
                yield batches

    def _made(self, read: Read | Exception) -> Read | Exception:
        """The read with what the workers left to the device."""
        on_device = self._on_device
        if isinstance(read, Exception) or on_device is None:
            return read
        if isinstance(on_device, DeviceDecoder):
            return self._decoded(on_device, read)
        assert read.boxes is not None
        images = on_device.images(read.batch.crops, read.boxes)
        return Read(replace(read.batch, images=images), read.bad)

    def _decoded(self, decoder: DeviceDecoder, read: Read) -> Read:
        """The read with the images that the workers left.

        What the device refuses is read again as they would.
        """
        if read.encoded is None:
            return read
        batch = read.batch
        bad = {each.position: each for each in read.bad}
        images, refused = decoder.images(batch.images, batch.crops, read.encoded)
        labels = batch.labels
        crops = batch.crops
        keys = list(batch.keys)
        assert labels is not None
        for first in refused[:: self._repeats]:  # all views of an image are refused
            position = int(batch.positions[first]) // self._repeats
            number = int(self._plan.requests(position, position + 1).samples[0])
            again: list[BadSample] = []
            viewed = self._reading.viewed(position, number, again)
            bad |= {each.position: each for each in again}  # it may be what took a bad one's place
            for row, view in enumerate(viewed.views, first):
                images[row] = view.image.to(images.device)
                labels[row] = viewed.sample.label
                crops[row] = torch.tensor(view.crop)
                keys[row] = viewed.sample.id
        return Read(replace(batch, images=images, keys=tuple(keys)), list(bad.values()))

    @property
    def decodes(self) -> str:
        """Who decodes JPEGs."""
        return "the GPU" if isinstance(self._on_device, DeviceDecoder) else "the workers"

    def drain_bad(self) -> list[BadSample]:
        """The ledger's lines since the last call: samples of this rank that could not be read."""
        bad = self._bad
        self._bad = []
        return bad

    def drain_losses(self) -> list[str]:
        """Workers of this rank that were killed and replaced since the last call: what is known of
        each.
        """
        return self._workers.drain()

    def missing_workers(self) -> WorkersLost | None:
        """What to raise in a wait for samples when a worker is dead."""
        return self._workers.missing()

    def first_images(self, count: int) -> Batch:
        """The first `count` samples of the run, the same on every rank, read here and now: for
        pictures.
        """
        read = self._made(self._reading[Asked(self._plan.requests(0, count))])
        if isinstance(read, Exception):
            raise read
        return read.batch.to("cpu")

    def close(self) -> None:
        """Stop the workers.

        A stream that is not closed stops them when it is collected or the process ends.
        """
        if self._running is not None:
            self._running.close()
        self._workers.close()
        self._running = None


def _images_of_a_rank(plan: Plan, share: Share, repeats: int) -> int:
    """Images of a step that a rank makes. Raises Refused where they do not divide."""
    plan.requests(0, 0, share.rank, share.world)  # whether the ranks divide what they must
    per_rank = plan.images // share.world * repeats
    if share.micro < 1 or per_rank % share.micro or share.micro % repeats:
        of = str(share.micro)
        if repeats > 1:
            of += f", or that not of data.repeats={repeats}"
        raise Refused(
            f"{per_rank} images a step and rank (batch.images={plan.images * repeats}) "
            f"are not a multiple of {of}"
        )
    return per_rank


class Limits:
    """How many unreadable samples are too many.

    Counted from the start of the job on each rank by itself.
    """

    def __init__(self, limits: BadLimits, epoch_share: int) -> None:
        self._max_fraction = limits.fraction
        self._max_in_a_row = limits.in_a_row
        self._epoch_share = epoch_share  # samples of an epoch that this rank reads
        self._read = 0
        self._count = 0
        self._in_a_row = 0
        self._listed: list[BadSample] = []

    def check(self, bad: list[BadSample], positions: list[int]) -> None:
        """Count a micro-batch. The fraction is of an epoch until more than one is read: one early
        sample gives no rate.

        Raises:
            TooManyBadSamples: lists the samples.
        """
        at = {sample.position for sample in bad}
        for position in positions:
            self._in_a_row = self._in_a_row + 1 if position in at else 0
            if self._in_a_row > self._max_in_a_row:
                break
        self._read += len(positions)
        self._count += len(bad)
        self._listed += bad[: _NAMED - len(self._listed)]
        of = max(self._read, self._epoch_share)
        if self._in_a_row > self._max_in_a_row:
            why = (
                f"more than data.max_bad_in_a_row={self._max_in_a_row} samples in a row could "
                "not be read"
            )
        elif self._count > self._max_fraction * of:
            why = (
                f"{self._count} of {of} samples could not be read, more than "
                f"data.max_bad_fraction={self._max_fraction}"
            )
        else:
            return
        lines = [
            f"  {s.shard}/{in_line(s.key)} at byte {s.offset}, position {s.position}: {s.reason}"
            for s in self._listed
        ]
        rest = [f"  ... and {self._count - len(lines)} more"] if self._count > len(lines) else []
        way_out = (
            "rcmae shards check repair leaves them out of a copy; a higher limit passes over them"
        )
        raise TooManyBadSamples("\n".join([f"{why}:", *lines, *rest, way_out]))


def num_batches(index: ShardIndex, batch: int, world: int, most: int | None = None) -> int:
    """How many batches `labelled_batches` gives to each rank."""
    share = -(-len(_chosen(index, most)) // world)
    return -(-share // min(batch, share))


def labelled_batches(
    index: ShardIndex,
    transform: CentreTransform,
    *,
    batch: int,
    rank: int = 0,
    world: int = 1,
    readers: Readers = Readers(),
    on_bad: Callable[[BadSample], None] | None = None,
    change: Change | None = None,
    all_labelled: bool = True,
    most: int | None = None,
) -> Iterator[Batch]:
    """This rank's share of the labelled samples, each once, resized and cut at the centre, in
    batches of one size.

    Every rank gets as many batches, so that collective forwards match. `positions` holds the
    samples' numbers, -1 where there is none (padding, or an image that cannot be read: given to
    `on_bad`, by default logged): leave those out. There are no masks: `ids_shuffle` is [B, 0].
    `change` is made to each image by the worker that decodes it. Of more samples than `most` so
    many are taken, evenly spread.

    Raises:
        Refused: `all_labelled`, and samples have no label; names the first of them. The same on
            every rank.
    """
    if all_labelled:
        refuse_unlabelled(index)
    chosen = _chosen(index, most)
    share = -(-len(chosen) // world)
    batch = min(batch, share)
    count = num_batches(index, batch, world, most)
    numbers = np.full(count * batch, -1)
    mine = chosen[rank * share : (rank + 1) * share]
    numbers[: len(mine)] = mine
    reading = LabelledReading(index, transform, readers.cache, change)
    order = _Chunks(numbers, batch)
    here = min(readers.workers, count)
    workers = Workers(
        lambda: loader(reading, order, here, readers.prefetch, persistent=False, preload=__name__)
    )

    def start_at(chunk: int) -> None:
        order.first_chunk = chunk

    try:
        for read in workers.reads(start_at):
            for bad in read.bad:
                if on_bad is not None:
                    on_bad(bad)
                else:
                    _log.warning(
                        "left out of the evaluation: %s/%s (%s)",
                        bad.shard,
                        bad.key,
                        bad.reason,
                    )
            yield read.batch
    finally:
        workers.close()
        for loss in workers.drain():
            _log.warning("%s", loss)


def _chosen(index: ShardIndex, most: int | None) -> NDArray[np.int64]:
    """Numbers of samples, evenly spread, at most so many."""
    count = len(index) if most is None else min(most, len(index))
    return np.arange(count) * len(index) // max(count, 1)


def refuse_unlabelled(index: ShardIndex) -> None:
    """Raise ValueError, naming the first of them, if samples have no label."""
    unlabelled = np.flatnonzero(index.labels == NO_LABEL)
    if unlabelled.size:
        named = ", ".join(index[number].id for number in unlabelled[:5].tolist())
        raise Refused(f"{unlabelled.size} of {len(index)} samples have no label (.cls): {named}")


class _Ahead:
    """Which shards to copy ahead of the reader: as many as fit into this rank's part of the
    cache.
    """

    def __init__(self, index: ShardIndex, room: int) -> None:
        self._index = index
        self._room = room  # bytes

    def walk(self, steps: Iterator[Requests]) -> Iterator[tuple[Requests, list[int]]]:
        """Each step's requests, and the shards that it is time to copy when that step begins."""
        last_need: dict[int, int] = {}  # shard -> the last step up to `planned` that reads it
        coming: deque[tuple[Requests, list[int]]] = deque()
        used = done = planned = 0
        while True:
            fresh = []
            while len(coming) < 2 or (used < self._room and len(coming) < _STEPS_AHEAD):
                requests = next(steps)
                shards = self._index.shards_of(requests.samples)
                for shard in shards:
                    if shard not in last_need:
                        used += self._index.shards[shard].size
                        fresh.append(shard)
                    last_need[shard] = planned
                coming.append((requests, shards))
                planned += 1
            requests, shards = coming.popleft()
            yield requests, [shard for shard in fresh if is_remote(self._index.shards[shard].path)]
            for shard in shards:
                if last_need[shard] == done:
                    del last_need[shard]
                    used -= self._index.shards[shard].size
            done += 1


class _MicroOrder(Sampler[Asked]):
    """The requests of each micro-batch of a rank, from a step on, without end."""

    def __init__(self, plan: Plan, share: Share, micro: int, ahead: _Ahead | None) -> None:
        self._plan = plan
        self._share = share
        self._micro = micro  # samples of a micro-batch
        self._ahead = ahead
        self.first_micro = 0  # of all since the run's first step

    def __iter__(self) -> Iterator[Asked]:
        per_step = self._plan.images // self._share.world // self._micro
        first_step, skipped = divmod(self.first_micro, per_step)
        return islice(self._micros(first_step), skipped, None)

    def _micros(self, first_step: int) -> Iterator[Asked]:
        steps = self._steps(first_step)
        none: list[int] = []
        walked = self._ahead.walk(steps) if self._ahead else ((each, none) for each in steps)
        for requests, shards in walked:
            cuts = range(0, len(requests.positions), self._micro)
            for number, at in enumerate(cuts):
                part = slice(at, at + self._micro)
                share = tuple(shards[number :: len(cuts)])
                yield Asked(Requests(requests.positions[part], requests.samples[part]), share)

    def _steps(self, first_step: int) -> Iterator[Requests]:
        images = self._plan.images
        rank = self._share.rank
        world = self._share.world
        for step in count(first_step):
            yield self._plan.requests(step * images, (step + 1) * images, rank, world)


class _Chunks(Sampler[Asked]):
    """Numbers of samples, cut into batches."""

    def __init__(self, numbers: NDArray[np.int64], batch: int) -> None:
        self._numbers = numbers
        self._batch = batch
        self.first_chunk = 0

    def __iter__(self) -> Iterator[Asked]:
        for at in range(self.first_chunk * self._batch, len(self._numbers), self._batch):
            part = self._numbers[at : at + self._batch]
            yield Asked(Requests(part, part))
