"""A whole Mask R-CNN: the five losses with every choice given, gradients, groups, inference."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rcmae.engines.optim import param_groups
from rcmae.models.detection import inference, losses
from rcmae.models.detection.boxes import LARGEST_STEP
from rcmae.models.detection.detector import Choices, Detector
from rcmae.models.detection.matching import match_anchors, match_regions, sample
from rcmae.models.detection.proposals import Proposed, propose
from rcmae.models.detection.sizes import (
    STRIDES,
    DetectorSizes,
    HeadSizes,
    ProposalSizes,
    RegionSizes,
)

from .detection import LEVELS, check_gradients, loaded, require, vitdet_sizes
from .fixture import EXACT, PRECISIONS, Fixture, Limit, Unusable
from .networks import gradients


class Case(NamedTuple):
    """The folder's images and objects, as the package takes them."""

    images: Tensor  # [B, 3, H, W] normalised and padded
    extents: Tensor  # [B, 4]
    targets: list[losses.Targets]


def detector_sizes(config: Mapping[str, Any]) -> DetectorSizes:
    """Of the folder's Mask R-CNN."""
    require(
        config,
        strides=list(STRIDES),
        scale_clamp=LARGEST_STEP,
        mask_target=2 * config["mask_resolution"],
        norm="LN",
        rpn_in=list(LEVELS),
        roi_in=list(LEVELS[:4]),
    )
    proposals = ProposalSizes(
        anchors=tuple(tuple(each) for each in config["anchor_sizes"]),
        ratios=tuple(config["aspect_ratios"]),
        iou=tuple(config["iou_anchors"]),
        sampled=config["anchors_per_image"],
        positive=config["anchor_positive"],
        per_level=tuple(config["pre_nms_topk"]),
        kept=tuple(config["post_nms_topk"]),
        nms=config["nms_rpn"],
        weights=tuple(config["anchor_weights"]),
        convs=config["rpn_convs"],
    )
    regions = RegionSizes(
        num_classes=config["num_classes"],
        iou=config["iou_proposals"],
        sampled=config["rois_per_image"],
        positive=config["roi_positive"],
        canonical=(config["canonical_box_size"], config["canonical_level"]),
        weights=tuple(config["box_weights"]),
        box_side=config["box_resolution"],
        mask_side=config["mask_resolution"],
        score=config["score_thresh"],
        nms=config["nms_test"],
        detections=config["topk_test"],
        heads=HeadSizes(config["box_convs"], config["box_fc"], config["mask_convs"]),
    )
    return DetectorSizes(vitdet_sizes(config), proposals, regions)


def case_of(fixture: Fixture, dtype: torch.dtype) -> Case:
    """Images normalised, then padded with 0 at bottom and right; masks packed on the canvas."""
    config = fixture.config
    inputs = fixture.arrays("inputs.safetensors")
    height, width = config["image_hw"]
    mean, std = (
        torch.tensor(config[key], dtype=dtype)[:, None, None] for key in ("pixel_mean", "pixel_std")
    )
    images = []
    targets = []
    for number, (h, w) in enumerate(config["sizes_hw"]):
        pixels = (inputs[f"{number}.image"].to(dtype) - mean) / std
        images.append(F.pad(pixels, (0, width - w, 0, height - h)))
        masks = F.pad(inputs[f"{number}.masks"], (0, width - w, 0, height - h))
        packed = torch.from_numpy(np.packbits(masks.numpy().astype(bool), axis=2))
        targets.append(
            losses.Targets(inputs[f"{number}.boxes"], inputs[f"{number}.classes"], packed)
        )
    extents = torch.tensor([[0.0, 0.0, w, h] for h, w in config["sizes_hw"]])
    return Case(torch.stack(images), extents, targets)


def recorded_choices(fixture: Fixture) -> Choices:
    """Anchors and regions that the recorded run had drawn."""
    recorded = fixture.arrays("choices.safetensors")
    objects = fixture.arrays("expected.safetensors")["anchor_object"]
    regions = [
        losses.Regions(
            recorded[f"{number}.region_boxes"],
            recorded[f"{number}.region_classes"],
            recorded[f"{number}.region_object"],
        )
        for number in range(len(fixture.config["sizes_hw"]))
    ]
    return Choices(recorded["anchor_labels"], objects, tuple(regions))


def maskrcnn_losses(fixture: Fixture) -> None:
    """A whole detector: anchors, matching, proposals, losses, gradients, groups, inference."""
    config = fixture.config
    sizes = detector_sizes(config)
    choices = recorded_choices(fixture)
    for precision, dtype in PRECISIONS.items():
        model = Detector(sizes)
        loaded(fixture, model, fixture.arrays("model.safetensors"))
        model.to(dtype).train()
        case = case_of(fixture, dtype)
        levels, found = model.look(case.images)
        check_shapes(fixture, levels)
        check_anchors(fixture, found, case, sizes, choices, precision)
        check_proposals(fixture, found, case, sizes, precision)
        check_heads(fixture, model, levels, case, choices, precision)
        check_losses(fixture, model, case, choices, precision)
    check_groups(fixture, Detector(sizes))
    check_inference(fixture, sizes)


