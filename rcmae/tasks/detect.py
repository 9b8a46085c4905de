"""Detection: Mask R-CNN on a plain ViT that starts from pretrained weights, judged as COCO does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from rcmae import dist
from rcmae.config import Recipe, Resolved, Section
from rcmae.data import sources
from rcmae.data.batch import Batch
from rcmae.data.dense.annotated import Canvas, Fitted, Jittered
from rcmae.data.masking import Mask, NoMask
from rcmae.data.members.annotations import Annotations
from rcmae.data.members.protocol import Members
from rcmae.data.patterns import Patterns, shards_named
from rcmae.data.transforms import Transform
from rcmae.data.views import train_transform
from rcmae.errors import Refused
from rcmae.evaluation.detection.collect import collect, padded_with_zero
from rcmae.evaluation.detection.pictures import detections_picture
from rcmae.evaluation.detection.precision import Judged, judge
from rcmae.evaluation.features import evaluating
from rcmae.models.build import student_sizes
from rcmae.models.cost import StepCost
from rcmae.models.detection.build import COARSEST, detector_sizes, fit_detector, new_detector
from rcmae.models.detection.cost import detection_cost
from rcmae.models.detection.detector import Detector
from rcmae.models.fitting import Fit
from rcmae.objectives import Objective
from rcmae.objectives.detection import DetectionLoss
from rcmae.tasks import start
from rcmae.tasks.classify import same_source
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
    Score,
)
from rcmae.weights.detection import FORMATS as DETECTOR_FORMATS
from rcmae.weights.detectors import read_start
from rcmae.weights.formats import WeightsFormat
from rcmae.weights.names import published_names
from rcmae.weights.reading import NetworkWeights
from rcmae.weights.starting import function_problems, start_notes

CATEGORIES = "categories.json"
CATEGORIES_SHOWN = 30  # of a table for people
KINDS = {"bbox": "box", "segm": "mask"}  # of COCO's evaluation -> for people


class Found(NamedTuple):
    """What rank 0 read."""

    init: str | None  # where the weights are, for good: a checkpoint, not the run it is of
    weights: NetworkWeights | None  # their shapes
    categories: tuple[tuple[int, str], ...]  # of data.shards: id, name
    tested: tuple[tuple[int, str], ...]  # of evaluate.test_shards


class Detection:
    """The task of `rcmae detect`."""

    name = "detect"
    module = "rcmae.detect"
    options: type[Section] | None = None
    frozen: tuple[str, ...] = ("detect",)
    reports: tuple[str, ...] = ("detect.category_names", "detect.score", "detect.detections")
    metrics: Mapping[str, str] = MappingProxyType({"box_ap": "box AP"})
    formats: Mapping[str, WeightsFormat] = DETECTOR_FORMATS

    def look(self, recipe: Recipe, saved: Saved | None) -> Found:
        """Categories beside the shards, and the shapes of the weights that a new run starts from.

        Raises:
            Refused: they cannot be read.
        """
        options = recipe.detect
        init = options.init
        if saved is not None and saved.is_own:
            before = saved.meta["recipe"].get("detect", {}).get("init")
            init = before if init is None or same_source(init, before) else init
        elif init is not None:
            init = str(start.newest_of(Path(init)))
        weights = None
        if init is not None and saved is None:
            weights = start.look_at(
                "detect.init", init, options.network, first="teacher", read=read_start
            )
        tested = recipe.evaluate.test_shards if recipe.evaluate.every_steps else []
        return Found(
            init,
            weights,
            tuple(categories_beside("data.shards", recipe.data.shards)),
            tuple(categories_beside("evaluate.test_shards", tested)),
        )

    def judge(
        self, recipe: Recipe, found: Found | None, data: Data, saved: Saved | None, world: int
    ) -> Judgement:
        """Categories, sizes and weights that do not fit; fills in the categories."""
        judgement = Judgement()
        if found is None:
            return judgement
        judgement.values["detect.init"] = found.init
        nothing_is_known = not found.categories and recipe.detect.category_ids is None
        if data.train is None and nothing_is_known:  # the shards are a problem already
            return judgement
        judge_categories(recipe, found, saved, judgement)
        try:
            sizes = detector_sizes(recipe.model, recipe.detect)
        except Refused as error:
            judgement.problems.append(str(error))
            return judgement
        if found.weights is not None and not judgement.problems:
            regions = replace(sizes.regions, num_classes=judgement.values["detect.num_classes"])
            with torch.device("meta"):
                model = Detector(replace(sizes, regions=regions))
            where = f"detect.init={recipe.detect.init}"
            try:
                fitted = fit_detector(model, found.weights.weights, found.weights.grid)
            except Refused as error:
                name = f"model.name={recipe.model.name}"
                way = sizes_told(found.weights, self.name)
                judgement.problems.append(f"{where} with {name}: {error}{way}")
            else:
                judge_function(recipe, found.weights, fitted, judgement)
        return judgement

    def evaluation_sets(self, recipe: Recipe) -> Sequence[EvaluationSet]:
        """The test set."""
        if not recipe.evaluate.every_steps:
            return []
        shards = recipe.evaluate.test_shards
        return [
            EvaluationSet("evaluate.test_shards", shards, labelled=False, needs=("annotation",))
        ]

    def mask(self, recipe: Recipe) -> Mask:
        """The network sees every patch. Raises Refused for sizes that do not fit together."""
        student_sizes(recipe.model, stride=COARSEST)
        return NoMask()

    def transform(self, recipe: Recipe) -> Transform:
        """Of images alone; here `members` sees them."""
        return train_transform(recipe)

    def members(self, recipe: Recipe) -> Members | None:
        """Each image with its objects, jittered together."""
        return Jittered(
            canvas_of(recipe),
            tuple(recipe.detect.category_ids or ()),
            recipe.detect.scale,
            recipe.data.flip,
            recipe.detect.backbone,
            recipe.data.decode_margin,
        )

    def network(self, recipe: Recipe, found: Found | None, saved: Saved | None) -> nn.Module:
        """The detector; a new run's has the weights of detect.init. Collective."""
        model = new_detector(recipe.model, recipe.detect, recipe.run.seed)
        if saved is None and recipe.detect.init is not None:  # else they are in the checkpoint
            source = start.read_together(
                "detect.init",
                recipe.detect.init,
                recipe.detect.network,
                first="teacher",
                read=read_start,
            )
            fit_detector(model, source.weights, source.grid)
        return model

    def objective(self, recipe: Recipe, sizes: Resolved) -> Objective:
        """The five losses of Mask R-CNN."""
        return DetectionLoss(seed=recipe.run.seed, keeps_average=recipe.detect.average)

    def teacher(self, student: nn.Module, objective: Objective) -> nn.Module | None:
        """The average of the whole detector, where the recipe has one."""
        return copy.deepcopy(student) if objective.needs_teacher else None

    def optimizing(self, recipe: Recipe) -> Optimizing:
        """AdamW, with a learning rate that falls from layer to layer."""
        return Optimizing("adamw", recipe.detect.layer_decay)

    def cost(self, recipe: Recipe, *, fused_attention: bool = True) -> StepCost:
        """Forward and backward of the detector; its average computes nothing."""
        with torch.device("meta"):
            student = Detector(detector_sizes(recipe.model, recipe.detect))
        return detection_cost(
            student,
            averaged=recipe.detect.average,
            precision=recipe.engine.precision,
            checkpointing=recipe.engine.activation_checkpointing,
        )

    def pair(self, recipe: Recipe, micros: list[Batch]) -> list[Batch]:
        """No image needs another."""
        return micros

    def ready(
        self, recipe: Recipe, batch: Batch, normalise: Callable[[Batch], Batch], step: int
    ) -> Batch:
        """Padding 0 after normalisation; the benchmark's stays grey."""
        if recipe.detect.backbone == "benchmark":
            return batch
        assert batch.extra is not None
        extents = batch.extra["extents"]
        assert isinstance(extents, torch.Tensor)
        return replace(batch, images=padded_with_zero(batch.images, extents))

    def evaluate(self, context: Evaluating) -> Evaluated:
        """COCO's numbers of boxes and masks, of the detector and of its average."""
        networks = {"student": context.student}
        if context.teacher is not None:
            networks["average"] = context.teacher
        return judged(context, networks)

    def picture(self, context: Evaluating, batch: Batch) -> np.ndarray | None:
        """Nothing: each evaluation draws some of its images."""
        return None

    def hints(self, ended: Ended) -> list[tuple[str, str]]:
        """The detector for detectron2, and in Python."""
        if not ended.is_done:
            return []
        seen = f"rcmae visualize detect {ended.place} --images PHOTOS --out pictures"
        export = f"rcmae export {ended.place} --format detectron2 --out {ended.file('.pth')}"
        return [
            (f'in Python: rcmae.load_detector("{ended.run_dir}")', seen),
            ("for detectron2", export),
        ]


