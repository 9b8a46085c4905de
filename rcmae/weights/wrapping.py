"""Weights out of what other programs wrap them in: the keys of a document, and the names that
wrappers put before those of the network.

A network and its average are called student and teacher, as everywhere here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from rcmae.errors import Refused

# keys of a document under which weights lie, the likelier first; and those of averages
_WEIGHTS = ("model", "state_dict", "module", "model_state_dict", "student")
_AVERAGES = ("teacher", "model_ema", "state_dict_ema", "ema_state_dict", "ema")
# of modules that hold the network, or that run it: torch's, DeepSpeed's, Lightning's, timm's, ...
_WRAPPERS = {"module", "_orig_mod", "backbone", "model", "encoder", "net", "network"}
_WRAPPERS |= {"base_encoder", "encoder_q", "student", "_forward_module", "trunk", "visual"}
_OF_AVERAGES = {"teacher", "ema", "ema_model", "model_ema", "momentum_encoder", "encoder_k"}
_INSIDE = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# the first weight of a network, by which its place is known
_FIRST = re.compile(
    r"(?P<prefix>(?:.*\.)?)(?:patch_embed\.proj|embeddings\.patch_embeddings\.projection)\.weight"
)


class Unwrapped(NamedTuple):
    """The networks of a document."""

    networks: dict[str, dict[str, Any]]  # "student", "teacher"; "model" where it does not say
    keys: dict[str, str]  # where each lay
    left_out: int  # entries that are none of a network's


def unwrapped(document: Mapping[str, Any]) -> Unwrapped:
    """The networks in what a file holds, by names without their wrappers'.

    Raises:
        Refused: there are several networks, and their names do not say what each is.
    """
    places = {"student": _WEIGHTS, "teacher": _AVERAGES}
    found: dict[str, Any] = {}
    keys = {}
    for network, candidates in places.items():
        for key in candidates:
            if isinstance(document.get(key), Mapping):
                found[network] = document[key]
                keys[network] = key
                break
    known = [key for key in (*_WEIGHTS, *_AVERAGES) if key in document]
    if not found and known and not any(_FIRST.fullmatch(str(name)) for name in document):
        kind = type(document[known[0]]).__name__
        raise Refused(f"holds a {kind} as its {known[0]}, not weights by name")
    if not found:
        found = {"model": document}
        keys = {"model": "the file"}
    elif "teacher" not in found and keys["student"] != "student":
        found = {"model": found["student"]}
        keys = {"model": keys["student"]}

    networks: dict[str, dict[str, Any]] = {}
    left_out = 0
    for network, state in found.items():
        parts, left = _without_wrappers(state)
        left_out += left
        for part, weights in parts.items():
            name = part if network == "model" else network
            if name in networks:
                raise Refused(f"{keys[network]} has several networks; save one by itself")
            networks[name] = weights
            keys.setdefault(name, f"{part} of {keys[network]}")
    return Unwrapped(networks, {name: keys[name] for name in networks}, left_out)


def _without_wrappers(state: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], int]:
    """The networks in one table ("model", or "student" and "teacher"), and how many entries are
    none of theirs.

    Raises Refused.
    """
    state = {_INSIDE.sub(r"\1", str(name)): value for name, value in state.items()}
    state = {name.removeprefix("module."): value for name, value in state.items()}
    matches = [match for name in state if (match := _FIRST.fullmatch(name))]
    prefixes = sorted({_outer(match["prefix"], state) for match in matches})
    if prefixes in ([], [""]):
        return {"model": state}, 0
    averages = [each for each in prefixes if _words(each) & _OF_AVERAGES]
    plain = [each for each in prefixes if each not in averages]
    strange = [each for each in prefixes if _words(each) - _WRAPPERS - _OF_AVERAGES]
    if strange or len(plain) > 1 or len(averages) > 1:
        raise Refused(
            f"weights of a network lie under {', '.join(map(repr, strange or prefixes))}, which is "
            "no wrapper that is known; save those of one network without that prefix"
        )
    networks = {}
    for average in averages:
        networks["teacher"] = _under(state, average)
    others = tuple(averages)
    for each in plain:
        rest = {name: value for name, value in state.items() if not name.startswith(others)}
        networks["student" if averages else "model"] = _under(rest, each)
    return networks, len(state) - sum(map(len, networks.values()))


def _outer(prefix: str, state: Mapping[str, Any]) -> str:
    """A prefix as far as it is a wrapper's: Hugging Face's `vit.` is its own, and so is MAE-priv's
    `encoder.` where a decoder lies beside it.
    """
    if prefix.endswith("vit."):
        return prefix.removesuffix("vit.")
    outer = prefix.removesuffix("encoder.")
    decoders = (f"{outer}decoder.", f"{outer}encoder_to_decoder.", f"{outer}decoder_pos_embed")
    if outer != prefix and any(name.startswith(decoders) for name in state):
        return outer
    return prefix


def _under(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What has the prefix, without it."""
    found = {name: value for name, value in state.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): value for name, value in found.items()}


def _words(prefix: str) -> set[str]:
    return set(filter(None, prefix.split(".")))
