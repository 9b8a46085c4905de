"""Pretrain. READ FIRST: a recipe becomes parts (`assemble`), and `fit` is the whole method on one
screen.

    python -m rcmae.train RECIPE.yaml [key=value ...]
        one process
    deepspeed --module rcmae.train RECIPE.yaml ...
        or torchrun -m rcmae.train, or srun python -m rcmae.train

The same command on the same run.dir goes on from the newest committed checkpoint. Exit status: 0
finished, 75 stopped on request with a checkpoint committed (run it again), 2 the user's input is
wrong, 1 anything else."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rcmae import checkpoint, config, dist
from rcmae.checkpoint import Manifest
from rcmae.checkpoint.lease import Lease, LeaseHeld, LeaseLost, exit_status, newest_generation
from rcmae.commands import training
from rcmae.commands.training import Asked
from rcmae.config import Recipe, Resolved
from rcmae.data.batch import NO_LABEL, Batch
from rcmae.data.cache import Cache, cache_problem, node_cache
from rcmae.data.device_decode import device_decoder
from rcmae.data.index import ShardIndex
from rcmae.data.masking import Mask
from rcmae.data.patterns import Patterns
from rcmae.data.plan import Plan
from rcmae.data.sources import patience
from rcmae.data.stream import (
    BadSample,
    Stream,
    TooManyBadSamples,
    labelled_batches,
    refuse_unlabelled,
)
from rcmae.data.transforms import Normalise, Transform
from rcmae.data.views import train_transform
from rcmae.engines.build import engine_settings, make_engine
from rcmae.engines.protocol import Engine
from rcmae.engines.schedules import teacher_momentum, warmup_half_cosine
from rcmae.errors import Refused
from rcmae.evaluation.features import evaluating, features_of_both, pixels, pooled
from rcmae.evaluation.knn import knn_rows, knn_table
from rcmae.evaluation.logistic import logistic_rows
from rcmae.evaluation.pictures import reconstruction_picture, save_png
from rcmae.models import kernels
from rcmae.models.build import Network, new_network, new_student, new_teacher
from rcmae.models.flops import step_flops
from rcmae.objectives import OBJECTIVES, Objective, make_objective, pixel_options
from rcmae.objectives.masks import make_mask
from rcmae.run import preempt, startup
from rcmae.run.folder import (
    choose_checkpoint,
    mismatches,
    own,
    peek,
    start_folder,
    unwritable,
    versions,
)
from rcmae.run.guard import Guard, NonFiniteLoss, bundle
from rcmae.run.meter import Meter
from rcmae.run.metrics import MetricsLog, closing_summary, events_of
from rcmae.run.presence import Presence
from rcmae.weights.reading import read_network_together
from rcmae.weights.shapes import whole_network

# --------------------------------------------------------------------------------------- the method


def fit(run: Run) -> str | None:
    """Train from `run.step` to the end. Collective: every rank calls.

    Returns:
        None when the last step is done, else why the run stops here (a checkpoint is committed
        either way).

    Raises:
        NonFiniteLoss: on every rank, before the update, if any rank's loss or gradient is not
            finite (or the loss jumped) and guard.action or its limits say stop.
        DataGoneBad: on every rank, if any cannot read its samples.
        LeaseLost: on every rank; another job took the run over.
    """
    engine, objective, sizes = run.engine, run.objective, run.sizes
    for micros in run.batches():
        # one small all-reduce: the step's global counts, and who asked to stop
        counts, why_stop = run.agree(micros)
        if why_stop:
            return why_stop
        seen = []
        for index, batch in enumerate(micros):
            batch, last = run.on_device(batch), index == len(micros) - 1
            sums = objective(engine.student, engine.teacher, batch, run.step / sizes.total_steps)
            # 0: no image has a label
            shares = {term: total / max(counts[term], 1.0) for term, total in sums.items()}
            loss = torch.stack(
                [objective.weights[term] * share for term, share in shares.items()]
            ).sum()
            # gradients are summed: over micro-batches, and in the last over ranks
            engine.backward(loss, last=last)
            seen.append({term: share.detach() for term, share in shares.items()})
            if run.recipe.teacher.update == "micro_step" and not last:
                engine.update_teacher(run.momentum(index))
        lr, momentum, logs = (
            run.lr(),
            run.momentum(len(micros) - 1),
            run.is_due(run.recipe.log.every_steps),
        )
        jumped = run.guard.jumped(seen)  # an all-reduce, where guard.spike_factor asks for it
        stats = engine.step(
            lr=lr, weight_decay=run.recipe.schedule.weight_decay, discard=jumped is not None
        )
        if jumped is not None or not stats.finite:
            # or it raises: guard.action says which
            run.skip_or_rewind(micros, seen, stats.grad_norm, jumped)
            continue
        telemetry = engine.update_teacher(momentum, measure=logs)
        run.advance()
        if logs:
            run.record(seen, lr=lr, momentum=momentum, grad_norm=stats.grad_norm, **telemetry)
        run.evaluate_when_due()
        run.save_when_due()
    return None


class DataGoneBad(RuntimeError):
    """A rank could not read its samples; says which and why."""


# ---------------------------------------------------------------------------------------- the parts

SLOW_DISK = 1e8  # bytes/s, to guess by how long a save takes before one was measured


class Task(Protocol):
    """What a run trains and how it is judged.

    The loop, engines, stream, checkpoints and files are the same for all.
    """

    command: str  # the module that a user starts
    objectives: tuple[str, ...]  # values of objective.name that it trains

    def labelled(self, recipe: Recipe) -> Sequence[str | list[str]]:
        """Shards that the evaluation reads."""

    def problems(
        self,
        recipe: Recipe,
        index: ShardIndex | None,
        labelled: Sequence[ShardIndex],
        saved: Manifest | None,
    ) -> list[str]:
        """What stands against this recipe on this data, before anything is written; also fills in
        what follows from both. Collective: every rank calls."""

    def mask(self, recipe: Recipe) -> Mask:
        """What of an image is seen. Raises ValueError."""

    def transform(self, recipe: Recipe) -> Transform:
        """Image bytes to views. Raises ValueError."""

    def student(self, recipe: Recipe) -> nn.Module:
        """What is trained, the same on every rank."""

    def objective(self, recipe: Recipe, sizes: Resolved) -> Objective:
        """Its loss."""

    def teacher(self, student: nn.Module, objective: Objective) -> nn.Module | None:
        """What follows the student as its moving average, if anything does."""

    def step_flops(
        self, recipe: Recipe, student: nn.Module, objective: Objective, num_visible: int
    ) -> float:
        """Floating-point operations of a step for one image."""

    def pair(self, recipe: Recipe, micros: list[Batch]) -> list[Batch]:
        """A rank's micro-batches of a step, with what one of them needs of another."""

    def ready(self, run: Run, batch: Batch) -> Batch:
        """A normalised batch on the device, as the objective wants it."""

    def evaluate(self, run: Run) -> None:
        """Judge what was trained and write it down. Collective: every rank calls."""


