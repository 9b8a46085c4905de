"""Problems between keys of a recipe that need neither the ranks nor the data to be seen."""

from __future__ import annotations

import math

from rcmae.config.objective import CLASSIFYING, Reads
from rcmae.config.recipe import OF_WEIGHTS, Recipe, is_under, known_keys
from rcmae.config.sections import ScheduleOptions
from rcmae.config.statistics import statistics_problems
from rcmae.errors import did_you_mean


def contradictions(recipe: Recipe) -> list[str]:
    """Problems between keys that need neither the ranks nor the data to be seen."""
    problems = _schedule_problems(recipe.schedule) + _rate_problems(recipe.schedule)
    problems += _allow_problems(recipe)
    problems += _data_problems(recipe)
    problems += _dense_problems(recipe)
    if recipe.task.name in CLASSIFYING:
        problems += _classifying_problems(recipe)
    elif recipe.task.name == "segment":
        problems += _segmenting_problems(recipe)
    elif recipe.task.name == "detect":
        problems += _detecting_problems(recipe)
    elif recipe.task.name == "pretrain" and knn_lacks_sets(recipe):
        problems.append(
            "evaluate.every_steps is set: give evaluate.train_shards and test_shards, both "
            "labelled, or evaluate.dense.train_shards and test_shards, both with label maps, or "
            "evaluate.held_shards, which need no labels"
        )
    if recipe.engine.name == "deepspeed" and recipe.engine.config is None:
        problems.append("engine.config: DeepSpeed needs its JSON, such as engine.config=zero2.json")
    if recipe.engine.name != "deepspeed" and recipe.engine.config is not None:
        problems.append(
            f"engine.config={recipe.engine.config} is DeepSpeed's, but "
            f"engine.name={recipe.engine.name}"
        )
    if recipe.engine.shard_ranks is not None and recipe.engine.name not in ("ddp", "fsdp2"):
        problems.append(
            f"engine.shard_ranks={recipe.engine.shard_ranks} is of ddp and fsdp2, but "
            f"engine.name={recipe.engine.name}; leave it out"
        )
    problems += _objective_problems(recipe)
    return problems + rounding_problems(recipe)


def rounding_problems(recipe: Recipe) -> list[str]:
    """A teacher that is rounded to bf16 in a training in fp32.

    Asked again where `engine.precision=auto` is resolved.
    """
    if recipe.teacher.accumulate != "stochastic" or recipe.engine.precision != "fp32":
        return []
    return [
        "teacher.accumulate=stochastic rounds to bf16: set engine.precision=bf16, or use fp32_shard"
    ]


def _schedule_problems(schedule: ScheduleOptions) -> list[str]:
    """Lengths and rates that are given twice, or not at all."""
    problems = []
    for one, other in (("epochs", "steps"), ("base_lr", "lr")):
        given = [name for name in (one, other) if getattr(schedule, name) is not None]
        if len(given) != 1:
            way_out = f"; schedule.{one}=null leaves out the recipe's" if len(given) == 2 else ""
            problems.append(
                f"schedule: give exactly one of {one} and {other}, got "
                f"{' and '.join(given) or 'neither'}{way_out}"
            )
    if schedule.cooldown_steps is not None:
        if schedule.shape != "wsd":
            problems.append(
                f"schedule.cooldown_steps is of schedule.shape=wsd, not {schedule.shape}; leave it "
                "out"
            )
        left = (schedule.steps or math.inf) - (schedule.warmup_steps or 0)
        if schedule.cooldown_steps > left:
            problems.append(
                f"schedule.cooldown_steps={schedule.cooldown_steps} is more than the {left} steps "
                "after the warm-up; give fewer"
            )
    if schedule.warmup_epochs is not None and schedule.warmup_steps is not None:
        problems.append("schedule: give warmup_epochs or warmup_steps, got both")
    return problems


def _rate_problems(schedule: ScheduleOptions) -> list[str]:
    """A learning rate that would rise to its end."""
    given = {"schedule.lr": schedule.lr, "schedule.base_lr": schedule.base_lr}
    return [
        f"schedule.min_lr={schedule.min_lr:g} is above {key}={peak:g}: the learning rate would "
        "rise to its end; give less"
        for key, peak in given.items()
        if peak is not None and schedule.min_lr > peak
    ]


def _allow_problems(recipe: Recipe) -> list[str]:
    """Keys of checkpoint.allow that are none, or may not change."""
    problems = []
    sections = list(Recipe.model_fields)
    for key in recipe.checkpoint.allow:
        section, dot, name = key.partition(".")
        if is_under(key, OF_WEIGHTS):
            problems.append(
                f"checkpoint.allow: {key} cannot change within a run: the weights would not fit"
            )
        elif section not in sections:
            problems.append(
                f"checkpoint.allow: unknown section {section!r}; {did_you_mean(section, sections)}"
            )
        elif dot and name not in (known := known_keys([section], dict(recipe.objective))):
            problems.append(f"checkpoint.allow: unknown key {key!r}; {did_you_mean(name, known)}")
    return problems


