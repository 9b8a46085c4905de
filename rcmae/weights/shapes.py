"""Names and shapes of weights: of what network they are, and whether all of it is there.

Names are MAE's; `names` has those of other families."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rcmae.errors import Refused
from rcmae.models.protocol import PUBLISHED, TABLES
from rcmae.models.sizes import NetworkSizes

Shape = tuple[int, ...]


def sizes_of(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The sizes of a network, as far as the shapes of its weights tell them.

    Returns:
        patch_size, in_channels, embed_dim, depth, mlp_ratio, num_patches, class_tokens and
        registers; decoder_dim and decoder_depth where there is a decoder, decoder_cls, False, where
        it gets no class token.

    Raises:
        Refused: it is not a masked autoencoder, nor the encoder of one.
    """
    try:
        return _sizes_of(shapes)
    except KeyError as error:
        raise Refused(
            f"it has no {error.args[0]}: no masked autoencoder, nor the encoder of one"
        ) from error
    except (IndexError, ValueError, ZeroDivisionError) as error:  # of shapes that a file claims
        raise Refused("shapes of its first weights are those of no masked autoencoder") from error


def _sizes_of(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    width, channels, patch, _ = shapes["patch_embed.proj.weight"]
    class_tokens = shapes["cls_token"][1] if "cls_token" in shapes else 0
    num_patches = shapes["pos_embed"][1] - class_tokens
    sizes: dict[str, Any] = {
        "patch_size": patch,
        "in_channels": channels,
        "embed_dim": width,
        "depth": depth_of(shapes, "blocks"),
        "mlp_ratio": shapes["blocks.0.mlp.fc1.weight"][0] / width,
        "num_patches": num_patches,
        "class_tokens": class_tokens,
        "registers": shapes["reg_token"][1] if "reg_token" in shapes else 0,
    }

    # BootMAE's, another kind of decoder
    regressors = any(name.startswith("decode_blocks.") for name in shapes)
    decoder = any(name.startswith(("decoder_", "mask_token")) for name in shapes)
    if decoder and not regressors:
        sizes["decoder_dim"] = shapes["decoder_embed.weight"][0]
        sizes["decoder_depth"] = depth_of(shapes, "decoder_blocks")
        if shapes.get("decoder_pos_embed", (1, 0))[1] == num_patches:
            sizes["decoder_cls"] = False
    return sizes


def depth_of(names: Iterable[str], blocks: str) -> int:
    """How many different numbers the names of these blocks have."""
    numbered = re.compile(rf"{blocks}\.(\d+)\.")
    return len({match[1] for name in names if (match := numbered.match(name))})


def shapes_of(sizes: Mapping[str, Any]) -> dict[str, Shape]:
    """Names and shapes of the network of these sizes (of `sizes_of`), or of an encoder, in the
    model's order.

    Raises:
        Refused: no network has such sizes.
    """
    from rcmae.models.vit import MaskedAutoencoder  # timm costs seconds: only where it is used

    width = sizes["embed_dim"]
    patch = sizes["patch_size"]
    whole = "decoder_dim" in sizes
    network = NetworkSizes(
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
        class_tokens=sizes["class_tokens"],
        registers=sizes["registers"],
    )
    with torch.device("meta"):
        model = MaskedAutoencoder(network, decoder_cls=sizes.get("decoder_cls", True))
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
    except Refused as error:
        return [str(error)]
    return _differences(shapes, wanted, differ="has")


def whole_network(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a masked autoencoder, checked against a model of one; position tables that it
    does not learn stay the model's.

    Raises:
        Refused: the model's weights are not all there in its shapes, or there are others;
            everything at once.
    """
    own = model.state_dict()
    tables = fixed_tables(model)
    found = {name: value for name, value in weights.items() if name not in tables}
    wanted = {name: value for name, value in own.items() if name not in tables}
    problems = _differences(_shapes(found), _shapes(wanted), differ="has other shapes of")
    if problems:
        raise Refused("; ".join(problems))
    return {**own, **found}


def fixed_tables(model: nn.Module) -> set[str]:
    """Names of the position tables that a network does not learn, and of those it has not."""
    return set(TABLES) - {name for name, _ in model.named_parameters()}


def only_known(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's weights for a network to pretrain; position tables that it does not learn and
    what only other parts have are left.

    Raises:
        Refused: they are not all there in its shapes, or there are some that no network here has;
            everything at once.
    """
    own = model.state_dict()
    tables = fixed_tables(model)
    extra = ("head.", "fc_norm.", *PUBLISHED["head"], *PUBLISHED["decoder"], "encoder_to_decoder.")
    found = {
        name: value
        for name, value in weights.items()
        if name not in tables and not name.startswith(extra)
    }
    wanted = {name: value for name, value in own.items() if in_encoder(name) and name not in tables}
    problems = _differences(_shapes(found), _shapes(wanted), differ="has other shapes of")
    if problems:
        raise Refused("; ".join(problems))
    return found


def in_encoder(name: str) -> bool:
    """Whether a weight or table, by its published name, is the encoder's."""
    return name.startswith(PUBLISHED["encoder"])


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(value.shape) for name, value in weights.items()}


def _differences(
    found: Mapping[str, Shape], wanted: Mapping[str, Shape], *, differ: str
) -> list[str]:
    """One line a kind of difference, which names five at most; `differ` begins that of shapes."""
    lacking = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    differing = [
        f"{name} {_by(found[name])} instead of {_by(shape)}"
        for name, shape in wanted.items()
        if found.get(name, shape) != shape
    ]
    lines = []
    for kind, names in (("lacks", lacking), ("has unknown", unknown), (differ, differing)):
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        if names:
            lines.append(f"{kind} {', '.join(names[:5])}{more}")
    return lines


def _by(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"
