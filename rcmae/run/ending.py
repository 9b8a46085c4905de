"""How a job ends: the exit status, the summary, and what is left for whoever starts it again."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from rcmae import dist
from rcmae.checkpoint import CheckpointError
from rcmae.checkpoint.lease import Lease, LeaseLost, newest_generation
from rcmae.config import Recipe, Resolved
from rcmae.data.sources import redacted
from rcmae.errors import counted
from rcmae.process import console
from rcmae.process.leaving import tell_launcher
from rcmae.run import preempt
from rcmae.run.guard import NonFiniteLoss
from rcmae.run.loop.agreement import DataUnreadable
from rcmae.tasks.protocol import Ended

if TYPE_CHECKING:
    from rcmae.run.build import Run
    from rcmae.run.judge import Verdict


# what all ranks raise together: each has said its part, and they meet again
TOGETHER = (NonFiniteLoss, DataUnreadable, CheckpointError, LeaseLost)


class Outcome(NamedTuple):
    """How a job ended."""

    status: int  # exit status of every rank
    reason: str
    is_told: bool = True  # in outcome.json: not of a job that only evaluates a run
    again: bool | None = None  # whether a new start helps; None: if it was stopped on request


def outcome_of(run: Run, why_stop: str | None) -> Outcome:
    """Of a training that came to its end or was stopped, after its last save."""
    step = run.parts.progress.step
    committed = run.parts.saving.committed_step
    if committed != step:
        why = why_stop or "at the last step"
        return Outcome(
            preempt.STOPPED,
            f"stopped, {why}; no time was left to save step {step}, the run resumes from step "
            f"{committed}",
        )
    if run.parts.progress.owes_evaluation:
        why = why_stop or "asked to stop"
        return Outcome(preempt.STOPPED, f"stopped, {why}; the evaluation of step {step} is left")
    if why_stop and not run.parts.progress.is_over:
        return Outcome(preempt.STOPPED, f"stopped, {why_stop}")
    return Outcome(preempt.FINISHED, "finished")


def evaluated(run: Run) -> Outcome:
    """Evaluate the networks of a run as they are, and train nothing. Collective."""
    run.parts.evaluation.alone()
    step = run.parts.progress.step
    if run.parts.progress.owes_evaluation:
        return Outcome(preempt.STOPPED, f"stopped in the evaluation of step {step}", is_told=False)
    return Outcome(preempt.FINISHED, f"evaluated step {step}", is_told=False)


def outcome_of_error(run: Run, error: Exception) -> Outcome:
    """The outcome of a training that all ranks ended together, with its reason. Collective.

    Ranks that cannot read on stand at a step's boundary: that step is committed.
    """
    if not isinstance(error, DataUnreadable):
        # a lease that passed on has its outcome written by who has it now; one whose beat could
        # not be written may be had again
        return Outcome(preempt.FAILED, str(error), again=isinstance(error, LeaseLost))
    try:
        run.parts.saving.finish()
    except (CheckpointError, LeaseLost) as other:  # on all ranks together
        say_error(other)
    return Outcome(preempt.FAILED, str(error), again=error.may_pass)


def note_end(run: Run, outcome: Outcome) -> None:
    """Write how the job ended, and give the run's folder back: after the save under way.

    Collective: every rank calls.
    """
    run.parts.saving.settle()
    step = run.parts.progress.step
    run.log.event("stop", step=step, status=outcome.status, reason=outcome.reason)
    run.log.close()
    run.parts.batches.stream.close()
    run.presence.leave()
    if run.lease is not None:
        if outcome.is_told and run.lease.holds():
            write_outcome(run, outcome)
        run.lease.release()
    run.trackers.close(in_a_hurry=outcome.status == preempt.STOPPED)
    if outcome.status == preempt.STOPPED:
        tell_launcher(f"{outcome.reason}, at step {step}: run the same command to resume")


def write_outcome(run: Run, outcome: Outcome) -> None:
    """Leave outcome.json; where the disk refuses it, say so: the exit status has to do."""
    try:
        preempt.write_outcome(
            run.recipe.run_dir,
            status=outcome.status,
            step=run.parts.progress.step,
            reason=outcome.reason,
            again=outcome.again,
        )
    except OSError as error:
        print(f"rcmae: outcome.json is not written: {error}", file=sys.stderr, flush=True)


def note_left(run: Run) -> None:
    """Write how the job ended where a second Ctrl-C ends a wait for ranks that do not come."""
    if run.lease is not None and run.lease.holds():
        preempt.write_outcome(
            run.recipe.run_dir,
            status=preempt.STOPPED,
            step=max(0, run.parts.saving.committed_step),
            reason=f"stopped at step {run.parts.progress.step} in a wait, without a save",
        )


def note_left_before(verdict: Verdict, lease: Lease) -> None:
    """Write how the job ended where a wait before the first step is ended, and the folder is its
    own: what an earlier job left there says nothing of this one.
    """
    if lease.holds():
        preempt.write_outcome(
            verdict.recipe.run_dir,
            status=preempt.STOPPED,
            step=verdict.saved.step if verdict.saved is not None and verdict.saved.is_own else 0,
            reason="stopped in a wait before the first step",
        )


def note_failure(run: Run, error: Exception) -> None:
    """Say to the error which rank this one lost, if it did, and write it down.

    For an error of this rank alone, or of all that have lost one: they never meet again. A save
    under way is waited for first, half the time-out of collectives at most: others still write.
    """
    run.parts.saving.settle_alone(run.recipe.engine.timeout_s / 2)
    loss = run.presence.explain(error)
    error.add_note(loss.message)
    reason = loss.message if loss.of_a_peer else f"rank {dist.rank()}: {error!r}"
    if is_out_of_memory(error):
        advice = memory_advice(run.recipe, run.sizes)
        error.add_note(f"rcmae: {advice}")
        reason = f"rank {dist.rank()}: {advice}"
    step = run.parts.progress.step
    if loss.speaks:
        run.presence.write_outcome(reason, again=loss.of_a_peer)
    with contextlib.suppress(OSError, ValueError):  # a full disk, or a log that is closed
        # else it is another job's
        if newest_generation(run.recipe.run_dir) == run.presence.generation:
            run.log.event("stop", step=step, status=preempt.FAILED, reason=reason)
        run.log.close()
    if run.lease is not None:
        run.lease.release()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the device or of the host did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # torch's allocator of the CPU has no error of its own
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def memory_advice(recipe: Recipe, sizes: Resolved) -> str:
    """What to set where a step does not fit, what costs least first."""
    engine = recipe.engine
    less = [each for each in range(1, sizes.per_device) if sizes.images_per_rank % each == 0]
    ways = []
    if less:
        ways.append(f"batch.per_device={less[-1]} (the same images a step)")
    if engine.precision == "fp32":
        ways.append("engine.precision=bf16")
    if engine.activation_checkpointing == "none":
        ways.append("engine.activation_checkpointing=torch")
    if engine.name != "fsdp2":
        ways.append("engine.name=fsdp2 on several ranks")
    ways.append("a smaller model.image_size")
    return (
        f"out of memory with batch.per_device={sizes.per_device} and engine.name={engine.name} on "
        f"{counted(sizes.world, 'rank')}; what helps: {', '.join(ways)}; rcmae plan RECIPE says "
        "what fits before a start"
    )


def memory_advice_to_build(recipe: Recipe, sizes: Resolved) -> str:
    """What to set where weights and moments do not fit, before any image is there."""
    share = "engine.name=fsdp2 on several ranks, which share weights and moments, or "
    return (
        f"out of memory while the network was built, with model.name={recipe.model.name} and "
        f"engine.name={recipe.engine.name} on {counted(sizes.world, 'rank')}; what helps: "
        f"{'' if recipe.engine.name == 'fsdp2' else share}a smaller network (model.name, "
        "model.depth, model.embed_dim); rcmae plan RECIPE says what fits before a start"
    )


def say(text: str) -> None:
    """One text for all ranks, on standard output."""
    if dist.launched_first():
        print(text, flush=True)


def say_error(error: Exception) -> None:
    """One message for all ranks, on standard error."""
    told = redacted(str(error))
    if dist.launched_first():
        tell_launcher(told)
        console.say(f"rcmae: {told}", error=True)


def launcher(world: int) -> str:
    """What starts a module on as many ranks as these: the job's own way where SLURM started it."""
    each = dist.ranks_of_node()
    nodes = world // each
    if templates := os.environ.get("RCMAE_TEMPLATES"):  # slurm/pretrain.sbatch runs this
        near = Path(templates).absolute()
        here = Path.cwd()
        shown = near.relative_to(here) if near.is_relative_to(here) else near
        return f"sbatch --nodes={nodes} {shlex.quote(f'{shown}/pretrain.sbatch')}"
    if world == 1:
        return "rcmae"
    if "SLURM_STEP_ID" in os.environ:
        return f"srun --nodes={nodes} --ntasks={world} python"
    several = f" --nnodes={nodes}" if nodes > 1 else ""
    return f"torchrun{several} --nproc-per-node={each}"


