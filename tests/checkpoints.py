"""Checkpoints without a training: a folder as a number of ranks would have committed it, from
any tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rcmae import checkpoint
from rcmae.config import Recipe
from rcmae.models.sizes import NetworkSizes
from rcmae.models.vit import MaskedAutoencoder

# A network whose every size differs from every other, on a grid that is not square.
MODEL = {
    "name": "vit_tiny_patch16",
    "image_size": [24, 40],
    "patch_size": 8,
    "in_channels": 3,
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 4,
    "decoder_dim": 32,
    "decoder_depth": 2,
    "decoder_heads": 2,
}


def network(seed: int, **sizes: Any) -> MaskedAutoencoder:
    """A network of MODEL's sizes, every weight drawn at random, biases and norms too."""
    sizes = {key: value for key, value in {**MODEL, **sizes}.items() if key != "name"}
    model = MaskedAutoencoder(NetworkSizes(**sizes | {"image_size": tuple(sizes["image_size"])}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.1, generator=generator)
    return model


def state_of(
    student: MaskedAutoencoder, teacher: MaskedAutoencoder | None = None, kinds: int = 4
) -> dict[str, Tensor]:
    """Both networks and the student's moments, by the checkpoint's keys.

    Fewer `kinds` leave out the last ones.
    """
    state = {f"buffer/{name}": table for name, table in student.named_buffers()}
    for name, param in student.named_parameters():
        some = {"weight": param, "exp_avg": param / 7, "exp_avg_sq": param.square()}
        if teacher is not None:
            some = {"weight": param, "teacher": teacher.get_parameter(name), **some}
        state |= {f"{kind}/{name}": tensor.detach() for kind, tensor in list(some.items())[:kinds]}
    return state


def write_checkpoint(
    run: Path,
    step: int,
    state: Mapping[str, Tensor],
    *,
    ranks: int = 3,
    model: Mapping[str, Any] = MODEL,
    generation: int = 1,
    **sections: Any,
) -> Path:
    """Commit the tensors, each cut into as many pieces as there are ranks, to `run`; the
    checkpoint's folder.

    `sections` are further sections of the recipe.
    """
    recipe = Recipe.model_validate({"model": dict(model), "data": {"shards": "x.tar"}, **sections})
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    pieces: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    tensors = {}
    for key, tensor in state.items():
        flat, runs = tensor.flatten(), []
        for rank in range(ranks):
            low, high = (flat.numel() * (rank + i) // ranks for i in (0, 1))
            if high > low:
                pieces[rank][f"{key}@{low}"] = flat[low:high].clone()
                runs.append([f"rank-{rank:05d}.safetensors", low, high - low])
        dtype = {torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype]
        tensors[key] = {"shape": list(tensor.shape), "dtype": dtype, "runs": runs}
    files = {}
    for rank in range(ranks):
        path = folder / f"rank-{rank:05d}.safetensors"
        save_file(pieces[rank], path)
        with path.open("rb") as file:
            files[path.name] = {
                "bytes": path.stat().st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
    document = {
        "format": 1,  # an object a run; saves write format 2
        "generation": generation,
        "step": step,
        "images": 32 * step,
        "optimizer_step": step,
        "teacher_updates": step,
        "files": files,
        "tensors": tensors,
        "meta": {
            "recipe": recipe.model_dump(mode="json"),
            "data_fingerprint": "0123456789abcdef",
            "guard": {},
            "sizes": {"world": ranks, "images_per_step": 32, "steps_per_epoch": 4},
            "versions": {"torch": "2.13.0"},
        },
    }
    (folder / "manifest.json").write_text(checkpoint.sealed(document))
    (folder.parent / "LATEST").write_text(folder.name + "\n")
    return folder
