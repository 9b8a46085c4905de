"""A detector written once more, plainly and in float64: loops over windows, an index into each
table of relative positions, bilinear samples by torch's grid. Weights go by their published names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from segmentation_reference import State, part
from torch import Tensor
from torch.nn import functional as F

LEVELS = ("p2", "p3", "p4", "p5", "p6")


@dataclass(frozen=True)
class Plan:
    """Sizes of a small network."""

    image: tuple[int, int] = (96, 128)
    side: int = 128  # of the square canvas that tables are made for
    pretrained: int = 48
    width: int = 24
    depth: int = 4
    heads: int = 3
    window: int = 4
    windowed: tuple[int, ...] = (0, 1, 2)
    channels: int = 12
    groups: int = 8
    classes: int = 4
    box_width: int = 10
    patch: int = 16

    @property
    def grid(self) -> tuple[int, int]:
        return self.image[0] // self.patch, self.image[1] // self.patch


Shapes = dict[str, tuple[int, ...]]


def _pair(shapes: Shapes, name: str, *sides: int, bias: int | None = None) -> None:
    shapes[f"{name}.weight"] = sides
    shapes[f"{name}.bias"] = (sides[0] if bias is None else bias,)


def _normed(shapes: Shapes, name: str, outputs: int, inputs: int, side: int, norm: str) -> None:
    shapes[f"{name}.weight"] = (outputs, inputs, side, side)
    _pair(shapes, f"{name}.norm", outputs)
    if norm == "BN":
        for leaf in ("running_mean", "running_var"):
            shapes[f"{name}.norm.{leaf}"] = (outputs,)
        shapes[f"{name}.norm.num_batches_tracked"] = ()


def _block_shapes(shapes: Shapes, place: str, width: int) -> None:
    _pair(shapes, f"{place}.norm1", width)
    _pair(shapes, f"{place}.attn.qkv", 3 * width, width)
    _pair(shapes, f"{place}.attn.proj", width, width)
    _pair(shapes, f"{place}.norm2", width)
    _pair(shapes, f"{place}.mlp.fc1", 4 * width, width)
    _pair(shapes, f"{place}.mlp.fc2", width, 4 * width)


def vitdet_shapes(plan: Plan) -> Shapes:
    width, channels = plan.width, plan.channels
    rows = 1 + (plan.pretrained // plan.patch) ** 2
    shapes: Shapes = {"net.pos_embed": (1, rows, width)}
    _pair(shapes, "net.patch_embed.proj", width, 3, plan.patch, plan.patch)
    for number in range(plan.depth):
        place = f"net.blocks.{number}"
        _block_shapes(shapes, place, width)
        length = plan.window if number in plan.windowed else plan.side // plan.patch
        for axis in ("h", "w"):
            shapes[f"{place}.attn.rel_pos_{axis}"] = (2 * length - 1, width // plan.heads)
    _pair(shapes, "simfp_2.0", width, width // 2, 2, 2, bias=width // 2)
    _pair(shapes, "simfp_2.1", width // 2)
    _pair(shapes, "simfp_2.3", width // 2, width // 4, 2, 2, bias=width // 4)
    _pair(shapes, "simfp_3.0", width, width // 2, 2, 2, bias=width // 2)
    for level, first, inputs in (
        (2, 4, width // 4),
        (3, 1, width // 2),
        (4, 0, width),
        (5, 1, width),
    ):
        _normed(shapes, f"simfp_{level}.{first}", channels, inputs, 1, "LN")
        _normed(shapes, f"simfp_{level}.{first + 1}", channels, channels, 3, "LN")
    return shapes


def benchmark_shapes(plan: Plan) -> Shapes:
    width = plan.width
    shapes: Shapes = {"bottom_up.pos_embed": (1, plan.grid[0] * plan.grid[1], width)}
    _pair(shapes, "bottom_up.patch_embed.proj", width, 3, plan.patch, plan.patch)
    for number in range(plan.depth):
        _block_shapes(shapes, f"bottom_up.blocks.{number}", width)
    adapter = "bottom_up.ms_adaptor"
    _pair(shapes, f"{adapter}.0.0", width, width, 2, 2)
    _pair(shapes, f"{adapter}.0.1", width)
    _pair(shapes, f"{adapter}.0.3", width, width, 2, 2)
    _pair(shapes, f"{adapter}.1", width, width, 2, 2)
    for name, (height, length) in (("windowed", (plan.window,) * 2), ("global", plan.grid)):
        place = f"bottom_up.{name}_rel_pos_bias"
        rows = (2 * height - 1) * (2 * length - 1)
        shapes[f"{place}.relative_position_bias_table"] = (rows, plan.heads)
        shapes[f"{place}.relative_position_index"] = (height * length,) * 2
    for level in (2, 3, 4, 5):
        _normed(shapes, f"fpn_lateral{level}", plan.channels, width, 1, "BN")
        _normed(shapes, f"fpn_output{level}", plan.channels, plan.channels, 3, "BN")
    return shapes


def head_shapes(plan: Plan, norm: str) -> Shapes:
    channels, classes = plan.channels, plan.classes
    shapes: Shapes = {}
    place = "proposal_generator.rpn_head"
    for number in (0, 1):
        _pair(shapes, f"{place}.conv.conv{number}", channels, channels, 3, 3)
    _pair(shapes, f"{place}.objectness_logits", 3, channels, 1, 1)
    _pair(shapes, f"{place}.anchor_deltas", 12, channels, 1, 1)
    for number in (1, 2, 3, 4):
        _normed(shapes, f"roi_heads.box_head.conv{number}", channels, channels, 3, norm)
    _pair(shapes, "roi_heads.box_head.fc1", plan.box_width, channels * 49)
    _pair(shapes, "roi_heads.box_predictor.cls_score", classes + 1, plan.box_width)
    _pair(shapes, "roi_heads.box_predictor.bbox_pred", 4 * classes, plan.box_width)
    for number in (1, 2, 3, 4):
        _normed(shapes, f"roi_heads.mask_head.mask_fcn{number}", channels, channels, 3, norm)
    _pair(shapes, "roi_heads.mask_head.deconv", channels, channels, 2, 2)
    _pair(shapes, "roi_heads.mask_head.predictor", classes, channels, 1, 1)
    return shapes


def drawn(shapes: Shapes, seed: int) -> State:
    """Weights of no meaning, float32; scales around 1. Without indices."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        if name.endswith("relative_position_index"):
            continue
        value = 0.3 * torch.randn(shape, generator=generator)
        scales = ("running_var", "norm1.weight", "norm2.weight", "norm.weight", ".1.weight")
        if name.endswith(scales) and value.ndim == 1:
            value = 1 + value.clamp(-0.5, 0.5)
        elif value.ndim > 1 and "rel_pos" not in name:
            value = value / math.sqrt(shape[1] * math.prod(shape[2:])) * 2
        state[name] = torch.tensor(0) if name.endswith("tracked") else value
    return state


