"""Build: the parts of a run, from what was judged, at the newest complete checkpoint.

Everything here is collective: every rank calls, in the same order. The first thing is the lease,
and nothing is written before it is held.
"""

from __future__ import annotations

import functools
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from rcmae import checkpoint, dist
from rcmae.checkpoint.lease import Lease, LeaseHeld
from rcmae.config import Recipe, Resolved
from rcmae.data.cache import Cache
from rcmae.data.device_decode import device_decoder, device_resizer
from rcmae.data.stream import BadLimits, Readers, Share, Stream
from rcmae.data.transforms import Normalise
from rcmae.data.views import Views
from rcmae.engines.build import make_engine, waited_for
from rcmae.engines.protocol import Engine
from rcmae.errors import Refused
from rcmae.models.tuning import attention, compiling
from rcmae.objectives import Objective
from rcmae.planning.live import attention_shapes
from rcmae.process import waits
from rcmae.run import ending, preempt, startup
from rcmae.run.announcing import announce
from rcmae.run.differences import mismatches
from rcmae.run.folder import renew, start_folder, unwritable, versions
from rcmae.run.guard import Guard
from rcmae.run.judge import Verdict
from rcmae.run.look import cache_of, saved_from
from rcmae.run.loop.agreement import Agreement
from rcmae.run.loop.batches import Batches
from rcmae.run.loop.evaluation import Evaluation, owes_evaluation
from rcmae.run.loop.instruments import Instruments
from rcmae.run.loop.meter import Meter
from rcmae.run.loop.progress import Progress
from rcmae.run.loop.recording import Recorder
from rcmae.run.loop.recovery import Recovery
from rcmae.run.loop.saving import BYTES_A_WEIGHT, DISK_RATE, Saving
from rcmae.run.loop.schedule import Schedule
from rcmae.run.loop.stopwatch import Stopwatch
from rcmae.run.loop.stragglers import Stragglers
from rcmae.run.presence import Presence
from rcmae.run.records.metrics import MetricsLog, events_of
from rcmae.run.trackers.beside import REPORT, Trackers
from rcmae.tasks.protocol import Evaluating, Saved, Task


@dataclass(frozen=True)
class Parts:
    """What the training loop works with."""

    engine: Engine
    objective: Objective
    progress: Progress
    schedule: Schedule
    batches: Batches
    stopwatch: Stopwatch
    agreement: Agreement
    guard: Guard
    recovery: Recovery
    recorder: Recorder
    evaluation: Evaluation
    saving: Saving

    def advance(self) -> None:
        """A step is done: note it, and count it."""
        self.batches.end_step()
        self.recorder.step_done()
        self.progress.advance()


@dataclass(frozen=True)
class Run:
    """A run that is ready to train: the loop's parts, and what its end needs."""

    task: Task
    recipe: Recipe  # resolved
    sizes: Resolved
    parts: Parts
    log: MetricsLog
    lease: Lease | None  # rank 0's
    presence: Presence
    trackers: Trackers


def build(verdict: Verdict, task: Task, stop: preempt.StopRequest) -> Run:
    """The run, with its folder taken and at its newest complete checkpoint. Collective.

    Raises:
        Refused: on every rank; another job trains here, or the folder cannot be written.
        CheckpointError: on every rank; there are checkpoints and none can be used.
    """
    recipe = verdict.recipe
    lease = hold(recipe)
    startup.mark("lease")
    generation = dist.from_first(lease.generation if lease else 0)
    presence = Presence(
        recipe.run_dir,
        generation=generation,
        rank=dist.rank(),
        world=dist.world(),
        timeout_s=recipe.engine.timeout_s,
    )
    made: list[Run] = []

    def note_left() -> None:
        if made:
            ending.note_left(made[0])
        elif lease is not None:
            ending.note_left_before(verdict, lease)

    waits.last_word(note_left)
    try:
        made.append(assemble(verdict, task, stop, lease, presence))
        return made[0]
    except BaseException as error:
        if isinstance(error, waits.StopAsked):
            note_left()
        if isinstance(error, Refused | checkpoint.CheckpointError):  # on all ranks together
            presence.leave()
        else:
            error.add_note(presence.explain(error).message)
            if ending.is_out_of_memory(error):
                advice = ending.memory_advice_to_build(recipe, verdict.sizes)
                error.add_note(f"rcmae: {advice}")
        if lease is not None:
            lease.release()
        raise


