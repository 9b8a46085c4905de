"""When a run is judged, and where what was found is written."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rcmae import dist
from rcmae.config import Recipe
from rcmae.evaluation.pictures import save_png
from rcmae.evaluation.unlabelled.spectra import is_collapsed
from rcmae.files import write_aside
from rcmae.run.loop.batches import Batches
from rcmae.run.loop.instruments import Instruments
from rcmae.run.loop.progress import Progress
from rcmae.run.records.metrics import MetricsLog, events_of
from rcmae.tasks.protocol import Evaluated, Evaluating, Interrupted, Saved, Task


class Evaluation:
    """The task's evaluation and picture, when they are due. Collective: every rank calls."""

    def __init__(
        self,
        task: Task,
        context: Callable[[], Evaluating],
        batches: Batches,
        progress: Progress,
        instruments: Instruments,
        *,
        save_s: Callable[[], float],
    ) -> None:
        self.last: Evaluated | None = None  # for the summary
        self.last_step = -1  # of it
        self.longest_s = 0.0
        self._drew = False  # in this job
        self._task = task
        self._context = context
        self._batches = batches
        self._progress = progress
        self._instruments = instruments
        self._save_s = save_s  # how long a save takes, as far as is known

    def resume(self) -> None:
        """Make the evaluation that the job before left for a stop request, if it left one."""
        if self._progress.owes_evaluation:
            with self._instruments.meter.away():
                self.judge(self._context())

    def alone(self) -> None:
        """Judge and draw now, where the recipe asks for it at all."""
        context = self._context()
        self.judge(context)
        if context.recipe.evaluate.picture_every_steps:
            self.draw(context)

    def when_due(self) -> None:
        """Judge and draw, if this step is one for it."""
        context = self._context()
        options = context.recipe.evaluate
        self._instruments.presence.at(self._progress.step, "evaluating or saving")
        with self._instruments.meter.away():
            if self._progress.was_due(options.every_steps):
                self.judge(context)
            if self._progress.was_due(options.picture_every_steps):
                self.draw(context)

    def judge(self, context: Evaluating) -> None:
        """Evaluate the networks as they are now and write it down; not where a stop is asked for
        meanwhile, which the loop hears next.
        """
        began = time.monotonic()
        step = self._progress.step
        self._instruments.log.event("evaluation_begun", step=step)  # its process may be killed
        self._instruments.log.say(f"step {step}: evaluating")
        context = dataclasses.replace(context, pause=self._pause)
        try:
            found = self._task.evaluate(context)
        except Interrupted:
            self._progress.owes_evaluation = True
            seconds = time.monotonic() - began
            self._instruments.log.event("evaluation_left", step=step, seconds=seconds)
            self._instruments.log.say(
                f"asked to stop: the evaluation of step {step} is left to the job that resumes"
            )
            return
        self._progress.owes_evaluation = False
        found = with_left_out(found, context, self._task, self._instruments.log)
        self.last, self.last_step = found, step
        self._progress.note_scores(found.best)
        seconds = time.monotonic() - began
        self.longest_s = max(self.longest_s, seconds)
        best = {"best": self._progress.best} if found.best else {}
        about = {**found.event, **best, **ranks_of(found)}
        about |= {"scalars": found.scalars, "seconds": seconds}
        note_collapse(found, self._instruments.log, step)
        self._instruments.log.event("evaluate", step=step, **about)
        write_evaluated(found, self._instruments.log, context.recipe.run_dir, step)

    def draw(self, context: Evaluating) -> None:
        """Write what the networks make of a few images of the stream's beginning."""
        first = self._batches.stream.first_images(context.recipe.evaluate.picture_images)
        picture = self._task.picture(context, self._batches.ready(first))
        if picture is not None and dist.rank() == 0:
            step = self._progress.step
            path = context.recipe.run_dir / "pictures" / f"step-{step:08d}.png"
            with self._instruments.log.sparing("pictures"):
                save_png(picture, path)
                if not self._drew:
                    self._instruments.log.say(f"a picture of step {step}: {path}")
                self._drew = True
            self._instruments.log.picture("reconstruction", picture, step)

    def _pause(self) -> None:
        """Leave the evaluation if any rank was asked to stop, or the deadline leaves no time."""
        stop = self._instruments.stop
        if stop.is_late(self._save_s()):
            stop.ask("the deadline is near")
        if dist.agree(stop.reason is not None):
            raise Interrupted


