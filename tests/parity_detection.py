"""Folders of recorded numbers of detection, made from plain mathematics."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import detection_reference as plain
import numpy as np
import torch
from detection_reference import LEVELS, Plan
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from segmentation_reference import State, wide
from torch import Tensor

Write = Callable[..., Path]
STRIDES = dict(zip(LEVELS, (4, 8, 16, 32, 64), strict=True))


def images_and_probes(plan: Plan, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, *plan.image, generator=generator)
    probes = {}
    for name, stride in STRIDES.items():
        size = (math.ceil(plan.image[0] / stride), math.ceil(plan.image[1] / stride))
        probes[name] = torch.randn(2, plan.channels, *size, generator=generator)
    return images, probes


def grads_of(state: State, without: Sequence[str] = ()) -> State:
    found = {name: value.grad for name, value in state.items() if value.grad is not None}
    return {name: value for name, value in found.items() if name not in without}


def vit_config(plan: Plan, **more: Any) -> dict[str, Any]:
    return {
        "img_size": plan.side,
        "patch_size": plan.patch,
        "embed_dim": plan.width,
        "depth": plan.depth,
        "num_heads": plan.heads,
        "window_size": plan.window,
        "out_channels": plan.channels,
        "layer_norm_eps": 1e-6,
        "strides": STRIDES,
        **more,
    }


def vitdet_backbone(folder: Path, write: Write) -> Path:
    """A grid that windows do not divide, and that tables are interpolated for."""
    plan, decay = Plan(), 0.6
    state = plain.drawn(plain.vitdet_shapes(plan), 1)
    ours = wide(state)
    images, probes = images_and_probes(plan, 2)
    found = plain.vit_blocks(plain.part(ours, "net."), plan, images.double())
    levels = plain.simple_pyramid(ours, found[f"block.{plan.depth - 1}"])
    loss = plain.probed(levels, list(probes.values()))
    loss.backward()
    grads = grads_of(ours)
    scales = {}
    for name in ours:
        layer = plan.depth + 1
        if name.startswith(("net.pos_embed", "net.patch_embed")):
            layer = 0
        elif name.startswith("net.blocks."):
            layer = int(name.split(".")[2]) + 1
        scales[name] = decay ** (plan.depth + 1 - layer)
    expected = found | {f"level.{name}": each for name, each in zip(LEVELS, levels, strict=True)}
    files = {
        "model.safetensors": ("weights", state),
        "inputs.safetensors": (
            "inputs",
            {"images": images} | {f"probe.{name}": each for name, each in probes.items()},
        ),
        "expected.safetensors": ("expected", expected),
        "grads.safetensors": ("gradients", grads),
    }
    values = {
        "loss": loss.item(),
        "grad_norm": {name: each.norm().item() for name, each in grads.items()},
        "lr_scale": scales,
    }
    config = vit_config(
        plan,
        window_block_indexes=list(plan.windowed),
        pretrain_img_size=plan.pretrained,
        lr_decay=decay,
    )
    return write(folder, "vitdet-backbone", config=config, values=values, files=files)


def benchmark_backbone(folder: Path, write: Write) -> Path:
    plan = Plan(image=(64, 64), side=64, depth=8, window=2)
    state = plain.drawn(plain.benchmark_shapes(plan), 3)
    state["bottom_up.pos_embed"] = plain.row_first_positions(plan.width, plan.grid).float()
    ours = wide(state)
    images, probes = images_and_probes(plan, 4)
    found = plain.benchmark(ours, plan, images.double())
    loss = plain.probed([found[f"level.{name}"] for name in LEVELS], list(probes.values()))
    loss.backward()
    last = f"bottom_up.blocks.{plan.depth - 1}.mlp.fc2.bias"
    zero = [last, "bottom_up.ms_adaptor.0.3.bias", "bottom_up.ms_adaptor.1.bias"]
    grads = grads_of(ours, zero)
    files = {
        "model.safetensors": ("weights", state),
        "inputs.safetensors": (
            "inputs",
            {"images": images} | {f"probe.{name}": each for name, each in probes.items()},
        ),
        "expected.safetensors": ("expected", found),
        "grads.safetensors": ("gradients", grads),
        "statistics.safetensors": (
            "statistics",
            {name: value for name, value in ours.items() if "running" in name},
        ),
    }
    values = {
        "loss": loss.item(),
        "grad_norm": {name: each.norm().item() for name, each in grads.items()},
        "zero_gradients": zero,
    }
    config = vit_config(plan, group_norm_groups=plan.groups)
    return write(folder, "benchmark-backbone", config=config, values=values, files=files)


def detect_arch_names(folder: Path, write: Write) -> Path:
    """A small ViT under both backbones, of the published heads."""
    canvas = 512
    base = Plan(
        image=(canvas, canvas),
        side=canvas,
        pretrained=224,
        width=192,
        depth=12,
        heads=3,
        window=14,
        windowed=(0, 1, 3, 4, 6, 7, 9, 10),
        channels=256,
        classes=7,
        box_width=1024,
    )
    values = {}
    for kind, norm, window in (("vitdet", "LN", 14), ("benchmark", "BN", 16)):
        plan = Plan(**{**vars(base), "window": window})
        backbone = (plain.vitdet_shapes if kind == "vitdet" else plain.benchmark_shapes)(plan)
        shapes = {f"backbone.{name}": shape for name, shape in backbone.items()}
        shapes |= plain.head_shapes(plan, norm)
        still = ("running_mean", "running_var", "num_batches_tracked", "relative_position_index")
        trained = [shape for name, shape in shapes.items() if not name.endswith(still)]
        values[f"{kind}/vit_tiny"] = {
            "parameters": sum(map(math.prod, trained)),
            "entries": len(shapes),
            "shapes": {name: list(shape) for name, shape in shapes.items()},
        }
    config = {"classes": 7, "image": canvas, "patch_size": 16, "built": list(values)}
    return write(folder, "detect-arch-names", config=config, values=values)


# --------------------------------------------------------------------------------- a whole detector

RCNN_WORDS = [
    "resized_*: boxes scaled to 1.5 x the image's size and clipped",
    "a pixel at the threshold may flip in another implementation: allow 0.1 % of the pixels",
]
RCNN_LIMITS = (
    "|difference| <= 1e-11 + 1e-9 * largest magnitude of that array",
    "suggested limits 1e-5, 3e-5, 1e-4 and 5e-4. Inference: boxes within 1e-3 pixels, scores "
    "within 1e-5",
)
TERMS = ("rpn_cls", "rpn_loc", "cls", "box_reg", "mask")
ANCHORS, REGIONS = 24, 12  # that the losses see of an image
SIZES = (10, 20, 32, 44, 56)
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
MEAN, STD = (120.0, 110.0, 100.0), (60.0, 50.0, 40.0)
PLAN = Plan(
    image=(64, 64),
    side=64,
    pretrained=32,
    width=16,
    depth=2,
    heads=2,
    window=3,
    windowed=(0,),
    channels=8,
    classes=3,
    box_width=12,
)


class Scene:
    """Two images with objects and one without, smaller than the canvas."""

    sizes = ((64, 64), (64, 48), (40, 64))
    objects = (((0, (6, 8, 40, 30)), (2, (30, 20, 60, 62))), ((1, (4, 10, 30, 50)),), ())

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(8)
        self.inputs: State = {}
        for number, ((height, width), objects) in enumerate(
            zip(self.sizes, self.objects, strict=True)
        ):
            shape = (3, height, width)
            pixels = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
            masks = torch.zeros(len(objects), height, width, dtype=torch.uint8)
            for mask, (_, (x0, y0, x1, y1)) in zip(masks, objects, strict=True):
                mask[y0:y1, x0:x1] = 1
                mask[y0 : (y0 + y1) // 2, x0 + 4 : (x0 + x1) // 2] = 0
            boxes = torch.tensor([box for _, box in objects], dtype=torch.float32)
            self.inputs |= {
                f"{number}.image": pixels,
                f"{number}.masks": masks,
                f"{number}.boxes": boxes.reshape(-1, 4),
                f"{number}.classes": torch.tensor([kind for kind, _ in objects]).long(),
            }

    def images(self, dtype: torch.dtype) -> Tensor:
        found = torch.zeros(len(self.sizes), 3, *PLAN.image, dtype=dtype)
        mean, std = (torch.tensor(each, dtype=dtype)[:, None, None] for each in (MEAN, STD))
        for number, (height, width) in enumerate(self.sizes):
            pixels = self.inputs[f"{number}.image"].to(dtype)
            found[number, :, :height, :width] = (pixels - mean) / std
        return found

    def boxes(self, number: int) -> Tensor:
        return self.inputs[f"{number}.boxes"]


class Network:
    """The detector of some weights, in their type."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.heads = plain.part(state, "roi_heads.")
        self.anchors = plain.anchors_of(SIZES, PLAN.image)

    def look(self, images: Tensor) -> None:
        backbone = plain.part(self.state, "backbone.")
        blocks = plain.vit_blocks(plain.part(backbone, "net."), PLAN, images)
        self.levels = plain.simple_pyramid(backbone, blocks[f"block.{PLAN.depth - 1}"])
        head = plain.part(self.state, "proposal_generator.rpn_head.")
        self.logits, self.deltas = plain.proposed(head, self.levels)

    def pooled(self, image: int, boxes: Tensor, side: int) -> Tensor:
        rows = [plain.pooled_at(self.levels, image, box, side, 20.0) for box in boxes]
        empty = self.levels[0].new_zeros(0, PLAN.channels, side, side)
        return torch.stack(rows) if rows else empty

    def proposals(self, number: int, each: int, most: int) -> tuple[Tensor, Tensor]:
        """Boxes and logits, best first, in float32."""
        logits, deltas = self.logits[number].detach().float(), self.deltas[number].detach().float()
        chosen: list[int] = []
        kinds: list[int] = []
        first = 0
        for level, stride in enumerate((4, 8, 16, 32, 64)):
            count = 3 * (-(-64 // stride)) ** 2
            order = logits[first : first + count].argsort(descending=True, stable=True)[:each]
            chosen += (first + order).tolist()
            kinds += [level] * len(order)
            first += count
        clip = Scene.sizes[number]
        boxes = torch.stack(
            [plain.decoded(self.anchors[a], deltas[a], (1.0,) * 4, clip) for a in chosen]
        )
        sides = boxes[:, 2:] - boxes[:, :2]
        usable = [row for row in range(len(boxes)) if bool((sides[row] > 0).all())]
        boxes, scores = boxes[usable], logits[chosen][usable]
        left = plain.kept(boxes, scores, [kinds[row] for row in usable], 0.7)[:most]
        return boxes[left], scores[left]


def matched(anchors: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Kind and nearest object of each anchor."""
    kind = torch.zeros(len(anchors), dtype=torch.int8)
    if not len(boxes):
        return kind, torch.zeros(len(anchors), dtype=torch.int64)
    shared = plain.shared_area(boxes.double(), anchors.double())
    best, nearest = shared.max(dim=0)
    kind[best >= 0.3] = -1
    kind[best >= 0.7] = 1
    for row in shared:
        kind[row == row.max()] = 1
    return kind, nearest


def some(kind: Tensor, count: int, positive: float, draw: torch.Generator) -> tuple[Any, Any]:
    """Of what shows an object so many, filled up with what does not."""
    places = torch.randperm(len(kind), generator=draw).tolist()
    shown = [each for each in places if kind[each] == 1][: int(count * positive)]
    hidden = [each for each in places if kind[each] == 0][: count - len(shown)]
    return sorted(shown), sorted(hidden)


def chosen_of(network: Network, scene: Scene, expected: State) -> State:
    """What the losses see of anchors and regions; notes what leads to it."""
    draw = torch.Generator().manual_seed(9)
    labels, objects, kinds = [], [], []
    choices: State = {}
    for number in range(len(scene.sizes)):
        boxes = scene.boxes(number)
        kind, nearest = matched(network.anchors, boxes)
        shown, hidden = some(kind, ANCHORS, 0.5, draw)
        label = torch.full_like(kind, -1)
        label[shown], label[hidden] = 1, 0
        labels.append(label)
        objects.append(nearest)
        kinds.append(kind)
        found, logits = network.proposals(number, 80, 50)
        expected |= {f"{number}.proposals": found, f"{number}.proposal_logits": logits}
        regions = torch.cat([found, boxes])
        best = torch.zeros(len(regions), dtype=torch.float64)
        object = torch.zeros(len(regions), dtype=torch.int64)
        if len(boxes):
            best, object = plain.shared_area(boxes.double(), regions.double()).max(dim=0)
        shown, hidden = some((best >= 0.5).long(), REGIONS, 0.25, draw)
        taken = [*shown, *hidden]
        which = torch.tensor([object[row] if row in shown else -1 for row in taken])
        classes = [
            int(scene.inputs[f"{number}.classes"][each]) if each >= 0 else 3 for each in which
        ]
        choices |= {
            f"{number}.region_boxes": regions[taken],
            f"{number}.region_classes": torch.tensor(classes),
            f"{number}.region_object": which,
        }
    expected |= {"anchor_match": torch.stack(kinds), "anchor_object": torch.stack(objects)}
    return choices | {"anchor_labels": torch.stack(labels)}


def image_losses(
    network: Network,
    scene: Scene,
    number: int,
    choices: State,
    objects: Tensor,
    heard: dict[str, Any],
) -> dict[str, tuple[Tensor, int]]:
    """(sum, what divides it) of the five; what the heads say goes into `heard`."""
    state, boxes = network.heads, scene.boxes(number)
    label = choices["anchor_labels"][number]
    logits = network.logits[number]
    each = torch.nn.functional.softplus(logits) - logits * (label == 1)
    places = [network.deltas.new_zeros(())]
    for row in (label == 1).nonzero()[:, 0].tolist():
        wanted = plain.encoded(network.anchors[row], boxes[objects[row]], (1.0,) * 4)
        places.append((network.deltas[number, row] - wanted).abs().sum())
    regions = choices[f"{number}.region_boxes"]
    kinds, which = choices[f"{number}.region_classes"], choices[f"{number}.region_object"]
    features = network.pooled(number, regions, 7)
    scores, deltas = plain.boxed(state, features)
    named = -scores.log_softmax(dim=1)[torch.arange(len(kinds)), kinds].sum()
    heard["pooled"].append(features)
    heard["scores"].append(scores)
    heard["deltas"].append(deltas)
    moves = [deltas.new_zeros(())]
    shown = (which >= 0).nonzero()[:, 0].tolist()
    for row in shown:
        target = boxes[which[row]].to(deltas.dtype)
        wanted = plain.encoded(regions[row].to(deltas.dtype), target, BOX_WEIGHTS)
        mine = deltas[row].view(-1, 4)[kinds[row]]
        moves.append((mine - wanted).abs().sum())
    covered = deltas.new_zeros(())
    if shown:
        found = plain.masked(
            state, network.pooled(number, regions[shown], 14), kinds[shown].tolist()
        )
        maps = scene.inputs[f"{number}.masks"].to(deltas.dtype)
        canvas = torch.nn.functional.pad(maps, (0, 64 - maps.shape[2], 0, 64 - maps.shape[1]))
        wanted = torch.stack(
            [
                plain.pooled(canvas[which[row]][None], regions[row].to(deltas.dtype), 28, 1.0)[0]
                for row in shown
            ]
        )
        wanted = (wanted >= 0.5).to(deltas.dtype)
        covered = (torch.nn.functional.softplus(found) - found * wanted).sum()
        heard["masks"].append(found)
        heard["targets"].append(wanted)
    return {
        "rpn_cls": ((each * (label >= 0)).sum(), ANCHORS),
        "rpn_loc": (torch.stack(places).sum(), ANCHORS),
        "cls": (named, len(kinds)),
        "box_reg": (torch.stack(moves).sum(), len(kinds)),
        "mask": (covered, 28 * 28 * len(shown)),
    }


def rcnn_state() -> State:
    shapes = {f"backbone.{name}": each for name, each in plain.vitdet_shapes(PLAN).items()}
    return plain.drawn(shapes | plain.head_shapes(PLAN, "LN"), 7)


def maskrcnn_losses(folder: Path, write: Write) -> Path:
    scene, state = Scene(), rcnn_state()
    expected: State = {}
    values: dict[str, Any] = {}
    files: dict[str, tuple[str, State]] = {}
    norms = {}
    choices: State = {}
    for way in ("batch", "by_image"):
        ours = wide(state)
        network = Network(ours)
        network.look(scene.images(torch.float64))
        if not choices:
            choices = chosen_of(network, scene, expected)
        heard: dict[str, Any] = {
            key: [] for key in ("pooled", "scores", "deltas", "masks", "targets")
        }
        each = [
            image_losses(network, scene, number, choices, expected["anchor_object"][number], heard)
            for number in range(len(scene.sizes))
        ]
        losses = {}
        for name in TERMS:
            sums, counts = zip(*(losses_of[name] for losses_of in each), strict=True)
            parts = [total / max(count, 1) for total, count in zip(sums, counts, strict=True)]
            whole = sum(sums) / sum(counts)
            losses[name] = whole if way == "batch" else torch.stack(parts).mean()
            if way == "by_image":
                by_image = values.setdefault("losses_by_image", {})
                by_image[f"loss_{name}"] = [part.item() for part in parts]
        torch.stack(list(losses.values())).sum().backward()
        grads = grads_of(ours)
        norms[way] = torch.stack([grad.norm() for grad in grads.values()]).norm().item()
        key = "losses" if way == "batch" else way
        values[key] = {f"loss_{name}": value.item() for name, value in losses.items()}
        file = "grads.safetensors" if way == "batch" else "grads_by_image.safetensors"
        files[file] = ("gradients", grads)
    expected |= {
        "anchors": network.anchors,
        "objectness": network.logits,
        "rpn_deltas": network.deltas,
        "class_scores": torch.cat(heard["scores"]),
        "box_deltas": torch.cat(heard["deltas"]),
        "mask_targets": torch.cat(heard["targets"]),
    }
    parts = {"pooled": heard["pooled"][0], "mask_logits": torch.cat(heard["masks"])}
    files |= {
        "model.safetensors": ("weights", state),
        "inputs.safetensors": ("inputs", scene.inputs),
        "choices.safetensors": ("choices", choices),
        "expected.safetensors": ("expected", expected),
        "expected_heads.safetensors": ("expected", parts),
        "expected_inference.safetensors": ("expected", inferred(scene, state)),
    }
    values |= {"grad_norm_total": norms, "optimizer_groups": groups_of(state)}
    config = rcnn_config(network.levels)
    made = write(
        folder, "maskrcnn-losses", config=config, values=values, files=files, tolerance=RCNN_LIMITS
    )
    tree = json.loads((made / "fixture.json").read_text())
    (made / "fixture.json").write_text(json.dumps(tree | {"notes": RCNN_WORDS}))
    return made


@torch.no_grad()
def inferred(scene: Scene, state: State) -> State:
    """Detections in float32, their masks pasted at one and a half times the size."""
    network = Network(state)
    network.look(scene.images(torch.float32))
    found: State = {}
    for number, (height, width) in enumerate(scene.sizes):
        regions, _ = network.proposals(number, 30, 20)
        scores, deltas = plain.boxed(network.heads, network.pooled(number, regions, 7))
        boxes, kinds, best = [], [], []
        for row, chances in enumerate(scores.softmax(dim=1)[:, :-1]):
            for kind, chance in enumerate(chances.tolist()):
                if chance > 0.05:
                    delta = deltas[row].view(-1, 4)[kind]
                    boxes.append(plain.decoded(regions[row], delta, BOX_WEIGHTS, (height, width)))
                    kinds.append(kind)
                    best.append(chances[kind])
        left = plain.kept(torch.stack(boxes), torch.stack(best), kinds, 0.5)[:6]
        chosen, names = torch.stack(boxes)[left], [kinds[row] for row in left]
        masks = plain.masked(network.heads, network.pooled(number, chosen, 14), names).sigmoid()
        size = (round(1.5 * height), round(1.5 * width))
        high = torch.tensor([size[1], size[0], size[1], size[0]], dtype=torch.float32)
        larger = (chosen * 1.5).clamp(min=0).minimum(high)
        drawn = [plain.pasted(mask, box, size) for mask, box in zip(masks, larger, strict=True)]
        packed = np.stack([np.packbits(each.numpy().reshape(-1)) for each in drawn])
        found |= {
            f"{number}.proposals": regions,
            f"{number}.boxes": chosen,
            f"{number}.scores": torch.stack(best)[left],
            f"{number}.classes": torch.tensor(names),
            f"{number}.mask_probabilities": masks,
            f"{number}.resized_boxes": larger,
            f"{number}.resized_masks": torch.from_numpy(packed),
        }
    return found


def groups_of(state: State) -> dict[str, dict[str, float]]:
    """Layers fall by 0.7; the ViT's norms and positions do not decay."""
    found = {}
    for name in state:
        layer, decay = PLAN.depth + 1, 0.1
        if name.startswith("backbone.net."):
            inner = name.removeprefix("backbone.net.")
            layer = int(inner.split(".")[1]) + 1 if inner.startswith("blocks.") else 0
            decay = 0.0 if inner == "pos_embed" or ".norm" in inner else 0.1
        found[name] = {"lr_scale": 0.7 ** (PLAN.depth + 1 - layer), "weight_decay": decay}
    return found


def rcnn_config(levels: Sequence[Tensor]) -> dict[str, Any]:
    return vit_config(
        PLAN,
        strides=list(STRIDES.values()),
        window_block_indexes=list(PLAN.windowed),
        pretrain_img_size=PLAN.pretrained,
        lr_decay=0.7,
        weight_decay=0.1,
        image_hw=list(PLAN.image),
        sizes_hw=[list(size) for size in Scene.sizes],
        pixel_mean=list(MEAN),
        pixel_std=list(STD),
        anchor_sizes=[[size] for size in SIZES],
        aspect_ratios=[0.5, 1.0, 2.0],
        iou_anchors=[0.3, 0.7],
        anchors_per_image=ANCHORS,
        anchor_positive=0.5,
        anchor_weights=[1.0, 1.0, 1.0, 1.0],
        rpn_convs=2,
        pre_nms_topk=[80, 30],
        post_nms_topk=[50, 20],
        nms_rpn=0.7,
        num_classes=PLAN.classes,
        iou_proposals=0.5,
        rois_per_image=REGIONS,
        roi_positive=0.25,
        canonical_box_size=20,
        canonical_level=4,
        box_weights=list(BOX_WEIGHTS),
        box_resolution=7,
        mask_resolution=14,
        mask_target=28,
        score_thresh=0.05,
        nms_test=0.5,
        topk_test=6,
        box_convs=4,
        box_fc=PLAN.box_width,
        mask_convs=4,
        scale_clamp=math.log(1000 / 16),
        loss_weights={f"loss_{name}": 1.0 for name in TERMS},
        feature_shapes=[list(level.shape[1:]) for level in levels],
    )


# ------------------------------------------------------------------------------------------- inputs

JITTER_WORDS = [
    "learning-rate factor at step s: linear from warmup_factor 0.01 to the schedule's own value",
    "pixels of the image: allow a difference of 2 levels",
    "an independent one had masks within 0.3 %: allow 1 %, and a pixel in a box",
]
TARGET = 64


def detect_inputs(folder: Path, write: Write) -> Path:
    """Images by Pillow, masks by rasterising on the whole resized image, cut afterwards."""
    draw = np.random.default_rng(5)
    sources = [(50, 70), (90, 40), (33, 33)]
    inputs: State = {}
    expected: State = {}
    annotations = []
    cases = []
    for number, (height, width) in enumerate(sources):
        pixels = draw.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3)).astype(np.uint8)
        smooth = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        inputs[f"{number}.image"] = torch.from_numpy(np.array(smooth))
        annotations.append([_polygon(draw, height, width, kind) for kind in range(3)])
        annotations[-1][1]["iscrowd"] = int(number == 0)
        for style, flipped in (("vitdet", number != 1), ("benchmark", number == 1)):
            drawn = {
                "case": number,
                "style": style,
                "image_hw": [height, width],
                "flipped": flipped,
                "scale": float(draw.uniform(0.5, 1.9)),
                "offset": float(draw.uniform()),
            }
            cases.append(drawn | _jittered(drawn, inputs, annotations[-1], expected))
    tree: dict[str, Any] = {"steps": 1000, "warmup_steps": 10, "kind": "steps"}
    tree["milestones"] = [900, 950]
    tree["factor_at"] = {"0": 0.01, "5": 0.505, "10": 1.0, "899": 1.0, "900": 0.1, "999": 0.01}
    cosine = tree | {"kind": "cosine", "milestones": None}
    cosine["factor_at"] = {"500": 0.5, "750": (1 + math.cos(0.75 * math.pi)) / 2}
    values = {
        "annotations": annotations,
        "cases": cases,
        "schedules": {"steps": tree, "cosine": cosine},
    }
    files = {
        "inputs.safetensors": ("images", inputs),
        "expected.safetensors": ("after the transform", expected),
    }
    made = write(folder, "detect-inputs", config={"target": TARGET}, values=values, files=files)
    document = json.loads((made / "fixture.json").read_text())
    (made / "fixture.json").write_text(json.dumps(document | {"notes": JITTER_WORDS}))
    return made


def _polygon(draw: np.random.Generator, height: int, width: int, kind: int) -> dict[str, Any]:
    radius = min(height, width) / 4
    x, y = draw.uniform(radius, width - radius), draw.uniform(radius, height - radius)
    points = []
    for corner in range(6):
        angle = corner * math.pi / 3
        points += [x + radius * math.cos(angle), y + radius * math.sin(angle)]
    box = [x - radius, y - radius, 2 * radius, 2 * radius]
    return {"segmentation": [points], "bbox": box, "iscrowd": 0, "category_id": kind}


def _jittered(
    drawn: dict[str, Any], inputs: State, given: list[dict[str, Any]], expected: State
) -> dict[str, Any]:
    height, width = drawn["image_hw"]
    factor = min(TARGET * drawn["scale"] / height, TARGET * drawn["scale"] / width)
    resized = [round(height * factor), round(width * factor)]
    top, left = (round(max(side - TARGET, 0) * drawn["offset"]) for side in resized)
    rows, columns = (min(TARGET, side) for side in resized)
    early = drawn["flipped"] and drawn["style"] == "vitdet"
    late = drawn["flipped"] and drawn["style"] == "benchmark"
    image = inputs[f"{drawn['case']}.image"].numpy()
    image = image[:, ::-1] if early else image
    size = (resized[1], resized[0])
    pixels = np.asarray(
        Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BILINEAR)
    )
    pixels = pixels[top : top + rows, left : left + columns]
    if drawn["style"] == "benchmark":
        canvas = np.full((TARGET, TARGET, 3), 128, np.uint8)
        canvas[:rows, :columns] = pixels
        pixels = canvas[:, ::-1] if late else canvas
    kept, boxes, masks = [], [], []
    for number, each in enumerate(given):
        if each["iscrowd"]:
            continue
        points = np.array(each["segmentation"][0]).reshape(-1, 2)
        if early:
            points = points * [-1, 1] + [width, 0]
        points = points * [resized[1] / width, resized[0] / height] - [left, top]
        code = coco_mask.merge(coco_mask.frPyObjects([points.reshape(-1).tolist()], rows, columns))
        mask = coco_mask.decode(code)
        whole = np.zeros(pixels.shape[:2], np.uint8)
        whole[:rows, :columns] = mask
        whole = whole[:, ::-1] if late else whole
        if not whole.any():
            continue
        down, across = whole.any(axis=1).nonzero()[0], whole.any(axis=0).nonzero()[0]
        kept.append(number)
        boxes.append([across[0], down[0], across[-1] + 1, down[-1] + 1])
        masks.append(np.packbits(whole.reshape(-1)))
    name = f"{drawn['case']}.{drawn['style']}"
    expected[f"{name}.image"] = torch.from_numpy(pixels.copy())
    expected[f"{name}.boxes"] = torch.tensor(np.array(boxes), dtype=torch.float32)
    expected[f"{name}.classes"] = torch.tensor([given[each]["category_id"] for each in kept])
    expected[f"{name}.object"] = torch.tensor(kept)
    expected[f"{name}.masks"] = torch.from_numpy(np.stack(masks))
    found = {"resized_hw": resized, "crop_top_left": [top, left], "objects_kept": kept}
    return found | {"output_hw": list(pixels.shape[:2])}