def hold(recipe: Recipe) -> Lease | None:
    """The lease of the run's folder, on rank 0: the right to write there. Collective.

    Raises:
        Refused: on every rank; another job trains here and is alive.
    """
    root = recipe.run_dir / "checkpoints"

    def newest_step() -> int:
        last = checkpoint.newest_unverified(root)
        return last.step if last else 0

    lease = None
    problem = None
    if dist.rank() == 0:
        try:
            with waits.waiting(f"the lease of {recipe.run_dir}", saved=True):
                lease = Lease(
                    recipe.run_dir,
                    timeout_s=recipe.run.lease_timeout_s,
                    wait_s=recipe.run.lease_wait_s,
                    newest_step=newest_step,
                    say=lambda text: print(text, flush=True),
                )
            waits.last_word(lease.release)
        except LeaseHeld as error:
            problem = str(error)
        except OSError as error:
            problem = unwritable(recipe, error)
    with waits.waiting(
        f"rank 0, which takes the lease of {recipe.run_dir}", breaks=False, saved=True
    ):
        problem = dist.from_first(problem)
    if problem:
        raise Refused(problem)
    return lease


def assemble(
    verdict: Verdict,
    task: Task,
    stop: preempt.StopRequest,
    lease: Lease | None,
    presence: Presence,
) -> Run:
    """The parts, at the newest valid checkpoint. Collective; rank 0 has the lease."""
    recipe, sizes = verdict.recipe, verdict.sizes
    index = verdict.data.train
    assert index is not None
    trained = restored(verdict, task)
    saved = trained.saved
    if verdict.trains or saved is None or not saved.is_own:
        start_folder(recipe, saved, index)
    progress = progress_of(recipe, sizes, trained.saved)
    log = MetricsLog(
        recipe.run_dir,
        resume_step=progress.step,
        total_steps=sizes.total_steps,
        writes=dist.rank() == 0,
        tensorboard=recipe.log.tensorboard,
    )
    meter = Meter(
        device=dist.device(),
        world=dist.world(),
        precision=recipe.engine.precision,
        step_flops_per_image=trained.step_flops,
    )
    stopwatch = Stopwatch(dist.device(), is_needed=dist.world() > 1)
    stopwatch.leave_out_gathers(trained.engine.student, trained.engine.teacher)
    instruments = Instruments(log, meter, stopwatch, presence, stop)
    parts = parts_of(verdict, task, trained, progress, instruments, lease)
    beside = [*recipe.log.trackers, *([REPORT] if recipe.log.report else [])]
    trackers = Trackers(beside if lease else (), recipe.run_dir, log.say)
    run = Run(task, recipe, sizes, parts, log, lease, presence, trackers)
    announce(run, verdict, trained)
    startup.mark("files")
    return run


def choose_attention(
    recipe: Recipe,
    sizes: Resolved,
    objective: Objective,
    student: nn.Module,
    teacher: nn.Module | None,
) -> None:
    """Choose kernels for the attention of a training step. Collective: every rank calls."""
    device = dist.device()
    shapes: set[attention.Shape] = set()
    if dist.rank() == 0:
        shapes = attention_shapes(objective, student, teacher, recipe.engine.precision)
    timer = functools.partial(attention.milliseconds, batch=sizes.per_device, device=device)
    name = torch.cuda.get_device_name(device)
    attention.choose(shapes, timer, compiling.folder() / attention.FILE, name)


class Trained(NamedTuple):
    """What is trained, at the checkpoint that the run resumes from."""

    engine: Engine
    objective: Objective
    step_flops: float  # of a whole training step for one image
    num_weights: int  # of the student
    saved: Saved | None
    damaged: list[str]  # what was wrong with newer checkpoints


