"""Evaluate each checkpoint of a run once, as it is committed, from a separate job, until the run
is finished: k-NN for a pretraining, scores for a classifier.

    rcmae follow RUN_DIR evaluate.train_shards=... evaluate.test_shards=... [key=value]

The training is not involved: the recipe is the run's own, with the keys given here set over it, and
the weights are read from its checkpoints. Results go to RUN_DIR/evaluations: `events.jsonl` has one
line per checkpoint, TensorBoard the curves. Checkpoints that have a result are skipped, so a
follower may be stopped, killed and requeued at any time. Under a launcher the ranks share the
images; each holds the whole networks.

Exit status: 0 the run is finished and all its checkpoints are evaluated; 75 it is not: run this
again (asked to stop, or the run has given no sign of life for --patience-s); 2 the input is wrong;
1 anything else.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

from rcmae import checkpoint, config, dist
from rcmae.checkpoint.lease import Lease, LeaseHeld, LeaseLost, exit_status, fence
from rcmae.commands.follow import Asked, parse
from rcmae.config import Recipe, Resolved
from rcmae.data.cache import Cache, node_cache
from rcmae.data.index import ShardIndex
from rcmae.data.sets import labelled, refuse_meeting
from rcmae.data.sources import patience
from rcmae.data.stream import refuse_unlabelled
from rcmae.data.transforms import Normalise
from rcmae.engines.protocol import DTYPES
from rcmae.engines.updates import cast_params
from rcmae.errors import Refused
from rcmae.models import kernels
from rcmae.process import console
from rcmae.process.leaving import leaving
from rcmae.run import preempt
from rcmae.run.ending import say_error
from rcmae.run.look import open_index, saved_from
from rcmae.run.loop.evaluation import (
    note_collapse,
    ranks_of,
    with_left_out,
    write_evaluated,
)
from rcmae.run.records.metrics import MetricsLog, events_of
from rcmae.tasks.protocol import Evaluating, Interrupted, Task
from rcmae.tasks.registry import task_of
from rcmae.weights.layouts import KIND, Which

FOLDER = "evaluations"  # in the run's folder


# ---------------------------------------------------------------------------- the run, from outside


class Watch:
    """What a run shows to one that may only read its folder. One process looks.

    Args:
        folder: the run's.
        last_step: checkpoints up to here are done.
        patience_s: seconds without a sign of life (a beat of its lease, a checkpoint) after which
            it counts as silent.
    """

    def __init__(self, folder: Path, *, last_step: int, patience_s: float) -> None:
        self._folder = folder
        self._patience_s = patience_s
        self.last_step = last_step
        self._signs: object = None
        self._changed = time.monotonic()

    def look(self) -> Path | Literal["wait", "finished", "silent"]:
        """The next checkpoint, oldest first, or why there is none.

        Raises:
            Refused: the run's leases cannot be read.
        """
        finished = self._outcome() == "finished"  # first: it is written after the last commit
        held = fence(self._folder)
        paths = checkpoint.step_folders(self._folder / "checkpoints")
        for path in paths:
            step = checkpoint.step_of(path)
            if step is None or step <= self.last_step:
                continue
            try:
                manifest = checkpoint.read_manifest(path)
            except checkpoint.CheckpointError:  # gone since, or damaged: the training says so
                continue
            if held.allows(manifest.generation, manifest.step):
                return path
        if finished:
            return "finished"
        signs = (paths, self._beats())
        if signs != self._signs:
            self._signs = signs
            self._changed = time.monotonic()
        return "silent" if time.monotonic() - self._changed > self._patience_s else "wait"

    def _beats(self) -> list[str]:
        found = []
        for path in sorted((self._folder / "leases").glob("*.beat")):
            with contextlib.suppress(OSError):  # replaced this moment, on a network's file system
                found.append(path.read_text())
        return found

    def _outcome(self) -> str:
        try:
            return str(json.loads((self._folder / "outcome.json").read_text())["status"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""


def evaluated(folder: Path) -> int:
    """The last step that a follower of this run has evaluated, 0 before the first."""
    events = events_of(folder / FOLDER, "evaluate")
    return max((event["step"] for event in events), default=0)


# ------------------------------------------------------------------------------------ an evaluation


class Sets(NamedTuple):
    """What a task's evaluation reads."""

    opened: tuple[ShardIndex, ...]
    cache: Cache | None  # of this node, where shards come from elsewhere


def open_sets(recipe: Recipe, task: Task) -> Sets:
    """The shards that a task's evaluation reads. Collective: every rank calls.

    Raises:
        Refused: on every rank; there are none, or they cannot be used.
    """
    wanted = task.evaluation_sets(recipe)
    if missing := [each.key for each in wanted if not each.shards]:
        raise Refused(f"the run's recipe has no {' and '.join(missing)}; give them here")
    if not wanted:
        raise Refused(
            "the run's recipe has no evaluate.train_shards and evaluate.test_shards; give them here"
        )
    opened = tuple(open_index(recipe, each.shards, each.needs) for each in wanted)
    for each, index in zip(wanted, opened, strict=True):
        if each.labelled:
            refuse_unlabelled(index)
    sets = [
        labelled(each.key, index, patience(recipe))
        for each, index in zip(wanted, opened, strict=True)
        if each.labelled
    ]
    for train, test in pairwise(sets):
        refuse_meeting(train, test)
    cache = node_cache(opened, recipe.data.cache_dir, recipe.data.cache_gb, patience(recipe))
    return Sets(opened, cache)


