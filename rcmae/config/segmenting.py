"""Problems between keys of a recipe that segments."""

from __future__ import annotations

from rcmae.config.recipe import Recipe


def segmenting_problems(recipe: Recipe) -> list[str]:
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
        problems.append("segment.width is of head=uper; a linear head has the encoder's")
    if linear and segment.levels is not None:
        problems.append("segment.levels is of head=uper; a linear head sees the last block")
    if segment.frozen and not linear:
        problems.append("segment.frozen is a probe: set segment.head=linear, or train the encoder")
    trains = {"drop_path": 0.0, "average": False, "layer_decay": 1.0}
    moved = [key for key, off in trains.items() if getattr(segment, key) != off]
    if segment.frozen and moved:
        problems.append(f"segment.{' and '.join(moved)}: a probe's encoder is frozen; leave it out")
    if segment.average and recipe.teacher.update != "step":
        problems.append("segment.average moves at each step: leave teacher.update=step")
    if not recipe.model.cls_token:
        problems.append("model.cls_token=false: a segmenter's encoder has one; leave it out")
    return problems
