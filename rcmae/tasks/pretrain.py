"""Pretraining: the student sees a part of each image and reconstructs the rest. k-NN judges it with
labels, spectra and the loss on a held set without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from rcmae import dist
from rcmae.config import Recipe, Resolved, Section, ties_to_the_end
from rcmae.data.batch import Batch
from rcmae.data.masking import Mask
from rcmae.data.members.protocol import Members
from rcmae.data.sets import names_given
from rcmae.data.transforms import Transform
from rcmae.data.views import train_transform
from rcmae.errors import Refused
from rcmae.evaluation.features import evaluating
from rcmae.evaluation.pictures import reconstruction_picture
from rcmae.models.activations import Computing
from rcmae.models.build import Network, new_network, new_student, new_teacher
from rcmae.models.cost import StepCost, pretraining_cost
from rcmae.objectives import Objective, make_objective, pixel_options
from rcmae.objectives.masks import make_mask
from rcmae.plugins import is_plugin
from rcmae.tasks import judging, start
from rcmae.tasks.checking import try_objective
from rcmae.tasks.following import sizes_told
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
from rcmae.weights.formats import WeightsFormat
from rcmae.weights.reading import NetworkWeights
from rcmae.weights.starting import function_problems, start_notes, start_of


class Found(NamedTuple):
    """What rank 0 read for a pretraining."""

    weights: NetworkWeights | None  # the shapes of those to start from
    dense_names: tuple[str, ...]  # of evaluate.dense.class_names


class Pretraining:
    """The task of `rcmae train`."""

    name = "pretrain"
    module = "rcmae.train"
    options: type[Section] | None = None
    frozen: tuple[str, ...] = ()
    reports: tuple[str, ...] = ()
    metrics: Mapping[str, str] = MappingProxyType({"knn": "k-NN", "miou": "dense k-NN"})
    formats: Mapping[str, WeightsFormat] = MappingProxyType({})

    def look(self, recipe: Recipe, saved: Saved | None) -> Found:
        """The shapes of weights to start from, and names of classes."""
        dense = recipe.evaluate.dense
        names = names_given("evaluate.dense.class_names", dense.class_names)
        init = recipe.checkpoint.init
        if init is None or saved is not None:
            return Found(None, names)
        return Found(start.look_at("checkpoint.init", init, None, first="student"), names)

    def judge(
        self,
        recipe: Recipe,
        found: Found | None,
        data: Data,
        saved: Saved | None,
        world: int,
    ) -> Judgement:
        """Weights to start from that do not fit the network; what keeps a training of constant rate
        from being a trunk, as a note.
        """
        names = found.dense_names if found is not None else ()
        judgement = judging.judge_dense(recipe, data, names)
        if saved is None and is_plugin(recipe.objective.name):
            tried = try_objective(recipe)
            judgement.problems += tried.problems
            judgement.warnings += tried.doubts
        if recipe.schedule.shape == "wsd" and saved is None:
            judgement.notes += [
                f"no trunk for rcmae cooldown: {why}" for why in ties_to_the_end(recipe)
            ]
        if found is None or found.weights is None:
            return judgement
        options, weights = recipe.checkpoint, found.weights
        where = f"checkpoint.init={options.init}"
        try:
            with torch.device("meta"):
                network = new_network(recipe)
                begun = start_of(network, weights, options.init_decoder)
        except Refused as error:
            way = sizes_told(weights, recipe.task.name)
            judgement.problems.append(f"{where} with model.name={recipe.model.name}: {error}{way}")
            return judgement
        own = options.init_decoder == "file"
        problems = function_problems(weights, network.sizes, decoder=own)
        judgement.problems += [f"{where}: {problem}" for problem in problems]
        judgement.notes += start_notes(weights, network.sizes, begun.table(), where)
        return judgement

    def evaluation_sets(self, recipe: Recipe) -> Sequence[EvaluationSet]:
        """Training and test set of the k-NN and of the dense k-NN, and a held set: those that there
        are.
        """
        return list(judging.sets_of(recipe))

    def mask(self, recipe: Recipe) -> Mask:
        """That of the recipe, for the network's grid. Raises Refused."""
        with torch.device("meta"):
            grid = new_network(recipe).grid
        return make_mask(recipe, grid)

    def transform(self, recipe: Recipe) -> Transform:
        """A random box of the image, flipped or not. Raises Refused."""
        return train_transform(recipe)

    def members(self, recipe: Recipe) -> Members | None:
        """Nothing but image and label."""
        return None

    def network(self, recipe: Recipe, found: Found | None, saved: Saved | None) -> nn.Module:
        """The student: weights of run.seed, or those of checkpoint.init. Collective."""
        student = new_student(recipe)
        init = recipe.checkpoint.init
        if init is not None and saved is None:
            source = start.read_together("checkpoint.init", init, None, first="student")
            begun = start_of(student, source, recipe.checkpoint.init_decoder)
            student.load_state_dict(begun.state)
            if "pos_embed" in begun.taken and dist.rank() == 0:
                print(f"checkpoint.init={init}: positions are the file's own", flush=True)
        return student

    def objective(self, recipe: Recipe, sizes: Resolved) -> Objective:
        """The recipe's: a published one, and the terms added to it."""
        return make_objective(recipe, sizes)

    def teacher(self, student: nn.Module, objective: Objective) -> nn.Module | None:
        """The parts of the student that the objective asks a teacher for."""
        assert isinstance(student, Network)
        return new_teacher(student, objective.teacher_outputs)

    def optimizing(self, recipe: Recipe) -> Optimizing:
        """AdamW, one learning rate for all layers."""
        return Optimizing()

    def cost(self, recipe: Recipe, *, fused_attention: bool = True) -> StepCost:
        """Student and teacher on the visible patches, or a teacher's encoder on all."""
        with torch.device("meta"):
            student = new_network(recipe, norm="torch")
        engine = recipe.engine
        return pretraining_cost(
            student,
            teacher_outputs=recipe.objective.teacher_outputs,
            teacher=recipe.objective.teacher_parts,
            num_visible=make_mask(recipe, student.grid).num_visible,
            computing=Computing(engine.precision, engine.activation_checkpointing, fused_attention),
        )

    def pair(self, recipe: Recipe, micros: list[Batch]) -> list[Batch]:
        """The same batches: no image needs another."""
        return micros

    def ready(
        self, recipe: Recipe, batch: Batch, normalise: Callable[[Batch], Batch], step: int
    ) -> Batch:
        """The same batch."""
        return batch

    def evaluate(self, context: Evaluating) -> Evaluated:
        """What the features are worth, by k-NN of images and of pixels and without labels."""
        return judging.judged(context, self.mask(context.recipe))

    def picture(self, context: Evaluating, batch: Batch) -> np.ndarray | None:
        """Input, what was hidden, and what student and teacher make of it."""
        recipe = context.recipe
        # a teacher of features alone draws nothing
        teacher = context.teacher if "pixels" in recipe.objective.teacher_outputs else None
        pixel = pixel_options(recipe.objective)
        with evaluating(context.student, teacher):
            return reconstruction_picture(
                context.student,
                teacher,
                batch,
                mean=recipe.data.mean,
                std=recipe.data.std,
                norm_pix_loss=pixel.norm_pix_loss,
                pixel_norm=pixel.norm,
                title=f"Reconstruction of hidden patches, step {context.step}",
            )

    def hints(self, ended: Ended) -> list[tuple[str, str]]:
        """The encoder for timm, a fine-tuning of it by the generic recipe, and other tasks."""
        if not ended.is_done:
            return []
        place = ended.place
        shards = "data.shards=LABELLED_SHARDS evaluate.test_shards=OTHERS"
        model = ended.recipe.model
        one = model.class_tokens == 1 and not model.registers  # what timm's own model has
        way = f"export {place} --format timm" if one else f"convert {place} --to timm"
        return [
            ("the encoder, for timm", f"rcmae {way} --out {ended.file('.safetensors')}"),
            (
                "fine-tune it (or rcmae probe probe: a linear head)",
                ended.start("rcmae.finetune", f"finetune classify.init={place} {shards}"),
            ),
            (
                f"segment.init={place} and detect.init={place} start segmenters and detectors",
                "rcmae segment --help",
            ),
        ]
