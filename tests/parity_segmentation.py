"""Folders of recorded numbers of segmentation, made from plain mathematics."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import segmentation_reference as plain
import torch
from segmentation_reference import Plan, State
from torch import Tensor
from torch.nn import functional as F

Write = Callable[..., Path]
NOISE = ("fpn1.0.bias", "fpn1.3.bias", "fpn2.0.bias")  # gradients of 0, and rounding
RATIOS = (
    "sizes, maps exact",
    "Limits: brightness and contrast 0 levels; resize 1 level; saturation and hue 4 levels and "
    "0.6 in the mean; suggested limits 1e-6, 1e-6, 1e-6 and 1e-6",
)


def config_of(plan: Plan, **more: Any) -> dict[str, Any]:
    return {
        "img_size": list(plan.image),
        "patch_size": plan.patch,
        "embed_dim": plan.width,
        "depth": plan.depth,
        "num_heads": plan.heads,
        "mlp_ratio": 4,
        "out_indices": list(plan.levels),
        "grid": list(plan.grid),
        **more,
    }


def heads_of(plan: Plan) -> dict[str, Any]:
    return {
        "channels": plan.head_width,
        "aux_channels": plan.aux_width,
        "num_classes": plan.classes,
        "pool_scales": list(plan.scales),
        "aux_weight": 0.3,
    }


def statistics(state: State) -> State:
    return {name: value for name, value in state.items() if "running" in name}


def grads_of(state: State) -> State:
    return {name: value.grad for name, value in state.items() if value.grad is not None}


def seg_backbone(folder: Path, write: Write) -> Path:
    plans = {"mae": Plan(depth=5, levels=(0, 2, 3, 4)), "bootmae": Plan(split=True)}
    plans["bootmae"] = Plan(depth=5, levels=(0, 2, 3, 4), split=True)
    old = Plan(image=(12, 12), depth=5, split=True)
    generator = torch.Generator().manual_seed(1)
    checkpoint = {
        name: value
        for name, value in plain.drawn(plain.backbone_shapes(old), 2).items()
        if not name.startswith("fpn") and "gamma" not in name and "table" not in name
    }
    checkpoint |= {"norm.weight": torch.ones(12), "mask_token": torch.zeros(1, 1, 12)}
    patches = checkpoint["pos_embed"][:, 1:].double().unflatten(1, (3, 3)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(3, 4), mode="bicubic", align_corners=False)
    first = checkpoint["pos_embed"][:, :1].double()
    table = torch.cat([first, patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    files: dict[str, tuple[str, State]] = {
        "checkpoint.safetensors": ("weights", checkpoint),
        "loaded.safetensors": ("positions", {"pos_embed": table}),
        "index.safetensors": ("rows", {"relative_position_index": plain.index((3, 4))}),
    }
    fresh = plain.backbone_shapes(plans["bootmae"]).keys() - checkpoint.keys()
    values: dict[str, Any] = {
        "not_in_checkpoint": sorted(fresh | {"blocks.0.attn.relative_position_index"}),
        "left_in_checkpoint": ["mask_token", "norm.weight"],
        "initial": {"gamma_1": 1.0, "relative_position_bias_table": 0.0, "fpn1.1.bias": 0.0},
    }
    for naming, plan in plans.items():
        state = plain.drawn(plain.backbone_shapes(plan), 3)
        images = torch.randn(2, 3, *plan.image, generator=generator)
        ours = plain.wide(state)
        with torch.no_grad():
            maps = plain.encoded(ours, plan, images.double())
            evaluated = plain.pyramid(ours, maps, train=False)
        seen = images.double().requires_grad_()
        maps = plain.encoded(ours, plan, seen)
        levels = plain.pyramid(ours, maps, train=True)
        factors = [torch.randn(level.shape, generator=generator) for level in levels]
        products = [
            (level * factor.double()).sum() for level, factor in zip(levels, factors, strict=True)
        ]
        loss = torch.stack(products).sum()
        loss.backward()
        grads = {name: each for name, each in grads_of(ours).items() if name not in NOISE[:1]}
        norms = {name: each.norm().item() for name, each in grads.items()}
        assert seen.grad is not None
        values[naming] = {
            "loss": loss.item(),
            "grad_norm": norms,
            "grad_norm_images": seen.grad.norm().item(),
        }
        expected = {f"level_{number}": each for number, each in enumerate(maps)}
        expected |= {f"train_{number}": each for number, each in enumerate(levels)}
        expected |= {f"after.{name}": value for name, value in statistics(ours).items()}
        expected["eval_0"] = evaluated[0]
        inputs = {f"weight_{number}": each for number, each in enumerate(factors)}
        files |= {
            f"model_{naming}.safetensors": ("weights", state),
            f"inputs_{naming}.safetensors": ("inputs", inputs | {"images": images}),
            f"expected_{naming}.safetensors": ("expected", expected),
            f"grads_{naming}.safetensors": ("gradients", grads | {"images": seen.grad}),
        }
    config = config_of(plans["mae"], use_rel_pos_bias=True, init_values=1)
    return write(folder, "seg-backbone", config=config, values=values, files=files)


def upernet(folder: Path, write: Write) -> Path:
    plan = Plan(image=(16, 16))
    generator = torch.Generator().manual_seed(4)
    whole = plain.network(plan, 5)
    state = {
        name: value
        for name, value in whole.items()
        if not name.startswith("backbone.") or "fpn" in name
    }
    levels = [torch.randn(2, plan.width, 4, 4, generator=generator) for _ in range(4)]
    maps = torch.randint(0, plan.classes, (2, 16, 16), generator=generator)
    maps[0, :5] = 255
    keeps = {
        "keep_decode": (torch.rand(2, plan.head_width, generator=generator) > 0.3).float(),
        "keep_auxiliary": (torch.rand(2, plan.aux_width, generator=generator) > 0.3).float(),
    }
    values: dict[str, Any] = {"pixels": {"all": maps.numel(), "ignored": int((maps == 255).sum())}}
    expected: State = {}
    grads: dict[str, State] = {}
    for case in ("plain", "dropout", "no_labels"):
        ours = plain.wide(state)
        given = [level.double().requires_grad_() for level in levels]
        keep = [each.double() if case == "dropout" else None for each in keeps.values()]
        pyramid = plain.pyramid(plain.part(ours, "backbone."), given, train=True)
        features = [
            plain.decoded(ours, plan, pyramid, train=True),
            plain.beside(ours, pyramid[2], train=True),
        ]
        scores = [
            plain.classified(ours, head, each, kept)
            for head, each, kept in zip(
                ("decode_head", "auxiliary_head"), features, keep, strict=True
            )
        ]
        labels = torch.full_like(maps, 255) if case == "no_labels" else maps
        losses = [plain.pixel_loss(each, labels) for each in scores]
        total = losses[0] + 0.3 * losses[1]
        total.backward()
        right = [(plain.resized(each, (16, 16)).argmax(dim=1) == labels).sum() for each in scores]
        values[case] = {
            "loss_decode": losses[0].item(),
            "loss_auxiliary_weighted": 0.3 * losses[1].item(),
            "total": total.item(),
            "acc_decode": 100 * right[0].item() / maps.numel(),
            "acc_auxiliary": 100 * right[1].item() / maps.numel(),
        }
        found = {name: each for name, each in grads_of(ours).items() if not name.endswith(NOISE)}
        grads[case] = found | {
            f"level_{number}": each.grad
            for number, each in enumerate(given)
            if each.grad is not None
        }
        names = ("decode", "auxiliary")
        if case == "plain":
            values[case]["grad_norm"] = {name: each.norm().item() for name, each in found.items()}
            expected |= {f"pyramid_{number}": each for number, each in enumerate(pyramid)}
            expected |= {f"logits_{name}": each for name, each in zip(names, scores, strict=True)}
            expected |= {f"after.{name}": value.clone() for name, value in statistics(ours).items()}
            with torch.no_grad():
                pyramid = plain.pyramid(plain.part(ours, "backbone."), given, train=False)
                judged = plain.decoded(ours, plan, pyramid, train=False)
                expected["eval_logits"] = plain.classified(ours, "decode_head", judged)
            taken = plain.resized(expected["eval_logits"], (16, 16)).argmax(dim=1)
            expected["eval_prediction"] = taken
        if case == "dropout":
            expected |= {
                f"dropout_logits_{name}": each for name, each in zip(names, scores, strict=True)
            }
    inputs = {f"level_{number}": each for number, each in enumerate(levels)}
    some = {name: grads["dropout"][name] for name in list(grads["dropout"])[::7]}
    files = {
        "model.safetensors": ("weights", state),
        "inputs.safetensors": ("inputs", inputs | keeps | {"maps": maps}),
        "expected.safetensors": ("expected", expected),
        "grads.safetensors": ("gradients", grads["plain"]),
        "grads_dropout_some.safetensors": ("gradients", some),
    }
    config = {
        "dim": plan.width,
        "grid": 4,
        "image_size": 16,
        "dropout_ratio": 0.1,
        "aux_level": 2,
        **heads_of(plan),
    }
    return write(folder, "upernet", config=config, values=values, files=files)


def windows(height: int, width: int, crop: int, stride: int) -> list[list[int]]:
    found = []
    for down in range(math.ceil(max(height - crop, 0) / stride) + 1):
        for across in range(math.ceil(max(width - crop, 0) / stride) + 1):
            bottom = min(down * stride + crop, height)
            right = min(across * stride + crop, width)
            found.append([max(bottom - crop, 0), max(right - crop, 0), bottom, right])
    return found


def slide_inference(folder: Path, write: Write) -> Path:
    plan = Plan(image=(12, 12))
    state = plain.network(plan, 6)
    ours = plain.wide(state)
    generator = torch.Generator().manual_seed(7)
    image = torch.randn(1, 3, 17, 25, generator=generator)
    scaled = torch.randn(1, 3, 22, 31, generator=generator)
    original = (19, 28)

    def seen(pixels: Tensor, *, flipped: bool = False) -> Tensor:
        pixels = pixels.double().flip(3) if flipped else pixels.double()
        total = torch.zeros(1, plan.classes, *pixels.shape[2:], dtype=torch.float64)
        counts = torch.zeros(pixels.shape[2:], dtype=torch.float64)
        for top, left, bottom, right in windows(*pixels.shape[2:], 12, 7):
            window = pixels[:, :, top:bottom, left:right]
            found = plain.logits(ours, plan, window, train=False)[0]
            total[:, :, top:bottom, left:right] += plain.resized(found, (12, 12))
            counts[top:bottom, left:right] += 1
        total = total / counts
        return total.flip(3) if flipped else total

    with torch.no_grad():
        first = plain.logits(ours, plan, image[:, :, :12, :12].double(), train=False)[0]
        slid = seen(image)
        every = [seen(each, flipped=flip) for each in (image, scaled) for flip in (False, True)]
    chances = [plain.resized(each, original).softmax(dim=1) for each in every]
    averaged = torch.stack(chances).mean(dim=0)
    margins = []
    for chance in (chances[0], averaged):
        two = chance.topk(2, dim=1)[0]
        margins.append((two[:, 0] - two[:, 1]).min().item())
    expected = {
        "window_logits": plain.resized(first, (12, 12)),
        "slide_logits": slid,
        "original_logits": plain.resized(slid, original),
        "probabilities": chances[0],
        "flipped_probabilities": chances[1],
        "averaged_probabilities": averaged,
        "prediction": chances[0].argmax(dim=1)[0],
        "averaged_prediction": averaged.argmax(dim=1)[0],
    }
    table = [(30, 12, 12, 7), (12, 12, 12, 7), (9, 40, 12, 12)]
    values = {
        "windows": windows(17, 25, 12, 7),
        "window_table": [
            {
                "height": height,
                "width": width,
                "crop": [crop, crop],
                "stride": [stride, stride],
                "windows": windows(height, width, crop, stride),
            }
            for height, width, crop, stride in table
        ],
        "smallest_margin": {"prediction": margins[0], "averaged": margins[1]},
    }
    config = config_of(
        plan, crop=[12, 12], stride=[7, 7], original=list(original), **heads_of(plan)
    )
    files = {
        "model.safetensors": ("weights", state),
        "inputs.safetensors": ("inputs", {"image": image, "scaled": scaled}),
        "expected.safetensors": ("expected", expected),
    }
    return write(folder, "slide-inference", config=config, values=values, files=files)


def _none(values: list[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


def miou(folder: Path, write: Write) -> Path:
    classes, generator = 6, torch.Generator().manual_seed(8)
    maps: State = {}
    counts: dict[str, list[list[list[int]]]] = {"plain": [], "reduce_zero_label": []}
    for number, size in enumerate([(7, 9), (12, 3), (1, 20)]):
        label = torch.randint(0, 4, size, generator=generator)
        label[0, :2] = 255
        taken = torch.randint(0, 5, size, generator=generator)
        taken[taken == 3] = 2
        raw = torch.where(label == 255, 0, label + 1)
        for name, value in (("label", label), ("prediction", taken), ("raw", raw)):
            maps[f"{name}_{number}"] = value.to(torch.uint8)
        for each in counts.values():  # both have the same labels here
            matrix = [[0] * classes for _ in range(classes)]
            for mine, theirs in zip(
                label.flatten().tolist(), taken.flatten().tolist(), strict=True
            ):
                if mine != 255:
                    matrix[mine][theirs] += 1
            each.append(matrix)
    values: dict[str, Any] = {
        "classes": {"absent": [5], "only_predicted": [4], "never_predicted": [3]},
        "one_image": {
            "mIoU_of_each_image": [_areas([matrix], classes)["mIoU"] for matrix in counts["plain"]]
        },
        "confusion": [
            [sum(matrix[i][j] for matrix in counts["plain"]) for j in range(classes)]
            for i in range(classes)
        ],
    }
    values |= {case: _areas(each, classes) for case, each in counts.items()}
    config = {"num_classes": classes, "images": 3}
    tolerance = ("counts exact; ratios relative 1e-12", RATIOS[1])
    files = {"maps.safetensors": ("maps", maps)}
    return write(folder, "miou", config=config, values=values, files=files, tolerance=tolerance)


def _areas(each: list[list[list[int]]], classes: int) -> dict[str, Any]:
    shared = [[matrix[k][k] for k in range(classes)] for matrix in each]
    labelled = [[sum(matrix[k]) for k in range(classes)] for matrix in each]
    together = [
        [sum(matrix[i][j] for matrix in each) for j in range(classes)] for i in range(classes)
    ]
    hits = [together[k][k] for k in range(classes)]
    wanted = [sum(row) for row in together]
    taken = [sum(row[k] for row in together) for k in range(classes)]
    union = [wanted[k] + taken[k] - hits[k] for k in range(classes)]
    iou = [hits[k] / union[k] if union[k] else math.nan for k in range(classes)]
    accuracy = [hits[k] / wanted[k] if wanted[k] else math.nan for k in range(classes)]

    def mean(values: list[float]) -> float:
        there = [value for value in values if not math.isnan(value)]
        return sum(there) / len(there)

    return {
        "intersect": hits,
        "union": union,
        "predicted": taken,
        "labelled": wanted,
        "intersect_of_image": shared,
        "labelled_of_image": labelled,
        "iou": _none(iou),
        "acc": _none(accuracy),
        "aAcc": sum(hits) / sum(wanted),
        "mIoU": mean(iou),
        "mAcc": mean(accuracy),
        "pixels_counted": sum(wanted),
    }


def poly(case: dict[str, Any], step: int) -> float:
    falling = (1 - step / case["total"]) ** case["power"]
    rate = case["min_lr"] + (case["lr"] - case["min_lr"]) * falling
    if step < case["warmup"]:
        rate *= 1 - (1 - step / case["warmup"]) * (1 - case["warmup_ratio"])
    return float(rate)


def seg_schedule(folder: Path, write: Write) -> Path:
    plan = Plan(image=(12, 12), split=True)
    state = plain.network(plan, 9)
    generator = torch.Generator().manual_seed(10)
    images = torch.randn(2, 4, 3, 12, 12, generator=generator)
    maps = torch.randint(0, plan.classes, (2, 4, 12, 12), generator=generator).to(torch.uint8)
    maps[:, 1, :3] = 255
    case = {"lr": 2e-3, "total": 9, "warmup": 3, "warmup_ratio": 1e-3, "power": 0.9, "min_lr": 0.0}
    config = config_of(plan, **heads_of(plan), dropout_ratio=0.0, layer_decay=0.7)
    config |= {"weight_decay": 0.05, "betas": [0.9, 0.99], "clip_grad": 2.0}
    config |= {**case, "total_iters": 9, "warmup_iters": 3}
    last = plan.depth + 1
    scales: dict[str, list[float]] = {}
    for name in state:
        if "running" in name or name.endswith("tracked"):
            continue
        layer = last
        if name.startswith("backbone.blocks."):
            layer = 1 + int(name.split(".")[2])
        elif name.startswith("backbone.") and "fpn" not in name:
            layer = 0
        decay = 0.05 if state[name].ndim > 1 else 0.0
        scales[name] = [0.7 ** (last - layer), decay]
    ours = plain.wide(state)
    moments = {name: [torch.zeros_like(ours[name]) for _ in range(2)] for name in scales}
    rows = []
    for number, step in enumerate((2, 3)):
        scores = plain.logits(ours, plan, images[number].double(), train=True)
        losses = [plain.pixel_loss(each, maps[number]) for each in scores]
        total = losses[0] + 0.3 * losses[1]
        grads = dict(
            zip(scales, torch.autograd.grad(total, [ours[name] for name in scales]), strict=True)
        )
        norm = torch.stack([each.norm() for each in grads.values()]).norm().item()
        rate = poly(case, step)
        rows.append(
            {
                "iter": step,
                "loss": total.item(),
                "loss_decode": losses[0].item(),
                "loss_auxiliary_weighted": 0.3 * losses[1].item(),
                "grad_norm": norm,
                "lr": rate,
            }
        )
        for name, (scale, decay) in scales.items():
            grad = grads[name] * min(1.0, 2.0 / (norm + 1e-6))
            first, second = moments[name]
            first.mul_(0.9).add_(0.1 * grad)
            second.mul_(0.99).add_(0.01 * grad.square())
            change = first / (1 - 0.9 ** (number + 1))
            change = change / ((second / (1 - 0.99 ** (number + 1))).sqrt() + 1e-8)
            with torch.no_grad():
                ours[name].mul_(1 - rate * scale * decay).sub_(rate * scale * change)
    groups = sorted({tuple(each) for each in scales.values()})
    blurred = (*NOISE, "tracked", "fpn1.1.running_mean")  # by biases that move at random
    blurred += tuple(f"lateral_convs.{number}.bn.running_mean" for number in (0, 1))
    after = {name: value.detach() for name, value in ours.items() if not name.endswith(blurred)}
    values = {
        "schedules": [{**case, "rows": [[step, poly(case, step)] for step in range(9)]}],
        "param_groups": [
            {
                "name": f"group {number}",
                "lr_scale": scale,
                "weight_decay": decay,
                "params": [name for name, each in scales.items() if tuple(each) == (scale, decay)],
            }
            for number, (scale, decay) in enumerate(groups)
        ],
        "param_scale_and_wd": scales,
        "steps": rows,
        "group_lrs_at_last_step": [poly(case, 3) * scale for scale, _ in groups],
        "norm_after_3_steps": {
            name: value.norm().item() for name, value in after.items() if "running" not in name
        },
    }
    files = {
        "model.safetensors": ("weights", state),
        "inputs.safetensors": ("inputs", {"images": images, "maps": maps}),
        "after_3_steps_some.safetensors": ("weights", after),
    }
    return write(folder, "seg-schedule", config=config, values=values, files=files)


def seg_augment(folder: Path, write: Write) -> Path:
    """One image that is not resized, so that every stage is plain arithmetic."""
    generator = torch.Generator().manual_seed(11)
    crop = (8, 6)
    image = torch.randint(0, 256, (12, 5, 3), generator=generator, dtype=torch.uint8)
    raw = torch.randint(0, 4, (12, 5), generator=generator)
    raw[:8] = 2  # the first box has one class
    values = torch.where(raw == 0, 255, raw - 1)
    # limits (24, 6) x 0.8 = (19, 4): min(19/12, 4/5) = 0.8; x 1.0 = (24, 6): min(2, 1.2)
    config: dict[str, Any] = {
        "crop": list(crop),
        "img_scale": [24, 5],
        "ratio_range": [0.5, 1.5],
        "cat_max_ratio": 0.9,
        "tries": 10,
        "flip": 0.5,
        "contrast_range": [0.5, 1.5],
        "mean": [100.0, 110.0, 120.0],
        "std": [50.0, 60.0, 70.0],
    }
    boxes = [[0, 0], [4, 0]]
    small, cut = image[4:12], values[4:12]
    flipped = small.flip(1)
    bright = (flipped.float() - 20.25).clamp(0, 255).to(torch.uint8)
    distorted = (bright.float() * 1.25).clamp(0, 255).to(torch.uint8)
    final = torch.zeros(3, *crop)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    final[:, :8, :5] = (distorted.permute(2, 0, 1) - mean) / std
    whole = torch.full(crop, 255)
    whole[:8, :5] = cut.flip(1)
    stages = {
        "image_0": image,
        "raw_map_0": raw,
        "map_0": values,
        "scaled_image_0": image,
        "scaled_map_0": values,
        "cropped_image_0": small,
        "cropped_map_0": cut,
        "flipped_map_0": cut.flip(1),
        "undistorted_0": flipped,
        "distorted_0": distorted,
        "final_map_0": whole,
        "alone_before": image,
        "alone_brightness_9": (image.float() + 9).clamp(0, 255),
    }
    arrays = {name: value.to(torch.uint8) for name, value in stages.items()}
    case = {
        "case": 0,
        "scale_draw": 0.5,
        "scaled_size": [12, 5],
        "boxes_drawn": boxes,
        "box": boxes[1],
        "offset_ranges": [5, 1],
        "flip_draw": 0.25,
        "flipped": True,
        "distortion": {
            "brightness": -20.25,
            "mode": 1,
            "contrast": 1.25,
            "saturation": None,
            "hue": None,
        },
    }
    tables = {
        "cases": [case],
        "alone": {"alone_brightness_9": ["brightness", 9.0]},
        "train_sizes": [[10, 20, 0.5, 5, 10], [40, 10, 1.0, 40, 10]],
        "test_sizes": [[5, 30, 7, 40]],
        "multi_scale_test_sizes": [[20, 10, 0.5, 20, 10], [20, 10, 1.5, 30, 15]],
    }
    meanings = {
        "train_sizes": "for limits (40, 10) times r",
        "test_sizes": "limits (40, 10)",
        "multi_scale_test_sizes": "for crop 10, limits (40, 10) times the factor",
    }
    files = {"stages.safetensors": ("stages", arrays | {"final_image_0": final})}
    return write(
        folder,
        "seg-augment",
        config=config,
        values=tables,
        files=files,
        tolerance=RATIOS,
        meanings=meanings,
    )


MAKERS: dict[str, Callable[[Path, Write], Path]] = {
    "seg-backbone": seg_backbone,
    "upernet": upernet,
    "slide-inference": slide_inference,
    "miou": miou,
    "seg-schedule": seg_schedule,
    "seg-augment": seg_augment,
}
