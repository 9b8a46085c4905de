"""Detectors: both backbones, and the names of published ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rcmae.engines.optim import param_groups
from rcmae.models.blocks import Draws
from rcmae.models.detection.benchmark import Pyramid, RelativeBias, bias_of
from rcmae.models.detection.detector import Detector
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
    for name, grid in biases_of(model).items():
        if name in state:
            fixture.close("tables", name, relative_index(grid), state.pop(name), EXACT)
    for name, table in dict(model.named_buffers()).items():
        if name not in model.state_dict() and name in state:
            fixture.close("tables", name, table, state.pop(name), EXACT)
    problem = ""
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        problem = str(error)
    fixture.true("weights load strictly", "model.safetensors", not problem, problem)


def biases_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The published name of each index into a table of biases, which the package does without ->
    the grid.
    """
    return {
        f"{name}.relative_position_index": module.grid
        for name, module in model.named_modules()
        if isinstance(module, RelativeBias)
    }


def relative_index(grid: tuple[int, int]) -> Tensor:
    """[L, L] the row of a table that each pair of patches takes, as `bias_of` does."""
    height, width = grid
    rows = torch.arange((2 * height - 1) * (2 * width - 1), dtype=torch.float64)
    return bias_of(rows.view(1, 2 * height - 1, 2 * width - 1), range(height))[0].long()


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
        got |= {key: [math.prod(grid)] * 2 for key, grid in biases_of(model).items()}
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
