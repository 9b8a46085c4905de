"""Weights of a run, a checkpoint or a file of any family, read without running anything in them.

Local: one process reads, and no other is waited for. A `.pth` is a pickle, which can run code when
it is opened. It is read by torch's restricted reader, which builds tensors, plain containers and
`argparse.Namespace` (the published files hold one) and refuses everything else."""

from __future__ import annotations

import argparse
import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rcmae import __version__, checkpoint
from rcmae.checkpoint import CheckpointError, Manifest
from rcmae.errors import Refused
from rcmae.weights.layouts import KIND, Which, shape_problems, sizes_of
from rcmae.weights.names import published_names


@dataclass(frozen=True)
class Weights:
    """Networks read from a file, names and shapes checked."""

    path: Path
    layout: str  # "safetensors", "mae", "rcmae", or "plain": tensors by name and nothing else
    # "student", "teacher", or "model" where the file does not say which
    networks: dict[str, dict[str, Tensor]]
    sizes: dict[str, Any]  # what shapes tell: not the numbers of heads, nor the sides of the grid
    about: dict[str, Any]  # the file's own account: metadata, or RC-MAE's epoch and args


class Source(NamedTuple):
    """A network's weights, wherever they were."""

    weights: dict[str, Tensor]  # by published names
    grid: tuple[int, int] | None  # rows and columns of its position table; None: not told
    # what a recipe beside it says of the architecture; empty where there is none
    sizes: dict[str, Any]
    about: str  # a line
    # what is known of the weights, as text by text: recipe, step, data, versions
    told: dict[str, str]


def read_network(path: Path, network: Which | None = None, *, first: Which = "teacher") -> Source:
    """The weights of a run, a checkpoint, or a file of any family. Collective: every rank calls.
    Nothing is run.

    Args:
        path: a run's or a checkpoint's folder, or a file: safetensors, or a pickle of tensors.
        network: whose weights; None: those of `first` where it is there, else what there is.
        first: the teacher is what RC-MAE fine-tunes; the student is what a pretraining goes on
            with.

    Raises:
        ValueError: there is nothing of the kind, it cannot be read, or it has no such network.
        CheckpointError: the checkpoint is damaged.
    """
    heads: dict[str, int] = {}
    if (path / "config.json").is_file() and (path / "model.safetensors").is_file():
        # Hugging Face's folder
        heads, path = _hugging_face_heads(path / "config.json"), path / "model.safetensors"
    if not path.is_file():
        return _of_checkpoint(path, network, first)
    layout, networks, told = (
        _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    )
    name: str = network or (first if first in networks else next(iter(networks)))
    if name not in networks:
        raise Refused(
            f"{path} has no {name}, only {', '.join(networks)}; leave classify.network out"
        )
    weights = published_names(networks[name])
    strange = [key for key, value in weights.items() if not _is_dense(value)]
    if strange or not weights:
        what = (
            f"entries that are no dense tensors of floats, such as {strange[0]}"
            if strange
            else "no weights"
        )
        raise Refused(f"{path} has {what}; give a file of weights by name")
    recipe = json.loads(told["recipe"]) if "recipe" in told else None
    sizes, grid = _told(recipe, weights)
    known = {str(key): value for key, value in told.items() if isinstance(value, str)}
    return Source(
        weights, grid, heads | sizes, f"{name} of {path} ({layout}, {len(weights)} tensors)", known
    )


def _hugging_face_heads(path: Path) -> dict[str, int]:
    """The numbers of heads, which shapes do not tell, by the names of a recipe.

    Raises ValueError.
    """
    try:
        told = json.loads(path.read_text())
    except ValueError as error:
        raise Refused(f"{path} is not JSON: {error}") from error
    names = {"num_attention_heads": "num_heads", "decoder_num_attention_heads": "decoder_heads"}
    return {
        name: told[theirs] for theirs, name in names.items() if isinstance(told.get(theirs), int)
    }


