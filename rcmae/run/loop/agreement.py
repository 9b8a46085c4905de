"""What all ranks decide together before each step, in one small sum that takes none of its time.

It is asked in the middle of the step before, once the last forward pass is launched, and told
before the step: the sum (`exchange`) goes on beside the backward pass and the update. So a request
to stop ends the run after the step under way or, where it comes in that step's second half, after
the next: within a step and a half. All ranks act on the same sum, before the same step: the step at
which the run stops is one, and it is committed. An evaluation may take minutes: after one it is
asked anew. A rank alone asks nobody, and looks when it acts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rcmae import dist, exchange
from rcmae.checkpoint.lease import Lease, LeaseLost
from rcmae.config import Recipe
from rcmae.data.batch import Batch
from rcmae.objectives import Objective
from rcmae.process import waits
from rcmae.run.loop.batches import Batches
from rcmae.run.loop.evaluation import Evaluation
from rcmae.run.loop.instruments import Instruments
from rcmae.run.loop.progress import Progress
from rcmae.run.loop.saving import Saving


class DataUnreadable(RuntimeError):
    """A rank could not read its samples; says which rank and why.

    All ranks stand at a step's boundary, so what is done can still be committed.
    """

    def __init__(self, message: str, *, may_pass: bool) -> None:
        super().__init__(message)
        self.may_pass = may_pass  # a new start can help


class Agreed(NamedTuple):
    """The same on every rank."""

    counts: Mapping[str, float]  # of each term over the whole step: pixels, images, ...
    stop: str | None  # why the run stops before this step
    unreadable: DataUnreadable | None = None  # why it has to

    def shares(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A micro-batch's part of each term's mean over the whole step.

        A term that counts nothing in the step (no image has a label) is 0.

        Raises:
            TypeError: a sum is no scalar.
        """
        for term, total in sums.items():
            if total.ndim:
                raise TypeError(
                    f"the objective's term {term} gives {list(total.shape)}; it must be a scalar, "
                    "the sum over the micro-batch"
                )
        return {term: total / max(self.counts[term], 1.0) for term, total in sums.items()}

    def loss(self, weights: Mapping[str, float], shares: Mapping[str, Tensor]) -> Tensor:
        """What a micro-batch adds to the step's loss: the weighted sum of its shares."""
        return torch.stack([weights[term] * share for term, share in shares.items()]).sum()


class Flags(NamedTuple):
    """What this rank has to say before a step. Summed over the ranks."""

    stop: float
    save: float
    trouble: float
    lost: float
    saved: float
    noted: float  # bad samples or lost workers


class _Asked(NamedTuple):
    """What this rank has said before a step."""

    data_step: int  # in the stream
    sums: exchange.Sum  # counts, then flags


