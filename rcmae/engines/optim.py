"""Which parameters decay, how fast each moves, and the one optimizer that torch has not: LARS."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

ENCODER = ("cls_token", "patch_embed.", "blocks.", "norm.")
HEADS = ("cls_head.", "feature_head.")  # what no teacher has; everything else is the decoder's
GROUPS = tuple(
    f"{part}_{decay}" for part in ("encoder", "decoder", "head") for decay in ("decay", "no_decay")
)


def param_groups(
    model: nn.Module, weight_decay: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Groups {encoder, decoder, head} x {decay, no decay} of the trainable parameters, in the
    model's order.

    A teacher has whole groups: encoder, or encoder and decoder. No decay for biases and 1-D
    parameters, as published: so the tokens, which are 3-D, do decay, except those that the model
    names `undecayed`. Each group has a `name`, its `params`, their names in `param_names` and its
    `weight_decay`. Groups without parameters are left out. With `layer_decay` the groups are those
    of `layer_groups` instead."""
    if layer_decay is not None:
        return layer_groups(model, weight_decay, layer_decay)
    groups: dict[str, dict[str, Any]] = {name: _group(name, weight_decay) for name in GROUPS}
    for name, param in model.named_parameters():
        if param.requires_grad:
            part = (
                "encoder"
                if name.startswith(ENCODER)
                else "head"
                if name.startswith(HEADS)
                else "decoder"
            )
            undecayed = (
                param.ndim == 1 or name.endswith(".bias") or name in getattr(model, "undecayed", ())
            )
            decay = "no_decay" if undecayed else "decay"
            group = groups[f"{part}_{decay}"]
            group["params"].append(param)
            group["param_names"].append(name)
    return [group for group in groups.values() if group["params"]]


def layer_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Groups {layer} x {decay, no decay} of a classifier, in the order in which its parameters come
    upon them.

    Layer 0 is the embedding (patches, class token, positions), then the blocks, then norm and head.
    A layer moves at `lr_scale` = layer_decay ** (layers above it) of the learning rate (Clark et
    al., 2020; MAE, appendix A.1). No decay for 1-D parameters, the class token and positions.
    """
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    last = 1 + max(
        (int(match[1]) + 1 for name in names if (match := re.match(r"blocks\.(\d+)\.", name))),
        default=0,
    )
    groups: dict[str, dict[str, Any]] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        block = re.match(r"blocks\.(\d+)\.", name)
        embedding = name.startswith(("cls_token", "pos_embed", "patch_embed."))
        layer = int(block[1]) + 1 if block else 0 if embedding else last
        still = param.ndim == 1 or name in ("cls_token", "pos_embed")
        key = f"layer_{layer}_{'no_decay' if still else 'decay'}"
        group = groups.setdefault(
            key, _group(key, weight_decay) | {"lr_scale": layer_decay ** (last - layer)}
        )
        group["params"].append(param)
        group["param_names"].append(name)
    return list(groups.values())


def _group(name: str, weight_decay: float) -> dict[str, Any]:
    decay = 0.0 if name.endswith("_no_decay") else weight_decay
    return {"name": name, "params": [], "param_names": [], "weight_decay": decay}


class LARS(torch.optim.Optimizer):
    """Momentum SGD whose matrices move in proportion to their own norm (You et al., 2017), for
    linear probes.

    A matrix p with gradient g moves along d = g + weight_decay * p, scaled by trust * |p| / |d|
    unless a norm is 0; parameters of a group whose name ends in "_no_decay" move along g. Then mu =
    momentum * mu + d and p -= lr * mu. Each parameter is scaled by itself, so a flat tensor that is
    handed in should hold one.

    Args:
        groups: with a `name` each.
        momentum: of mu.
        trust: None leaves the scaling out: SGD with momentum.
        all_sum: where parameters are shards, adds a tensor up over the ranks in place; every rank
            calls.
    """

    moments = ("momentum",)  # names of the state that a checkpoint keeps of each parameter

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        momentum: float = 0.9,
        trust: float | None = 0.001,
        all_sum: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum})
        self._trust, self._all_sum = trust, all_sum

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update. Collective where parameters are shards: every rank calls."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(param, requires_grad=False)
                state["step"] = state.get("step", 0) + 1
                weight, step, average = (
                    _local(each) for each in (param.data, param.grad, state["momentum"])
                )
                if not group["name"].endswith("_no_decay"):
                    step = step.add(weight, alpha=group["weight_decay"])
                    if self._trust is not None:
                        step = step * self._scale(weight, step, self._trust)
                average.mul_(group["momentum"]).add_(step)
                weight.sub_(average, alpha=group["lr"])

    def _scale(self, weight: Tensor, step: Tensor, trust: float) -> Tensor:
        """trust * |p| / |d|, or 1 where one of them is 0."""
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        squares = torch.stack([each.to(wide).square().sum() for each in (weight, step)])
        length, way = self._all_sum(squares).sqrt()
        return torch.where((length > 0) & (way > 0), trust * length / way, torch.ones_like(way)).to(
            step.dtype
        )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def moments(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of the state that an optimizer keeps of each parameter, besides the step."""
    return getattr(optimizer, "moments", ("exp_avg", "exp_avg_sq"))