# ------------------------------------------------------------------------------------------ judging

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def coco_ap(folder: Path, write: Write) -> Path:
    """By pycocotools: a crowd, ties, more than 100 detections, a category without objects."""
    draw = np.random.default_rng(6)
    rows, columns = np.mgrid[:100, :120]
    objects: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for image in (1, 2, 3):
        for place in range(6):
            centre, radii = draw.uniform(20, 80, 2), draw.uniform(4, 40, 2)
            inside = (rows - centre[0]) ** 2 / radii[0] ** 2
            inside = inside + (columns - centre[1]) ** 2 / radii[1] ** 2 < 1
            kind = int(draw.choice([2, 5]))
            one = _as_coco(inside) | {"image_id": image, "category_id": kind}
            crowd = int(image == 2 and place == 0)
            objects.append(one | {"id": len(objects) + 1, "iscrowd": crowd})
            for _ in range(20):
                shifted = np.roll(inside, draw.integers(-9, 10, 2), axis=(0, 1))
                found = _as_coco(shifted)
                del found["area"]
                score = float(np.round(draw.uniform(), 2))
                label = int(draw.choice([kind, 9]))
                detections.append(found | {"image_id": image, "category_id": label, "score": score})
    images = [{"id": number, "height": 100, "width": 120} for number in (1, 2, 3, 4)]
    categories = [{"id": kind, "name": str(kind)} for kind in (2, 5, 9)]
    truth = {"info": {}, "images": images, "categories": categories, "annotations": objects}
    values: dict[str, Any] = {}
    curves: State = {}
    for kind in ("bbox", "segm"):
        known = COCO()
        known.dataset = json.loads(json.dumps(truth))
        known.createIndex()
        judged = COCOeval(known, known.loadRes(json.loads(json.dumps(detections))), kind)
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
        precision = judged.eval["precision"]
        values[f"{kind}.stats"] = dict(zip(NAMES, judged.stats.tolist(), strict=True))
        by_category = {}
        for place, category in enumerate((2, 5, 9)):
            each = precision[:, :, place, 0, -1]
            each = each[each > -1]
            by_category[str(category)] = float(each.mean()) if each.size else -1.0
        values[f"{kind}.AP_by_category"] = by_category
        curves[f"{kind}.precision"] = torch.from_numpy(precision[:, ::10].copy())
        curves[f"{kind}.recall"] = torch.from_numpy(judged.eval["recall"])
    files = {"expected.safetensors": ("what accumulate gives", curves)}
    made = write(folder, "coco-ap", values=values, files=files)
    others = {}
    for name, document in (("gt.json", truth), ("dt.json", detections)):
        (made / name).write_text(json.dumps(document))
        digest = hashlib.sha256((made / name).read_bytes()).hexdigest()
        others[name] = {"meaning": name, "sha256": digest}
    tree = json.loads((made / "fixture.json").read_text())
    (made / "fixture.json").write_text(json.dumps(tree | {"other_files": others}))
    return made


def _as_coco(inside: np.ndarray) -> dict[str, Any]:
    code = coco_mask.encode(np.asfortranarray(inside.astype(np.uint8)))
    text = {"size": list(code["size"]), "counts": code["counts"].decode("ascii")}
    box = coco_mask.toBbox(code).tolist()
    return {"segmentation": text, "bbox": box, "area": float(coco_mask.area(code))}


MAKERS: dict[str, Callable[[Path, Write], Path]] = {
    "vitdet-backbone": vitdet_backbone,
    "benchmark-backbone": benchmark_backbone,
    "maskrcnn-losses": maskrcnn_losses,
    "detect-arch-names": detect_arch_names,
    "detect-inputs": detect_inputs,
    "coco-ap": coco_ap,
}
