"""A run that is analysed: its batches, masks and networks, and the figures of each checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from rcmae import checkpoint, config
from rcmae.checkpoint import Manifest
from rcmae.config import Recipe
from rcmae.config.trees import tree_of
from rcmae.data.batch import Batch
from rcmae.data.cache import node_cache
from rcmae.data.index import ShardIndex
from rcmae.data.masking import Mask
from rcmae.data.plan import Plan
from rcmae.data.sources import patience
from rcmae.data.stream import Readers, Share, Stream
from rcmae.data.transforms import Normalise
from rcmae.data.views import Views, train_transform
from rcmae.errors import Refused
from rcmae.evaluation.teacher_analysis.gradients import (
    KINDS,
    OTHER,
    REMASKED,
    SAME,
    Networks,
    Step,
    by_layer,
    cosine,
    features,
    gradients,
    layers,
    taken_back,
)
from rcmae.evaluation.teacher_analysis.linear import linear_of
from rcmae.evaluation.teacher_analysis.statistics import rank_correlation, shares_of
from rcmae.models.build import new_network, student_sizes
from rcmae.models.vit import MaskedAutoencoder
from rcmae.objectives import make_objective
from rcmae.objectives.masks import make_mask
from rcmae.objectives.terms import Sum
from rcmae.weights.layouts import Which
from rcmae.weights.reading import read_network

OTHER_MASK = 2  # which draw of a mask: the run itself uses 0 and, for a teacher with its own, 1
OTHERS_EACH = 3  # other images that an image is compared with


@dataclass(frozen=True)
class Sizes:
    """How much is looked at."""

    images: int = 128  # of a batch
    pairs: int = 48  # images whose gradient is stepped along
    step: float = 1e-3  # length of that step over that of the weights


@dataclass(frozen=True)
class AnalysedRun:
    """A run to be looked at: its recipe on one process, its batches and masks, its checkpoints
    in order.
    """

    recipe: Recipe
    objective: Sum  # reconstruction and consistency
    stream: Stream
    mask: Mask
    checkpoints: list[Manifest]
    images_per_step: int

    def batch(self, step: int, images: int) -> Batch:
        """The first images of a step of the run, normalised, as its student sees them."""
        data = self.recipe.data
        micro = next(self.stream.steps(step))[0]
        found = Normalise(data.mean, data.std)(micro).part(slice(images))
        return replace(found, images=found.images.double(), teacher_ids=None)

    def remasked(self, batch: Batch) -> Batch:
        """The same images and crops with masks that the run has not used for them."""
        seed = self.recipe.data.seed
        ids = [self.mask.ids(seed, position, OTHER_MASK) for position in batch.positions.tolist()]
        return replace(batch, ids_shuffle=torch.from_numpy(np.stack(ids)))


def open_run(
    folder: Path, images: int, shards: str | None = None, *, allow_pipe: bool = False
) -> AnalysedRun:
    """A run by its folder. Nothing is written.

    Args:
        folder: run.dir.
        images: at most so many of a step are read at once.
        shards: where they lie now, if they have moved.
        allow_pipe: whether commands in the run's recipe may run.

    Raises:
        Refused: it is not a run with a consistency and a checkpoint, or its shards are not there.
        CheckpointError: a checkpoint is damaged.
    """
    recipe = _recipe_of(folder, images, shards, allow_pipe)
    folders = checkpoint.step_folders(folder / "checkpoints")
    manifests = [checkpoint.open_verified(path) for path in folders]
    if not manifests:
        raise Refused(f"{folder} has no checkpoint yet; continue the training")

    data = recipe.data
    index = ShardIndex.open(data.shards, cache=folder / "index", patience=patience(recipe))
    newest = manifests[-1]
    if index.fingerprint != newest.meta["data_fingerprint"]:
        raise Refused(
            f"data.shards are not those of {newest.path}: their names, sizes or samples differ; "
            "give the same with --shards"
        )
    plan = Plan(
        index.counts,
        seed=data.seed,
        images=recipe.batch.images // data.repeats,
        streams=newest.meta["sizes"]["canonical_streams"],
        window=data.shuffle_window,
        epoch_samples=data.epoch_samples,
        weights=index.weights,
    )
    samples = plan.samples_per_epoch * data.repeats
    sizes = config.resolve(recipe, world=1, samples_per_epoch=samples)
    with torch.device("meta"):
        mask = make_mask(recipe, new_network(recipe, norm="torch").grid)
    stream = Stream(
        index=index,
        plan=plan,
        views=Views(train_transform(recipe), mask, data.seed, data.repeats),
        share=Share(sizes.per_device),
        readers=Readers(cache=node_cache([index], data.cache_dir, data.cache_gb, patience(recipe))),
    )
    made = make_objective(recipe, sizes)
    if not isinstance(made, Sum):
        raise Refused(f"objective.name={recipe.objective.name} is not a sum of terms")
    objective = Sum({name: made.terms[name] for name in ("reconstruction", "consistency")})
    return AnalysedRun(recipe, objective, stream, mask, manifests, sizes.images_per_step)


def _recipe_of(folder: Path, images: int, shards: str | None, allow_pipe: bool) -> Recipe:
    """The run's recipe, for micro-batches of so many images. Raises Refused."""
    try:
        recipe = config.stored(tree_of((folder / "recipe.yaml").read_text()))
    except (OSError, Refused, UnicodeDecodeError, pydantic.ValidationError) as error:
        raise Refused(f"{folder} is not a run's folder: {error}") from error
    if not (allow_pipe or shards):
        config.without_pipes(recipe.data.model_dump(), str(folder / "recipe.yaml"))
    if "pixels" not in recipe.objective.teacher_outputs or recipe.decoder == "bootmae":
        raise Refused(
            f"{folder} has no consistency term on a teacher's pixels to analyse; train "
            "objective.name=rcmae, or another with objective.terms={consistency: 1}"
        )
    batch = recipe.batch.model_copy(update={"per_device": images})
    data = recipe.data.model_copy(update={"shards": shards or recipe.data.shards})
    return recipe.model_copy(update={"batch": batch, "data": data})