def check_shapes(fixture: Fixture, levels: Sequence[Tensor]) -> None:
    """Of the levels."""
    for name, level, want in zip(LEVELS, levels, fixture.config["feature_shapes"], strict=True):
        got = list(level.shape[1:])
        fixture.true("shapes", name, got == want, f"{got}, recorded {want}")


def check_anchors(
    fixture: Fixture,
    found: Proposed,
    case: Case,
    sizes: DetectorSizes,
    choices: Choices,
    precision: str,
) -> None:
    """Anchors, what they show, what is said of them, and how many are sampled."""
    expected = fixture.arrays("expected.safetensors")
    limits = fixture.limits(precision)
    fixture.close("anchors", "anchors", found.anchors, expected["anchors"], EXACT, precision)
    fixture.close(
        "activations",
        "objectness",
        found.logits,
        expected["objectness"],
        limits.activation,
        precision,
    )
    fixture.close(
        "activations",
        "rpn_deltas",
        found.deltas,
        expected["rpn_deltas"],
        limits.activation,
        precision,
    )
    anchors = found.anchors.double()  # as recorded
    for number, target in enumerate(case.targets):
        match = match_anchors(anchors, target.boxes.double(), sizes.proposals.iou)
        label = choices.labels[number]
        for name, got, want in (
            ("anchor_match", match.kind, expected["anchor_match"][number]),
            ("anchor_object", match.object, expected["anchor_object"][number]),
        ):
            fixture.close("matching", f"{name} of image {number}", got, want, EXACT, precision)
        # of the sampling, whose luck is recorded: how many of each kind it takes
        taken = sample(
            match.kind,
            (label < 0).long(),
            sizes.proposals.sampled,
            sizes.proposals.positive,
        )
        for name, got, kind in zip(("foreground", "background"), taken, (1, 0), strict=True):
            want = (label == kind).nonzero()[:, 0]
            fixture.close("sampling", f"{name} of image {number}", got, want, EXACT, precision)


def check_proposals(
    fixture: Fixture, found: Proposed, case: Case, sizes: DetectorSizes, precision: str
) -> None:
    """Of training, in float32; and that the recorded regions match their objects."""
    expected = fixture.arrays("expected.safetensors")
    recorded = fixture.arrays("choices.safetensors")
    exact = found._replace(
        logits=expected["objectness"].float(), deltas=expected["rpn_deltas"].float()
    )
    limit = Limit(1e-4, 0.0)  # pixels: float32 numbers of a few hundred
    results = propose(exact, case.extents, sizes.proposals, training=True)
    for number, (result, target) in enumerate(zip(results, case.targets, strict=True)):
        for name, got, bound in (
            ("proposals", result.boxes, limit),
            ("proposal_logits", result.logits, EXACT),
        ):
            want = expected[f"{number}.{name}"]
            fixture.close("proposals", f"{number}.{name}", got, want, bound, precision)
        boxes = target.boxes.double()
        match = match_regions(recorded[f"{number}.region_boxes"].double(), boxes, sizes.regions.iou)
        got = torch.where(match.kind == 1, match.object, -1)
        want = recorded[f"{number}.region_object"]
        fixture.close("matching", f"{number}.region_object", got, want, EXACT, precision)
        everything = torch.cat([expected[f"{number}.proposals"].double(), boxes])
        kind = match_regions(everything, boxes, sizes.regions.iou).kind
        taken = sample(kind, torch.arange(len(kind)), sizes.regions.sampled, sizes.regions.positive)
        counts = [len(taken[0]), len(taken[1])]
        stated = [int((want >= 0).sum()), int((want < 0).sum())]
        fixture.true(
            "sampling", f"regions of image {number}", counts == stated, f"{counts}, not {stated}"
        )


def check_heads(
    fixture: Fixture,
    model: Detector,
    levels: Sequence[Tensor],
    case: Case,
    choices: Choices,
    precision: str,
) -> None:
    """Features of regions, scores, deltas, masks and their targets."""
    limit = fixture.limits(precision).activation
    expected = dict(fixture.arrays("expected.safetensors"))
    parts = fixture.arrays("expected_heads.safetensors")
    regions = choices.regions
    sizes = model.sizes.regions
    pooled = model.pool(levels, [each.boxes for each in regions], sizes.box_side)
    scored = model.roi_heads.boxes(pooled)
    shown = [each.boxes[each.object >= 0] for each in regions]
    classes = torch.cat([each.classes[each.object >= 0] for each in regions])
    masks = model.roi_heads.masks(model.pool(levels, shown, sizes.mask_side), classes)
    found = {
        "pooled": pooled[: len(regions[0].classes)],
        "class_scores": scored.scores,
        "box_deltas": scored.deltas.flatten(1),
        "mask_logits": masks,
    }
    want = {**parts, **{name: expected[name] for name in ("class_scores", "box_deltas")}}
    fixture.all_close("activations", found, want, limit, precision)
    width = case.images.shape[3]
    targets = [
        losses.mask_targets(seen, target, masks.shape[-1], width, masks.dtype)
        for seen, target in zip(regions, case.targets, strict=True)
    ]
    wanted = expected["mask_targets"]
    fixture.close("mask targets", "mask_targets", torch.cat(targets), wanted, EXACT, precision)


