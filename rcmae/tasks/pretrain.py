"""Pretraining: the student sees a part of each image and reconstructs the rest. k-NN judges it with
labels, spectra and the loss on a held set without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import torch
from torch import nn

from rcmae import dist
from rcmae.config import Recipe, Resolved, Section, ties_to_the_end
from rcmae.data.batch import Batch
from rcmae.data.masking import Mask
from rcmae.data.members.protocol import Members
from rcmae.data.transforms import Transform
from rcmae.data.views import train_transform
from rcmae.errors import Refused
from rcmae.evaluation.features import Extractor, evaluating, features_of_both, pixels, pooled
from rcmae.evaluation.knn import knn_rows, knn_table
from rcmae.evaluation.logistic import logistic_rows
from rcmae.evaluation.pictures import reconstruction_picture
from rcmae.evaluation.unlabelled.held import Held, Looking, Losing, look_at_held
from rcmae.models.activations import Computing
from rcmae.models.build import Network, new_network, new_student, new_teacher
from rcmae.models.cost import StepCost, pretraining_cost
from rcmae.objectives import Objective, make_objective, pixel_options
from rcmae.objectives.masks import make_mask
from rcmae.tasks import start
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
from rcmae.weights.formats import WeightsFormat
from rcmae.weights.reading import NetworkWeights
from rcmae.weights.starting import function_problems, start_notes, start_of


class Pretraining:
    """The task of `rcmae train`."""

    name = "pretrain"
    module = "rcmae.train"
    options: type[Section] | None = None
    frozen: tuple[str, ...] = ()
    reports: tuple[str, ...] = ()
    metrics: Mapping[str, str] = MappingProxyType({"knn": "k-NN"})
    formats: Mapping[str, WeightsFormat] = MappingProxyType({})

    def look(self, recipe: Recipe, saved: Saved | None) -> NetworkWeights | None:
        """The shapes of weights to start from."""
        init = recipe.checkpoint.init
        if init is None or saved is not None:
            return None
        return start.look_at("checkpoint.init", init, None, first="student")

    def judge(
        self,
        recipe: Recipe,
        found: NetworkWeights | None,
        data: Data,
        saved: Saved | None,
        world: int,
    ) -> Judgement:
        """Weights to start from that do not fit the network; what keeps a training of constant rate
        from being a trunk, as a note.
        """
        trunk = []
        if recipe.schedule.shape == "wsd" and saved is None:
            trunk = [f"no trunk for rcmae cooldown: {why}" for why in ties_to_the_end(recipe)]
        if found is None:
            return Judgement(notes=trunk)
        options = recipe.checkpoint
        where = f"checkpoint.init={options.init}"
        try:
            with torch.device("meta"):
                network = new_network(recipe)
                begun = start_of(network, found, options.init_decoder)
        except Refused as error:
            return Judgement([f"{where} with model.name={recipe.model.name}: {error}"])
        own = options.init_decoder == "file"
        problems = function_problems(found, network.sizes, decoder=own)
        return Judgement(
            [f"{where}: {problem}" for problem in problems],
            notes=[*start_notes(found, network.sizes, begun.table(), where), *trunk],
        )

    def evaluation_sets(self, recipe: Recipe) -> Sequence[EvaluationSet]:
        """Training and test set of the k-NN, where there are such, and a held set."""
        options = recipe.evaluate
        if not options.every_steps:
            return []
        held = []
        if options.held_shards and options.held_images:
            held = [EvaluationSet("evaluate.held_shards", options.held_shards, labelled=False)]
        if held and not has_neighbours(recipe):
            return held
        return [
            EvaluationSet("evaluate.train_shards", options.train_shards),
            EvaluationSet("evaluate.test_shards", options.test_shards),
            *held,
        ]

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

    def network(
        self, recipe: Recipe, found: NetworkWeights | None, saved: Saved | None
    ) -> nn.Module:
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
        """k-NN of student and teacher beside a random network and raw pixels, where there are
        labelled sets; effective ranks and loss on a held set.
        """
        options = context.recipe.evaluate
        networks = {"student": pooled(context.student, options.pool)}
        if context.teacher is not None:
            networks["teacher"] = pooled(context.teacher, options.pool)
        # first: a stop request that comes while neighbours are counted loses nothing
        held = held_of(self, context, networks) if options.held_images else None
        if not has_neighbours(context.recipe):
            return with_held(Evaluated({}, "", "", ""), held)
        return with_held(neighbours(context, networks), held)

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
        """The encoder for timm, and a fine-tuning of it by the generic recipe."""
        if not ended.is_done:
            return []
        place = ended.run_dir
        shards = "data.shards=LABELLED_SHARDS evaluate.test_shards=OTHERS"
        model = ended.recipe.model
        one = model.class_tokens == 1 and not model.registers  # what timm's own model has
        way = f"export {place} --format timm" if one else f"convert {place} --to timm"
        return [
            ("the encoder, for timm", f"rcmae {way} --out {place.name}.safetensors"),
            (
                "fine-tune it (or rcmae.probe probe: a linear head)",
                ended.start("rcmae.finetune", f"finetune classify.init={place} {shards}"),
            ),
        ]


def has_neighbours(recipe: Recipe) -> bool:
    """Whether there are sets for k-NN."""
    return bool(recipe.evaluate.train_shards or recipe.evaluate.test_shards)


def neighbours(context: Evaluating, trained: Mapping[str, Extractor]) -> Evaluated:
    """k-NN of these networks and of what does not train. Collective."""
    options = context.recipe.evaluate
    networks = dict(trained)
    if context.baselines:
        untrained = new_student(context.recipe).to(context.device)
        networks["random"] = pooled(untrained, options.pool)
        networks["pixels"] = pixels
    with evaluating(context.student, context.teacher):
        features = features_of_both(
            networks,
            context.batches(0),
            context.batches(1),
            device=context.device,
            normalise=context.normalise.images,
        )
    device = context.device
    rows = knn_rows(*features, k=options.k, device=device, temperature=options.temperature)
    linear = logistic_rows(*features, device=device) if options.logistic else {}
    scalars: dict[str, dict[str, float]] = {}
    for name, row in rows.items():
        scalars[f"knn_{name}"] = {f"k{k}": accuracy for k, accuracy in row.items()}
    if linear:
        scalars["logistic"] = linear
    return Evaluated(
        event={"knn": rows, "pool": options.pool, **({"logistic": linear} if linear else {})},
        table=knn_table(rows, linear),
        caption="k-NN, top-1 in %",
        says="k-NN at step {step}, top-1 in %",
        scalars=scalars,
        best={name: Score("knn", max(rows[name].values())) for name in trained},
    )


def held_of(task: Pretraining, context: Evaluating, networks: Mapping[str, Extractor]) -> Held:
    """Effective ranks and loss on the held set, or on the test set of the k-NN. Collective."""
    recipe = context.recipe
    looking = Looking(
        networks,
        context.normalise.images,
        context.device,
        mask=task.mask(recipe),
        teacher_masks=recipe.objective.teacher_sees == "different",
    )
    last = len(context.sets) - 1  # the held set, or else the test set
    with evaluating(context.student, context.teacher):
        return look_at_held(
            context.batches(last, recipe.evaluate.held_images),
            looking,
            Losing(context.student, context.teacher, context.objective),
        )


def with_held(found: Evaluated, held: Held | None) -> Evaluated:
    """What an evaluation found, with what was found without labels."""
    if held is None:
        return found
    about = {"images": held.images, "rankme": held.rankme, "lidar": held.lidar, **held.losses}
    return replace(
        found,
        event={**found.event, "held": about},
        table="\n".join(filter(None, [found.table, held.table()])),
        caption=found.caption or "without labels",
        says=found.says or "without labels, at step {step}",
        scalars={
            **found.scalars,
            "rankme": held.rankme,
            "lidar": held.lidar,
            "held": held.losses,
        },
        document={"held": {**about, "singular_values": held.spectra}},
        effective_rank=held.rankme,
    )