def owes_evaluation(recipe: Recipe, saved: Saved) -> bool:
    """Whether the evaluation of this checkpoint was left, and not made since. Collective."""
    if saved.meta.get("evaluated", True):
        return False
    made = events_of(recipe.run_dir, "evaluate") if dist.rank() == 0 else []
    return dist.from_first(all(event["step"] != saved.step for event in made))


def with_left_out(found: Evaluated, context: Evaluating, task: Task, log: MetricsLog) -> Evaluated:
    """What an evaluation found, and how many samples of its sets could not be used: the figures are
    of the others. Warns where that is a larger share than a training would bear. Collective.
    """
    keys = [each.key for each in task.evaluation_sets(context.recipe)]
    left_out = context.left_out
    mine = [len(left_out.samples.get(number, ())) for number in range(len(keys))]
    told, lines = {}, []
    for number, count in enumerate(dist.sum_numbers(mine)):
        if not count:
            continue
        of = left_out.of[number]
        told[keys[number]] = {"samples": int(count), "of": of}
        line = (
            f"{keys[number]}: {int(count):,} of {of:,} samples could not be used ({count / of:.1%})"
        )
        lines.append(f"left out: {line}")
        most = context.recipe.data.max_bad_fraction
        if count > most * of:
            log.warn(
                f"{line}, more than data.max_bad_fraction={most}: the figures are of the others; "
                "rcmae shards check verify names what is wrong"
            )
    if not told:
        return found
    return dataclasses.replace(
        found,
        event={**found.event, "left_out": told},
        table="\n".join([found.table, *lines]),
        document=None if found.document is None else {**found.document, "left_out": told},
    )


RANKS = "effective_rank"  # in an event


def ranks_of(found: Evaluated) -> dict[str, Mapping[str, float]]:
    """What the event of an evaluation says of effective ranks, for the evaluations after it."""
    return {RANKS: found.effective_rank} if found.effective_rank else {}


def note_collapse(found: Evaluated, log: MetricsLog, step: int) -> None:
    """Raise an alarm where features use a tenth of the directions that they used, by what the log
    has of earlier evaluations. To be called before this one is noted. The run goes on.
    """
    if not log.writes or not found.effective_rank:
        return
    before = events_of(log.directory, "evaluate")
    for name, rank in found.effective_rank.items():
        ranks = [event[RANKS][name] for event in before if name in event.get(RANKS, ())]
        highest = max(ranks, default=rank)
        if not is_collapsed(rank, highest):
            continue
        log.event("collapse", step=step, network=name, effective_rank=rank, highest=highest)
        log.say(
            f"the {name}'s features collapse: their effective rank was {highest:.1f}, at step "
            f"{step} it is {rank:.1f} (all images alike: 1). The run goes on; look at its loss and "
            "at schedule.lr, or begin a run from an earlier checkpoint (checkpoint.resume=PATH)"
        )


def write_evaluated(found: Evaluated, log: MetricsLog, folder: Path, step: int) -> None:
    """Curves, the table for people, and under `folder` the task's document and pictures."""
    for group, values in found.scalars.items():
        log.scalars(group, values, step)
    log.say(f"{found.says.format(step=step)}\n{found.table}")
    if dist.rank() != 0:
        return
    with log.sparing("what an evaluation draws and lists"):
        if found.document is not None:
            path = folder / "evaluation" / f"step-{step:08d}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            content = json.dumps({"step": step, **found.document}, indent=1)
            write_aside(path, content, durable=False)
        for name, content in found.files.items():
            path = folder / "evaluation" / f"{name}-step-{step:08d}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_aside(path, json.dumps(content), durable=False)
        for name, picture in found.pictures.items():
            save_png(picture, folder / "pictures" / f"{name}-{step:08d}.png")
