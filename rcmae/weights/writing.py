"""A run's weights in the files that others read.

A checkpoint has every tensor in pieces, for resuming; an export has the student or the teacher
whole, by its published names: safetensors, MAE's and RC-MAE's `.pth` layouts, timm's. Position
tables are the checkpoint's own. Tensors pass one by one from the checkpoint to the file, as
float32, so memory is bounded by the largest. A file is put in place whole or not at all.

Not written: the optimizer's state of RC-MAE's layout. To resume training, copy the checkpoint."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import secrets
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rcmae.checkpoint import Manifest, whole_tensors
from rcmae.data.transforms import CENTRE_SHARE
from rcmae.errors import Refused
from rcmae.files import aside
from rcmae.models.sizes import ARCHITECTURES
from rcmae.weights.encoder import HEADS, statistics
from rcmae.weights.layouts import KIND, LAYOUTS, Which
from rcmae.weights.names import of_autoencoder
from rcmae.weights.reading import metadata_of
from rcmae.weights.shapes import Shape, in_encoder, shape_problems, shapes_of, sizes_of


class Exported(NamedTuple):
    """A file that was written."""

    path: Path
    layout: str
    networks: tuple[str, ...]  # whose weights are in it
    step: int
    tensors: int
    bytes: int
    use: str  # a line of Python that reads it
    notes: tuple[str, ...] = ()  # what its reader should know


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
        Refused: this checkpoint, layout, network and file do not go together; every reason at
            once.
        OSError: the file could not be written; what was there before still is.
    """
    if layout not in LAYOUTS:
        raise Refused(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    networks = _chosen(manifest, layout, network)
    problems = _network_problems(manifest, layout, network, networks)
    problems += _file_problems(out, layout, overwrite)
    if problems:
        raise Refused("\n".join(problems))

    contents = _contents(manifest, layout, networks)
    shapes = {name: entry.shape for name, entry in contents.items()}
    keys = list(itertools.chain.from_iterable(entry.keys for entry in contents.values()))
    with aside(out) as file:
        if out.suffix == ".safetensors":
            plain = {name.partition("/")[2]: shape for name, shape in shapes.items()}
            _write_header(file, plain, metadata_of(manifest) | {"network": networks[0]})
            _write_elements(file, manifest, keys)
        else:
            with _raw_file(out) as raw:
                with raw.open("wb") as elements:
                    _write_elements(elements, manifest, keys)
                document = _document(manifest, layout, networks, _mapped(raw, shapes))
                _save_torch(document, file)
    return Exported(
        path=out,
        layout=layout,
        networks=networks,
        step=manifest.step,
        tensors=len(contents),
        bytes=out.stat().st_size,
        use=_use(manifest, layout, out),
        notes=_notes(manifest, layout, networks[0]),
    )


# ------------------------------------------------------------------------------- whether it can be


def _chosen(manifest: Manifest, layout: str, network: Which | None) -> tuple[Which, ...]:
    """Whose weights go into the file."""
    if layout == "rcmae":
        return ("student", "teacher")
    if network is not None:
        return (network,)
    return ("teacher",) if _has_teacher(manifest) else ("student",)


def _has_teacher(manifest: Manifest) -> bool:
    return any(key.startswith("teacher/") for key in manifest.tensors)


def _network_problems(
    manifest: Manifest, layout: str, network: str | None, networks: tuple[Which, ...]
) -> list[str]:
    """What stands against these networks of this checkpoint in this layout."""
    problems = []
    if layout == "rcmae" and network is not None:
        problems.append(
            f"layout rcmae has student and teacher; leave {network!r} out, or use mae-full"
        )
    if "teacher" in networks and not _has_teacher(manifest):
        problems.append(
            f"{manifest.path} has no teacher; export the student, in another layout than rcmae"
        )
        return problems

    unfit = []
    decoders = True
    for each in networks:
        shapes = _shapes(manifest, each)
        unfit += [f"{each} {problem}" for problem in shape_problems(shapes)]
        decoders = decoders and "decoder_pred.weight" in shapes
    if unfit:
        problems.append(f"{manifest.path} does not fit the published layouts: {'; '.join(unfit)}")
    elif layout == "timm" and _more_tokens(_shapes(manifest, networks[0])):
        problems.append(
            "timm's model has one class token: `rcmae convert RUN --to timm` writes the others as "
            "its registers"
        )
    elif layout in ("mae-full", "rcmae") and not decoders:
        problems.append(
            f"{manifest.path} has no decoder of MAE's; layouts mae and timm take the encoder"
        )
    return problems


def _more_tokens(shapes: Mapping[str, Shape]) -> bool:
    """Whether there are other tokens than one class token."""
    return "reg_token" in shapes or shapes.get("cls_token", (1, 1, 1))[1] > 1


def _file_problems(out: Path, layout: str, overwrite: bool) -> list[str]:
    """What stands against writing this file."""
    problems = []
    suffixes = LAYOUTS[layout].suffixes
    if out.suffix not in suffixes:
        problems.append(f"{out}: a file of layout {layout} ends in {' or '.join(suffixes)}")
    if not out.parent.is_dir():
        problems.append(f"{out.parent} is not a folder; create it first")
    if out.is_dir():
        problems.append(f"{out} is a folder; give a file's name")
    elif out.exists() and not overwrite:
        problems.append(f"{out} already exists; give another name, or ask to overwrite it")
    return problems


# ------------------------------------------------------------------------------ out of a checkpoint


class _Entry(NamedTuple):
    """A tensor of the file."""

    shape: Shape
    keys: list[str]  # in the checkpoint, whose elements it has one after the other; "": zeros


def _contents(manifest: Manifest, layout: str, networks: Iterable[Which]) -> dict[str, _Entry]:
    """What a layout has of these networks, by network/name, in the file's order."""
    contents = {}
    for each in networks:
        there = _shapes(manifest, each)
        for name in shapes_of(sizes_of(there)):  # the same order, whoever saved
            if LAYOUTS[layout].decoder or in_encoder(name):
                contents[f"{each}/{name}"] = _Entry(there[name], _parts(manifest, each, name))
    return contents


def _shapes(manifest: Manifest, network: str) -> dict[str, Shape]:
    """Shapes of a masked autoencoder's weights by MAE's names: biases of queries and values are
    those of all three.
    """
    found = {}
    for key, row in manifest.tensors.items():
        kind, _, name = key.partition("/")
        if kind in (KIND[network], "buffer"):
            found[name] = tuple(row.shape)
    for name in [name for name in found if name.endswith(".q_bias")]:
        place = name.removesuffix("q_bias")
        found[f"{place}qkv.bias"] = (3 * found[name][0],)
        del found[name], found[f"{place}v_bias"]
    return {name: found[name] for name in of_autoencoder(found)}


def _parts(manifest: Manifest, network: str, name: str) -> list[str]:
    """The keys in a checkpoint whose elements, one after the other, are those of a weight.

    "" stands for zeros.
    """
    key = f"{KIND[network]}/{name}"
    for there in (f"buffer/{name}", key):
        if there in manifest.tensors:
            return [there]
    place = key.removesuffix("qkv.bias")
    return [f"{place}q_bias", "", f"{place}v_bias"]  # keys have none: softmax does not see it


def _write_elements(file: IO[bytes], manifest: Manifest, keys: Iterable[str]) -> None:
    keys = list(keys)
    tensors = whole_tensors(manifest, filter(None, keys), torch.float32)
    written = 0
    for key in keys:
        if key:
            elements = next(tensors)
            if not elements.isfinite().all():
                raise Refused(f"{manifest.path}: {key} is not finite; export an earlier checkpoint")
            written = file.write(elements.numpy().data)
        else:
            file.write(bytes(written))  # as many as the biases of the queries before


# -------------------------------------------------------------------------------------- into a file


def _write_header(
    file: IO[bytes], shapes: Mapping[str, Shape], metadata: Mapping[str, str]
) -> None:
    """The head of a safetensors file: length, then JSON that says where the elements of each
    tensor will lie.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        begin = end
        end += 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


@contextmanager
def _raw_file(out: Path) -> Iterator[Path]:
    """The name of a file beside `out`, which is gone when the block ends."""
    raw = out.with_name(f".{out.name}.{secrets.token_hex(4)}.raw")
    try:
        yield raw
    finally:
        raw.unlink(missing_ok=True)


def _mapped(raw: Path, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Tensors over a file of their elements: torch.save reads them from there, and none is in
    memory before.
    """
    elements = np.memmap(raw, np.float32, mode="c")
    tensors = {}
    end = 0
    for name, shape in shapes.items():
        begin = end
        end += math.prod(shape)
        tensors[name] = torch.from_numpy(elements[begin:end]).view(shape)
    return tensors


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
    for key, tensor in tensors.items():
        network, _, name = key.partition("/")
        plain[network][name] = tensor
    if layout == "rcmae":
        recipe = manifest.meta["recipe"]
        args = argparse.Namespace(
            model=recipe["model"]["name"],
            input_size=recipe["model"]["image_size"],
            mask_ratio=recipe["objective"].get("mask_ratio"),
            norm_pix_loss=recipe["objective"].get("norm_pix_loss"),
            **metadata_of(manifest),
        )
        return {
            "student": {f"module.{name}": tensor for name, tensor in plain["student"].items()},
            "teacher": plain["teacher"],
            "student_without_ddp": plain["student"],  # the same storages: in the file once
            "teacher_without_ddp": plain["teacher"],
            # the last whole one, from 0
            "epoch": manifest.step // manifest.meta["sizes"].get("steps_per_epoch", 1) - 1,
            "args": args,
        }
    [state] = plain.values()
    return {"model": state} if layout.startswith("mae") else state


def _use(manifest: Manifest, layout: str, out: Path) -> str:
    """A line of Python that reads the file."""
    if layout == "timm":
        arguments = ", ".join(timm_arguments(manifest))
        return f"timm.create_model({arguments}, checkpoint_path={str(out)!r})"
    if layout == "safetensors":
        return f"safetensors.torch.load_file({str(out)!r})"
    options = manifest.meta["recipe"]["model"]
    named = ARCHITECTURES.get(str(options.get("name")), {})
    width, heads = (options.get(key) or named.get(key) for key in ("embed_dim", "num_heads"))
    return load_line(out, width, heads, options.get("image_size"))


def load_line(out: Path, width: int | None, heads: int | None, size: Any) -> str:
    """The line of Python that loads an encoder's file, with what it would guess otherwise.

    `size`: of images, one side or height and width.
    """
    told = f", num_heads={heads}" if heads is not None and HEADS.get(width or 0) != heads else ""
    if isinstance(size, list | tuple) and size[0] != size[1]:
        told += f", image_size=({size[0]}, {size[1]})"
    return f"rcmae.load_encoder({str(out)!r}{told})"


def _notes(manifest: Manifest, layout: str, network: str) -> tuple[str, ...]:
    """What a reader of MAE's layouts should know: published programs have one class token."""
    if layout not in ("mae", "mae-full", "rcmae") or not _more_tokens(_shapes(manifest, network)):
        return ()
    return (
        "MAE's own programs have one class token and no registers, and refuse this file; "
        "rcmae.load_encoder reads it, and --format folder is for timm",
    )


class TimmModel(NamedTuple):
    """What timm's create_model is asked for."""

    architecture: str
    num_classes: int
    arguments: dict[str, Any]  # what differs from the architecture
    cfg: dict[str, Any]  # pretrained_cfg: the statistics and size of the run's images


def timm_model(manifest: Manifest, head: Mapping[str, Any] | None = None) -> TimmModel:
    """The timm model of a checkpoint's network.

    `head`: what a classifier's has (num_classes, global_pool, fc_norm, perhaps depth and
    reg_tokens); None: there is none, and pooling is as `rcmae.load_encoder` has it."""
    recipe = manifest.meta["recipe"]
    model = recipe["model"]
    usual = {"image_size": 224, "in_channels": 3}
    names = {"image_size": "img_size", "in_channels": "in_chans"}
    head = head or {"num_classes": 0, "global_pool": "avg", "fc_norm": False}
    model = model | {key: head[key] for key in ("depth",) if key in head}
    arguments: dict[str, Any] = {}
    for key in ("image_size", "in_channels", "patch_size", "embed_dim", "depth", "num_heads"):
        if model.get(key) not in (None, usual.get(key)):
            arguments[names.get(key, key)] = model[key]
    if not model.get("cls_token", True):
        arguments["class_token"] = False
    if "reg_tokens" in head:
        arguments["reg_tokens"] = head["reg_tokens"]
    arguments |= {"global_pool": head["global_pool"], "fc_norm": head["fc_norm"]}
    size = model["image_size"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = model["in_channels"]
    mean, std = statistics(recipe["data"].get("mean"), recipe["data"].get("std"), channels)
    cfg = timm_cfg((channels, height, width), mean, std)
    return TimmModel(f"{model['name']}_224", head["num_classes"], arguments, cfg)


def timm_cfg(
    size: tuple[int, int, int], mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """timm's pretrained_cfg: what images [C, H, W] of this size are made by."""
    return {
        "input_size": size,
        "mean": mean,
        "std": std,
        "interpolation": "bicubic",
        "crop_pct": CENTRE_SHARE,
    }


def timm_arguments(manifest: Manifest, head: Mapping[str, Any] | None = None) -> list[str]:
    """Of timm's create_model, as Python has them; arguments of `timm_model`."""
    return arguments_of(timm_model(manifest, head))


def arguments_of(model: TimmModel) -> list[str]:
    """Of timm's create_model, as Python has them."""
    named = {"num_classes": model.num_classes, **model.arguments, "pretrained_cfg": model.cfg}
    return [repr(model.architecture), *(f"{key}={value!r}" for key, value in named.items())]
