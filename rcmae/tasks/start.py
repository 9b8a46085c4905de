"""Weights that a task starts from: looked at by one rank, read by one rank, the same on all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rcmae import checkpoint, dist
from rcmae.errors import Refused
from rcmae.weights.layouts import Which
from rcmae.weights.reading import NetworkWeights, read_network

Read = Callable[..., NetworkWeights]  # as read_network


def look_at(
    key: str, path: str, network: Which | None, *, first: Which, read: Read = read_network
) -> NetworkWeights:
    """What a file or a run has, with tensors that have a shape and no values. One process.

    Args:
        key: of the recipe, for the message.
        path: of a run, a checkpoint, or a file of any family.
        network: whose weights; None: those of `first` where it is there.
        read: what reads them.

    Raises:
        Refused: it cannot be read.
    """
    source = _read(key, path, network, first, read)
    shapes = {name: value.to("meta") for name, value in source.weights.items()}
    return source._replace(weights=shapes)


def read_together(
    key: str, path: str, network: Which | None, *, first: Which, read: Read = read_network
) -> NetworkWeights:
    """The weights themselves, on every rank. Collective: every rank calls; rank 0 alone reads.

    Raises:
        Refused: on every rank; they cannot be read.
    """
    source = None
    problem = None
    if dist.rank() == 0:
        try:
            source = _read(key, path, network, first, read)
        except Refused as error:
            problem = str(error)
    problem = dist.from_first(problem)
    if problem:
        raise Refused(problem)
    weights = dist.tensors_from_first(dict(source.weights) if source else None)
    rest = dist.from_first(source._replace(weights={}) if source else None)
    return rest._replace(weights=weights)


def newest_of(source: Path) -> Path:
    """The folder of a run's newest checkpoint, so that a resume starts from the same; anything else
    unchanged.
    """
    if not (source / "checkpoints").is_dir():
        return source
    found = checkpoint.newest_unverified(source / "checkpoints")
    return found.path if found else source


def _read(key: str, path: str, network: Which | None, first: Which, read: Read) -> NetworkWeights:
    try:
        return read(Path(path), network, first=first)
    except (Refused, checkpoint.CheckpointError, OSError) as error:
        raise Refused(f"{key}={path}: {error}") from error
