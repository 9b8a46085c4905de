"""A run's weights in the files that others read, and such files read back without running anything
in them.

A checkpoint has every tensor in pieces, for going on; an export has the student or the teacher
whole, by its published
names: safetensors, MAE's and RC-MAE's `.pth` layouts, timm's. Position tables are the checkpoint's
own. Tensors pass one by one from the checkpoint to the file, as float32, so memory is bounded by
the largest. A file is put in place whole or not at all.

A `.pth` is a pickle, which can run code when it is opened. It is read by torch's restricted reader,
which builds tensors, plain containers and `argparse.Namespace` (the published files hold one) and
refuses everything else. Not written: the optimizer's state of RC-MAE's layout. To go on training,
copy the checkpoint."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import pickle
import re
import secrets
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rcmae import __version__, checkpoint
from rcmae.checkpoint import CheckpointError, Manifest
from rcmae.engines.optim import ENCODER
from rcmae.errors import Refused
from rcmae.weights.families import of_autoencoder, published_names

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


class Exported(NamedTuple):
    """A file that was written."""

    path: Path
    layout: str
    networks: tuple[str, ...]  # whose weights are in it
    step: int
    tensors: int
    bytes: int
    use: str  # a line of Python that reads it


@dataclass(frozen=True)
class Weights:
    """Networks read from a file, names and shapes checked."""

    path: Path
    layout: str  # "safetensors", "mae", "rcmae", or "plain": tensors by name and nothing else
    # "student", "teacher", or "model" where the file does not say which
    networks: dict[str, dict[str, Tensor]]
    sizes: dict[str, Any]  # what shapes tell: not the numbers of heads, nor the sides of the grid
    about: dict[str, Any]  # the file's own account: metadata, or RC-MAE's epoch and args


# --------------------------------------------------------------------------------- names and shapes


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


# ------------------------------------------------------------------------------------------- export


def checkpoint_folders(path: Path) -> list[Path]:
    """The checkpoints that a path names, oldest first, whatever their state: one's folder names
    itself, a run's all.

    Raises:
        ValueError: there is none.
    """
    if (path / "manifest.json").exists() or (path.is_dir() and path.name.startswith("step-")):
        return [path]
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = sorted(root.glob("step-*"))
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


def export(
    manifest: Manifest,
    out: Path,
    *,
    layout: str,
    network: Which | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write weights of a checkpoint to a file.

    Args:
        manifest: of a verified checkpoint.
        out: the file.
        layout: one of LAYOUTS.
        network: whose weights. None: the teacher, which RC-MAE fine-tunes, or the student where
            there is no teacher. RC-MAE's layout has both.
        overwrite: replace the file if it is there.

    Raises:
        ValueError: this checkpoint, layout, network and file do not go together; every reason at
            once.
        OSError: the file could not be written; what was there before still is.
    """
    networks = _networks(manifest, out, layout, network, overwrite)
    shapes: dict[str, Shape] = {}  # by network/name in the file
    # network/name in the file -> keys in the checkpoint, one after the other
    parts: dict[str, list[str]] = {}
    for each in networks:
        there = _shapes(manifest, each)
        for name in shapes_of(sizes_of(there)):  # the same order, whoever saved
            if LAYOUTS[layout].decoder or in_encoder(name):
                shapes[f"{each}/{name}"] = there[name]
                parts[f"{each}/{name}"] = _parts(manifest, each, name)
    keys = [key for some in parts.values() for key in some]
    token = secrets.token_hex(4)
    aside, raw = (out.with_name(f".{out.name}.{token}.{what}") for what in ("writing", "raw"))
    try:
        with aside.open("wb") as file:
            if out.suffix == ".safetensors":
                plain = {name.partition("/")[2]: shape for name, shape in shapes.items()}
                _write_header(file, plain, about(manifest) | {"network": networks[0]})
                _write_elements(file, manifest, keys)
            else:
                with raw.open("wb") as elements:
                    _write_elements(elements, manifest, keys)
                tensors = _mapped(raw, shapes)
                _save_torch(_document(manifest, layout, networks, tensors), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)
        raw.unlink(missing_ok=True)
    return Exported(
        out,
        layout,
        networks,
        manifest.step,
        len(parts),
        out.stat().st_size,
        _use(manifest, layout, out),
    )


