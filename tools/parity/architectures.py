"""Position tables, and names, shapes and counts of the published architectures."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from rcmae.engines.optim import param_groups
from rcmae.models.classifier import Classifier
from rcmae.models.patches import sincos_positions
from rcmae.models.sizes import ARCHITECTURES, NetworkSizes
from rcmae.models.vit import MaskedAutoencoder

from .fixture import PRECISIONS, Fixture, Limit, Unusable


def pos_embed(fixture: Fixture) -> None:
    """The position tables, and their float32 rounding that models keep."""
    stated = [
        re.search(r"(\d\S*) absolute", fixture.tolerance(precision)) for precision in PRECISIONS
    ]
    if None in stated:
        raise Unusable("states no absolute limits")
    limits = [Limit(float(match[1]), 0.0) for match in stated if match]
    for name, want in fixture.arrays("expected.safetensors").items():
        match = re.fullmatch(r"mae\.dim(\d+)\.grid(\d+)(?:x(\d+))?\.cls([01])", name)
        if match is None:
            fixture.true("tables", name, False, "no table of that name is known", "float64")
            continue
        grid = (int(match[2]), int(match[3] or match[2]))
        table = sincos_positions(int(match[1]), grid, cls_token=match[4] == "1")
        for precision, limit in zip(PRECISIONS, limits, strict=True):
            fixture.close("tables", name, table.to(PRECISIONS[precision]), want, limit, precision)


def arch_names(fixture: Fixture) -> None:
    """Names, shapes and counts of the published architectures, and the order in which an
    optimizer numbers them.
    """
    for name, stated in fixture.value("architectures").items():
        ours = re.sub(r"^(rc_|mae_)|_dec\d+d\d+b$", "", name)
        if ours not in ARCHITECTURES:
            fixture.true("architectures", name, False, f"not among {', '.join(ARCHITECTURES)}")
            continue
        side = fixture.config["img_size"]
        sizes: dict[str, Any] = dict(ARCHITECTURES[ours])
        with torch.device("meta"):
            model: nn.Module = MaskedAutoencoder(
                NetworkSizes(image_size=(side, side), in_channels=3, **sizes)
            )
        shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        wanted = dict(stated["state_dict"])
        if "mask_token" not in wanted:  # one that classifies
            sizes = {key: value for key, value in sizes.items() if not key.startswith("decoder")}
            with torch.device("meta"):
                model = Classifier(
                    NetworkSizes(image_size=(side, side), in_channels=3, **sizes),
                    num_classes=wanted["head.weight"][0],
                    pool="mean" if "fc_norm.weight" in wanted else "cls",
                )
            shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        differing = sorted(
            key for key in shapes.keys() | wanted.keys() if shapes.get(key) != wanted.get(key)
        )
        fixture.true(
            "names and shapes", name, not differing, f"differ in {', '.join(differing[:5])}"
        )
        trainable = sum(param.numel() for param in model.parameters())
        everything = trainable + sum(buffer.numel() for buffer in model.buffers())
        for key, got in (("trainable", trainable), ("all_parameters", everything)):
            fixture.true(
                "counts", f"{name} {key}", got == stated[key], f"{got}, recorded {stated[key]}"
            )
        if "optimizer_order" in stated:
            decays = {
                param_name: group["weight_decay"] > 0
                for group in param_groups(model, 0.05)
                for param_name in group["param_names"]
            }
            keys = [key for key, _ in model.named_parameters()]
            order = [[key for key in keys if not decays[key]]]
            order.append([key for key in keys if decays[key]])
            fixture.true(
                "optimizer order",
                name,
                order == stated["optimizer_order"],
                "another order than recorded",
            )
