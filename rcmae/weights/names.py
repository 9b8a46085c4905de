"""Names that other code gives the same weights: MAE's are ours; torch's wrapper, BootMAE, MAE-priv,
Hugging Face.

Only names and the cut of a tensor differ, so a way there and back is equal to the last bit. BootMAE
and MAE-priv have no bias for keys, which softmax does not see: theirs is 0 when read, and one that
is not 0 is kept beside the weights when written (`key_bias`), for the way back. Of these two
families the encoder is exchanged; their decoders are other networks. SupMAE's names are MAE's, with
a head for classes beside them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rcmae.errors import Refused
from rcmae.weights.layouts import FAMILIES

# ours -> theirs, one row a kind of weight; {i} stands for the number of a block
_HUGGING_FACE = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "blocks.{i}": "vit.encoder.layer.{i}",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
    "decoder_blocks.{i}": "decoder.decoder_layers.{i}",
}
_HUGGING_FACE_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_PARTS = ("query", "key", "value")
_BLOCK = re.compile(r"((?:decoder_)?blocks)\.(\d+)\.(.+)\.(weight|bias)")

# theirs -> ours
_OURS = {theirs: ours for ours, theirs in _HUGGING_FACE.items() if "{i}" not in ours}
_OUR_BLOCKS = {
    theirs.removesuffix(".{i}"): ours.removesuffix(".{i}")
    for ours, theirs in _HUGGING_FACE.items()
    if "{i}" in ours
}
_OURS_INSIDE = {theirs: ours for ours, theirs in _HUGGING_FACE_BLOCK.items()}
_THEIR_BLOCK = re.compile(
    r"(?P<blocks>.+?)\.(?P<number>\d+)\.(?P<inside>.+)\.(?P<kind>weight|bias)"
)


def published_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """Weights by MAE's names, whatever family named them; what has no place there keeps its own."""
    state = {str(name).removeprefix("module."): value for name, value in state.items()}
    if any(name.startswith("encoder.blocks.") for name in state):  # MAE-priv's pretraining
        state = {name.removeprefix("encoder."): value for name, value in state.items()}
    if any(".attention.attention.query." in name for name in state):
        state = _from_hugging_face(state)
    return _with_key_bias(state)


def of_autoencoder(names: Iterable[str]) -> list[str]:
    """Of the weights of some network, by MAE's names, those that a masked autoencoder or its
    encoder has: no heads for classes or features, and no decoder of another kind."""
    extra = (
        "head.",
        "fc_norm.",
        "cls_head.",
        "feature_head.",
        "decode_",
        "de_pos_embed",
        "mask_token_",
        "down",
        "lm_head",
        "decoder.",
        "encoder_to_decoder.",
    )
    own = [name for name in names if not name.startswith(extra)]
    if any(name.startswith("decoder_blocks.") for name in own):
        return own
    # of a decoder of another kind
    return [name for name in own if name not in ("mask_token", "decoder_pos_embed")]


