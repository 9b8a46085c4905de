"""Semantic segmentation: UPerNet on an encoder that is trained, or a linear head, also on one that
is frozen and runs beside the engine (a dense probe).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rcmae import dist
from rcmae.config import Recipe, Resolved, Section
from rcmae.data.batch import Batch
from rcmae.data.dense.crops import EXTENTS, without_padding
from rcmae.data.dense.maps import none_of
from rcmae.data.masking import Mask, NoMask
from rcmae.data.members.protocol import Members
from rcmae.data.sets import names_given
from rcmae.data.transforms import Transform
from rcmae.data.views import train_transform
from rcmae.engines.protocol import DTYPES
from rcmae.engines.updates import cast_params
from rcmae.errors import Refused
from rcmae.evaluation.dense.drawing import segments_picture
from rcmae.evaluation.dense.judging import Prepare, judge
from rcmae.evaluation.dense.judging import Score as Network
from rcmae.evaluation.dense.loading import sight_of
from rcmae.evaluation.dense.scores import (
    CLASSES_SHOWN,
    Areas,
    classes_table,
    finite,
    named,
    scores_table,
    worst_confusions,
)
from rcmae.evaluation.features import evaluating
from rcmae.models.activations import Computing
from rcmae.models.build import student_sizes
from rcmae.models.cost import StepCost
from rcmae.models.segmentation.backbone import Backbone
from rcmae.models.segmentation.build import heads_of, meta_segmenter, new_segmenter
from rcmae.models.segmentation.cost import dense_probe_cost, segmenter_cost
from rcmae.models.segmentation.segmenter import DenseProbe
from rcmae.objectives import Objective
from rcmae.objectives.segmentation import SegmentationLoss, maps_of
from rcmae.tasks.protocol import (
    Data,
    Ended,
    Evaluated,
    Evaluating,
    EvaluationSet,
    Judgement,
    Optimizing,
    Saved,
    Score,
)
from rcmae.tasks.segmenting import (
    USUAL_CLASSES,
    Found,
    crops_of,
    judge_segmentation,
    labels_of,
    look_at_classes,
    start_weights,
)
from rcmae.weights.formats import WeightsFormat
from rcmae.weights.segmenters import SEGMENTER_FORMATS

PICTURES = 4  # of the test set that an evaluation draws


class Segmentation:
    """The task of `rcmae segment`. A probe's `network` keeps the encoder for `objective`."""

    name = "segment"
    module = "rcmae.segment"
    options: type[Section] | None = None
    frozen: tuple[str, ...] = ("segment",)
    reports: tuple[str, ...] = (
        "segment.class_names",
        "segment.test_stride",
        "segment.test_scales",
        "segment.test_flip",
    )
    metrics: Mapping[str, str] = MappingProxyType({"miou": "mIoU"})
    formats: Mapping[str, WeightsFormat] = SEGMENTER_FORMATS

    def __init__(self) -> None:
        self.encoder: Backbone | None = None  # of a probe: frozen, no part of what is trained
        self.trained = TrainedClasses()

    def look(self, recipe: Recipe, saved: Saved | None) -> Found:
        """Class names, and the shapes of the weights that a new run starts from."""
        return look_at_classes(recipe, saved)

    def judge(
        self, recipe: Recipe, found: Found | None, data: Data, saved: Saved | None, world: int
    ) -> Judgement:
        """Classes, levels and weights that do not fit; fills in the number of classes."""
        return judge_segmentation(recipe, found, data)

    def evaluation_sets(self, recipe: Recipe) -> Sequence[EvaluationSet]:
        """The test set."""
        if not recipe.evaluate.every_steps:
            return []
        shards = recipe.evaluate.test_shards
        return [EvaluationSet("evaluate.test_shards", shards, labelled=False, needs=("map",))]

    def mask(self, recipe: Recipe) -> Mask:
        """The network sees every patch. Raises Refused for sizes that do not fit together."""
        try:
            student_sizes(recipe.model)
        except Refused as error:
            raise Refused(f"{error} (model.image_size is segment.crop)") from error
        return NoMask()

    def transform(self, recipe: Recipe) -> Transform:
        """Of images without maps, which there are none of. Raises Refused."""
        return train_transform(recipe)

    def members(self, recipe: Recipe) -> Members | None:
        """Image and map, cut together."""
        return crops_of(recipe)

    def network(self, recipe: Recipe, found: Found | None, saved: Saved | None) -> nn.Module:
        """The segmenter, or a probe's head; a new run's encoder has the weights of segment.init.
        Collective.
        """
        num_classes = recipe.segment.num_classes or 0
        model = new_segmenter(recipe, num_classes)
        if saved is None or recipe.segment.frozen:  # else the weights are in the checkpoint
            start_weights(model, recipe)
        if not recipe.segment.frozen:
            return model
        encoder = model.backbone.to(dist.device()).eval().requires_grad_(False)
        cast_params(encoder, DTYPES[recipe.engine.precision])
        self.encoder = encoder
        return DenseProbe(encoder.sizes.embed_dim, heads_of(recipe, num_classes))

    def objective(self, recipe: Recipe, sizes: Resolved) -> Objective:
        """Cross-entropy of each labelled pixel."""
        options = recipe.segment
        return SegmentationLoss(
            auxiliary=options.aux_weight if options.head == "uper" else 0.0,
            mean_over=options.mean_over,
            seed=recipe.run.seed,
            keeps_average=options.average,
            encoder=self.encoder,
        )

    def teacher(self, student: nn.Module, objective: Objective) -> nn.Module | None:
        """The average of the whole network, where the recipe has one."""
        return copy.deepcopy(student) if objective.needs_teacher else None

    def optimizing(self, recipe: Recipe) -> Optimizing:
        """AdamW, with a learning rate that falls from layer to layer."""
        return Optimizing("adamw", recipe.segment.layer_decay)

    def cost(self, recipe: Recipe, *, fused_attention: bool = True) -> StepCost:
        """Forward and backward of the network; of a probe the encoder's forward."""
        engine, options = recipe.engine, recipe.segment
        num_classes = options.num_classes or USUAL_CLASSES
        sizes = student_sizes(recipe.model)
        if options.frozen:
            with torch.device("meta"):
                head = DenseProbe(sizes.embed_dim, heads_of(recipe, num_classes))
            return dense_probe_cost(head, sizes, num_classes, precision=engine.precision)
        computing = Computing(engine.precision, engine.activation_checkpointing, fused_attention)
        model = meta_segmenter(recipe, num_classes)
        return segmenter_cost(model, num_classes, averaged=options.average, computing=computing)

    def pair(self, recipe: Recipe, micros: list[Batch]) -> list[Batch]:
        """The same batches: no image needs another."""
        return micros

    def ready(
        self, recipe: Recipe, batch: Batch, normalise: Callable[[Batch], Batch], step: int
    ) -> Batch:
        """The batch with its padding 0, the mean's grey."""
        assert batch.extra is not None
        extents = batch.extra[EXTENTS]
        assert isinstance(extents, Tensor)
        assert recipe.segment.num_classes is not None
        self.trained.add(maps_of(batch), recipe.segment.num_classes)
        return replace(batch, images=without_padding(batch.images, extents))

    def evaluate(self, context: Evaluating) -> Evaluated:
        """mIoU and accuracies on the test set, of the network and of its average."""
        networks: dict[str, Network] = {"student": self._score(context.student)}
        if context.teacher is not None:
            networks["average"] = self._score(context.teacher)
        return judged(context, networks, self.trained)

    def _score(self, network: nn.Module) -> Network:
        """Normalised images to logits."""
        encoder = self.encoder

        def score(images: Tensor) -> Tensor:
            logits: Tensor = network(images if encoder is None else encoder(images))[0]
            return logits

        return score

    def picture(self, context: Evaluating, batch: Batch) -> np.ndarray | None:
        """Nothing: pictures come with each evaluation."""
        return None

    def hints(self, ended: Ended) -> list[tuple[str, str]]:
        """The segmenter for others, in Python, and its pictures of one's own photographs."""
        if not ended.is_done:
            return []
        export = f"rcmae export {ended.place} --format mmseg --out {ended.file('.pth')}"
        seen = f"rcmae visualize segment {ended.place} --images PHOTOS --out pictures"
        hints = [(f'in Python: rcmae.load_segmenter("{ended.run_dir}")', seen)]
        one_token = ended.recipe.model.class_tokens == 1  # no other code has more
        if ended.recipe.segment.head == "uper" and one_token:
            height, width = ended.recipe.model.image_hw
            also = " (or --format hf-upernet: transformers)" if height == width else ""
            hints.append((f"for mmsegmentation{also}", export))
        return hints


