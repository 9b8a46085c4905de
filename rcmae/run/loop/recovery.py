"""What is done about a step whose loss or gradient is not finite, or whose loss jumped."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from torch import Tensor

from rcmae import checkpoint
from rcmae.config import Recipe
from rcmae.data.batch import Batch
from rcmae.engines.protocol import Engine
from rcmae.run.guard import Guard, NonFiniteLoss, bundle
from rcmae.run.loop.instruments import Instruments
from rcmae.run.loop.progress import Progress
from rcmae.run.loop.saving import Saving


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
            raise NonFiniteLoss(
                f"step {progress.step}: {jumped or report.what}; all ranks stopped before the "
                f"update. {report.shown}Last committed checkpoint: {last.path if last else 'none'}."
                f" To see the step again on one process: rcmae replay {report.path}; then lower "
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
