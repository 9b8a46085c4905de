"""Fine-tuning: a classifier whose encoder starts from pretrained weights, all of it trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from rcmae.config import Recipe, Resolved, Section
from rcmae.data import augment
from rcmae.data.augment import AugmentTransform
from rcmae.data.batch import Batch
from rcmae.data.masking import Mask, NoMask
from rcmae.data.members.protocol import Members
from rcmae.data.transforms import Transform
from rcmae.data.views import train_transform
from rcmae.models.activations import Computing
from rcmae.models.build import classifier_sizes
from rcmae.models.classifier import Classifier
from rcmae.models.cost import StepCost, classifier_cost
from rcmae.objectives import Objective
from rcmae.objectives.classification import ClassifierLoss
from rcmae.tasks.classify import (
    USUAL_CLASSES,
    Found,
    fit,
    judge_classes,
    judged,
    look_at_classes,
    mixing_of,
    new_classifier,
    start_weights,
    test_set,
    whole_hints,
)
from rcmae.tasks.protocol import (
    Data,
    Ended,
    Evaluated,
    Evaluating,
    EvaluationSet,
    Judgement,
    Optimizing,
    Saved,
)
from rcmae.weights.classifiers import FORMATS as CLASSIFIER_FORMATS
from rcmae.weights.formats import WeightsFormat


class Finetuning:
    """The task of `rcmae finetune`."""

    name = "finetune"
    module = "rcmae.finetune"
    options: type[Section] | None = None
    frozen: tuple[str, ...] = ("classify",)
    reports: tuple[str, ...] = ("classify.class_names",)
    metrics: Mapping[str, str] = MappingProxyType({})
    formats: Mapping[str, WeightsFormat] = CLASSIFIER_FORMATS

    def look(self, recipe: Recipe, saved: Saved | None) -> Found:
        """Class names, and the shapes of the weights that a new run starts from."""
        return look_at_classes(recipe, saved, always=False)

    def judge(
        self, recipe: Recipe, found: Found | None, data: Data, saved: Saved | None, world: int
    ) -> Judgement:
        """Labels and weights that do not fit; fills in the number of classes."""
        judgement = judge_classes(recipe, found, data, saved, world)
        num_classes = judgement.values.get("classify.num_classes")
        if num_classes and not judgement.problems:
            problems, notes = fit(recipe, found, num_classes)
            judgement.problems += problems
            judgement.notes += notes
        return judgement

    def evaluation_sets(self, recipe: Recipe) -> Sequence[EvaluationSet]:
        """The test set."""
        return test_set(recipe)

    def mask(self, recipe: Recipe) -> Mask:
        """The network sees every patch. Raises Refused for sizes that do not fit together."""
        classifier_sizes(recipe.model)
        return NoMask()

    def transform(self, recipe: Recipe) -> Transform:
        """A random box, flipped or not; RandAugment where asked for. Raises Refused."""
        base = train_transform(recipe)
        policy = recipe.classify.rand_augment
        return AugmentTransform(base, policy, recipe.data.mean) if policy else base

    def members(self, recipe: Recipe) -> Members | None:
        """Nothing but image and label."""
        return None

    def network(self, recipe: Recipe, found: Found | None, saved: Saved | None) -> nn.Module:
        """The classifier; a new run's encoder has the weights of classify.init. Collective."""
        model = new_classifier(recipe, recipe.classify.num_classes or 0)
        if saved is None:  # else the weights are in the checkpoint
            start_weights(model, recipe)
        return model

    def objective(self, recipe: Recipe, sizes: Resolved) -> Objective:
        """Cross-entropy."""
        options = recipe.classify
        return ClassifierLoss(
            smoothing=options.smoothing, seed=recipe.run.seed, keeps_average=options.average
        )

    def teacher(self, student: nn.Module, objective: Objective) -> nn.Module | None:
        """The average of the whole classifier, where the recipe has one."""
        return copy.deepcopy(student) if objective.needs_teacher else None

    def optimizing(self, recipe: Recipe) -> Optimizing:
        """AdamW, with a learning rate that falls from layer to layer."""
        return Optimizing(recipe.classify.rule, recipe.classify.layer_decay)

    def cost(self, recipe: Recipe, *, fused_attention: bool = True) -> StepCost:
        """Forward and backward of the classifier; its average computes nothing."""
        engine = recipe.engine
        sizes = classifier_sizes(recipe.model)
        with torch.device("meta"):
            student = Classifier(
                sizes,
                num_classes=recipe.classify.num_classes or USUAL_CLASSES,
                pool=recipe.classify.pool,
            )
        return classifier_cost(
            student,
            sizes,
            averaged=recipe.classify.average,
            computing=Computing(engine.precision, engine.activation_checkpointing, fused_attention),
        )

    def pair(self, recipe: Recipe, micros: list[Batch]) -> list[Batch]:
        """Each image with the one that it is mixed with, where images are mixed."""
        return augment.mates_of(micros) if mixing_of(recipe).is_on else micros

    def ready(
        self, recipe: Recipe, batch: Batch, normalise: Callable[[Batch], Batch], step: int
    ) -> Batch:
        """Images erased and mixed, with targets where they are mixed."""
        options = recipe.classify
        seed = recipe.data.seed
        mate = batch.mate
        batch = replace(batch, mate=None)
        if options.erase > 0:
            batch = augment.erase(batch, probability=options.erase, seed=seed)
        mixing = mixing_of(recipe)
        if mate is None or not mixing.is_on:
            return batch
        mate = normalise(mate)
        if options.erase > 0:
            mate = augment.erase(mate, probability=options.erase, seed=seed)
        mix = mixing.draw(seed, step, recipe.model.image_hw)
        assert batch.labels is not None
        assert mate.labels is not None
        assert options.num_classes is not None
        targets = augment.mixed_targets(
            batch.labels,
            mate.labels,
            mix,
            num_classes=options.num_classes,
            smoothing=options.smoothing,
        )
        images = augment.mixed(batch.images, mate.images, mix)
        return replace(batch, images=images, targets=targets)

    def evaluate(self, context: Evaluating) -> Evaluated:
        """Scores of the classifier, and of its average where there is one."""
        networks: dict[str, Callable[[Tensor], Tensor]] = {"student": context.student}
        if context.teacher is not None:
            networks["average"] = context.teacher
        return judged(context, networks)

    def picture(self, context: Evaluating, batch: Batch) -> np.ndarray | None:
        """Nothing: a classifier reconstructs nothing."""
        return None

    def hints(self, ended: Ended) -> list[tuple[str, str]]:
        """The classifier for timm."""
        return whole_hints(ended)
