"""Whole samples of a set, for evaluations of images of any size: each once over all ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from torch.utils.data import Dataset, Sampler

from rcmae.data.cache import Cache, Reader
from rcmae.data.index import ShardIndex
from rcmae.data.loading import Workers, loader
from rcmae.data.members.reading import image_bytes, member_bytes
from rcmae.data.sources import redacted
from rcmae.data.stream import Readers
from rcmae.data.transforms import BadImage
from rcmae.data.workers import READING

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Whole(NamedTuple):
    """A sample as it lies in its tar."""

    number: int  # in its index
    id: str  # "shard/key"
    label: int  # NO_LABEL where it has none
    image: bytes  # encoded
    content: Mapping[str, bytes]  # kind -> bytes of the member


class _Turn(NamedTuple):
    """What a worker hands over."""

    made: Any  # None where there is none
    bad: str = ""  # what is wrong with a sample


class WholeReading(Dataset[_Turn], Generic[T]):
    """Numbers of samples -> what is made of each; -1 gives nothing."""

    def __init__(
        self,
        index: ShardIndex,
        make: Callable[[Whole], T],
        kinds: Sequence[str],
        optional: Sequence[str],
        cache: Cache | None,
    ) -> None:
        self._index = index
        self._make = make
        self._kinds = tuple(kinds)
        self._optional = tuple(optional)
        self._reader = Reader(cache)

    def __getitem__(self, number: int) -> _Turn:
        if number < 0:
            return _Turn(None)
        sample = self._index[number]
        try:
            try:
                return _Turn(self._made(number))
            except BadImage:
                if not self._reader.renewed(sample.shard):
                    raise
                return _Turn(self._made(number))
        except BadImage as error:
            return _Turn(None, f"{sample.id} ({redacted(str(error))})")
        except MemoryError:
            return _Turn(None, f"{sample.id} (there is not enough memory for it)")

    def _made(self, number: int) -> T:
        sample = self._index[number]
        image = image_bytes(self._reader, sample)
        content = member_bytes(self._reader, self._index, number, self._kinds, self._optional)
        return self._make(Whole(number, sample.id, sample.label, image, content))


def num_turns(index: ShardIndex, world: int) -> int:
    """How many turns `whole_samples` gives to each rank."""
    return -(-len(index) // world)


def whole_samples(
    index: ShardIndex,
    make: Callable[[Whole], T],
    *,
    readers: Readers,
    kinds: Sequence[str] = (),
    optional: Sequence[str] = (),
    rank: int = 0,
    world: int = 1,
    on_bad: Callable[[str], None] | None = None,
) -> Iterator[T | None]:
    """What `make` makes of this rank's samples, each sample once over all ranks: at turn t rank r
    has sample t x world + r. Every rank gets as many turns.

    None: there is no sample for this rank at the last turn, or it cannot be used.

    Args:
        index: the samples.
        make: called by the workers; raises BadImage of a sample that cannot be used.
        kinds: of the members that each sample must have.
        optional: kinds that are read where a sample has them.
        rank, world: whose samples.
        readers: who reads; each has few samples ready, as images may be large.
        on_bad: is told of samples that cannot be used, "shard/key (what is wrong)"; by default
            they are logged.

    Raises:
        OSError: a shard is gone.
    """
    turns = num_turns(index, world)
    numbers = np.arange(turns) * world + rank
    numbers[numbers >= len(index)] = -1
    order = _Numbers(numbers.tolist())
    reading = WholeReading(index, make, kinds, optional, readers.cache)
    here = min(readers.workers, turns)
    workers = Workers(
        lambda: loader(
            reading,
            order,
            here,
            readers.prefetch,
            persistent=False,
            preload=READING,
        )
    )

    def start_at(turn: int) -> None:
        order.first = turn

    try:
        for turn in workers.reads(start_at):
            if turn.bad and on_bad is not None:
                on_bad(turn.bad)
            elif turn.bad:
                _log.warning("left out of the evaluation: %s", turn.bad)
            yield turn.made
    finally:
        workers.close()
        for loss in workers.drain():
            _log.warning("%s", loss)


class _Numbers(Sampler[int]):
    """Numbers of samples, from a turn on."""

    def __init__(self, numbers: list[int]) -> None:
        self._numbers = numbers
        self.first = 0

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers[self.first :])