def restored(verdict: Verdict, task: Task) -> Trained:
    """Student, teacher and optimizer on the ranks, with the newest valid checkpoint in them.
    Collective.

    Raises:
        CheckpointError: on every rank; there are checkpoints and none can be used.
        Refused: on every rank; weights cannot be read, or the run is another training's.
    """
    recipe = verdict.recipe
    manifest, damaged = choose_checkpoint(recipe)
    saved = saved_from(recipe, manifest) if manifest else None
    if damaged:  # the run was judged by one that it does not resume from
        refuse_mismatches(verdict, task, saved)
    startup.mark("checkpoint")
    student = task.network(recipe, verdict.found, saved)
    objective = task.objective(recipe, verdict.sizes)
    num_weights = sum(param.numel() for param in student.parameters())
    teacher = task.teacher(student, objective)
    step_flops = task.cost(recipe).step_flops
    startup.mark("model")
    if recipe.engine.compile or dist.device().type == "cuda":
        compiling.keep_in(recipe.run_dir / "compiled")
    if dist.device().type == "cuda":
        with waits.waiting("the measurement of attention", breaks=False, saved=True):
            choose_attention(recipe, verdict.sizes, objective, student, teacher)
    with waits.waiting(waited_for(verdict.engine_config), breaks=False, saved=True):
        engine = make_engine(
            recipe, verdict.sizes, student, teacher, verdict.engine_config, task.optimizing(recipe)
        )
    startup.mark("engine")
    if manifest is not None:
        checkpoint.load(manifest, engine)
        startup.mark("checkpoint")
    return Trained(engine, objective, step_flops, num_weights, saved, damaged)


def parts_of(
    verdict: Verdict,
    task: Task,
    trained: Trained,
    progress: Progress,
    instruments: Instruments,
    lease: Lease | None,
) -> Parts:
    """What the loop works with. Collective."""
    recipe = verdict.recipe
    engine, objective = trained.engine, trained.objective
    index = verdict.data.train
    assert index is not None
    cache = cache_of(recipe, verdict.data)
    stream = stream_of(verdict, task, cache)
    normalise = Normalise(recipe.data.mean, recipe.data.std, dist.device())
    batches = Batches(stream, task, recipe, progress, instruments, normalise)
    guard = guard_of(recipe, objective, trained.saved)
    saving = Saving(
        saver_of(recipe, instruments.presence, lease),
        engine,
        progress,
        instruments,
        options=recipe.checkpoint,
        about=lambda: about(verdict, guard, progress),
        renew=lambda: renew(recipe, index),
    )
    waits.spare_saves(saving.is_under_way)
    saving.save_s = BYTES_A_WEIGHT * trained.num_weights / DISK_RATE
    if trained.saved is not None and trained.saved.is_own:
        events = events_of(recipe.run_dir, "checkpoint", last=5)
        saving.resume([event["seconds"] for event in events])
    evaluation = Evaluation(
        task,
        lambda: evaluating(verdict, trained, batches, progress, cache),
        batches,
        progress,
        instruments,
        save_s=lambda: saving.save_s,
    )
    stragglers = Stragglers(
        instruments.stopwatch, dist.gather(socket.gethostname()), instruments.log
    )
    agreement = Agreement(
        recipe, objective, progress, batches, saving, evaluation, instruments, lease=lease
    )
    return Parts(
        engine=engine,
        objective=objective,
        progress=progress,
        schedule=Schedule(recipe, verdict.sizes),
        batches=batches,
        stopwatch=instruments.stopwatch,
        agreement=agreement,
        guard=guard,
        recovery=Recovery(recipe, engine, guard, progress, saving, instruments),
        recorder=Recorder(objective, progress, instruments, stragglers),
        evaluation=evaluation,
        saving=saving,
    )


def choose_checkpoint(recipe: Recipe) -> tuple[checkpoint.Manifest | None, list[str]]:
    """The checkpoint that the run resumes from, its bytes verified, and what was wrong with newer
    ones. Collective: every rank calls, under the lease.

    Raises:
        CheckpointError: on every rank; there are checkpoints and none is valid, or the one asked
            for is not.
    """
    asked = recipe.checkpoint.resume
    root = recipe.run_dir / "checkpoints"
    if asked == "never":
        return None, []
    found, damaged = checkpoint.newest_together(root)
    if damaged and dist.rank() == 0:
        print("checkpoints skipped: " + "; ".join(damaged), file=sys.stderr, flush=True)
    if found is None and damaged:
        raise checkpoint.CheckpointError(
            f"{root} has checkpoints but none is valid ({'; '.join(damaged)}); restore one, or "
            "start over with checkpoint.resume=never (they are moved aside, not deleted)"
        )
    if found is None and asked not in ("auto", "must"):
        return checkpoint.open_verified_together(Path(asked)), []
    return found, damaged


