"""A segmentation network written once more, plainly and in float64: an index into each table of
position biases, torch's own batch norm, loops over levels. Weights go by their published names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """Sizes of a small network."""

    image: tuple[int, int] = (12, 16)
    patch: int = 4
    width: int = 12
    depth: int = 4
    heads: int = 3
    levels: tuple[int, ...] = (0, 1, 2, 3)
    split: bool = False  # q_bias and v_bias, or one bias
    head_width: int = 8
    aux_width: int = 4
    classes: int = 5
    scales: tuple[int, ...] = (1, 2, 3, 6)

    @property
    def grid(self) -> tuple[int, int]:
        return self.image[0] // self.patch, self.image[1] // self.patch


def _norm(shapes: dict[str, tuple[int, ...]], name: str, width: int) -> None:
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        shapes[f"{name}.{leaf}"] = (width,)
    shapes[f"{name}.num_batches_tracked"] = ()


def backbone_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    width, (rows, columns) = plan.width, plan.grid
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + rows * columns, width),
        "patch_embed.proj.weight": (width, 3, plan.patch, plan.patch),
        "patch_embed.proj.bias": (width,),
    }
    for index in range(plan.depth):
        block = f"blocks.{index}"
        for leaf in ("gamma_1", "gamma_2", "norm1.weight", "norm1.bias"):
            shapes[f"{block}.{leaf}"] = (width,)
        table = (2 * rows - 1) * (2 * columns - 1) + 3
        shapes[f"{block}.attn.relative_position_bias_table"] = (table, plan.heads)
        shapes[f"{block}.attn.qkv.weight"] = (3 * width, width)
        if plan.split:
            shapes[f"{block}.attn.q_bias"] = shapes[f"{block}.attn.v_bias"] = (width,)
        else:
            shapes[f"{block}.attn.qkv.bias"] = (3 * width,)
        for name, sides in (
            ("attn.proj", (width, width)),
            ("mlp.fc1", (4 * width, width)),
            ("mlp.fc2", (width, 4 * width)),
        ):
            shapes[f"{block}.{name}.weight"] = sides
            shapes[f"{block}.{name}.bias"] = sides[:1]
        shapes[f"{block}.norm2.weight"] = shapes[f"{block}.norm2.bias"] = (width,)
    for name in ("fpn1.0", "fpn1.3", "fpn2.0"):
        shapes[f"{name}.weight"] = (width, width, 2, 2)
        shapes[f"{name}.bias"] = (width,)
    _norm(shapes, "fpn1.1", width)
    return shapes


def head_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    width, out = plan.width, plan.head_width
    shapes: dict[str, tuple[int, ...]] = {}

    def module(name: str, channels: int, channels_out: int, kernel: int) -> None:
        shapes[f"{name}.conv.weight"] = (channels_out, channels, kernel, kernel)
        _norm(shapes, f"{name}.bn", channels_out)

    for head, channels in (("decode_head", out), ("auxiliary_head", plan.aux_width)):
        shapes[f"{head}.conv_seg.weight"] = (plan.classes, channels, 1, 1)
        shapes[f"{head}.conv_seg.bias"] = (plan.classes,)
    for index in range(len(plan.scales)):
        module(f"decode_head.psp_modules.{index}.1", width, out, 1)
    module("decode_head.bottleneck", width + len(plan.scales) * out, out, 3)
    for index in range(3):
        module(f"decode_head.lateral_convs.{index}", width, out, 1)
        module(f"decode_head.fpn_convs.{index}", out, out, 3)
    module("decode_head.fpn_bottleneck", 4 * out, out, 3)
    module("auxiliary_head.convs.0", width, plan.aux_width, 3)
    return shapes


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> State:
    """Weights of no meaning, float32; scales around 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        value = 0.3 * torch.randn(shape, generator=generator)
        if name.endswith(("running_var", "gamma_1", "gamma_2", "norm1.weight", "bn.weight")):
            value = 1 + value.clamp(-0.5, 0.5)
        state[name] = torch.tensor(0) if name.endswith("tracked") else value
    return state


def network(plan: Plan, seed: int) -> State:
    """Weights of a whole one."""
    shapes = {f"backbone.{name}": shape for name, shape in backbone_shapes(plan).items()}
    return drawn(shapes | head_shapes(plan), seed)


def wide(state: State) -> State:
    """In float64, with gradients; statistics without."""
    found = {}
    for name, value in state.items():
        found[name] = value if name.endswith("tracked") else value.double().clone()
        if "running" not in name and not name.endswith("tracked"):
            found[name].requires_grad_()
    return found


def index(grid: tuple[int, int]) -> Tensor:
    rows, columns = grid
    count = rows * columns
    table = (2 * rows - 1) * (2 * columns - 1) + 3
    found = torch.zeros(1 + count, 1 + count, dtype=torch.int64)
    for i in range(count):
        for j in range(count):
            down = i // columns - j // columns + rows - 1
            across = i % columns - j % columns + columns - 1
            found[1 + i, 1 + j] = down * (2 * columns - 1) + across
    found[0, :] = table - 3
    found[:, 0] = table - 2
    found[0, 0] = table - 1
    return found


