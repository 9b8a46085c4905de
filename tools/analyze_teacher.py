#!/usr/bin/env python3
"""What the teacher does to a run's gradients: RC-MAE's analysis (Lee et al., ICLR 2023, section 3)
of a run of yours.

    python tools/analyze_teacher.py RUN [--images 128] [--pairs 48] [--out FOLDER] [--json]

Writes FOLDER/teacher.png and FOLDER/teacher.json (by default in RUN/pictures, where `visualize.py
page` finds it). At each checkpoint that the run has kept (checkpoint.keep_every), in float64, the
total and each layer's:

1. the gradient of the reconstruction and of the consistency at the batch that comes next: cosine
    and ratio of norms;
2. what the run's own teacher pulls at: the cosine of the consistency's gradient with the way that
   the student has gone from the teacher, and with the reconstruction's gradient at the last batch;
   at that batch, at it under other masks, at other images;
3. the conditional momentum: from student = teacher one small step is taken along one image's
   gradient. What share of it would the consistency take back at the same image and mask, under
   another mask, at other images? Against how alike the encoder's features are.

And 4., the paper's linear model: one matrix on masked images, where the consistency's gradient is
by algebra the sum of all earlier gradients, each times the momentum so often, projected on the
input: at an input b, of the gradient left by an input a, it takes back the share rate x momentum x
    |b|^2 x cos(a, b)^2.

What it says of rcmae_cifar10_demo (tools/results/teacher_cifar10.json): the paper's claim is seen
for single images. At step 3,120 a step is taken back under another mask 0.63 as much as at the same
input, at another image 0.34, and more where features are alike (rank correlation 0.44; among other
images alone 0.51 at step 100 and 0.18 at the end). It is not seen in the run's own teacher at whole
batches: it pulls as much at other images as at those just learnt from, at steps 100, 300 and 3,120
    against the last reconstruction's gradient, at 600, 1,000 and 2,000 with it.

Not done: the optimizer's scaling; steps are those of plain gradient descent, as in the paper's
argument. Exit status: 0 written; 2 the run has nothing to analyse, or the input is wrong; 1
anything else."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pydantic
import torch
import yaml
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from rcmae import checkpoint, config, train
from rcmae.checkpoint import CheckpointError, Manifest
from rcmae.config import Recipe
from rcmae.data.batch import Batch
from rcmae.data.masking import Mask
from rcmae.data.stream import Stream
from rcmae.data.transforms import Normalise
from rcmae.errors import Refused
from rcmae.models.vit import MaskedAutoencoder, patchify
from rcmae.objectives.terms import Sum
from rcmae.parts import has_regressors, make_objective, new_network, student_sizes, train_transform
from rcmae.weights.reading import read_network

SAME, REMASKED, OTHER = "same image and mask", "same image, other mask", "other image"
KINDS = (SAME, REMASKED, OTHER)
OTHER_MASK = 2  # which draw of a mask: the run itself uses 0 and, for a teacher with its own, 1
OTHERS_EACH = 3  # other images that an image is compared with

# ---------------------------------------------------------------------------------------- gradients


def gradients(
    objective: Sum, student: MaskedAutoencoder, teacher: MaskedAutoencoder, batch: Batch
) -> dict[str, Tensor]:
    """The gradient of each term's mean over a batch, unweighted, as one vector in the order of
    the parameters.
    """
    sums, counts = objective(student, teacher, batch, 1.0), objective.counts(batch)
    params = list(student.parameters())
    return {
        term: torch.cat(
            [
                part.flatten()
                for part in torch.autograd.grad(
                    total / counts[term], params, retain_graph=True, materialize_grads=True
                )
            ]
        )
        for term, total in sums.items()
    }


def layer_of(name: str) -> str:
    """The stretch of the network that a parameter belongs to."""
    part, _, rest = name.partition(".")
    if part in ("blocks", "decoder_blocks"):
        return f"{'decoder ' if part.startswith('decoder') else ''}block {rest.partition('.')[0]}"
    if part in ("norm", "decoder_embed", "mask_token"):
        return "bridge"
    return "head" if part.startswith("decoder_") else "embedding"


def layers(model: MaskedAutoencoder) -> dict[str, Tensor]:
    """Layer -> which elements of the vector of all parameters are its.

    In the order of the forward pass.
    """
    sizes = [(layer_of(name), param.numel()) for name, param in model.named_parameters()]
    blocks = list(dict.fromkeys(name for name, _ in sizes if "block" in name))
    encoder = [name for name in blocks if name.startswith("block")]
    order = [
        "embedding",
        *encoder,
        "bridge",
        *[name for name in blocks if name not in encoder],
        "head",
    ]
    of = torch.cat([torch.full((count,), order.index(name)) for name, count in sizes])
    return {name: of == index for index, name in enumerate(order)}


def cosine(one: Tensor, other: Tensor) -> float:
    """Of two vectors; 0 where one of them is."""
    norms = one.norm() * other.norm()
    return float(one @ other / norms) if norms > 0 else 0.0


def by_layer(
    found: dict[str, Tensor], weight: float, where: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Cosine of the two gradients and weight x norm of the consistency's over that of the
    reconstruction's.
    """
    first, second = found["reconstruction"], found["consistency"]
    rows = {"all": (first, second)} | {
        name: (first[mask], second[mask]) for name, mask in where.items()
    }
    return {
        name: {"cosine": cosine(r, c), "ratio": float(weight * c.norm() / r.norm())}
        for name, (r, c) in rows.items()
    }


