"""Weights that a detector starts from: another detector's file, or whatever an encoder is read of.

detectron2's model zoo pickles numpy arrays by name. A pickle can run code when it is opened: here
it is read by a reader that builds arrays, plain containers and nothing else.
"""

from __future__ import annotations

import importlib
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rcmae.errors import Refused
from rcmae.models.detection.build import HEADS
from rcmae.weights.beside import Beside, pair
from rcmae.weights.layouts import Which
from rcmae.weights.names import published_names
from rcmae.weights.reading import NetworkWeights, opened, read_network

# of a file's `metadata`, as detectron2's MetadataCatalog calls them
THINGS = "thing_classes"
NUMBERS = "thing_dataset_id_to_contiguous_id"  # COCO's id -> the class
# as its models call them: of each channel, pixels from 0 to 255
MEAN, STD = "pixel_mean", "pixel_std"
# what a pickle of arrays asks for; numpy called its core otherwise before 2.0
_ARRAYS = {
    (f"numpy.{core}.multiarray", name): ("numpy._core.multiarray", name)
    for core in ("core", "_core")
    for name in ("_reconstruct", "scalar")
}
_PLAIN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): OrderedDict,
}


def read_start(
    path: Path, network: Which | None = None, *, first: Which = "teacher"
) -> NetworkWeights:
    """A detector's weights by its published names, or an encoder's. Local; nothing is run.

    Args:
        path: a `.pkl` of detectron2's, a `.pth` of a training with a detector under `model`, or
            what `read_network` takes.
        network, first: as `read_network`.

    Raises:
        Refused: it cannot be read, or holds anything but arrays.
        CheckpointError: the checkpoint is damaged.
    """
    if path.suffix == ".pkl":
        return _named(path, _arrays(path))
    if path.is_file() and path.suffix in (".pth", ".pt"):
        document = opened(path)
        inner = document.get("model") if isinstance(document, Mapping) else None
        if isinstance(inner, Mapping) and any(str(name).startswith(HEADS) for name in inner):
            named = _named(path, inner)
            told = document.get("metadata")
            return named._replace(metadata=_classes(told), beside=_pixels(path, told))
    found = read_network(path, network, first=first)
    if any(name.startswith(HEADS) for name in found.weights):
        return found
    # of a run's own network, which may name biases of queries and values
    return found._replace(weights=published_names(found.weights))


def _classes(told: Any) -> dict[str, str]:
    """Names and COCO's ids of the classes by a file's `metadata`, as JSON; nothing where it names
    none.
    """
    names = told.get(THINGS) if isinstance(told, Mapping) else None
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        return {}
    places = told.get(NUMBERS)
    ids = list(places) if isinstance(places, Mapping) else []
    is_sound = all(type(each) is int for each in ids)
    if not is_sound or [places[each] for each in ids] != list(range(len(names))):
        ids = []
    return {THINGS: json.dumps(names), NUMBERS: json.dumps(ids)}


def _pixels(path: Path, told: Any) -> Beside:
    """How a file's `metadata` says that pixels are normalised; nothing where it does not.

    Raises:
        Refused: the numbers are none.
    """
    if not isinstance(told, Mapping):
        return Beside()
    mean, std = pair(path, told, MEAN, STD)
    if mean is None or std is None:
        return Beside()
    return Beside(mean=tuple(each / 255 for each in mean), std=tuple(each / 255 for each in std))


def _named(path: Path, state: Mapping[str, Any]) -> NetworkWeights:
    weights: dict[str, Tensor] = {}
    for name, value in state.items():
        tensor = torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            if not tensor.isfinite().all():
                raise Refused(f"{path}: {name} is not finite; take an earlier file")
            weights[str(name)] = tensor.float()
        elif not isinstance(tensor, Tensor):
            raise Refused(f"{path}: {name} is a {type(value).__name__}, no array of floats")
    if not any(name.startswith(HEADS) for name in weights):
        raise Refused(f"{path} has no detector: none of its names begins with {HEADS[0]}")
    about = f"detector of {path} ({len(weights)} tensors)"
    return NetworkWeights(weights=weights, grid=None, sizes={}, about=about, metadata={})


class _Reader(pickle.Unpickler):
    """Builds arrays and plain containers."""

    def find_class(self, module: str, name: str) -> Any:
        """What the pickle names, if it is of an array. Raises UnpicklingError."""
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if (module, name) == ("_codecs", "encode"):  # bytes, as old protocols write them
            return _latin
        if (module, name) in _ARRAYS:
            where, what = _ARRAYS[module, name]
            found: Callable[..., Any] = getattr(importlib.import_module(where), what)
            return found
        raise pickle.UnpicklingError(f"asks for {module}.{name}")


def _latin(text: str, encoding: str) -> bytes:
    """The bytes that a text of an old protocol stands for."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"asks for an encoding {encoding!r}")
    return text.encode("latin1")


def _arrays(path: Path) -> Mapping[str, Any]:
    """The arrays under `model`, or of the whole file. Raises Refused."""
    try:
        with path.open("rb") as file:
            document = _Reader(file, encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise Refused(
            f"{path} {error}; only arrays and plain containers are read, and nothing was run"
        ) from error
    except OSError as error:
        raise Refused(f"{path}: {error}") from error
    except Exception as error:  # damaged bytes make the reader fail in any way
        raise Refused(f"{path} is no pickle of arrays: {type(error).__name__}: {error}") from error
    inner = document.get("model", document) if isinstance(document, Mapping) else None
    if not isinstance(inner, Mapping):
        raise Refused(f"{path} holds a {type(document).__name__}, not weights by name")
    strange = [
        str(name)
        for name, value in inner.items()
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu"
    ]
    if strange:
        raise Refused(f"{path} has entries that are no arrays of numbers, such as {strange[0]}")
    return inner