class Pretraining:
    """Masked autoencoding: the student sees a part of each image, and is judged by k-NN on its
    features.
    """

    command = "rcmae.train"
    objectives = tuple(OBJECTIVES)
    _start: nn.Module | None = None  # a student with the weights to start from

    def labelled(self, recipe: Recipe) -> Sequence[str | list[str]]:
        """Training and test set of the k-NN."""
        return (
            (recipe.evaluate.train_shards, recipe.evaluate.test_shards)
            if recipe.evaluate.every_steps
            else ()
        )

    def problems(
        self,
        recipe: Recipe,
        index: ShardIndex | None,
        labelled: Sequence[ShardIndex],
        saved: Manifest | None,
    ) -> list[str]:
        """Weights to start from that do not fit. Collective: every rank calls."""
        init, self._start = recipe.checkpoint.init, None
        if init is None or saved is not None:
            return []
        try:
            source = read_network_together(Path(init), first="student")
            student = new_student(recipe)
            student.load_state_dict(whole_network(student, source.weights))
        except (ValueError, checkpoint.CheckpointError) as error:
            return [f"checkpoint.init={init} with model.name={recipe.model.name}: {error}"]
        self._start = student
        return []

    def mask(self, recipe: Recipe) -> Mask:
        """That of the recipe, for the network's grid. Raises ValueError."""
        with torch.device("meta"):
            return make_mask(recipe, new_network(recipe).grid)

    def transform(self, recipe: Recipe) -> Transform:
        """A random box, flipped or not."""
        return train_transform(recipe)

    def student(self, recipe: Recipe) -> nn.Module:
        """The network, from checkpoint.init where a new run has one."""
        return self._start or new_student(recipe)

    def objective(self, recipe: Recipe, sizes: Resolved) -> Objective:
        """That of the recipe."""
        return make_objective(recipe, sizes)

    def teacher(self, student: nn.Module, objective: Objective) -> nn.Module | None:
        """What of the student the objective asks a teacher for."""
        assert isinstance(student, Network)
        return new_teacher(student, objective.teacher_outputs)

    def step_flops(
        self, recipe: Recipe, student: nn.Module, objective: Objective, num_visible: int
    ) -> float:
        """Forward and backward, and the teacher's forward."""
        assert isinstance(student, Network)
        return step_flops(student, objective.teacher_outputs, num_visible)

    def pair(self, recipe: Recipe, micros: list[Batch]) -> list[Batch]:
        """As they are."""
        return micros

    def ready(self, run: Run, batch: Batch) -> Batch:
        """As it is."""
        return batch

    def evaluate(self, run: Run) -> None:
        """k-NN. Collective: every rank calls."""
        run.evaluate()


