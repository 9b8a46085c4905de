"""The files that others read, and the names and shapes of the weights in them.

What shapes tell of a network is enough to know whether weights are those of a whole masked
autoencoder or of its encoder. Names are MAE's; `names` has those of other families."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rcmae.engines.optim import ENCODER
from rcmae.errors import Refused

Which = Literal["student", "teacher"]

Shape = tuple[int, ...]

KIND = {"student": "weight", "teacher": "teacher"}  # what a checkpoint calls a network's tensors


class Layout(NamedTuple):
    """A file that others read."""

    about: str
    suffixes: tuple[str, ...]  # of its name
    decoder: bool  # the whole network, or its encoder alone


TORCH = (".pth", ".pt")

LAYOUTS = {
    "safetensors": Layout(
        "the network, its decoder where that is MAE's, with what made it in the metadata",
        (".safetensors",),
        True,
    ),
    "mae": Layout("MAE's published file for fine-tuning: the encoder under 'model'", TORCH, False),
    "mae-full": Layout(
        "MAE's published file with the decoder: the whole network under 'model'", TORCH, True
    ),
    "rcmae": Layout(
        "RC-MAE's checkpoint: student and teacher, each wrapped and plain, epoch, args", TORCH, True
    ),
    "timm": Layout("the encoder as timm's vit_* models name it", (".safetensors", *TORCH), False),
}


def sizes_of(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The sizes of a network, as far as the shapes of its weights tell them.

    Returns:
        patch_size, in_channels, embed_dim, depth, mlp_ratio and num_patches; decoder_dim and
        decoder_depth where there is a decoder; cls_token and decoder_cls, False, where there is
        none.

    Raises:
        ValueError: it is no masked autoencoder, nor the encoder of one.
    """
    try:
        width, channels, patch, _ = shapes["patch_embed.proj.weight"]
        prefix, tokens = int("cls_token" in shapes), shapes["pos_embed"][1]
        hidden = shapes["blocks.0.mlp.fc1.weight"][0]
        sizes: dict[str, Any] = {
            "patch_size": patch,
            "in_channels": channels,
            "embed_dim": width,
            "depth": _count(shapes, "blocks"),
            "mlp_ratio": hidden / width,
            "num_patches": tokens - prefix,
        }
        if not prefix:
            sizes["cls_token"] = False
        # BootMAE's, another kind of decoder
        regressors = any(name.startswith("decode_blocks.") for name in shapes)
        if not regressors and any(name.startswith(("decoder_", "mask_token")) for name in shapes):
            sizes["decoder_dim"] = shapes["decoder_embed.weight"][0]
            sizes["decoder_depth"] = _count(shapes, "decoder_blocks")
            if shapes.get("decoder_pos_embed", (1, 0))[1] == sizes["num_patches"]:
                sizes["decoder_cls"] = False
        return sizes
    except KeyError as error:
        raise Refused(
            f"it has no {error.args[0]}: no masked autoencoder, nor the encoder of one"
        ) from error
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise Refused("shapes of its first weights are those of no masked autoencoder") from error


def _count(shapes: Iterable[str], blocks: str) -> int:
    return len({match[1] for name in shapes if (match := re.match(rf"{blocks}\.(\d+)\.", name))})


def shapes_of(sizes: Mapping[str, Any]) -> dict[str, Shape]:
    """Names and shapes of the network of these sizes (of `sizes_of`), or of an encoder, in the
    model's order.

    Raises:
        ValueError: no network has such sizes.
    """
    from rcmae.models.vit import MaskedAutoencoder  # timm costs seconds: only where it is used

    width, patch, whole = sizes["embed_dim"], sizes["patch_size"], "decoder_dim" in sizes
    with torch.device("meta"):
        model = MaskedAutoencoder(
            image_size=(patch, patch * sizes["num_patches"]),  # any grid of as many patches
            patch_size=patch,
            in_channels=sizes["in_channels"],
            embed_dim=width,
            depth=sizes["depth"],
            num_heads=1,
            decoder_dim=sizes.get("decoder_dim", 4),
            decoder_depth=sizes.get("decoder_depth", 1),
            decoder_heads=1,
            mlp_ratio=sizes["mlp_ratio"] + 0.5 / width,  # blocks round the width of their MLP down
            cls_token=sizes.get("cls_token", True),
            decoder_cls=sizes.get("decoder_cls", "cls_token" not in sizes),
        )
    return {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if whole or in_encoder(name)
    }


def shape_problems(shapes: Mapping[str, Shape]) -> list[str]:
    """What keeps weights from being those of a whole network or a whole encoder, one line a kind
    of problem.
    """
    try:
        wanted = shapes_of(sizes_of(shapes))
    except ValueError as error:
        return [str(error)]
    differing = [
        f"{name} {_by(shapes[name])} instead of {_by(wanted[name])}"
        for name in wanted
        if name in shapes and shapes[name] != wanted[name]
    ]
    return [
        f"{what} {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        for what, names in (
            ("lacks", [name for name in wanted if name not in shapes]),
            ("has unknown", [name for name in shapes if name not in wanted]),
            ("has", differing),
        )
        if names
    ]


def whole_network(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a masked autoencoder, checked against a model of one; position tables stay the
    model's.

    Raises:
        ValueError: the model's weights are not all there in its shapes, or there are others;
            everything at once.
    """
    wanted = {
        name: value for name, value in model.state_dict().items() if not name.endswith("pos_embed")
    }
    found = {name: value for name, value in weights.items() if not name.endswith("pos_embed")}
    differing = [
        name for name in wanted if name in found and found[name].shape != wanted[name].shape
    ]
    problems = [
        f"{what} {', '.join(names[:5])}" + f" and {len(names) - 5} more" * (len(names) > 5)
        for what, names in (
            ("lacks", [name for name in wanted if name not in found]),
            ("has unknown", [name for name in found if name not in wanted]),
            (
                "has other shapes of",
                [
                    f"{name} {_by(tuple(found[name].shape))} instead of "
                    f"{_by(tuple(wanted[name].shape))}"
                    for name in differing
                ],
            ),
        )
        if names
    ]
    if problems:
        raise Refused("; ".join(problems))
    return {**model.state_dict(), **found}


def in_encoder(name: str) -> bool:
    """Whether a weight or table, by its published name, is the encoder's."""
    return name.startswith((*ENCODER, "pos_embed"))


def _by(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"
