"""A logged step's figures: losses over all ranks, rates, and what the caller adds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rcmae import dist
from rcmae.objectives import Objective
from rcmae.run import startup
from rcmae.run.loop.instruments import Instruments
from rcmae.run.loop.progress import Progress


class Recorder:
    """Writes steps to metrics.jsonl, the console and TensorBoard."""

    def __init__(self, objective: Objective, progress: Progress, instruments: Instruments) -> None:
        self._objective = objective
        self._progress = progress
        self._instruments = instruments

    def step_done(self) -> None:
        """Count the step under way; tell of the first of this job."""
        progress = self._progress
        if progress.is_first_of_job:
            startup.mark("first step")
            seconds = startup.seconds()
            self._instruments.log.event("first_step", step=progress.step + 1, startup_s=seconds)
        self._instruments.meter.step(progress.images_per_step)

    def record(self, losses: Sequence[dict[str, Tensor]], **figures: float) -> None:
        """Write the step just done. Collective: every rank calls; waits for the device.

        Args:
            losses: of each micro-batch of this rank, its share of each term's mean.
            figures: more numbers of the step.
        """
        weights = self._objective.weights
        shares = [torch.stack([micro[term] for micro in losses]).sum() for term in weights]
        means = dist.all_sum(torch.stack(shares).double()).tolist()
        terms = dict(zip(weights, means, strict=True))
        total = sum(weights[term] * mean for term, mean in terms.items())
        self._instruments.log.step(
            {
                "step": self._progress.step,
                "images_seen": self._progress.images,
                "epoch": self._progress.epoch,
                "loss": total,
                **{f"loss_{term}": mean for term, mean in terms.items()},
                **figures,
                **self._instruments.meter.read(),
            }
        )