def _of_checkpoint(path: Path, network: Which | None, first: Which) -> Source:
    manifest, passed_over = find_checkpoint(path)
    kinds = {key.partition("/")[0] for key in manifest.tensors}
    name: Which = network or (first if KIND[first] in kinds else "student")
    if KIND[name] not in kinds:
        raise Refused(f"{manifest.path} has no {name}; use the student")
    keys = [key for key in manifest.tensors if key.partition("/")[0] in (KIND[name], "buffer")]
    weights = {
        key.partition("/")[2]: tensor.clone().view(manifest.tensors[key]["shape"])
        for key, tensor in zip(keys, whole_tensors(manifest, keys, torch.float32), strict=True)
    }
    sizes, grid = _told(manifest.meta["recipe"], weights)
    newer = f", newer ones passed over: {'; '.join(passed_over)}" if passed_over else ""
    return Source(
        weights,
        grid,
        sizes,
        f"{name} of {manifest.path}, step {manifest.step}{newer}",
        about(manifest) | {"network": name, **figures_of(manifest)},
    )


def figures_of(manifest: Manifest) -> dict[str, str]:
    """The last line of the run's metrics up to a checkpoint, and its last evaluation, as
    metadata wants it.
    """
    run, found = manifest.path.parent.parent, {}
    for file, key in (("metrics.jsonl", "metrics"), ("events.jsonl", "evaluation")):
        try:
            lines = [json.loads(line) for line in (run / file).read_text().splitlines()]
        except (OSError, ValueError):
            continue
        fitting = [
            line
            for line in lines
            if line.get("step", math.inf) <= manifest.step
            and line.get("event", "evaluate") == "evaluate"
        ]
        if fitting:
            found[key] = json.dumps(fitting[-1])
    return found


def about(manifest: Manifest) -> dict[str, str]:
    """What made the weights, as safetensors' metadata wants it: text by text, JSON where there
    is structure.
    """
    return {
        "format": "pt",
        "written_by": f"rcmae {__version__}",
        "step": str(manifest.step),
        "images": str(manifest.images),
        "data_fingerprint": manifest.meta["data_fingerprint"],
        "versions": json.dumps(manifest.meta["versions"]),
        "recipe": json.dumps(manifest.meta["recipe"]),
    }


