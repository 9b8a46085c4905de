"""Linear probing: a head on the features of a frozen encoder.

The engine holds the head alone (a batch norm without an affine part over all ranks' images, and a
linear layer), moved by LARS or SGD. The encoder runs beside it, replicated on every rank, in
`engine.precision`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from rcmae import dist
from rcmae.config import Recipe, Resolved, Section
from rcmae.data.batch import Batch
from rcmae.data.masking import Mask, NoMask
from rcmae.data.members.protocol import Members
from rcmae.data.transforms import Transform
from rcmae.data.views import train_transform
from rcmae.engines.protocol import DTYPES
from rcmae.engines.updates import cast_params
from rcmae.models.batchnorm import GlobalBatchNorm
from rcmae.models.build import classifier_sizes
from rcmae.models.classifier import Classifier, ProbeHead, probe_head
from rcmae.models.cost import StepCost, probe_cost
from rcmae.objectives import Objective
from rcmae.objectives.classification import ProbeLoss
from rcmae.tasks.classify import (
    USUAL_CLASSES,
    Found,
    fit,
    judge_classes,
    judged,
    look_at_classes,
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


class LinearProbe:
    """The task of `rcmae probe`. Its `network` keeps the encoder for `objective`."""

    name = "probe"
    module = "rcmae.probe"
    options: type[Section] | None = None
    frozen: tuple[str, ...] = ("classify",)
    reports: tuple[str, ...] = ("classify.class_names",)
    metrics: Mapping[str, str] = MappingProxyType({})
    formats: Mapping[str, WeightsFormat] = CLASSIFIER_FORMATS

    def __init__(self) -> None:
        self.encoder: Classifier | None = None  # frozen; no part of what is trained

    def look(self, recipe: Recipe, saved: Saved | None) -> Found:
        """Class names, and the shapes of the encoder's weights."""
        return look_at_classes(recipe, saved, always=True)

    def judge(
        self, recipe: Recipe, found: Found | None, data: Data, saved: Saved | None, world: int
    ) -> Judgement:
        """Labels and weights that do not fit; fills in the number of classes."""
        judgement = judge_classes(recipe, found, data, saved, world)
        if judgement.problems or "classify.num_classes" not in judgement.values:
            return judgement
        problems, notes = fit(recipe, found, 0)
        judgement.problems += problems
        judgement.notes += notes
        depth = recipe.classify.depth
        if depth is not None and not judgement.problems:
            blocks = classifier_sizes(recipe.model).depth
            if depth > blocks:
                judgement.problems.append(
                    f"classify.depth={depth}: {recipe.model.name} has {blocks} blocks"
                )
        return judgement

    def evaluation_sets(self, recipe: Recipe) -> Sequence[EvaluationSet]:
        """The test set."""
        return test_set(recipe)

    def mask(self, recipe: Recipe) -> Mask:
        """The network sees every patch. Raises Refused for sizes that do not fit together."""
        classifier_sizes(recipe.model)
        return NoMask()

    def transform(self, recipe: Recipe) -> Transform:
        """A random box of the image, flipped or not. Raises Refused."""
        return train_transform(recipe)

    def members(self, recipe: Recipe) -> Members | None:
        """Nothing but image and label."""
        return None

    def network(self, recipe: Recipe, found: Found | None, saved: Saved | None) -> nn.Module:
        """The head; the encoder stands beside it. Collective."""
        encoder = new_classifier(recipe, 0)
        taken = start_weights(encoder, recipe)
        if dist.rank() == 0:
            print(taken, flush=True)
        if recipe.classify.depth is not None:
            encoder.blocks = encoder.blocks[: recipe.classify.depth]
        encoder = encoder.to(dist.device()).eval().requires_grad_(False)
        cast_params(encoder, DTYPES[recipe.engine.precision])
        self.encoder = encoder
        assert recipe.classify.num_classes is not None
        return probe_head(encoder.embed_dim, recipe.classify.num_classes)

    def objective(self, recipe: Recipe, sizes: Resolved) -> Objective:
        """Cross-entropy of the head on the encoder's features."""
        return ProbeLoss(self.features())

    def features(self) -> Callable[[Tensor], Tensor]:
        """Images to pooled features [B, D]."""
        encoder = self.encoder
        assert encoder is not None
        return lambda images: encoder.forward_head(encoder.encoded(images), pre_logits=True)

    def teacher(self, student: nn.Module, objective: Objective) -> nn.Module | None:
        """No average of a head."""
        return None

    def optimizing(self, recipe: Recipe) -> Optimizing:
        """LARS or SGD, as the recipe says."""
        return Optimizing(recipe.classify.rule, recipe.classify.layer_decay)

    def cost(self, recipe: Recipe, *, fused_attention: bool = True) -> StepCost:
        """The encoder's forward, and the head."""
        sizes = classifier_sizes(recipe.model)
        num_classes = recipe.classify.num_classes or USUAL_CLASSES
        with torch.device("meta"):
            head = ProbeHead(
                GlobalBatchNorm(sizes.embed_dim, affine=False),
                nn.Linear(sizes.embed_dim, num_classes),
            )
        depth = recipe.classify.depth or sizes.depth
        return probe_cost(head, sizes, depth=depth, precision=recipe.engine.precision)

    def pair(self, recipe: Recipe, micros: list[Batch]) -> list[Batch]:
        """The same batches: no image needs another."""
        return micros

    def ready(
        self, recipe: Recipe, batch: Batch, normalise: Callable[[Batch], Batch], step: int
    ) -> Batch:
        """The same batch."""
        return batch

    def evaluate(self, context: Evaluating) -> Evaluated:
        """Scores of the head on the encoder."""
        features = self.features()
        head = context.student

        def score(images: Tensor) -> Tensor:
            with torch.no_grad():
                return head(features(images))

        return judged(context, {"student": score})

    def picture(self, context: Evaluating, batch: Batch) -> np.ndarray | None:
        """Nothing: a classifier reconstructs nothing."""
        return None

    def hints(self, ended: Ended) -> list[tuple[str, str]]:
        """The classifier for timm."""
        return whole_hints(ended)
