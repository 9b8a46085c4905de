"""Weights of a run, a checkpoint or a file of any family, read without running anything in them.

Reading is local: one process reads, and none waits for another. A `.pth` is a pickle, which can run
code when it is opened. It is read by torch's restricted reader, which builds tensors, plain
containers and `argparse.Namespace` (the published files hold one) and refuses everything else."""

from __future__ import annotations

import argparse
import json
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rcmae import __version__
from rcmae.checkpoint import Manifest, find_checkpoint, whole_tensors
from rcmae.config import DetectOptions
from rcmae.data.sources import redacted, without_secrets
from rcmae.errors import Refused
from rcmae.files import json_lines
from rcmae.models.patches import sincos_grid
from rcmae.weights.beside import SETTINGS, Beside, beside
from rcmae.weights.layouts import KIND, Which
from rcmae.weights.names import from_timm, published_names
from rcmae.weights.shapes import depth_of, shape_problems, sizes_of
from rcmae.weights.wrapping import unwrapped

# whole numbers in published files that no network here reads: batches that a norm has counted, and
# which row of a table each pair of tokens takes, which follows from the grid
COUNTED = ("num_batches_tracked", "relative_position_index")
_LARGEST_SIDE = 2**16  # of an image, in pixels


class NetworkWeights(NamedTuple):
    """A network's weights, wherever they were."""

    weights: dict[str, Tensor]  # by published names; of a checkpoint by the network's own
    grid: tuple[int, int] | None  # rows and columns of its position table; None: not told
    sizes: dict[str, Any]  # of the architecture, by the recipe beside it; empty where there is none
    about: str  # one line that names them
    metadata: dict[str, str]  # recipe, step, data, versions: text, JSON where there is structure
    beside: Beside = Beside()  # what lies beside a file
    notes: tuple[str, ...] = ()  # what was chosen where there was a choice: to be said


@dataclass(frozen=True)
class WeightsFile:
    """The networks in a file, their names and shapes checked."""

    path: Path
    layout: str  # "safetensors", "mae", "rcmae", or "plain": tensors by name and nothing else
    networks: dict[str, dict[str, Tensor]]  # "student", "teacher"; "model" where it does not say
    sizes: dict[str, Any]  # what shapes tell: not the numbers of heads, nor the sides of the grid
    about: dict[str, Any]  # the file's own account: metadata, or RC-MAE's epoch and args


class _Contents(NamedTuple):
    """What a file holds, unchecked."""

    layout: str
    networks: dict[str, dict[str, Tensor]]
    about: dict[str, Any]
    keys: dict[str, str]  # where each network lay
    notes: tuple[str, ...] = ()


# -------------------------------------------------------------------------------------- a network's


def read_network(
    path: Path, network: Which | None = None, *, first: Which = "teacher"
) -> NetworkWeights:
    """The weights of a run, a checkpoint, or a file of any family. Local; nothing in it is run.

    Args:
        path: a run's or a checkpoint's folder, or a file: safetensors, or a pickle of tensors.
        network: whose weights; None: those of `first` where it is there, else what there is.
        first: the teacher is what RC-MAE fine-tunes; the student is what a pretraining continues
            with.

    Raises:
        Refused: there is nothing of the kind, it cannot be read, or it has no such network.
        CheckpointError: the checkpoint is damaged.
    """
    if _is_checkpoint(path):
        manifest, passed_over = find_checkpoint(path)
        return _of_checkpoint(manifest, passed_over, network, first)
    return _of_file(path, network, first)


def _is_checkpoint(path: Path) -> bool:
    """Whether a path is to be read as a run or a checkpoint, and not as a file of weights."""
    return not path.is_file() and not _is_hugging_face(path)


def _is_hugging_face(path: Path) -> bool:
    return (path / "config.json").is_file() and (path / "model.safetensors").is_file()