# --------------------------------------------------------------------------------------- the blocks


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _layer_norm(state: State, name: str, x: Tensor) -> Tensor:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return F.layer_norm(x, (x.shape[-1],), weight, bias, 1e-6)


def _mlp(state: State, x: Tensor) -> Tensor:
    inner = F.gelu(_linear(state, "mlp.fc1", _layer_norm(state, "norm2", x)))
    return x + _linear(state, "mlp.fc2", inner)


def _offsets(table: Tensor, side: int) -> Tensor:
    """[side, side, d] of a query and a key along one axis, the table brought to this side."""
    rows = 2 * side - 1
    if len(table) != rows:
        table = F.interpolate(table.T[None], size=rows, mode="linear", align_corners=False)[0].T
    places = torch.arange(side)
    return table[places[:, None] - places[None] + side - 1]


def _attended(state: State, x: Tensor, heads: int) -> Tensor:
    """Of one window [h, w, D]."""
    height, width, dim = x.shape
    q, k, v = _linear(state, "attn.qkv", x).view(height * width, 3, heads, -1).permute(1, 2, 0, 3)
    logits = q @ k.transpose(1, 2) / math.sqrt(dim // heads)
    grid = q.unflatten(1, (height, width))
    down = torch.einsum("nhwc,hkc->nhwk", grid, _offsets(state["attn.rel_pos_h"], height))
    across = torch.einsum("nhwc,wkc->nhwk", grid, _offsets(state["attn.rel_pos_w"], width))
    both = down[..., :, None] + across[..., None, :]  # [heads, h, w, h, w]
    logits = logits + both.flatten(3, 4).flatten(1, 2)
    mixed = (logits.softmax(dim=2) @ v).permute(1, 0, 2).reshape(height, width, dim)
    return _linear(state, "attn.proj", mixed)


def _by_windows(state: State, x: Tensor, side: int, heads: int) -> Tensor:
    """Of a grid [H, W, D], padded until windows divide it."""
    height, width = (-(-length // side) * side for length in x.shape[:2])
    padded = F.pad(x, (0, 0, 0, width - x.shape[1], 0, height - x.shape[0]))
    strips = []
    for top in range(0, height, side):
        windows = [
            _attended(state, padded[top : top + side, left : left + side], heads)
            for left in range(0, width, side)
        ]
        strips.append(torch.cat(windows, dim=1))
    return torch.cat(strips)[: x.shape[0], : x.shape[1]]


def vit_blocks(state: State, plan: Plan, images: Tensor) -> dict[str, Tensor]:
    """Positions, embedding and each block's tokens [B, H, W, D]."""
    side = plan.pretrained // plan.patch
    table = state["pos_embed"][:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=plan.grid, mode="bicubic", align_corners=False)
    found = {"positions": table.permute(0, 2, 3, 1)}
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    embedded = F.conv2d(images, weight, bias, stride=plan.patch).permute(0, 2, 3, 1)
    found["patch_embed"] = embedded
    x = embedded + found["positions"]
    for number in range(plan.depth):
        block = part(state, f"blocks.{number}.")
        normed = _layer_norm(block, "norm1", x)
        if number in plan.windowed:
            mixed = [_by_windows(block, image, plan.window, plan.heads) for image in normed]
        else:
            mixed = [_attended(block, image, plan.heads) for image in normed]
        x = _mlp(block, x + torch.stack(mixed))
        found[f"block.{number}"] = x
    return found


# ------------------------------------------------------------------------------------- the pyramids


def _pixel_norm(state: State, name: str, x: Tensor) -> Tensor:
    """Over the channels of each pixel."""
    mean = x.mean(dim=1, keepdim=True)
    spread = ((x - mean) ** 2).mean(dim=1, keepdim=True)
    weight, bias = (state[f"{name}.{leaf}"][None, :, None, None] for leaf in ("weight", "bias"))
    return (x - mean) / (spread + 1e-6).sqrt() * weight + bias


def _conv(state: State, name: str, x: Tensor) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), padding=weight.shape[2] // 2)


def _ln_conv(state: State, name: str, x: Tensor) -> Tensor:
    return _pixel_norm(state, f"{name}.norm", _conv(state, name, x))


def _doubled(state: State, name: str, x: Tensor) -> Tensor:
    return F.conv_transpose2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=2)


def simple_pyramid(state: State, tokens: Tensor) -> list[Tensor]:
    """p2 to p6 of tokens [B, H, W, D]."""
    x = tokens.permute(0, 3, 1, 2)
    second = F.gelu(_pixel_norm(state, "simfp_2.1", _doubled(state, "simfp_2.0", x)))
    inputs = [
        ("simfp_2", 4, _doubled(state, "simfp_2.3", second)),
        ("simfp_3", 1, _doubled(state, "simfp_3.0", x)),
        ("simfp_4", 0, x),
        ("simfp_5", 1, F.max_pool2d(x, 2)),
    ]
    levels = []
    for name, first, each in inputs:
        reduced = _ln_conv(state, f"{name}.{first}", each)
        levels.append(_ln_conv(state, f"{name}.{first + 1}", reduced))
    return [*levels, levels[-1][:, :, ::2, ::2]]


def row_first_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """[1, L, D]: the first half of the channels says the row, the second the column."""
    quarter = width // 4
    table = torch.zeros(1, grid[0] * grid[1], width, dtype=torch.float64)
    for row in range(grid[0]):
        for column in range(grid[1]):
            for half, place in enumerate((row, column)):
                for number in range(quarter):
                    angle = place / 10000 ** (number / quarter)
                    first = half * 2 * quarter + number
                    table[0, row * grid[1] + column, first] = math.sin(angle)
                    table[0, row * grid[1] + column, first + quarter] = math.cos(angle)
    return table


def _index(grid: tuple[int, int]) -> Tensor:
    height, width = grid
    places = [divmod(number, width) for number in range(height * width)]
    rows = []
    for yi, xi in places:
        row = [(yi - yj + height - 1) * (2 * width - 1) + xi - xj + width - 1 for yj, xj in places]
        rows.append(row)
    return torch.tensor(rows)


def _biased(state: State, x: Tensor, bias: Tensor, heads: int) -> Tensor:
    """A block on tokens [n, L, D]; bias: [heads, L, L]."""
    normed = _linear(state, "attn.qkv", _layer_norm(state, "norm1", x))
    q, k, v = normed.view(len(x), x.shape[1], 3, heads, -1).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(2, 3) / math.sqrt(x.shape[2] // heads) + bias
    mixed = (logits.softmax(dim=3) @ v).transpose(1, 2).flatten(2)
    return _mlp(state, x + _linear(state, "attn.proj", mixed))


def benchmark(state: State, plan: Plan, images: Tensor) -> dict[str, Tensor]:
    """Blocks, adapters and levels; moves the statistics in `state`."""
    inner = part(state, "bottom_up.")
    rows, columns = plan.grid
    weight, bias = inner["patch_embed.proj.weight"], inner["patch_embed.proj.bias"]
    x = F.conv2d(images, weight, bias, stride=plan.patch).flatten(2).transpose(1, 2)
    x = x + inner["pos_embed"]
    biases = {}
    for name, grid in (("windowed", (plan.window,) * 2), ("global", plan.grid)):
        table = inner[f"{name}_rel_pos_bias.relative_position_bias_table"]
        biases[name] = table[_index(grid)].permute(2, 0, 1)
    found: dict[str, Tensor] = {}
    maps = []
    side, each = plan.window, plan.depth // 4
    for number in range(plan.depth):
        block = part(inner, f"blocks.{number}.")
        if (number + 1) % each:
            whole = x.unflatten(1, (rows // side, side, columns // side, side))
            cut = whole.permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side, plan.width)
            cut = _biased(block, cut, biases["windowed"], plan.heads)
            found[f"block.{number}"] = cut
            back = cut.view(len(images), rows // side, columns // side, side, side, plan.width)
            x = back.permute(0, 1, 3, 2, 4, 5).reshape(len(images), rows * columns, plan.width)
        else:
            x = _biased(block, x, biases["global"], plan.heads)
            found[f"block.{number}"] = x
            maps.append(x.transpose(1, 2).unflatten(2, plan.grid))
    adapter = part(inner, "ms_adaptor.")
    doubled = _doubled(adapter, "0.0", maps[0])
    weight, bias = adapter["0.1.weight"], adapter["0.1.bias"]
    first = F.gelu(F.group_norm(doubled, plan.groups, weight, bias, 1e-5))
    adapted = [_doubled(adapter, "0.3", first), _doubled(adapter, "1", maps[1]), maps[2]]
    adapted.append(F.max_pool2d(maps[3], 2))
    found |= {f"adapted.s{number}": each for number, each in enumerate(adapted)}
    above = None
    for level in (5, 4, 3, 2):
        lateral = _bn_conv(state, f"fpn_lateral{level}", adapted[level - 2])
        if above is not None:
            lateral = lateral + above.repeat_interleave(2, 2).repeat_interleave(2, 3)
        above = lateral
        found[f"level.p{level}"] = _bn_conv(state, f"fpn_output{level}", lateral)
    found["level.p6"] = found["level.p5"][:, :, ::2, ::2]
    return found


def _bn_conv(state: State, name: str, x: Tensor) -> Tensor:
    x = _conv(state, name, x)
    mean, variance = (state[f"{name}.norm.running_{leaf}"] for leaf in ("mean", "var"))
    weight, bias = state[f"{name}.norm.weight"], state[f"{name}.norm.bias"]
    return F.batch_norm(x, mean, variance, weight, bias, True, 0.1, 1e-5)


def probed(levels: Sequence[Tensor], probes: Sequence[Tensor]) -> Tensor:
    parts = [(each * probe.double()).sum() for each, probe in zip(levels, probes, strict=True)]
    return torch.stack(parts).sum() / 100


# ---------------------------------------------------------------------------------------- the heads

Box = Sequence[float]


def anchors_of(sizes: Sequence[float], image: tuple[int, int]) -> Tensor:
    """[A, 4] float32: a size a level, three ratios, at the corners of its pixels."""
    found = []
    for size, stride in zip(sizes, (4, 8, 16, 32, 64), strict=True):
        rows, columns = (-(-side // stride) for side in image)
        for row in range(rows):
            for column in range(columns):
                for ratio in (0.5, 1.0, 2.0):
                    width = math.sqrt(size**2 / ratio)
                    half = torch.tensor([-width, -width * ratio, width, width * ratio]) / 2
                    shift = torch.tensor([column, row, column, row]) * float(stride)
                    found.append(shift + half)
    return torch.stack(found)


def proposed(state: State, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits [B, A] and deltas [B, A, 4]."""
    logits, deltas = [], []
    for x in levels:
        for number in (0, 1):
            x = _conv(state, f"conv.conv{number}", x).relu()
        logits.append(_conv(state, "objectness_logits", x).permute(0, 2, 3, 1).flatten(1))
        each = _conv(state, "anchor_deltas", x).permute(0, 2, 3, 1)
        deltas.append(each.reshape(len(x), -1, 4))
    return torch.cat(logits, dim=1), torch.cat(deltas, dim=1)


def shared_area(one: Tensor, other: Tensor) -> Tensor:
    """[N, M] intersection over union."""
    rows = []
    for x0, y0, x1, y1 in one.tolist():
        across = (other[:, 2].clamp(max=x1) - other[:, 0].clamp(min=x0)).clamp(min=0)
        down = (other[:, 3].clamp(max=y1) - other[:, 1].clamp(min=y0)).clamp(min=0)
        areas = (other[:, 2] - other[:, 0]) * (other[:, 3] - other[:, 1])
        both = across * down
        rows.append(both / ((x1 - x0) * (y1 - y0) + areas - both))
    return torch.stack(rows) if rows else other.new_zeros(0, len(other))


def decoded(box: Tensor, delta: Tensor, weights: Box, clip: tuple[int, int]) -> Tensor:
    """[4] of a source [4] and deltas [4], cut to (height, width)."""
    dx, dy, dw, dh = (delta / torch.tensor(weights, dtype=delta.dtype)).unbind()
    width, height = box[2] - box[0], box[3] - box[1]
    x = dx * width + box[0] + width / 2
    y = dy * height + box[1] + height / 2
    most = math.log(1000 / 16)
    across = dw.clamp(max=most).exp() * width / 2
    down = dh.clamp(max=most).exp() * height / 2
    corners = torch.stack([x - across, y - down, x + across, y + down])
    high = torch.tensor([clip[1], clip[0], clip[1], clip[0]], dtype=corners.dtype)
    return corners.clamp(min=0).minimum(high)


def encoded(box: Tensor, target: Tensor, weights: Box) -> Tensor:
    width, height = box[2] - box[0], box[3] - box[1]
    wide, high = target[2] - target[0], target[3] - target[1]
    deltas = [
        ((target[0] + wide / 2) - (box[0] + width / 2)) / width,
        ((target[1] + high / 2) - (box[1] + height / 2)) / height,
        (wide / width).log(),
        (high / height).log(),
    ]
    return torch.stack(deltas) * torch.tensor(weights, dtype=box.dtype)


def kept(boxes: Tensor, scores: Tensor, kinds: Sequence[int], threshold: float) -> list[int]:
    """Best first; none that a better one of its kind overlaps by more."""
    found: list[int] = []
    for number in scores.argsort(descending=True, stable=True).tolist():
        better = [each for each in found if kinds[each] == kinds[number]]
        over = shared_area(boxes[number : number + 1], boxes[better])
        if not bool((over > threshold).any()):
            found.append(number)
    return found


def pooled(maps: Tensor, box: Tensor, side: int, scale: float) -> Tensor:
    """[C, side, side] of what a box shows of [C, H, W]: the mean of bilinear samples."""
    axes, there = [], []
    for axis, length in ((0, maps.shape[2]), (1, maps.shape[1])):
        start, end = (box[axis + 2 * far] * scale - 0.5 for far in (0, 1))
        bins = (end - start) / side
        count = max(1, math.ceil(float(bins)))
        steps = torch.arange(side * count, dtype=maps.dtype)
        inner = (steps % count + 0.5) * (bins / count)
        at = start + steps.div(count, rounding_mode="floor") * bins + inner
        there.append((at >= -1) & (at <= length))
        axes.append(2 * at.clamp(0, length - 1) / (length - 1) - 1)
    rows, columns = torch.meshgrid(axes[1], axes[0], indexing="ij")
    grid = torch.stack([columns, rows], dim=2)[None]
    values = F.grid_sample(maps[None], grid, "bilinear", "border", align_corners=True)[0]
    values = values * (there[1][:, None] & there[0][None])
    return values.unflatten(2, (side, -1)).unflatten(1, (side, -1)).mean(dim=(2, 4))


def pooled_at(levels: Sequence[Tensor], image: int, box: Tensor, side: int, size: float) -> Tensor:
    """From the level that the box's size says."""
    area = float((box[2] - box[0]) * (box[3] - box[1]))
    level = min(5, max(2, math.floor(4 + math.log2(math.sqrt(area) / size + 1e-8))))
    return pooled(levels[level - 2][image], box.to(levels[0].dtype), side, 1 / 2**level)


def boxed(state: State, regions: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [R, classes + 1] and deltas [R, 4 classes] of [R, C, 7, 7]."""
    x = regions
    for number in (1, 2, 3, 4):
        x = _ln_conv(state, f"box_head.conv{number}", x).relu()
    x = _linear(state, "box_head.fc1", x.flatten(1)).relu()
    return tuple(_linear(state, f"box_predictor.{each}", x) for each in ("cls_score", "bbox_pred"))


def masked(state: State, regions: Tensor, classes: Sequence[int]) -> Tensor:
    """Logits [R, 28, 28] of each one's class, of [R, C, 14, 14]."""
    x = regions
    for number in (1, 2, 3, 4):
        x = _ln_conv(state, f"mask_head.mask_fcn{number}", x).relu()
    x = _doubled(state, "mask_head.deconv", x).relu()
    x = _conv(state, "mask_head.predictor", x)
    return torch.stack([row[kind] for row, kind in zip(x, classes, strict=True)])


def pasted(mask: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    """[H, W] bool of probabilities [28, 28] in a box."""
    rows = (torch.arange(size[0]) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
    columns = (torch.arange(size[1]) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=2)[None]
    return F.grid_sample(mask[None, None], grid.to(mask), align_corners=False)[0, 0] >= 0.5