class Networks:
    """Student and teacher of a run's task, whole on each rank, in the precision they train in.

    Collective: every rank calls.

    Args:
        task: of the run.
        recipe: the run's.
        manifest: of its first checkpoint that is evaluated: the others fit the same networks.

    Raises:
        Refused: on every rank; what the task starts from cannot be read.
    """

    def __init__(self, task: Task, recipe: Recipe, manifest: checkpoint.Manifest) -> None:
        saved = saved_from(recipe, manifest)
        self.found = checkpoint.seen_by_first(lambda: task.look(recipe, saved))
        student = task.network(recipe, self.found, saved)
        self.objective = task.objective(recipe, Resolved(**manifest.meta["sizes"]))
        teacher = task.teacher(student, self.objective)
        self.student = self._ready(student, recipe)
        self.teacher = self._ready(teacher, recipe) if teacher is not None else None

    @staticmethod
    def _ready(model: nn.Module, recipe: Recipe) -> nn.Module:
        kernels.choose_attention(model, dist.device(), recipe.engine.precision)
        cast_params(model, DTYPES[recipe.engine.precision])
        return model.to(dist.device())

    @torch.no_grad()
    def load(self, manifest: checkpoint.Manifest) -> None:
        """Take the weights of a checkpoint. Not collective.

        Raises:
            CheckpointError, OSError: it could not be read.
        """
        networks: dict[Which, nn.Module | None] = {"student": self.student, "teacher": self.teacher}
        with checkpoint.Reader(manifest) as reader:
            for which, model in networks.items():
                if model is None:
                    continue
                for name, value in model.state_dict().items():  # live
                    key = f"buffer/{name}"
                    if key not in manifest.tensors:
                        key = f"{KIND[which]}/{name}"
                    flat = torch.empty(value.numel(), dtype=value.dtype)
                    reader.read(key, 0, flat)
                    value.copy_(flat.view_as(value))


# ----------------------------------------------------------------------------------------- the loop


def follow(asked: Asked, stop: preempt.StopRequest) -> int:
    """Evaluate a run's checkpoints until it is finished; the exit status.

    Collective: every rank calls. Rank 0 alone looks into the run's folder.

    Raises:
        Refused: on every rank; the recipe, the shards or another follower of this run stand
            against it.
        LeaseLost: on every rank; another follower took over.
    """
    folder = asked.run
    first = dist.rank() == 0
    if not dist.from_first(folder.is_dir()):
        raise Refused(f"{folder}: there is no such folder; give the run.dir of a training")
    watch = Watch(folder, last_step=evaluated(folder) if first else 0, patience_s=asked.patience_s)
    while not dist.from_first((folder / "recipe.yaml").is_file()):
        # the training has not come so far
        if dist.agree(stop.reason is not None) or _look(watch) == "silent":
            return preempt.STOPPED
        time.sleep(asked.poll_s)
    recipe = _recipe(asked)
    task = task_of(recipe)
    sets = open_sets(recipe, task)
    lease = _hold(recipe)
    try:
        watch.last_step = dist.from_first(evaluated(folder) if first else 0)
        with MetricsLog(
            folder / FOLDER,
            resume_step=watch.last_step,
            total_steps=0,
            writes=first,
            tensorboard=recipe.log.tensorboard,
            bar=False,
        ) as log:
            return SideCar(recipe, task, sets, watch, stop, lease, log).run(asked.poll_s)
    finally:
        if lease is not None:
            lease.release()


def _look(watch: Watch) -> Path | Literal["wait", "finished", "silent"]:
    """What rank 0 sees of the run. Collective: every rank calls."""
    return checkpoint.seen_by_first(watch.look)


def _recipe(asked: Asked) -> Recipe:
    """The run's recipe with the keys given over it, as rank 0 reads it. Collective: every rank
    calls.

    Raises:
        Refused: on every rank; it is wrong.
    """
    file = str(asked.run / "recipe.yaml")

    def load() -> Recipe:
        # without its own evaluations: what those ask for is asked of the keys given here, by name
        mine = [f"run.dir={asked.run}", "evaluate.every_steps=null"]
        recipe = config.load(file, [*asked.overrides, *mine])
        if not asked.allow_pipe:
            given = [override.partition("=")[0] for override in asked.overrides]
            config.without_pipes(recipe.model_dump(mode="json"), file, given)
        return config.with_values(recipe, {"evaluate.every_steps": 1})  # each checkpoint

    return checkpoint.seen_by_first(load)


