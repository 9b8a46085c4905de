"""What a detector is fed and how it is judged: jitter, schedules, COCO's average precision."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rcmae.data.dense.jitter import Jitter, jitter_of, on_canvas, seen_pixels
from rcmae.data.dense.objects import Objects, objects_on
from rcmae.engines.schedules import Shape, Warmup, learning_rate
from rcmae.evaluation.detection.precision import judge
from rcmae.models.detection.losses import unpack

from .fixture import EXACT, Fixture, Limit, Unusable


def detect_inputs(fixture: Fixture) -> None:
    """Images, masks and boxes after every recorded jitter; the schedules of both methods."""
    target = fixture.config["target"]
    annotations = fixture.value("annotations")
    for case in fixture.value("cases"):
        jitter = jitter_of(
            tuple(case["image_hw"]),
            (target, target),
            scale=case["scale"],
            offset=case["offset"],
            flipped=case["flipped"],
            style=case["style"],
        )
        name = f"{case['case']}.{case['style']}"
        for key, got in (
            ("resized_hw", list(jitter.resized)),
            ("crop_top_left", [jitter.top, jitter.left]),
        ):
            fixture.true("geometry", f"{name} {key}", got == case[key], f"{got}, not {case[key]}")
        given = list(annotations[case["case"]])
        number_of = list(range(len(given)))
        if case["style"] == "benchmark":  # recorded for polygons alone
            number_of = [n for n in number_of if isinstance(given[n]["segmentation"], list)]
        objects = objects_on([given[n] for n in number_of], jitter, _classes(given))
        numbers = [number_of[n] for n in objects.numbers.tolist()]
        kept = case["objects_kept"]
        fixture.true("objects kept", name, numbers == kept, f"{numbers}, recorded {kept}")
        _check_view(fixture, case, jitter, objects, numbers)
    _check_schedules(fixture)


def _classes(annotations: list[dict[str, Any]]) -> dict[int, int]:
    """Categories are the classes here."""
    return {each["category_id"]: each["category_id"] for each in annotations}


def _check_view(
    fixture: Fixture, case: Mapping[str, Any], jitter: Jitter, objects: Objects, numbers: list[int]
) -> None:
    words = " ".join(fixture.words)
    levels = re.search(r"allow a difference of (\d+) levels", words)
    share = re.search(r"allow (\d+) %, and a pixel in a box", words)
    if levels is None or share is None:
        raise Unusable("states no limits for images and masks")
    expected = fixture.arrays("expected.safetensors")
    name = f"{case['case']}.{case['style']}"
    source = fixture.arrays("inputs.safetensors")[f"{case['case']}.image"].numpy()
    height, width = case["output_hw"]
    image = on_canvas(seen_pixels(source, jitter), jitter)[:, :height, :width]
    limit = Limit(float(levels[1]), 0.0)
    got = torch.from_numpy(image.transpose(1, 2, 0).copy())
    fixture.close("images", f"{name}.image", got, expected[f"{name}.image"], limit)
    one = Limit(1.0, 0.0)
    fixture.close("boxes", f"{name}.boxes", objects.boxes, expected[f"{name}.boxes"], one)
    for key, values in (("classes", objects.classes), ("object", np.array(numbers))):
        fixture.close("objects", f"{name}.{key}", values, expected[f"{name}.{key}"], EXACT)
    masks = unpack(torch.from_numpy(objects.masks), jitter.canvas[1])[:, :height, :width]
    want = unpack(expected[f"{name}.masks"], height * width).unflatten(1, (height, width))
    _check_masks(fixture, name, masks, want, float(share[1]) / 100)


def _check_masks(fixture: Fixture, name: str, masks: Tensor, want: Tensor, share: float) -> None:
    """Pixels of each object that differ, over its own."""
    if masks.shape != want.shape:
        fixture.true("masks", f"{name}.masks", False, f"{list(masks.shape)}, {list(want.shape)}")
        return
    for number, (mine, theirs) in enumerate(zip(masks, want, strict=True)):
        differing = int((mine != theirs).sum())
        # of a small object one pixel is more than its share
        allowed = max(1.0, share * int(theirs.sum()))
        fixture.true(
            "masks",
            f"{name}.masks of object {number}",
            differing <= allowed,
            f"{differing} pixels differ, of {int(theirs.sum())}",
        )


def _check_schedules(fixture: Fixture) -> None:
    """Factors of the learning rate."""
    for name, stated in fixture.value("schedules").items():
        steps = stated["steps"]
        kind = stated["kind"]
        milestones = tuple(each / steps for each in stated["milestones"] or ())
        shape = Shape(name="steps" if kind == "steps" else "cosine", milestones=milestones)
        start = re.search(r"warmup_factor (\S+)", " ".join(fixture.words))
        if start is None:
            raise Unusable("states no factor of the warm-up")
        warmup = Warmup(stated["warmup_steps"], float(start[1]), "to_schedule")
        for step, want in stated["factor_at"].items():
            got = learning_rate(
                int(step), total_steps=steps, lr=1.0, min_lr=0.0, shape=shape, warmup=warmup
            )
            limit = fixture.limits("float64").weight
            fixture.close("schedules", f"{name} at {step}", got, want, limit, "float64")


def coco_ap(fixture: Fixture) -> None:
    """COCO's twelve numbers, and what they are averaged from, of boxes and masks."""
    documents = {}
    for name, stated in fixture.other_files.items():
        data = (fixture.path / name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        right = digest == stated["sha256"]
        fixture.true("sha256 of files", name, right, "not the file that is described")
        documents[name] = json.loads(data)
    expected = fixture.arrays("expected.safetensors")
    limit = fixture.limits("float64").activation
    for kind in ("bbox", "segm"):
        judged = judge(documents["gt.json"], documents["dt.json"], kind)
        numbers = fixture.value(f"{kind}.stats")
        for key, want in numbers.items():
            fixture.close("numbers", f"{kind} {key}", judged.numbers[key], want, limit, "float64")
        for key, want in fixture.value(f"{kind}.AP_by_category").items():
            got = judged.by_category[int(key)]
            fixture.close("categories", f"{kind} {key}", got, want, limit, "float64")
        for key, values in (("precision", judged.precision[:, ::10]), ("recall", judged.recall)):
            want = expected[f"{kind}.{key}"]
            fixture.close("curves", f"{kind}.{key}", values, want, limit, "float64")
