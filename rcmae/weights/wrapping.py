"""Weights out of what other programs wrap them in: the keys of a document, and the names that
wrappers put before those of the network.

A network and its average are called student and teacher, as everywhere here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rcmae.errors import Refused

# keys of a document under which weights lie, the likelier first
_WEIGHTS = ("model", "state_dict", "module", "model_state_dict", "student")
# in keys under which averages lie: model_ema, ema_state_dict, teacher, target_encoder, ...
_AVERAGE = re.compile(
    r"(^|[_.-])(ema|teacher|averaged?|swa|momentum|target|shadow|ema\w*model)([_.-]|$)|ema$",
    re.IGNORECASE,
)
_DEEPEST = 4  # mappings in mappings that are looked into
# of averages beside their weights: how often they were updated
_COUNTS = ("n_averaged", "num_updates", "initted", "decay")
# of modules that hold the network, or that run it: torch's, DeepSpeed's, Lightning's, timm's, ...
_WRAPPERS = {"module", "_orig_mod", "backbone", "model", "encoder", "net", "network"}
_WRAPPERS |= {"base_encoder", "encoder_q", "student", "_forward_module", "trunk", "visual", "vit"}
_WRAPPERS |= {"online_encoder", "online_model", "online_network", "context_encoder"}
_OF_AVERAGES = {"teacher", "ema", "ema_model", "model_ema", "momentum_encoder", "encoder_k"}
_OF_AVERAGES |= {"target_encoder", "target_model", "target_network", "averaged_model", "swa_model"}
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
    found, keys = _chosen(document)
    if not found:
        known = [key for key in (*_WEIGHTS, "teacher", "model_ema") if key in document]
        if known and not isinstance(document[known[0]], Mapping):
            kind = type(document[known[0]]).__name__
            raise Refused(f"holds a {kind} as its {known[0]}, not weights by name")
        found = {"model": document[known[0]] if known else document}
        keys = {"model": known[0] if known else "the file"}

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


def _chosen(document: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """(network -> its table, network -> where it lay); empty where there is none.

    Raises:
        Refused: several differ, and nothing says which is meant.
    """
    places: dict[str, list[tuple[str, Mapping[str, Any]]]] = {"student": [], "teacher": []}
    for keys, table in _tables(document, ()):
        is_average = any(_AVERAGE.search(key) for key in keys)
        where = ".".join(keys) or "the file"
        places["teacher" if is_average else "student"].append((where, table))
    found: dict[str, Any] = {}
    lay = {}
    for network, candidates in places.items():
        candidates.sort(key=lambda each: _likelihood(each[0]))  # those alike stay in their order
        unlike = [
            where
            for where, table in candidates[1:]
            if not torch.equal(_first_of(table), _first_of(candidates[0][1]))
        ]
        if unlike:
            names = ", ".join([candidates[0][0], *unlike])
            raise Refused(f"has several networks: {names}; save one of them by itself")
        if candidates:
            lay[network], found[network] = candidates[0]
    if "teacher" not in found and lay.get("student", "student") != "student":
        return {"model": found["student"]}, {"model": lay["student"]}
    return found, lay


def _likelihood(where: str) -> int:
    key = where.partition(".")[0]
    return _WEIGHTS.index(key) if key in _WEIGHTS else len(_WEIGHTS)


def _tables(
    tree: Mapping[str, Any], keys: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """(keys, table of weights) of a document; a table has a network's first weight."""
    if _first_of(tree) is not None:
        yield keys, tree
    if len(keys) < _DEEPEST:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                yield from _tables(value, (*keys, str(key)))


def _first_of(table: Mapping[str, Any]) -> Any:
    """The first weight of a network in a table, if it has one."""
    for name, value in table.items():
        if isinstance(value, Tensor) and _FIRST.fullmatch(str(name)):
            return value
    return None


def _without_wrappers(state: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], int]:
    """The networks in one table ("model", or "student" and "teacher"), and how many entries are
    none of theirs.

    Raises Refused.
    """
    state = {_INSIDE.sub(r"\1", str(name)): value for name, value in state.items()}
    state = {name.removeprefix("module."): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if name not in _COUNTS}
    matches = [match for name in state if (match := _FIRST.fullmatch(name))]
    prefixes = sorted({_outer(match, state) for match in matches})
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


def _outer(match: re.Match[str], state: Mapping[str, Any]) -> str:
    """A prefix as far as it is a wrapper's: Hugging Face's `vit.` is its own, and so is MAE-priv's
    `encoder.` where a decoder lies beside it.
    """
    prefix = match["prefix"]
    if prefix.endswith("vit.") and "embeddings" in match[0]:
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