def taken_back(
    consistency: Sum, networks: Networks, at: Tensor, gradient: Tensor, step: float, batch: Batch
) -> tuple[float, float]:
    """What the consistency takes back, at a batch, of the one step student and teacher differ by.

    Both stood `at` the same weights; the student goes `step` along the gradient, the teacher stays
    (a momentum below 1 scales the difference, and so the result).

    Returns:
        -<c, g> / (step x |g|^2), c being the consistency's gradient: the share of the step that
        gradient descent on c at a rate of 1 undoes. And -cos(c, g).
    """
    vector_to_parameters(at - step * gradient, networks.student.parameters())
    vector_to_parameters(at.clone(), networks.teacher.parameters())
    found = gradients(consistency, *networks, batch)["consistency"]
    return float(-(found @ gradient) / (step * gradient.square().sum())), -cosine(found, gradient)


# ------------------------------------------------------------------------------------------ the run


class Networks(NamedTuple):
    """Both of one architecture, with all that the consistency's gradient reaches, in float64."""

    student: MaskedAutoencoder
    teacher: MaskedAutoencoder


@dataclass(frozen=True)
class Analysed:
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
        found = Normalise(data.mean, data.std)(next(self.stream.steps(step))[0]).part(slice(images))
        return replace(found, images=found.images.double(), teacher_ids=None)

    def remasked(self, batch: Batch) -> Batch:
        """The same images and crops with masks that the run has not used for them."""
        seed = self.recipe.data.seed
        ids = [self.mask.ids(seed, position, OTHER_MASK) for position in batch.positions.tolist()]
        return replace(batch, ids_shuffle=torch.from_numpy(np.stack(ids)))


def open_run(folder: Path, images: int, shards: str | None = None) -> Analysed:
    """A run by its folder. Nothing is written.

    Args:
        folder: run.dir.
        images: at most so many of a step are read at once.
        shards: where they lie now, if they have moved.

    Raises:
        ValueError: it is no run with a consistency and a checkpoint, or its shards are not there.
    """
    try:
        recipe = config.stored(yaml.safe_load((folder / "recipe.yaml").read_text()))
    except (OSError, yaml.YAMLError, pydantic.ValidationError) as error:
        raise Refused(f"{folder} is no run's folder: {error}") from error
    if "pixels" not in recipe.objective.teacher_outputs or has_regressors(recipe):
        raise Refused(
            f"{folder} has no consistency with a teacher's pixels, which this is about; train "
            "objective.name=rcmae, or another with objective.terms={consistency: 1}"
        )
    recipe.run.dir, recipe.engine.name, recipe.engine.config = str(folder), "local", None
    recipe.evaluate.every_steps, recipe.batch.per_device, recipe.checkpoint.resume = (
        None,
        images,
        "auto",
    )
    recipe.checkpoint.allow = ["batch.per_device"]
    recipe.data.shards = shards or recipe.data.shards
    found = train.check(recipe, train.Pretraining())
    kept = [
        checkpoint.open_verified(path) for path in checkpoint.step_folders(folder / "checkpoints")
    ]
    if not kept:
        raise Refused(f"{folder} has no checkpoint yet; train on")
    data, made = recipe.data, make_objective(recipe, found.sizes)
    assert isinstance(made, Sum)
    stream = Stream(
        index=found.index,
        plan=found.plan,
        transform=train_transform(recipe),
        mask=found.mask,
        seed=data.seed,
        micro=found.sizes.per_device,
        cache=found.cache,
        repeats=data.repeats,
    )
    objective = Sum({name: made.terms[name] for name in ("reconstruction", "consistency")})
    return Analysed(recipe, objective, stream, found.mask, kept, found.sizes.images_per_step)