def encoded(state: State, plan: Plan, images: Tensor) -> list[Tensor]:
    """Maps of the levels."""
    weight = state["patch_embed.proj.weight"]
    x = F.conv2d(images, weight, state["patch_embed.proj.bias"], stride=plan.patch)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]
    places = index(plan.grid)
    maps = []
    for number in range(plan.depth):
        block = {
            name.removeprefix(f"blocks.{number}."): value
            for name, value in state.items()
            if name.startswith(f"blocks.{number}.")
        }
        x = _block(block, x, plan, places)
        maps.append(x[:, 1:].transpose(1, 2).unflatten(2, plan.grid))
    return [maps[level] for level in plan.levels]


def _block(block: State, x: Tensor, plan: Plan, places: Tensor) -> Tensor:
    width, heads = plan.width, plan.heads
    normed = F.layer_norm(x, (width,), block["norm1.weight"], block["norm1.bias"], 1e-6)
    bias = block.get("attn.qkv.bias")
    if bias is None:
        query, value = block["attn.q_bias"], block["attn.v_bias"]
        bias = torch.cat([query, torch.zeros_like(query), value])
    joined = normed @ block["attn.qkv.weight"].T + bias
    q, k, v = joined.view(len(x), -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(2, 3) / math.sqrt(width // heads)
    scores = scores + block["attn.relative_position_bias_table"][places].permute(2, 0, 1)
    mixed = (scores.softmax(dim=3) @ v).transpose(1, 2).flatten(2)
    x = x + block["gamma_1"] * (mixed @ block["attn.proj.weight"].T + block["attn.proj.bias"])
    normed = F.layer_norm(x, (width,), block["norm2.weight"], block["norm2.bias"], 1e-6)
    inner = F.gelu(normed @ block["mlp.fc1.weight"].T + block["mlp.fc1.bias"])
    return x + block["gamma_2"] * (inner @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"])


def batch_norm(state: State, name: str, x: Tensor, *, train: bool) -> Tensor:
    """Moves the statistics in `state` in training."""
    mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return F.batch_norm(x, mean, variance, weight, bias, train, 0.1, 1e-5)


def pyramid(state: State, maps: Sequence[Tensor], *, train: bool) -> list[Tensor]:
    def doubled(x: Tensor, name: str) -> Tensor:
        return F.conv_transpose2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=2)

    first = F.gelu(batch_norm(state, "fpn1.1", doubled(maps[0], "fpn1.0"), train=train))
    return [doubled(first, "fpn1.3"), doubled(maps[1], "fpn2.0"), maps[2], F.max_pool2d(maps[3], 2)]


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _module(state: State, name: str, x: Tensor, *, train: bool) -> Tensor:
    weight = state[f"{name}.conv.weight"]
    x = F.conv2d(x, weight, padding=weight.shape[2] // 2)
    return batch_norm(state, f"{name}.bn", x, train=train).relu()


def decoded(state: State, plan: Plan, levels: Sequence[Tensor], *, train: bool) -> Tensor:
    """What UPerNet classifies."""
    head = "decode_head"
    top = levels[3]
    pooled = [top]
    for number, side in enumerate(plan.scales):
        small = F.adaptive_avg_pool2d(top, side)
        small = _module(state, f"{head}.psp_modules.{number}.1", small, train=train)
        pooled.append(resized(small, top.shape[2:]))
    lateral = _module(state, f"{head}.bottleneck", torch.cat(pooled, dim=1), train=train)
    found = [lateral]
    for number in (2, 1, 0):
        mine = _module(state, f"{head}.lateral_convs.{number}", levels[number], train=train)
        lateral = mine + resized(lateral, mine.shape[2:])
        found.insert(0, _module(state, f"{head}.fpn_convs.{number}", lateral, train=train))
    joined = torch.cat([resized(each, found[0].shape[2:]) for each in found], dim=1)
    return _module(state, f"{head}.fpn_bottleneck", joined, train=train)


def classified(
    state: State, head: str, x: Tensor, keep: Tensor | None = None, rate: float = 0.1
) -> Tensor:
    if keep is not None:
        x = x * keep[:, :, None, None] / (1 - rate)
    return F.conv2d(x, state[f"{head}.conv_seg.weight"], state[f"{head}.conv_seg.bias"])


def beside(state: State, level: Tensor, *, train: bool) -> Tensor:
    """What the auxiliary head classifies."""
    return _module(state, "auxiliary_head.convs.0", level, train=train)


def part(state: State, prefix: str) -> State:
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


def logits(state: State, plan: Plan, images: Tensor, *, train: bool) -> list[Tensor]:
    """Of the head, and of the one beside it."""
    backbone = part(state, "backbone.")
    levels = pyramid(backbone, encoded(backbone, plan, images), train=train)
    main = decoded(state, plan, levels, train=train)
    other = beside(state, levels[2], train=train)
    return [classified(state, "decode_head", main), classified(state, "auxiliary_head", other)]


def pixel_loss(scores: Tensor, maps: Tensor) -> Tensor:
    """The mean over all pixels; those of 255 count 0."""
    logs = resized(scores, maps.shape[1:]).log_softmax(dim=1)
    there = maps != 255
    chosen = logs.gather(1, torch.where(there, maps, 0).long()[:, None])[:, 0]
    return -(chosen * there).sum() / maps.numel()