def check_losses(
    fixture: Fixture, model: Detector, case: Case, choices: Choices, precision: str
) -> None:
    """Of the whole batch and of each image; gradients of both sums."""
    limits = fixture.limits(precision)
    weights = fixture.config["loss_weights"]
    norms = fixture.value("grad_norm_total")
    for way, file in (("batch", "grads"), ("by_image", "grads_by_image")):
        levels, found = model.look(case.images)
        results = model.losses(levels, found, case.targets, choices)
        if way == "batch":
            got = results.of_batch()
        else:
            each = results.by_image()
            for name, values in fixture.value("losses_by_image").items():
                mine = each[name.removeprefix("loss_")]
                fixture.close("losses by image", name, mine, values, limits.loss, precision)
            got = {name: values.mean() for name, values in each.items()}
        for name, value in fixture.value("losses" if way == "batch" else way).items():
            mine = got[name.removeprefix("loss_")]
            fixture.close("losses", f"{way} {name}", mine, value, limits.loss, precision)
        total = torch.stack([got[name.removeprefix("loss_")] * weights[name] for name in weights])
        grads = gradients(model, total.sum())
        check_gradients(fixture, f"{file}.safetensors", grads, precision)
        norm = torch.stack([each.double().norm() for each in grads.values()]).norm()
        fixture.close("gradient norms", way, norm, norms[way], limits.gradient, precision)


def check_groups(fixture: Fixture, model: Detector) -> None:
    """Factor of the learning rate and weight decay of each parameter."""
    config = fixture.config
    got = {
        name: (group.get("lr_scale", 1.0), group["weight_decay"])
        for group in param_groups(model, config["weight_decay"], config["lr_decay"])
        for name in group["param_names"]
    }
    wanted = fixture.value("optimizer_groups")
    fixture.true("groups", "names", got.keys() == wanted.keys(), "other parameters than recorded")
    for name, group in wanted.items():
        want = [group["lr_scale"], group["weight_decay"]]
        fixture.close("groups", name, list(got[name]), want, Limit(0.0, 1e-9), "float64")


def check_inference(fixture: Fixture, sizes: DetectorSizes) -> None:
    """Detections in their order, and masks pasted at another size, in float32."""
    words = fixture.tolerance("float32")
    stated = re.search(r"boxes within (\S+) pixels, scores within (\S*\d)", words)
    scale = re.search(r"boxes scaled to (\S+) x the image's size", " ".join(fixture.words))
    share = re.search(r"allow (\S+) % of the pixels", " ".join(fixture.words))
    if stated is None or scale is None or share is None:
        raise Unusable("states no limits of inference")
    pixels, score = (Limit(float(each), 0.0) for each in stated.groups())
    expected = fixture.arrays("expected_inference.safetensors")
    model = Detector(sizes).eval()
    loaded(fixture, model, fixture.arrays("model.safetensors"))
    case = case_of(fixture, torch.float32)
    with torch.no_grad():
        levels, found = model.look(case.images)
        proposals = propose(found, case.extents, sizes.proposals, training=False)
        results = model.detect(levels, found, case.extents)
    for number, (h, w) in enumerate(fixture.config["sizes_hw"]):
        result = results[number]
        size = (round(h * float(scale[1])), round(w * float(scale[1])))
        resized = inference.rescaled(result, case.extents[number], size)
        for name, got, limit in (
            ("proposals", proposals[number].boxes, pixels),
            ("boxes", result.boxes, pixels),
            ("scores", result.scores, score),
            ("classes", result.classes, EXACT),
            ("mask_probabilities", result.masks, fixture.limits("float32").activation),
            ("resized_boxes", resized.boxes, pixels),
        ):
            want = expected[f"{number}.{name}"]
            fixture.close("inference", f"{number}.{name}", got, want, limit, "float32")
        masks = inference.paste(resized.masks, resized.boxes, size).flatten(1)
        want = losses.unpack(expected[f"{number}.resized_masks"], masks.shape[1])
        differing = float((masks != want).double().mean()) if masks.shape == want.shape else 1.0
        fixture.true(
            "pasted masks",
            f"{number}.resized_masks",
            differing <= float(share[1]) / 100,
            f"{differing:.2%} of the pixels differ",
            "float32",
        )
