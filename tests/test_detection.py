"""The parts of a detector: boxes, suppression, pooling, sampling, losses of images, weights."""

from __future__ import annotations

import collections
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rcmae.config import DetectOptions, ModelOptions
from rcmae.errors import Refused
from rcmae.models.batchnorm import GlobalBatchNorm
from rcmae.models.classifier import Classifier
from rcmae.models.detection import boxes, losses, matching, regions
from rcmae.models.detection.benchmark import BiasedAttention, RelativeBias
from rcmae.models.detection.boxes import overlaps
from rcmae.models.detection.build import detector_sizes, fit_detector
from rcmae.models.detection.cost import detection_cost
from rcmae.models.detection.detector import Detector, Sampling
from rcmae.models.detection.losses import Targets
from rcmae.models.detection.matching import match_anchors, match_regions, sample
from rcmae.models.detection.windows import WideAttention
from rcmae.models.sizes import NetworkSizes
from rcmae.weights.detectors import read_start

from timm.models.vision_transformer_sam import Attention

MODEL = {"image_size": 64, "embed_dim": 32, "depth": 4, "num_heads": 2}
DETECT: dict[str, Any] = {
    "num_classes": 3,
    "window": 2,
    "pretrain_size": 48,
    "channels": 16,
    "box_width": 16,
    "anchors": [8, 16, 24, 32, 48],
    "canonical_size": 32,
    "anchors_sampled": 32,
    "proposals_per_level": [60, 40],
    "proposals": [40, 20],
    "regions_sampled": 16,
}


def detector(**changed: Any) -> Detector:
    depth = 8 if changed.get("backbone") == "benchmark" else 4
    model = ModelOptions(name="vit_tiny_patch16", **{**MODEL, "depth": depth})
    return Detector(detector_sizes(model, DetectOptions(**{**DETECT, **changed})))


def random_boxes(draw: torch.Generator, count: int, side: float = 60.0) -> Tensor:
    corners = torch.rand(count, 2, generator=draw) * side
    return torch.cat(
        [corners, corners + 1 + torch.rand(count, 2, generator=draw) * side / 2], dim=1
    )


def targets_of(*rows: list[tuple[int, list[int]]]) -> list[Targets]:
    """Of each image: (class, [x0, y0, x1, y1]) of rectangles on a canvas of 64 pixels."""
    found = []
    for objects in rows:
        masks = np.zeros((len(objects), 64, 64), bool)
        for mask, (_, (x0, y0, x1, y1)) in zip(masks, objects, strict=True):
            mask[y0:y1, x0:x1] = True
        found.append(
            Targets(
                torch.tensor([box for _, box in objects], dtype=torch.float32).reshape(-1, 4),
                torch.tensor([kind for kind, _ in objects], dtype=torch.int64),
                torch.from_numpy(np.packbits(masks, axis=2)),
            )
        )
    return found


def sampling(model: Detector, count: int) -> Sampling:
    draw = torch.Generator().manual_seed(3)
    anchors = model.num_anchors((64, 64))
    numbers = torch.randint(2**40, (count, anchors + model.most_objects), generator=draw)
    return Sampling(numbers[:, :anchors], numbers)


# ------------------------------------------------------------------------------------------- boxes


def test_decoding_undoes_coding() -> None:
    draw = torch.Generator().manual_seed(0)
    sources, wanted = (random_boxes(draw, 50).double() for _ in range(2))
    for weights in ((1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)):
        deltas = boxes.encode(sources, wanted, weights)
        assert torch.allclose(boxes.decode(sources, deltas, weights), wanted)
    huge = torch.tensor([[0.0, 0.0, 99.0, 99.0]])
    assert boxes.decode(sources[:1].float(), huge, (1.0,) * 4).isfinite().all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(0, 10**6), st.floats(0.1, 0.9))
