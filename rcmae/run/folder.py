"""A run's folder: what is written first, and what it stands on."""

from __future__ import annotations

import importlib.metadata
import sys

import yaml

from rcmae import __version__, checkpoint, dist
from rcmae.config import Recipe
from rcmae.data.index import ShardIndex
from rcmae.data.sources import holds_secret
from rcmae.errors import Refused
from rcmae.files import write_aside
from rcmae.tasks.protocol import Saved


def start_folder(recipe: Recipe, saved: Saved | None, index: ShardIndex) -> None:
    """Write recipe and index; move checkpoints aside that this run does not resume from.

    Collective: every rank calls, rank 0 with the lease.

    Raises:
        Refused: on every rank; the folder cannot be written.
    """
    problem = None
    if dist.rank() == 0:
        try:
            write_start(recipe, saved, index)
        except OSError as error:
            problem = unwritable(recipe, error)
    problem = dist.from_first(problem)
    if problem:
        raise Refused(problem)


def write_start(recipe: Recipe, saved: Saved | None, index: ShardIndex) -> None:
    """What `start_folder` writes. Raises OSError."""
    folder = recipe.run_dir
    root = folder / "checkpoints"
    # of the job before: a crash of this one must not look like its end
    (folder / "outcome.json").unlink(missing_ok=True)
    if root.exists():
        checkpoint.start_from(root, saved.step if saved and saved.is_own else -1)
    if not index.is_saved:
        index.save(folder / "index")  # the next job need not read all the headers again
    write_recipe(recipe)


def renew(recipe: Recipe, index: ShardIndex) -> None:
    """Put recipe and index back where somebody has deleted the folder while the run trains. Raises
    OSError.
    """
    if not (recipe.run_dir / "recipe.yaml").exists():
        recipe.run_dir.mkdir(parents=True, exist_ok=True)
        write_recipe(recipe)
        if not index.is_saved:
            index.save(recipe.run_dir / "index")


def write_recipe(recipe: Recipe) -> None:
    """The recipe, as the next job takes it. Raises OSError."""
    tree = recipe.model_dump(mode="json")
    text = yaml.safe_dump(tree, sort_keys=False)
    write_aside(recipe.run_dir / "recipe.yaml", text, private=holds_secret(tree))


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
