"""Evaluate a run from beside it: k-NN of each checkpoint, once, as it is committed, until the run
is finished.

Logistic regression on the same features, too, with evaluate.logistic=true.

    python -m rcmae.follow RUN_DIR evaluate.train_shards=... evaluate.test_shards=... [key=value]

The training does not wait and need not be told: the recipe is the run's own, with the keys given
here over it, and the weights come from its checkpoints, read-only. Answers go to
RUN_DIR/evaluations: `events.jsonl` has one line a checkpoint, TensorBoard the curves; what is there
already is not done again, so a side-car may be stopped, killed and requeued as it comes. Under a
launcher the images are shared out among the ranks, each with the whole networks.

Exit status: 0 the run is finished and all its checkpoints are evaluated; 75 it is not: run this
again (asked to stop, or the run has given no sign of life for --patience-s); 2 the input is wrong;
1 anything else.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from rcmae import checkpoint, config, dist
from rcmae.checkpoint.lease import Lease, LeaseHeld, LeaseLost, exit_status, fence
from rcmae.commands.follow import Asked, parse
from rcmae.config import Recipe
from rcmae.data.batch import Batch
from rcmae.data.cache import Cache, node_cache
from rcmae.data.index import ShardIndex
from rcmae.data.sources import patience
from rcmae.data.stream import Readers, labelled_batches
from rcmae.data.transforms import CentreTransform, Normalise
from rcmae.engines.protocol import DTYPES
from rcmae.engines.updates import cast_params
from rcmae.errors import Refused
from rcmae.evaluation.features import evaluating, features_of_both, pooled
from rcmae.evaluation.knn import Rows, knn_rows, knn_table
from rcmae.evaluation.logistic import logistic_rows
from rcmae.models import kernels
from rcmae.models.build import Network, new_student
from rcmae.run import preempt
from rcmae.run.ending import say_error
from rcmae.run.look import open_index
from rcmae.run.metrics import MetricsLog, events_of
from rcmae.weights.layouts import KIND, Which

FOLDER = "evaluations"  # in the run's folder


class Stopped(Exception):
    """Asked to stop in the middle of an evaluation; raised on all ranks together."""


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
    """The last step that a side-car of this run has evaluated, 0 before the first."""
    events = events_of(folder / FOLDER, "evaluate")
    return max((event["step"] for event in events), default=0)


# ------------------------------------------------------------------------------------ an evaluation


class Sets(NamedTuple):
    """The labelled images."""

    train: ShardIndex
    test: ShardIndex
    cache: Cache | None  # of this node, where shards come from elsewhere


def open_sets(recipe: Recipe) -> Sets:
    """The labelled shards that a recipe names. Collective: every rank calls.

    Raises:
        Refused: on every rank; there are none, or they cannot be used.
    """
    given = {
        "train_shards": recipe.evaluate.train_shards,
        "test_shards": recipe.evaluate.test_shards,
    }
    if missing := [f"evaluate.{key}" for key, shards in given.items() if not shards]:
        raise Refused(
            f"k-NN needs labelled shards: the run's recipe has no {' and '.join(missing)}; give "
            "them here"
        )
    train, test = (open_index(recipe, shards) for shards in given.values())
    cache = node_cache((train, test), recipe.data.cache_dir, recipe.data.cache_gb, patience(recipe))
    return Sets(train, test, cache)


@torch.no_grad()
def networks(recipe: Recipe, manifest: checkpoint.Manifest) -> dict[str, Network]:
    """Student and, where there is one, teacher with the weights of a checkpoint, in the precision
    they train in.

    Raises:
        CheckpointError, OSError: it could not be read.
    """
    models: dict[str, Network] = {}
    teacher_parts = recipe.objective.teacher_parts
    names: list[Which] = ["student", "teacher"] if teacher_parts else ["student"]
    with checkpoint.Reader(manifest) as reader:
        for name in names:
            model = new_student(recipe)
            if name == "teacher":  # it may be the encoder alone
                model.keep(("pixels",) if "decoder" in teacher_parts else ())
            for weight, value in model.state_dict().items():  # live
                key = f"buffer/{weight}"
                if key not in manifest.tensors:
                    key = f"{KIND[name]}/{weight}"
                flat = torch.empty(value.numel(), dtype=value.dtype)
                reader.read(key, 0, flat)
                value.copy_(flat.view_as(value))
            kernels.choose_attention(model, dist.device(), recipe.engine.precision)
            cast_params(model, DTYPES[recipe.engine.precision])
            models[name] = model.to(dist.device())
    return models


def answer(
    recipe: Recipe, sets: Sets, models: dict[str, Network], stop: preempt.StopRequest
) -> tuple[Rows, dict[str, float]]:
    """k-NN of these networks, and logistic regression where it is asked for. Collective: every rank
    calls, and gets the same rows.

    Raises:
        Stopped: on all ranks.
    """
    wanted = recipe.evaluate
    data = recipe.data

    def batches(index: ShardIndex) -> Iterator[Batch]:
        for batch in labelled_batches(
            index,
            CentreTransform(recipe.model.image_hw, recipe.model.in_channels),
            batch=wanted.batch,
            rank=dist.rank(),
            world=dist.world(),
            readers=Readers(data.workers, cache=sets.cache),
        ):
            if dist.agree(stop.reason is not None or stop.is_late(0.0)):
                raise Stopped
            yield batch

    device = dist.device()
    with evaluating(*models.values()):
        features = features_of_both(
            {name: pooled(model, wanted.pool) for name, model in models.items()},
            batches(sets.train),
            batches(sets.test),
            device=device,
            normalise=Normalise(data.mean, data.std, device).images,
        )
    rows = knn_rows(*features, k=wanted.k, device=device, temperature=wanted.temperature)
    return rows, logistic_rows(*features, device=device) if wanted.logistic else {}


# ----------------------------------------------------------------------------------------- the loop


def follow(asked: Asked, stop: preempt.StopRequest) -> int:
    """Evaluate a run's checkpoints until it is finished; the exit status.

    Collective: every rank calls. Rank 0 alone looks into the run's folder.

    Raises:
        Refused: on every rank; the recipe, the shards or another side-car of this run stand
            against it.
        LeaseLost: on every rank; another side-car took over.
    """
    folder = asked.run
    first = dist.rank() == 0
    watch = Watch(folder, last_step=evaluated(folder) if first else 0, patience_s=asked.patience_s)
    while not dist.from_first((folder / "recipe.yaml").is_file()):
        # the training has not come so far
        if dist.agree(stop.reason is not None) or _look(watch) == "silent":
            return preempt.STOPPED
        time.sleep(asked.poll_s)
    recipe = _recipe(asked)
    sets = open_sets(recipe)
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
            return SideCar(recipe, sets, watch, stop, lease, log).run(asked.poll_s)
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
    # every checkpoint is evaluated
    mine = [f"run.dir={asked.run}", "evaluate.every_steps=null"]
    file = str(asked.run / "recipe.yaml")
    return checkpoint.seen_by_first(lambda: config.load(file, [*asked.overrides, *mine]))


def _hold(recipe: Recipe) -> Lease | None:
    """The lease of the evaluations, on rank 0. Collective: every rank calls.

    Raises:
        Refused: on every rank; another side-car evaluates this run, or the folder cannot be
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
            problem = f"another side-car evaluates {folder}: {error}"
    dist.together(dist.from_first(problem))
    return lease


