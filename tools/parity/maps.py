"""Images with maps: areas of classes, and crops to train on with every draw recorded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rcmae.data.dense import distortion, geometry
from rcmae.data.dense.distortion import Distortion
from rcmae.data.dense.maps import NONE, without_zero
from rcmae.data.transforms import Normalise
from rcmae.evaluation.dense.scores import Areas, confusion

from .fixture import EXACT, Fixture, Limit, Unusable

Config = Mapping[str, Any]

# ------------------------------------------------------------------------------------- the areas


def miou(fixture: Fixture) -> None:
    """Areas and their ratios, over all images and of each."""
    maps = fixture.arrays("maps.safetensors")
    classes = fixture.config["num_classes"]
    count = fixture.config["images"]
    taken = [maps[f"prediction_{number}"] for number in range(count)]
    labels = [maps[f"label_{number}"] for number in range(count)]
    raw = [torch.from_numpy(without_zero(maps[f"raw_{number}"].numpy())) for number in range(count)]
    for case, given in (("plain", labels), ("reduce_zero_label", raw)):
        each = [confusion(*pair, classes) for pair in zip(given, taken, strict=True)]
        _check_areas(fixture, case, each)
        if case == "plain":
            wanted = fixture.value("confusion")
            fixture.close("counts", "confusion", torch.stack(each).sum(dim=0), wanted, EXACT)
            means = [Areas.of(matrix).mean_iou for matrix in each]
            _check_ratios(
                fixture, "one image", means, fixture.value("one_image")["mIoU_of_each_image"]
            )
            _check_special(fixture, Areas.of(torch.stack(each).sum(dim=0)))


def _check_areas(fixture: Fixture, case: str, each: Sequence[Tensor]) -> None:
    stated = fixture.value(case)
    total = Areas.of(torch.stack(list(each)).sum(dim=0))
    counts = {
        "intersect": total.shared,
        "union": total.union,
        "predicted": total.predicted,
        "labelled": total.labelled,
        "intersect_of_image": torch.stack([Areas.of(matrix).shared for matrix in each]),
        "labelled_of_image": torch.stack([Areas.of(matrix).labelled for matrix in each]),
        "pixels_counted": total.labelled.sum(),
    }
    for name, got in counts.items():
        fixture.close("counts", f"{case} {name}", got, stated[name], EXACT)
    ratios = {
        "iou": total.iou.tolist(),
        "acc": total.accuracy.tolist(),
        "aAcc": [total.pixel_accuracy],
        "mIoU": [total.mean_iou],
        "mAcc": [total.mean_accuracy],
    }
    for name, values in ratios.items():
        want = stated[name] if isinstance(stated[name], list) else [stated[name]]
        _check_ratios(fixture, f"{case} {name}", values, want)
    known = counts.keys() | ratios.keys()
    fixture.true("values that are known", case, stated.keys() <= known, "are more")


def _check_ratios(
    fixture: Fixture, name: str, got: Sequence[float], want: Sequence[float | None]
) -> None:
    """Numbers of which null is none."""
    absent = [value is None for value in want]
    same = [value != value for value in got] == absent
    fixture.true("classes without a value", name, same, "are others")
    pairs = [(mine, theirs) for mine, theirs in zip(got, want, strict=True) if theirs is not None]
    both = [[pair[side] for pair in pairs] for side in (0, 1)]
    fixture.same("ratios", name, *both)


def _check_special(fixture: Fixture, areas: Areas) -> None:
    special = {
        "absent": (areas.labelled == 0) & (areas.predicted == 0),
        "only_predicted": (areas.labelled == 0) & (areas.predicted > 0),
        "never_predicted": (areas.labelled > 0) & (areas.predicted == 0),
    }
    for name, numbers in fixture.value("classes").items():
        same = special[name].nonzero().flatten().tolist() == numbers
        fixture.true("special classes", name, same, "are others")


# -------------------------------------------------------------------------------- images and maps


def seg_augment(fixture: Fixture) -> None:
    """Each stage from a photograph and its map to a training crop, with the recorded draws."""
    config = fixture.config
    limits = geometry.Limits(*config["img_scale"])
    arrays = fixture.arrays("stages.safetensors")
    known = set()
    for case in fixture.value("cases"):
        known |= _check_stages(fixture, case, limits, arrays)
    alone = fixture.value("alone")
    for name, (kind, draw) in alone.items():
        how = Distortion(**{kind: draw}, contrast_first=True)
        got = distortion.distorted(arrays["alone_before"].numpy(), how)
        _check_colours(
            fixture, name, torch.from_numpy(got), arrays[name], hsv=kind in ("saturation", "hue")
        )
    left = sorted(arrays.keys() - known - alone.keys() - {"alone_before"})
    fixture.true("arrays that are known", "stages", not left, f"{left} are none of them")
    crop = min(config["crop"])
    whole = _stated_limits(fixture, "train_sizes")
    for height, width, factor, *size in fixture.value("train_sizes"):
        mine = geometry.within((height, width), whole.times(factor))
        fixture.close("sizes", f"{height}x{width} x {factor}", mine, size, EXACT)
    whole = _stated_limits(fixture, "test_sizes")
    for height, width, *size in fixture.value("test_sizes"):
        fixture.close(
            "sizes", f"{height}x{width}", geometry.within((height, width), whole), size, EXACT
        )
    whole = _stated_limits(fixture, "multi_scale_test_sizes")
    for height, width, factor, *size in fixture.value("multi_scale_test_sizes"):
        shorter = max(int(whole.shorter * factor), _stated_crop(fixture, crop))
        mine = geometry.at_least((height, width), shorter)
        fixture.close("sizes", f"{height}x{width} x {factor}, test", mine, size, EXACT)


def _stated_limits(fixture: Fixture, value: str) -> geometry.Limits:
    """The limits that a table of sizes is for, in the folder's words."""
    found = re.search(r"limits \((\d+), (\d+)\)", fixture.meaning_of(value))
    if found is None:
        raise Unusable(f"{value} states no limits")
    return geometry.Limits(int(found[1]), int(found[2]))