def family_names(state: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """Weights of MAE's names by those of another family.

    Raises:
        Refused: it is not a family that is known.
    """
    if family == "timm":
        return _to_timm(state)
    if family in ("mae", "supmae"):
        return dict(state)
    if family == "pixio":
        return _to_pixio(state)
    if family == "huggingface":
        return _to_hugging_face(state)
    if family not in FAMILIES:
        raise Refused(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    prefix = "encoder." if family == "maepriv" else ""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith("attn.qkv.bias"):
            query, key, of_value = value.chunk(3)
            place = prefix + name.removesuffix("qkv.bias")
            renamed[f"{place}q_bias"] = query.clone()
            renamed[f"{place}v_bias"] = of_value.clone()
            if key.count_nonzero():
                renamed[f"{place}key_bias"] = key.clone()
        else:
            renamed[prefix + name] = value
    return renamed


def _with_key_bias(state: Mapping[str, Any]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for name, value in state.items():
        place, _, last = name.rpartition(".")
        if last == "q_bias":
            zeros = torch.zeros_like(value) if isinstance(value, Tensor) else None
            parts = [value, state.get(f"{place}.key_bias", zeros), state.get(f"{place}.v_bias")]
            if all(isinstance(part, Tensor) for part in parts):
                renamed[f"{place}.qkv.bias"] = torch.cat(parts)
        elif last not in ("v_bias", "key_bias"):
            renamed[name] = value
    return renamed


def _to_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        block = _BLOCK.fullmatch(name)
        if block is None:
            place, _, last = name.rpartition(".")
            known = place in _HUGGING_FACE
            renamed[f"{_HUGGING_FACE[place]}.{last}" if known else _HUGGING_FACE[name]] = value
            continue
        place = _HUGGING_FACE[f"{block[1]}.{{i}}"].format(i=block[2])
        if block[3] == "attn.qkv":
            for part, piece in zip(_PARTS, value.chunk(3), strict=True):
                renamed[f"{place}.attention.attention.{part}.{block[4]}"] = piece.clone()
        else:
            renamed[f"{place}.{_HUGGING_FACE_BLOCK[block[3]]}.{block[4]}"] = value
    return renamed


def _to_pixio(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As transformers' PixioModel saves an encoder: ViTMAE's names, but for the norms of blocks."""
    renamed = {}
    for name, value in _to_hugging_face(state).items():
        plain = name.removeprefix("vit.").replace("layernorm_before", "norm1")
        renamed[plain.replace("layernorm_after", "norm2")] = value
    return renamed


def _to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's ViT has one class token: further ones are registers of it, and registers without a
    position get zeros."""
    renamed = dict(state)
    token = state.get("cls_token")
    registers = state.get("reg_token")
    if token is None or (token.shape[1] == 1 and registers is None):
        return renamed
    beside = [token[:, 1:]] if registers is None else [token[:, 1:], registers]
    renamed["cls_token"] = token[:, :1]
    renamed["reg_token"] = torch.cat(beside, dim=1)
    if registers is not None:
        table = state["pos_embed"]
        first = table[:, : token.shape[1]]
        parts = [first, torch.zeros_like(registers), table[:, token.shape[1] :]]
        renamed["pos_embed"] = torch.cat(parts, dim=1)
    return renamed


def from_timm(
    state: Mapping[str, Tensor], class_tokens: int, patches: int | None
) -> dict[str, Tensor]:
    """Undo `_to_timm`: weights whose table of positions has rows for registers, too.

    Args:
        state: by MAE's names, of any family.
        class_tokens: how many there are, of timm's class token and its registers.
        patches: of the table; None: not told, so that they make a square.
    """
    try:
        token, registers, table = (state[name] for name in ("cls_token", "reg_token", "pos_embed"))
        first, prefix = token.shape[1], token.shape[1] + registers.shape[1]
        rows = table.shape[1]
    except (KeyError, IndexError):
        return dict(state)
    with_rows = rows - prefix == patches
    if patches is None:
        with_rows = _is_square(rows - prefix) and not _is_square(rows - first)
    if not with_rows or not first <= class_tokens <= prefix:
        return dict(state)
    tokens = torch.cat([token, registers], dim=1)
    found = {**state, "cls_token": tokens[:, :class_tokens]}
    found["pos_embed"] = torch.cat([table[:, :class_tokens], table[:, prefix:]], dim=1)
    del found["reg_token"]
    if class_tokens < prefix:  # ours have no position of their own
        found["reg_token"] = tokens[:, class_tokens:] + table[:, class_tokens:prefix]
    return found


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def _from_hugging_face(state: Mapping[str, Any]) -> dict[str, Any]:
    if not any(name.startswith("vit.") for name in state):  # the encoder alone
        state = {
            name if name.startswith("decoder.") else f"vit.{name}": value
            for name, value in state.items()
        }
    saved = "decoder.decoder_encoder.layer."  # what transformers 5 calls them when it writes
    state = {name.replace(saved, "decoder.decoder_layers."): value for name, value in state.items()}

    renamed: dict[str, Any] = {}
    for name, value in state.items():
        place, _, last = name.rpartition(".")
        block = _THEIR_BLOCK.fullmatch(name)
        if name in _OURS:
            renamed[_OURS[name]] = value
        elif place in _OURS:
            renamed[f"{_OURS[place]}.{last}"] = value
        elif block is None or block["blocks"] not in _OUR_BLOCKS:
            renamed[name] = value
        else:
            renamed |= _of_their_block(name, block, state)
    return renamed


def _of_their_block(name: str, block: re.Match[str], state: Mapping[str, Any]) -> dict[str, Any]:
    """A weight of one of Hugging Face's blocks by our name; nothing where it is part of another."""
    place = f"{_OUR_BLOCKS[block['blocks']]}.{block['number']}"
    inside = block["inside"]
    kind = block["kind"]
    if inside in _OURS_INSIDE or inside in ("norm1", "norm2"):  # the latter are Pixio's
        return {f"{place}.{_OURS_INSIDE.get(inside, inside)}.{kind}": state[name]}
    if inside == "attention.attention.query":
        stem = f"{block['blocks']}.{block['number']}.attention.attention."
        parts = [state.get(f"{stem}{part}.{kind}") for part in _PARTS]
        tensors = [part for part in parts if isinstance(part, Tensor)]
        return {f"{place}.attn.qkv.{kind}": torch.cat(tensors)} if len(tensors) == 3 else {}
    if inside in ("attention.attention.key", "attention.attention.value"):
        return {}
    return {name: state[name]}