@dataclass
class SideCar:
    """Evaluates one checkpoint after the other. Every method is collective: every rank calls."""

    recipe: Recipe
    sets: Sets
    watch: Watch
    stop: preempt.StopRequest
    lease: Lease | None  # rank 0's
    log: MetricsLog

    def run(self, poll_s: float) -> int:
        """Evaluate until there is nothing more to come; the exit status.

        Raises:
            LeaseLost: on every rank; another side-car took over.
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
                log.say(f"no sign of life of the run; evaluated up to step {watch.last_step}")
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
        models = self._models(path, step)
        if models is None:
            self.watch.last_step = step
            return
        try:
            rows, linear = answer(self.recipe, self.sets, models, self.stop)
        except Stopped:
            return
        if dist.agree(self.lease is not None and self.lease.lost):
            raise LeaseLost(
                f"another side-car took the evaluation of {self.recipe.run_dir} over; this one "
                "stops"
            )
        more = {"logistic": linear} if linear else {}
        seconds = time.monotonic() - begin
        self.log.event("evaluate", step=step, knn=rows, **more, seconds=seconds)
        self.log.sync()
        for name, row in rows.items():
            curves = {f"k{k}": accuracy for k, accuracy in row.items()}
            self.log.scalars(f"knn_{name}", curves, step)
        self.log.scalars("logistic", linear, step)
        self.log.say(f"k-NN at step {step}, top-1 in %\n{knn_table(rows, linear)}")
        self.watch.last_step = step

    def _models(self, path: Path, step: int) -> dict[str, Network] | None:
        """The networks of a checkpoint; None where it is left out."""
        models = None
        problem = None
        try:
            models = networks(self.recipe, checkpoint.open_verified_together(path))
        except (checkpoint.CheckpointError, OSError) as error:
            problem = str(error)
        told = [text for text in dist.gather(problem) if text]
        if not told:
            return models
        gone = ""
        if not path.exists():
            gone = "; it was pruned meanwhile, checkpoint.keep and keep_every keep more"
        self.log.event("passed_over", step=step, reason=told[0])
        self.log.say(f"step {step} is left out: {told[0]}{gone}")
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Follow a run by a command line; the exit status of this rank."""
    return run(parse(argv, "python -m rcmae.follow"))


def run(asked: Asked) -> int:
    """Follow a run as asked; the exit status of this rank. Collective: every rank calls."""
    stop = preempt.StopRequest()
    try:
        dist.start(required=False)
        status = follow(asked, stop)
    except (Refused, LeaseLost) as error:
        say_error(error)
        status = preempt.REFUSED if isinstance(error, Refused) else preempt.FAILED
    dist.finish()
    return exit_status(asked.run / FOLDER, status)


if __name__ == "__main__":
    raise SystemExit(main())
