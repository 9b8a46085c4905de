"""Where a run stands: the one place that counts steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rcmae.tasks.protocol import Score

EARLY = (1, 2, 5, 10, 20, 50)  # steps of a job that are shown, whatever log.every_steps


@dataclass
class Progress:
    """Steps done, samples consumed and the best scores of a run."""

    total_steps: int
    images_per_step: int
    samples_per_epoch: int
    step: int = 0  # optimizer steps done
    data_step: int = 0  # the same in the stream: ahead of `step` by what a rewind skipped
    # network -> metric and its step
    best: dict[str, dict[str, float]] = field(default_factory=dict)
    owes_evaluation: bool = False  # the one of this step was left for a stop request

    def __post_init__(self) -> None:
        self.first_step = self.step  # of this job

    @property
    def images(self) -> int:
        """Images consumed, over all epochs and ranks."""
        return self.data_step * self.images_per_step

    @property
    def epoch(self) -> float:
        """The same in epochs."""
        return self.images / self.samples_per_epoch

    @property
    def fraction(self) -> float:
        """How much of the training is done, from 0 to 1."""
        return self.step / self.total_steps

    @property
    def is_first_of_job(self) -> bool:
        """Whether this job has not done a step yet."""
        return self.step == self.first_step

    @property
    def is_early(self) -> bool:
        """Whether the step under way is one of the first of this job that are shown: every rank
        answers alike.
        """
        return self.step + 1 - self.first_step in EARLY

    @property
    def is_over(self) -> bool:
        """Whether the last step is done."""
        return self.step >= self.total_steps

    def advance(self) -> None:
        """Count a step, in the training and in the stream."""
        self.step += 1
        self.data_step += 1

    def go_back(self) -> None:
        """Stand at the step done last again."""
        self.step -= 1
        self.data_step -= 1

    def rewind(self, step: int, data_step: int) -> None:
        """Go back to a checkpoint's step, and read on beyond the samples that led astray."""
        self.step = step
        self.data_step = data_step

    def is_due(self, every_steps: int | None, ahead: int = 0) -> bool:
        """Whether the step under way, or one so far ahead, is one of every so many, or the last."""
        return self._matches(self.step + 1 + ahead, every_steps)

    def was_due(self, every_steps: int | None) -> bool:
        """Whether the step done last is one of every so many, or the last of the run."""
        return self._matches(self.step, every_steps)

    def note_scores(self, scores: Mapping[str, Score]) -> None:
        """Keep the scores that are better than those before."""
        for network, score in scores.items():
            before = self.best.get(network, {}).get(score.metric)
            if before is None or score.value > before:
                self.best[network] = {score.metric: score.value, "step": self.step}

    def _matches(self, step: int, every_steps: int | None) -> bool:
        if every_steps is None:
            return False
        return step % every_steps == 0 or step == self.total_steps