def _data_problems(recipe: Recipe) -> list[str]:
    """Shards that are not named, and numbers that no image could be prepared by."""
    data = recipe.data
    problems = []
    if not data.shards and data.images is None:
        problems.append(
            "data.shards: names no shards; give a path, a brace pattern, a glob or a list of them, "
            "or data.images=FOLDER"
        )
    if data.shards and data.images is not None:
        problems.append("data: give shards or images, got both")
    problems += statistics_problems(recipe)
    for key, top in (("crop_scale", 1.0), ("crop_ratio", math.inf)):
        low, high = getattr(data, key)
        if not (0 < low <= high <= top and math.isfinite(high)):
            problems.append(
                f"data.{key}: needs 0 < low <= high{' <= 1' if top == 1 else ''}, got [{low}, "
                f"{high}]"
            )
    if data.resize == "device" and data.decode != "cpu":
        problems.append(
            f"data.resize=device: the device that decodes (data.decode={data.decode}) resizes, "
            "too; leave data.resize out"
        )
    return problems


def _objective_problems(recipe: Recipe) -> list[str]:
    """Problems between what is to be learnt and the network that learns it."""
    problems = []
    objective = recipe.objective
    model = recipe.model
    regressors = recipe.decoder == "bootmae"
    own_features = "features" in getattr(objective.own, "reads", Reads()).student
    if objective.own_decoder == "bootmae" and not regressors and own_features:
        problems.append(
            f"objective.name={objective.name} has regressors: leave model.decoder out, or use mae "
            "with terms"
        )
    if regressors:
        needs = {
            "cls_token": True,
            "decoder_cls": True,
            "qkv_bias": "qkv",
            "positions": "column_first",
        }
        needs |= {"pixel_order": "hwc", "class_tokens": 1, "registers": 0, "drop_path": 0.0}
        needs |= {"position_table": "sincos"}
        given = [key for key, default in needs.items() if getattr(model, key) != default]
        if given:
            problems.append(
                f"model.{' and '.join(given)}: bootmae's network has its own; leave it out"
            )
        if "classes" in objective.student_outputs:
            problems.append(
                "objective: bootmae's network has no class head; use a class term with mae or rcmae"
            )
        if objective.teacher_sees == "different":
            problems.append(
                "objective.teacher_mask belongs to the consistency term; bootmae's teacher sees "
                "the "
                "whole image"
            )
    if not model.cls_token:
        problems += _tokenless_problems(recipe)
    return problems


def _tokenless_problems(recipe: Recipe) -> list[str]:
    """What asks for class tokens that the network has not."""
    problems = []
    objective, model = recipe.objective, recipe.model
    if model.class_tokens > 1:
        problems.append(
            f"model.class_tokens={model.class_tokens} and model.cls_token=false: leave one out"
        )
    if getattr(objective.own, "needs_class_token", False):
        problems.append(
            f"objective.name={objective.name} trains class tokens: leave model.cls_token=true and "
            "set model.class_tokens (8 are published), or use mae with objective.mask=grid"
        )
    pools = "cls" in model.class_pool or recipe.evaluate.pool.startswith("cls")
    if recipe.decoder != "bootmae" and pools:
        problems.append(
            "model.cls_token=false: there is no token to pool; use class_pool=mean and "
            "evaluate.pool=mean"
        )
    return problems


def _classifying_problems(recipe: Recipe) -> list[str]:
    """Problems of a recipe that fine-tunes or probes."""
    problems = []
    evaluate = recipe.evaluate
    classify = recipe.classify
    probes = recipe.task.name == "probe"
    if evaluate.every_steps and not evaluate.test_shards:
        problems.append("evaluate.every_steps is set: give evaluate.test_shards, labelled")
    if evaluate.picture_every_steps:
        problems.append(
            "evaluate.picture_every_steps is of a pretraining, which alone reconstructs; leave "
            "it out"
        )
    problems += _whole_on_the_cpu(recipe)
    if recipe.data.decode != "cpu":
        problems.append(
            f"data.decode={recipe.data.decode} applies to pretraining only: here images are "
            "augmented on "
            "the CPU"
        )
    if not probes and classify.rule != "adamw":
        problems.append(f"classify.rule={classify.rule} is for probes; fine-tuning uses adamw")
    if not probes and classify.depth is not None:
        problems.append("classify.depth is for probes; fine-tuning trains all blocks")
    trains = {
        "drop_path": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "smoothing": 0.0,
        "average": False,
        "layer_decay": 1.0,
    }
    if probes and (set_ := [key for key, off in trains.items() if getattr(classify, key) != off]):
        problems.append(
            f"classify.{' and '.join(set_)} is for fine-tuning; a probe's encoder is frozen"
        )
    if classify.average and recipe.teacher.update != "step":
        problems.append("classify.average is updated at each step: keep teacher.update=step")
    return problems