def _told(
    recipe: Mapping[str, Any] | None, weights: Mapping[str, Tensor]
) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """Sizes and grid by the recipe that made the weights."""
    if recipe is None or "patch_embed.proj.weight" not in weights:
        return {}, None
    model, patch = recipe["model"], weights["patch_embed.proj.weight"].shape[2]
    size = model["image_size"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return dict(model), (height // patch, width // patch)


def load_weights(path: Path) -> Weights:
    """Read the weights of a file in any of LAYOUTS, or a published one. Nothing in the file is run.

    Raises:
        ValueError: it cannot be read, holds more than weights, or its names and shapes are those of
            no network.
    """
    if not path.is_file():
        raise Refused(f"{path}: no such file")
    layout, networks, told = (
        _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    )
    problems, sizes = [], {}
    for each, state in networks.items():
        strange = [name for name, value in state.items() if not _is_dense(value)]
        shapes = {name: tuple(value.shape) for name, value in state.items() if name not in strange}
        if strange:
            problems.append(
                f"{each} has entries that are no dense tensors of floats, such as {strange[0]}"
            )
        elif unfit := shape_problems(shapes):
            problems += [f"{each} {problem}" for problem in unfit]
        else:
            sizes = sizes_of(shapes)
    if problems:
        raise Refused(
            f"{path} is not a whole network or encoder of this family: {'; '.join(problems)}"
        )
    return Weights(path, layout, networks, sizes, told)


def _is_dense(value: object) -> bool:
    """Whether it is a tensor of floats, each of which is in the file: a few bytes can claim to
    be any shape.
    """
    if (
        not isinstance(value, Tensor)
        or value.layout != torch.strided
        or not value.is_floating_point()
    ):
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _read_safetensors(path: Path) -> tuple[str, dict[str, dict[str, Tensor]], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except (SafetensorError, OSError) as error:
        raise Refused(f"{path} cannot be read as safetensors: {error}") from error
    network = told.get("network", "model")
    return "safetensors", {network if network in KIND else "model": state}, told


def _read_torch(path: Path) -> tuple[str, dict[str, dict[str, Tensor]], dict[str, Any]]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            document = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f"asks for {refused[1]}" if refused else "is damaged or asks for code"
        raise Refused(
            f"{path} {what}; only tensors, plain values and argparse.Namespace are read, and "
            "nothing was run. "
            "Save the weights alone, as a dict of tensors, where you trust the file"
        ) from error
    except Exception as error:  # damaged bytes make torch's reader fail in any way
        raise Refused(
            f"{path} cannot be read as a file of torch.save: {error or type(error).__name__}"
        ) from error
    layout, networks, told = "plain", {"model": document}, {}
    if isinstance(document, Mapping) and document.keys() & KIND.keys():
        layout, networks = "rcmae", {each: document[each] for each in KIND if each in document}
        told = {key: document[key] for key in ("epoch", "args") if key in document}
    elif isinstance(document, Mapping) and "model" in document:
        layout, networks = "mae", {"model": document["model"]}
    elif isinstance(document, Mapping) and "state_dict" in document:  # timm's, and MAE-priv's
        layout, networks = "timm", {"model": document["state_dict"]}
    for each, state in networks.items():
        if not isinstance(state, Mapping):
            raise Refused(
                f"{path} holds a {type(state).__name__} as its {each}, not weights by name"
            )
    plain = {  # torch's wrapper for data parallelism puts a prefix before each name
        each: {str(name).removeprefix("module."): value for name, value in state.items()}
        for each, state in networks.items()
    }
    return layout, plain, told


def checkpoint_folders(path: Path) -> list[Path]:
    """The checkpoints that a path names, oldest first, whatever their state: one's folder names
    itself, a run's all.

    Raises:
        ValueError: there is none.
    """
    is_one = path.is_dir() and checkpoint.step_of(path) is not None
    if is_one or (path / "manifest.json").exists():
        return [path]
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = checkpoint.step_folders(root)
    if not found:
        what = "no such file or folder" if not path.is_dir() else "no checkpoint in this folder"
        raise Refused(
            f"{path}: {what}; give a run's, or one such as runs/NAME/checkpoints/step-00001000"
        )
    return found


def find_checkpoint(path: Path) -> tuple[Manifest, list[str]]:
    """The checkpoint that a path names, verified: a checkpoint's folder, or a run's for its newest
    valid one.

    Returns:
        its manifest, and what was wrong with newer ones of the run.

    Raises:
        ValueError: there is no checkpoint.
        CheckpointError: none is valid.
    """
    folders = checkpoint_folders(path)
    if folders == [path]:
        return checkpoint.open_verified(path), []
    root = folders[0].parent
    found, passed_over = checkpoint.newest(root)
    if found is None:
        raise CheckpointError(
            f"{root} has no valid checkpoint: {'; '.join(passed_over)}; restore one"
        )
    return found, passed_over


def whole_tensors(manifest: Manifest, keys: Iterable[str], dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensors of these keys, such as "teacher/norm.bias", flattened.

    Each is good until the next is asked for.
    """
    counts = [(key, math.prod(manifest.tensors[key]["shape"])) for key in keys]
    # of all of them in turn
    memory = torch.empty(max((count for _, count in counts), default=0), dtype=dtype)
    with checkpoint.Reader(manifest) as reader:  # opens each file once, unlike tensor_of
        for key, count in counts:
            reader.read(key, 0, memory[:count])
            yield memory[:count]
