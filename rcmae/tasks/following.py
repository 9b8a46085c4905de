"""What a recipe leaves open and takes from its weights and its data (`classify.follow`).

A generic recipe of fine-tuning or probing names no network: that, the size of images and their
statistics are those of `classify.init`; batch, engine and evaluations follow from the set and the
ranks. Whatever the recipe or the command line gives goes over it, and a run that resumes keeps what
its first start took.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rcmae import config
from rcmae.config import ModelOptions, Recipe
from rcmae.errors import Refused
from rcmae.models.sizes import ARCHITECTURES
from rcmae.tasks import start
from rcmae.weights.names import published_names
from rcmae.weights.reading import NetworkWeights
from rcmae.weights.shapes import sizes_of

SECTIONS = ("model", "data", "batch", "evaluate")  # with keys that follow
STEPS_PER_EPOCH = {"finetune": 8, "probe": 4}  # at least, where the set allows it
LARGEST_BATCH = {"finetune": 1024, "probe": 16384}  # images; of the published settings
EVALUATIONS = 10  # of a training
# keys that a task's network has its own of: weights of others are fitted to them
FITTED = {"detect": ("patch_size", "class_tokens", "registers")}
PREFIX = {"class_tokens": 1, "registers": 0}  # tokens before the patches, as most networks have


class Followed(NamedTuple):
    """A recipe with nothing left open."""

    recipe: Recipe
    notes: tuple[str, ...]  # what was taken, for people


def follow(
    recipe: Recipe,
    *,
    before: Mapping[str, Any] | None,
    samples: int | None,
    world: int,
) -> Followed:
    """The recipe with what it leaves open. One process.

    Args:
        recipe: as it was loaded: what is not set in it is open.
        before: the recipe of the run that lies in run.dir, which it resumes.
        samples: of an epoch; None: not known.
        world: ranks that train.

    Raises:
        Refused: there are no weights to follow, or they cannot be read.
    """
    if not recipe.classify.follow:
        return Followed(recipe, ())
    if before is not None:
        recipe = config.with_values(recipe, kept(recipe, config.stored(before)))
        return Followed(config.with_values(recipe, engine_values(recipe, world)), ())
    init, where = recipe.classify.init, f"classify.init={recipe.classify.init}"
    if init is None:
        raise Refused(
            "classify.init: this recipe takes its network from weights; give a run, a checkpoint "
            "or a file of any family"
        )
    path = str(start.newest_of(Path(init)))
    source = start.look_at("classify.init", path, recipe.classify.network, first="teacher")
    try:
        values = network_values(recipe, source)
    except Refused as error:
        raise Refused(f"{where}: {error}") from error
    if samples is not None:
        values |= size_values(recipe, samples, world)
    told = ", ".join(f"{key}={_shown(value)}" for key, value in values.items())
    return Followed(config.with_values(recipe, values), (f"follows from {where}: {told}",))


def kept(recipe: Recipe, before: Recipe) -> dict[str, Any]:
    """What the run has, of keys that the recipe leaves open."""
    values = {}
    for section in SECTIONS:
        options, theirs = getattr(recipe, section), getattr(before, section)
        for key in type(options).model_fields.keys() - options.model_fields_set:
            values[f"{section}.{key}"] = getattr(theirs, key)
    return values


def sizes_told(source: NetworkWeights, task: str) -> str:
    """The keys with which a recipe has the network of these weights, as the end of a message; of
    those that are no encoder's what they are, where that is known.
    """
    for other, begin in (("detect", "roi_heads."), ("segment", "decode_head.")):
        if other != task and any(name.startswith(begin) for name in source.weights):
            return f"; these are weights of rcmae {other}: give those of an encoder"
    try:
        sizes = encoder_values(source)
    except Refused:
        return ""
    name = ARCHITECTURES[sizes["name"]]
    left = FITTED.get(task, ())
    known = {key: value for key, value in sizes.items() if value is not None and key not in left}
    differing = [key for key in known if key != "name" and name.get(key) != known[key]]
    shown = " ".join(f"model.{key}={_shown(known[key])}" for key in ["name", *differing])
    if task == "segment" and known.get("class_tokens"):  # these biases know one class token alone
        shown += " segment.relative_positions=false"
    return f"; the network of these weights is {shown}"


def encoder_values(source: NetworkWeights) -> dict[str, Any]:
    """Keys of `model` as an encoder's weights have them; None where they do not tell.

    Raises:
        Refused: they are those of no encoder.
    """
    from rcmae.weights.encoder import HEADS, heads_of  # as in network_values

    shapes = {name: tuple(value.shape) for name, value in published_names(source.weights).items()}
    sizes = sizes_of(shapes)
    found: dict[str, Any] = {"name": nearest(sizes), "patch_size": sizes["patch_size"]}
    found |= {"embed_dim": sizes["embed_dim"], "depth": sizes["depth"]}
    found["num_heads"] = heads_of(source) or HEADS.get(sizes["embed_dim"])
    for key, usual in PREFIX.items():
        found[key] = sizes[key] if sizes[key] > usual else None
    return found


def network_values(recipe: Recipe, source: NetworkWeights) -> dict[str, Any]:
    """Keys of the network and its images that are open, as the weights have them.

    Raises:
        Refused: they are those of no encoder.
    """
    # it imports timm, which costs seconds: for who classifies
    from rcmae.weights.encoder import statistics_of

    weights = published_names(source.weights)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    sizes = sizes_of(shapes)
    patch = sizes["patch_size"]
    side = round(sizes["num_patches"] ** 0.5)
    rows, columns = source.grid or (side, side)
    height, width = rows * patch, columns * patch
    given = recipe.model.model_fields_set
    found: dict[str, Any] = {
        "image_size": height if height == width else (height, width),
        "in_channels": sizes["in_channels"],
    }
    if "name" not in given:
        found |= encoder_values(source)
    values = {f"model.{key}": found[key] for key in _open(found, given)}
    mean, std = statistics_of(source, sizes["in_channels"])
    statistics = {"mean": mean, "std": std}
    of_data = recipe.data.model_fields_set
    return values | {f"data.{key}": statistics[key] for key in _open(statistics, of_data)}


def nearest(sizes: Mapping[str, Any]) -> str:
    """The architecture of these sizes, or of their width at least."""
    told = ("patch_size", "embed_dim", "depth")
    for count in (3, 2):
        for name, named in ARCHITECTURES.items():
            if all(named[key] == sizes[key] for key in told[:count]):
                return name
    return str(ModelOptions.model_fields["name"].default)


def size_values(recipe: Recipe, samples: int, world: int) -> dict[str, Any]:
    """Keys of the batch, the engine and the evaluations that are open."""
    values: dict[str, Any] = {}
    images = recipe.batch.images
    if "images" not in recipe.batch.model_fields_set:
        images = batch_for(recipe.task.name, samples, world * recipe.data.repeats)
        values["batch.images"] = images
    values |= engine_values(recipe, world)
    evaluate = recipe.evaluate
    if evaluate.test_shards and "every_steps" not in evaluate.model_fields_set:
        per_epoch = max(1, samples * recipe.data.repeats // images)
        total = recipe.schedule.steps or round((recipe.schedule.epochs or 0) * per_epoch)
        values["evaluate.every_steps"] = max(1, total // EVALUATIONS)
    return values


def engine_values(recipe: Recipe, world: int) -> dict[str, Any]:
    """The engine, where it is open and there are several ranks."""
    is_open = "name" not in recipe.engine.model_fields_set
    return {"engine.name": "fsdp2"} if is_open and world > 1 else {}


def batch_for(task: str, samples: int, unit: int) -> int:
    """Images of a step: a power of two of which an epoch has some, or a multiple of two for each of
    `unit` ranks.
    """
    most = min(LARGEST_BATCH[task], samples // STEPS_PER_EPOCH[task])
    images = 1 << max(1, most).bit_length() - 1
    pairs = 2 * unit  # images are mixed in pairs of a rank
    return max(images // pairs, 1) * pairs if images % pairs else images


def _open(found: Mapping[str, Any], given: Collection[str]) -> list[str]:
    return [key for key, value in found.items() if key not in given and value is not None]


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(f'{each:g}' for each in value)}]"
    return f"{value:g}" if isinstance(value, float) and not math.isnan(value) else str(value)
