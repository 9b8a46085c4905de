"""The teacher: an exponential moving average of the student's fp32 master weights, shard by shard.

Two things are kept apart. The *accumulator* (fp32) averages the masters and is sharded exactly as
the optimizer shards them, so an update needs no communication and does not depend on the sharding.
The *copy* is what the teacher computes with: the accumulator rounded to the compute type. Where
masters are sharded but every rank computes with the whole copy (ZeRO-1, ZeRO-2), one all-gather of
the rounded shards follows (`Publication`).

Not done: an EMA in bf16. At momentum 0.9999 a step is far below bf16's resolution and 98 % of the
movement is lost. `stochastic` rounding is offered for who has no memory for the accumulator:
unbiased, but noisier."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from rcmae.errors import Refused


class Publication(Protocol):
    """Brings updated shards of the copy to the ranks that compute with all of it, while other
    work continues.
    """

    def begin(self) -> None:
        """Start sending. Collective: every rank calls."""

    def wait(self) -> None:
        """Return when nothing is under way.

        On a GPU it returns at once: later work on the stream waits.
        """


class Telemetry(NamedTuple):
    """What an update did.

    Sums are over this rank's shards; add them up over ranks before dividing.
    """

    difference_sq: Tensor  # sum of (student - teacher)^2 after the update
    weight_sq: Tensor  # sum of student^2
    moved: Tensor  # elements of the copy that changed
    elements: Tensor
    seconds: float  # host time of the update; on a GPU with a synchronisation at both ends


class Teacher:
    """Shards of the teacher on this rank.

    Args:
        masters: fp32 shards of the student, 1-D or any shape, live views.
        copies: the same elements of the teacher in the compute type, live views. fp32 copies are
            their own accumulators.
        accumulate: "fp32_shard" or "stochastic".
        publication: begun after each update, waited for before anything touches the shards again.
        statistics: running buffers of the student, each with the teacher's: taken over as they
            are, not averaged.
        seed: of the stochastic rounding.
        offset: of this rank's shards, so that different shards round with different draws.
    """

    def __init__(
        self,
        masters: Sequence[Tensor],
        copies: Sequence[Tensor],
        *,
        accumulate: str = "fp32_shard",
        publication: Publication | None = None,
        statistics: Sequence[tuple[Tensor, Tensor]] = (),
        seed: int = 0,
        offset: int = 0,
    ) -> None:
        assert all(
            m.dtype == torch.float32 and m.shape == c.shape
            for m, c in zip(masters, copies, strict=True)
        )
        self.masters = list(masters)
        self.copies = list(copies)
        self._publication = publication
        self._statistics = list(statistics)
        self.stochastic = accumulate == "stochastic"
        self.updates = 0  # part of the draw of the stochastic rounding; restored with the run
        self._seed = seed
        self._offset = offset
        if self.stochastic or all(copy.dtype == torch.float32 for copy in copies):
            self.accumulators = self.copies
        else:
            self.accumulators = [master.detach().clone() for master in masters]

    def settle(self) -> None:
        """Wait for a publication that is under way: it writes the copies, and shards may be
        views of them.
        """
        if self._publication is not None:
            self._publication.wait()

    @torch.no_grad()
    def start_from_student(self) -> None:
        """Make the teacher equal to the student. Collective: every rank calls."""
        self.settle()
        torch._foreach_copy_(self.accumulators, self.masters)
        self.round()

    @torch.no_grad()
    def round(self) -> None:
        """Bring the copies up to the accumulators, as after a load.

        Collective: every rank calls.
        """
        self.settle()
        if self.accumulators is not self.copies:
            torch._foreach_copy_(self.copies, self.accumulators)
        for ours, theirs in self._statistics:
            theirs.copy_(ours)
        if self._publication is not None:
            self._publication.begin()

    @property
    def has_statistics(self) -> bool:
        """Whether running buffers are taken over."""
        return bool(self._statistics)

    @torch.no_grad()
    def update(self, momentum: float, unless: Tensor | None = None) -> None:
        """teacher = momentum x teacher + (1 - momentum) x student (RC-MAE, section 3).

        Where `unless` is 1.0 on the device, the teacher stays as it is; it is counted all the same.
        Collective: every rank calls.
        """
        self.settle()
        self.updates += 1
        share: float | Tensor = 1.0 - momentum  # of the student
        if unless is not None:
            share = (1.0 - unless) * share
        if self.stochastic:
            self._update_stochastic(share)
        elif isinstance(share, float):
            torch._foreach_lerp_(self.accumulators, self.masters, share)
        else:  # torch has no kernel over several tensors for it; the same numbers
            for average, master in zip(self.accumulators, self.masters, strict=True):
                average.lerp_(master, share)
        self.round()

    def _update_stochastic(self, share: float | Tensor) -> None:
        for index, (copy, master) in enumerate(zip(self.copies, self.masters, strict=True)):
            generator = torch.Generator(copy.device)
            key = np.random.SeedSequence([self._seed, self._offset, self.updates, index])
            generator.manual_seed(int(key.generate_state(1, np.uint64)[0]))
            copy.copy_(round_stochastically(copy.float().lerp_(master, share), generator))

    @torch.no_grad()
    def measured_update(self, momentum: float) -> Telemetry:
        """`update`, with what it did.

        For log steps: it keeps the old copies and waits for the device.
        """
        self.settle()
        before = [copy.clone() for copy in self.copies]
        _synchronize(self.copies)
        begin = time.perf_counter()
        self.update(momentum)
        _synchronize(self.copies)
        seconds = time.perf_counter() - begin
        device = self.copies[0].device if self.copies else torch.device("cpu")

        def total(parts: list[Tensor]) -> Tensor:
            parts = [part.to(device, torch.float64) for part in parts]
            return (
                torch.stack(parts).sum()
                if parts
                else torch.zeros((), dtype=torch.float64, device=device)
            )

        pairs = zip(self.accumulators, self.masters, strict=True)
        differences = [(average.float() - master).square().sum() for average, master in pairs]
        weights = [master.square().sum() for master in self.masters]
        moved = [(new != old).sum() for new, old in zip(self.copies, before, strict=True)]
        elements = [torch.tensor(copy.numel()) for copy in self.copies]
        return Telemetry(
            difference_sq=total(differences),
            weight_sq=total(weights),
            moved=total(moved),
            elements=total(elements),
            seconds=seconds,
        )


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 to bf16, up or down with the probability that keeps the mean.

    The 16 bits that bf16 drops are compared with a random 16-bit number by adding it and cutting
    off."""
    noise = torch.randint(
        0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator
    )
    return ((values.view(torch.int32) + noise) & -0x10000).view(torch.float32).bfloat16()


