"""What a job says at its start, on the console and in events.jsonl: what runs, and from where."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rcmae import dist
from rcmae.errors import counted
from rcmae.models import kernels
from rcmae.planning.hardware import cpu_name
from rcmae.run import preempt
from rcmae.run.folder import versions
from rcmae.run.judge import Verdict

if TYPE_CHECKING:
    from rcmae.run.build import Run, Trained


def announce(run: Run, verdict: Verdict, trained: Trained) -> None:
    """Say what will run, and where it resumes from."""
    saved = trained.saved
    recipe, sizes, log = run.recipe, run.sizes, run.log
    index = verdict.data.train
    assert index is not None
    log.event(
        "resume" if saved else "start",
        step=run.parts.progress.step,
        sizes=sizes.asdict(),
        versions=versions(),
        engine=recipe.engine.model_dump(mode="json"),
        precision=verdict.precision._asdict(),
        device=device_name(),
        data={"fingerprint": index.fingerprint, "samples": len(index)},
        from_checkpoint=str(saved.path) if saved else None,
        passed_over=trained.damaged,
        generation=run.lease.generation if run.lease else None,
        undone=log.undone,
        **preempt.this_start(),
    )
    config_name = f" {recipe.engine.config}" if recipe.engine.config else ""
    log.say(
        f"{recipe.run.name}: {recipe.objective.name} {recipe.model.name} on {dist.device()}, "
        f"{recipe.engine.name}{config_name} x {sizes.world}, {recipe.engine.precision}\n"
        f"{sizes.images_per_step} images a step = {counted(sizes.world, 'rank')} x "
        f"{counted(sizes.accumulation, 'micro-batch', 'micro-batches')} x {sizes.per_device}; "
        f"{sizes.total_steps} steps, {sizes.steps_per_epoch} "
        f"an epoch of {sizes.samples_per_epoch:,} samples; lr {sizes.lr:.3g} after "
        f"{sizes.warmup_steps:g} steps of warm-up"
    )
    rows = kernels.table(
        device=dist.device(),
        precision=recipe.engine.precision,
        layer_norm=recipe.engine.layer_norm,
        optimizer=recipe.engine.optimizer,
        compile=recipe.engine.compile is True,  # judged
        checkpointing=recipe.engine.activation_checkpointing,
    )
    for part, used, why in (verdict.precision.row(), *rows):
        log.say(f"  {part:<12} {used}  ({why})")
    if recipe.data.decode != "cpu":
        decodes = run.parts.batches.stream.decodes
        log.say(f"  {'JPEG':<12} decoded by {decodes}  (data.decode={recipe.data.decode})")
    if recipe.data.resize != "workers":
        log.say(f"  {'crops':<12} resized on the device that trains  (data.resize=device)")
    if index.short:
        shown = ", ".join(index.short[:5]) + " ..." * (len(index.short) > 5)
        log.event("short_shards", shards=index.short)
        log.say(
            f"{len(index.short)} shards are shorter than their index says, their last samples are "
            f"bad: {shown}"
        )
    if recipe.log.trackers:
        log.say(f"  {'trackers':<12} {', '.join(recipe.log.trackers)}  (log.trackers)")
    for told in verdict.notes:
        log.event("note", told=told)
        log.say(told)
    for told in verdict.warnings:
        log.warn(told)
    if saved:
        log.say(f"resumes from {saved.path}, step {saved.step}")


def device_name() -> str:
    """What rank 0 computes on."""
    device = dist.device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
