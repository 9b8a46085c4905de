"""What lies beside weights and says what they do not: config.json, preprocessor_config.json, args.

Heads, activation, the norms' epsilon and the statistics of the pixels change what a network gives,
and no shape shows them. Known values are used; others are refused by their key's name."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from rcmae.errors import Refused
from rcmae.models.kernels import LAYER_NORM_EPS
from rcmae.models.sizes import ARCHITECTURES

_ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_python": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
}
# model_type of those whose blocks are the same and whose weights have these names
_TYPES = {"vit", "vit_mae", "vit_msn", "ijepa", "pixio"}
_TIMM_SHAPES = {  # of timm's model_args: what shapes tell, or what moves no feature
    *("img_size", "patch_size", "embed_dim", "depth", "mlp_ratio", "in_chans", "num_classes"),
    *("class_token", "global_pool", "fc_norm", "qkv_bias", "drop_rate", "drop_path_rate"),
    *("dynamic_img_size", "weight_init", "num_heads", "pos_drop_rate", "proj_drop_rate"),
}
SETTINGS = ("args", "hyper_parameters", "hparams", "config")  # keys of a file for its settings
_LARGEST_EPS = 1e-5  # of norms: below, no output shows which it is


@dataclass(frozen=True)
class Beside:
    """What lies beside a file of weights."""

    sizes: dict[str, Any] = field(
        default_factory=dict
    )  # by the names of a recipe: num_heads, decoder_heads
    activation: str | None = None  # None: not told
    eps: float | None = None
    mean: tuple[float, ...] | None = None  # of pixels from 0 to 1, each channel
    std: tuple[float, ...] | None = None
    image_size: tuple[int, int] | None = None  # in pixels
    pretraining: dict[str, Any] = field(default_factory=dict)  # mask_ratio, norm_pix_loss
    files: tuple[str, ...] = ()  # that were read


def beside(path: Path, width: int, about: Mapping[str, Any]) -> Beside:
    """What is said of the weights in a file.

    Args:
        path: the file.
        width: of its tokens: a config.json of another width is another network's.
        about: the file's own account of itself, perhaps with `args`.

    Raises:
        Refused: a file beside it cannot be read, or says what this package cannot do.
    """
    found = _of_args(about)
    config = path.parent / "config.json"
    if config.is_file():
        tree = _tree(config)
        theirs = tree.get("hidden_size", tree.get("embed_dim"))
        if "hidden_size" in tree and theirs == width:
            found = _of_hugging_face(config, tree, found)
        elif "architecture" in tree:
            found = _of_timm(config, tree, found)
    processor = path.parent / "preprocessor_config.json"
    if processor.is_file() and (config.is_file() or path.stem in ("model", "pytorch_model")):
        mean, std = _statistics(processor, _tree(processor))
        found = replace(found, mean=mean, std=std, files=(*found.files, processor.name))
    return found


def refuse_for_training(told: Beside) -> list[str]:
    """What a network of this package would compute in another way, a line each."""
    problems = []
    if told.activation is not None and _ACTIVATIONS[told.activation] is not nn.GELU:
        problems.append(
            f"hidden_act={told.activation} beside the weights: the networks that train here have "
            "gelu; rcmae.load_encoder computes it"
        )
    if told.eps is not None and told.eps > _LARGEST_EPS:
        problems.append(
            f"layer_norm_eps={told.eps} beside the weights: the networks that train here have "
            f"{LAYER_NORM_EPS}; rcmae.load_encoder computes it"
        )
    return problems


def apply_to(model: nn.Module, told: Beside) -> None:
    """Apply what a configuration beside the weights says: activation, epsilon of the norms."""
    for module in model.modules():
        if told.eps is not None and isinstance(module, nn.LayerNorm):
            module.eps = told.eps
        if told.activation is not None and isinstance(getattr(module, "act", None), nn.GELU):
            module.act = _ACTIVATIONS[told.activation]()


def _tree(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{path} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise Refused(f"{path} is not a JSON object")
    return tree


def _of_args(about: Mapping[str, Any]) -> Beside:
    """What settings in the file say: the architecture's name, or the number of heads."""
    args: dict[str, Any] = {}
    where = "args"
    for key in SETTINGS:
        given = about.get(key)
        given = vars(given) if isinstance(given, argparse.Namespace) else given
        if isinstance(given, Mapping):
            args, where = dict(given), key
            break
    name = about.get("arch", args.get("model", args.get("arch")))
    sizes = _of_name(str(name))
    for key in ("num_heads", "decoder_heads"):
        text = str(args.get(key))  # shells and some writers make text of it
        if text.isdecimal() and 0 < int(text) < 10_000:
            sizes[key] = int(text)
    pretraining: dict[str, Any] = {
        key: args[key] for key in ("mask_ratio", "norm_pix_loss") if key in args
    }
    return Beside(sizes=sizes, pretraining=pretraining, files=(where,) if sizes else ())


