"""What makes a recipe another training than the one that lies in its run's folder. Pure."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from rcmae import config
from rcmae.config import Recipe, Resolved
from rcmae.data.index import ShardIndex
from rcmae.tasks.protocol import Saved, Task


def mismatches(
    recipe: Recipe,
    saved: Saved | None,
    *,
    task: Task,
    written: Mapping[str, Any] | None,
    index: ShardIndex | None,
    sizes: Resolved | None = None,
) -> list[str]:
    """What keeps this recipe from resuming what lies in the run's folder, one line a problem.

    Args:
        recipe: as it is asked for.
        saved: the checkpoint it would resume from.
        task: what the recipe trains.
        written: recipe.yaml of a run without a checkpoint.
        index: of data.shards.
        sizes: resolved from the recipe, where that was possible.
    """
    problems = recipe_mismatches(recipe, saved, task, written)
    if saved is None:
        return problems
    if sizes is not None:
        problems += batch_norm_mismatch(recipe, saved, sizes)
        problems += accumulation_mismatch(recipe, saved, sizes)
    if index is not None:
        problems += data_mismatch(recipe, saved, index)
    return problems


def recipe_mismatches(
    recipe: Recipe, saved: Saved | None, task: Task, written: Mapping[str, Any] | None
) -> list[str]:
    """Frozen keys with other values, in one message."""
    theirs = copy.deepcopy(saved.meta["recipe"] if saved else written)
    if theirs is None:
        return []
    if saved is not None and theirs["data"].get("canonical_streams") is None:
        # chosen by the first start
        theirs["data"]["canonical_streams"] = saved.meta["sizes"]["canonical_streams"]
    where = saved.path if saved else recipe.run_dir / "recipe.yaml"
    mine = recipe.model_dump(mode="json")
    found = config.differences(mine, theirs, task.frozen, task.reports)
    if not found:
        return []
    ways = ["choose another run.dir"]
    allowed = [each.key for each in found if not config.is_under(each.key, config.OF_WEIGHTS)]
    if allowed:
        ways.append(f"pass checkpoint.allow=[{','.join(allowed)}] to override")
    back = json.dumps(found[0].written) if len(found) == 1 else "its values"
    *first, last = [f"Use {back}", *ways]
    out = f"{', '.join(first)}, or {last}"
    if len(found) == 1:
        return [f"{where} was written with {found[0]}. {out}"]
    listed = "".join(f"\n  {each}" for each in found)
    return [f"{where} was written with{listed}\n{out}"]


def accumulation_mismatch(recipe: Recipe, saved: Saved, sizes: Resolved) -> list[str]:
    """Another number of micro-batches, where each of them updates the teacher."""
    before = saved.meta["sizes"]["accumulation"]
    if recipe.teacher.update != "micro_step" or "batch.per_device" in recipe.checkpoint.allow:
        return []
    if sizes.accumulation == before:
        return []
    return [
        f"teacher.update=micro_step updates the teacher {before} times a step in {saved.path}, "
        f"{sizes.accumulation} times with {sizes.world} ranks x {sizes.per_device} per_device; "
        f"choose batch.per_device so that ranks x per_device x {before} = {sizes.images_per_step}"
    ]


def batch_norm_mismatch(recipe: Recipe, saved: Saved, sizes: Resolved) -> list[str]:
    """Another number of images in the batch of a batch norm, where the network has one."""
    has_norm = "classes" in recipe.objective.student_outputs and recipe.model.class_hidden
    if not has_norm or "batch.per_device" in recipe.checkpoint.allow:
        return []
    before = saved.meta["sizes"]["world"] * saved.meta["sizes"]["per_device"]
    now = sizes.world * sizes.per_device
    if now == before:
        return []
    fits = "a number of ranks that divides that"
    if before % sizes.world == 0:
        fits = f"batch.per_device={before // sizes.world}"
    return [
        f"{saved.path} normalised {before} images at once, this start would normalise {now}: the "
        f"class head's batch norm would see others; use {fits}, or "
        "checkpoint.allow=[batch.per_device]"
    ]


def data_mismatch(recipe: Recipe, saved: Saved, index: ShardIndex) -> list[str]:
    """Other samples."""
    before = saved.meta["data_fingerprint"]
    if index.fingerprint == before or "data.shards" in recipe.checkpoint.allow:
        return []
    return [
        f"data.shards are not those of {saved.path}: their names, sizes or samples differ "
        f"(fingerprint {index.fingerprint[:12]}, was {before[:12]}); give the same shards, or "
        "checkpoint.allow=[data.shards] to override"
    ]