def judged(
    context: Evaluating, networks: Mapping[str, Network], trained: TrainedClasses
) -> Evaluated:
    """How good networks are on the test set, and which of its classes had no label in training.
    Collective: every rank calls.
    """
    recipe = context.recipe
    num_classes = recipe.segment.num_classes
    assert num_classes is not None
    sight = sight_of(recipe)
    prepare = Prepare(sight, labels_of(recipe), recipe.data.max_pixels)
    matrices: dict[str, Tensor] = {}
    drawn: dict[str, np.ndarray] = {}
    names = named(class_names(recipe) if dist.rank() == 0 else (), num_classes)
    with evaluating(context.student, context.teacher):
        for network, score in networks.items():
            matrices[network], shown = judge(
                score,
                context.whole(0, prepare, kinds=("map",)),
                sight,
                num_classes=num_classes,
                batch=recipe.evaluate.batch,
                normalise=context.normalise.images,
                device=context.device,
                show=PICTURES,
            )
            if shown:
                suffix = "" if network == "student" else f"-{network}"
                drawn[f"segments{suffix}"] = segments_picture(shown, num_classes, names)
    areas = {name: Areas.of(matrix) for name, matrix in matrices.items()}
    figures = {name: each.figures() for name, each in areas.items()}
    pixels = int(areas["student"].labelled.sum())
    missing = [names[index] for index in trained.missing(areas["student"].labelled)]
    return Evaluated(
        event={"segmentation": {name: finite(row) for name, row in figures.items()}},
        table="\n".join([scores_table(areas, names), *untrained(missing)]),
        caption=f"of {pixels:,} labelled pixels, in %",
        says=f"step {{step}}, {pixels:,} labelled pixels of the test set",
        scalars={f"segmentation_{name}": row for name, row in figures.items()},
        best={name: Score("miou", row["miou"]) for name, row in figures.items()},
        document={"networks": documents(matrices, figures, names), "untrained": missing},
        pictures=drawn,
    )


