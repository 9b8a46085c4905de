"""SupMAE, BootMAE and MAE-priv written once more, plainly and in float64, beside `reference`.

Every patch is embedded and predicted in raster order, attention is a loop over heads, and masks
pick what is meant. Parameters carry the published names.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from reference import State


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> State:
    """A float32 state of these shapes in which nothing is at its usual start.

    Variances are above 0.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in sorted(shapes.items()):
        value = 0.2 * torch.randn(shape, generator=generator)
        scales = name.endswith("weight") and len(shape) == 1
        state[name] = value.abs() + 0.5 if "running_var" in name else value + scales
    return state


def row_first(width: int, grid: tuple[int, int], *, cls_token: bool) -> Tensor:
    """[1, c + L, width]: the row's angles, then the column's, each step in float32."""
    quarter = width // 4
    table = torch.zeros(int(cls_token) + grid[0] * grid[1], width, dtype=torch.float32)
    rates = torch.tensor(10000.0).pow(torch.arange(quarter).float() / quarter).reciprocal()
    for place in range(grid[0] * grid[1]):
        for half, index in enumerate((place // grid[1], place % grid[1])):
            angles = torch.tensor(float(index)) * rates
            row = torch.cat([angles.sin(), angles.cos()])
            table[int(cls_token) + place, 2 * half * quarter : 2 * (half + 1) * quarter] = row
    return table[None]


def norm(state: State, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    width = q.shape[-1] // heads
    parts = []
    for head in range(heads):
        of = slice(head * width, (head + 1) * width)
        parts.append(
            (q[..., of] @ k[..., of].transpose(1, 2) / math.sqrt(width)).softmax(dim=-1)
            @ v[..., of]
        )
    return torch.cat(parts, dim=-1)


def attention(state: State, name: str, heads: int, x: Tensor) -> Tensor:
    q, k, v = linear(state, f"{name}.qkv", x).chunk(3, dim=-1)
    return linear(
        state,
        f"{name}.proj",
        attend(q + state[f"{name}.q_bias"], k, v + state[f"{name}.v_bias"], heads),
    )


def cross(state: State, name: str, heads: int, x: Tensor, other: Tensor) -> Tensor:
    k, v = linear(state, f"{name}.kv", other).chunk(2, dim=-1)
    q = linear(state, f"{name}.q", x) + state[f"{name}.q_bias"]
    return linear(state, f"{name}.proj", attend(q, k, v + state[f"{name}.v_bias"], heads))


def mlp(state: State, name: str, x: Tensor) -> Tensor:
    hidden = linear(state, f"{name}.fc1", x)
    return linear(state, f"{name}.fc2", hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))


def block(state: State, name: str, heads: int, x: Tensor) -> Tensor:
    x = x + attention(state, f"{name}.attn", heads, norm(state, f"{name}.norm1", x))
    return x + mlp(state, f"{name}.mlp", norm(state, f"{name}.norm2", x))


def embedded(state: State, images: Tensor, patch: int, prefix: str = "") -> Tensor:
    kernel, bias = (state[f"{prefix}patch_embed.proj.{name}"] for name in ("weight", "bias"))
    return F.conv2d(images, kernel, bias, stride=patch).flatten(2).transpose(1, 2)


def picked(x: Tensor, ids: Tensor) -> Tensor:
    return torch.stack([tokens[each] for tokens, each in zip(x, ids, strict=True)])


# ------------------------------------------------------------------------------------------- SupMAE


def class_logits(state: State, features: Tensor, train: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the head with a hidden layer, and the running statistics after it."""
    x = linear(state, "cls_head.0", features)
    mean, variance = state["cls_head.1.running_mean"], state["cls_head.1.running_var"]
    after = (mean, variance)
    if train:
        seen, spread = x.mean(dim=0), (x - x.mean(dim=0)).square().mean(dim=0)
        unbiased = spread * len(x) / (len(x) - 1)
        after = (0.9 * mean + 0.1 * seen.detach(), 0.9 * variance + 0.1 * unbiased.detach())
        mean, variance = seen, spread
    x = (x - mean) / (variance + 1e-5).sqrt() * state["cls_head.1.weight"] + state[
        "cls_head.1.bias"
    ]
    return linear(state, "cls_head.3", x.clamp(min=0)), *after


def class_loss(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Mean over labelled rows of the negative logarithm of the label's share."""
    shares = (logits / temperature).log_softmax(dim=1)
    rows = [-shares[row, label] for row, label in enumerate(labels.tolist()) if label >= 0]
    return torch.stack(rows).mean()


# ------------------------------------------------------------------------------------------ BootMAE


def boot_features(state: State, images: Tensor, patch: int, depth: int, heads: int) -> Tensor:
    """[B, L, D] of all patches, out of the last block."""
    x = embedded(state, images, patch)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]
    for index in range(depth):
        x = block(state, f"blocks.{index}", heads, x)
    return x[:, 1:]


def boot_regress(
    state: State,
    suffix: str,
    latent: Tensor,
    other: Tensor,
    ids: Tensor,
    table: Tensor,
    depth: int,
    heads: int,
) -> Tensor:
    """Normalised tokens [B, L, d] of a regressor, in raster order."""
    x = linear(state, f"down{suffix}", latent)
    kept, patches = x.shape[1] - 1, ids.shape[1]
    whole = torch.zeros(len(x), 1 + patches, x.shape[2], dtype=x.dtype)
    rows = []
    for number in range(len(x)):
        hidden = torch.zeros(patches, dtype=torch.bool)
        hidden[ids[number, kept:]] = True
        place = {int(patch): at for at, patch in enumerate(ids[number, :kept])}
        tokens = [x[number, 0]]
        for patch in range(patches):
            masked = state[f"mask_token{suffix}"][0, 0] + table[0, 1 + patch]
            tokens.append(masked if hidden[patch] else x[number, 1 + place[patch]])
        rows.append(torch.stack(tokens))
    whole = torch.stack(rows)
    for index in range(depth):
        name = f"decode_blocks{suffix}.{index}"
        whole = whole + attention(state, f"{name}.attn", heads, norm(state, f"{name}.norm1", whole))
        looked = cross(
            state,
            f"{name}.c_attn",
            heads,
            norm(state, f"{name}.norm3", whole),
            norm(state, f"{name}.norm4", other),
        )
        whole = whole + looked
        whole = whole + mlp(state, f"{name}.mlp", norm(state, f"{name}.norm2", whole))
    return norm(state, f"decode_norm{suffix}", whole)[:, 1:]


def boot_forward(
    state: State,
    images: Tensor,
    ids: Tensor,
    kept: int,
    patch: int,
    depth: int,
    heads: int,
    decoder_depth: int,
    layers: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Pixels as a picture [B, C, H, W], and features [B, L, D], in raster order."""
    x = embedded(state, images, patch) + state["pos_embed"][:, 1:]
    cls_token = (state["cls_token"] + state["pos_embed"][:, :1]).expand(len(x), -1, -1)
    x = torch.cat([cls_token, picked(x, ids[:, :kept])], dim=1)
    seen = []
    for index in range(depth):
        x = block(state, f"blocks.{index}", heads, x)
        seen.append(x)
    latent = norm(state, "norm", x)
    low = boot_regress(
        state, "", latent, seen[layers[0]], ids, state["de_pos_embed"], decoder_depth, heads
    )
    high = boot_regress(
        state, "_1", latent, seen[layers[1]], ids, state["pos_embed"], decoder_depth, heads
    )
    rows, columns = images.shape[2] // patch, images.shape[3] // patch
    square = low.transpose(1, 2).unflatten(2, (rows, columns))
    picture = F.conv_transpose2d(
        square, state["lm_head.proj.weight"], state["lm_head.proj.bias"], stride=patch
    )
    return picture, linear(state, "lm_head_1", high)


def boot_target(images: Tensor, patch: int) -> Tensor:
    """The picture, each channel of each patch normalised by itself."""
    tiles = images.unfold(2, patch, patch).unfold(3, patch, patch)  # [B, C, rows, columns, p, p]
    mean = tiles.mean(dim=(4, 5), keepdim=True)
    tiles = (tiles - mean) / ((tiles - mean).square().mean(dim=(4, 5), keepdim=True) + 1e-5).sqrt()
    return tiles.permute(0, 1, 2, 4, 3, 5).reshape(images.shape)


def boot_weights(hidden: Tensor, weighted: bool) -> Tensor:
    """[B, rows, columns]: 1 at hidden patches, and more where the nine around are hidden."""
    padded = F.pad(hidden, (1, 1, 1, 1))
    rows, columns = hidden.shape[1:]
    around = sum(padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)) / 9
    return hidden * around + hidden if weighted else hidden


def plain_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def boot_losses(
    picture: Tensor,
    features: Tensor,
    taught: Tensor,
    images: Tensor,
    hidden: Tensor,
    patch: int,
    weighted: bool,
) -> tuple[Tensor, Tensor]:
    """Pixels and features; hidden: [B, rows, columns], 1 = hidden."""
    weights, share = boot_weights(hidden, weighted), hidden.mean()
    large = weights.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
    pixels = (large * (picture - boot_target(images, patch)).square()).mean() / share
    error = (plain_norm(taught) - plain_norm(features)).square() * weights.flatten(1)[:, :, None]
    return pixels, error.mean() / share


# ----------------------------------------------------------------------------------------- MAE-priv


def priv_forward(
    state: State,
    images: Tensor,
    ids: Tensor,
    kept: int,
    patch: int,
    depths: tuple[int, int],
    heads: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Encoder's output [B, kept, D] and predictions [B, L, C*p*p] in raster order."""
    x, table = embedded(state, images, patch, "encoder."), state["encoder.pos_embed"]
    has_cls = "encoder.cls_token" in state
    if has_cls:
        x = torch.cat([state["encoder.cls_token"].expand(len(x), -1, -1), x], dim=1)
    x = x + table
    first = x[:, : int(has_cls)]
    x = torch.cat([first, picked(x[:, int(has_cls) :], ids[:, :kept])], dim=1)
    for index in range(depths[0]):
        x = block(state, f"encoder.blocks.{index}", heads[0], x)
    x = norm(state, "encoder.norm", x[:, int(has_cls) :])
    y = linear(state, "encoder_to_decoder", x)
    y = torch.cat([y, state["mask_token"].expand(len(y), ids.shape[1] - kept, -1)], dim=1)
    y = picked(y, ids.argsort(dim=1)) + state["decoder_pos_embed"]
    for index in range(depths[1]):
        y = block(state, f"decoder.blocks.{index}", heads[1], y)
    return x, linear(state, "decoder.head", norm(state, "decoder.norm", y))


def priv_target(images: Tensor, patch: int, normalised: bool) -> Tensor:
    """[B, L, C*p*p] channel by channel."""
    tiles = images.unfold(2, patch, patch).unfold(3, patch, patch)
    rows = tiles.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return plain_norm(rows) if normalised else rows
