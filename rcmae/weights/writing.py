"""A run's weights in the files that others read.

A checkpoint has every tensor in pieces, for going on; an export has the student or the teacher
whole, by its published names: safetensors, MAE's and RC-MAE's `.pth` layouts, timm's. Position
tables are the checkpoint's own. Tensors pass one by one from the checkpoint to the file, as
float32, so memory is bounded by the largest. A file is put in place whole or not at all.

Not written: the optimizer's state of RC-MAE's layout. To go on training, copy the checkpoint."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import secrets
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rcmae.checkpoint import Manifest
from rcmae.errors import Refused
from rcmae.weights.layouts import (
    KIND,
    LAYOUTS,
    Shape,
    Which,
    in_encoder,
    shape_problems,
    shapes_of,
    sizes_of,
)
from rcmae.weights.names import of_autoencoder
from rcmae.weights.reading import about, whole_tensors


class Exported(NamedTuple):
    """A file that was written."""

    path: Path
    layout: str
    networks: tuple[str, ...]  # whose weights are in it
    step: int
    tensors: int
    bytes: int
    use: str  # a line of Python that reads it


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
    return f"rcmae.weights.reading.load_weights(Path({str(out)!r}))"


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
