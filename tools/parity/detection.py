"""Detectors: both backbones, the five losses with every choice given, inference, names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcmae.engines.optim import param_groups
from rcmae.models.blocks import Draws
from rcmae.models.detection import inference, losses
from rcmae.models.detection.benchmark import Pyramid
from rcmae.models.detection.boxes import LARGEST_STEP
from rcmae.models.detection.detector import Choices, Detector
from rcmae.models.detection.matching import match_anchors, match_regions, sample
from rcmae.models.detection.proposals import Proposed, propose
from rcmae.models.detection.sizes import (
    STRIDES,
    BackboneSizes,
    DetectorSizes,
    HeadSizes,
    ProposalSizes,
    RegionSizes,
    windowed_blocks,
)
from rcmae.models.detection.vitdet import SimplePyramid
from rcmae.models.sizes import NetworkSizes

from .architectures import named_sizes
from .fixture import EXACT, PRECISIONS, Fixture, Limit, Unusable
from .networks import gradients, image_size, without_key_bias

LEVELS = ("p2", "p3", "p4", "p5", "p6")


def require(config: Mapping[str, Any], **ours: Any) -> None:
    """Raise Unusable where the folder has another setting than the package knows."""
    for key, value in ours.items():
        if config.get(key, value) != value:
            raise Unusable(f"config.{key}={config[key]}: this package has {value}")


def vit_sizes(config: Mapping[str, Any]) -> NetworkSizes:
    """Of the folder's ViT on its canvas."""
    return NetworkSizes(
        image_size=image_size(config),
        patch_size=config["patch_size"],
        in_channels=config.get("in_chans", 3),
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config.get("mlp_ratio", 4),
    )


def vitdet_sizes(config: Mapping[str, Any]) -> BackboneSizes:
    """Of the folder's ViTDet."""
    table = config["pretrain_img_size"] // config["patch_size"]
    return BackboneSizes(
        vit=vit_sizes(config),
        window=config["window_size"],
        windowed=tuple(config["window_block_indexes"]),
        channels=config["out_channels"],
        table=(table, table),
    )


