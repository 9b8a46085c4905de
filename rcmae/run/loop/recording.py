"""A logged step's figures: losses over all ranks, rates, and what the caller adds."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rcmae import dist
from rcmae.models.tuning import compiling
from rcmae.objectives import Objective
from rcmae.run import startup
from rcmae.run.loop.instruments import Instruments
from rcmae.run.loop.progress import Progress
from rcmae.run.loop.stragglers import Stragglers


class Recorder:
    """Writes steps to metrics.jsonl, the console and TensorBoard; shows how far they are."""

    def __init__(
        self,
        objective: Objective,
        progress: Progress,
        instruments: Instruments,
        stragglers: Stragglers,
    ) -> None:
        self._objective = objective
        self._progress = progress
        self._instruments = instruments
        self._stragglers = stragglers
        self._zero_losses = 0

    def step_done(self) -> None:
        """Count the current step; report the first of this job."""
        progress = self._progress
        if progress.is_first_of_job:
            startup.mark("first step")
            seconds = startup.seconds()
            self._instruments.log.event("first_step", step=progress.step + 1, startup_s=seconds)
        self._tell_failures()
        meter = self._instruments.meter
        meter.step(progress.images_per_step)
        self._instruments.log.moved(progress.step + 1, meter.images_per_s())

    def _tell_failures(self) -> None:
        """Say once, on each rank that it happened to, that blocks could not be compiled."""
        log = self._instruments.log
        for told in compiling.drain_news():
            if log.writes:
                log.warn(told)
            else:
                print(f"rcmae: rank {dist.rank()}: {told}", file=sys.stderr, flush=True)

    def record(self, losses: Sequence[dict[str, Tensor]], **figures: float) -> None:
        """Write the step just done. Collective: every rank calls; waits for the device.

        Args:
            losses: of each micro-batch of this rank, its share of each term's mean.
            figures: more numbers of the step.
        """
        row = self._row(losses, figures)
        meter = self._instruments.meter
        steps, speed = meter.steps, meter.read()
        ranks = self._stragglers.compare(
            self._progress.step, steps=steps, step_s=speed["step_s"], data_s=speed["data_wait_s"]
        )
        if row["loss"] == 0:
            self._zero_losses += 1
            row["zero_losses"] = self._zero_losses  # logged steps of this job
        self._instruments.log.step({**row, **speed, **ranks})
        if self._zero_losses == 1 and row["loss"] == 0:
            self._instruments.log.warn(
                f"the loss of step {self._progress.step} is exactly 0: nothing is learnt from such "
                "a step. In a segmentation none of its pixels has a label: look at the maps. Said "
                "once; metrics.jsonl counts these among the logged steps as zero_losses"
            )

    def show(self, losses: Sequence[dict[str, Tensor]], **figures: float) -> None:
        """Print the step just done, which metrics.jsonl does not get. Arguments of `record`.

        Collective: every rank calls; waits for the device.
        """
        row = self._row(losses, figures)
        self._instruments.log.tell({**row, **self._instruments.meter.figures()})

    def mention(self) -> None:
        """Say that the step just done is done, where no line came for long. Not collective, and
        nothing is waited for: without its loss.
        """
        rate = self._instruments.meter.images_per_s()
        self._instruments.log.mention(self._progress.step, rate)

    def _row(
        self, losses: Sequence[dict[str, Tensor]], figures: Mapping[str, float]
    ) -> dict[str, float]:
        """Where the run stands and its loss over all ranks. Collective."""
        weights = self._objective.weights
        shares = [torch.stack([micro[term] for micro in losses]).sum() for term in weights]
        means = dist.all_sum(torch.stack(shares).double()).tolist()
        terms = dict(zip(weights, means, strict=True))
        total = sum(weights[term] * mean for term, mean in terms.items())
        return {
            "step": self._progress.step,
            "images_seen": self._progress.images,
            "epoch": self._progress.epoch,
            "loss": total,
            **{f"loss_{term}": mean for term, mean in terms.items()},
            **figures,
        }
