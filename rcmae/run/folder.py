"""A run's folder at the start of a job: where the run goes on from, whether this recipe may, and
what is written first.

`peek` looks before anything is decided, `mismatches` says what stands against it,
`choose_checkpoint` verifies, and `start_folder` is the first to write; the last two under the
lease."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import yaml

from rcmae import __version__, checkpoint, config, dist
from rcmae.config import Recipe, Resolved
from rcmae.data.index import ShardIndex


def peek(recipe: Recipe, problems: list[str]) -> checkpoint.Manifest | None:
    """Where the run would go on from, by `checkpoint.resume`; only manifests are read.

    A run that has committed checkpoints of its own goes on from them; a PATH is where a new run
    begins."""
    asked, root = recipe.checkpoint.resume, recipe.run_dir / "checkpoints"
    if asked == "never":
        return None
    found = checkpoint.newest_unverified(root)
    if found is not None or asked == "auto":
        return found
    if asked == "must":
        problems.append(
            f"checkpoint.resume=must, but {root} has no valid checkpoint; use auto to start anew"
        )
        return None
    try:
        return checkpoint.read_manifest(Path(asked))
    except checkpoint.CheckpointError as error:
        problems.append(
            f"checkpoint.resume={asked}: {error}; give auto, never, must or a checkpoint's folder"
        )
    return None


def choose_checkpoint(recipe: Recipe) -> tuple[checkpoint.Manifest | None, list[str]]:
    """The checkpoint that the run goes on from, its bytes verified, and what was wrong with newer
    ones.

    Collective: every rank calls, under the lease.

    Raises:
        CheckpointError: on every rank; there are checkpoints and none is valid, or the one asked
            for is not.
    """
    asked, root = recipe.checkpoint.resume, recipe.run_dir / "checkpoints"
    if asked == "never":
        return None, []
    found, passed_over = checkpoint.newest_together(root)
    if passed_over and dist.rank() == 0:
        print("checkpoints passed over: " + "; ".join(passed_over), file=sys.stderr, flush=True)
    if found is None and passed_over:
        raise checkpoint.CheckpointError(
            f"{root} has checkpoints but none is valid ({'; '.join(passed_over)}); restore one, "
            "or start anew with checkpoint.resume=never (they are moved aside, not deleted)"
        )
    if found is None and asked not in ("auto", "must"):
        return checkpoint.open_verified_together(Path(asked)), []
    return found, passed_over


def own(recipe: Recipe, saved: checkpoint.Manifest) -> bool:
    """Whether a checkpoint is this run's, not one that a new run begins from."""
    return saved.path.parent == recipe.run_dir / "checkpoints"


def mismatches(
    recipe: Recipe,
    saved: checkpoint.Manifest | None,
    index: ShardIndex | None,
    sizes: Resolved | None,
) -> list[str]:
    """What keeps this recipe from going on with what lies in the run's folder, one line a
    problem.
    """
    problems, allowed = [], recipe.checkpoint.allow
    written = recipe.run_dir / "recipe.yaml"
    theirs: dict[str, Any] | None = saved.meta["recipe"] if saved else None
    if theirs is None and recipe.checkpoint.resume != "never" and written.is_file():
        theirs = yaml.safe_load(written.read_text())
    if theirs is not None:
        if saved is not None and theirs["data"].get("canonical_streams") is None:
            # chosen by the first start
            theirs["data"]["canonical_streams"] = saved.meta["sizes"]["canonical_streams"]
        lines = config.differences(recipe.model_dump(mode="json"), theirs)
        where = saved.path if saved else written
        for line in lines:
            key = line.partition(":")[0]
            knowingly = (
                "" if key.startswith("model.") else f", or, knowingly, checkpoint.allow=[{key}]"
            )
            problems.append(
                f"{where} is of another recipe: {line}; use another run.dir, or its "
                f"value{knowingly}"
            )
    if (
        saved is not None
        and "classes" in recipe.objective.student_outputs
        and recipe.model.class_hidden
    ):
        problems += norm_problems(recipe, saved)
    every_micro = recipe.teacher.update == "micro_step" and "batch.per_device" not in allowed
    if saved is not None and sizes is not None and every_micro:
        # the accumulation counts the teacher's updates
        before = saved.meta["sizes"]["accumulation"]
        if sizes.accumulation != before:
            problems.append(
                f"teacher.update=micro_step updates the teacher {before} times a step in "
                f"{saved.path}, "
                f"{sizes.accumulation} times with {sizes.world} ranks x {sizes.per_device} "
                "per_device; choose "
                f"batch.per_device so that ranks x per_device x {before} = {sizes.images_per_step}"
            )
    moved = (
        saved is not None
        and index is not None
        and saved.meta["data_fingerprint"] != index.fingerprint
    )
    if saved is not None and index is not None and moved and "data.shards" not in allowed:
        problems.append(
            f"data.shards are not those of {saved.path}: their names, sizes or samples differ "
            f"(fingerprint {index.fingerprint[:12]}, was "
            f"{saved.meta['data_fingerprint'][:12]}); give the same shards, "
            "or, knowingly, checkpoint.allow=[data.shards]"
        )
    return problems


def norm_problems(recipe: Recipe, saved: checkpoint.Manifest) -> list[str]:
    """What changes a batch norm's batch, the images that all ranks take at once, within a run.

    One line a problem.
    """
    sizes = saved.meta["sizes"]
    before, world = sizes["world"] * sizes["per_device"], dist.world()
    if "batch.per_device" in recipe.checkpoint.allow or config.batch_problems(recipe, world):
        return []
    try:
        now = config.per_device(recipe, world) * world
    except ValueError:  # said already
        return []
    if now == before:
        return []
    fits = (
        f"batch.per_device={before // world}"
        if before % world == 0
        else "a number of ranks that divides that"
    )
    return [
        f"{saved.path} normalised {before} images at once, here they are {now}: the class "
        "head's batch norm would see "
        f"others; use {fits}, or checkpoint.allow=[batch.per_device]"
    ]


def start_folder(recipe: Recipe, saved: checkpoint.Manifest | None, index: ShardIndex) -> None:
    """Write recipe and index; move checkpoints aside that this run does not go on from. Collective;
    with the lease.

    Raises:
        ValueError: on every rank; the folder cannot be written.
    """
    problem = None
    if dist.rank() == 0:
        try:
            write_start(recipe, saved, index)
        except OSError as error:
            problem = unwritable(recipe, error)
    dist.together(dist.from_first(problem))


def write_start(recipe: Recipe, saved: checkpoint.Manifest | None, index: ShardIndex) -> None:
    """What `start_folder` writes, on rank 0."""
    folder, root = recipe.run_dir, recipe.run_dir / "checkpoints"
    # of the job before: a crash of this one ends as nothing
    (folder / "outcome.json").unlink(missing_ok=True)
    if root.exists():
        checkpoint.start_from(root, saved.step if saved and own(recipe, saved) else -1)
    if not index.is_saved:
        index.save(folder / "index")  # the next job need not read all the headers again
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    (folder / "recipe.yaml.new").write_text(text)
    (folder / "recipe.yaml.new").replace(folder / "recipe.yaml")


def unwritable(recipe: Recipe, error: OSError) -> str:
    """What to say where the run's folder refuses a write."""
    return (
        f"run.dir={recipe.run_dir} cannot be written: {error}; make it writable, or use "
        "another run.dir"
    )


def versions() -> dict[str, str]:
    """Of what the run stands on."""
    found = {"rcmae": __version__, "python": sys.version.split()[0]}
    for name in ("torch", "timm", "deepspeed", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
