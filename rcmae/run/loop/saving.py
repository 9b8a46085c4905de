"""When a run is committed: what is due, what a save took, what failed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from rcmae import checkpoint, dist
from rcmae.checkpoint.lease import LeaseLost
from rcmae.config import CheckpointOptions
from rcmae.engines.protocol import Engine
from rcmae.run.loop.instruments import Instruments
from rcmae.run.loop.progress import Progress

FAILURES = 3  # saves that fail one after the other end the run
AGAIN_S = 10.0  # after which a failed save is tried again, while lines of the log wait, too
DISK_RATE = 1e8  # bytes/s: the guess of how long a save takes, before one was measured
BYTES_A_WEIGHT = 16  # weight, two moments and the teacher, in float32


class Saving:
    """Begins saves when they are due and notes what they committed.

    Every method is collective unless it says other: every rank calls, in the same order.

    Args:
        saver: writes in a thread of its own.
        options: the recipe's.
        about: what a checkpoint says of the run beside its tensors, at the moment of the save.
        renew: puts what the run's folder needs beside checkpoints back, where somebody deleted it.
        guess_s: how long a save may take, until one was measured.
    """

    def __init__(
        self,
        saver: checkpoint.Saver,
        engine: Engine,
        progress: Progress,
        instruments: Instruments,
        *,
        options: CheckpointOptions,
        about: Callable[[], Mapping[str, Any]],
        renew: Callable[[], None],
    ) -> None:
        self.asked = False  # by checkpoint.every_minutes
        self.saved_at = time.monotonic()
        self.saved_step = -1  # of which a save was begun
        self.committed_step = -1
        self.save_s = 0.0  # the longest save of this job and the last ones before
        self.is_measured = False
        self._saver = saver
        self._engine = engine
        self._progress = progress
        self._options = options
        self._about = about
        self._renew = renew
        self._is_called = False  # by a log whose lines wait
        self._tried_step = -1  # at which a save was to be begun last
        self._instruments = instruments
        self._failures = 0

    def resume(self, seconds: list[float]) -> None:
        """Take up where the run's last job left off: its newest step is committed.

        Args:
            seconds: of its last saves, as its events tell.
        """
        self.saved_step = self._progress.step
        self.committed_step = self._progress.step
        if seconds:
            self.save_s = max(seconds)
            self.is_measured = True

    def is_done(self) -> bool:
        """Whether a save was under way on this rank and has ended. Not collective."""
        return self._saver.is_done()

    @property
    def was_tried(self) -> bool:
        """Whether a save was begun after the step done last, or could not be: what was asked for
        before is settled. The same on every rank.
        """
        return self._tried_step == self._progress.step

    def is_under_way(self) -> bool:
        """Whether a save is being written on this rank. Not collective."""
        return self._saver.is_under_way()

    def is_called_for(self) -> bool:
        """Whether the disk does not take the lines of the log: then a save is tried, and again
        where it fails, so that the run ends while it can. Not collective.
        """
        if self._instruments.log.problem is None:
            self._is_called = False
            return False
        if not self._is_called:
            return True
        return self._failures > 0 and time.monotonic() - self.saved_at >= AGAIN_S

    def is_due_after(self, step: int) -> bool:
        """Whether one is to be begun after this step. The same on every rank; not collective."""
        every = self._options.every_steps
        return self.asked or (every is not None and step % every == 0)

    def when_due(self) -> None:
        """Begin a save if this step is one for it. Raises as `collect`."""
        if self.is_due_after(self._progress.step):
            self.begin()

    def begin(self) -> bool:
        """Begin to commit this step, once; whether there was time. Raises as `collect`.

        None is begun that would not be committed by the deadline, by what saves took so far.
        """
        step = self._progress.step
        if self.saved_step == step:
            return True
        self._tried_step = step
        self._instruments.presence.at(step, "waiting for the save before, or copying for the next")
        if not dist.from_first(
            not self.is_measured or self._instruments.stop.has_time(self.save_s)
        ):
            reason = f"a save takes {self.save_s:.1f} s, and the deadline is nearer"
            self._instruments.log.event("checkpoint_left_out", step=step, reason=reason)
            return False
        with self._instruments.meter.away():
            began = time.monotonic()
            self._instruments.log.sync()
            if dist.rank() == 0:
                with self._instruments.log.sparing("recipe and index"):
                    self._renew()
            self.saved_at = time.monotonic()
            self._instruments.stopwatch.saving(self.saved_at - began)
            self._is_called = True
            begun = self._note(self._copy)
            if not begun and self._options.background:  # it was the one before that failed
                begun = self._note(self._copy)
            if begun:
                self.saved_step = step
        return True

    def collect(self) -> bool:
        """Wait for the save under way and note what it committed; whether it did not fail.

        Raises:
            CheckpointError: on every rank, when three in a row could not be written. Until then the
                run continues without them.
            LeaseLost: on every rank; the run is another job's.
        """
        return self._note(self._saver.wait)

    def finish(self) -> None:
        """Commit this step, if there is time, and wait for it. Raises as `collect`."""
        self._instruments.presence.at(self._progress.step, "waiting for the last save")
        self.collect()
        while self.saved_step != self._progress.step and self.begin():
            self.collect()

    def settle(self) -> None:
        """Wait for the save under way, at an end that is not a good one, and note what it
        committed.

        Raises nothing of what a save does: the run ends of another error.
        """
        step = self._progress.step
        self._instruments.presence.at(step, "waiting for the save under way, before it ends")
        with contextlib.suppress(checkpoint.CheckpointError, LeaseLost):
            self.collect()

    def settle_alone(self, seconds: float) -> None:
        """The same where this rank alone fails: its peers' threads write on, for so long at most.
        Not collective.
        """
        step = self._progress.step
        self._instruments.presence.at(step, "waiting for the save under way, before it ends")
        if self._saver.ends_within(seconds):
            # whatever came of it: the error that ends this rank is another
            with contextlib.suppress(Exception):
                self.collect()

    def _copy(self) -> checkpoint.Saved | None:
        progress = self._progress
        try:
            return self._saver.save(
                self._engine, step=progress.step, images=progress.images, meta=self._about()
            )
        finally:
            self._instruments.stopwatch.saving(self._saver.own_s)

    def _note(self, get: Callable[[], checkpoint.Saved | None]) -> bool:
        try:
            saved = get()
        except checkpoint.CheckpointError as error:
            self.saved_step = -1
            self._failures += 1
            self._instruments.log.event(
                "checkpoint_failed", step=self._progress.step, reason=str(error)
            )
            if self._failures >= FAILURES:
                raise
            self._instruments.log.say(f"continuing without a checkpoint: {error}")
            return False
        if saved is not None:
            self.save_s = max(self.save_s, saved.seconds) if self.is_measured else saved.seconds
            self.is_measured = True
            self._failures = 0
            self.committed_step = saved.step
            self._instruments.log.event(
                "checkpoint", **{**saved._asdict(), "path": str(saved.path)}
            )
        return True