def _of_file(path: Path, network: Which | None, first: Which) -> NetworkWeights:
    if _is_hugging_face(path):
        path = path / "model.safetensors"
    contents = _contents(path)
    there = contents.networks
    name: str = network or (first if first in there else next(iter(there)))
    if name not in there:
        raise Refused(f"{path} has no {name}, only {', '.join(there)}; ask for none, or for that")

    weights = published_names(there[name])
    weights = {key: value for key, value in weights.items() if not key.endswith(COUNTED)}
    strange = [key for key, value in weights.items() if not is_dense(value)]
    if strange:
        raise Refused(
            f"{path} has entries that are not dense tensors of floats, such as {strange[0]}; "
            "give a file of weights by name"
        )
    if not weights:
        raise Refused(f"{path} has no weights; give a file of weights by name")
    refuse_not_finite(str(path), weights)

    recipe = _recipe_of(path, contents.about)
    sizes, grid = _architecture(recipe, weights)
    told = _beside(path, weights, contents.about) if recipe is None else Beside()
    known = grid or _grid_by_size(told, weights)
    weights = from_timm(weights, sizes.get("class_tokens", 1), known and known[0] * known[1])
    notes = list(contents.notes)
    if len(there) > 1 and network is None and contents.keys.keys() != set(contents.keys.values()):
        others = " and ".join(
            f"network={each!r} takes {contents.keys[each]}" for each in there if each != name
        )
        notes.append(f"{path} has several networks: {contents.keys[name]} is taken; {others}")
    about = [contents.layout, f"{len(weights)} tensors", *(f"by {each}" for each in told.files)]
    return NetworkWeights(
        weights=weights,
        grid=grid or _grid_beside(told, weights) or _grid_by_table(weights),
        sizes=told.sizes | sizes,
        about=f"{name} of {path} ({', '.join(about)})",
        metadata={
            str(key): value for key, value in contents.about.items() if isinstance(value, str)
        },
        beside=told,
        notes=tuple(notes),
    )


