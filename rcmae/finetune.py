"""Fine-tune a pretrained encoder on labelled shards.

    python -m rcmae.finetune RECIPE.yaml [key=value ...]
        one process; or under deepspeed, torchrun, srun

It is the training of `rcmae.train` (the same loop, engines, stream, checkpoints, run folder, resume
and exit status) with another task: a classifier whose encoder starts from `classify.init`, labels
smoothed and mixed, the learning rate falling from layer to layer. Beside the usual files,
`evaluation/step-*.json` has the table of classes and `pictures/confusion-*.png` what was taken for
what."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rcmae import checkpoint, dist, train
from rcmae.checkpoint import Manifest
from rcmae.config import Recipe, Resolved
from rcmae.data import augment
from rcmae.data.augment import AugmentTransform, Mixing
from rcmae.data.batch import Batch
from rcmae.data.index import ShardIndex
from rcmae.data.masking import Mask, NoMask
from rcmae.data.stream import labelled_batches, refuse_unlabelled
from rcmae.data.transforms import Transform
from rcmae.data.views import train_transform
from rcmae.errors import Refused
from rcmae.evaluation.features import evaluating
from rcmae.evaluation.pictures import save_png
from rcmae.evaluation.scores import Scores, classify, confusion_picture, scores_table
from rcmae.models import kernels
from rcmae.models.build import student_sizes
from rcmae.models.classifier import Classification, Classifier, fit_weights
from rcmae.models.flops import classifier_flops
from rcmae.objectives import Objective
from rcmae.weights.names import published_names
from rcmae.weights.reading import read_network_together

ENCODER_SIZES = ("patch_size", "embed_dim", "depth", "num_heads")


class Finetuning:
    """The task of `rcmae.train.Task` that trains a whole classifier."""

    command = "rcmae.finetune"
    objectives: tuple[str, ...] = ("finetune",)

    def __init__(self) -> None:
        self.model: nn.Module = nn.Identity()  # what `problems` builds
        self.report = ""  # what of the weights matched

    def labelled(self, recipe: Recipe) -> Sequence[str | list[str]]:
        """The set that the evaluation is on."""
        return test_set(recipe)

    def problems(
        self,
        recipe: Recipe,
        index: ShardIndex | None,
        labelled: Sequence[ShardIndex],
        saved: Manifest | None,
    ) -> list[str]:
        """Labels that do not fit, weights that do not fit; fills in the number of classes.

        Collective.
        """
        if found := label_problems(recipe, index, labelled, saved):
            return found
        self.model = model = new_classifier(recipe, recipe.classify.num_classes or 0)
        if saved is None:  # a run that goes on has its weights in the checkpoint
            self.report = start_weights(model, recipe)
        return []

    def mask(self, recipe: Recipe) -> Mask:
        """Nothing is hidden."""
        student_sizes(recipe.model)
        return NoMask()

    def transform(self, recipe: Recipe) -> Transform:
        """A random box, flipped, then RandAugment where the recipe has it. Raises ValueError."""
        base, policy = train_transform(recipe), recipe.classify.rand_augment
        return AugmentTransform(base, policy, recipe.data.mean) if policy else base

    def student(self, recipe: Recipe) -> nn.Module:
        """The classifier."""
        if self.report and dist.rank() == 0:
            print(self.report, flush=True)
        return self.model

    def objective(self, recipe: Recipe, sizes: Resolved) -> Objective:
        """Cross-entropy."""
        each = recipe.classify
        return Classification(
            smoothing=each.smoothing, seed=recipe.run.seed, keeps_average=each.average
        )

    def teacher(self, student: nn.Module, objective: Objective) -> nn.Module | None:
        """The average of the whole classifier, where the recipe has one."""
        return copy.deepcopy(student) if objective.needs_teacher else None

    def step_flops(
        self, recipe: Recipe, student: nn.Module, objective: Objective, num_visible: int
    ) -> float:
        """Forward and backward of the classifier; its average has neither."""
        return 3 * classifier_flops(**encoder_sizes(recipe))

    def pair(self, recipe: Recipe, micros: list[Batch]) -> list[Batch]:
        """Each image with the one that it is mixed with, where images are."""
        return augment.mates_of(micros) if mixing_of(recipe).is_on else micros

    def ready(self, run: train.Run, batch: Batch) -> Batch:
        """Images erased and mixed, with targets where they are mixed."""
        recipe = run.recipe
        each, seed = recipe.classify, recipe.data.seed
        mate, batch = batch.mate, replace(batch, mate=None)
        if each.erase > 0:
            batch = augment.erase(batch, probability=each.erase, seed=seed)
        mixing = mixing_of(recipe)
        if mate is None or not mixing.is_on:
            return batch
        mate = run.normalise(mate)
        if each.erase > 0:
            mate = augment.erase(mate, probability=each.erase, seed=seed)
        mix = mixing.draw(seed, run.data_step, recipe.model.image_hw)
        assert batch.labels is not None
        assert mate.labels is not None
        assert each.num_classes is not None
        targets = augment.mixed_targets(
            batch.labels, mate.labels, mix, num_classes=each.num_classes, smoothing=each.smoothing
        )
        return replace(batch, images=augment.mixed(batch.images, mate.images, mix), targets=targets)

    def evaluate(self, run: train.Run) -> None:
        """Judge the classifier, and its average where there is one.

        Collective: every rank calls.
        """
        networks: dict[str, Callable[[Tensor], Tensor]] = {"student": run.engine.student}
        if run.engine.teacher is not None:
            networks["average"] = run.engine.teacher
        judge(run, networks)


def judge(run: train.Run, networks: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
    """Write down how good networks are on the test set, their tables of classes and pictures.
    Collective.

    Args:
        run: whose student and teacher are put into evaluation mode.
        networks: name -> normalised images to scores.
    """
    begin, recipe, names = time.monotonic(), run.recipe, class_names(run.recipe)
    assert recipe.classify.num_classes is not None
    rows = {}
    with evaluating(run.engine.student, run.engine.teacher):
        for name, network in networks.items():
            batches = labelled_batches(
                run.labelled[0],
                image_size=recipe.model.image_hw,
                in_channels=recipe.model.in_channels,
                batch=recipe.evaluate.batch,
                rank=dist.rank(),
                world=dist.world(),
                workers=recipe.data.workers,
                cache=run.cache,
            )
            rows[name] = classify(
                network,
                batches,
                num_classes=recipe.classify.num_classes,
                device=dist.device(),
                normalise=run.normalise.images,
            )
    run.table, run.caption = scores_table(rows), f"of {rows['student'].images:,} test images, in %"
    figures = {name: row.figures() for name, row in rows.items()}
    run.log.event("evaluate", step=run.step, scores=figures, seconds=time.monotonic() - begin)
    for name, row in figures.items():
        run.log.scalars(
            f"scores_{name}",
            {key: value for key, value in row.items() if key != "images"},
            run.step,
        )
    run.log.say(
        f"step {run.step}, {figures['student']['images']} images of the test set\n{run.table}"
    )
    if dist.rank() == 0:
        write_scores(recipe.run_dir, run.step, rows, names)


def test_set(recipe: Recipe) -> Sequence[str | list[str]]:
    """What an evaluation reads."""
    return [recipe.evaluate.test_shards] if recipe.evaluate.every_steps else []


def mixing_of(recipe: Recipe) -> Mixing:
    """Mixup and CutMix of a recipe."""
    each = recipe.classify
    return Mixing(each.mixup, each.cutmix, each.mix_probability, each.mix_switch)


def encoder_sizes(recipe: Recipe) -> dict[str, Any]:
    """The sizes of the recipe's encoder. Raises ValueError."""
    sizes = student_sizes(recipe.model)
    return {
        "image_size": recipe.model.image_hw,
        "in_channels": recipe.model.in_channels,
        **{key: sizes[key] for key in ENCODER_SIZES},
    }


