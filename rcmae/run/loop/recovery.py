"""What is done about a step whose loss or gradient is not finite, or whose loss jumped.

Where the device itself leaves a bad update out, the host need not wait for what it said of a step
before it launches the next one's passes. So a step that nothing is written of, judged or saved
after is `expect`ed to be well, and asked about (`settle`) when the next one's gradients are on
their way: before its update, before a stop, and before anything is committed. Weights, moments and
teacher are then as the bad step found them, and so are the gradients that were just computed: with
the weights that the step left. What was done about it is the same, and done to the same state, as
if it had been waited for.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from rcmae import checkpoint
from rcmae.config import Recipe
from rcmae.data.batch import Batch
from rcmae.engines.protocol import Engine, StepStats
from rcmae.run.guard import Guard, NonFiniteLoss, bundle
from rcmae.run.loop.instruments import Instruments
from rcmae.run.loop.progress import Progress
from rcmae.run.loop.saving import Saving


class _Expected(NamedTuple):
    """A step of which it is not known whether it was well."""

    micros: list[Batch]  # without images
    losses: Sequence[dict[str, Tensor]]
    stats: StepStats


class Recovery:
    """Skips a bad step, goes back to the last checkpoint, or stops the run: guard.action says."""

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        guard: Guard,
        progress: Progress,
        saving: Saving,
        instruments: Instruments,
    ) -> None:
        self._recipe = recipe
        self._engine = engine
        self._guard = guard
        self._progress = progress
        self._saving = saving
        self._instruments = instruments
        self._expected: _Expected | None = None

    def must_wait(self) -> bool:
        """Whether the device has to be waited for in the step under way, since the host decides, or
        something is written of it, judged or saved after it. The same on every rank.
        """
        progress, recipe = self._progress, self._recipe
        decided = self._engine.decides_on_device and recipe.guard.spike_factor is None
        if not decided or recipe.teacher.update == "micro_step":
            return True
        step = progress.step + 1
        every = (
            recipe.log.every_steps,
            recipe.evaluate.every_steps,
            recipe.evaluate.picture_every_steps,
        )
        last = step == progress.total_steps
        told = progress.is_early or any(progress.is_due(each) for each in every)
        return last or told or self._saving.is_due_after(step)

    def expect(
        self,
        micros: Sequence[Batch],
        losses: Sequence[dict[str, Tensor]],
        stats: StepStats,
    ) -> None:
        """Take the step done last, of this rank, for well until `settle`."""
        kept = [replace(batch, images=batch.images.new_empty(0)) for batch in micros]
        self._expected = _Expected(kept, losses, stats)

    def settle(self) -> bool:
        """Do what is to be done about the step done last, if it was not well after all; whether the
        run goes on with the step under way, whose gradients may be there. Else it was rewound, and
        these are dropped. Collective: every rank calls. Raises as `skips`.
        """
        expected, self._expected = self._expected, None
        if expected is None or expected.stats.finite:
            return True
        self._engine.take_back()
        self._progress.go_back()
        micros, losses, stats = expected
        if self.skips(micros, losses, grad_norm=stats.grad_norm, jumped=None):
            self._progress.advance()
            return True
        self._engine.step(lr=0.0, weight_decay=0.0, discard=True)
        return False

    def skips(
        self,
        micros: Sequence[Batch],
        losses: Sequence[dict[str, Tensor]],
        *,
        grad_norm: float,
        jumped: str | None,
    ) -> bool:
        """Whether the bad step is skipped; else the run went back and reads on beyond its samples.

        Nothing was updated. Collective: every rank calls.

        Args:
            micros, losses: of this rank's step.
            grad_norm: of the whole step; it may be what is not finite.
            jumped: why the loss is an outlier, if it is.

        Raises:
            NonFiniteLoss: on every rank, if guard.action or its limits say stop; a bundle for
                `rcmae replay` is written before.
        """
        with contextlib.suppress(checkpoint.CheckpointError):
            self._saving.collect()
        progress = self._progress
        last, _ = checkpoint.newest_together(self._recipe.run_dir / "checkpoints")
        place = {
            "step": progress.step,
            "data_step": progress.data_step,
            "checkpoint": str(last.path) if last else None,
        }
        about = {
            **place,
            "grad_norm": grad_norm,
            "jumped": jumped,
            "recipe": self._recipe.model_dump(mode="json"),
        }
        report = bundle(self._recipe.run_dir, about, micros, losses)
        action = self._guard.decide(can_rewind=last is not None)
        self._instruments.log.event(
            "not_finite" if jumped is None else "spike",
            action=action,
            bundle=str(report.path),
            **place,
            grad_norm=grad_norm,
            jumped=jumped,
            samples=report.samples,
        )
        if action == "stop":
            path = shlex.quote(str(report.path))
            raise NonFiniteLoss(
                f"step {progress.step}: {jumped or report.what}; all ranks stopped before the "
                f"update. {report.shown}Last committed checkpoint: {last.path if last else 'none'}."
                f" To see the step again on one process: rcmae replay {path}; then lower "
                "schedule.lr, set schedule.clip_grad, or set guard.action=skip or rewind"
            )
        if action == "skip":
            return True
        assert last is not None
        self._rewind(last)
        return False

    def _rewind(self, last: checkpoint.Manifest) -> None:
        progress = self._progress
        # the samples since the checkpoint, this step's among them, are not used again
        read_on = progress.data_step + 1
        checkpoint.load(last, self._engine)
        progress.rewind(last.step, read_on)
        self._saving.saved_step = last.step
        self._instruments.log.rewind(last.step)
        skipped = read_on - last.step
        self._instruments.log.say(f"rewound to {last.path}; skips the samples of {skipped} steps")
