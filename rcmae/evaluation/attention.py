"""Where a Vision Transformer looks: its attention maps, and their rollout over the layers.

Maps are read from timm's own attention, with its fused kernel switched off for the moment, so they
come from any ViT of timm's blocks. Rollout (Abnar and Zuidema, 2020) multiplies the maps of all
layers, each averaged with the identity for the residual path; the variants with another fusion of
heads, with the weakest entries discarded and with gradients (Chefer et al., 2021, in its simplest
form) are those people show."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rcmae.errors import Refused

Fusion = Literal["mean", "max", "min"]
_FUSIONS: dict[str, Callable[[Tensor], Tensor]] = {  # [heads, N, N] -> [N, N]
    "mean": lambda layer: layer.mean(0),
    "max": lambda layer: layer.amax(0),
    "min": lambda layer: layer.amin(0),
}


@contextlib.contextmanager
def recording(model: nn.Module) -> Iterator[list[Tensor]]:
    """The attention after softmax of each block [B, heads, N, N] that a forward inside fills in,
    in order.
    """
    maps: list[Tensor] = []
    parts: list[Any] = [block.attn for block in model.blocks]  # type: ignore[union-attr]
    before = [part.fused_attn for part in parts]
    handles = [
        part.attn_drop.register_forward_hook(lambda _, __, out: maps.append(out)) for part in parts
    ]
    try:
        for part in parts:
            part.fused_attn = False
        yield maps
    finally:
        for part, fused, handle in zip(parts, before, handles, strict=True):
            part.fused_attn = fused
            handle.remove()


def attention_maps(model: nn.Module, images: Tensor) -> Tensor:
    """[depth, B, heads, N, N] of normalised images [B, C, H, W]; row i has the weights of token i.

    N: all tokens.
    """
    with recording(model) as maps, torch.no_grad():
        model(images)
    return torch.stack(maps)


def class_attention(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Maps weighted by how much they help each image's class: max(map * d score / d map, 0), shaped
    as those.

    Args:
        model: a classifier.
        images: [B, C, H, W] normalised.
        classes: [B] int64.
    """
    with recording(model) as maps, torch.enable_grad():
        scores = model(images)
        chosen = scores.gather(1, classes[:, None]).sum()
        grads = torch.autograd.grad(chosen, maps)
    return torch.stack(
        [(each * grad).clamp(min=0) for each, grad in zip(maps, grads, strict=True)]
    ).detach()


def rollout(
    maps: Tensor,
    *,
    fusion: Fusion = "mean",
    discard: float = 0.0,
    class_tokens: int = 1,
    registers: int = 0,
    published: bool = False,
) -> Tensor:
    """How much of each patch reaches the class token (the mean of several), or the mean of the
    patches where there is none: [L], the most 1.

    Args:
        maps: [depth, heads, N, N] of one image, class tokens first, then registers.
        fusion: of the heads.
        discard: this share of the smallest entries of each fused map is left out (the class token's
            own stays).
        class_tokens, registers: how many there are.
        published: divide each *column* by the sum of the row of the same number, as MAE-priv's
            released code does, which its pictures contain; otherwise each row by its own sum. The
            two differ only with `discard`.

    Raises:
        Refused: another fusion, or `discard` is not a share below 1.
    """
    if fusion not in _FUSIONS:
        raise Refused(f"fusion={fusion!r} is unknown; use mean, max or min")
    if not 0.0 <= discard < 1.0:
        raise Refused(f"discard={discard} must be a share from 0 to below 1")
    tokens = maps.shape[-1]
    identity = torch.eye(tokens, dtype=maps.dtype, device=maps.device)
    result = identity
    for layer in maps:
        flat = _FUSIONS[fusion](layer).flatten()
        weakest = flat.topk(int(flat.numel() * discard), largest=False).indices
        flat = flat.index_fill(0, weakest[weakest != 0] if class_tokens else weakest, 0.0)
        mixed = (flat.view(tokens, tokens) + identity) / 2
        sums = mixed.sum(dim=1)
        result = (mixed / (sums if published else sums[:, None])) @ result
    first = class_tokens + registers
    readers = result[:class_tokens] if class_tokens else result[first:]
    reached = readers[:, first:].mean(0)
    return reached / reached.max()
