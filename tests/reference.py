"""MAE and RC-MAE written once more, plainly and in float64, from the papers: what the package must
agree with.

No block of timm, no fused attention, no shuffled order: every patch is embedded, tokens are put
back in raster order, every patch is predicted and a mask picks the hidden ones. AdamW and the
moving average are loops over single tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    image: tuple[int, int] = (24, 16)
    patch: int = 4
    channels: int = 3
    width: int = 24
    depth: int = 2
    heads: int = 3
    decoder_width: int = 16
    decoder_depth: int = 2
    decoder_heads: int = 2

    @property
    def grid(self) -> tuple[int, int]:
        return self.image[0] // self.patch, self.image[1] // self.patch

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def model(self) -> dict[str, Any]:
        """The same as arguments of MaskedAutoencoder."""
        return {
            "image_size": self.image,
            "patch_size": self.patch,
            "in_channels": self.channels,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
            "decoder_dim": self.decoder_width,
            "decoder_depth": self.decoder_depth,
            "decoder_heads": self.decoder_heads,
        }


def positions_exact(width: int, grid: tuple[int, int]) -> Tensor:
    """[1 + L, width] float64, number by number: the column's angles, then the row's.

    A row of zeros for cls first.
    """
    quarter = width // 4
    rates = [10000.0 ** (-k / quarter) for k in range(quarter)]
    rows = [[0.0] * width]
    for row in range(grid[0]):
        for column in range(grid[1]):
            rows.append(
                [
                    f(place * rate)
                    for place in (column, row)
                    for f in (math.sin, math.cos)
                    for rate in rates
                ]
            )
    return torch.tensor(rows, dtype=torch.float64)


def positions(width: int, grid: tuple[int, int]) -> Tensor:
    """[1, 1 + L, width] float32, as models keep it."""
    return positions_exact(width, grid).float()[None]


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published parameters."""
    found: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, sizes.width),
        "mask_token": (1, 1, sizes.decoder_width),
        "patch_embed.proj.weight": (sizes.width, sizes.channels, sizes.patch, sizes.patch),
        "patch_embed.proj.bias": (sizes.width,),
    }

    def linear(name: str, given: int, made: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (made, given), (made,)

    def norm(name: str, width: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (width,), (width,)

    def blocks(name: str, count: int, width: int) -> None:
        for index in range(count):
            norm(f"{name}.{index}.norm1", width)
            linear(f"{name}.{index}.attn.qkv", width, 3 * width)
            linear(f"{name}.{index}.attn.proj", width, width)
            norm(f"{name}.{index}.norm2", width)
            linear(f"{name}.{index}.mlp.fc1", width, 4 * width)
            linear(f"{name}.{index}.mlp.fc2", 4 * width, width)

    blocks("blocks", sizes.depth, sizes.width)
    norm("norm", sizes.width)
    linear("decoder_embed", sizes.width, sizes.decoder_width)
    blocks("decoder_blocks", sizes.decoder_depth, sizes.decoder_width)
    norm("decoder_norm", sizes.decoder_width)
    linear("decoder_pred", sizes.decoder_width, sizes.patch**2 * sizes.channels)
    return found


def weights(sizes: Sizes, seed: int) -> State:
    """A float32 state dict in which nothing is at its usual start: no bias 0, no norm 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: 0.15 * torch.randn(shape, generator=generator)
        + ("norm" in name and name.endswith("weight"))
        for name, shape in shapes(sizes).items()
    }
    tables = {"pos_embed": sizes.width, "decoder_pos_embed": sizes.decoder_width}
    return state | {name: positions(width, sizes.grid) for name, width in tables.items()}


def double(state: State, *, grad: bool = False) -> State:
    """The same in float64; with `grad` as leaves, except the tables."""
    return {
        name: array.double().requires_grad_(grad and "pos_embed" not in name)
        for name, array in state.items()
    }


def inputs(sizes: Sizes, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W] and noise [B, L], float32."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, sizes.channels, *sizes.image, generator=generator)
    return images, torch.rand(batch, sizes.patches, generator=generator)


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, L, p*p*C], pixel by pixel of a patch's rows, channels last."""
    batch, _, height, width = images.shape
    rows = [
        images[:, :, top : top + patch, left : left + patch].permute(0, 2, 3, 1).reshape(batch, -1)
        for top in range(0, height, patch)
        for left in range(0, width, patch)
    ]
    return torch.stack(rows, dim=1)


def normalised(target: Tensor) -> Tensor:
    mean = target.mean(dim=-1, keepdim=True)
    variance = (target - mean).square().sum(dim=-1, keepdim=True) / (target.shape[-1] - 1)
    return (target - mean) / (variance + 1e-6).sqrt()


def transformer(
    state: State,
    name: str,
    depth: int,
    heads: int,
    x: Tensor,
    last: str | None = None,
    maps: list[Tensor] | None = None,
) -> Tensor:
    """Blocks, then the norm of the name `last` ("" for none).

    `maps` gets each block's attention [B, heads, N, N].
    """

    def norm(which: str, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{which}.weight"] + state[f"{which}.bias"]

    def linear(which: str, x: Tensor) -> Tensor:
        return x @ state[f"{which}.weight"].T + state[f"{which}.bias"]

    def attention(which: str, x: Tensor) -> Tensor:
        width = x.shape[-1] // heads
        q, k, v = linear(f"{which}.qkv", x).chunk(3, dim=-1)
        parts, seen = [], []
        for head in range(heads):
            of = slice(head * width, (head + 1) * width)
            scores = (q[..., of] @ k[..., of].transpose(1, 2)) * width**-0.5
            seen.append(scores.softmax(dim=-1))
            parts.append(seen[-1] @ v[..., of])
        if maps is not None:
            maps.append(torch.stack(seen, dim=1))
        return linear(f"{which}.proj", torch.cat(parts, dim=-1))

    for index in range(depth):
        block = f"{name}blocks.{index}"
        x = x + attention(f"{block}.attn", norm(f"{block}.norm1", x))
        hidden = linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x))
        gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(f"{block}.mlp.fc2", gelu)
    last = f"{name}norm" if last is None else last
    return norm(last, x) if last else x


def layer_norm(state: State, which: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{which}.weight"], state[f"{which}.bias"], 1e-6)


def classify(
    state: State, sizes: Sizes, images: Tensor, maps: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(features, scores) of a classifier: of the patches' mean where the state has a norm for
    it, else of cls.
    """
    kernel = state["patch_embed.proj.weight"]
    x = (
        F.conv2d(images, kernel, state["patch_embed.proj.bias"], stride=sizes.patch)
        .flatten(2)
        .transpose(1, 2)
    )
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]
    x = transformer(state, "", sizes.depth, sizes.heads, x, last="", maps=maps)
    mean = "fc_norm.weight" in state
    features = (
        layer_norm(state, "fc_norm", x[:, 1:].mean(1))
        if mean
        else layer_norm(state, "norm", x)[:, 0]
    )
    return features, features @ state["head.weight"].T + state["head.bias"]


def classifier_weights(sizes: Sizes, num_classes: int, seed: int) -> State:
    """Encoder and head, float32, nothing at its usual start."""
    generator = torch.Generator().manual_seed(seed + 1000)
    found = {
        name: value
        for name, value in weights(sizes, seed).items()
        if not name.startswith(("decoder", "mask_"))
    }
    head = {"head.weight": (num_classes, sizes.width), "head.bias": (num_classes,)}
    return found | {
        name: 0.3 * torch.randn(shape, generator=generator) for name, shape in head.items()
    }


def forward(
    state: State, sizes: Sizes, images: Tensor, noise: Tensor, kept: int
) -> dict[str, Tensor]:
    """latent, pred (raster order), mask (1 = hidden) and the two orders."""
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    mask = (ids_restore >= kept).double()
    kernel = state["patch_embed.proj.weight"]
    x = (
        F.conv2d(images, kernel, state["patch_embed.proj.bias"], stride=sizes.patch)
        .flatten(2)
        .transpose(1, 2)
    )
    x = x + state["pos_embed"][:, 1:]
    x = torch.stack([tokens[ids[:kept]] for tokens, ids in zip(x, ids_shuffle, strict=True)])
    cls_token = (state["cls_token"] + state["pos_embed"][:, :1]).expand(len(x), -1, -1)
    latent = transformer(state, "", sizes.depth, sizes.heads, torch.cat([cls_token, x], dim=1))
    y = latent @ state["decoder_embed.weight"].T + state["decoder_embed.bias"]
    filled = torch.cat(
        [y[:, 1:], state["mask_token"].expand(len(y), sizes.patches - kept, -1)], dim=1
    )
    filled = torch.stack([tokens[ids] for tokens, ids in zip(filled, ids_restore, strict=True)])
    y = torch.cat([y[:, :1], filled], dim=1) + state["decoder_pos_embed"]
    y = transformer(state, "decoder_", sizes.decoder_depth, sizes.decoder_heads, y)
    pred = (y @ state["decoder_pred.weight"].T + state["decoder_pred.bias"])[:, 1:]
    return {
        "latent": latent,
        "pred": pred,
        "mask": mask,
        "ids_shuffle": ids_shuffle,
        "ids_restore": ids_restore,
    }


def hidden_mean(error: Tensor, mask: Tensor) -> Tensor:
    """Mean over hidden patches of the mean over their pixels.

    Error: [B, L, p*p*C], mask: [B, L], 1 = hidden.
    """
    return (error.mean(dim=-1) * mask).sum() / mask.sum()


def losses(
    student: State,
    teacher: State | None,
    sizes: Sizes,
    images: Tensor,
    noise: Tensor,
    kept: int,
    norm_pix: bool,
) -> tuple[Tensor, Tensor]:
    """Reconstruction and consistency (0 without a teacher)."""
    found = forward(student, sizes, images, noise, kept)
    target = patchify(images, sizes.patch)
    target = normalised(target) if norm_pix else target
    reconstruction = hidden_mean((found["pred"] - target).square(), found["mask"])
    if teacher is None:
        return reconstruction, torch.zeros(())
    theirs = forward(teacher, sizes, images, noise, kept)["pred"].detach()
    return reconstruction, hidden_mean((found["pred"] - theirs).square(), found["mask"])


def gradients(state: State, loss: Tensor) -> State:
    leaves = {name: array for name, array in state.items() if array.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def decays(name: str, array: Tensor) -> bool:
    return array.ndim > 1 and not name.endswith(".bias")


class AdamW:
    """Loshchilov and Hutter, decoupled decay; betas as in MAE."""

    def __init__(self, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)) -> None:
        self.weight_decay, self.betas, self.steps = weight_decay, betas, 0
        self.first: State = {}
        self.second: State = {}

    @torch.no_grad()
    def step(self, state: State, grads: State, lr: float) -> None:
        self.steps += 1
        one, two = self.betas
        for name, grad in grads.items():
            self.first[name] = one * self.first.get(name, torch.zeros_like(grad)) + (1 - one) * grad
            self.second[name] = (
                two * self.second.get(name, torch.zeros_like(grad)) + (1 - two) * grad.square()
            )
            mean = self.first[name] / (1 - one**self.steps)
            scale = (self.second[name] / (1 - two**self.steps)).sqrt() + 1e-8
            decay = lr * self.weight_decay if decays(name, grad) else 0.0
            state[name].mul_(1 - decay).sub_(lr * mean / scale)


@torch.no_grad()
def move(teacher: State, student: State, momentum: float) -> None:
    for name, array in teacher.items():
        if "pos_embed" not in name:
            array.copy_(momentum * array + (1 - momentum) * student[name])


def lr_at(t: float, *, warmup: float, epochs: float, lr: float, min_lr: float) -> float:
    """By epochs, as the paper counts."""
    if t < warmup:
        return lr * t / warmup
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * (t - warmup) / (epochs - warmup)))


def momentum_at(place: int, total: int, base: float) -> float:
    """From base towards 1."""
    return 1 + 0.5 * (base - 1) * (1 + math.cos(math.pi * place / total))
