"""Which parameters decay, and which belong to the encoder: the optimizer's groups."""

from __future__ import annotations

from typing import Any

from torch import nn

ENCODER = ("cls_token", "patch_embed.", "blocks.", "norm.")
HEADS = ("cls_head.", "feature_head.")  # what no teacher has; everything else is the decoder's
GROUPS = tuple(f"{part}_{decay}" for part in ("encoder", "decoder", "head") for decay in ("decay", "no_decay"))


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups {encoder, decoder, head} x {decay, no decay} of the trainable parameters, in the model's order.

    A teacher has whole groups: encoder, or encoder and decoder. No decay for biases and 1-D parameters, as published:
    so the tokens, which are 3-D, do decay, except those that the model names `undecayed`. Each group has a
    `name`, its `params`, their names in `param_names` and its `weight_decay`. Groups without parameters are left out.
    """
    groups: dict[str, dict[str, Any]] = {
        name: {
            "name": name,
            "params": [],
            "param_names": [],
            "weight_decay": 0.0 if name.endswith("_no_decay") else weight_decay,
        }
        for name in GROUPS
    }
    for name, param in model.named_parameters():
        if param.requires_grad:
            part = "encoder" if name.startswith(ENCODER) else "head" if name.startswith(HEADS) else "decoder"
            undecayed = param.ndim == 1 or name.endswith(".bias") or name in getattr(model, "undecayed", ())
            decay = "no_decay" if undecayed else "decay"
            group = groups[f"{part}_{decay}"]
            group["params"].append(param)
            group["param_names"].append(name)
    return [group for group in groups.values() if group["params"]]
