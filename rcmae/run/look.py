"""Look: what lies on disks and servers, read by rank 0 alone and told to all.

A start has three phases. `look` gathers facts, `judge` decides on them without touching anything,
`build` makes the parts. Only here are files read before a run is judged: a network file system that
shows two nodes two states of a folder cannot make two ranks decide differently.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rcmae import checkpoint, config, dist
from rcmae.config import Recipe
from rcmae.config.trees import tree_of
from rcmae.data.cache import Cache, node_cache
from rcmae.data.index import ShardIndex
from rcmae.data.loading import pins_memory, shared_bytes, workers_amiss, workers_crowded
from rcmae.data.members.beyond import highest_numbers
from rcmae.data.patterns import Patterns
from rcmae.data.sets import class_lists
from rcmae.data.sources import is_remote, redacted
from rcmae.data.sources import patience as patience_of
from rcmae.errors import Refused
from rcmae.files import patiently
from rcmae.models.precision import Bf16, bf16_of
from rcmae.process import cores, waits
from rcmae.run import startup
from rcmae.run.command import Command
from rcmae.run.folder import versions
from rcmae.run.trackers import registry as trackers
from rcmae.tasks.following import Followed, follow
from rcmae.tasks.protocol import Data, Saved, Task

_PACKED = re.compile(r".*-[0-9a-f]{12}-[0-9a-f]{12}/images-\*\.tar")  # as pack_once names them


@dataclass(frozen=True)
class Facts:
    """What rank 0 found, the same on every rank."""

    recipe: Recipe  # as it is asked for
    saved: Saved | None  # what it resumes or starts from
    written: Mapping[str, Any] | None  # recipe.yaml of a run that has no checkpoint
    data: Data
    engine_config: Mapping[str, Any]  # DeepSpeed's JSON
    task: Any  # what the task read
    problems: tuple[str, ...]  # what could not be read
    notes: tuple[str, ...] = ()  # what was taken or chosen


class View(NamedTuple):
    """What only one rank knows."""

    command: Command
    versions: Mapping[str, str]
    host: str
    device: str
    bf16: Bf16  # what its device does with it
    local_world: int  # ranks on its node
    shards: tuple[
        str, ...
    ]  # shards that its node sees otherwise than rank 0; one rank a node looks
    cache: str | None  # why its node's cache for remote shards cannot be used
    workers: str | None = None  # why its node cannot have its ranks' data workers
    crowded: str | None = None  # what its workers do to its cores


@dataclass(frozen=True)
class Sight:
    """Everything that `judge` decides on."""

    facts: Facts
    views: tuple[View, ...]  # of each rank

    @property
    def world(self) -> int:
        """How many ranks train."""
        return len(self.views)


class Met(NamedTuple):
    """What ranks know once they have met."""

    recipe: Recipe | None  # rank 0's; None on the others
    task: str  # its name
    run_dir: Path


def meet(command: Command, task: str | None) -> Met:
    """Join the other ranks and learn what is trained. Collective: every rank calls.

    Rank 0 alone reads the recipe. The others learn its time-out, or that it is refused.

    Args:
        command: this rank's.
        task: of the command that was started; None: any.

    Raises:
        Refused: on every rank; the recipe is wrong, or the launcher's variables are incomplete.
        Unreachable: on this rank; it cannot reach the others.
    """
    launched = dist.launched()
    recipe = None
    problem = None
    if launched.rank == 0:
        try:
            recipe = config.load(command.recipe, command.overrides, task=task)
        except Refused as error:
            if launched.world == 1:
                raise
            problem = str(error)
    startup.mark("recipe")
    required = launched.world > 1 or (recipe is not None and recipe.engine.name != "local")
    dist.start(required=required, timeout_s=recipe.engine.timeout_s if recipe else None)
    told = (recipe.task.name, recipe.run_dir) if recipe else None
    with waits.waiting("rank 0, which reads the recipe", breaks=False, saved=True):
        problem, told = dist.from_first((problem, told))
    if problem:
        raise Refused(problem)
    name, run_dir = told
    return Met(recipe, name, run_dir)


def look(
    recipe: Recipe | None, command: Command | None, task: Task, *, verified: bool = False
) -> Sight:
    """The facts and each rank's view of them. Collective: every rank calls.

    Args:
        recipe: rank 0's; ignored on other ranks.
        command: this rank's.
        verified: read every byte of the newest checkpoint, not its manifest alone.
    """
    facts = None
    if dist.rank() == 0:
        assert recipe is not None
        with waits.waiting(f"the index of data.shards={shown(recipe)}", saved=True):
            facts = facts_of(recipe, task, verified=verified)
    with waits.waiting("rank 0, which looks at shards and checkpoints", breaks=False, saved=True):
        facts = dist.from_first(facts)
    startup.mark("facts")
    with waits.waiting("this node's look at the shards", saved=True):
        view = view_of(facts, command or Command(""))
    with waits.waiting("the other ranks' look at the shards", breaks=False, saved=True):
        return Sight(facts, tuple(dist.gather(view)))


def shown(recipe: Recipe) -> str:
    """The training's shards for a message: short, and without secrets."""
    text = str(recipe.data.shards)
    return redacted(text if len(text) < 120 else text[:120] + "...")