def canvas_of(recipe: Recipe) -> Canvas:
    """What images are put on."""
    return Canvas(
        recipe.model.image_hw,
        recipe.model.in_channels,
        tuple(recipe.data.mean[: recipe.model.in_channels]),
        recipe.data.max_pixels,
    )


def judge_function(
    recipe: Recipe, source: NetworkWeights, fitted: Fit, judgement: Judgement
) -> None:
    """What the encoder of weights that fit computes in another way; and what is taken of them."""
    where = f"detect.init={recipe.detect.init}"
    sizes = student_sizes(recipe.model)
    judgement.problems += [f"{where}: {told}" for told in function_problems(source, sizes)]
    judgement.notes += start_notes(source, sizes, fitted.table().strip(), where)
    patches = published_names(source.weights).get("patch_embed.proj.weight")
    if patches is not None and patches.shape[-1] != sizes.patch_size:
        judgement.notes.append(
            f"{where}: its patches of {patches.shape[-1]} pixels are interpolated to "
            f"{sizes.patch_size}"
        )


# -------------------------------------------------------------------------------------- categories


def categories_beside(key: str, shards: Patterns) -> list[tuple[int, str]]:
    """(id, name) of each category in categories.json beside the first shard; nothing where there is
    none. One process.

    Raises:
        Refused: it cannot be read.
    """
    if not shards:
        return []
    paths, _ = shards_named(shards)
    first = next(iter(paths), None)
    folder = sources.folder_of(first) if first else None
    if folder is None:
        return []
    where = f"{folder}/{CATEGORIES}"
    try:
        if "://" in folder:
            content = sources.small_file(where, sources.USUAL)
        else:
            content = Path(where).read_bytes() if Path(where).is_file() else None
        if content is None:
            return []
        return list(Annotations().read_beside(content.decode("utf-8-sig")).items())
    except (OSError, ValueError) as error:
        raise Refused(f"{key}: {sources.redacted(where)} has no categories: {error}") from error