def summary(run: Run, outcome: Outcome) -> str:
    """The text the job ends with: what ran, where it lies, what to run next."""
    recipe, sizes, progress = run.recipe, run.sizes, run.parts.progress
    place = recipe.run_dir
    seen = progress.step * sizes.images_per_step
    images = f"{seen:,} ({progress.epoch:.1f} epochs of {sizes.samples_per_epoch:,})"
    ranks = counted(sizes.world, "rank")
    ran = {
        "objective": f"{recipe.objective.name}, {recipe.model.name}, {recipe.engine.precision}",
        "engine": f"{recipe.engine.name}, {ranks}, {sizes.images_per_step} images a step",
        "images": images,
    }
    for network, best in sorted(progress.best.items()):
        metric = next(name for name in best if name != "step")
        named = run.task.metrics.get(metric, metric)
        ran[f"best {network}"] = f"{named} {best[metric]:.1f} % at step {best['step']}"
    # one of this very step stands right above
    fresh = run.parts.evaluation.last_step == progress.step
    last = None if fresh else run.parts.evaluation.last
    return closing_summary(
        f"{recipe.run.name}: {outcome.reason} at step {progress.step} of {sizes.total_steps}",
        ran=ran,
        table=last.table if last else "",
        caption=last.caption if last else "",
        places={
            "checkpoints": place / "checkpoints",
            "metrics": place / "metrics.jsonl",
            "events": place / "events.jsonl",
            "pictures": place / "pictures",
            "tensorboard": place / "tensorboard",
        },
        commands=next_commands(run),
    )