def facts_of(recipe: Recipe, task: Task, *, verified: bool = False) -> Facts:
    """Read what a recipe names. One process."""
    problems = folder_problems(recipe.run_dir)

    def attempt(read: Any, *arguments: Any, key: str = "") -> Any:
        """What a reader gives; None and a problem, of this key, where it refuses."""
        try:
            return read(*arguments)
        except (Refused, checkpoint.CheckpointError) as error:
            problems.append(f"{key}: {error}" if key else str(error))
            return None

    saved = attempt(saved_of, recipe, verified)
    packed = attempt(with_images, recipe, key="data.images")
    recipe, taken = packed or (recipe, ())
    members = attempt(task.members, recipe)
    needs = () if members is None else (*members.kinds, *members.optional)
    train = None
    if packed is not None:
        train = attempt(open_index, recipe, recipe.data.shards, needs, key="data.shards")
    written = written_recipe(recipe) if saved is None else None
    followed = attempt(with_followed, recipe, saved, written, train)
    recipe, notes = followed or (recipe, ())
    notes = (*taken, *notes)
    asked = task.evaluation_sets(recipe)
    sets = [attempt(open_index, recipe, each.shards, each.needs, key=each.key) for each in asked]
    # all of them or none: a set stands for the place that it has in the task's list
    readable = tuple(each for each in sets if each is not None)
    data = with_classes(recipe, train, readable if len(readable) == len(sets) else ())
    mapped = ("map" in needs, *("map" in each.needs for each in asked))
    data = with_numbers(data, mapped)
    problems += [told for told in map(trackers.missing, recipe.log.trackers) if told]
    config = attempt(engine_config, recipe)
    found = attempt(task.look, recipe, saved)
    return Facts(recipe, saved, written, data, config or {}, found, tuple(problems), notes)


def folder_problems(run_dir: Path) -> list[str]:
    """Why a run's folder cannot be made or written, if that can be seen."""
    there = next(each for each in (run_dir, *run_dir.absolute().parents) if each.exists())
    if not there.is_dir():
        return [f"run.dir={run_dir}: {there} is a file; choose another folder"]
    if not os.access(there, os.W_OK | os.X_OK):
        return [f"run.dir={run_dir}: {there} cannot be written; choose another folder"]
    return []


