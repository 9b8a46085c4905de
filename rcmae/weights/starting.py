"""A pretraining that starts from weights in a file: what is taken, newly initialised, left; and
what the file says of its network that this one would compute in another way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from rcmae.errors import Refused
from rcmae.models.fitting import resample_positions
from rcmae.models.patches import Positions, sincos_positions
from rcmae.models.protocol import TABLES
from rcmae.models.sizes import ARCHITECTURES, NetworkSizes
from rcmae.weights.beside import refuse_for_training
from rcmae.weights.names import family_names
from rcmae.weights.reading import NetworkWeights
from rcmae.weights.shapes import fixed_tables, in_encoder, only_known, whole_network

Decoder = Literal["file", "fresh"]


class Start(NamedTuple):
    """What a network starts from."""

    state: dict[str, Tensor]  # of the whole network
    taken: list[str]  # from the file
    fresh: list[str]  # the network's own
    left: list[str]  # the file's that have no place

    def table(self) -> str:
        """What was taken, in one line."""
        parts = [f"{len(self.taken)} weights taken ({_kinds(self.taken)})"]
        if self.fresh:
            parts.append(f"{len(self.fresh)} newly initialised ({_kinds(self.fresh)})")
        if self.left:
            parts.append(f"{len(self.left)} left in the file ({_kinds(self.left)})")
        return ", ".join(parts)


def start_of(model: nn.Module, source: NetworkWeights, decoder: Decoder) -> Start:
    """The weights that a network to pretrain starts from.

    Args:
        model: the network; its own weights are what is newly initialised.
        source: the file's weights; those without values (on torch's meta device) will do to ask.
        decoder: "file": the whole network is the file's; "fresh": its encoder alone.

    Raises:
        Refused: the file has not all of it, or the wrong shapes; everything at once.
    """
    own = model.state_dict()
    weights: Mapping[str, Tensor] = source.weights
    if any(name.endswith(".q_bias") for name in own) and not any(
        name.endswith(".q_bias") for name in weights
    ):
        weights = family_names(weights, "bootmae")  # biases apart, as this network has them
    weights = _with_learned_tables(model, weights, source.grid)
    if decoder == "file":
        try:
            state = whole_network(model, weights)
        except Refused as error:
            alone = ""
            if all(in_encoder(name) for name in weights):
                alone = (
                    "; it is an encoder alone: checkpoint.init_decoder=fresh starts from it, and "
                    "initialises the decoder"
                )
            raise Refused(f"{error}{alone}") from error
        taken = [name for name in weights if name in own and name not in fixed_tables(model)]
    else:
        found = only_known(model, weights)
        state = {**own, **found}
        taken = list(found)
    if "pos_embed" in weights and "pos_embed" not in taken:
        table = _positions(own["pos_embed"], weights["pos_embed"], model, source.grid)
        if table is not None:
            state["pos_embed"] = table
            taken.append("pos_embed")
    tables = [name for name in own if name in fixed_tables(model)]
    return Start(
        state=state,
        taken=sorted(taken),
        fresh=sorted(name for name in own if name not in taken and name not in tables),
        left=sorted(name for name in weights if name not in taken and name not in tables),
    )


def function_problems(
    source: NetworkWeights, sizes: NetworkSizes, *, decoder: bool = False
) -> list[str]:
    """What a network of these sizes would compute in another way than the file's, a line each."""
    problems = refuse_for_training(source.beside)
    pairs = [("num_heads", sizes.num_heads)]
    if decoder:
        pairs.append(("decoder_heads", sizes.decoder_heads))
    for key, ours in pairs:
        theirs = told(source, key)
        if theirs is not None and theirs != ours:
            problems.append(
                f"its network has {key}={theirs}, this one {ours}: set model.{key}={theirs}"
            )
    return problems


def told(source: NetworkWeights, key: str) -> int | None:
    """A number of heads by what lies beside the weights; None where nothing says it."""
    named = ARCHITECTURES.get(str(source.sizes.get("name")), {})
    return source.sizes.get(key) or named.get(key)


def start_notes(source: NetworkWeights, sizes: NetworkSizes, table: str, where: str) -> list[str]:
    """The messages about a start from weights, a line each."""
    notes = [f"{where}: {source.about}: {table}", *source.notes]
    if told(source, "num_heads") is None:
        notes.append(
            f"{where}: nothing beside the weights says how many heads the network has; "
            f"model.num_heads={sizes.num_heads} is this recipe's"
        )
    return notes


def _positions(
    own: Tensor, table: Tensor, model: nn.Module, grid: tuple[int, int] | None
) -> Tensor | None:
    """The file's table for this network where it is not a sin-cos table of this network's kind;
    None where the network's own says the same.
    """
    if table.is_meta or table.ndim != 3 or table.shape[2] != own.shape[2]:
        return None
    new: tuple[int, int] = model.grid  # type: ignore[assignment]
    prefix = own.shape[1] - new[0] * new[1]
    if grid is None:
        side = math.isqrt(table.shape[1] - prefix)
        grid = (side, side)
    if prefix + grid[0] * grid[1] != table.shape[1]:
        return None
    for order in get_args(Positions):
        kind = sincos_positions(own.shape[2], grid, prefix=prefix, order=order)
        if (table[0].double() - kind).abs().max() < 1e-4:
            here = sincos_positions(own.shape[2], new, prefix=prefix, order=order).float()
            return None if (here - own[0]).abs().max() < 1e-4 else here[None]
    return resample_positions(table.to(torch.float32), grid, new)


def _with_learned_tables(
    model: nn.Module, weights: Mapping[str, Tensor], grid: tuple[int, int] | None
) -> Mapping[str, Tensor]:
    """The weights, with position tables that the network learns interpolated to its grid."""
    own = dict(model.named_parameters())
    new: tuple[int, int] = model.grid  # type: ignore[assignment]
    fitted = dict(weights)
    for name in TABLES:
        table = weights.get(name)
        if name not in own or table is None or table.ndim != 3:
            continue
        patches = table.shape[1] - (own[name].shape[1] - new[0] * new[1])
        side = math.isqrt(max(0, patches))
        old = grid or (side, side)
        if patches > 0 and old[0] * old[1] == patches:
            fitted[name] = resample_positions(table.to(torch.float32), old, new)
    return fitted


def _kinds(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.split(".")[0] for name in names}))