def _whole_on_the_cpu(recipe: Recipe) -> list[str]:
    """What asks for crops resized on the device where their pixels are needed before."""
    if recipe.data.resize == "workers":
        return []
    return [
        f"data.resize={recipe.data.resize} applies to pretraining only: here the workers go on "
        "with the resized crops; leave it out"
    ]


def _segmenting_problems(recipe: Recipe) -> list[str]:
    """Problems of a recipe that segments."""
    problems = []
    evaluate, segment = recipe.evaluate, recipe.segment
    linear = segment.head == "linear"
    if evaluate.every_steps and not evaluate.test_shards:
        problems.append("evaluate.every_steps is set: give evaluate.test_shards, with maps")
    if evaluate.picture_every_steps:
        problems.append(
            "evaluate.picture_every_steps is of a pretraining; a segmentation draws some pictures "
            "of the test set with each evaluation"
        )
    problems += _whole_on_the_cpu(recipe)
    if recipe.data.decode != "cpu":
        problems.append(
            f"data.decode={recipe.data.decode} is of a pretraining: here images are cut with their "
            "maps, on the CPU"
        )
    if segment.distort and recipe.model.in_channels != 3:
        problems.append(
            f"segment.distort is of colours, and model.in_channels={recipe.model.in_channels}; set "
            "segment.distort=false"
        )
    low, high = segment.scale
    if not 0 < low <= high <= 10:
        problems.append(f"segment.scale: wants 0 < low <= high <= 10, got [{low}, {high}]")
    if linear and segment.width is not None:
        problems.append("segment.width is of head=uper; set segment.width=null")
    if linear and segment.levels is not None:
        problems.append(
            "segment.levels is of head=uper; a linear head sees the last block: set "
            "segment.levels=null"
        )
    if segment.frozen and not linear:
        problems.append("segment.frozen is a probe: set segment.head=linear, or train the encoder")
    trains = {"drop_path": 0.0, "average": False, "layer_decay": 1.0}
    moved = [key for key, off in trains.items() if getattr(segment, key) != off]
    if segment.frozen and moved:
        off = " ".join(f"segment.{key}={str(trains[key]).lower()}" for key in moved)
        problems.append(f"segment.frozen trains the head alone: set {off}")
    if segment.average and recipe.teacher.update != "step":
        problems.append("segment.average moves at each step: leave teacher.update=step")
    if not recipe.model.cls_token:
        problems.append("model.cls_token=false: a segmenter's encoder has one; leave it out")
    if recipe.model.class_tokens > 1 and segment.relative_positions and not segment.frozen:
        problems.append(
            f"model.class_tokens={recipe.model.class_tokens}: relative positions are of patches "
            "and one class token; set segment.relative_positions=false"
        )
    if recipe.model.registers:
        problems.append("model.registers: a segmenter's encoder has none; leave it out")
    return problems


def _detecting_problems(recipe: Recipe) -> list[str]:
    """Problems of a recipe that trains a detector."""
    problems = []
    evaluate, detect = recipe.evaluate, recipe.detect
    if evaluate.every_steps and not evaluate.test_shards:
        problems.append("evaluate.every_steps is set: give evaluate.test_shards, annotated")
    if evaluate.picture_every_steps:
        problems.append(
            "evaluate.picture_every_steps is of a pretraining; a detection draws some images of "
            "the test set with each evaluation"
        )
    problems += _whole_on_the_cpu(recipe)
    if recipe.data.decode != "cpu":
        problems.append(
            f"data.decode={recipe.data.decode} applies to pretraining only: here images are cut "
            "with their "
            "objects, on the CPU"
        )
    if recipe.model.in_channels not in (1, 3):
        problems.append(f"model.in_channels={recipe.model.in_channels}: images have 1 or 3 here")
    low, high = detect.scale
    if not 0 < low <= high <= 10:
        problems.append(f"detect.scale: needs 0 < low <= high <= 10, got [{low}, {high}]")
    if detect.positions == "published" and detect.backbone == "vitdet":
        problems.append("detect.positions=published is of detect.backbone=benchmark; leave it out")
    if detect.average and recipe.teacher.update != "step":
        problems.append("detect.average moves at each step: leave teacher.update=step")
    return problems


def _dense_problems(recipe: Recipe) -> list[str]:
    """Neighbours of patches that can never be found."""
    dense = recipe.evaluate.dense
    if dense.k <= dense.bank:
        return []
    return [
        f"evaluate.dense.k={dense.k} neighbours of evaluate.dense.bank={dense.bank} patches; use "
        "fewer"
    ]


def knn_lacks_sets(recipe: Recipe) -> bool:
    """Whether an evaluation is asked for without any set, or with one of two that go together."""
    options = recipe.evaluate
    if not options.every_steps:
        return False
    pairs = [(bool(each.train_shards), bool(each.test_shards)) for each in (options, options.dense)]
    is_held = bool(options.held_shards and options.held_images)
    return any(one != other for one, other in pairs) or not (is_held or any(map(all, pairs)))
