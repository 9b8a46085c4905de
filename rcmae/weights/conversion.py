"""Weights of one family turned into those of another, both ways: names and layout change, no number
does."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from rcmae import __version__
from rcmae.errors import Refused
from rcmae.files import aside, write_aside
from rcmae.models.kernels import LAYER_NORM_EPS
from rcmae.models.sizes import ARCHITECTURES
from rcmae.weights.encoder import (
    DECODER_HEADS,
    HEADS,
    WeightsWarning,
    chosen_heads,
    heads_of,
    model_of,
    statistics_of,
    to_onnx,
)
from rcmae.weights.layouts import FAMILIES, TORCH
from rcmae.weights.names import family_names, of_autoencoder, published_names
from rcmae.weights.reading import NetworkWeights, public_metadata
from rcmae.weights.shapes import in_encoder, shape_problems, sizes_of
from rcmae.weights.writing import TimmModel, arguments_of, load_line, timm_cfg


class Converted(NamedTuple):
    """A file or folder that was written."""

    source: str  # whose weights, a line
    taken: list[str]  # names of the weights in it
    left_out: list[str]
    out: Path
    use: str  # a line of Python that reads it


def convert(
    source: NetworkWeights,
    target: str,
    out: Path,
    *,
    num_heads: int | None = None,
    decoder_heads: int | None = None,
) -> Converted:
    """Write the source's weights as a file of a target.

    Args:
        source: of any family.
        target: one of TARGETS.
        out: a file, of Hugging Face a folder, that is not there yet.
        num_heads: number of heads, for an unusual architecture.
        decoder_heads: of its decoder, alike.

    Raises:
        Refused: the weights are not an encoder or network of this family, or the file cannot be one
            of the target.
        OSError: it cannot be written.
    """
    if out.exists():
        raise Refused(f"{out} already exists; give another name")
    whole = FAMILIES[target].decoder if target in FAMILIES else target == "safetensors"
    weights = published_names(source.weights)
    if "fc_norm.weight" in weights and "norm.weight" not in weights:
        raise Refused(
            f"{source.about}: a classifier that pools the mean of the patches normalises it "
            "(fc_norm) and has no norm after its last block, as these files have; write all of it: "
            "`rcmae export RUN --format timm` (or hf), or convert the weights that it began from"
        )
    taken = {name: weights[name] for name in of_autoencoder(weights) if whole or in_encoder(name)}
    problems = shape_problems({name: tuple(value.shape) for name, value in taken.items()})
    problems = problems or _size_problems(source, taken, target, num_heads)
    if problems:
        raise Refused(f"{source.about}: {'; '.join(problems)}")

    if target == "onnx":
        encoder = source._replace(weights=taken)
        model, _ = model_of(encoder, image_size=None, num_heads=num_heads, head=False)
        to_onnx(model, out)
    elif target in ("huggingface", "pixio"):
        heads = Heads(num_heads, decoder_heads)
        write_hugging_face(source, taken, out, heads, family=target)
    else:
        _write_file(source, taken, target, out)
    left_out = sorted(name for name in weights if name not in taken)
    use = _use(source, taken, target, out, num_heads)
    return Converted(source.about, sorted(taken), left_out, out, use)


class Heads(NamedTuple):
    """Numbers of heads as requested; None: those beside the weights."""

    encoder: int | None = None
    decoder: int | None = None


def _size_problems(
    source: NetworkWeights, taken: Mapping[str, Tensor], target: str, num_heads: int | None
) -> list[str]:
    """What of sizes that are sound stands against a target: one line a problem."""
    sizes = sizes_of({name: tuple(value.shape) for name, value in taken.items()})
    problems = []
    if num_heads is not None and (num_heads < 1 or sizes["embed_dim"] % num_heads):
        problems.append(
            f"num_heads={num_heads}, as requested, does not divide its width of "
            f"{sizes['embed_dim']}"
        )
    count = sizes["num_patches"]
    wants_grid = target in ("huggingface", "pixio", "timm") and source.grid is None
    if wants_grid and round(count**0.5) ** 2 != count:
        problems.append(
            f"its {count} positions are no square of patches, and nothing says how many rows: "
            "give a run, or a file that `rcmae export` wrote, or put a config.json with "
            "image_size: [height, width] beside it"
        )
    return problems


def _use(
    source: NetworkWeights,
    taken: Mapping[str, Tensor],
    target: str,
    out: Path,
    num_heads: int | None,
) -> str:
    """A line of Python that reads what was written."""
    if target == "onnx":
        return f"onnxruntime.InferenceSession({str(out)!r})"
    if target == "safetensors":
        return f"safetensors.torch.load_file({str(out)!r})"
    if target in ("huggingface", "pixio"):
        (name,) = json.loads((out / "config.json").read_text())["architectures"]
        return f"transformers.{name}.from_pretrained({str(out)!r})"
    sizes = sizes_of({name: tuple(value.shape) for name, value in taken.items()})
    heads = num_heads or heads_of(source) or HEADS.get(sizes["embed_dim"])
    if target == "timm" and heads is not None:
        arguments = ", ".join(arguments_of(_timm_model(source, sizes, heads)))
        return f"timm.create_model({arguments}, checkpoint_path={str(out)!r})"
    return load_line(out, sizes["embed_dim"], heads, _pixels(source, sizes))


def _pixels(source: NetworkWeights, sizes: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the images of weights of these sizes."""
    side, patch = round(sizes["num_patches"] ** 0.5), sizes["patch_size"]
    rows, columns = source.grid or (side, side)
    return rows * patch, columns * patch


