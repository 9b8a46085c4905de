"""Train. READ FIRST: `fit` shows the whole method on one screen, with every collective.

    rcmae train RECIPE.yaml [key=value ...]     one process
    deepspeed --module rcmae.train RECIPE.yaml ...        or torchrun -m rcmae.train, or srun

A start has three phases: `look` (rank 0 reads disks and servers), `judge` (pure: the same answer on
every rank), `build` (collective). The same command on the same run.dir resumes from the newest
complete checkpoint. Exit status: 0 finished; 75 stopped on request with a checkpoint committed (run
it again); 2 the user's input is wrong and nothing was written; 1 anything else.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rcmae.commands import training
from rcmae.data.workers import refuse_unguarded, serve_readers
from rcmae.process import console, garbage, waits
from rcmae.process.leaving import leaving, tell_launcher
from rcmae.run import preempt, startup
from rcmae.run.command import Command

if TYPE_CHECKING:  # heavy: imported where a run is sure to start, so that a typo is told at once
    from rcmae.config import Recipe
    from rcmae.run.build import Run
    from rcmae.run.judge import Verdict
    from rcmae.tasks.protocol import Task

# -------------------------------------------------------------------------------------- the method


def fit(run: Run) -> str | None:
    """Train from where the run stands to the end. Collective: every rank calls.

    Returns:
        None when the last step is done, else why the run stops before it.

    Raises:
        NonFiniteLoss: on every rank, if any rank's loss or gradient is not finite (or the loss
            jumped) and guard.action or its limits say stop; the step updated nothing, and no other
            after it.
        DataUnreadable: on every rank, if any cannot read its samples.
        LeaseLost: on every rank; another job took over the run.
    """
    parts, progress, schedule = run.parts, run.parts.progress, run.parts.schedule
    engine, objective = run.parts.engine, run.parts.objective
    parts.evaluation.resume()
    for micros in parts.batches:
        # a sum over ranks, begun in the step before: global counts, who asks to stop
        agreed = parts.agreement.before_step(micros)
        if agreed.stop or agreed.unreadable:
            parts.recovery.settle()
            if agreed.unreadable:
                raise agreed.unreadable
            return agreed.stop
        lr = schedule.lr(progress.step)
        momentum = schedule.momentum(progress.step, len(micros) - 1)
        logs = progress.is_due(run.recipe.log.every_steps)
        losses = []
        for index, batch in enumerate(micros):
            batch = parts.batches.ready(batch)
            last = index == len(micros) - 1
            with parts.stopwatch.computing(logs=logs):  # this rank's own time, without backward
                sums = objective(engine.student, engine.teacher, batch, progress.fraction)
            shares = agreed.shares(sums)  # of each term's mean over the whole step
            loss = agreed.loss(objective.weights, shares)
            if last:
                parts.agreement.ask_ahead()  # reads the next step's samples, begins its sum
            engine.backward(loss, last=last)  # sums gradients: over micro-batches, then over ranks
            losses.append({term: share.detach() for term, share in shares.items()})
            if schedule.teacher_each_micro and not last:
                engine.update_teacher(schedule.momentum(progress.step, index))
        # this step is on the device; what it said of the last one is there, or is waited for
        if not parts.recovery.settle():
            continue  # the run was rewound
        shows = progress.is_early  # on the console alone
        waits = parts.recovery.must_wait()  # at log steps, before evaluations and saves
        jumped = parts.guard.jumped(losses)  # an all-reduce, where guard.spike_factor asks for it
        # all ranks agree that the gradient is finite before any weight moves: the device, or, where
        # the engine cannot leave that to it, the host, which waits for it
        stats = engine.step(lr=lr, weight_decay=schedule.weight_decay, discard=jumped is not None)
        if waits and (jumped is not None or not stats.finite):
            if not parts.recovery.skips(micros, losses, grad_norm=stats.grad_norm, jumped=jumped):
                continue  # the run was rewound
            telemetry = {"skipped": 1.0}  # the update alone: whatever is due is done
        else:
            telemetry = engine.update_teacher(momentum, measure=logs)
        parts.advance()
        rates = {"lr": lr, "momentum": momentum}
        if not waits:
            parts.recovery.expect(micros, losses, stats)
        if logs:
            # an all-reduce
            parts.recorder.record(losses, **rates, grad_norm=stats.grad_norm, **telemetry)
            garbage.collect()
        elif shows:
            parts.recorder.show(losses, **rates, grad_norm=stats.grad_norm)  # an all-reduce
        else:
            parts.recorder.mention()  # a line each half minute, on rank 0
        parts.evaluation.when_due()
        parts.saving.when_due()
    return None


# ------------------------------------------------------------------------------------ start to end


def train(
    recipe: Recipe | None, stop: preempt.StopRequest, task: Task, command: Command | None = None
) -> int:
    """Look, judge, build, fit, end; the exit status. Collective: every rank calls.

    Args:
        recipe: rank 0's; ignored on the others.
        stop: requests to stop.
        task: what is trained.
        command: this rank's command line, to be compared with the others'.

    Raises:
        Exception: of this rank alone: it will not meet the others again.
    """
    from rcmae.checkpoint import CheckpointError
    from rcmae.errors import Refused
    from rcmae.run import ending

    command = command or Command("")
    try:
        verdict = judged(recipe, task, command)
        if command.check:
            from rcmae.run.expected import expected  # the planner: only where it is used

            ending.say(verdict.shown(expected(verdict, task)))
            return preempt.FINISHED
        run = built(verdict, task, stop)
        stop.has_begun = True
    except (Refused, CheckpointError) as error:  # on all ranks together
        ending.say_error(error)
        return preempt.REFUSED if isinstance(error, Refused) else preempt.FAILED
    try:
        if command.evaluate_only:
            outcome = ending.evaluated(run)
        else:
            with garbage.collected_each(run.recipe.log.every_steps):
                why_stop = fit(run)
            run.parts.saving.finish()
            outcome = ending.outcome_of(run, why_stop)
            run.log.conclude(ending.summary(run, outcome))
    except ending.TOGETHER as error:  # on all ranks together
        ending.say_error(error)
        outcome = ending.outcome_of_error(run, error)
    except Exception as error:  # of this rank alone, or of all that have lost one
        ending.note_failure(run, error)
        raise
    ending.note_end(run, outcome)
    return outcome.status


def judged(recipe: Recipe | None, task: Task, command: Command | None = None) -> Verdict:
    """Look and judge; nothing is written. Collective: every rank calls. Arguments of `train`.

    Raises:
        Refused: on every rank; the run cannot start.
    """
    from rcmae.run.judge import AnotherTraining, judge
    from rcmae.run.look import look

    try:
        verdict = judge(look(recipe, command, task), task)
    except AnotherTraining:  # than a manifest's: it counts only if the checkpoint is whole
        verdict = judge(look(recipe, command, task, verified=True), task)
    startup.mark("checks")
    return verdict


def built(verdict: Verdict, task: Task, stop: preempt.StopRequest) -> Run:
    """The run, at its newest complete checkpoint. Collective: every rank calls.

    Raises:
        Refused: on every rank; another job trains in this folder, or the program that calls this
            does so at its top level.
        CheckpointError: on every rank; there are checkpoints and none can be used.
    """
    from rcmae.run.build import build

    if verdict.recipe.data.workers:
        refuse_unguarded("rcmae.train")  # its workers import the program that calls it
        serve_readers()  # their server imports while the engine is built
    if verdict.recipe.run.deadline_s is not None:
        stop.within(verdict.recipe.run.deadline_s)
    return build(verdict, task, stop)


def main(argv: Sequence[str] | None = None, task: str = "pretrain", prog: str | None = None) -> int:
    """Train by a command line; the exit status of this rank.

    Args:
        argv: its arguments; None for those of this process.
        task: of the command.
        prog: the command as the user gave it; None for the module's.
    """
    stop = preempt.StopRequest()  # first: Python's default for SIGUSR1 is to die
    console.outlive()
    startup.begin()
    module = "train" if task == "pretrain" else task
    command = training.parse(argv, prog or f"python -m rcmae.{module}")
    try:
        if training.refused(command, task, stop):
            return preempt.REFUSED
        return start(command, task, stop)
    finally:
        stop.close()


def start(command: Command, task: str, stop: preempt.StopRequest) -> int:
    """Join the other ranks and train; the exit status of this rank. Every rank calls."""
    with waits.waiting("libraries to be imported", breaks=False, saved=True):
        from rcmae import dist
        from rcmae.checkpoint.lease import exit_status
        from rcmae.data.sources import redacted
        from rcmae.errors import Refused
        from rcmae.run.ending import say_error
        from rcmae.run.look import meet
        from rcmae.tasks.registry import task_named
    if stop.reason is not None:  # asked meanwhile
        stop.leave()

    folder = None
    try:
        met = meet(command, task)
        folder = met.run_dir
        startup.mark("process group")
        status = train(met.recipe, stop, task_named(met.task), command)
    except Refused as error:  # on all ranks together
        say_error(error)
        status = preempt.REFUSED
    except dist.Unreachable as error:
        tell_launcher(str(error))
        print(f"rcmae: {error}", file=sys.stderr, flush=True)
        return preempt.FAILED
    except waits.StopAsked:  # in a wait before the first step
        stop.leave()
    except Exception:
        if stop.reason is not None and not stop.has_begun:
            stop.leave()  # and so did the peers, whom this rank waited for
        # a bug, or this rank's peers are gone: they are in another collective and will not come to
        # a barrier
        told = redacted(traceback.format_exc())
        tell_launcher(told)
        print(f"rcmae: rank {dist.launched().rank} failed", file=sys.stderr)
        print(told, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_status(folder, preempt.FAILED) if folder else preempt.FAILED)
    dist.finish()
    return exit_status(folder, status) if folder else status


if __name__ == "__main__":
    raise SystemExit(leaving(main()))