def closing_summary(
    title: str,
    *,
    ran: Mapping[str, str],
    table: str,
    places: Mapping[str, Path],
    commands: Sequence[tuple[str, str]],
    caption: str = "k-NN, top-1 in %",
) -> str:
    """The text a run ends with.

    Args:
        title: the run and how it ended.
        ran: what ran, name and figure.
        table: the last evaluation as text, empty where there was none.
        places: what lies where; files that are not there are left out.
        commands: what to run next, (what it does, command line).
        caption: of the table.
    """
    there = {name: str(place) for name, place in places.items() if place.exists()}
    width = max((len(name) for name in [*ran, *there]), default=0)

    def section(heading: str, entries: Mapping[str, str]) -> list[str]:
        rows = [f"  {name:<{width}}  {value}" for name, value in entries.items()]
        return [heading, *rows] if rows else []

    lines = [f"== {title} =="]
    lines += section("what ran", ran)
    if table:
        lines.append(caption)
        lines += [f"  {line}" for line in table.splitlines()]
    lines += section("where the files are", there)
    if commands:
        lines.append("what to run next")
        lines += [f"  {command}    # {what}" for what, command in commands]
    return "\n".join(lines)


def next_commands(run: Run) -> list[tuple[str, str]]:
    """What to run next: (what it does, command line)."""
    recipe, place = run.recipe, run.recipe.run_dir
    ended = Ended(recipe, place, run.parts.progress.is_over, launcher(run.sizes.world))
    commands = []
    if not run.parts.progress.is_over:
        unlimited = " run.stop_after_steps=null" if recipe.run.stop_after_steps else ""
        written = shlex.quote(str(place / "recipe.yaml"))
        resume = ended.start(run.task.module, f"{written}{unlimited}")
        commands.append(("resume", resume))
    commands += run.task.hints(ended)
    if recipe.log.tensorboard:
        curves = shlex.quote(str(place / "tensorboard"))
        commands.append(("see the curves", f"tensorboard --logdir {curves}"))
    return commands