def _timm_model(source: NetworkWeights, sizes: Mapping[str, Any], heads: int) -> TimmModel:
    """The timm model of weights of these sizes; further class tokens are registers of it."""
    height, width = _pixels(source, sizes)
    told = {key: sizes[key] for key in ("patch_size", "embed_dim", "depth")} | {"num_heads": heads}
    name = "vit_base_patch16"
    for each, known in ARCHITECTURES.items():
        if all(known[key] == told[key] for key in told):
            name = each
    arguments: dict[str, Any] = {
        key: value for key, value in told.items() if ARCHITECTURES[name][key] != value
    }
    channels = sizes["in_channels"]
    given = {"img_size": height if height == width else (height, width), "in_chans": channels}
    ratio = sizes["mlp_ratio"]
    if ratio % 1:
        ratio += 0.5 / sizes["embed_dim"]  # timm rounds the width of an MLP down
    given |= {"mlp_ratio": ratio, "class_token": sizes["class_tokens"] > 0}
    given["reg_tokens"] = max(sizes["class_tokens"] - 1, 0) + sizes["registers"]
    usual = {"img_size": 224, "in_chans": 3, "mlp_ratio": 4, "class_token": True, "reg_tokens": 0}
    arguments |= {key: value for key, value in given.items() if value != usual[key]}
    arguments |= {"global_pool": "avg", "fc_norm": False}
    mean, std = statistics_of(source, channels)
    return TimmModel(f"{name}_224", 0, arguments, timm_cfg((channels, height, width), mean, std))


def _write_file(
    source: NetworkWeights, taken: Mapping[str, Tensor], target: str, out: Path
) -> None:
    named = family_names(taken, "mae" if target == "safetensors" else target)
    weights = {name: value.contiguous().clone() for name, value in named.items()}
    if out.suffix == ".safetensors" and target in ("safetensors", "timm"):
        metadata = {
            "format": "pt",
            "written_by": f"rcmae {__version__}",
            **public_metadata(source.metadata),
        }
        write_aside(out, save(weights, metadata))
    elif out.suffix in TORCH and target != "safetensors":
        with aside(out) as file:
            torch.save(weights if target == "timm" else {"model": weights}, file)
    else:
        raise Refused(f"{out}: a file of {target} has another ending; see --help")


def write_hugging_face(
    source: NetworkWeights,
    taken: Mapping[str, Tensor],
    out: Path,
    heads: Heads,
    *,
    family: str = "huggingface",
) -> None:
    """A folder for `ViTMAEForPreTraining.from_pretrained` (or ViTMAEModel's, without a decoder), or
    of the family "pixio" for PixioModel's.

    Raises Refused, OSError.
    """
    configs = {"huggingface": _hugging_face_config, "pixio": pixio_config}
    config = configs[family](source, taken, heads)
    mean, std = statistics_of(source, config["num_channels"])
    weights = family_names(taken, family)
    if config["architectures"] == ["ViTMAEModel"]:
        weights = {name.removeprefix("vit."): value for name, value in weights.items()}
    weights = {name: value.contiguous() for name, value in weights.items()}
    out.mkdir(parents=True)
    write_aside(out / "config.json", json.dumps(config, indent=1))
    write_aside(out / "model.safetensors", save(weights, {"format": "pt"}))
    processor = hugging_face_processor(config["image_size"], mean, std)
    write_aside(out / "preprocessor_config.json", json.dumps(processor, indent=1))