def new_classifier(recipe: Recipe, num_classes: int) -> Classifier:
    """The classifier of a recipe with the weights of `run.seed`, the same on every rank."""
    model = Classifier(
        **encoder_sizes(recipe),
        num_classes=num_classes,
        pool=recipe.classify.pool,
        drop_path=recipe.classify.drop_path,
        norm_layer=kernels.layer_norm(recipe.engine.layer_norm),
    )
    model.draw_weights(torch.Generator().manual_seed(recipe.run.seed))
    return model


def start_weights(model: Classifier, recipe: Recipe) -> str:
    """Put the weights of `classify.init` into the model; a table of what matched. Collective: every
    rank calls.

    Raises:
        ValueError: they cannot be read or do not fit.
    """
    init = recipe.classify.init
    if init is None:
        return "weights of run.seed: classify.init names none"
    try:
        source = read_network_together(Path(init), recipe.classify.network)
        fit = fit_weights(model, published_names(source.weights), source.grid)
    except (ValueError, checkpoint.CheckpointError) as error:
        raise Refused(
            f"classify.init={init} with model.name={recipe.model.name}: {error}"
        ) from error
    return f"{source.about}\n{fit.table()}"


def label_problems(
    recipe: Recipe, index: ShardIndex | None, labelled: Sequence[ShardIndex], saved: Manifest | None
) -> list[str]:
    """What stands against the labels.

    Fills in what an earlier job chose, and the number of classes.
    """
    problems: list[str] = []
    each = recipe.classify
    if saved is not None and saved.path.parent == recipe.run_dir / "checkpoints":
        theirs: Mapping[str, Any] = saved.meta["recipe"].get("classify", {})
        each.num_classes = each.num_classes or theirs.get("num_classes")
        each.init = (
            theirs.get("init")
            if each.init is None or same_source(each.init, theirs.get("init"))
            else each.init
        )
    elif each.init is not None:
        each.init = str(newest_of(Path(each.init)))
    if index is None:
        return problems
    try:
        refuse_unlabelled(index)
    except ValueError as error:
        return [f"data.shards: {error}"]
    present = set(index.labels.tolist())
    each.num_classes = each.num_classes or 1 + max(present)
    sets = [("data.shards", index), *(("evaluate.test_shards", other) for other in labelled)]
    for name, other in sets:
        outside = sorted(
            {label for label in set(other.labels.tolist()) if not 0 <= label < each.num_classes}
        )
        if outside:
            problems.append(
                f"{name}: labels {shown(outside)} lie outside "
                f"classify.num_classes={each.num_classes} "
                f"(0 to {each.num_classes - 1}); set it, or give other shards"
            )
        new = sorted(set(other.labels.tolist()) - present - set(outside))
        if new:
            count = sum(other.labels.tolist().count(label) for label in new[:50])
            problems.append(
                f"{name}: classes {shown(new)} ({count} images) are none of data.shards', so "
                "nothing can learn them; "
                "give test shards of the same classes"
            )
    if mixing_of(recipe).is_on and (recipe.batch.images // recipe.data.repeats // dist.world()) % 2:
        problems.append(
            f"batch.images={recipe.batch.images} over {dist.world()} ranks is an odd number "
            "of samples, and images are "
            "mixed in pairs of a rank; use an even number a rank, or classify.mixup=0 "
            "classify.cutmix=0"
        )
    if each.class_names is not None:
        try:
            class_names(recipe)
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"classify.class_names={each.class_names}: {error}")
    return problems