def _of_name(name: str) -> dict[str, Any]:
    """The numbers of heads of an architecture that a name begins or ends with; none of others."""
    match = re.search(r"vit_(tiny|small|base|large|huge|giant)_patch", name)
    if match is None:
        return {}
    for known, sizes in ARCHITECTURES.items():
        if known.startswith(match.group()):
            return {"num_heads": sizes["num_heads"], "embed_dim": sizes["embed_dim"]}
    return {}


def _of_hugging_face(path: Path, tree: Mapping[str, Any], found: Beside) -> Beside:
    """What transformers' configuration says. Raises Refused."""
    kind = tree.get("model_type", "vit_mae")
    if kind not in _TYPES:
        raise Refused(f"{path}: model_type={kind!r} computes another function; known: {_TYPES}")
    activation = tree.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise Refused(
            f"{path}: hidden_act={activation!r} is not known here; known: {', '.join(_ACTIVATIONS)}"
        )
    eps = tree.get("layer_norm_eps", 1e-12)  # transformers' own
    if not isinstance(eps, int | float) or not 0 < eps < 1:
        raise Refused(f"{path}: layer_norm_eps={eps!r} is not a small number above 0")
    names = {"num_attention_heads": "num_heads", "decoder_num_attention_heads": "decoder_heads"}
    heads = {ours: _whole(path, theirs, tree) for theirs, ours in names.items() if theirs in tree}
    size = tree.get("image_size")
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    pretraining = {key: tree[key] for key in ("mask_ratio", "norm_pix_loss") if key in tree}
    return replace(
        found,
        sizes=found.sizes | heads,
        activation=activation,
        eps=float(eps),
        image_size=sides if len(sides) == 2 else None,
        pretraining=found.pretraining | pretraining,
        files=(*found.files, path.name),
    )


def _whole(path: Path, key: str, tree: Mapping[str, Any]) -> int:
    """A number of heads, which some writers make text or a float of. Raises Refused."""
    text = str(tree[key]).removesuffix(".0")
    if not text.isdecimal() or not 0 < int(text) < 10_000:
        raise Refused(f"{path}: {key}={tree[key]!r} must be a whole number above 0")
    return int(text)


def _of_timm(path: Path, tree: Mapping[str, Any], found: Beside) -> Beside:
    """What timm's configuration on a hub says. Raises Refused."""
    name = str(tree["architecture"])
    args = tree.get("model_args") or {}
    strange = sorted(args.keys() - _TIMM_SHAPES)
    if strange or "quickgelu" in name:
        told = f"architecture={name!r}" if not strange else f"model_args.{strange[0]}"
        raise Refused(f"{path}: {told} may compute another function than is known here")
    sizes = _of_name(name)
    if "num_heads" in args:
        sizes["num_heads"] = _whole(path, "num_heads", args)
    cfg = tree.get("pretrained_cfg") or {}
    mean, std = (_numbers(path, key, cfg.get(key)) for key in ("mean", "std"))
    return replace(
        found, sizes=found.sizes | sizes, mean=mean, std=std, files=(*found.files, path.name)
    )


def _statistics(
    path: Path, tree: Mapping[str, Any]
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and deviation of pixels from 0 to 1 that a preprocessor means. Raises Refused."""
    mean = _numbers(path, "image_mean", tree.get("image_mean"))
    std = _numbers(path, "image_std", tree.get("image_std"))
    if tree.get("do_normalize") is False and mean:
        mean, std = (0.0,) * len(mean), (1.0,) * len(mean)
    if mean is None or std is None:
        return mean, std
    # pixels of 0 to 255 are multiplied by it first
    factor = 255 * tree.get("rescale_factor", 1 / 255) if tree.get("do_rescale", True) else 255
    if abs(factor - 1) < 1e-6:
        return mean, std
    return tuple(each / factor for each in mean), tuple(each / factor for each in std)


def _numbers(path: Path, key: str, value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    numbers = value if isinstance(value, list) else [value]
    if not all(isinstance(each, int | float) for each in numbers):
        raise Refused(f"{path}: {key}={value!r} must be numbers")
    return tuple(float(each) for each in numbers)