def test_suppression_is_that_of_the_plain_loop(count: int, seed: int, threshold: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    found = random_boxes(draw, count)
    scores = (torch.rand(count, generator=draw) * 10).round() / 10  # with ties
    kept: list[int] = []
    for number in scores.argsort(descending=True, stable=True).tolist():
        over = boxes.overlaps(found[number : number + 1], found[kept])
        if not (over > threshold).any():
            kept.append(number)
    assert regions.plain_nms(found, scores, threshold).tolist() == kept


def bilinear(image: Tensor, y: float, x: float) -> float:
    height, width = image.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, along = y - top, x - left
    upper = image[top, left] * (1 - along) + image[top, right] * along
    lower = image[bottom, left] * (1 - along) + image[bottom, right] * along
    return float(upper * (1 - down) + lower * down)


def test_pooling_is_the_mean_of_bilinear_samples() -> None:
    draw = torch.Generator().manual_seed(1)
    maps = torch.randn(2, 1, 9, 7, generator=draw, dtype=torch.float64)
    found = torch.tensor(
        [[1.0, 2.0, 11.5, 17.0], [-4.0, -3.0, 30.0, 30.0], [3.0, 3.0, 3.5, 3.2]]
    ).double()
    index = torch.tensor([1, 0, 1])
    pooled = regions.plain_roi_align(maps, found, index, 3, 0.5)
    for row, (box, image) in enumerate(zip(found.tolist(), maps[index, 0], strict=True)):
        x0, y0, x1, y1 = (value * 0.5 - 0.5 for value in box)
        high, wide = (y1 - y0) / 3, (x1 - x0) / 3
        down, along = int(np.ceil(high)), int(np.ceil(wide))
        for place in range(9):
            top, left = y0 + place // 3 * high, x0 + place % 3 * wide
            values = [
                bilinear(image, top + (i + 0.5) * high / down, left + (j + 0.5) * wide / along)
                for i in range(down)
                for j in range(along)
            ]
            assert pooled[row, 0].flatten()[place].item() == pytest.approx(np.mean(values))


@pytest.mark.gpu
def test_both_ways_are_torchvisions_where_its_extension_loads() -> None:
    if not regions.has_extension("cuda"):
        pytest.skip("torchvision's extension does not load here")
    draw = torch.Generator().manual_seed(2)
    maps = torch.randn(2, 4, 32, 32, generator=draw).cuda()
    found = random_boxes(draw, 200).cuda()
    index = torch.randint(2, (200,), generator=draw).cuda()
    theirs = regions.roi_align(maps, found, index, 7, 0.5)
    assert torch.allclose(regions.plain_roi_align(maps, found, index, 7, 0.5), theirs, atol=1e-4)
    scores = torch.rand(200, generator=draw).cuda()
    assert torch.equal(regions.plain_nms(found, scores, 0.5), regions.nms(found, scores, 0.5))


def test_nothing_to_pool_still_has_a_gradient() -> None:
    maps = torch.randn(1, 2, 4, 4, requires_grad=True)
    none = regions.plain_roi_align(
        maps, torch.empty(0, 4), torch.empty(0, dtype=torch.long), 7, 1.0
    )
    assert none.shape == (0, 2, 7, 7)
    none.sum().backward()
    assert maps.grad is not None


# ---------------------------------------------------------------------------------------- matching


def test_an_object_has_its_nearest_anchor_whatever_that_reaches() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50], [0, 0, 12, 12]])
    objects = torch.tensor([[0.0, 0, 10, 10], [44, 44, 60, 60]])
    match = match_anchors(anchors, objects, (0.3, 0.7))
    assert match.kind.tolist() == [1, 0, 1, -1]
    assert match.object.tolist() == [0, 0, 1, 0]
    assert match_anchors(anchors, objects[:0], (0.3, 0.7)).kind.tolist() == [0, 0, 0, 0]