def with_images(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with the shards of its folder of images, which are made where they are not there;
    and what was done. One process.

    Raises:
        Refused: they cannot be made.
    """
    data = recipe.data
    if data.images is None:
        note_use(data.shards)
        return recipe, ()
    from rcmae.data.packing.once import pack_once  # its parts cost a second: only where it is used

    with waits.waiting(f"data.images={data.images}, packed into shards", breaks=False, saved=True):
        packed = pack_once(
            data.images, data.cache_dir, side=max(recipe.model.image_hw), world=dist.world()
        )
    values = {"data.shards": packed.shards, "data.images": None}
    return config.with_values(recipe, values), (packed.note,)


def note_use(shards: Patterns) -> None:
    """Note that shards which were packed from a folder of images (`pack_once`) are in use."""
    if isinstance(shards, str) and _PACKED.fullmatch(shards):
        with contextlib.suppress(OSError):  # another user's
            os.utime(Path(shards).parent)


def with_followed(
    recipe: Recipe,
    saved: Saved | None,
    written: Mapping[str, Any] | None,
    train: ShardIndex | None,
) -> Followed:
    """The recipe with what it leaves open (classify.follow). Raises Refused."""
    before = written
    if saved is not None and saved.is_own:
        before = saved.meta["recipe"]
    samples = recipe.data.epoch_samples or (None if train is None else len(train))
    return follow(recipe, before=before, samples=samples, world=dist.world())


def with_classes(recipe: Recipe, train: ShardIndex | None, sets: tuple[ShardIndex, ...]) -> Data:
    """Samples with the names of classes that lie beside them."""
    patience = patience_of(recipe)
    beside = () if train is None else class_lists(train, patience)
    return Data(train, sets, beside, tuple(class_lists(each, patience) for each in sets))


def with_numbers(data: Data, mapped: Sequence[bool]) -> Data:
    """Samples with the largest numbers of a few of their maps.

    Args:
        data: the samples.
        mapped: whether maps are read, of the training's and then of each set.
    """
    found = []
    for index, is_read in zip((data.train, *data.sets), mapped, strict=False):
        found.append(highest_numbers(index) if is_read and index is not None else ())
    return replace(data, numbers=found[0], set_numbers=tuple(found[1:]))


def saved_of(recipe: Recipe, verified: bool = False) -> Saved | None:
    """What the run resumes or starts from, by `checkpoint.resume`; only manifests are read.

    A run that has committed checkpoints of its own resumes from them; a PATH is where a new run
    begins.

    Raises:
        Refused: there is nothing of what was asked for.
    """
    asked = recipe.checkpoint.resume
    root = recipe.run_dir / "checkpoints"
    if asked == "never":
        return None
    found = checkpoint.newest(root)[0] if verified else checkpoint.newest_unverified(root)
    if found is not None:
        return saved_from(recipe, found)
    if asked == "auto":
        return None
    if asked == "must":
        raise Refused(
            f"checkpoint.resume=must, but {root} has no valid checkpoint; use auto to start from "
            "scratch"
        )
    try:
        return saved_from(recipe, checkpoint.read_manifest(Path(asked)))
    except checkpoint.CheckpointError as error:
        raise Refused(f"checkpoint.resume={asked}: {_no_checkpoint(Path(asked), error)}") from error


def _no_checkpoint(path: Path, error: Exception) -> str:
    """Why a path is no checkpoint to start from, and what is."""
    newest = checkpoint.newest_unverified(path / "checkpoints")
    if newest is not None:
        return f"this is a run; give the checkpoint of it that you mean, such as {newest.path}"
    why = str(error)
    if not path.is_dir():
        why = "this is a file" if path.exists() else "there is no such folder"
    elif (path / "checkpoints").is_dir():
        why = "this run has no complete checkpoint"
    return f"{why}; give auto, never, must or a checkpoint's folder"


def saved_from(recipe: Recipe, manifest: checkpoint.Manifest) -> Saved:
    """The facts of a manifest: everything but its tensors' places.

    Raises:
        CheckpointError: somebody edited it, and left out what a resume goes by.
    """
    sizes = manifest.meta["sizes"]
    needed = ("world", "per_device", "accumulation", "canonical_streams")
    missing = [name for name in needed if type(sizes.get(name)) is not int]
    if missing:
        raise checkpoint.CheckpointError(
            f"{manifest.path}/manifest.json: meta has no sizes.{'/'.join(missing)}; move the "
            "folder away, and the one before it is used"
        )
    is_own = manifest.path.parent == recipe.run_dir / "checkpoints"
    return Saved(manifest.path, manifest.step, manifest.images, manifest.meta, is_own)


def written_recipe(recipe: Recipe) -> Mapping[str, Any] | None:
    """The recipe.yaml of a run that was started and has committed nothing yet."""
    path = recipe.run_dir / "recipe.yaml"
    if recipe.checkpoint.resume == "never" or not path.is_file():
        return None
    try:
        tree = tree_of(patiently(path.read_text))
    except (Refused, UnicodeDecodeError, OSError):
        return None  # nothing was trained by it
    return tree if isinstance(tree, dict) else None


def open_index(recipe: Recipe, shards: Patterns, needs: Sequence[str] = ()) -> ShardIndex:
    """The index of shards; where there is none, the headers of all shards are read.

    Args:
        recipe: says where an index may lie.
        shards: their patterns.
        needs: kinds of members (tars.KINDS) whose places the index has to know.

    Raises:
        Refused: naming what cannot be used.
    """
    given = recipe.data.index
    patience = patience_of(recipe)
    folders = [str(recipe.run_dir / "index")]
    if given:
        if not ShardIndex.lies_in(given, patience):
            raise Refused(
                f"data.index={given}: no index is there; make it: rcmae shards index SHARDS --out "
                f"{given}"
            )
        folders.append(given)
    jobs = min(8, cores.usable())
    read: list[object] = []  # shards whose headers had to be read

    def how_far() -> str:
        """What is waited for, with how far it is."""
        so_far = f": headers of {len(read):,} shards read" if read else ""
        return f"the index of data.shards={shown(recipe)}{so_far}"

    with waits.waiting(how_far, saved=True):
        return ShardIndex.open(
            shards, cache=folders, jobs=jobs, patience=patience, needs=needs, on_scan=read.append
        )


def engine_config(recipe: Recipe) -> dict[str, Any]:
    """DeepSpeed's JSON, where the recipe has one. Raises Refused."""
    if recipe.engine.name != "deepspeed":
        return {}
    from rcmae.engines.deepspeed_config import read_config  # costs seconds: only where it is used

    return read_config(recipe.engine.config or "")


def view_of(facts: Facts, command: Command) -> View:
    """What this rank sees."""
    device = dist.device()
    cuda = device.type == "cuda"
    launched = dist.launched()
    looks = launched.local_rank == 0  # one rank a node
    return View(
        command=command,
        versions=versions(),
        host=platform.node(),
        device=torch.cuda.get_device_name(device) if cuda else "cpu",
        bf16=bf16_of(device),
        local_world=dist.ranks_of_node(),
        shards=tuple(shards_amiss(facts.data)) if looks else (),
        cache=cache_amiss(facts) if looks else None,
        workers=processes_amiss(facts.recipe) if looks else None,
        crowded=workers_crowded(
            facts.recipe.data.workers,
            cores.of_a_rank(dist.ranks_of_node(), bound=launched.who == "srun"),
        ),
    )


def shards_amiss(data: Data) -> list[str]:
    """Shards that this node does not see, or with another size than the index says."""
    found = []
    indexes = [index for index in (data.train, *data.sets) if index is not None]
    for index in indexes:
        for shard in index.shards:
            if is_remote(shard.path) or shard.path in index.short:
                continue
            try:
                size = os.stat(shard.path).st_size
            except OSError as error:
                found.append(f"{shard.path}: {error.strerror}")
                continue
            if size != shard.size:
                found.append(f"{shard.path}: {size:,} bytes, {shard.size:,} on rank 0")
    return found


def cache_of(recipe: Recipe, data: Data) -> Cache | None:
    """This node's cache for remote shards; None where all lie here. Raises Refused."""
    indexes = [index for index in (data.train, *data.sets) if index is not None]
    options = recipe.data
    return node_cache(indexes, options.cache_dir, options.cache_gb, patience_of(recipe))


def processes_amiss(recipe: Recipe) -> str | None:
    """Why this node cannot have the data workers of its ranks, if it cannot."""
    each = shared_bytes(recipe, dist.world(), pins=pins_memory())
    return workers_amiss(recipe.data.workers, dist.ranks_of_node(), each)


def cache_amiss(facts: Facts) -> str | None:
    """Why this node cannot keep copies of remote shards, if it cannot."""
    try:
        cache_of(facts.recipe, facts.data)
    except Refused as error:
        return str(error)
    return None