def judge_categories(
    recipe: Recipe, found: Found, saved: Saved | None, judgement: Judgement
) -> None:
    """Fill in ids and names of the classes, of a run that resumes as they were; what stands against
    them.
    """
    options = recipe.detect
    ids = options.category_ids
    names = options.category_names
    if ids is None and saved is not None and saved.is_own:
        before = saved.meta["recipe"].get("detect", {})
        ids = before.get("category_ids")
        names = names or before.get("category_names")
    if ids is None and found.categories:
        ids = [number for number, _ in found.categories]
        names = names or [name for _, name in found.categories]
    if ids is None:
        judgement.problems.append(
            f"data.shards: no {CATEGORIES} lies beside them; put it there, or give "
            "detect.category_ids, COCO's id of each class"
        )
        return
    if len(set(ids)) < len(ids):
        judgement.problems.append("detect.category_ids: an id is there twice")
    if options.num_classes not in (None, len(ids)):
        judgement.problems.append(
            f"detect.num_classes={options.num_classes}, but there are {len(ids)} categories: "
            f"{', '.join(map(str, ids[:10]))}; leave detect.num_classes out"
        )
    known = dict(found.categories)
    new = [f"{number} ({name})" for number, name in found.tested if number not in set(ids)]
    if new:
        judgement.problems.append(
            f"evaluate.test_shards: {CATEGORIES} has {', '.join(new[:5])}, which data.shards have "
            "not; give test shards of the same categories"
        )
    renamed = [
        f"{number} is {known[number]!r} in data.shards and {name!r} in evaluate.test_shards"
        for number, name in found.tested
        if number in known and known[number] != name
    ]
    judgement.problems += [f"{CATEGORIES}: {told}" for told in renamed[:5]]
    names = names or [str(number) for number in ids]
    if len(names) != len(ids):
        judgement.problems.append(
            f"detect.category_names has {len(names)} names for {len(ids)} categories"
        )
    judgement.values |= {
        "detect.category_ids": ids,
        "detect.category_names": names,
        "detect.num_classes": len(ids),
    }


