"""This rank's micro-batches, step by step, and what went wrong in reading them."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rcmae import dist
from rcmae.config import Recipe, first_batch_doubts
from rcmae.data.batch import Batch
from rcmae.data.loading import WorkersLost
from rcmae.data.sources import AccessDenied
from rcmae.data.stream import BadSample, Stream, TooManyBadSamples
from rcmae.data.transforms import Normalise
from rcmae.process import waits
from rcmae.run import startup
from rcmae.run.loop.instruments import Instruments
from rcmae.run.loop.progress import Progress

if TYPE_CHECKING:
    from rcmae.tasks.protocol import Task


class Trouble(NamedTuple):
    """Why a rank has no samples."""

    told: str
    may_pass: bool  # a new start can help: a store that is away, a lost disk, killed workers


class Copies:
    """Copies micro-batches to the device one ahead, beside what it computes.

    Args:
        device: with a stream of its own for them, where it is a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._under_way: tuple[Batch, Batch] | None = None  # as it was, and there

    def begin(self, batch: Batch) -> None:
        """Begin to copy the one that is taken next."""
        with torch.cuda.stream(self._stream):  # nothing where there is none
            self._under_way = (batch, batch.to(self._device))

    def take(self, batch: Batch) -> Batch:
        """The batch on the device, for work that is launched from now on."""
        under_way, self._under_way = self._under_way, None
        if under_way is None or under_way[0] is not batch:
            return batch.to(self._device)
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            under_way[1].record_stream(current)
        return under_way[1]


class _Read(NamedTuple):
    """Micro-batches that were read."""

    data_step: int  # in the stream
    micros: list[Batch]


class Batches:
    """What the loop iterates over: the micro-batches of each remaining step.

    Those of the next step are read while one is computed (`ahead`). A rank that cannot read its
    samples yields none for the step and keeps why in `trouble`: the ranks learn of it together, in
    `agreement`.
    """

    def __init__(
        self,
        stream: Stream,
        task: Task,
        recipe: Recipe,
        progress: Progress,
        instruments: Instruments,
        normalise: Normalise,
    ) -> None:
        self.stream = stream
        self.trouble: Trouble | None = None  # why this rank has no samples
        self.losses: list[str] = []  # workers that were killed and replaced, and not noted yet
        self.bad: list[BadSample] = []  # samples of what was read last that were replaced
        self.longest_step_s = 0.0
        self._task = task
        self._progress = progress
        self.normalise = normalise
        self._recipe = recipe
        self._instruments = instruments
        self._began = math.inf
        self._is_looked_at = False  # the first batch of the job
        self._copies = Copies(dist.device())
        self._steps: Iterator[Sequence[Batch]] = iter(())
        self._read = _Read(-2, [])  # last

    def __iter__(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each remaining step, from wherever the run stands."""
        progress = self._progress
        while not progress.is_over:
            self._began = time.monotonic()
            if self._read.data_step != progress.data_step:  # the first, or a rewind skipped some
                self._read_on(progress.data_step, progress.step)
            with self._working():
                yield self._read.micros

    def ahead(self) -> list[Batch]:
        """The micro-batches of the step after the one under way; waits for them."""
        self._read_on(self._progress.data_step + 1, self._progress.step + 1)
        for first in self._read.micros[:1]:
            self._copies.begin(first)
        return self._read.micros

    def ready(self, batch: Batch) -> Batch:
        """The batch on this rank's device, images normalised, as the task's objective wants it."""
        on_device = self._copies.take(batch)
        micros = iter(self._read.micros)
        if any(each is batch for each in micros):
            for following in itertools.islice(micros, 1):
                self._copies.begin(following)
        batch = self.normalise(on_device)
        if not self._is_looked_at:
            self._is_looked_at = True
            self._look_at(batch.images)
        drill = self._recipe.guard.drill_nan_position
        if drill is not None and drill in batch.positions:
            hit = (batch.positions == drill).to(batch.images.device)
            batch.images[hit] = math.nan
        return self._task.ready(self._recipe, batch, self.normalise, self._progress.data_step)

    def _look_at(self, images: Tensor) -> None:
        """Warn where normalised images are not as they should be. Waits for the device: once."""
        std, mean = torch.std_mean(images.float(), dim=(0, 2, 3))
        for told in first_batch_doubts(self._recipe, mean.tolist(), std.tolist()):
            self._instruments.log.warn(told)

    def end_step(self) -> None:
        """Note how long the step took."""
        self.longest_step_s = max(self.longest_step_s, time.monotonic() - self._began)

    def _waiting(self, step: int) -> contextlib.AbstractContextManager[None]:
        workers = self._recipe.data.workers
        return waits.waiting(
            f"the samples of step {step} (data.workers={workers})",
            check=self.stream.missing_workers,
        )

    def _working(self) -> contextlib.AbstractContextManager[None]:
        """The step, which a request to stop lets end: it is answered, by one rank, which also says
        why the first of a job takes so long where blocks are compiled.
        """
        first = self._progress.is_first_of_job and self._recipe.engine.compile
        doing = self._instruments.presence.doing

        def answer(reason: str) -> str:
            now = waits.at_once(reason, "without a save")
            return f"stop requested ({reason}): the run saves and ends after {doing()}.{now}"

        if dist.rank() != 0:
            return waits.waiting("", breaks=False)
        what = "the first step, for which torch.compile builds kernels" if first else ""
        return waits.waiting(what, breaks=False, answer=answer)

    def _read_on(self, data_step: int, step: int) -> None:
        """Read a step of the stream, for a step of the training."""
        self._instruments.presence.at(self._progress.step, "reading samples")
        self.trouble = None
        if data_step != self._read.data_step + 1:
            self._steps = self.stream.steps(data_step)
        self._read = _Read(data_step, self._micros(step))
        self.bad = self.stream.drain_bad()
        self.losses += self.stream.drain_losses()

    def _micros(self, step: int) -> list[Batch]:
        try:
            with self._instruments.meter.waiting(), self._waiting(step):
                micros = self._task.pair(self._recipe, list(next(self._steps)))
        except waits.StopAsked:  # all ranks hear it, in the agreement
            return []
        except (TooManyBadSamples, OSError, RuntimeError) as error:
            passes = isinstance(error, OSError | WorkersLost)
            denied = isinstance(error, PermissionError | AccessDenied)
            self.trouble = Trouble(str(error), passes and not denied)
            return []
        if step == self._progress.first_step:
            startup.mark("first batch")
        return micros