def hugging_face_processor(
    side: int, mean: Sequence[float], std: Sequence[float], kind: str = "ViTImageProcessor"
) -> dict[str, Any]:
    """The preprocessor_config.json, for `AutoImageProcessor`."""
    return {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def _hugging_face_config(
    source: NetworkWeights, taken: Mapping[str, Tensor], heads: Heads
) -> dict[str, Any]:
    """The config.json of the weights. Raises Refused."""
    sizes = sizes_of({name: tuple(value.shape) for name, value in taken.items()})
    side = round(sizes["num_patches"] ** 0.5)
    rows, columns = source.grid or (side, side)
    if rows != columns:
        raise Refused(
            f"Hugging Face's ViTMAE has square images, these weights a grid of {rows}x{columns}"
        )
    if not sizes["class_tokens"]:
        raise Refused("Hugging Face's ViTMAE has a class token, these weights none: --to timm")
    if sizes["class_tokens"] > 1 or sizes["registers"]:
        raise Refused("Hugging Face's ViTMAE has one class token and no registers: give --to pixio")
    width = sizes["embed_dim"]
    decoder_width, decoder_heads = 512, 16  # transformers' own, where there is no decoder
    if "decoder_dim" in sizes:
        decoder_width = sizes["decoder_dim"]
        decoder_heads = _decoder_heads(source, decoder_width, heads.decoder)
    return {
        "model_type": "vit_mae",
        "hidden_size": width,
        "num_hidden_layers": sizes["depth"],
        "architectures": ["ViTMAEForPreTraining" if "decoder_dim" in sizes else "ViTMAEModel"],
        "num_attention_heads": chosen_heads(source, width, heads.encoder),
        "intermediate_size": round(width * sizes["mlp_ratio"]),
        "hidden_act": source.beside.activation or "gelu",
        "image_size": rows * sizes["patch_size"],
        "patch_size": sizes["patch_size"],
        "qkv_bias": True,
        "num_channels": sizes["in_channels"],
        "layer_norm_eps": source.beside.eps or LAYER_NORM_EPS,
        "decoder_hidden_size": decoder_width,
        "decoder_num_hidden_layers": sizes.get("decoder_depth", 8),
        "decoder_num_attention_heads": decoder_heads,
        "decoder_intermediate_size": round(decoder_width * sizes["mlp_ratio"]),
        **_pretraining(source),
    }


def _decoder_heads(source: NetworkWeights, width: int, asked: int | None) -> int:
    """The decoder's number of heads: as requested, as beside the weights, else as published for
    its width. Raises Refused.
    """
    named = ARCHITECTURES.get(str(source.sizes.get("name")), {})
    told = source.sizes.get("decoder_heads") or named.get("decoder_heads")
    heads = asked if asked is not None else told or DECODER_HEADS.get(width, 16)
    if heads < 1 or width % heads:
        raise Refused(
            f"{source.about}: decoder_heads={heads} does not divide the decoder's width of "
            f"{width}: give --decoder-heads, or --to timm, which has no decoder"
        )
    if asked is None and told is None:
        warnings.warn(
            f"{source.about}: nothing says how many heads its decoder has; decoder_heads={heads} "
            "is guessed, and another number is another network: give --decoder-heads",
            WeightsWarning,
            stacklevel=2,
        )
    return int(heads)


def _pretraining(source: NetworkWeights) -> dict[str, Any]:
    """mask_ratio and norm_pix_loss, as the recipe or what lies beside the weights says.

    Raises Refused.
    """
    told = source.beside.pretraining
    told = told | json.loads(source.metadata.get("recipe", "{}")).get("objective", {})
    defaults = {"mask_ratio": 0.75, "norm_pix_loss": True}
    ratio, norm = (defaults[key] if told.get(key) is None else told[key] for key in defaults)
    problems = []
    if type(ratio) not in (int, float) or not 0 <= ratio < 1:
        problems.append(f"mask_ratio={ratio!r:.80} is not a number from 0 to below 1")
    if type(norm) is not bool:
        problems.append(f"norm_pix_loss={norm!r:.80} is not true or false")
    if problems:
        raise Refused(f"{source.about}: {'; '.join(problems)}; correct it where it is said")
    return {"mask_ratio": float(ratio), "norm_pix_loss": norm}


def pixio_config(
    source: NetworkWeights, taken: Mapping[str, Tensor], heads: Heads
) -> dict[str, Any]:
    """The config.json of transformers' PixioModel. Raises Refused."""
    sizes = sizes_of({name: tuple(value.shape) for name, value in taken.items()})
    side = round(sizes["num_patches"] ** 0.5)
    rows, columns = source.grid or (side, side)
    problems = []
    if rows != columns:
        problems.append(f"Pixio has square images, these weights a grid of {rows}x{columns}")
    if not sizes["class_tokens"]:
        problems.append("Pixio has class tokens, these weights none: give --to huggingface or timm")
    if sizes["registers"]:
        problems.append(f"Pixio has no registers, these weights {sizes['registers']}: --to timm")
    if sizes["mlp_ratio"] % 1:
        problems.append(
            f"Pixio has a whole mlp_ratio, these weights {sizes['mlp_ratio']:g}: --to timm"
        )
    if problems:
        raise Refused("; ".join(problems))
    return {
        "model_type": "pixio",
        "architectures": ["PixioModel"],
        "hidden_size": sizes["embed_dim"],
        "num_hidden_layers": sizes["depth"],
        "num_attention_heads": chosen_heads(source, sizes["embed_dim"], heads.encoder),
        "n_cls_tokens": sizes["class_tokens"],
        "mlp_ratio": round(sizes["mlp_ratio"]),
        "hidden_act": source.beside.activation or "gelu",
        "image_size": rows * sizes["patch_size"],
        "patch_size": sizes["patch_size"],
        "qkv_bias": True,
        "num_channels": sizes["in_channels"],
        "layer_norm_eps": source.beside.eps or LAYER_NORM_EPS,
        "drop_path_rate": 0.0,
    }