def _synchronize(tensors: Sequence[Tensor]) -> None:
    if tensors and tensors[0].is_cuda:
        torch.cuda.synchronize(tensors[0].device)


class TeacherBytes(NamedTuple):
    """Bytes of one rank's teacher."""

    copy: int
    accumulator: int


def teacher_bytes(
    placement: str,
    groups: Sequence[Sequence[Sequence[int]]],
    *,
    rank: int,
    world: int,
    precision: str,
    accumulate: str = "fp32_shard",
) -> TeacherBytes:
    """What the teacher takes on a rank, by formula; padding and uneven cuts included. Pure.

    Args:
        placement: "local", "ddp", "zero0", "zero1", "zero2", "zero3" or "fsdp2".
        groups: for each optimizer group the shapes of its parameters.
        rank: whose bytes; among those that share.
        world: number of ranks that share what is sharded.
        precision: "fp32" or "bf16", the type of the copy.
        accumulate: "fp32_shard" or "stochastic".

    DDP lays a group end to end, padded to a multiple of 8 x world elements where it is sharded;
    ZeRO-1/2 lay a group end to end, pad it to a multiple of 2 x world elements and split it in
    `world` pieces; ZeRO-3 splits each parameter, padded to a multiple of world; FSDP2 splits the
    rows of each parameter in chunks of ceil(rows / world), the last ranks getting fewer or none.
    """
    width = 2 if precision == "bf16" else 4
    sizes = [list(map(math.prod, group)) for group in groups]
    whole = sum(map(sum, sizes))
    if placement in ("local", "zero0") or (placement == "ddp" and world == 1):
        copied = held = whole
    elif placement == "ddp":
        padded = [math.ceil(sum(group) / (8 * world)) * 8 * world for group in sizes if group]
        copied = sum(padded)
        held = sum(padded) // world
    elif placement in ("zero1", "zero2"):
        padded = [math.ceil(sum(group) / (2 * world)) * 2 * world for group in sizes if group]
        copied = sum(padded)
        held = sum(padded) // world
    elif placement == "zero3":
        copied = held = sum(math.ceil(size / world) for group in sizes for size in group)
    elif placement == "fsdp2":
        copied = held = sum(
            _rows_of(shape[0], rank, world) * math.prod(shape[1:]) for g in groups for shape in g
        )
    else:
        raise Refused(
            f"no placement {placement!r}; known: local, ddp, zero0, zero1, zero2, zero3, fsdp2"
        )
    is_copy = accumulate == "stochastic" or precision == "fp32"
    return TeacherBytes(copy=copied * width, accumulator=0 if is_copy else held * 4)


def _rows_of(rows: int, rank: int, world: int) -> int:
    chunk = math.ceil(rows / world)
    return max(0, min(chunk, rows - rank * chunk))