def loaded(fixture: Fixture, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The recorded weights, strictly; tables that the package computes are compared."""
    state = dict(state)
    for name, table in dict(model.named_buffers()).items():
        if name not in model.state_dict() and name in state:
            fixture.close("tables", name, table, state.pop(name), EXACT)
    problem = ""
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        problem = str(error)
    fixture.true("weights load strictly", "model.safetensors", not problem, problem)


def vitdet_backbone(fixture: Fixture) -> None:
    """ViTDet's backbone: positions, blocks, levels and gradients."""
    config = fixture.config
    require(
        config,
        layer_norm_eps=1e-6,
        qkv_bias=True,
        use_rel_pos=True,
        use_abs_pos=True,
        pretrain_use_cls_token=True,
        drop_path=0.0,
        scale_factors=[4.0, 2.0, 1.0, 0.5],
        norm="LN",
        levels=list(LEVELS),
        strides=dict(zip(LEVELS, STRIDES, strict=True)),
    )
    inputs = fixture.arrays("inputs.safetensors")
    expected = fixture.arrays("expected.safetensors")
    for precision, dtype in PRECISIONS.items():
        model = SimplePyramid(vitdet_sizes(config), Draws())
        loaded(fixture, model, fixture.arrays("model.safetensors"))
        model.to(dtype)
        images = inputs["images"].to(dtype)
        grid = (images.shape[2] // config["patch_size"], images.shape[3] // config["patch_size"])
        limit = fixture.limits(precision).activation
        found = {"positions": model.net.positions(grid), "patch_embed": model.net.embed(images)}
        outputs = recorded_blocks(model.net.blocks)
        levels = model(images)
        found |= {f"block.{number}": each for number, each in outputs.items()}
        found |= {f"level.{name}": each for name, each in zip(LEVELS, levels, strict=True)}
        fixture.all_close("activations", found, expected, limit, precision)
        probed(fixture, model, levels, inputs, precision)
    if fixture.has("lr_scale"):
        wanted = fixture.value("lr_scale")
        detector = detector_around(vitdet_sizes(config))
        got = lr_scales(detector, config["lr_decay"])
        for name, scale in wanted.items():
            limit = fixture.limits("float64").weight
            fixture.close("lr scales", name, got[f"backbone.{name}"], scale, limit, "float64")


def recorded_blocks(blocks: Sequence[nn.Module] | nn.ModuleList) -> dict[int, Tensor]:
    """Filled with what each block gives when the model is called."""
    found: dict[int, Tensor] = {}
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda *call, number=number: found.update({number: call[-1]}))
    return found


def probed(
    fixture: Fixture,
    model: nn.Module,
    levels: Sequence[Tensor],
    inputs: Mapping[str, Tensor],
    precision: str,
    without: Sequence[str] = (),
) -> None:
    """The loss that the probes make of the levels, and its gradients."""
    limits = fixture.limits(precision)
    parts = [
        (level * inputs[f"probe.{name}"].to(level.dtype)).sum()
        for name, level in zip(LEVELS, levels, strict=True)
    ]
    loss = torch.stack(parts).sum() / 100
    fixture.close("losses", "loss", loss, fixture.value("loss"), limits.loss, precision)
    extra = {name: each for name, each in model.named_buffers() if each.requires_grad}
    grads = gradients(model, loss)
    grads |= {name: each.grad for name, each in extra.items() if each.grad is not None}
    check_gradients(fixture, "grads.safetensors", grads, precision, without)
    if fixture.has("grad_norm"):
        norms = {name: each.double().norm() for name, each in grads.items()}
        wanted = {
            name: torch.tensor(each, dtype=torch.float64)
            for name, each in fixture.value("grad_norm").items()
            if name not in without
        }
        fixture.all_close("gradient norms", norms, wanted, limits.gradient, precision)


def check_gradients(
    fixture: Fixture,
    file: str,
    grads: Mapping[str, Tensor],
    precision: str,
    without: Sequence[str] = (),
) -> None:
    """Of each parameter; the key third of a qkv.bias, whose gradient is 0, is left out."""
    want = fixture.arrays(file)
    for name in without:
        if name in want:
            fixture.leave_out(f"{file}/{name}", "its true gradient is 0: what is there is rounding")
    fixture.all_close(
        file.removesuffix(".safetensors"),
        {name: without_key_bias(name, each) for name, each in grads.items()},
        {name: without_key_bias(name, each) for name, each in want.items() if name not in without},
        fixture.limits(precision).gradient,
        precision,
    )


def lr_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Parameter -> factor of its learning rate."""
    return {
        name: group.get("lr_scale", 1.0)
        for group in param_groups(model, 0.1, decay)
        for name in group["param_names"]
    }


def detector_around(backbone: BackboneSizes, **options: Any) -> Detector:
    """A detector of any heads."""
    regions = RegionSizes(num_classes=2, heads=HeadSizes(box_width=8))
    with torch.device("meta"):
        return Detector(DetectorSizes(backbone, ProposalSizes(), regions, **options))


def benchmark_backbone(fixture: Fixture) -> None:
    """The backbone of arXiv 2111.11429: blocks, adapters, levels, gradients, statistics."""
    config = fixture.config
    require(
        config,
        layer_norm_eps=1e-6,
        qkv_bias=True,
        drop_path=0.0,
        batch_norm_momentum=0.1,
        batch_norm_eps=1e-5,
        group_norm_eps=1e-5,
        levels=list(LEVELS),
        strides=dict(zip(LEVELS, STRIDES, strict=True)),
    )
    inputs = fixture.arrays("inputs.safetensors")
    expected = fixture.arrays("expected.safetensors")
    state = fixture.arrays("model.safetensors")
    zero = fixture.value("zero_gradients") if fixture.has("zero_gradients") else []
    sizes = BackboneSizes(
        vit=vit_sizes(config),
        window=config["window_size"],
        windowed=windowed_blocks(config["depth"]),
        channels=config["out_channels"],
        groups=config["group_norm_groups"],
        positions="row_first",  # as published
    )
    for precision, dtype in PRECISIONS.items():
        model = Pyramid(sizes, Draws())
        fixture.close(
            "position tables",
            "bottom_up.pos_embed",
            model.bottom_up.pos_embed,
            state["bottom_up.pos_embed"],
            Limit(1e-6, 0.0),
        )
        loaded(fixture, model, state)
        model.to(dtype).train()
        model.bottom_up.pos_embed.requires_grad_(True)
        outputs = recorded_blocks(model.bottom_up.blocks)
        adapted = recorded_blocks(model.bottom_up.ms_adaptor)
        levels = model(inputs["images"].to(dtype))
        found = {f"block.{number}": each for number, each in outputs.items()}
        found |= {f"adapted.s{number}": each for number, each in adapted.items()}
        found |= {f"level.{name}": each for name, each in zip(LEVELS, levels, strict=True)}
        limits = fixture.limits(precision)
        fixture.all_close("activations", found, expected, limits.activation, precision)
        after = model.state_dict()
        want = fixture.arrays("statistics.safetensors")
        fixture.all_close("statistics", after, want, limits.activation, precision)
        probed(fixture, model, levels, inputs, precision, zero)


# ------------------------------------------------------------------------------------------ losses


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


def detect_arch_names(fixture: Fixture) -> None:
    """Names, shapes and counts of published detectors."""
    config = fixture.config
    for name in config["built"]:
        stated = fixture.value(name)
        kind, _, size = name.partition("/")
        side = config["image"]
        vit = named_sizes(f"{size}_patch{config['patch_size']}", (side, side))
        if vit is None or kind not in ("vitdet", "benchmark"):
            fixture.true("architectures", name, False, "is none that is known here")
            continue
        model = published(vit, kind, config["classes"])
        entries = model.state_dict() | dict(model.named_buffers())
        got = {key: list(value.shape) for key, value in entries.items()}
        wanted = stated["shapes"]
        differing = sorted(
            key for key in got.keys() | wanted.keys() if got.get(key) != wanted.get(key)
        )
        fixture.true(
            "names and shapes", name, not differing, f"differ in {', '.join(differing[:5])}"
        )
        # the benchmark's fixed positions are a table here and a parameter without gradient there
        fixed = [each for key, each in model.named_buffers() if key.endswith("pos_embed")]
        trained = sum(param.numel() for param in [*model.parameters(), *fixed])
        for what, mine in (("parameters", trained), ("entries", len(got))):
            fixture.true(
                "counts", f"{name} {what}", mine == stated[what], f"{mine}, not {stated[what]}"
            )


def published(vit: NetworkSizes, kind: str, classes: int) -> Detector:
    """A detector of the published settings, on no device."""
    sizes = DetectorSizes(
        BackboneSizes(
            dataclasses.replace(vit, decoder_dim=0, decoder_depth=0, decoder_heads=0),
            window=14 if kind == "vitdet" else 16,
            windowed=windowed_blocks(vit.depth),
        ),
        ProposalSizes(),
        RegionSizes(classes),
        kind="vitdet" if kind == "vitdet" else "benchmark",
    )
    with torch.device("meta"):
        return Detector(sizes)