def _hold(recipe: Recipe) -> Lease | None:
    """The lease of the evaluations, on rank 0. Collective: every rank calls.

    Raises:
        Refused: on every rank; another follower evaluates this run, or the folder cannot be
            written.
    """
    lease = None
    problem = None
    folder = recipe.run_dir
    if dist.rank() == 0:
        try:
            lease = Lease(
                folder / FOLDER,
                timeout_s=recipe.run.lease_timeout_s,
                wait_s=recipe.run.lease_wait_s,
                newest_step=lambda: evaluated(folder),
                say=lambda text: print(text, flush=True),
            )
        except (LeaseHeld, OSError) as error:
            problem = f"another follower evaluates {folder}: {error}"
    dist.together(dist.from_first(problem))
    return lease


@dataclass
class SideCar:
    """Evaluates one checkpoint after the other. Every method is collective: every rank calls."""

    recipe: Recipe
    task: Task
    sets: Sets
    watch: Watch
    stop: preempt.StopRequest
    lease: Lease | None  # rank 0's
    log: MetricsLog
    networks: Networks | None = None  # from the first checkpoint on

    def run(self, poll_s: float) -> int:
        """Evaluate until there is nothing more to come; the exit status.

        Raises:
            LeaseLost: on every rank; another follower took over.
        """
        log = self.log
        watch = self.watch
        run = self.recipe.run_dir
        log.say(f"evaluating the checkpoints of {run} beyond step {watch.last_step}")
        while True:
            if dist.agree(self.stop.reason is not None or self.stop.is_late(0.0)):
                why = self.stop.reason or "the end of the job"
                log.say(f"stopped after step {watch.last_step}, asked by {why}")
                return preempt.STOPPED
            found = _look(watch)
            if found == "finished":
                log.say(f"the run is finished, and evaluated up to step {watch.last_step}")
                return preempt.FINISHED
            if found == "silent":
                log.say(f"the run gives no sign of life; evaluated up to step {watch.last_step}")
                return preempt.STOPPED
            if found == "wait":
                time.sleep(poll_s)
                continue
            assert isinstance(found, Path)
            self.evaluate(found)

    def evaluate(self, path: Path) -> None:
        """Evaluate a checkpoint and write it down, or say why it is left out. Not done where a
        stop is asked for meanwhile: the caller sees that.

        Raises:
            LeaseLost: on every rank.
        """
        begin = time.monotonic()
        step = checkpoint.step_of(path)
        assert step is not None
        networks = self._networks(path, step)
        if networks is None:
            self.watch.last_step = step
            return
        context = self._context(networks, step)
        try:
            found = self.task.evaluate(context)
        except Interrupted:
            return
        if dist.agree(self.lease is not None and self.lease.lost):
            raise LeaseLost(
                f"another follower took the evaluation of {self.recipe.run_dir} over; this one "
                "stops"
            )
        found = with_left_out(found, context, self.task, self.log)
        note_collapse(found, self.log, step)
        about = {**found.event, **ranks_of(found), "seconds": time.monotonic() - begin}
        self.log.event("evaluate", step=step, **about)
        self.log.sync()
        write_evaluated(found, self.log, self.recipe.run_dir / FOLDER, step)
        self.watch.last_step = step

    def _context(self, networks: Networks, step: int) -> Evaluating:
        recipe = self.recipe
        device = dist.device()
        return Evaluating(
            recipe=recipe,
            step=step,
            student=networks.student,
            teacher=networks.teacher,
            objective=networks.objective,
            found=networks.found,
            sets=self.sets.opened,
            cache=self.sets.cache,
            normalise=Normalise(recipe.data.mean, recipe.data.std, device),
            device=device,
            pause=self._pause,
            baselines=False,  # the training has them, and they do not change
        )

    def _pause(self) -> None:
        if dist.agree(self.stop.reason is not None or self.stop.is_late(0.0)):
            raise Interrupted

    def _networks(self, path: Path, step: int) -> Networks | None:
        """The networks with a checkpoint's weights; None where it is left out."""
        problem = None
        try:
            manifest = checkpoint.open_verified_together(path)
            self.networks = self.networks or Networks(self.task, self.recipe, manifest)
            self.networks.load(manifest)
        except (checkpoint.CheckpointError, OSError) as error:
            problem = str(error)
        told = [text for text in dist.gather(problem) if text]
        if not told:
            return self.networks
        gone = ""
        if not path.exists():
            gone = "; it was pruned meanwhile, checkpoint.keep and keep_every keep more"
        self.log.event("passed_over", step=step, reason=told[0])
        self.log.say(f"step {step} is skipped: {told[0]}{gone}")
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Follow a run by a command line; the exit status of this rank."""
    return run(parse(argv, "python -m rcmae.follow"))


def run(asked: Asked) -> int:
    """Follow a run as asked; the exit status of this rank. Collective: every rank calls."""
    stop = preempt.StopRequest()
    console.outlive()
    try:
        dist.start(required=False)
        status = follow(asked, stop)
    except (Refused, LeaseLost) as error:
        say_error(error)
        status = preempt.REFUSED if isinstance(error, Refused) else preempt.FAILED
    dist.finish()
    return exit_status(asked.run / FOLDER, status)


if __name__ == "__main__":
    raise SystemExit(leaving(main()))
