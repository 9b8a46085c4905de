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
1 anything else."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
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
from rcmae.data.stream import labelled_batches
from rcmae.data.transforms import Normalise
from rcmae.engines.engine import DTYPES, cast_params
from rcmae.errors import Refused
from rcmae.evaluation.features import evaluating, features_of_both, pooled
from rcmae.evaluation.knn import Rows, knn_rows, knn_table
from rcmae.evaluation.logistic import logistic_rows
from rcmae.models import kernels
from rcmae.models.bootmae import Network
from rcmae.parts import new_student, patience
from rcmae.run import preempt
from rcmae.run.metrics import MetricsLog
from rcmae.train import open_index, say_error
from rcmae.weights.layouts import KIND

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
        self._folder, self._patience_s = folder, patience_s
        self.last_step = last_step
        self._signs: object = None
        self._changed = time.monotonic()

    def look(self) -> Path | Literal["wait", "finished", "silent"]:
        """The next checkpoint, oldest first, or why there is none."""
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
        signs = (
            paths,
            [beat.read_text() for beat in sorted((self._folder / "leases").glob("*.beat"))],
        )
        if signs != self._signs:
            self._signs, self._changed = signs, time.monotonic()
        return "silent" if time.monotonic() - self._changed > self._patience_s else "wait"

    def _outcome(self) -> str:
        try:
            return str(json.loads((self._folder / "outcome.json").read_text())["status"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""


def evaluated(folder: Path) -> int:
    """The last step that a side-car of this run has evaluated, 0 before the first."""
    try:
        lines = (folder / FOLDER / "events.jsonl").read_text().splitlines(keepends=True)
    except OSError:
        return 0
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return max((event["step"] for event in events if event["event"] == "evaluate"), default=0)


# ------------------------------------------------------------------------------------ an evaluation


class Sets(NamedTuple):
    """The labelled images."""

    train: ShardIndex
    test: ShardIndex
    cache: Cache | None  # of this node, where shards come from elsewhere


def open_sets(recipe: Recipe) -> Sets:
    """The labelled shards that a recipe names. Collective: every rank calls.

    Raises:
        ValueError: on every rank; there are none, or they cannot be used.
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
    models = {}
    with checkpoint.Reader(manifest) as reader:
        for name in ("student", "teacher") if recipe.objective.teacher_parts else ("student",):
            model = new_student(recipe)
            if name == "teacher":  # it may be the encoder alone
                model.keep(("pixels",) if "decoder" in recipe.objective.teacher_parts else ())
            for weight, value in model.state_dict().items():  # live
                key = (
                    f"buffer/{weight}"
                    if f"buffer/{weight}" in manifest.tensors
                    else f"{KIND[name]}/{weight}"
                )
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
    wanted, data = recipe.evaluate, recipe.data

    def batches(index: ShardIndex) -> Iterator[Batch]:
        for batch in labelled_batches(
            index,
            image_size=recipe.model.image_hw,
            in_channels=recipe.model.in_channels,
            batch=wanted.batch,
            rank=dist.rank(),
            world=dist.world(),
            workers=data.workers,
            cache=sets.cache,
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


def follow(
    folder: Path,
    overrides: Sequence[str],
    stop: preempt.StopRequest,
    *,
    patience_s: float,
    poll_s: float,
) -> int:
    """Evaluate a run's checkpoints until it is finished; the exit status. Collective: every rank
    calls.

    Raises:
        ValueError: on every rank; the recipe, the shards or another side-car of this run stand
            against it.
        LeaseLost: on every rank; another side-car took over.
    """
    watch = Watch(folder, last_step=evaluated(folder), patience_s=patience_s)
    while dist.from_first(not (folder / "recipe.yaml").is_file()):
        # the training has not come so far
        if dist.agree(stop.reason is not None) or dist.from_first(watch.look() == "silent"):
            return preempt.STOPPED
        time.sleep(poll_s)
    mine = [f"run.dir={folder}", "evaluate.every_steps=null"]  # every checkpoint is evaluated
    recipe = config.load(str(folder / "recipe.yaml"), [*overrides, *mine])
    sets, lease, problem = open_sets(recipe), None, None
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
    try:
        watch.last_step = dist.from_first(evaluated(folder))
        return _follow(recipe, sets, watch, stop, lease, poll_s)
    finally:
        if lease is not None:
            lease.release()


def _follow(
    recipe: Recipe,
    sets: Sets,
    watch: Watch,
    stop: preempt.StopRequest,
    lease: Lease | None,
    poll_s: float,
) -> int:
    with MetricsLog(
        recipe.run_dir / FOLDER,
        resume_step=watch.last_step,
        total_steps=0,
        writes=dist.rank() == 0,
        tensorboard=recipe.log.tensorboard,
        bar=False,
    ) as log:
        log.say(f"evaluating the checkpoints of {recipe.run_dir} beyond step {watch.last_step}")
        while True:
            if dist.agree(stop.reason is not None or stop.is_late(0.0)):
                log.say(
                    f"stopped after step {watch.last_step}, asked by "
                    f"{stop.reason or 'the end of the job'}"
                )
                return preempt.STOPPED
            found = dist.from_first(watch.look())
            if found == "finished":
                log.say(f"the run is finished, and evaluated up to step {watch.last_step}")
                return preempt.FINISHED
            if found == "silent":
                log.say(f"no sign of life of the run; evaluated up to step {watch.last_step}")
                return preempt.STOPPED
            if found == "wait":
                time.sleep(poll_s)
                continue
            begin, step = time.monotonic(), int(found.name.removeprefix("step-"))
            try:
                problem = None
                models = networks(recipe, checkpoint.open_verified_together(found))
            except (checkpoint.CheckpointError, OSError) as error:
                problem = str(error)
            told = [text for text in dist.gather(problem) if text]
            if told:
                gone = (
                    ""
                    if found.exists()
                    else "; it was pruned meanwhile, checkpoint.keep and keep_every keep more"
                )
                log.event("passed_over", step=step, reason=told[0])
                log.say(f"step {step} is left out: {told[0]}{gone}")
                watch.last_step = step
                continue
            try:
                rows, linear = answer(recipe, sets, models, stop)
            except Stopped:
                continue
            if dist.agree(lease is not None and lease.lost):
                raise LeaseLost(
                    f"another side-car took the evaluation of {recipe.run_dir} over; this one stops"
                )
            more = {"logistic": linear} if linear else {}
            log.event("evaluate", step=step, knn=rows, **more, seconds=time.monotonic() - begin)
            log.sync()
            for name, row in rows.items():
                log.scalars(f"knn_{name}", {f"k{k}": accuracy for k, accuracy in row.items()}, step)
            log.scalars("logistic", linear, step)
            log.say(f"k-NN at step {step}, top-1 in %\n{knn_table(rows, linear)}")
            watch.last_step = step


def main(argv: Sequence[str] | None = None) -> int:
    """Follow a run by a command line; the exit status of this rank."""
    return run(parse(argv, "python -m rcmae.follow"))


def run(asked: Asked) -> int:
    """Follow a run as asked; the exit status of this rank. Collective: every rank calls."""
    stop = preempt.StopRequest()
    try:
        dist.start(required=False)
        status = follow(
            asked.run,
            asked.overrides,
            stop,
            patience_s=asked.patience_s,
            poll_s=asked.poll_s,
        )
    except (Refused, LeaseLost) as error:
        say_error(error)
        status = preempt.REFUSED if isinstance(error, Refused) else preempt.FAILED
    dist.finish()
    return exit_status(asked.run / FOLDER, status)


if __name__ == "__main__":
    raise SystemExit(main())