def networks_at(manifest: Manifest, recipe: Recipe) -> Networks:
    """Student and teacher of a checkpoint."""
    found = []
    for which in ("student", "teacher"):
        model = new_network(recipe, norm="torch")
        assert isinstance(model, MaskedAutoencoder)
        model.keep(("pixels",))
        weights = read_network(
            manifest.path, "student" if which == "student" else "teacher"
        ).weights
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
        found.append(model.double().eval())
    return Networks(*found)


def look_at(
    run: Analysed, manifest: Manifest, *, images: int, pairs: int, size: float
) -> dict[str, Any]:
    """One checkpoint's figures.

    Args:
        run: that it is of.
        manifest: which.
        images: of a batch.
        pairs: images whose gradient is stepped along.
        size: length of that step over that of the weights.
    """
    networks, step = networks_at(manifest, run.recipe), manifest.images // run.images_per_step
    last, coming = run.batch(step - 1, images), run.batch(step, images)
    weight = run.objective.weights["consistency"]
    rows = by_layer(gradients(run.objective, *networks, coming), weight, layers(networks.student))

    at = parameters_to_vector(networks.student.parameters()).detach()
    gone = at - parameters_to_vector(networks.teacher.parameters()).detach()
    previous = gradients(run.objective, *networks, last)["reconstruction"]
    own = {}
    for kind, batch in zip(KINDS, (last, run.remasked(last), coming), strict=True):
        pull = gradients(run.objective, *networks, batch)["consistency"]
        own[kind] = {
            "with_way_gone": cosine(pull, gone),
            "with_last_gradient": cosine(pull, previous),
        }

    found = list(conditional(run, networks, at, last, coming, pairs=pairs, size=size))
    summary = {
        kind: quartiles([row["share"] for row in found if row["kind"] == kind]) for kind in KINDS
    }
    moved = [row for row in found if row["kind"] != SAME]
    apart = [row for row in found if row["kind"] == OTHER]
    return {
        "step": manifest.step,
        "layers": rows,
        "own_teacher": own,
        "taken_back": summary,
        "distance": float(gone.norm() / at.norm()),
        "rank_correlation": {
            "other masks and images": rank_correlation(moved),
            "other images": rank_correlation(apart),
        },
        "pairs": found,
    }


def conditional(
    run: Analysed,
    networks: Networks,
    at: Tensor,
    last: Batch,
    coming: Batch,
    *,
    pairs: int,
    size: float,
) -> Iterator[dict[str, Any]]:
    """Image by image: how alike another input's features are, and what share of this one's step it
    takes back.

    Shares are in units of the one at the same image and mask.
    """
    reconstruction, consistency = (
        Sum({name: run.objective.terms[name]}) for name in ("reconstruction", "consistency")
    )
    vector_to_parameters(at.clone(), networks.student.parameters())
    remasked = run.remasked(last)
    tokens = {
        name: features(networks.student, batch)
        for name, batch in (("last", last), ("coming", coming))
    }
    tokens["remasked"] = features(networks.student, remasked)
    # what all images share says nothing of two of them
    mean = torch.cat(list(tokens.values())).mean(0)
    centred = {name: vectors - mean for name, vectors in tokens.items()}
    for index in range(min(pairs, len(last), len(coming))):
        one = last.part(slice(index, index + 1))
        vector_to_parameters(at.clone(), networks.student.parameters())
        gradient = gradients(reconstruction, *networks, one)["reconstruction"]
        step = size * float(at.norm() / gradient.norm())
        unit, against = taken_back(consistency, networks, at, gradient, step, one)
        yield {"kind": SAME, "similarity": 1.0, "share": 1.0, "against": against}
        inputs = [(REMASKED, "remasked", remasked, index)]
        inputs += [
            (OTHER, "coming", coming, (index + more) % len(coming)) for more in range(OTHERS_EACH)
        ]
        for kind, name, batch, row in inputs:
            share, against = taken_back(
                consistency, networks, at, gradient, step, batch.part(slice(row, row + 1))
            )
            alike = cosine(centred["last"][index], centred[name][row])
            yield {"kind": kind, "similarity": alike, "share": share / unit, "against": against}