class TrainedClasses:
    """Which classes had a label in the crops of this process since it started."""

    def __init__(self) -> None:
        self._shown: Tensor | None = None  # [classes + 1] of 0 and 1, the last for no label

    def add(self, maps: Tensor, num_classes: int) -> None:
        """Note the labels of maps [B, H, W]. Does not wait for the device."""
        if self._shown is None:
            self._shown = torch.zeros(num_classes + 1, dtype=torch.long, device=maps.device)
        slots = maps.masked_fill(maps == none_of(maps), num_classes)
        self._shown.index_fill_(0, slots.flatten().long(), 1)

    def missing(self, labelled: Tensor) -> list[int]:
        """The classes that have labelled pixels [classes] and had none in any rank's crops; none
        before the first step. Collective: every rank calls.
        """
        none = torch.zeros(len(labelled) + 1, dtype=torch.long, device=dist.device())
        shown = dist.all_sum(none if self._shown is None else self._shown.clone()).cpu()
        if not shown.any():
            return []
        return ((labelled.cpu() > 0) & (shown[:-1] == 0)).nonzero().flatten().tolist()


def untrained(names: Sequence[str]) -> list[str]:
    """A line for classes that are judged and were in no crop, or none."""
    if not names:
        return []
    shown = ", ".join(names[:CLASSES_SHOWN])
    more = f" and {len(names) - CLASSES_SHOWN} more" * (len(names) > CLASSES_SHOWN)
    return [f"in no training crop since the start: {shown}{more}"]


def documents(
    matrices: Mapping[str, Tensor], figures: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """The table of classes of each network, for JSON."""
    return {
        name: {
            **finite(figures[name]),
            "classes": classes_table(matrix, names),
            "confused": worst_confusions(matrix, names),
        }
        for name, matrix in matrices.items()
    }


def class_names(recipe: Recipe) -> tuple[str, ...]:
    """Names for tables; a file that is gone meanwhile costs the names, and not the evaluation."""
    try:
        return names_given("segment.class_names", recipe.segment.class_names)
    except Refused:
        return ()
