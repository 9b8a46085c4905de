#!/usr/bin/env python3
"""Turn weights of one family into those of another, both ways, without running anything that is in
a file.

    python tools/convert.py mae_pretrain_vit_base.pth --to huggingface --out vit-mae-base
    python tools/convert.py runs/rcmae_vit_b_16 --to onnx --out encoder.onnx
    python tools/convert.py checkpoint-799.pth --to safetensors --out weights.safetensors

The source is a run, a checkpoint or a file: of MAE, RC-MAE, SupMAE, BootMAE, MAE-priv, timm,
Hugging Face or this package. A table says what matched. A pretraining goes on from any whole
network with `checkpoint.init=FILE`. Exit status: 0 written; 2 these do not go together; 1 the
checkpoint is damaged or the file could not be written."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save
from torch import Tensor

from rcmae import __version__
from rcmae.checkpoint import CheckpointError
from rcmae.errors import Refused
from rcmae.models.kernels import LAYER_NORM_EPS
from rcmae.models.vit import ARCHITECTURES
from rcmae.weights.encoder import HEADS, heads_of, model_of, to_onnx
from rcmae.weights.layouts import KIND, TORCH, in_encoder, shape_problems, sizes_of
from rcmae.weights.names import FAMILIES, family_names, of_autoencoder, published_names
from rcmae.weights.reading import Source, read_network

TARGETS = {
    **{name: about.text for name, about in FAMILIES.items()},
    "safetensors": "this package's: MAE's names, with what is known of the weights in the metadata",
    "onnx": "the encoder: images [B, C, H, W] to tokens [B, 1 + L, D]",
}


def convert(
    source: Source, target: str, out: Path, *, num_heads: int | None = None
) -> dict[str, Any]:
    """Write the source's weights; what was taken and what left out.

    Raises:
        ValueError: the weights are no encoder or network of this family, or the file cannot be one
            of the target.
    """
    if out.exists():
        raise Refused(f"{out} is there already; give another name")
    whole = FAMILIES[target].decoder if target in FAMILIES else target == "safetensors"
    weights = published_names(source.weights)
    taken = {name: weights[name] for name in of_autoencoder(weights) if whole or in_encoder(name)}
    problems = shape_problems({name: tuple(value.shape) for name, value in taken.items()})
    if problems:
        raise Refused(f"{source.about}: {'; '.join(problems)}")
    if target == "onnx":
        model, _ = model_of(
            source._replace(weights=taken), image_size=None, num_heads=num_heads, head=False
        )
        to_onnx(model, out)
    elif target == "huggingface":
        write_hugging_face(source, taken, out, num_heads)
    else:
        written = family_names(taken, "mae" if target == "safetensors" else target)
        written = {name: value.contiguous().clone() for name, value in written.items()}
        if out.suffix == ".safetensors" and target in ("safetensors", "timm"):
            out.write_bytes(
                save(written, {"format": "pt", "written_by": f"rcmae {__version__}", **source.told})
            )
        elif out.suffix in TORCH and target != "safetensors":
            torch.save(written if target == "timm" else {"model": written}, out)
        else:
            raise Refused(f"{out}: a file of {target} has another ending; see --help")
    left = sorted(name for name in weights if name not in taken)
    return {"source": source.about, "taken": sorted(taken), "left out": left, "out": str(out)}


def write_hugging_face(
    source: Source, taken: Mapping[str, Tensor], out: Path, num_heads: int | None
) -> None:
    """A folder for `ViTMAEForPreTraining.from_pretrained` (or ViTMAEModel's, without a decoder).

    Raises ValueError.
    """
    sizes = sizes_of({name: tuple(value.shape) for name, value in taken.items()})
    rows, columns = source.grid or (round(sizes["num_patches"] ** 0.5),) * 2
    if rows != columns:
        raise Refused(
            f"Hugging Face's ViTMAE has square images, these weights a grid of {rows}x{columns}"
        )
    width = sizes["embed_dim"]
    heads = num_heads or heads_of(source) or HEADS.get(width)
    if heads is None:
        raise Refused(f"its width of {width} does not tell the number of heads; give --num-heads")
    told, named = source.sizes, ARCHITECTURES.get(str(source.sizes.get("name")), {})
    decoder_width = sizes.get("decoder_dim", 512)
    config = {
        "model_type": "vit_mae",
        "hidden_size": width,
        "num_hidden_layers": sizes["depth"],
        "architectures": ["ViTMAEForPreTraining" if "decoder_dim" in sizes else "ViTMAEModel"],
        "num_attention_heads": heads,
        "intermediate_size": round(width * sizes["mlp_ratio"]),
        "hidden_act": "gelu",
        "image_size": rows * sizes["patch_size"],
        "patch_size": sizes["patch_size"],
        "qkv_bias": True,
        "num_channels": sizes["in_channels"],
        "layer_norm_eps": LAYER_NORM_EPS,
        "decoder_hidden_size": decoder_width,
        "decoder_num_hidden_layers": sizes.get("decoder_depth", 8),
        "decoder_num_attention_heads": told.get("decoder_heads")
        or named.get("decoder_heads")
        or 16,
        "decoder_intermediate_size": round(decoder_width * sizes["mlp_ratio"]),
        "mask_ratio": 0.75,
        "norm_pix_loss": True,
    }
    written = family_names(taken, "huggingface")
    if "decoder_dim" not in sizes:
        written = {name.removeprefix("vit."): value for name, value in written.items()}
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    written = {name: value.contiguous() for name, value in written.items()}
    (out / "model.safetensors").write_bytes(save(written, {"format": "pt"}))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    targets = "\n".join(f"  {name:<12} {text}" for name, text in TARGETS.items())
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog=f"targets:\n{targets}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="RUN_OR_FILE")
    parser.add_argument("--to", choices=TARGETS, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--what", choices=KIND, help="default: the teacher where there is one")
    parser.add_argument(
        "--num-heads", type=int, help="of an unusual architecture, which shapes do not tell"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    try:
        source = read_network(options.source, options.what)
        done = convert(source, options.to, options.out, num_heads=options.num_heads)
    except (ValueError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    if options.json:
        print(json.dumps(done, indent=1))
        return 0
    kinds = sorted({name.split(".")[0] for name in done["left out"]})
    print(f"{done['source']}\n  {len(done['taken'])} tensors to {done['out']} ({options.to})")
    if kinds:
        print(f"  {len(done['left out'])} left out: {', '.join(kinds)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