def shown(numbers: Sequence[int]) -> str:
    """The first of some numbers."""
    return ", ".join(map(str, numbers[:10])) + " ..." * (len(numbers) > 10)


def newest_of(source: Path) -> Path:
    """The folder of a run's newest checkpoint, so that a resume starts from the same.

    Anything else as it is.
    """
    if (source / "checkpoints").is_dir():
        found = checkpoint.newest_unverified(source / "checkpoints")
        return found.path if found else source
    return source


def same_source(asked: str, chosen: str | None) -> bool:
    """Whether an earlier job's choice is a checkpoint of the run that is asked for now."""
    return chosen is not None and (
        asked == chosen or Path(chosen).parent == Path(asked) / "checkpoints"
    )


def class_names(recipe: Recipe) -> list[str]:
    """Names of the classes, if the recipe has them."""
    path = recipe.classify.class_names
    return Path(path).read_text().split("\n") if path else []


def write_scores(
    run_dir: Path, step: int, rows: Mapping[str, Scores], names: Sequence[str]
) -> None:
    """The table of classes as JSON and the confusion as a picture, of each network.

    One process calls.
    """
    folder = run_dir / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        name: {**row.figures(), "classes": row.classes(names), "confused": row.confused()}
        for name, row in rows.items()
    }
    aside = folder / f"step-{step:08d}.json.aside"
    aside.write_text(json.dumps({"step": step, "networks": document}, indent=1))
    aside.replace(folder / f"step-{step:08d}.json")
    for name, row in rows.items():
        picture = confusion_picture(row.confusion, names)
        save_png(picture, run_dir / "pictures" / f"confusion-{name}-{step:08d}.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Fine-tune by a command line; the exit status of this rank."""
    return train.main(argv, Finetuning())


if __name__ == "__main__":
    raise SystemExit(main())
