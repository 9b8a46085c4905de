"""Train a linear classifier on the features of a frozen encoder.

    python -m rcmae.probe RECIPE.yaml [key=value ...]
        one process; or under deepspeed, torchrun, srun

It is the training of `rcmae.train` with another task: the engine holds the head alone (a batch norm
without an affine part over all ranks' images, and a linear layer), moved by LARS or SGD; the
encoder of `classify.init` runs beside it, whole on every rank, in `engine.precision`.
`classify.depth` takes the features after that block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rcmae import dist, train
from rcmae.checkpoint import Manifest
from rcmae.config import Recipe, Resolved
from rcmae.data.batch import Batch
from rcmae.data.index import ShardIndex
from rcmae.data.masking import Mask, NoMask
from rcmae.data.transforms import Transform
from rcmae.data.views import train_transform
from rcmae.engines.protocol import DTYPES
from rcmae.engines.updates import cast_params
from rcmae.finetune import (
    encoder_sizes,
    judge,
    label_problems,
    new_classifier,
    start_weights,
    test_set,
)
from rcmae.models.build import student_sizes
from rcmae.models.classifier import Classifier, Probing, probe_head
from rcmae.models.flops import classifier_flops
from rcmae.objectives import Objective


class Probe:
    """The task of `rcmae.train.Task` that trains a head on frozen features."""

    command = "rcmae.probe"
    objectives: tuple[str, ...] = ("probe",)

    def __init__(self) -> None:
        self.encoder: Classifier | None = None  # what `problems` builds
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
        encoder, depth = new_classifier(recipe, 0), recipe.classify.depth
        self.report = start_weights(encoder, recipe)
        if depth is not None:
            if depth > len(encoder.blocks):
                return [
                    f"classify.depth={depth}: {recipe.model.name} has {len(encoder.blocks)} blocks"
                ]
            encoder.blocks = encoder.blocks[:depth]
        self.encoder = encoder
        return []

    def mask(self, recipe: Recipe) -> Mask:
        """Nothing is hidden."""
        student_sizes(recipe.model)
        return NoMask()

    def transform(self, recipe: Recipe) -> Transform:
        """A random box, flipped or not. Raises ValueError."""
        return train_transform(recipe)

    def student(self, recipe: Recipe) -> nn.Module:
        """The head."""
        assert self.encoder is not None
        assert recipe.classify.num_classes is not None
        if dist.rank() == 0:
            print(self.report, flush=True)
        encoder = self.encoder.to(dist.device()).eval().requires_grad_(False)
        cast_params(encoder, DTYPES[recipe.engine.precision])
        return probe_head(encoder.embed_dim, recipe.classify.num_classes)

    def objective(self, recipe: Recipe, sizes: Resolved) -> Objective:
        """Cross-entropy of the head on the encoder's features."""
        return Probing(self.features())

    def features(self) -> Callable[[Tensor], Tensor]:
        """Images to pooled features [B, D]."""
        encoder = self.encoder
        assert encoder is not None
        return lambda images: encoder.forward_head(encoder.encoded(images), pre_logits=True)

    def teacher(self, student: nn.Module, objective: Objective) -> nn.Module | None:
        """None."""
        return None

    def step_flops(
        self, recipe: Recipe, student: nn.Module, objective: Objective, num_visible: int
    ) -> float:
        """The encoder's forward; the head is nothing beside it."""
        sizes = encoder_sizes(recipe)
        return classifier_flops(**{**sizes, "depth": recipe.classify.depth or sizes["depth"]})

    def pair(self, recipe: Recipe, micros: list[Batch]) -> list[Batch]:
        """As they are."""
        return micros

    def ready(self, run: train.Run, batch: Batch) -> Batch:
        """As it is."""
        return batch

    def evaluate(self, run: train.Run) -> None:
        """Judge the head on the encoder. Collective: every rank calls."""
        features, head = self.features(), run.engine.student

        def score(images: Tensor) -> Tensor:
            with torch.no_grad():
                return head(features(images))

        judge(run, {"student": score})


def main(argv: Sequence[str] | None = None) -> int:
    """Probe by a command line; the exit status of this rank."""
    return train.main(argv, Probe())


if __name__ == "__main__":
    raise SystemExit(main())