def test_many_objects_are_matched_in_parts_with_the_same_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draws = torch.Generator().manual_seed(0)
    corners = (64 * torch.rand(160, 2, generator=draws)).round()  # ties, too
    boxes = torch.cat([corners, corners + 4 + (20 * torch.rand(160, 2, generator=draws))], dim=1)
    boxes[100:120] = boxes[:20]
    objects, anchors = boxes[120:], boxes[:120]
    wanted = match_anchors(anchors, objects, (0.3, 0.5)), match_regions(anchors, objects, 0.5)
    assert set(wanted[0].kind.tolist()) == {-1, 0, 1}
    compared: list[int] = []

    def counted(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        compared.append(len(one) * len(other))
        return overlaps(one, other)

    monkeypatch.setattr(matching, "overlaps", counted)
    monkeypatch.setattr(matching, "PAIRS", 300)
    found = match_anchors(anchors, objects, (0.3, 0.5)), match_regions(anchors, objects, 0.5)
    assert max(compared) <= 300
    for one, other in zip(wanted, found, strict=True):
        assert torch.equal(one.kind, other.kind)
        assert torch.equal(one.object, other.object)


def test_sampling_counts_and_what_another_leaves_out_changes_no_luck() -> None:
    draw = torch.Generator().manual_seed(0)
    kind = torch.randint(-1, 2, (200,), generator=draw).to(torch.int8)
    luck = torch.randperm(200, generator=draw)
    shown, hidden = sample(kind, luck, 40, 0.25)
    assert (len(shown), len(hidden)) == (10, 30)
    assert (kind[shown] == 1).all()
    assert (kind[hidden] == 0).all()
    assert torch.equal(shown, sample(kind, luck, 40, 0.25)[0])
    left_out = next(n for n in (kind == 1).nonzero()[:, 0].tolist() if n not in shown.tolist())
    fewer = kind.clone()
    fewer[left_out] = 0
    assert torch.equal(sample(fewer, luck, 40, 0.25)[0], shown)
    shown, hidden = sample(torch.zeros(5, dtype=torch.int8), luck[:5], 40, 0.5)
    assert (len(shown), len(hidden)) == (0, 5)


# ------------------------------------------------------------------------------------- the network


def test_relative_positions_ride_along_to_the_same_attention() -> None:
    torch.manual_seed(0)
    wide = WideAttention(32, 2, use_rel_pos=True, input_size=(6, 6)).double()
    for param in wide.parameters():
        nn.init.normal_(param, std=0.3)
    plain = Attention(32, 2, use_rel_pos=True, input_size=(6, 6)).double()
    plain.load_state_dict(wide.state_dict())
    x = torch.randn(2, 6, 4, 32, dtype=torch.float64)  # the columns' table is interpolated
    assert torch.allclose(wide(x), plain(x), atol=1e-12)
    wide.fused_attn = False
    assert torch.allclose(wide(x), plain(x), atol=1e-12)


def test_a_bias_of_offsets_is_taken_band_by_band(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix of all pairs is never kept; values and gradients are those of it."""
    torch.manual_seed(0)
    heads, height, width, dim = 2, 6, 4, 8
    count = height * width
    attention = BiasedAttention(dim, heads).double()
    bias = RelativeBias((height, width), heads).double()
    nn.init.normal_(bias.relative_position_bias_table)
    x = torch.randn(1, count, dim, dtype=torch.float64)
    places = [divmod(number, width) for number in range(count)]
    index = torch.tensor(
        [
            [(yi - yj + height - 1) * (2 * width - 1) + xi - xj + width - 1 for yj, xj in places]
            for yi, xi in places
        ]
    )
    q, k, v = attention.qkv(x).view(1, count, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(2, 3) / (dim // heads) ** 0.5
    logits = logits + bias.relative_position_bias_table[index].permute(2, 0, 1)
    plain = attention.proj((logits.softmax(dim=3) @ v).transpose(1, 2).flatten(2))
    params = [*attention.parameters(), bias.relative_position_bias_table]
    wanted = torch.autograd.grad(plain.square().sum(), params)

    for fused in (True, False):
        attention.fused_attn = fused
        for most, rows in ((2**24, height), (heads * width * count * 4, 4), (1, 1)):
            monkeypatch.setattr("rcmae.models.detection.benchmark.BAND", most)
            kept: list[int] = []

            def keep(tensor: Tensor, kept: list[int] = kept) -> Tensor:
                kept.append(tensor.numel())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                found = attention(x, bias())
            torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)
            got = torch.autograd.grad(found.square().sum(), params)
            for mine, theirs in zip(got, wanted, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)
            assert (max(kept) < heads * count**2) == (rows < height)


@pytest.mark.parametrize("backbone", ["vitdet", "benchmark"])
def test_each_image_loses_what_it_loses_alone(backbone: str) -> None:
    model = detector(backbone=backbone).eval()  # batch norm by its running statistics
    draw = torch.Generator().manual_seed(5)
    images = torch.randn(3, 3, 64, 64, generator=draw)
    extents = torch.tensor([[0.0, 0, 64, 64], [0, 0, 64, 40], [16, 0, 64, 64]])
    targets = targets_of([(0, [4, 4, 30, 28]), (2, [20, 30, 60, 60])], [], [(1, [20, 5, 40, 25])])
    luck = sampling(model, 3)
    together = model(images, extents, targets, luck)
    assert list(together) == list(losses.LOSSES)
    for row in range(3):
        part = slice(row, row + 1)
        alone = Sampling(luck.anchors[part], luck.regions[part])
        found = model(images[part], extents[part], targets[part], alone)
        for name, values in together.items():
            assert values[row].item() == pytest.approx(found[name].item(), rel=1e-5, abs=1e-6)
    assert together["mask"][1] == together["box_reg"][1] == together["rpn_loc"][1] == 0
    assert (together["cls"] > 0).all()


@pytest.mark.parametrize("backbone", ["vitdet", "benchmark"])
def test_an_image_without_objects_runs_every_head(backbone: str) -> None:
    model = detector(backbone=backbone).train()
    extents = torch.tensor([[0.0, 0, 64, 64]]).expand(2, 4)
    before = {name: value.clone() for name, value in model.named_buffers() if "mask_head" in name}
    found = model(torch.randn(2, 3, 64, 64), extents, targets_of([], []), sampling(model, 2))
    sum(values.sum() for values in found.values()).backward()
    assert found["mask"].tolist() == [0.0, 0.0]
    without = [name for name, param in model.named_parameters() if param.grad is None]
    assert without == []
    after = dict(model.named_buffers())
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_plan_knows_what_a_forward_keeps() -> None:
    """The most it may: how many regions show an object only the images say."""
    model = detector(
        regions_sampled=64, channels=64, proposals=[300, 20], proposals_per_level=[200, 20]
    ).train()
    targets = targets_of([(0, [4, 4, 30, 28]), (2, [20, 30, 60, 60])])
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        extents = torch.tensor([[0.0, 0, 64, 64]])
        model(torch.randn(1, 3, 64, 64), extents, targets, sampling(model, 1))
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    cost = detection_cost(model, averaged=False, precision="fp32", checkpointing="none")
    stated = sum(part.saved for part in cost.parts)
    assert 0.8 * found < stated < 3 * found
    assert cost.student is model
    assert sum(part.params for part in cost.parts) == sum(
        each.numel() for each in model.parameters()
    )


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (160, 96)])
def test_anchors_are_counted_before_they_are_made(size: tuple[int, int]) -> None:
    model = detector()
    _, found = model.look(torch.zeros(1, 3, *size))
    assert model.num_anchors(size) == len(found.anchors)


def test_batch_norm_of_maps_is_torchs_and_takes_none() -> None:
    torch.manual_seed(0)
    ours, theirs = GlobalBatchNorm(4), nn.BatchNorm2d(4)
    maps = torch.randn(3, 4, 5, 6)
    one, other = (maps.clone().requires_grad_() for _ in range(2))
    (ours(one) ** 3).sum().backward()
    (theirs(other) ** 3).sum().backward()
    assert torch.allclose(one.grad, other.grad, atol=1e-3)
    for name, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name].float(), value.float(), atol=1e-6)
    none = torch.empty(0, 4, 5, 6, requires_grad=True)
    ours(none).sum().backward()
    assert torch.allclose(ours.running_mean, theirs.running_mean)
    assert ours.running_var.isfinite().all()


# ------------------------------------------------------------------------------ what it starts from


def test_an_encoder_is_fitted_by_name() -> None:
    def encoder_of(width: int, depth: int) -> dict[str, Tensor]:
        sizes = NetworkSizes((32, 32), 16, 3, width, depth, 2)
        return Classifier(sizes, num_classes=0).state_dict()

    places = (("vitdet", "backbone.net.", 4), ("benchmark", "backbone.bottom_up.", 8))
    for backbone, place, depth in places:
        encoder = encoder_of(32, depth)
        model = detector(backbone=backbone)
        fit = fit_detector(model, encoder)
        taken = model.state_dict()[f"{place}blocks.3.mlp.fc2.weight"]
        assert torch.equal(taken, encoder["blocks.3.mlp.fc2.weight"])
        assert fit.resampled == (((2, 2), (3, 3)) if backbone == "vitdet" else None)
        assert {"cls_token"} <= set(fit.unused)
    for encoder, told in (
        (
            encoder_of(64, 4),
            r"instead of .*: set model\.name \(or embed_dim, depth, num_heads\) to those of",
        ),
        (encoder_of(32, 3), r"lacks backbone\.net\.blocks\.3"),
    ):
        with pytest.raises(Refused, match=told):
            fit_detector(detector(), encoder)
    canvas = ModelOptions(name="vit_tiny_patch16", **{**MODEL, "image_size": 128})
    larger = Detector(detector_sizes(canvas, DetectOptions(**DETECT)))
    with pytest.raises(Refused, match=r"set .*, model\.image_size and detect\.window to those of"):
        fit_detector(detector(), larger.state_dict())


def test_patches_of_another_side_are_resized() -> None:
    encoder = Classifier(NetworkSizes((28, 28), 14, 3, 32, 4, 2), num_classes=0).state_dict()
    model = detector()
    fit_detector(model, encoder)
    got = model.state_dict()["backbone.net.patch_embed.proj.weight"]
    assert got.shape[2:] == (16, 16)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('it ran')",)


def test_published_detectors_are_read_and_code_is_not_run(tmp_path: Path) -> None:
    model = detector(num_classes=5)
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    file = tmp_path / "model.pkl"
    for protocol in (2, 4):
        document = {"model": collections.OrderedDict(arrays), "__author__": "somebody"}
        file.write_bytes(pickle.dumps(document, protocol=protocol))
        weights = read_start(file).weights
        assert weights.keys() == arrays.keys()
    other = detector(num_classes=3)
    fit = fit_detector(other, weights)
    assert {name.split(".")[1] for name in fit.fresh} == {"box_predictor", "mask_head"}
    torch.save({"model": model.state_dict(), "iteration": 7}, tmp_path / "model.pth")
    same = read_start(tmp_path / "model.pth").weights
    assert all(torch.equal(same[name], torch.from_numpy(value)) for name, value in arrays.items())
    with pytest.raises(Refused, match=r"another backbone.*set detect\.backbone=vitdet"):
        fit_detector(detector(backbone="benchmark"), weights)
    resnet = {"backbone.body.conv1.weight": torch.zeros(1), "roi_heads.x": torch.zeros(1)}
    with pytest.raises(Refused, match=r"on no plain ViT.*backbone\.body\.conv1.*an encoder"):
        fit_detector(detector(), resnet)
    file.write_bytes(pickle.dumps({"model": {"a": _Evil()}}))
    with pytest.raises(Refused, match=r"asks for builtins\.exec.*nothing was run"):
        read_start(file)
    file.write_bytes(pickle.dumps({"model": {"a": "text"}}))
    with pytest.raises(Refused, match="no arrays of numbers"):
        read_start(file)
    file.write_bytes(b"no pickle")
    with pytest.raises(Refused):
        read_start(file)


@pytest.mark.parametrize(
    ("model", "detect", "told"),
    [
        ({"patch_size": 8}, {}, "set model.patch_size=16"),
        ({"image_size": (64, 80)}, {}, "width of 80; use 64 or 96"),
        ({}, {"window": 5}, "detect.window=5 is larger than the canvas of 4x4 patches"),
        ({}, {"window": 3, "backbone": "benchmark"}, "detect.window=3 does not divide"),
        ({}, {"backbone": "benchmark"}, "use 8 or more"),
        ({"depth": 6}, {}, "use a multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    model: dict[str, Any], detect: dict[str, Any], told: str
) -> None:
    options = ModelOptions(name="vit_tiny_patch16", **{**MODEL, **model})
    with pytest.raises(Refused, match=told.replace(".", r"\.")):
        detector_sizes(options, DetectOptions(**{**DETECT, **detect}))