# ----------------------------------------------------------------------------------------- judging


def judged(context: Evaluating, networks: dict[str, nn.Module]) -> Evaluated:
    """How good detectors are on the test set. Collective: every rank calls."""
    recipe = context.recipe
    ids = recipe.detect.category_ids or []
    named = recipe.detect.category_names or [str(number) for number in ids]
    categories: list[dict[str, Any]] = []
    for number, name in zip(ids, named, strict=True):
        categories.append({"id": number, "name": name})
    canvas = canvas_of(recipe)
    make = Fitted(canvas, tuple(ids), recipe.evaluate.picture_images)
    with evaluating(*networks.values()):
        found = collect(
            networks,
            context.whole(0, make, ["annotation"]),
            canvas=canvas,
            categories=categories,
            normalise=context.normalise.images,
            device=context.device,
        )
    names = dict(zip(ids, named, strict=True))
    figures: dict[str, Any] = {}
    documents: dict[str, Any] = {}
    if dist.rank() == 0:
        for network, detections in found.detections.items():
            results = {kind: judge(found.truth, detections, kind) for kind in ("bbox", "segm")}
            figures[network] = {kind: results[kind].numbers for kind in results}
            documents[network] = {kind: _document(each, names) for kind, each in results.items()}
    images = len(found.truth["images"])
    figures, images = dist.from_first((figures, images))
    scalars = {
        f"{KINDS[kind]}_{network}": dict(numbers)
        for network, kinds in figures.items()
        for kind, numbers in kinds.items()
    }
    pictures = {}
    if found.drawn:
        pictures["detections"] = detections_picture(found.drawn, names)
    files = {
        "detections" if network == "student" else f"detections-{network}": each
        for network, each in found.detections.items()
    }
    return Evaluated(
        event={"detection": figures, "images": images},
        table="\n".join([table_of(figures), *categories_of(documents)]),
        caption=f"of {images:,} test images, AP in %",
        says=f"step {{step}}, {images} images of the test set",
        scalars=scalars,
        best={"student": Score("box_ap", 100 * figures["student"]["bbox"]["AP"])},
        document={"images": images, "networks": documents} if dist.rank() == 0 else None,
        files=files if dist.rank() == 0 else {},
        pictures=pictures,
    )


def _document(judged: Judged, names: Mapping[int, str]) -> dict[str, Any]:
    """The numbers, and AP of each category, for JSON."""
    by_category = [
        {"id": number, "name": names.get(number, str(number)), "AP": value}
        for number, value in judged.by_category.items()
    ]
    return {**judged.numbers, "categories": by_category}


def table_of(figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """COCO's numbers as text: a line a network and kind."""
    shown = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
    width = max((len(name) for name in figures), default=0) + 5
    lines = [" " * width + "".join(f"{name:>8}" for name in shown)]
    for network, kinds in figures.items():
        for kind, numbers in kinds.items():
            cells = [_cell(numbers[name]) for name in shown]
            lines.append(f"{network + ' ' + KINDS[kind]:<{width}}" + "".join(cells))
    return "\n".join(lines)


def categories_of(documents: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """AP of each category by the first network as text, a line each; of many, nothing: they are in
    the document.
    """
    kinds = next(iter(documents.values()), None)
    if kinds is None or len(kinds["bbox"]["categories"]) > CATEGORIES_SHOWN:
        return []
    boxes, masks = (kinds[kind]["categories"] for kind in KINDS)
    width = max((len(each["name"]) for each in boxes), default=0)
    lines = [f"{'':<{width}}  box AP mask AP"]
    for box, mask in zip(boxes, masks, strict=True):
        cells = [_cell(each["AP"]) for each in (box, mask)]
        lines.append(f"{box['name']:<{width}}{''.join(cells)}")
    return lines


def _cell(share: float) -> str:
    """In percent; a dash where there is no such object."""
    return f"{100 * share:8.2f}" if share >= 0 else f"{'-':>8}"