def _stated_crop(fixture: Fixture, otherwise: int) -> int:
    found = re.search(r"for crop (\d+)", fixture.meaning_of("multi_scale_test_sizes"))
    return int(found[1]) if found else otherwise


def _check_stages(
    fixture: Fixture, case: Config, limits: geometry.Limits, arrays: Mapping[str, Tensor]
) -> set[str]:
    """A photograph's way; the names of the arrays that it has met."""
    config = fixture.config
    number = case["case"]
    crop = (config["crop"][0], config["crop"][1])
    names = set()

    def stage(name: str) -> Tensor:
        names.add(f"{name}_{number}")
        return arrays[f"{name}_{number}"]

    def exact(name: str, got: Tensor | Any, want: Tensor | Any) -> None:
        fixture.close("maps, boxes, sizes", f"{name} {number}", got, want, EXACT)

    image, values = stage("image"), torch.from_numpy(without_zero(stage("raw_map").numpy()))
    exact("map", values, stage("map"))
    low, high = config["ratio_range"]
    factor = low + (high - low) * case["scale_draw"]
    rows, columns = image.shape[:2]
    size = geometry.within((rows, columns), limits.times(factor))
    exact("scaled size", size, case["scaled_size"])
    bigger = geometry.resize_image(image.permute(2, 0, 1), size, antialias=False).permute(1, 2, 0)
    _check_resized(fixture, f"image {number}", bigger, stage("scaled_image"))
    exact("scaled map", geometry.resize_map(stage("map"), size), stage("scaled_map"))

    drawn = [tuple(box) for box in case["boxes_drawn"]]
    ranges = [max(side - length, 0) + 1 for side, length in zip(size, crop, strict=True)]
    exact("ranges of boxes", ranges, case["offset_ranges"])
    extremes = geometry.boxes(size, crop, np.array([0.0, 0.0, 1.0 - 1e-12, 1.0 - 1e-12]))
    exact("range of boxes", extremes, [[0, 0], [end - 1 for end in ranges]])
    box = geometry.mixed_box(stage("scaled_map"), crop, drawn, config["cat_max_ratio"])
    exact("box", box, case["box"])
    looked_at = min(len(drawn), config["tries"])
    mixed = [
        geometry.mixed_box(stage("scaled_map"), crop, [one, (-1, -1)], config["cat_max_ratio"])
        == one
        for one in drawn[:looked_at]
    ]
    wanted = [False] * (looked_at - 1) + [len(drawn) <= config["tries"]]
    exact("boxes passed over", mixed, wanted)
    small = geometry.cut(stage("scaled_image").permute(2, 0, 1), box, crop)
    exact("cropped image", small.permute(1, 2, 0), stage("cropped_image"))
    exact("cropped map", geometry.cut(stage("scaled_map"), box, crop), stage("cropped_map"))

    flips = case["flip_draw"] < config["flip"]
    exact("flip", flips, case["flipped"])
    flipped = small.flip(-1) if flips else small
    exact("flipped image", flipped.permute(1, 2, 0), stage("undistorted"))
    cut = stage("cropped_map")
    exact("flipped map", cut.flip(-1) if flips else cut, stage("flipped_map"))

    told = case["distortion"]
    how = Distortion(
        told["brightness"],
        told["contrast"],
        told["saturation"],
        _whole(told["hue"]),
        told["mode"] == 1,
    )
    got = torch.from_numpy(distortion.distorted(stage("undistorted").numpy(), how))
    hsv = how.saturation is not None or how.hue is not None
    _check_colours(fixture, f"distorted {number}", got, stage("distorted"), hsv=hsv, chained=True)

    filled = geometry.padded(stage("distorted").permute(2, 0, 1), crop, 0)
    mean, std = ([value / 255 for value in config[key]] for key in ("mean", "std"))
    normalised = Normalise(mean, std).images(filled[None])[0]
    rows, columns = stage("distorted").shape[:2]
    normalised[:, rows:] = 0.0
    normalised[:, :, columns:] = 0.0
    limit = Limit(1e-6, 0.0)
    fixture.close("final images", f"{number}", normalised, stage("final_image"), limit, "float32")
    exact("final map", geometry.padded(stage("flipped_map"), crop, NONE), stage("final_map"))
    return names


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _check_resized(fixture: Fixture, name: str, got: Tensor, want: Tensor) -> None:
    levels = _stated(fixture, r"resize (\d+) level")
    fixture.close("resized images", name, got, want, Limit(levels, 0.0), "float32")


def _check_colours(
    fixture: Fixture, name: str, got: Tensor, want: Tensor, *, hsv: bool, chained: bool = False
) -> None:
    """Distorted colours: brightness and contrast to the level, saturation and hue nearly so."""
    most = _stated(fixture, r"saturation and hue (\d+) levels") if hsv else 0.0
    if chained and hsv:
        most *= max(1.0, fixture.config["contrast_range"][1])  # a contrast stretches what is off
    fixture.close("colours", name, got, want, Limit(most, 0.0), "float32")
    if hsv:
        mean = (got.double() - want.double()).abs().mean()
        limit = Limit(_stated(fixture, r"and (\d\.\d+) in the mean;"), 0.0)
        fixture.close("colours, mean", name, mean, 0.0, limit, "float32")


def _stated(fixture: Fixture, pattern: str) -> float:
    """A limit in the folder's words."""
    text = fixture.tolerance("float32")
    text = text[text.index("Limits:") :] if "Limits:" in text else text
    found = re.search(pattern, text)
    if found is None:
        raise Unusable(f"states no limit {pattern!r} for float32: {text!r}")
    return float(found[1])
