"""Sums of a few numbers over all ranks, beside the training: begun at one moment, waited for at a
later one.

gloo's all-reduce passes a message round a ring, 2 (P - 1) hops one after the other. Here each rank
sends to the ranks 1, 2, 4, ... further on, so that a sum takes ceil(log2 P) hops, whatever the
number P of ranks (after Bruck et al., 1997). A thread does it: the training goes on meanwhile.

Not done: a group of its own, which would be P - 1 more connections a rank. Messages go over the
control group under tags that nothing else there uses; what has a tag waits for no collective.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence

import torch
import torch.distributed as torch_dist
from torch import Tensor

from rcmae import dist

_TAG = 7001  # of the first hop's messages


def distances(world: int) -> list[int]:
    """How far on each hop's message goes, in ranks: ceil(log2 world) hops."""
    return [1 << hop for hop in range((world - 1).bit_length())]


class Doubling:
    """One rank's part of a sum, without the messages. Pure.

    After the hops 1, 2, ..., d / 2 it has the sum of the last d ranks up to itself, and that of the
    last (world mod d): the first doubles with each hop, the second grows to all of them.

    Args:
        values: this rank's, float64: sums of whole numbers are exact, whatever the order.
        world: how many ranks there are.
    """

    def __init__(self, values: Tensor, world: int) -> None:
        self._world = world
        self._sums = torch.stack([values, torch.zeros_like(values)])  # [2, numbers]

    def message(self) -> Tensor:
        """What the rank further on gets: [2, numbers]."""
        return self._sums

    def take(self, distance: int, received: Tensor) -> None:
        """Add the message of the rank so far back."""
        doubled, rest = self._sums
        if self._world & distance:
            rest = doubled + received[1]
        self._sums = torch.stack([doubled + received[0], rest])

    def total(self) -> Tensor:
        """The sum over all ranks, after the last hop: [numbers]."""
        is_power_of_two = self._world & (self._world - 1) == 0
        return self._sums[0 if is_power_of_two else 1]


class Sum:
    """A sum under way."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values = list(values)
        self._began = time.perf_counter()
        self._took_s = 0.0
        self._done = threading.Event()
        self._found: list[float] | BaseException = self.values

    @property
    def is_done(self) -> bool:
        """Whether `wait` returns at once."""
        return self._done.is_set()

    @property
    def took_s(self) -> float:
        """From its begin on this rank to its end, which all ranks see at nearly one moment: whoever
        begins last waits least.
        """
        assert self.is_done
        return self._took_s

    def wait(self) -> list[float]:
        """The sums over the ranks.

        Raises:
            RuntimeError: a peer is gone, or did not come in time.
        """
        self._done.wait()
        if isinstance(self._found, BaseException):
            raise self._found
        return self._found

    def end(self, found: list[float] | BaseException) -> None:
        """What came of it: the thread says so."""
        self._found = found
        self._took_s = time.perf_counter() - self._began
        self._done.set()


class _Thread:
    """What sums, one after the other, in the order in which they were begun."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[Sum | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="sums over ranks", daemon=True)
        self._thread.start()

    def put(self, sums: Sum) -> None:
        """Do it next."""
        self._waiting.put(sums)

    def close(self) -> None:
        """Return when all is done."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (sums := self._waiting.get()) is not None:
            try:
                sums.end(_summed(sums.values).tolist())
            except Exception as error:  # raised where it is waited for
                sums.end(error)


_thread: _Thread | None = None


def begin(values: Sequence[float]) -> Sum:
    """Begin to sum plain numbers over the ranks. Collective: every rank calls, as many numbers, in
    the same order as other sums.
    """
    global _thread
    sums = Sum(values)
    if dist.world() == 1:
        sums.end(sums.values)
        return sums
    if _thread is None:
        _thread = _Thread()
        dist.before_leaving(close)
    _thread.put(sums)
    return sums


def close() -> None:
    """Wait for what is under way, before the process group ends."""
    global _thread
    if _thread is not None:
        _thread.close()
        _thread = None


def _summed(values: Sequence[float]) -> Tensor:
    """The sums over the ranks. In the thread."""
    rank, world, group = dist.rank(), dist.world(), dist.control()
    part = Doubling(torch.tensor(values, dtype=torch.float64), world)
    for hop, distance in enumerate(distances(world)):
        mine = part.message()
        received = torch.empty_like(mine)
        ahead, back = (rank + distance) % world, (rank - distance) % world
        coming = torch_dist.irecv(received, src=back, group=group, tag=_TAG + hop)
        going = torch_dist.isend(mine, dst=ahead, group=group, tag=_TAG + hop)
        for work in (coming, going):
            assert work is not None
            work.wait()
        part.take(distance, received)
    return part.total()