class Agreement:
    """The decisions before a step. Collective: every rank calls `ask_ahead` and `before_step`, each
    once a step.
    """

    def __init__(
        self,
        recipe: Recipe,
        objective: Objective,
        progress: Progress,
        batches: Batches,
        saving: Saving,
        evaluation: Evaluation,
        instruments: Instruments,
        *,
        lease: Lease | None,
    ) -> None:
        self.recipe = recipe
        self._objective = objective
        self.progress = progress
        self._batches = batches
        self._saving = saving
        self._evaluation = evaluation
        self._lease = lease
        self._instruments = instruments
        self._asked: _Asked | None = None  # before the next step

    def ask_ahead(self) -> None:
        """Read the next step's samples and begin to agree on it, while this one is computed.
        Nothing is waited for but the samples. Collective.
        """
        step = self.progress.step + 1
        if step == self.progress.total_steps or self._limit_is_reached(step):
            return
        micros = self._batches.ahead()
        if dist.world() > 1:
            self._look_at_the_clock(steps=2)  # the rest of this one, and the next
            self._asked = self._ask(self.progress.data_step + 1, micros)
        self._instruments.presence.at(self.progress.step, "computing the step")

    def before_step(self, micros: Sequence[Batch]) -> Agreed:
        """The step's global counts, and whether the run stops. Collective: every rank calls.

        Raises:
            LeaseLost: on every rank; the run is another job's by now.
        """
        told = self._flags_of(totals := self._totals(micros))
        self._saving.asked = told.save > 0 and not self._saving.was_tried
        if told.lost:
            raise LeaseLost(dist.from_first(self._lease.why_lost if self._lease else None))
        if told.saved == dist.world() and not self._saving.was_tried:
            self._saving.collect()
        if told.noted:
            self._note_reading()
        counts = dict(zip(self._objective.weights, totals, strict=False))
        if told.trouble:
            return Agreed(counts, None, self._unreadable())
        stop = self._why_stop(asked=told.stop > 0)
        if stop is None:
            self._instruments.presence.at(self.progress.step, "computing the step")
        return Agreed(counts, stop)

    def _ask(self, data_step: int, micros: Sequence[Batch]) -> _Asked:
        counts = self._counts(micros).values()
        return _Asked(data_step, exchange.begin([*counts, *self._flags()]))

    def _totals(self, micros: Sequence[Batch]) -> list[float]:
        """Counts and flags over all ranks. Collective."""
        self._instruments.presence.at(self.progress.step, "agreeing on the step")
        asked, self._asked = self._asked, None
        if asked is not None:
            self._wait_for(asked)
        if asked is None or self._is_outdated(asked):
            self._look_at_the_clock(steps=1)
            asked = self._ask(self.progress.data_step, micros)
            self._wait_for(asked)
        self._instruments.stopwatch.met(asked.sums.took_s)
        return asked.sums.wait()

    def _wait_for(self, asked: _Asked) -> None:
        awaited = self._instruments.presence.awaited
        with waits.waiting(awaited, breaks=False, answer=self._answer):
            asked.sums.wait()

    def _is_outdated(self, asked: _Asked) -> bool:
        """Whether it was asked before other samples, or long ago. The same on every rank."""
        options = self.recipe.evaluate
        evaluated = self.progress.was_due(options.every_steps)
        drawn = self.progress.was_due(options.picture_every_steps)
        return asked.data_step != self.progress.data_step or evaluated or drawn

    def _flags_of(self, totals: Sequence[float]) -> Flags:
        return Flags(*totals[len(self._objective.weights) :])

    def _answer(self, reason: str) -> str:
        """To a request to stop, where peers have not come: a save needs them all."""
        step = self._saving.committed_step
        kept = f"at the checkpoint of step {step}" if step >= 0 else "without a checkpoint"
        now = waits.at_once(reason, kept)
        return (
            f"stop requested ({reason}): the run saves and ends once all ranks are at step "
            f"{self.progress.step}; waiting for {self._instruments.presence.awaited()}.{now}"
        )

    def _look_at_the_clock(self, *, steps: int) -> None:
        """Ask for a stop where the time left does not allow so many steps and a save. Rank 0's."""
        if dist.rank() != 0:
            return
        step_s = steps * self._batches.longest_step_s
        if self.progress.is_due(self.recipe.evaluate.every_steps, ahead=steps - 1):
            step_s += self._evaluation.longest_s
        if self._instruments.stop.is_late(save_s=self._saving.save_s, step_s=step_s):
            self._instruments.stop.ask("the deadline is near")

    def _counts(self, micros: Sequence[Batch]) -> dict[str, float]:
        totals = dict.fromkeys(self._objective.weights, 0.0)
        for batch in micros:
            for term, count in self._objective.counts(batch).items():
                totals[term] += count
        return totals

    def _flags(self) -> Flags:
        minutes = self.recipe.checkpoint.every_minutes
        since_save_s = time.monotonic() - self._saving.saved_at
        save = self._saving.is_called_for()
        if minutes is not None and dist.rank() == 0:
            save |= since_save_s >= 60 * minutes
        return Flags(
            stop=self._instruments.stop.reason is not None,
            save=save,
            trouble=self._batches.trouble is not None,
            lost=self._lease is not None and self._lease.lost,
            saved=self._saving.is_done(),
            noted=bool(self._batches.bad or self._batches.losses),
        )

    def _note_reading(self) -> None:
        """Write down what went wrong in reading and was made good."""
        log, step = self._instruments.log, self.progress.step
        ranks = dist.gather((self._batches.bad, self._batches.losses))
        self._batches.bad, self._batches.losses = [], []
        for rank, (samples, losses) in enumerate(ranks):
            for bad in samples:
                log.event("bad_sample", step=step, **bad._asdict())
            for loss in losses:
                log.event("worker_lost", step=step, rank=rank, reason=loss)
                log.say(f"step {step}, rank {rank}: {loss}")

    def _unreadable(self) -> DataUnreadable:
        """Which ranks have no samples for this step, and why. Collective."""
        ranks = dist.gather(self._batches.trouble)
        troubles = {rank: trouble for rank, trouble in enumerate(ranks) if trouble is not None}
        lines = [f"rank {rank}: {trouble.told}" for rank, trouble in troubles.items()]
        may_pass = all(trouble.may_pass for trouble in troubles.values())
        told = f"step {self.progress.step}: " + "\n".join(lines)
        return DataUnreadable(told, may_pass=may_pass)

    def _why_stop(self, *, asked: bool) -> str | None:
        progress = self.progress
        if asked:
            reasons = enumerate(dist.gather(self._instruments.stop.own_reason))
            by_rank = {rank: reason for rank, reason in reasons if reason}
            self._instruments.log.event("signal", step=progress.step, asked=by_rank)
            return f"asked by {' and '.join(sorted(set(by_rank.values())))}"
        if self._limit_is_reached(progress.step):
            return f"run.stop_after_steps={self.recipe.run.stop_after_steps}"
        return None

    def _limit_is_reached(self, step: int) -> bool:
        limit = self.recipe.run.stop_after_steps
        return limit is not None and step - self.progress.first_step >= limit
