"""Which parameters decay, how fast each moves, and the one optimizer that torch has not: LARS."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rcmae.models.protocol import PARTS, Place

GROUPS = tuple(f"{part}_{decay}" for part in PARTS for decay in ("decay", "no_decay"))


def param_groups(
    model: nn.Module, weight_decay: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Groups {encoder, decoder, head} x {decay, no decay} of the trainable parameters, in the
    model's order.

    The model says where each parameter is and whether it decays (`models.protocol.Trainable`), so a
    teacher has whole groups. Each group has a `name`, its `params`, their names in `param_names`
    and its `weight_decay`. Groups without parameters are left out. With `layer_decay` the groups
    are those of `layer_groups` instead.

    Raises:
        LookupError: a parameter is in no part of the model, and so in no group.
    """
    if layer_decay is not None:
        return layer_groups(model, weight_decay, layer_decay)
    groups = {name: _group(name, weight_decay) for name in GROUPS}
    for name, param, place in _placed(model):
        if place.part not in PARTS:
            raise LookupError(f"{name} is in {place.part}, which is none of {', '.join(PARTS)}")
        group = groups[f"{place.part}_{'decay' if place.decays else 'no_decay'}"]
        group["params"].append(param)
        group["param_names"].append(name)
    return [group for group in groups.values() if group["params"]]


def layer_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Groups {layer} x {decay, no decay} of a classifier, in the order in which its parameters come
    upon them.

    A layer moves at `lr_scale` = layer_decay ** (layers above it) of the learning rate (Clark et
    al., 2020; MAE, appendix A.1).
    """
    network: Any = model
    last = network.num_layers - 1
    groups: dict[str, dict[str, Any]] = {}
    for name, param, place in _placed(model):
        key = f"layer_{place.layer}_{'decay' if place.decays else 'no_decay'}"
        if key not in groups:
            groups[key] = _group(key, weight_decay)
            groups[key]["lr_scale"] = layer_decay ** (last - place.layer)
        groups[key]["params"].append(param)
        groups[key]["param_names"].append(name)
    return list(groups.values())


def _placed(model: nn.Module) -> Iterable[tuple[str, nn.Parameter, Place]]:
    """The trainable parameters, each with where its network has it."""
    network: Any = model
    for name, param in model.named_parameters():
        if param.requires_grad:
            yield name, param, network.place_of(name)


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
        self._trust = trust
        self._all_sum = all_sum

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
    """The shard itself of a DTensor, which is not imported to know one: it costs half a second."""
    shard = getattr(tensor, "to_local", None)
    return tensor if shard is None else shard()


def moments(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of the state that an optimizer keeps of each parameter, besides the step."""
    return getattr(optimizer, "moments", ("exp_avg", "exp_avg_sq"))


def set_rates(groups: Iterable[dict[str, Any]], *, lr: float, weight_decay: float) -> None:
    """The step's rates into an optimizer's groups; no-decay groups stay at 0."""
    for group in groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        group["weight_decay"] = 0.0 if group["name"].endswith("_no_decay") else weight_decay


def prime(
    optimizer: torch.optim.Optimizer, params: Iterable[Tensor], step: int, *, zero: bool = False
) -> None:
    """Give each of the optimizer's fp32 tensors its state, zero where there was none, and set its
    step.

    Optimizers make their state at the first update; a checkpoint needs to know where it lies before
    that. `zero` also empties moments that exist: some engines take a first step of their own while
    they are set up."""
    group = optimizer.param_groups[0]
    for each in optimizer.param_groups:
        if "step" in each:  # apex counts by group
            each["step"] = step
    for param in params:
        state = optimizer.state[param]
        for key in moments(optimizer):
            if key not in state:
                state[key] = torch.zeros_like(param, requires_grad=False)
            elif zero:
                state[key].zero_()
        if isinstance(state.get("step"), Tensor):
            state["step"].fill_(step)
        elif "step" in state or not isinstance(optimizer, torch.optim.AdamW):
            state["step"] = step
        else:
            device = (
                param.device
                if group.get("fused") or group.get("capturable")
                else torch.device("cpu")
            )
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)


def step_of(optimizer: torch.optim.Optimizer, param: Tensor) -> int:
    """How many updates the optimizer has made."""
    return int(optimizer.param_groups[0].get("step", optimizer.state[param].get("step", 0)))