@torch.no_grad()
def features(model: MaskedAutoencoder, batch: Batch) -> Tensor:
    """The mean over an image's visible tokens out of the encoder, [B, D]."""
    return model.encode(batch.images, batch.ids_shuffle[:, : batch.num_visible])[
        :, model.num_prefix :
    ].mean(1)


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {"q1": low, "median": middle, "q3": high}


def rank_correlation(rows: Sequence[dict[str, Any]]) -> float:
    """Spearman's, of the similarity and the share."""
    alike, share = (
        np.argsort(np.argsort([row[key] for row in rows])) for key in ("similarity", "share")
    )
    return float(np.corrcoef(alike, share)[0, 1])


# --------------------------------------------------------------------------------- the linear model


def linear_model(
    images: Tensor,
    ids: Tensor,
    other_ids: Tensor,
    num_visible: int,
    *,
    steps: int = 200,
    rate: float = 0.5,
    momentum: float = 0.99,
    seed: int = 0,
) -> dict[str, Any]:
    """The paper's linear model, trained: one matrix that maps a masked image to the image, and its
    moving average.

    Loss at an image x whose visible part is a: |Sa - x|^2 / 2 + |Sa - Ta|^2 / 2; plain gradient
    descent, one image a step, then T = momentum x T + (1 - momentum) x S.

    Args:
        images: [n, d], scaled to a length of 1 each.
        ids: [n, d] order of the numbers, of which the first `num_visible` are seen.
        other_ids: alike, another one.
        num_visible: how many.
        steps: of the training.
        rate: of the descent; below 1 it is stable for such images.
        momentum: of the teacher.
        seed: of the order of the images.

    Returns:
        points: after each step, for each of KINDS, the cosine of the two masked inputs, and what
        share of the step just taken the consistency takes back: all of it, and the part that stems
        from that step, both over rate x momentum x |b|^2. error: largest relative difference, over
        the training, of the consistency's gradient from the sum of the earlier gradients that it is
        by algebra.
    """
    count, size = images.shape
    images = images.double()
    nothing, seen = torch.zeros_like(images), (ids[:, :num_visible], other_ids[:, :num_visible])
    masked, remasked = (nothing.scatter(1, each, images.gather(1, each)) for each in seen)
    student = torch.zeros(size, size, dtype=torch.float64)
    teacher = student.clone()
    past = torch.zeros_like(student)  # sum over earlier steps of momentum^age x gradient
    points: list[dict[str, Any]] = []
    order = torch.randint(
        count, (steps + 1,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    error = 0.0
    for now, after in pairwise(order):
        a, x = masked[now], images[now]
        residual = 2 * student @ a - x - teacher @ a  # the gradient is its outer product with a
        gradient = torch.outer(residual, a)
        student = student - rate * gradient
        teacher = momentum * teacher + (1 - momentum) * student
        past = momentum * (past + gradient)
        for kind, b in zip(KINDS, (a, remasked[now], masked[after]), strict=True):
            if after == now and kind == OTHER:
                continue
            # the consistency's is that of either with b
            pull, told = (student - teacher) @ b, -rate * past @ b
            error = max(error, float((pull - told).norm() / told.norm()))
            unit = rate * momentum * b.square().sum() * residual.square().sum() * a.square().sum()
            from_last = -rate * momentum * residual * (a @ b)
            share, share_of_last = (
                float(-(each @ residual) * (a @ b) / unit) for each in (pull, from_last)
            )
            points.append(
                {
                    "kind": kind,
                    "similarity": cosine(a, b),
                    "share": share,
                    "share_of_last": share_of_last,
                }
            )
    return {
        "points": points,
        "error": error,
        "steps": steps,
        "rate": rate,
        "momentum": momentum,
        "taken_back": {
            kind: quartiles([row["share"] for row in points if row["kind"] == kind])
            for kind in KINDS
        },
    }


def linear_of(batch: Batch, remasked: Batch, patch_size: int, **settings: Any) -> dict[str, Any]:
    """`linear_model` on a batch's images and masks, each patch brought down to the mean of each
    channel.
    """
    # [B, L, C]
    patches = patchify(batch.images, patch_size).unflatten(2, (-1, batch.images.shape[1])).mean(2)
    channels = patches.shape[2]
    flat = patches.flatten(1)
    ids, other_ids = (
        (each.ids_shuffle[:, :, None] * channels + torch.arange(channels)).flatten(1)
        for each in (batch, remasked)
    )
    scaled = flat / flat.norm(dim=1, keepdim=True)
    return linear_model(scaled, ids, other_ids, batch.num_visible * channels, **settings)


# ------------------------------------------------------------------------------------- what is told

COLOURS = dict(zip(KINDS, ("tab:blue", "tab:orange", "tab:grey"), strict=True))


def draw(told: dict[str, Any], path: Path) -> None:
    """The page of plots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found, linear, pairs = told["checkpoints"], told["linear_model"], told["pairs"]
    steps, names = [each["step"] for each in found], list(found[0]["layers"])
    figure, axes = pyplot.subplots(4, 2, figsize=(13, 19), layout="constrained")
    figure.suptitle(f"{told['run']}: what the teacher does to the gradients", fontsize=14)

    for axis, figures, title, limits in (
        (
            axes[0, 0],
            "cosine",
            "cosine of the gradients of reconstruction and consistency",
            (-1.0, 1.0),
        ),
        (axes[0, 1], "ratio", "norm of the consistency's gradient over the reconstruction's", None),
    ):
        table = np.array([[each["layers"][name][figures] for each in found] for name in names])
        low, high = limits or (0.0, float(table.max()))
        shown = axis.imshow(
            table, aspect="auto", vmin=low, vmax=high, cmap="RdBu_r" if limits else "viridis"
        )
        axis.set_yticks(range(len(names)), names)
        every = max(1, -(-len(steps) // 8))
        axis.set_xticks(range(0, len(steps), every), [str(step) for step in steps[::every]])
        axis.set(title=title, xlabel="step")
        figure.colorbar(shown, ax=axis)

    for axis, key, title in (
        (
            axes[1, 0],
            "with_way_gone",
            "cosine of the consistency's gradient\nwith the way from teacher to student",
        ),
        (
            axes[1, 1],
            "with_last_gradient",
            "the same with the last reconstruction's\n(below 0: it is taken back)",
        ),
    ):
        for kind in KINDS:
            values = [each["own_teacher"][kind][key] for each in found]
            axis.plot(steps, values, marker="o", color=COLOURS[kind], label=f"at: {kind}")
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set(title=f"the run's own teacher: {title}", xlabel="step")
        axis.legend()

    axis = axes[2, 0]
    for kind in KINDS[1:]:
        rows = [row for row in pairs if row["kind"] == kind]
        axis.scatter(
            [row["similarity"] for row in rows],
            [row["share"] for row in rows],
            s=14,
            alpha=0.6,
            color=COLOURS[kind],
            label=kind,
        )
    axis.axhline(1, color=COLOURS[SAME], linewidth=1, label=f"{SAME}: the unit")
    axis.set(
        title=f"one step from step {steps[-1]}: share of it taken back",
        xlabel="cosine of the encoder's features, less their mean",
        ylabel="share, in units of the same input's",
        ylim=(0, 1.3 * np.quantile([row["share"] for row in pairs], 0.99)),
    )
    axis.legend()
    axis = axes[2, 1]
    for kind in KINDS[1:]:
        rows = [each["taken_back"][kind] for each in found]
        axis.plot(
            steps, [row["median"] for row in rows], marker="o", color=COLOURS[kind], label=kind
        )
        axis.fill_between(
            steps,
            [row["q1"] for row in rows],
            [row["q3"] for row in rows],
            color=COLOURS[kind],
            alpha=0.2,
        )
    axis.axhline(1, color=COLOURS[SAME], linewidth=1)
    axis.set(
        title="one step: share of it taken back, median and quartiles", xlabel="step", ylim=(0, 1.3)
    )
    axis.legend(loc="upper right")

    low = min(row["similarity"] for row in linear["points"])
    line = np.linspace(low, 1, 100)
    for axis, key, title in (
        (axes[3, 0], "share_of_last", "by that step's own term"),
        (axes[3, 1], "share", "by the teacher's whole memory"),
    ):
        axis.plot(
            line,
            line**2,
            color="black",
            linewidth=1,
            label="cosine squared: the algebra of the own term",
        )
        for kind in KINDS:
            rows = [row for row in linear["points"] if row["kind"] == kind]
            axis.scatter(
                [row["similarity"] for row in rows],
                [row[key] for row in rows],
                s=14,
                alpha=0.4,
                color=COLOURS[kind],
                label=kind,
            )
        axis.set(
            title=f"linear model: share of the last step taken back,\n{title}",
            xlabel="cosine of the two masked inputs",
            ylabel="share over rate x momentum x |b|²",
        )
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def say(told: dict[str, Any]) -> str:
    """The figures for people: a line a checkpoint."""
    lines = [
        f"{told['run']}: gradients of consistency and reconstruction, and what the teacher "
        "takes back",
        f"{'step':>8} {'cosine':>8} {'ratio':>8}   {'with the way gone, at':^32}   "
        f"{'share of a step taken back':^33}",
        f"{'':>26}   {'same':>10} {'remasked':>10} {'other':>10}   {'other mask':>16} "
        f"{'other image':>16}",
    ]
    for each in told["checkpoints"]:
        total, own, shares = each["layers"]["all"], each["own_teacher"], each["taken_back"]
        spread = [
            f"{shares[kind]['median']:.2f} ({shares[kind]['q1']:.2f}-{shares[kind]['q3']:.2f})"
            for kind in KINDS[1:]
        ]
        lines.append(
            f"{each['step']:>8} {total['cosine']:>8.3f} {total['ratio']:>8.3f}   "
            + " ".join(f"{own[kind]['with_way_gone']:>10.3f}" for kind in KINDS)
            + "   "
            + " ".join(f"{text:>16}" for text in spread)
        )
    newest, linear = told["checkpoints"][-1], told["linear_model"]
    ranked = ", ".join(
        f"{value:.2f} over {name}" for name, value in newest["rank_correlation"].items()
    )
    medians = ", ".join(
        f"{row['median']:.2f} at the {kind}" for kind, row in linear["taken_back"].items()
    )
    return "\n".join(
        [
            *lines,
            f"rank correlation of the features' likeness and the share at step {newest['step']}: "
            f"{ranked}",
            f"linear model: median share {medians}; its gradients are those of the algebra "
            f"within {linear['error']:.1e}",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="its run.dir")
    parser.add_argument("--images", type=int, default=128, help="of a batch (128)")
    parser.add_argument(
        "--pairs", type=int, default=48, help="images whose gradient is stepped along (48)"
    )
    parser.add_argument(
        "--size", type=float, default=1e-3, help="of that step, over the weights' length (1e-3)"
    )
    parser.add_argument("--shards", help="where data.shards lie now, if they have moved")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: RUN/pictures")
    parser.add_argument("--json", action="store_true", help="print teacher.json instead of a table")
    options = parser.parse_args(arguments)
    try:
        if min(options.images, options.pairs) < 2 or options.size <= 0:
            raise Refused("--images and --pairs want 2 or more, --size more than 0")
        run = open_run(options.run, options.images, options.shards)
        found = []
        for manifest in run.checkpoints:
            found.append(
                look_at(
                    run, manifest, images=options.images, pairs=options.pairs, size=options.size
                )
            )
            print(f"step {manifest.step}: done", file=sys.stderr)
        first = run.batch(0, options.images)
        patch = student_sizes(run.recipe.model)["patch_size"]
        told = {
            "tool": "analyze_teacher",
            "run": options.run.name,
            "images": len(first),
            "size": options.size,
            "linear_model": linear_of(first, run.remasked(first), patch),
            "pairs": found[-1]["pairs"],
            "checkpoints": [
                {key: value for key, value in each.items() if key != "pairs"} for each in found
            ],
        }
    except (ValueError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    out = options.out or options.run / "pictures"
    draw(told, out / "teacher.png")
    (out / "teacher.json").write_text(json.dumps(told, indent=1) + "\n")
    if options.json:
        print(json.dumps(told, indent=1))
    else:
        print(f"{say(told)}\nwritten: {out / 'teacher.png'}, {out / 'teacher.json'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