def _beside(path: Path, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> Beside:
    """What lies beside weights of an encoder; nothing where they are none. Raises Refused."""
    first = weights.get("patch_embed.proj.weight")
    if first is None or first.ndim != 4:
        return Beside()
    sizes = {"embed_dim": first.shape[0], "in_channels": first.shape[1]}
    sizes |= {"patch_size": first.shape[2], "depth": depth_of(weights, "blocks")}
    sizes["qkv_bias"] = any(name.endswith("attn.qkv.bias") for name in weights)
    told = beside(path, sizes, about)
    width = told.sizes.pop("embed_dim", first.shape[0])  # of the architecture that is named
    return told if width == first.shape[0] else replace(told, sizes={})


def _grid_beside(told: Beside, weights: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Rows and columns of patches by the image's size beside the weights, where that fits."""
    table, grid = weights.get("pos_embed"), _grid_by_size(told, weights)
    if grid is None or table is None or table.ndim != 3:
        return None
    return grid if table.shape[1] - _prefix(weights) == grid[0] * grid[1] else None


def _grid_by_table(weights: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Rows and columns of patches by a position table of sines, which shows them."""
    table = weights.get("pos_embed")
    if table is None or table.ndim != 3 or len(table) != 1:
        return None
    return sincos_grid(table, _prefix(weights))


def _prefix(weights: Mapping[str, Tensor]) -> int:
    """Rows of a position table before the patches'."""
    token = weights.get("cls_token")
    return token.shape[1] if token is not None and token.ndim == 3 else 0


def _grid_by_size(told: Beside, weights: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Rows and columns of patches of an image of the size beside the weights."""
    first = weights.get("patch_embed.proj.weight")
    if told.image_size is None or first is None:
        return None
    rows, columns = (side // first.shape[2] for side in told.image_size)
    return rows, columns


def refuse_not_finite(about: str, weights: Mapping[str, Tensor]) -> None:
    """Raises Refused: a weight is infinite or NaN."""
    bad = [name for name, value in weights.items() if not value.isfinite().all()]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise Refused(
            f"{about} has weights that are not finite: {bad[0]}{more}; they came from a training "
            "that broke: take an earlier file"
        )


def _of_checkpoint(
    manifest: Manifest, passed_over: list[str], network: Which | None, first: Which
) -> NetworkWeights:
    kinds = {key.partition("/")[0] for key in manifest.tensors}
    name: Which = network or (first if KIND[first] in kinds else "student")
    if KIND[name] not in kinds:
        raise Refused(f"{manifest.path} has no {name}; use the student")

    wanted = (KIND[name], "buffer")
    keys = [key for key in manifest.tensors if key.partition("/")[0] in wanted]
    weights = {}
    for key, elements in zip(keys, whole_tensors(manifest, keys, torch.float32), strict=True):
        shape = manifest.tensors[key].shape
        weights[key.partition("/")[2]] = elements.clone().view(shape)
    refuse_not_finite(str(manifest.path), weights)

    recipe = manifest.meta["recipe"]
    _refuse_sizes(f"{manifest.path}: its recipe", recipe, recipe["model"].get("image_size"))
    sizes, grid = _architecture(recipe, weights)
    newer = f", newer ones skipped: {'; '.join(passed_over)}" if passed_over else ""
    return NetworkWeights(
        weights=weights,
        grid=grid,
        sizes=sizes,
        about=f"{name} of {manifest.path}, step {manifest.step}{newer}",
        metadata=metadata_of(manifest) | {"network": name} | figures_of(manifest),
    )


def _architecture(
    recipe: Mapping[str, Any] | None, weights: Mapping[str, Tensor]
) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """Sizes and grid of patches by the recipe that made the weights; nothing without one."""
    if recipe is None or "patch_embed.proj.weight" not in weights:
        return {}, None
    model = recipe["model"]
    patch = weights["patch_embed.proj.weight"].shape[2]
    size = model["image_size"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return dict(model), (height // patch, width // patch)


def _recipe_of(path: Path, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """The recipe in a file's metadata, if there is one, as far as it says how large the model is.

    Raises:
        Refused: it is none.
    """
    if "recipe" not in about:
        return None
    try:
        recipe = json.loads(about["recipe"])
        size = recipe["model"]["image_size"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(f"{path}: the recipe in its metadata is none: {error!r}") from error
    _refuse_sizes(f"{path}: the recipe in its metadata", recipe, size)
    return dict(recipe)


def _refuse_sizes(where: str, recipe: Mapping[str, Any], size: Any) -> None:
    """Raise Refused where a recipe says what no network has: it may be anybody's."""
    sides = size if isinstance(size, list) and len(size) == 2 else [size]
    if not all(type(side) is int and 0 < side <= _LARGEST_SIDE for side in sides):
        raise Refused(f"{where} has model.image_size={size!r:.80}")
    for key in ("num_heads", "decoder_heads"):
        heads = recipe["model"].get(key)
        if heads is not None and (type(heads) is not int or heads < 1):
            raise Refused(f"{where} has model.{key}={heads!r:.80}")
    data = recipe.get("data")
    for key in ("mean", "std"):
        numbers = data.get(key) if isinstance(data, Mapping) else None
        if numbers is None:
            continue
        is_list = isinstance(numbers, list | tuple) and len(numbers) > 0
        if not is_list or not all(type(each) in (int, float) for each in numbers):
            raise Refused(f"{where} has data.{key}={numbers!r:.80}")


# ------------------------------------------------------------------------- what made the weights


def metadata_of(manifest: Manifest) -> dict[str, str]:
    """What made the weights, as safetensors' metadata wants it: text by text, JSON where there
    is structure. Of the recipe, what describes the network.
    """
    return {
        "format": "pt",
        "written_by": f"rcmae {__version__}",
        "step": str(manifest.step),
        "images": str(manifest.images),
        "data_fingerprint": manifest.meta["data_fingerprint"],
        "versions": json.dumps(manifest.meta["versions"]),
        "recipe": json.dumps(network_recipe(manifest.meta["recipe"])),
    }


# what of the section `detect` describes a detector: all but places
_DETECTOR = tuple(key for key in DetectOptions.model_fields if key not in ("init", "network"))
_DESCRIBING: dict[str, tuple[str, ...]] = {  # sections -> keys; without any: all
    "task": ("name",),
    "objective": (),
    "model": (),
    "data": ("mean", "std"),
    "teacher": (),
    "classify": ("num_classes", "pool", "depth", "class_names"),
    "segment": (
        *(
            "num_classes",
            "class_names",
            "map_zero",
            "crop",
            "levels",
            "head",
            "width",
            "aux_weight",
        ),
        *("dropout", "drop_path", "relative_positions", "layer_scale", "frozen", "resize"),
        *("test_stride", "test_scales", "test_flip"),
    ),
    "detect": _DETECTOR,
}
_PUBLIC = ("format", "written_by", "step", "images", "data_fingerprint", "versions", "network")


def network_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Of a recipe, what describes the network: no place of data, no command, no secret."""
    kept = {}
    task = recipe.get("task")
    detects = isinstance(task, Mapping) and task.get("name") == "detect"
    for section, keys in _DESCRIBING.items():
        values = recipe.get(section)
        if section == "detect" and not detects:
            continue
        if isinstance(values, Mapping):
            kept[section] = {key: values[key] for key in keys or values if key in values}
    return without_secrets(kept)


def public_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Of what a file says of itself, what another file of its weights may say, whoever reads it."""
    public = {key: redacted(metadata[key]) for key in _PUBLIC if key in metadata}
    if "recipe" in metadata:
        public["recipe"] = json.dumps(network_recipe(json.loads(metadata["recipe"])))
    return public


def figures_of(manifest: Manifest) -> dict[str, str]:
    """The last line of the run's metrics up to a checkpoint, and its last evaluation, as
    metadata wants it.
    """
    run = manifest.path.parent.parent
    found = {}
    for file, key in (("metrics.jsonl", "metrics"), ("events.jsonl", "evaluation")):
        last = None
        try:
            for line in json_lines(run / file):
                until = line.get("step", math.inf) <= manifest.step
                if until and line.get("event", "evaluate") == "evaluate":
                    last = line
        except OSError:
            continue
        if last is not None:
            found[key] = json.dumps(last)
    return found


# ------------------------------------------------------------------------------------------- a file


def load_weights(path: Path) -> WeightsFile:
    """Read the weights of a file in any of LAYOUTS, or a published one. Nothing in the file is run.

    Raises:
        Refused: it cannot be read, holds more than weights, or its names and shapes are those of
            no network.
    """
    if not path.is_file():
        raise Refused(f"{path}: no such file")
    contents = _contents(path)
    problems: list[str] = []
    sizes: dict[str, Any] = {}
    for each, state in contents.networks.items():
        strange = [name for name, value in state.items() if not is_dense(value)]
        if strange:
            problems.append(
                f"{each} has entries that are not dense tensors of floats, such as {strange[0]}"
            )
            continue
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        unfit = shape_problems(shapes)
        refuse_not_finite(f"{each} of {path}", state)
        problems += [f"{each} {problem}" for problem in unfit]
        if not unfit:
            sizes = sizes_of(shapes)
    if problems:
        raise Refused(
            f"{path} is not a whole network or encoder of this family: {'; '.join(problems)}"
        )
    return WeightsFile(path, contents.layout, contents.networks, sizes, contents.about)


def is_dense(value: object) -> bool:
    """Whether it is a tensor of floats, each of which is in the file: a few bytes can claim to
    be any shape.
    """
    if not isinstance(value, Tensor):
        return False
    if value.layout != torch.strided or not value.is_floating_point():
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _contents(path: Path) -> _Contents:
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def _read_safetensors(path: Path) -> _Contents:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            state = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise Refused(f"{path} cannot be read as safetensors: {error}") from error
    network = metadata.get("network", "model")
    if network in KIND:
        return _Contents("safetensors", {network: state}, metadata, {network: network})
    return _contents_of(path, state, "safetensors", metadata)


def _read_torch(path: Path) -> _Contents:
    document = opened(path)
    if not isinstance(document, Mapping):
        raise Refused(f"{path} holds a {type(document).__name__}, not weights by name")
    layout = "plain"
    if document.keys() & KIND.keys():
        layout = "rcmae"
    elif "model" in document:
        layout = "mae"
    elif "state_dict" in document:  # timm's, and MAE-priv's
        layout = "timm"
    elif "module" in document and "ds_version" in document:
        layout = "deepspeed"
    about = {key: document[key] for key in ("epoch", "arch", *SETTINGS) if key in document}
    return _contents_of(path, document, layout, about)


def _contents_of(
    path: Path, document: Mapping[str, Any], layout: str, about: dict[str, Any]
) -> _Contents:
    """The networks in a document. Raises Refused."""
    try:
        found = unwrapped(document)
    except Refused as error:
        raise Refused(f"{path}: {error}") from error
    left = f"{path}: {found.left_out} entries beside the network are left in the file"
    notes = (left,) if found.left_out else ()
    return _Contents(layout, found.networks, about, found.keys, notes)


def opened(path: Path) -> Any:
    """What torch's restricted reader makes of a file. Raises Refused."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f"asks for {refused[1]}" if refused else "is damaged or asks for code"
        raise Refused(
            f"{path} {what}; only tensors, plain values and argparse.Namespace are read, and "
            "nothing was run. Save the weights alone, as a dict of tensors, where you trust the "
            "file"
        ) from error
    except Exception as error:  # damaged bytes make torch's reader fail in any way
        raise Refused(
            f"{path} is no file of weights: give .safetensors, or what torch.save wrote (.pth, "
            f".pt, .bin); reading it as such failed: {error or type(error).__name__}"
        ) from error
