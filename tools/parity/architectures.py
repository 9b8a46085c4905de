"""Position tables, and names, shapes and counts of the published architectures."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import torch
from torch import nn

from rcmae.engines.optim import param_groups
from rcmae.models.classifier import Classifier
from rcmae.models.patches import Positions, sincos_positions
from rcmae.models.sizes import ARCHITECTURES, NetworkSizes
from rcmae.models.vit import Heads, MaskedAutoencoder

from .fixture import PRECISIONS, Fixture, Limit, Unusable
from .networks import image_size

# a family, as a table's name begins -> the order of the table's halves
ORDERS: dict[str, Positions] = {
    "mae": "column_first",
    "rcmae": "column_first",
    "supmae": "column_first",
    "maepriv": "row_first",
    "bootmae": "row_first",
    "moco": "row_first",
    "mocov3": "row_first",
}
_TABLE = re.compile(
    r"(?P<family>[\w-]+)\.dim(?P<dim>\d+)\.grid(?P<rows>\d+)(?:x(?P<columns>\d+))?"
    r"\.cls(?P<cls>[01])"
)
# of an architecture: whose, the size, the patch, the image, the decoder's width and depth
_NAME = re.compile(
    r"(?:(?:rc|mae|supmae)_)*(?P<size>vit_[a-z]+)_patch(?P<patch>\d+)(?:_(?P<image>\d+))?"
    r"(?:_dec(?P<width>\d+)d(?P<depth>\d+)b)?"
)


def pos_embed(fixture: Fixture) -> None:
    """The position tables, and their float32 rounding that models keep."""
    stated = [
        re.search(r"(\d\S*) absolute", fixture.tolerance(precision)) for precision in PRECISIONS
    ]
    if None in stated:
        raise Unusable("states no absolute limits")
    limits = [Limit(float(match[1]), 0.0) for match in stated if match]
    for name, want in fixture.arrays("expected.safetensors").items():
        match = _TABLE.fullmatch(name)
        family = re.sub(r"[^a-z0-9]", "", match["family"].lower()) if match else ""
        if match is None or family not in ORDERS:
            fixture.true("tables", name, False, "no table of that name is known", "float64")
            continue
        table = sincos_positions(
            int(match["dim"]),
            (int(match["rows"]), int(match["columns"] or match["rows"])),
            prefix=int(match["cls"]),
            order=ORDERS[family],
        )
        for precision, limit in zip(PRECISIONS, limits, strict=True):
            fixture.close("tables", name, table.to(PRECISIONS[precision]), want, limit, precision)


def arch_names(fixture: Fixture) -> None:
    """Names, shapes and counts of the published architectures, and the order in which an
    optimizer numbers them.
    """
    for name, stated in fixture.value("architectures").items():
        wanted = dict(stated["state_dict"])
        sizes = named_sizes(name, image_size(fixture.config))
        if sizes is None:
            fixture.true("architectures", name, False, f"not among {', '.join(ARCHITECTURES)}")
            continue
        with torch.device("meta"):
            model = _network(sizes, wanted)
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


def named_sizes(name: str, pixels: tuple[int, int]) -> NetworkSizes | None:
    """The sizes that a published name says; None: it is not a name of an architecture here.

    A decoder in the name (`..._dec512d8b`: width 512, 8 blocks) is that one, else the size's own.
    """
    match = _NAME.fullmatch(name)
    alike = [key for key in ARCHITECTURES if match and key.startswith(f"{match['size']}_patch")]
    if match is None or not alike:
        return None
    sizes: dict[str, Any] = ARCHITECTURES[alike[0]] | {"patch_size": int(match["patch"])}
    if match["width"]:
        sizes["decoder_dim"] = int(match["width"])
        sizes["decoder_depth"] = int(match["depth"])
        # no shape shows how many heads it has: any number will do that divides the width
        sizes["decoder_heads"] = math.gcd(sizes["decoder_heads"], sizes["decoder_dim"])
    if match["image"]:
        pixels = (int(match["image"]),) * 2
    return NetworkSizes(image_size=pixels, in_channels=3, **sizes)


def _network(sizes: NetworkSizes, wanted: dict[str, list[int]]) -> nn.Module:
    """Of these sizes: what pretrains where there is a mask token, else what classifies."""
    if "mask_token" in wanted:
        last = [key for key in wanted if key.startswith("cls_head.") and key.endswith("weight")]
        heads = None
        if last:
            hidden = wanted[last[0]][0] if len(last) > 1 else 0
            heads = Heads(num_classes=wanted[last[-1]][0], class_hidden=hidden)
        return MaskedAutoencoder(sizes, heads=heads)
    return Classifier(
        dataclasses.replace(sizes, decoder_dim=0, decoder_depth=0, decoder_heads=0),
        num_classes=wanted["head.weight"][0] if "head.weight" in wanted else 0,
        pool="mean" if "fc_norm.weight" in wanted else "cls",
    )