def networks_at(manifest: Manifest, recipe: Recipe) -> Networks:
    """Student and teacher of a checkpoint."""
    return Networks(
        _network_at(manifest, recipe, "student"), _network_at(manifest, recipe, "teacher")
    )


def _network_at(manifest: Manifest, recipe: Recipe, which: Which) -> MaskedAutoencoder:
    model = new_network(recipe, norm="torch")
    assert isinstance(model, MaskedAutoencoder)
    model.keep(("pixels",))
    weights = read_network(manifest.path, which).weights
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model.double().eval()


# ------------------------------------------------------------------------------------- its figures


def look_at(run: AnalysedRun, manifest: Manifest, sizes: Sizes) -> dict[str, Any]:
    """One checkpoint's figures.

    Args:
        run: that it is of.
        manifest: which.
        sizes: how much of it.
    """
    networks = networks_at(manifest, run.recipe)
    step = manifest.images // run.images_per_step
    last = run.batch(step - 1, sizes.images)
    coming = run.batch(step, sizes.images)
    weight = run.objective.weights["consistency"]
    found = gradients(run.objective, networks, coming)
    rows = by_layer(found, weight, layers(networks.student))

    at = parameters_to_vector(networks.student.parameters()).detach()
    gone = at - parameters_to_vector(networks.teacher.parameters()).detach()
    previous = gradients(run.objective, networks, last)["reconstruction"]
    own = {}
    for kind, batch in zip(KINDS, (last, run.remasked(last), coming), strict=True):
        pull = gradients(run.objective, networks, batch)["consistency"]
        own[kind] = {
            "with_way_gone": cosine(pull, gone),
            "with_last_gradient": cosine(pull, previous),
        }

    pairs = list(conditional(run, networks, (last, coming), sizes))
    moved = [row for row in pairs if row["kind"] != SAME]
    apart = [row for row in pairs if row["kind"] == OTHER]
    return {
        "step": manifest.step,
        "layers": rows,
        "own_teacher": own,
        "taken_back": shares_of(pairs, KINDS),
        "distance": float(gone.norm() / at.norm()),
        "rank_correlation": {
            "other masks and images": rank_correlation(moved),
            "other images": rank_correlation(apart),
        },
        "pairs": pairs,
    }


def conditional(
    run: AnalysedRun, networks: Networks, batches: tuple[Batch, Batch], sizes: Sizes
) -> Iterator[dict[str, Any]]:
    """Image by image: how alike another input's features are, and what share of this one's step it
    takes back.

    Shares are in units of the one at the same image and mask.

    Args:
        run: that it is of.
        networks: of a checkpoint; their weights are changed.
        batches: the last one, whose images are stepped along, and the coming one.
        sizes: how many.
    """
    reconstruction = Sum({"reconstruction": run.objective.terms["reconstruction"]})
    consistency = Sum({"consistency": run.objective.terms["consistency"]})
    last, coming = batches
    remasked = run.remasked(last)
    at = parameters_to_vector(networks.student.parameters()).detach().clone()
    of_last, of_coming, of_remasked = _centred(networks.student, last, coming, remasked)
    for index in range(min(sizes.pairs, len(last), len(coming))):
        one = last.part(slice(index, index + 1))
        vector_to_parameters(at.clone(), networks.student.parameters())
        gradient = gradients(reconstruction, networks, one)["reconstruction"]
        step = Step(at, gradient, sizes.step * float(at.norm() / gradient.norm()))
        unit, against = taken_back(consistency, networks, step, one)
        yield {"kind": SAME, "similarity": 1.0, "share": 1.0, "against": against}

        inputs = [(REMASKED, of_remasked, remasked, index)]
        for more in range(OTHERS_EACH):
            inputs.append((OTHER, of_coming, coming, (index + more) % len(coming)))
        for kind, vectors, batch, row in inputs:
            other = batch.part(slice(row, row + 1))
            share, against = taken_back(consistency, networks, step, other)
            alike = cosine(of_last[index], vectors[row])
            yield {"kind": kind, "similarity": alike, "share": share / unit, "against": against}


def _centred(student: MaskedAutoencoder, *batches: Batch) -> list[Tensor]:
    """The features of each batch, less what all images share: that says nothing of two of them."""
    vectors = [features(student, batch) for batch in batches]
    mean = torch.cat(vectors).mean(0)
    return [each - mean for each in vectors]


def document(
    run: AnalysedRun, name: str, sizes: Sizes, found: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The figures of all checkpoints, and the linear model's on the run's first images.

    Args:
        run: that they are of.
        name: what it is called.
        sizes: how much was looked at.
        found: of `look_at`, in order.
    """
    first = run.batch(0, sizes.images)
    patch = student_sizes(run.recipe.model).patch_size
    checkpoints = []
    for figures in found:
        checkpoints.append({key: value for key, value in figures.items() if key != "pairs"})
    return {
        "tool": "analyze_teacher",
        "run": name,
        "images": len(first),
        "size": sizes.step,
        "linear_model": linear_of(first, run.remasked(first), patch),
        "pairs": found[-1]["pairs"],
        "checkpoints": checkpoints,
    }