def refuse_mismatches(verdict: Verdict, task: Task, saved: Saved | None) -> None:
    """Judge the recipe against the checkpoint that is valid. The same on every rank.

    Raises:
        Refused: it is another training's.
    """
    problems = mismatches(
        verdict.recipe,
        saved,
        task=task,
        written=None,
        index=verdict.data.train,
        sizes=verdict.sizes,
    )
    if problems:
        raise Refused("\n".join(problems))


def progress_of(recipe: Recipe, sizes: Resolved, saved: Saved | None) -> Progress:
    """Where the run stands. Collective."""
    progress = Progress(
        total_steps=sizes.total_steps,
        images_per_step=sizes.images_per_step,
        samples_per_epoch=sizes.samples_per_epoch,
        step=saved.step if saved else 0,
        data_step=saved.images // sizes.images_per_step if saved else 0,
    )
    if saved is not None and saved.is_own:
        progress.best = dict(saved.meta.get("best", {}))
        progress.owes_evaluation = owes_evaluation(recipe, saved)
    return progress


def stream_of(verdict: Verdict, task: Task, cache: Cache | None) -> Stream:
    """This rank's samples."""
    recipe, data = verdict.recipe, verdict.recipe.data
    assert verdict.data.train is not None
    members = task.members(recipe)
    # the device decodes and resizes images alone
    on_device = (device_decoder(recipe) or device_resizer(recipe)) if members is None else None
    return Stream(
        index=verdict.data.train,
        plan=verdict.plan,
        views=Views(
            transform=task.transform(recipe),
            mask=verdict.mask,
            seed=data.seed,
            repeats=data.repeats,
            teacher_masks=recipe.objective.teacher_sees == "different",
            members=members,
        ),
        share=Share(
            micro=verdict.sizes.per_device,
            rank=dist.rank(),
            world=dist.world(),
            ranks_of_node=dist.ranks_of_node(),
        ),
        readers=Readers(workers=data.workers, cache=cache),
        bad=BadLimits(fraction=data.max_bad_fraction, in_a_row=data.max_bad_in_a_row),
        on_device=on_device,
    )


def saver_of(recipe: Recipe, presence: Presence, lease: Lease | None) -> checkpoint.Saver:
    """What writes checkpoints into the run's folder."""
    return checkpoint.Saver(
        recipe.run_dir / "checkpoints",
        keep=recipe.checkpoint.keep,
        keep_every=recipe.checkpoint.keep_every,
        generation=presence.generation,
        background=recipe.checkpoint.background,
        check_lease=lease.check if lease else lambda: None,
    )


def guard_of(recipe: Recipe, objective: Objective, saved: Saved | None) -> Guard:
    """What judges each step's loss."""
    options = recipe.guard
    guard = Guard(
        options.action,
        options.max_skips,
        options.max_rewinds,
        dict(objective.weights),
        options.spike_factor,
        options.spike_window,
    )
    if saved is not None and saved.is_own:
        guard.restore(saved.meta["guard"])
    return guard


def about(verdict: Verdict, guard: Guard, progress: Progress) -> Mapping[str, Any]:
    """What a checkpoint says of the run beside its tensors."""
    assert verdict.data.train is not None
    return {
        "recipe": verdict.recipe.model_dump(mode="json"),
        "sizes": verdict.sizes.asdict(),
        "data_fingerprint": verdict.data.train.fingerprint,
        "guard": guard.state(),
        "best": progress.best,
        "evaluated": not progress.owes_evaluation,
        "versions": versions(),
    }


def evaluating(
    verdict: Verdict,
    trained: Trained,
    batches: Batches,
    progress: Progress,
    cache: Cache | None,
) -> Evaluating:
    """What an evaluation may use, as things are now."""
    return Evaluating(
        recipe=verdict.recipe,
        step=progress.step,
        student=trained.engine.student,
        teacher=trained.engine.teacher,
        objective=trained.objective,
        found=verdict.found,
        sets=verdict.data.sets,
        cache=cache,
        normalise=batches.normalise,
        device=dist.device(),
    )