def _networks(
    manifest: Manifest, out: Path, layout: str, network: str | None, overwrite: bool
) -> tuple[Which, ...]:
    """Whose weights go into the file. Raises ValueError with everything that stands against it."""
    if layout not in LAYOUTS:
        raise Refused(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    problems, kinds = [], {key.partition("/")[0] for key in manifest.tensors}
    networks: tuple[Which, ...] = ("teacher",) if "teacher" in kinds else ("student",)
    if layout == "rcmae":
        networks = ("student", "teacher")
        if network is not None:
            problems.append(
                f"layout rcmae has student and teacher; leave {network!r} out, or use mae-full"
            )
    elif network is not None:
        networks = ("student",) if network == "student" else ("teacher",)
    if "teacher" in networks and "teacher" not in kinds:
        problems.append(
            f"{manifest.path} has no teacher; export the student, in another layout than rcmae"
        )
    else:
        told = {each: _shapes(manifest, each) for each in networks}
        unfit = [
            f"{each} {problem}"
            for each, shapes in told.items()
            for problem in shape_problems(shapes)
        ]
        if unfit:
            problems.append(
                f"{manifest.path} does not fit the published layouts: {'; '.join(unfit)}"
            )
        elif layout in ("mae-full", "rcmae") and any(
            "decoder_pred.weight" not in each for each in told.values()
        ):
            problems.append(
                f"{manifest.path} has no decoder of MAE's; layouts mae and timm take the encoder"
            )
    if out.suffix not in LAYOUTS[layout].suffixes:
        problems.append(
            f"{out}: a file of layout {layout} ends in {' or '.join(LAYOUTS[layout].suffixes)}"
        )
    if not out.parent.is_dir():
        problems.append(f"{out.parent} is no folder; make it first")
    if out.is_dir():
        problems.append(f"{out} is a folder; give a file's name")
    elif out.exists() and not overwrite:
        problems.append(f"{out} is there already; give another name, or ask to overwrite it")
    if problems:
        raise Refused("\n".join(problems))
    return networks


def _shapes(manifest: Manifest, network: str) -> dict[str, Shape]:
    """Shapes of a masked autoencoder's weights by MAE's names: biases of queries and values are
    those of all three.
    """
    found = {
        name: tuple(row["shape"])
        for key, row in manifest.tensors.items()
        for kind, _, name in [key.partition("/")]
        if kind in (KIND[network], "buffer")
    }
    for name in [name for name in found if name.endswith(".q_bias")]:
        found[f"{name.removesuffix('q_bias')}qkv.bias"] = (3 * found[name][0],)
        del found[name], found[f"{name.removesuffix('q_bias')}v_bias"]
    return {name: found[name] for name in of_autoencoder(found)}


def _parts(manifest: Manifest, network: str, name: str) -> list[str]:
    """The keys in a checkpoint whose elements, one after the other, are those of a weight.

    "" stands for zeros.
    """
    key = f"buffer/{name}" if f"buffer/{name}" in manifest.tensors else f"{KIND[network]}/{name}"
    if key in manifest.tensors:
        return [key]
    place = key.removesuffix("qkv.bias")
    return [f"{place}q_bias", "", f"{place}v_bias"]  # keys have none: softmax does not see it


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


def _write_header(
    file: IO[bytes], shapes: Mapping[str, Shape], metadata: Mapping[str, str]
) -> None:
    """The head of a safetensors file: length, then JSON that says where the elements of each
    tensor will lie.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


def _write_elements(file: IO[bytes], manifest: Manifest, keys: Iterable[str]) -> None:
    real, written = list(keys), 0
    tensors = whole_tensors(manifest, filter(None, real), torch.float32)
    for key in real:
        if key:
            written = file.write(next(tensors).numpy().data)
        else:
            file.write(bytes(written))  # as many as the biases of the queries before


def _mapped(raw: Path, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Tensors over a file of their elements: torch.save reads them from there, and none is in
    memory before.
    """
    elements = np.memmap(raw, np.float32, mode="c")
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes.values()))
    return {
        name: torch.from_numpy(elements[end - math.prod(shape) : end]).view(shape)
        for (name, shape), end in zip(shapes.items(), ends, strict=True)
    }


def _save_torch(document: dict[str, Any], file: IO[bytes]) -> None:
    try:
        torch.save(document, file)
    except RuntimeError as error:  # torch's own, of the archive that it could not close
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def _document(
    manifest: Manifest, layout: str, networks: Iterable[str], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What torch.save gets."""
    plain: dict[str, dict[str, Tensor]] = {each: {} for each in networks}
    for name, tensor in tensors.items():
        each, _, published = name.partition("/")
        plain[each][published] = tensor
    if layout == "rcmae":
        recipe = manifest.meta["recipe"]
        args = argparse.Namespace(
            model=recipe["model"]["name"],
            input_size=recipe["model"]["image_size"],
            mask_ratio=recipe["objective"]["mask_ratio"],
            norm_pix_loss=recipe["objective"]["norm_pix_loss"],
            **about(manifest),
        )
        return {
            "student": {f"module.{name}": tensor for name, tensor in plain["student"].items()},
            "teacher": plain["teacher"],
            "student_without_ddp": plain["student"],  # the same storages: in the file once
            "teacher_without_ddp": plain["teacher"],
            # the last whole one, from 0
            "epoch": manifest.step // manifest.meta["sizes"]["steps_per_epoch"] - 1,
            "args": args,
        }
    [state] = plain.values()
    return {"model": state} if layout.startswith("mae") else state


def _use(manifest: Manifest, layout: str, out: Path) -> str:
    """A line of Python that reads the file."""
    if layout == "timm":
        return (
            f"timm.create_model({', '.join(_timm_arguments(manifest))}, "
            f"checkpoint_path={str(out)!r})"
        )
    if layout == "safetensors":
        return f"safetensors.torch.load_file({str(out)!r})"
    return f"rcmae.weights.export.load_weights(Path({str(out)!r}))"


def _timm_arguments(manifest: Manifest) -> list[str]:
    """Of timm's create_model, for this encoder without a head: its architecture, and what
    differs from it.
    """
    model = manifest.meta["recipe"]["model"]
    known = {"image_size": 224, "in_channels": 3}
    names = {"image_size": "img_size", "in_channels": "in_chans"}
    differing = {
        names.get(key, key): model[key]
        for key in ("image_size", "in_channels", "patch_size", "embed_dim", "depth", "num_heads")
        if model[key] not in (None, known.get(key))
    }
    if not model.get("cls_token", True):
        differing |= {"class_token": False, "global_pool": "'avg'", "fc_norm": False}
    return [
        f"'{model['name']}_224'",
        "num_classes=0",
        *(f"{key}={value}" for key, value in differing.items()),
    ]


# --------------------------------------------------------------------------------------------- load


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