@dataclass
class Run:
    """The parts of a run and where it stands.

    Methods marked collective are called by every rank, in the same order.
    """

    task: Task
    recipe: Recipe
    sizes: Resolved
    objective: Objective
    engine: Engine
    stream: Stream
    normalise: Normalise
    index: ShardIndex
    labelled: list[ShardIndex]  # training and test set of the evaluation, if there is one
    cache: Cache | None  # of this node, where shards come from elsewhere
    log: MetricsLog
    meter: Meter
    stop: preempt.StopRequest
    guard: Guard
    saver: checkpoint.Saver
    lease: Lease | None  # rank 0's
    presence: Presence
    step: int = 0  # optimizer steps done
    data_step: int = 0  # the same in the stream: beyond `step` by what a rewind passed over
    saved_step: int = -1  # of which a save was begun
    committed_step: int = -1
    # the longest save of this job and the last ones before; until then a guess. Rank 0's counts
    save_s: float = 0.0
    save_measured: bool = False
    # network -> best k-NN accuracy and its step
    best: dict[str, dict[str, float]] = field(default_factory=dict)
    table: str = ""  # of the last evaluation
    caption: str = "k-NN, top-1 in %"  # of the table

    def __post_init__(self) -> None:
        self.first_step, self._saved_at, self._save_asked = self.step, time.monotonic(), False
        self._trouble: str | None = None  # why this rank has no samples
        self._bad: list[BadSample] = []  # of this rank's micro-batches
        self._failed_saves = 0
        self._step_s, self._evaluation_s, self._step_began = 0.0, 0.0, math.inf

    def advance(self) -> None:
        """A step is done: one further in the training and in the stream."""
        if self.step == self.first_step:
            startup.mark("first step")
            self.log.event("first_step", step=self.step + 1, startup_s=startup.seconds())
        self.step += 1
        self.data_step += 1
        self.meter.step(self.sizes.images_per_step)
        self._step_s = max(self._step_s, time.monotonic() - self._step_began)

    # data

    def batches(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each remaining step, from wherever the run stands."""
        steps, expected = self.stream.steps(self.data_step), self.data_step
        while self.step < self.sizes.total_steps:
            if self.data_step != expected:  # a rewind passed over some
                steps, expected = self.stream.steps(self.data_step), self.data_step
            expected += 1
            self.presence.at(self.step, "reading samples")
            self._step_began = time.monotonic()
            try:
                with self.meter.waiting():
                    micros = self.task.pair(self.recipe, next(steps))
                if self.step == self.first_step:
                    startup.mark("first batch")
            except (TooManyBadSamples, OSError, RuntimeError) as error:
                # the others learn of it in agree()
                micros, self._trouble = [], str(error)
            self._bad = self.stream.drain_bad()
            yield micros

    def on_device(self, batch: Batch) -> Batch:
        """The batch where the model is, images normalised, as the task wants it."""
        drill = self.recipe.guard.drill_nan_position
        batch = self.normalise(batch.to(dist.device()))
        if drill is not None and drill in batch.positions:
            batch.images[(batch.positions == drill).to(batch.images.device)] = math.nan
        return self.task.ready(self, batch)

    # decisions of all ranks

    def agree(self, micros: Sequence[Batch]) -> tuple[dict[str, float], str | None]:
        """Global counts of the step's terms, and why to stop, if any rank was asked to. Collective.

        Raises:
            DataGoneBad, LeaseLost: on every rank, if any has no samples for the step, or the run is
                another job's.
        """
        mine = {
            term: sum(self.objective.counts(batch)[term] for batch in micros)
            for term in self.objective.weights
        }
        minutes = self.recipe.checkpoint.every_minutes
        due = (
            minutes is not None
            and dist.rank() == 0
            and time.monotonic() - self._saved_at >= 60 * minutes
        )
        if dist.rank() == 0 and self.stop.is_late(save_s=self.save_s, step_s=self._step_ahead_s()):
            self.stop.ask("the deadline is near")
        self.presence.at(self.step, "agreeing on the step")
        flags = [
            self.stop.reason is not None,
            due,
            self._trouble is not None,
            self.lease is not None and self.lease.lost,
            self.saver.is_done(),
            bool(self._bad),
        ]
        *totals, stops, saves, troubles, losts, saved, bads = dist.sum_numbers(
            [*mine.values(), *flags]
        )
        self._save_asked = saves > 0
        if losts:
            raise LeaseLost(dist.from_first(self.lease.why_lost if self.lease else None))
        if saved == dist.world():
            self.note_save(self.saver.wait)
        if bads:
            for bad in itertools.chain(*dist.gather(self._bad)):
                self.log.event("bad_sample", step=self.step, **bad._asdict())
        if troubles:
            told = [
                f"rank {rank}: {text}"
                for rank, text in enumerate(dist.gather(self._trouble))
                if text
            ]
            raise DataGoneBad(f"step {self.step}: " + "\n".join(told))
        limit = self.recipe.run.stop_after_steps
        if stops:
            asked = {
                rank: reason for rank, reason in enumerate(dist.gather(self.stop.reason)) if reason
            }
            self.log.event("signal", step=self.step, asked=asked)
            return {}, f"asked by {' and '.join(sorted(set(asked.values())))}"
        if limit is not None and self.step - self.first_step >= limit:
            return {}, f"run.stop_after_steps={limit}"
        self.presence.at(self.step, "computing the step")
        return dict(zip(mine, totals, strict=True)), None

    def _step_ahead_s(self) -> float:
        """The longest that the next step may take by what was seen, its evaluation included."""
        return self._step_s + (
            self._evaluation_s if self.is_due(self.recipe.evaluate.every_steps) else 0.0
        )

    def is_due(self, every_steps: int | None) -> bool:
        """Whether the step under way is one of every so many, or the last."""
        done = self.step + 1
        return every_steps is not None and (
            done % every_steps == 0 or done == self.sizes.total_steps
        )

    # schedules

    def lr(self) -> float:
        """The learning rate of the step under way."""
        return warmup_half_cosine(
            self.step,
            warmup_steps=self.sizes.warmup_steps,
            total_steps=self.sizes.total_steps,
            lr=self.sizes.lr,
            min_lr=self.recipe.schedule.min_lr,
        )

    def momentum(self, micro: int) -> float:
        """The teacher's momentum after this micro-batch of the step under way."""
        teacher = self.recipe.teacher
        each = self.sizes.accumulation if teacher.update == "micro_step" else 1
        return teacher_momentum(
            self.step * each + (micro if each > 1 else 0),
            kind=teacher.schedule,
            base=teacher.momentum,
            end=teacher.momentum_end,
            total_updates=self.sizes.total_steps * each,
            updates_per_epoch=self.sizes.steps_per_epoch * each,
            dynamic=teacher.dynamic,
        )

    # what is written

    def record(self, seen: Sequence[dict[str, Tensor]], **figures: float) -> None:
        """Write the step just done to the metrics. Collective."""
        shares = torch.stack(
            [torch.stack([part[term] for part in seen]).sum() for term in self.objective.weights]
        )
        means = dist.all_sum(shares.double()).tolist()  # waits for the device
        losses = dict(zip(self.objective.weights, means, strict=True))
        images = self.data_step * self.sizes.images_per_step
        self.log.step(
            {
                "step": self.step,
                "images_seen": images,
                "epoch": images / self.sizes.samples_per_epoch,
                "loss": sum(self.objective.weights[term] * loss for term, loss in losses.items()),
                **{f"loss_{term}": loss for term, loss in losses.items()},
                **figures,
                **self.meter.read(),
            }
        )

    def skip_or_rewind(
        self,
        micros: Sequence[Batch],
        seen: Sequence[dict[str, Tensor]],
        grad_norm: float,
        jumped: str | None,
    ) -> None:
        """A step went bad and nothing was updated: leave it out, or go back and pass over its
        samples. Collective.

        Raises:
            NonFiniteLoss: on every rank, if guard.action or its limits say stop; with a bundle for
                tools/replay.py.
        """
        with contextlib.suppress(checkpoint.CheckpointError):
            self.note_save(self.saver.wait)
        last, _ = checkpoint.newest_together(self.recipe.run_dir / "checkpoints")
        place = {
            "step": self.step,
            "data_step": self.data_step,
            "checkpoint": str(last.path) if last else None,
        }
        about = {
            **place,
            "grad_norm": grad_norm,
            "jumped": jumped,
            "recipe": self.recipe.model_dump(mode="json"),
        }
        report = bundle(self.recipe.run_dir, about, micros, seen)
        action = self.guard.decide(can_rewind=last is not None)
        self.log.event(
            "not_finite" if jumped is None else "spike",
            action=action,
            bundle=str(report.path),
            **{
                **place,
                "grad_norm": grad_norm,
                "jumped": jumped,
                "samples": report.samples,
            },
        )
        if action == "stop":
            raise NonFiniteLoss(
                f"step {self.step}: {jumped or report.what}; all ranks stopped before the "
                f"update. {report.shown}"
                f"Last committed checkpoint: {last.path if last else 'none'}. See it again "
                "on one process with "
                f"tools/replay.py {report.path}; then lower schedule.lr, set schedule.clip_grad, "
                "or let guard.action skip or rewind"
            )
        if action == "skip":
            self.advance()
            return
        assert last is not None
        # the samples since the checkpoint, this step's among them, are not used again
        passed_over = self.data_step + 1
        checkpoint.load(last, self.engine)
        self.step, self.data_step, self.saved_step = last.step, passed_over, last.step
        self.log.rewind(self.step)
        self.log.say(
            f"rewound to {last.path}; passing over the samples of {passed_over - last.step} steps"
        )

    def save_when_due(self) -> None:
        """Start to commit a checkpoint if this step is one for it. Collective.

        Raises as `note_save`.
        """
        every = self.recipe.checkpoint.every_steps
        if self._save_asked or (every is not None and self.step % every == 0):
            self.save()

    def save(self) -> bool:
        """Start to commit a checkpoint of this step, once; whether there was time. Collective.
        Raises as `note_save`.

        None is begun that would not be committed by the deadline, by what saves took so far.
        """
        if self.saved_step == self.step:
            return True
        self.presence.at(self.step, "waiting for the save before, or copying for the next")
        if not dist.from_first(not self.save_measured or self.stop.has_time(self.save_s)):
            reason = f"the {self.save_s:.1f} s that a save takes are not left before the deadline"
            self.log.event("checkpoint_left_out", step=self.step, reason=reason)
            return False

        def begin() -> checkpoint.Saved | None:
            images = self.data_step * self.sizes.images_per_step
            return self.saver.save(self.engine, step=self.step, images=images, meta=self.about())

        with self.meter.away():
            self.log.sync()
            self._saved_at = time.monotonic()
            begun = self.note_save(begin)
            if not begun and self.recipe.checkpoint.background:  # it was the one before that failed
                begun = self.note_save(begin)
            if begun:
                self.saved_step = self.step
        return True

    def finish_saves(self) -> None:
        """Commit this step, if there is time, and wait for it. Collective.

        Raises as `note_save`.
        """
        self.presence.at(self.step, "waiting for the last save")
        self.note_save(self.saver.wait)
        while self.saved_step != self.step and self.save():
            self.note_save(self.saver.wait)

    def ending(self, why_stop: str | None) -> tuple[int, str]:
        """Exit status and outcome of a training that came to its end or was stopped."""
        if self.committed_step != self.step:
            left = (
                f"no time was left to save step {self.step}, the run goes on from step "
                f"{self.committed_step}"
            )
            return preempt.STOPPED, f"stopped, {why_stop or 'at the last step'}; {left}"
        if why_stop and self.step < self.sizes.total_steps:
            return preempt.STOPPED, f"stopped, {why_stop}"
        return preempt.FINISHED, "finished"

    def note_save(self, get: Callable[[], checkpoint.Saved | None]) -> bool:
        """Write down what a save committed, or that it failed; whether it did not. Collective.

        Raises:
            CheckpointError: on every rank, when three in a row could not be written. Until then the
                run goes on.
        """
        try:
            saved = get()
        except checkpoint.CheckpointError as error:
            self.saved_step, self._failed_saves = -1, self._failed_saves + 1
            self.log.event("checkpoint_failed", step=self.step, reason=str(error))
            if self._failed_saves >= 3:
                raise
            self.log.say(f"going on without a checkpoint: {error}")
            return False
        if saved is not None:
            self.save_s = max(self.save_s, saved.seconds) if self.save_measured else saved.seconds
            self._failed_saves, self.save_measured, self.committed_step = 0, True, saved.step
            self.log.event("checkpoint", **{**saved._asdict(), "path": str(saved.path)})
        return True

    def about(self) -> dict[str, Any]:
        """What a checkpoint says of the run besides its tensors."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "sizes": self.sizes.asdict(),
            "data_fingerprint": self.index.fingerprint,
            "guard": self.guard.state(),
            "best": self.best,
            "versions": versions(),
        }

    def evaluate_when_due(self) -> None:
        """The task's evaluation and the picture, if this step is one for them. Collective."""
        evaluate = self.recipe.evaluate
        last = self.step == self.sizes.total_steps
        self.presence.at(self.step, "evaluating or saving")
        with self.meter.away():
            if evaluate.every_steps and (self.step % evaluate.every_steps == 0 or last):
                self.task.evaluate(self)
            if evaluate.picture_every_steps and (
                self.step % evaluate.picture_every_steps == 0 or last
            ):
                self.picture()

    def evaluate(self) -> None:
        """k-NN of student and teacher beside a random network and raw pixels. Collective."""
        evaluate, begin = self.recipe.evaluate, time.monotonic()
        untrained = new_student(self.recipe).to(dist.device())
        networks = {"student": pooled(self.engine.student, evaluate.pool)}
        if self.engine.teacher is not None:
            networks["teacher"] = pooled(self.engine.teacher, evaluate.pool)
        networks |= {"random": pooled(untrained, evaluate.pool), "pixels": pixels}
        sets = [
            labelled_batches(
                index,
                image_size=self.recipe.model.image_hw,
                in_channels=self.recipe.model.in_channels,
                batch=evaluate.batch,
                rank=dist.rank(),
                world=dist.world(),
                workers=self.recipe.data.workers,
                cache=self.cache,
            )
            for index in self.labelled
        ]
        with evaluating(self.engine.student, self.engine.teacher):
            features = features_of_both(
                networks, *sets, device=dist.device(), normalise=self.normalise.images
            )
        rows = knn_rows(
            *features, k=evaluate.k, device=dist.device(), temperature=evaluate.temperature
        )
        linear = logistic_rows(*features, device=dist.device()) if evaluate.logistic else {}
        self.table = knn_table(rows, linear)
        self._evaluation_s = max(self._evaluation_s, time.monotonic() - begin)
        for name in networks.keys() & {"student", "teacher"}:
            accuracy = max(rows[name].values())
            if accuracy > self.best.get(name, {}).get("knn", -1.0):
                self.best[name] = {"knn": accuracy, "step": self.step}
        self.log.event(
            "evaluate",
            step=self.step,
            knn=rows,
            **({"logistic": linear} if linear else {}),
            best=self.best,
            seconds=time.monotonic() - begin,
        )
        for name, row in rows.items():
            self.log.scalars(
                f"knn_{name}", {f"k{k}": accuracy for k, accuracy in row.items()}, self.step
            )
        self.log.scalars("logistic", linear, self.step)
        self.log.say(f"k-NN at step {self.step}, top-1 in %\n{self.table}")

    def picture(self) -> None:
        """Write what student and teacher make of a few images of the stream's beginning.

        Collective.
        """
        evaluate, data = self.recipe.evaluate, self.recipe.data
        batch = self.on_device(self.stream.first_images(evaluate.picture_images))
        # a teacher of features alone draws nothing
        draws = "pixels" in self.recipe.objective.teacher_outputs
        teacher = self.engine.teacher if draws else None
        pixel = pixel_options(self.recipe.objective)
        with evaluating(self.engine.student, teacher):
            sheet = reconstruction_picture(
                self.engine.student,
                teacher,
                batch,
                mean=data.mean,
                std=data.std,
                norm_pix_loss=pixel.norm_pix_loss,
                pixel_norm=pixel.norm,
            )
        if dist.rank() == 0:
            save_png(sheet, self.recipe.run_dir / "pictures" / f"step-{self.step:08d}.png")
            self.log.picture("reconstruction", sheet, self.step)

    def launcher(self) -> str:
        """What starts a module on as many ranks as these."""
        nodes = self.sizes.world // dist.ranks_of_node()
        several = f" --nnodes={nodes}" if nodes > 1 else ""
        return (
            "python"
            if self.sizes.world == 1
            else f"torchrun{several} --nproc-per-node={dist.ranks_of_node()}"
        )

    def summary(self, outcome: str) -> str:
        """The text the job ends with."""
        place, sizes = self.recipe.run_dir, self.sizes
        done, pretrained = self.step == sizes.total_steps, self.recipe.objective.name in OBJECTIVES
        return closing_summary(
            f"{self.recipe.run.name}: {outcome} at step {self.step} of {sizes.total_steps}",
            ran={
                "objective": f"{self.recipe.objective.name}, {self.recipe.model.name}, "
                f"{self.recipe.engine.precision}",
                "engine": f"{self.recipe.engine.name}, {sizes.world} ranks, "
                f"{sizes.images_per_step} images a step",
                "images": f"{self.step * sizes.images_per_step:,} seen of "
                f"{len(self.index):,} in the shards",
                **{
                    f"best {name}": f"k-NN {best['knn']:.1f} % at step {best['step']}"
                    for name, best in sorted(self.best.items())
                },
            },
            table=self.table,
            caption=self.caption,
            places={
                "checkpoints": place / "checkpoints",
                "metrics": place / "metrics.jsonl",
                "events": place / "events.jsonl",
                "pictures": place / "pictures",
                "tensorboard": place / "tensorboard",
            },
            commands=[
                (what, command)
                for what, command, applies in (
                    (
                        "go on",
                        f"{self.launcher()} -m {self.task.command} {place / 'recipe.yaml'}"
                        + " run.stop_after_steps=null"
                        * (self.recipe.run.stop_after_steps is not None),
                        not done,
                    ),
                    (
                        "the encoder, for timm",
                        f"python tools/export.py {place} --format timm --out "
                        f"{place.name}.safetensors",
                        done and pretrained,
                    ),
                    (
                        "fine-tune it: recipes finetune_*",
                        f"{self.launcher()} -m rcmae.finetune RECIPE classify.init={place}",
                        done and pretrained,
                    ),
                    (
                        "see the curves",
                        f"tensorboard --logdir {place / 'tensorboard'}",
                        self.recipe.log.tensorboard,
                    ),
                )
                if applies
            ],
        )


# ------------------------------------------------------------------------------------ from a recipe


class Problems(list[str]):
    """`with problems:` turns a ValueError into an entry, so a user hears of everything at once."""

    def __enter__(self) -> Problems:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> bool:
        if isinstance(error, ValueError):
            self.append(str(error))
        return isinstance(error, ValueError)


@dataclass(frozen=True)
class Checked:
    """What the checks of a recipe found out on their way."""

    index: ShardIndex
    labelled: list[ShardIndex]  # training and test set of the evaluation, if there is one
    plan: Plan
    sizes: Resolved
    mask: Mask
    saved: checkpoint.Manifest | None  # where the run goes on from, if its bytes are as written
    engine_config: dict[str, Any]  # DeepSpeed's JSON
    cache: Cache | None  # of this node, where shards come from elsewhere


def check(recipe: Recipe, task: Task) -> Checked:
    """Look for everything that stands against this run, before anything is built. Collective: every
    rank calls.

    Raises:
        ValueError: on every rank, naming every problem; nothing was written.
    """
    problems, world, data = Problems(), dist.world(), recipe.data
    if recipe.objective.name not in task.objectives:  # nothing else would be said of what was meant
        raise Refused(
            f"objective.name={recipe.objective.name} is none of python -m {task.command}, "
            "which trains "
            f"{', '.join(task.objectives)}; pretraining is rcmae.train, then come "
            "rcmae.finetune and rcmae.probe"
        )
    saved = peek(recipe, problems)
    if saved is not None:
        # the number of streams is part of the order of samples: the first start chose it for good
        data.canonical_streams = data.canonical_streams or saved.meta["sizes"]["canonical_streams"]
    if recipe.engine.name == "local" and world > 1:
        problems.append(
            f"engine.name=local is one process, {world} were launched; use deepspeed or fsdp2"
        )
    if (
        recipe.engine.precision == "bf16"
        and torch.cuda.is_available()
        and not torch.cuda.is_bf16_supported(False)
    ):
        problems.append(
            f"engine.precision=bf16: {torch.cuda.get_device_name()} has no bf16; use "
            "engine.precision=fp32"
        )
    index, plan, sizes, mask, engine_config, cache = None, None, None, None, {}, None
    with problems:
        mask = task.mask(recipe)
        task.transform(recipe)
    with problems:
        index = open_index(recipe, data.shards)
    labelled = []
    for shards in task.labelled(recipe):
        with problems:
            labelled.append(open_index(recipe, shards))
            refuse_unlabelled(labelled[-1])
    with problems:
        indexes = [each for each in (index, *labelled) if each is not None]
        cache = node_cache(indexes, data.cache_dir, data.cache_gb, patience(recipe))
    if index is not None and "classes" in recipe.objective.student_outputs:
        problems += label_problems(index, recipe.model.num_classes)
    undivided = config.batch_problems(recipe, world)
    problems += undivided
    if index is not None and not undivided:
        with problems:
            plan = Plan(
                index.counts,
                seed=data.seed,
                images=recipe.batch.images // data.repeats,
                streams=config.streams_for(recipe, world),
                window=data.shuffle_window,
                epoch_samples=data.epoch_samples,
                weights=index.weights,
            )
            sizes = config.resolve(
                recipe, world=world, samples_per_epoch=plan.samples_per_epoch * data.repeats
            )
            small = cache_problem(
                index,
                streams=plan.streams,
                window=plan.window,
                nodes=world // dist.ranks_of_node(),
                world=world,
                limit=int(data.cache_gb * 1e9),
            )
            problems += [small] if small else []
    if recipe.engine.name == "deepspeed" and sizes is not None:
        with problems:
            startup.mark("checks")
            # costs seconds: only where it is used
            from rcmae.engines.deepspeed_config import config_problems, read_config

            startup.mark("imports")
            engine_config = read_config(recipe.engine.config or "")
            problems += config_problems(
                engine_config, engine_settings(recipe, sizes), lr=sizes.lr, world=world
            )
    with problems:
        problems += task.problems(recipe, index, labelled, saved)
    against = mismatches(recipe, saved, index, sizes)
    if against and saved is not None and own(recipe, saved):
        # it counts only if its bytes are as written
        against = mismatches(recipe, checkpoint.newest_together(saved.path.parent)[0], index, sizes)
    problems += against
    dist.together("\n".join(problems) or None)
    assert index is not None
    assert plan is not None
    assert sizes is not None
    assert mask is not None
    return Checked(index, labelled, plan, sizes, mask, saved, engine_config, cache)


def open_index(recipe: Recipe, shards: Patterns) -> ShardIndex:
    """The index of shards, read once for all ranks. Collective: every rank calls.

    Raises:
        ValueError: on every rank, naming what cannot be used.
    """
    index, problem, given = None, None, recipe.data.index
    if dist.rank() == 0:
        # without an index beside them the headers of all shards are read, and once is enough
        try:
            folders = [str(recipe.run_dir / "index"), *([given] if given else [])]
            if given and not ShardIndex.lies_in(given, patience(recipe)):
                raise Refused(
                    f"data.index={given}: no index is there; rcmae shards index SHARDS --out "
                    f"{given}"
                )
            jobs = min(8, os.cpu_count() or 1)
            index = ShardIndex.open(shards, cache=folders, jobs=jobs, patience=patience(recipe))
        except ValueError as error:
            problem = str(error)
    index, problem = dist.from_first((index, problem))
    if problem:
        raise Refused(problem)
    return index


def assemble(recipe: Recipe, stop: preempt.StopRequest, task: Task | None = None) -> Run:
    """Check everything, then build the parts and go to where the run stands. Collective: every rank
    calls.

    Raises:
        ValueError: on every rank, naming every problem; nothing was written. Or another job trains
            here.
        CheckpointError: on every rank; there are checkpoints and none can be used.
    """
    task = task or Pretraining()
    found = check(recipe, task)
    startup.mark("checks")
    lease = hold(recipe)
    startup.mark("lease")
    presence = Presence(
        recipe.run_dir,
        generation=dist.from_first(lease.generation if lease else 0),
        rank=dist.rank(),
        world=dist.world(),
        timeout_s=recipe.engine.timeout_s,
    )
    try:
        return build(recipe, task, stop, found, lease, presence)
    except BaseException as error:
        if isinstance(error, ValueError | checkpoint.CheckpointError):  # on all ranks together
            presence.leave()
        else:
            error.add_note(presence.explain(error).message)
        if lease is not None:
            lease.release()
        raise


def hold(recipe: Recipe) -> Lease | None:
    """The lease of the run's folder, on rank 0. Collective: every rank calls.

    Raises:
        ValueError: on every rank; another job trains here and is alive.
    """
    lease, problem, root = None, None, recipe.run_dir / "checkpoints"

    def newest_step() -> int:
        last = checkpoint.newest_unverified(root)
        return last.step if last else 0

    if dist.rank() == 0:
        try:
            lease = Lease(
                recipe.run_dir,
                timeout_s=recipe.run.lease_timeout_s,
                wait_s=recipe.run.lease_wait_s,
                newest_step=newest_step,
                say=lambda text: print(text, flush=True),
            )
        except LeaseHeld as error:
            problem = str(error)
        except OSError as error:
            problem = unwritable(recipe, error)
    problem = dist.from_first(problem)
    if problem:
        raise Refused(problem)
    return lease


def build(
    recipe: Recipe,
    task: Task,
    stop: preempt.StopRequest,
    found: Checked,
    lease: Lease | None,
    presence: Presence,
) -> Run:
    """The parts, at the newest valid checkpoint.

    Collective: every rank calls, rank 0 with the lease.
    """
    data, sizes, world = recipe.data, found.sizes, dist.world()
    saved, passed_over = choose_checkpoint(recipe)
    if passed_over:  # what `check` compared with was not what the run goes on from
        dist.together("\n".join(mismatches(recipe, saved, found.index, sizes)) or None)
    startup.mark("checkpoint")
    student, objective = task.student(recipe), task.objective(recipe, sizes)
    weights = sum(param.numel() for param in student.parameters())
    teacher = task.teacher(student, objective)
    startup.mark("model")
    engine = make_engine(recipe, sizes, student, teacher, found.engine_config)
    startup.mark("engine")
    if saved is not None:
        checkpoint.load(saved, engine)
        startup.mark("checkpoint")
    # in the recipe from now on: later starts keep the number
    data.canonical_streams = sizes.canonical_streams
    start_folder(recipe, saved, found.index)
    saver = checkpoint.Saver(
        recipe.run_dir / "checkpoints",
        keep=recipe.checkpoint.keep,
        keep_every=recipe.checkpoint.keep_every,
        generation=presence.generation,
        background=recipe.checkpoint.background,
        check_lease=lease.check if lease else lambda: None,
    )
    guard = Guard(
        recipe.guard.action,
        recipe.guard.max_skips,
        recipe.guard.max_rewinds,
        objective.weights,
        recipe.guard.spike_factor,
        recipe.guard.spike_window,
    )
    if saved is not None and own(recipe, saved):
        guard.restore(saved.meta["guard"])
    stream = Stream(
        index=found.index,
        plan=found.plan,
        transform=task.transform(recipe),
        mask=found.mask,
        seed=data.seed,
        micro=sizes.per_device,
        rank=dist.rank(),
        world=world,
        workers=data.workers,
        max_bad_fraction=data.max_bad_fraction,
        max_bad_in_a_row=data.max_bad_in_a_row,
        cache=found.cache,
        ranks_of_node=dist.ranks_of_node(),
        repeats=data.repeats,
        teacher_masks=recipe.objective.teacher_sees == "different",
        device_decoder=device_decoder(recipe),
    )
    step, images = (saved.step, saved.images) if saved else (0, 0)
    log = MetricsLog(
        recipe.run_dir,
        resume_step=step,
        total_steps=sizes.total_steps,
        writes=dist.rank() == 0,
        tensorboard=recipe.log.tensorboard,
    )
    meter = Meter(
        device=dist.device(),
        world=world,
        precision=recipe.engine.precision,
        step_flops_per_image=task.step_flops(recipe, student, objective, found.mask.num_visible),
    )
    run = Run(
        task=task,
        recipe=recipe,
        sizes=sizes,
        objective=objective,
        engine=engine,
        stream=stream,
        index=found.index,
        labelled=found.labelled,
        cache=found.cache,
        normalise=Normalise(data.mean, data.std, dist.device()),
        log=log,
        meter=meter,
        stop=stop,
        guard=guard,
        saver=saver,
        lease=lease,
        presence=presence,
        step=step,
        data_step=images // sizes.images_per_step,
        save_s=16 * weights / SLOW_DISK,
    )
    if saved is not None and own(recipe, saved):
        run.saved_step = run.committed_step = step
        run.best = saved.meta.get("best", {})
        before = [event["seconds"] for event in events_of(recipe.run_dir, "checkpoint")[-5:]]
        run.save_s, run.save_measured = max(before, default=run.save_s), bool(before)
    announce(run, saved, passed_over)
    startup.mark("files")
    return run


def label_problems(index: ShardIndex, num_classes: int) -> list[str]:
    """What stands against these labels for a class term, one line a problem.

    -100 is no label, and no problem.
    """
    labels = index.labels[index.labels != NO_LABEL]
    if not labels.size:
        return [
            "no sample of data.shards has a label (.cls); a class term needs some, or use mae or "
            "rcmae"
        ]
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        return [
            f"data.shards have labels {low} to {high}, model.num_classes={num_classes}; use "
            f"{high + 1} or more"
        ]
    return []


def announce(run: Run, saved: checkpoint.Manifest | None, passed_over: list[str]) -> None:
    """Say what will run, and where it goes on from."""
    recipe, sizes = run.recipe, run.sizes
    run.log.event(
        "resume" if saved else "start",
        step=run.step,
        sizes=sizes.asdict(),
        versions=versions(),
        engine=recipe.engine.model_dump(mode="json"),
        from_checkpoint=str(saved.path) if saved else None,
        passed_over=passed_over,
        generation=run.lease.generation if run.lease else None,
        undone=run.log.undone,
        **preempt.this_start(),
    )
    run.log.say(
        f"{recipe.run.name}: {recipe.objective.name} {recipe.model.name} on {dist.device()}, "
        f"{recipe.engine.name}"
        f"{' ' + recipe.engine.config if recipe.engine.config else ''} x {sizes.world}, "
        f"{recipe.engine.precision}\n"
        f"{sizes.images_per_step} images a step = {sizes.world} ranks x {sizes.accumulation} "
        "micro-batches x "
        f"{sizes.per_device}; {sizes.total_steps} steps, {sizes.steps_per_epoch} an epoch of "
        f"{sizes.samples_per_epoch:,} samples; lr {sizes.lr:.3g} after "
        f"{sizes.warmup_steps:g} steps of warm-up"
    )
    for part, used, why in kernels.table(
        device=dist.device(),
        precision=recipe.engine.precision,
        layer_norm=recipe.engine.layer_norm,
        optimizer=recipe.engine.optimizer,
        compile=recipe.engine.compile,
        checkpointing=recipe.engine.activation_checkpointing,
    ):
        run.log.say(f"  {part:<12} {used}  ({why})")
    if recipe.data.decode != "cpu":
        run.log.say(
            f"  {'JPEG':<12} decoded by {run.stream.decodes}  (data.decode={recipe.data.decode})"
        )
    if run.index.short:
        cut = ", ".join(run.index.short[:5]) + " ..." * (len(run.index.short) > 5)
        run.log.event("short_shards", shards=run.index.short)
        run.log.say(
            f"{len(run.index.short)} shards are shorter than their index says, their last "
            f"samples bad: {cut}"
        )
    if saved:
        run.log.say(f"going on from {saved.path}, step {saved.step}")


# --------------------------------------------------------------------------------------------- main


def parse(argv: Sequence[str] | None, command: str = "rcmae.train") -> Asked:
    """(recipe, overrides) of a command line; takes what launchers add."""
    return training.parse(argv, f"python -m {command}")


def train(recipe: Recipe, stop: preempt.StopRequest, task: Task | None = None) -> int:
    """Run a recipe from where it stands; the exit status.

    Collective: every rank calls, inside the process group.
    """
    if recipe.run.deadline_s is not None:
        stop.within(recipe.run.deadline_s)
    try:
        run = assemble(recipe, stop, task)
    except (ValueError, checkpoint.CheckpointError) as error:  # raised on all ranks together
        say_error(error)
        return preempt.REFUSED if isinstance(error, ValueError) else preempt.FAILED
    status, outcome = preempt.FINISHED, "finished"
    with run.log:
        try:
            why_stop = fit(run)
            run.finish_saves()
            status, outcome = run.ending(why_stop)
            run.log.say(run.summary(outcome))
        except (NonFiniteLoss, DataGoneBad, checkpoint.CheckpointError, LeaseLost) as error:
            # on all ranks together
            say_error(error)
            status, outcome = preempt.FAILED, str(error)
        except Exception as error:
            # of this rank alone, or of all that have lost one: they never meet again
            with contextlib.suppress(OSError, ValueError):  # a full disk may be why
                note_failure(run, error)
            raise
        run.log.event("stop", step=run.step, status=status, reason=outcome)
    run.stream.close()
    run.presence.leave()
    if run.lease is not None and run.lease.holds():
        preempt.write_outcome(recipe.run_dir, status=status, step=run.step, reason=outcome)
        run.lease.release()
    return status


def note_failure(run: Run, error: Exception) -> None:
    """Say to the error whom this rank lost, if it did, and write it down for whoever starts the job
    again.

    Raises:
        OSError, ValueError: it cannot be written.
    """
    loss = run.presence.explain(error)
    error.add_note(loss.message)
    reason = loss.message if loss.of_a_peer else f"rank {dist.rank()}: {error!r}"
    folder = run.recipe.run_dir
    if newest_generation(folder) == run.presence.generation:  # else it is another's to write by now
        run.log.event("stop", step=run.step, status=preempt.FAILED, reason=reason)
        if loss.speaks:
            preempt.write_outcome(
                folder, status=preempt.FAILED, step=run.step, reason=reason, again=loss.of_a_peer
            )
    if run.lease is not None:
        run.lease.release()


def say_error(error: Exception) -> None:
    """One message for all ranks, on standard error."""
    if dist.launched_first():
        print(f"rcmae: {error}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None, task: Task | None = None) -> int:
    """Train by a command line; the exit status of this rank."""
    task = task or Pretraining()
    stop = preempt.StopRequest()  # first: Python's default for SIGUSR1 is to die
    startup.begin()
    name, overrides = parse(argv, task.command)
    try:
        recipe = config.load(name, overrides)
        startup.mark("recipe")
        dist.start(required=recipe.engine.name != "local", timeout_s=recipe.engine.timeout_s)
        startup.mark("process group")
    except ValueError as error:
        say_error(error)
        return preempt.REFUSED
    try:
        status = train(recipe, stop, task)
    except Exception:
        # This rank alone, or its peers were gone: they are in another collective and would never
        # come to a barrier.
        print(f"rcmae: rank {dist.launched()['rank']} failed", file=sys.stderr)
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_status(recipe.run_dir, preempt.FAILED))
    dist.finish()
    return exit_status(recipe.run_dir, status)


if __name__ == "__main__":
    raise SystemExit(main())
