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
import math
import multiprocessing
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from rcmae.data.batch import NO_LABEL, Batch
from rcmae.data.device_decode import DeviceDecoder, Encoded, OnDevice, pack
from rcmae.data.masking import Mask
from rcmae.data.shards import Plan, Requests, Sample, Shard, ShardIndex
from rcmae.data.sources import Cache, Reader, is_remote, redacted
from rcmae.data.transforms import BadImage, CentreTransform, Crop, TrainTransform, Transform, View
from rcmae.data.workers import end_with_owner, fork_server
from rcmae.errors import Refused

_STEPS_AHEAD = 4096  # at most so far are shards looked for to copy
_NAMED = 20  # bad samples that a message lists before it counts the rest
_log = logging.getLogger(__name__)
# (image [C, H, W] uint8, number of its sample) -> the same
Change = Callable[[Tensor, int], Tensor]


class BadSample(NamedTuple):
    """A line of the ledger: a sample that could not be read, and what took its place."""

    position: int  # absolute position in the run
    shard: str
    key: str
    offset: int  # bytes from the start of the shard
    reason: str
    replaced_by: str  # "shard/key"


class TooManyBadSamples(Refused):
    """The limit on unreadable samples is passed; the message lists them."""


class Stream:
    """This rank's micro-batches of every optimizer step, prefetched by worker processes.

    At any time there are at most the micro-batches of a step and prefetch more for each worker, in
    shared memory (150 kB an image at 224 px); a worker has besides one encoded image and its
    pixels, the rank the order of two blocks of each canonical stream (8 bytes a sample).
    """

    def __init__(
        self,
        *,
        index: ShardIndex,
        plan: Plan,
        transform: Transform,
        mask: Mask,
        seed: int,
        micro: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        max_bad_fraction: float = 0.001,
        max_bad_in_a_row: int = 100,
        cache: Cache | None = None,
        ranks_of_node: int = 1,
        repeats: int = 1,
        teacher_masks: bool = False,
        device_decoder: DeviceDecoder | None = None,
    ) -> None:
        """Nothing is read and no worker started before the first step is asked for.

        Args:
            index: the samples.
            plan: their order; the same on every rank.
            transform: image bytes -> view.
            mask: which patches are seen.
            seed: of crops, flips and masks.
            micro: images of a micro-batch of this rank.
            rank, world: who reads.
            workers: decoding processes of this rank; 0 decodes in this process.
            prefetch: micro-batches that each worker keeps ready.
            max_bad_fraction: more unreadable samples than this, of an epoch's or of all read so
                far, stop the run.
            max_bad_in_a_row: so do more than this one after the other.
            cache: of the node, for shards from elsewhere; what comes next is copied there while
                training goes on.
            ranks_of_node: how many share it.
            repeats: views of each sample that is read, one after the other in a micro-batch: the
                plan's position p gives the views at p x repeats and the following, each with its
                own crop, flip and mask.
            teacher_masks: whether each image has a second mask, for a teacher that sees other
                patches.
            device_decoder: decodes what it can of the JPEGs, with `transform` a TrainTransform; the
                batches' images are then on its device.

        Raises:
            ValueError: micro-batches do not divide this rank's part of a step, or ranks the batch
                and the streams.
        """
        plan.requests(0, 0, rank, world)  # whether the ranks divide what they must
        per_rank = plan.images // world * repeats
        if micro < 1 or per_rank % micro or micro % repeats:
            of = f"{micro}, or that not of data.repeats={repeats}" if repeats > 1 else str(micro)
            raise Refused(
                f"{per_rank} images a step and rank (batch.images={plan.images * repeats}) "
                f"are no multiple of {of}"
            )
        self._plan, self._per_rank, self._micros = plan, per_rank, per_rank // micro
        self._limits = Limits(max_bad_fraction, max_bad_in_a_row, plan.samples_per_epoch // world)
        self._repeats = repeats
        assert device_decoder is None or isinstance(transform, TrainTransform), (
            "only a box can be cut on the device"
        )
        self._device_decoder = device_decoder
        self._reading = _TrainReading(
            index,
            plan,
            transform,
            mask,
            seed,
            max_bad_in_a_row,
            cache,
            repeats,
            teacher_masks,
            leaves_jpegs=device_decoder is not None,
        )
        remote = any(is_remote(shard.path) for shard in index.shards)
        assert not remote or cache is not None, "shards from elsewhere need a cache"
        ahead = (
            _Ahead(index, cache.limit // ranks_of_node) if remote and cache is not None else None
        )
        self._order = _MicroOrder(plan, rank, world, micro // repeats, ahead)
        self._loader: DataLoader[_Read | Exception] | None = _loader(
            self._reading, self._order, workers, prefetch, persistent=True
        )
        self._running: Generator[list[Batch], None, None] | None = None
        self._reads: Iterator[_Read | Exception] = iter(())
        self._bad: list[BadSample] = []

    def steps(self, first_step: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each optimizer step from `first_step` on, without end; an
        earlier call's end.

        The whole state is that number: asked again with it, the same batches come, also on other
        ranks and workers.

        Raises:
            TooManyBadSamples: on this rank; the others do not know.
            OSError: a shard is gone or cannot be read; names the sample.
        """
        assert self._loader is not None, "the stream is closed"
        if self._running is not None:
            self._running.close()
        self._order.first_step = first_step
        self._running = self._steps(self._loader)
        return self._running

    def _steps(self, loader: DataLoader[_Read | Exception]) -> Generator[list[Batch], None, None]:
        self._reads = iter(loader)
        with contextlib.ExitStack() as stack:
            reads, decoder = self._reads, self._device_decoder
            if decoder is not None:
                decoded = OnDevice(
                    reads, partial(self._decoded, decoder), decoder.device, ahead=self._micros
                )
                stack.callback(decoded.close)
                reads = decoded
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

    def _decoded(self, decoder: DeviceDecoder, read: _Read | Exception) -> _Read | Exception:
        """The read with the images that the workers left.

        What the device refuses is read again as they would.
        """
        if isinstance(read, Exception) or read.encoded is None:
            return read
        batch, bad = read.batch, {each.position: each for each in read.bad}
        images, refused = decoder.images(batch.images, batch.crops, read.encoded)
        labels, crops, keys = batch.labels, batch.crops, list(batch.keys)
        assert labels is not None
        for first in refused[:: self._repeats]:  # all views of an image are refused
            position = int(batch.positions[first]) // self._repeats
            number = int(self._plan.requests(position, position + 1).samples[0])
            again: list[BadSample] = []
            sample, views, _ = self._reading.views(position, number, again)
            bad |= {each.position: each for each in again}  # it may be what took a bad one's place
            for row, view in enumerate(views, first):
                images[row] = view.image.to(images.device)
                labels[row], crops[row], keys[row] = (
                    sample.label,
                    torch.tensor(view.crop),
                    sample.id,
                )
        return _Read(replace(batch, images=images, keys=tuple(keys)), list(bad.values()))

    @property
    def decodes(self) -> str:
        """Who decodes JPEGs."""
        return "the workers" if self._device_decoder is None else "the GPU"

    def drain_bad(self) -> list[BadSample]:
        """The ledger's lines since the last call: samples of this rank that could not be read."""
        bad, self._bad = self._bad, []
        return bad

    def first_images(self, count: int) -> Batch:
        """The first `count` samples of the run, the same on every rank, read here and now: for
        pictures.
        """
        read = self._reading[_Asked(self._plan.requests(0, count))]
        if self._device_decoder is not None:
            read = self._decoded(self._device_decoder, read)
        if isinstance(read, Exception):
            raise read
        return read.batch.to("cpu")

    def close(self) -> None:
        """Stop the workers.

        A stream that is not closed stops them when it is collected or the process ends.
        """
        if self._running is not None:
            self._running.close()
        _stop(self._reads)
        self._running = self._loader = None


class Limits:
    """How many unreadable samples are too many.

    Counted from the start of the job on each rank by itself.
    """

    def __init__(self, max_fraction: float, max_in_a_row: int, epoch_share: int) -> None:
        self._max_fraction, self._max_in_a_row, self._epoch_share = (
            max_fraction,
            max_in_a_row,
            epoch_share,
        )
        self._seen = self._count = self._in_a_row = 0
        self._listed: list[BadSample] = []

    def check(self, bad: list[BadSample], positions: list[int]) -> None:
        """Count a micro-batch. The fraction is of an epoch until more than one is read: one early
        sample is no rate.

        Raises:
            TooManyBadSamples: lists the samples.
        """
        at = {sample.position for sample in bad}
        for position in positions:
            self._in_a_row = self._in_a_row + 1 if position in at else 0
            if self._in_a_row > self._max_in_a_row:
                break
        self._seen += len(positions)
        self._count += len(bad)
        self._listed += bad[: _NAMED - len(self._listed)]
        of = max(self._seen, self._epoch_share)
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
            f"  {s.shard}/{s.key} at byte {s.offset}, position {s.position}: {s.reason}"
            for s in self._listed
        ]
        rest = [f"  ... and {self._count - len(lines)} more"] if self._count > len(lines) else []
        way_out = (
            "tools/check_shards.py repair leaves them out of a copy; a higher limit passes over "
            "them"
        )
        raise TooManyBadSamples("\n".join([f"{why}:", *lines, *rest, way_out]))


def labelled_batches(
    index: ShardIndex,
    *,
    image_size: tuple[int, int],
    in_channels: int = 3,
    batch: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    prefetch: int = 2,
    cache: Cache | None = None,
    on_bad: Callable[[BadSample], None] | None = None,
    change: Change | None = None,
) -> Iterator[Batch]:
    """This rank's share of the labelled samples, each once, resized and cut at the centre, in
    batches of one size.

    Every rank gets as many batches, so that collective forwards match. `positions` holds the
    samples' numbers, -1 where there is none (padding, or an image that cannot be read: given to
    `on_bad`, by default logged): leave those out. There are no masks: `ids_shuffle` is [B, 0].
    `change` is made to each image by the worker that decodes it.

    Raises:
        ValueError: samples have no label; names the first of them. The same on every rank.
    """
    refuse_unlabelled(index)
    share = -(-len(index) // world)
    batch = min(batch, share)
    count = -(-share // batch)
    numbers = np.full(count * batch, -1)
    mine = np.arange(rank * share, min((rank + 1) * share, len(index)))
    numbers[: len(mine)] = mine
    reading = _LabelledReading(index, CentreTransform(image_size, in_channels), cache, change)
    reads = iter(
        _loader(reading, _Chunks(numbers, batch), min(workers, count), prefetch, persistent=False)
    )
    try:
        for read in reads:
            for bad in read.bad:
                if on_bad is not None:
                    on_bad(bad)
                else:
                    _log.warning(
                        "left out of the evaluation: %s/%s (%s)", bad.shard, bad.key, bad.reason
                    )
            yield read.batch
    finally:
        _stop(reads)


def refuse_unlabelled(index: ShardIndex) -> None:
    """Raise ValueError, naming the first of them, if samples have no label."""
    unlabelled = np.flatnonzero(index.labels == NO_LABEL)
    if unlabelled.size:
        named = ", ".join(index[number].id for number in unlabelled[:5].tolist())
        raise Refused(f"{unlabelled.size} of {len(index)} samples have no label (.cls): {named}")


# --------------------------------------------------------------------- what is asked of the workers


class _Asked(NamedTuple):
    """What a worker is handed: a micro-batch to make, and shards from elsewhere to copy
    meanwhile.
    """

    requests: Requests
    ahead: tuple[int, ...] = ()


class _Ahead:
    """Which shards to copy ahead of the reader: as many as fit into this rank's part of the
    cache.
    """

    def __init__(self, index: ShardIndex, room: int) -> None:
        self._index, self._room = index, room

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


class _MicroOrder(Sampler[_Asked]):
    """The requests of each micro-batch of a rank, from a step on, without end."""

    def __init__(self, plan: Plan, rank: int, world: int, micro: int, ahead: _Ahead | None) -> None:
        self._plan, self._rank, self._world, self._micro, self._ahead = (
            plan,
            rank,
            world,
            micro,
            ahead,
        )
        self.first_step = 0

    def __iter__(self) -> Iterator[_Asked]:
        steps = self._steps()
        for requests, shards in (
            self._ahead.walk(steps) if self._ahead else ((each, []) for each in steps)
        ):
            cuts = range(0, len(requests.positions), self._micro)
            for number, at in enumerate(cuts):
                part = slice(at, at + self._micro)
                share = tuple(shards[number :: len(cuts)])
                yield _Asked(Requests(requests.positions[part], requests.samples[part]), share)

    def _steps(self) -> Iterator[Requests]:
        images = self._plan.images
        for step in count(self.first_step):
            yield self._plan.requests(step * images, (step + 1) * images, self._rank, self._world)


class _Chunks(Sampler[_Asked]):
    """Numbers of samples, cut into batches."""

    def __init__(self, numbers: NDArray[np.int64], batch: int) -> None:
        self._numbers, self._batch = numbers, batch

    def __iter__(self) -> Iterator[_Asked]:
        for at in range(0, len(self._numbers), self._batch):
            part = self._numbers[at : at + self._batch]
            yield _Asked(Requests(part, part))


# ------------------------------------------------------------------------------ what the workers do


class _Read(NamedTuple):
    """What a request gave."""

    batch: Batch
    bad: list[BadSample]
    encoded: Encoded | None = None  # images left to the device


class _Copying:
    """Copies shards into the cache in a thread, while the process decodes. Travels to another
    process idle.

    It is a help only: who needs a shard copies it itself, or waits for whoever does. So nothing is
    raised here."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._thread: threading.Thread | None = None
        self._coming: queue.SimpleQueue[Sequence[Shard]] = queue.SimpleQueue()

    def ask(self, shards: Sequence[Shard]) -> None:
        """Copy these as soon as those before are there."""
        if not shards:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="copy shards ahead")
            self._thread.start()
        self._coming.put(shards)

    def _run(self) -> None:
        while True:
            try:
                self._reader.prepare(self._coming.get())
            except Exception as error:  # who needs it meets it again, and says so
                _log.debug("not copied ahead: %s", error)

    def __reduce__(self) -> tuple[type[_Copying], tuple[Reader]]:
        return _Copying, (self._reader,)


class _TrainReading(Dataset[_Read | Exception]):
    """Requests -> views and masks, each keyed by its position. Unreadable samples are replaced.

    What a user has to mend is handed over, not raised: a worker's exception would reach them as its
    traceback."""

    def __init__(
        self,
        index: ShardIndex,
        plan: Plan,
        transform: Transform,
        mask: Mask,
        seed: int,
        max_bad_in_a_row: int,
        cache: Cache | None,
        repeats: int,
        teacher_masks: bool,
        leaves_jpegs: bool,
    ) -> None:
        self._repeats, self._leaves_jpegs = repeats, leaves_jpegs
        self._index, self._plan, self._transform, self._mask = index, plan, transform, mask
        self._seed, self._max_bad_in_a_row, self._teacher_masks = (
            seed,
            max_bad_in_a_row,
            teacher_masks,
        )
        self._reader = Reader(cache)
        self._copying = _Copying(self._reader)
        # Saves looking again for bytes that are not there. Of what does not decode nothing is kept:
        # a crop may do without the damaged part, and what a worker happens to have met must not
        # decide.
        self._known_bad: dict[int, str] = {}

    def __getitem__(self, asked: _Asked) -> _Read | Exception:
        requests = asked.requests
        rows: list[tuple[Sample, View]] = []
        # to the device: files, and the rows of their views
        left: list[tuple[bytes, list[int]]] = []
        bad: list[BadSample] = []
        self._copying.ask([self._index.shards[number] for number in asked.ahead])
        try:
            self._reader.prepare(
                [self._index.shards[number] for number in self._index.shards_of(requests.samples)]
            )
        except OSError as error:
            return error
        for position, number in zip(
            requests.positions.tolist(), requests.samples.tolist(), strict=True
        ):
            try:
                sample, views, encoded = self.views(
                    position, number, bad, leaves_jpegs=self._leaves_jpegs
                )
            except TooManyBadSamples as error:
                return error
            except OSError as error:
                return OSError(
                    f"{self._index[number].id} at position {position} cannot be read: {error}"
                )
            except Exception as error:
                raise RuntimeError(
                    f"{self._index[number].id} at position {position}: {error!r}"
                ) from error
            if encoded:
                left.append((encoded, list(range(len(rows), len(rows) + len(views)))))
            rows += [(sample, view) for view in views]
        positions = (
            requests.positions[:, None] * self._repeats + np.arange(self._repeats)
        ).reshape(-1)
        batch = _batch(rows, positions, self._ids(positions), self._mask.num_visible)
        if self._teacher_masks:
            batch = replace(batch, teacher_ids=self._ids(positions, draw=1))
        return _Read(batch, bad, pack(left))

    def _ids(self, positions: NDArray[np.int64], draw: int = 0) -> Tensor:
        ids = [self._mask.ids(self._seed, position, draw) for position in positions.tolist()]
        return torch.from_numpy(np.stack(ids))

    def views(
        self, position: int, number: int, bad: list[BadSample], *, leaves_jpegs: bool = False
    ) -> tuple[Sample, list[View], bytes]:
        """The sample of a number, or else the next that can be read, seen as its positions' keys
        have it.

        A JPEG that is left to the device comes as its bytes, with empty views; else there are none.
        """
        reason, positions = "", range(position * self._repeats, (position + 1) * self._repeats)
        beyond = int(self._index.counts[self._index.place(number)[0]]) + self._max_bad_in_a_row
        for tried in islice(self._candidates(position, number), beyond):
            sample = self._index[tried]
            try:
                if tried in self._known_bad:
                    raise BadImage(self._known_bad[tried])
                data = self._read(tried, sample)
                crops = self._crops(data, positions) if leaves_jpegs else None
                views = (
                    self._transform.views(data, self._seed, positions)
                    if crops is None
                    else [View(self._blank(), crop) for crop in crops]
                )
            except BadImage as error:
                reason = reason or str(error)
                continue
            if tried != number:
                bad.append(_bad_sample(positions[0], self._index[number], reason, sample.id))
            return sample, views, data if crops is not None else b""
        sample = self._index[number]
        raise TooManyBadSamples(
            f"nothing can be read in place of {sample.id} ({redacted(sample.path)} at byte "
            f"{sample.offset}: {reason}): "
            f"the rest of its shard and data.max_bad_in_a_row={self._max_bad_in_a_row} "
            "samples after it failed as well"
        )

    def _crops(self, data: bytes, positions: range) -> list[Crop] | None:
        assert isinstance(self._transform, TrainTransform)
        return self._transform.crops(data, self._seed, positions)

    def _blank(self) -> Tensor:
        return torch.zeros((), dtype=torch.uint8).expand(
            self._transform.in_channels, *self._transform.image_size
        )

    def _read(self, number: int, sample: Sample) -> bytes:
        try:
            return _bytes(self._reader, sample)
        except BadImage as error:
            self._known_bad[number] = str(error)
            raise

    def _candidates(self, position: int, number: int) -> Iterator[int]:
        yield number
        yield from self._plan.substitutes(position, number)


class _LabelledReading(Dataset[_Read]):
    """Numbers of samples -> views at the centre.

    What cannot be read, and -1, gives an empty image at position -1.
    """

    def __init__(
        self,
        index: ShardIndex,
        transform: CentreTransform,
        cache: Cache | None,
        change: Change | None,
    ) -> None:
        self._index, self._transform, self._reader, self._change = (
            index,
            transform,
            Reader(cache),
            change,
        )

    def __getitem__(self, asked: _Asked) -> _Read:
        requests = asked.requests
        nothing = View(
            torch.zeros(
                self._transform.in_channels, *self._transform.image_size, dtype=torch.uint8
            ),
            (0, 0, 0, 0, 0),
        )
        padding = (Sample(Shard("", 0, 0, "", b""), "", 0, 0, NO_LABEL), nothing)
        rows: list[tuple[Sample, View]] = []
        bad: list[BadSample] = []
        positions = requests.positions.copy()
        for row, number in enumerate(requests.samples.tolist()):
            rows.append(padding)
            if number < 0:
                continue
            sample = self._index[number]
            try:
                view = self._transform(_bytes(self._reader, sample), 0, number)
                changed = self._change(view.image, number) if self._change else view.image
                rows[row] = (sample, view._replace(image=changed))
            except BadImage as error:
                bad.append(_bad_sample(number, sample, str(error), ""))
                positions[row] = -1
        return _Read(_batch(rows, positions, torch.zeros(len(rows), 0, dtype=torch.int64), 0), bad)


def _bytes(reader: Reader, sample: Sample) -> bytes:
    """The bytes of a sample's image.

    Raises BadImage where the shard ends before them, OSError where it is gone.
    """
    data = reader.read(sample.shard, sample.offset, sample.size)
    if len(data) < sample.size:
        raise BadImage(f"only {len(data)} of its {sample.size} bytes are there")
    return data


def _batch(
    rows: list[tuple[Sample, View]], positions: NDArray[np.int64], ids: Tensor, num_visible: int
) -> Batch:
    images = _images(len(rows), *rows[0][1].image.shape)
    for row, (_, view) in enumerate(rows):
        images[row] = view.image
    return Batch(
        images=images,
        ids_shuffle=ids,
        num_visible=num_visible,
        labels=torch.tensor([sample.label for sample, _ in rows], dtype=torch.int64),
        keys=tuple(sample.id for sample, _ in rows),
        positions=torch.from_numpy(positions),
        crops=torch.tensor([view.crop for _, view in rows], dtype=torch.int64),
    )


def _images(count: int, channels: int, height: int, width: int) -> Tensor:
    """[count, channels, height, width] uint8 to be filled. A worker's lies in shared memory, handed
    over as it is.

    torch has no public way to begin there; its own collation does the same.
    """
    shape = (count, channels, height, width)
    if multiprocessing.parent_process() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape), device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def _bad_sample(position: int, sample: Sample, reason: str, replaced_by: str) -> BadSample:
    shard, _, key = sample.id.partition("/")
    return BadSample(position, shard, key, sample.offset, reason, replaced_by)


# ------------------------------------------------------------------------------------ the processes


def _loader(
    reading: Dataset[Any], order: Sampler[_Asked], workers: int, prefetch: int, *, persistent: bool
) -> DataLoader[Any]:
    processes: dict[str, Any] = {}
    if workers:
        processes = {
            "num_workers": workers,
            "prefetch_factor": prefetch,
            "multiprocessing_context": fork_server("torch", __name__),
            "persistent_workers": persistent,
            "worker_init_fn": _start_worker,
        }
    return DataLoader(
        reading,
        sampler=order,
        batch_size=None,  # an item of the order is a whole batch
        collate_fn=_as_is,
        pin_memory=torch.cuda.is_available(),
        # it draws a seed for workers that we do not use: not from the run's generator
        generator=torch.Generator(),
        **processes,
    )


def _stop(reads: Iterator[Any]) -> None:
    """End the workers now. torch offers no public way: it waits for the iterator to be collected,
    and where that is left to the collector of cycles (after an exception), the queues go first and
    it waits 5 s for each worker."""
    if isinstance(reads, _MultiProcessingDataLoaderIter):
        reads._shutdown_workers()


def _as_is(read: Any) -> Any:
    return read


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    end_with_owner()
