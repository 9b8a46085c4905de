"""What lies beside weights and says what they do not: config.json, preprocessor_config.json, args.

Heads, activation, the norms' epsilon and the statistics of the pixels change what a network gives,
and no shape shows them. Known values are used; others are refused by their key's name."""

from __future__ import annotations

import argparse
import json
import math
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
_LARGEST_SIDE = 2**16  # of an image, in pixels
# what transformers' configuration says of shapes -> what `sizes_of` calls it
_SHAPES = {"patch_size": "patch_size", "num_channels": "in_channels", "num_hidden_layers": "depth"}


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


def beside(path: Path, sizes: Mapping[str, Any], about: Mapping[str, Any]) -> Beside:
    """What is said of the weights in a file.

    Args:
        path: the file.
        sizes: what shapes tell, of `sizes_of`, with embed_dim and in_channels at least: a
            config.json of another width is another network's.
        about: the file's own account of itself, perhaps with `args`.

    Raises:
        Refused: a file beside it cannot be read, or says what this package cannot do.
    """
    found = _of_args(about)
    config = path.parent / "config.json"
    if config.is_file():
        tree = _tree(config)
        theirs = tree.get("hidden_size", tree.get("embed_dim"))
        if "hidden_size" in tree and theirs == sizes["embed_dim"]:
            found = _of_hugging_face(config, tree, found)
            _refuse_others(config, tree, sizes)
        elif "architecture" in tree:
            found = _of_timm(config, tree, found)
    processor = path.parent / "preprocessor_config.json"
    if processor.is_file() and (config.is_file() or path.stem in ("model", "pytorch_model")):
        mean, std = _statistics(processor, _tree(processor))
        found = replace(found, mean=mean, std=std, files=(*found.files, processor.name))
    for key, numbers in (("mean", found.mean), ("std", found.std)):
        if numbers is not None and len(numbers) not in (1, sizes["in_channels"]):
            raise Refused(
                f"{path.parent}: its configuration has a {key} of {len(numbers)} channels, the "
                f"weights {sizes['in_channels']}; give one number, or one a channel"
            )
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
        tree = json.loads(path.read_text(encoding="utf-8-sig"))
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
    if not isinstance(kind, str) or kind not in _TYPES:
        known = ", ".join(sorted(_TYPES))
        raise Refused(f"{path}: model_type={kind!r} computes another function; known: {known}")
    activation = tree.get("hidden_act", "gelu")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise Refused(
            f"{path}: hidden_act={activation!r} is not known here; known: {', '.join(_ACTIVATIONS)}"
        )
    eps = tree.get("layer_norm_eps", 1e-12)  # transformers' own
    if type(eps) not in (int, float) or not 0 < eps < 1:
        raise Refused(f"{path}: layer_norm_eps={eps!r} is not a small number above 0")
    names = {"num_attention_heads": "num_heads", "decoder_num_attention_heads": "decoder_heads"}
    heads = {ours: _whole(path, theirs, tree) for theirs, ours in names.items() if theirs in tree}
    pretraining = {key: tree[key] for key in ("mask_ratio", "norm_pix_loss") if key in tree}
    return replace(
        found,
        sizes=found.sizes | heads,
        activation=activation,
        eps=float(eps),
        image_size=_sides(path, tree.get("image_size")),
        pretraining=found.pretraining | pretraining,
        files=(*found.files, path.name),
    )


def _sides(path: Path, size: Any) -> tuple[int, int] | None:
    """Height and width of images, as their processors write them, too. Raises Refused."""
    if size is None:
        return None
    if isinstance(size, Mapping):
        size = [size.get("height"), size.get("width")]
    sides = list(size) if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(
        type(each) is int and 0 < each <= _LARGEST_SIDE for each in sides
    ):
        raise Refused(f"{path}: image_size={size!r:.80} must be one side or two, in whole pixels")
    return sides[0], sides[1]


def _refuse_others(path: Path, tree: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Raise Refused where a configuration of the same width is another network's all the same."""
    problems = [
        f"{key}={tree[key]!r:.80}, the weights have {sizes[ours]}"
        for key, ours in _SHAPES.items()
        if key in tree and ours in sizes and tree[key] not in (sizes[ours], [sizes[ours]] * 2)
    ]
    if tree.get("qkv_bias") is False and sizes.get("qkv_bias"):
        problems.append("qkv_bias=False, the weights have biases of queries, keys and values")
    if problems:
        raise Refused(
            f"{path}: {'; '.join(problems)}: it is the configuration of another network; put the "
            "right one beside the weights, or none"
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
    args, cfg = (tree.get(key) or {} for key in ("model_args", "pretrained_cfg"))
    for key, value in (("model_args", args), ("pretrained_cfg", cfg)):
        if not isinstance(value, Mapping):
            raise Refused(f"{path}: {key}={value!r:.80} must be an object, or left out")
    strange = sorted(args.keys() - _TIMM_SHAPES)
    if strange or "quickgelu" in name:
        told = f"architecture={name!r}" if not strange else f"model_args.{strange[0]}"
        raise Refused(f"{path}: {told} may compute another function than is known here")
    sizes = _of_name(name)
    if args.get("num_heads") is not None:
        sizes["num_heads"] = _whole(path, "num_heads", args)
    mean, std = pair(path, cfg, "mean", "std")
    return replace(
        found, sizes=found.sizes | sizes, mean=mean, std=std, files=(*found.files, path.name)
    )


def _statistics(
    path: Path, tree: Mapping[str, Any]
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and deviation of pixels from 0 to 1 that a preprocessor means. Raises Refused."""
    mean, std = pair(path, tree, "image_mean", "image_std")
    if tree.get("do_normalize") is False:
        mean, std = (0.0,) * len(mean or (0,)), (1.0,) * len(mean or (0,))
    if mean is None or std is None:
        return None, None
    # pixels of 0 to 255 are multiplied by it first
    factor = 255.0
    if tree.get("do_rescale", True):
        given = tree.get("rescale_factor", 1 / 255)
        if type(given) not in (int, float) or not 0 < given < 1e9:
            raise Refused(f"{path}: rescale_factor={given!r:.80} must be above 0, such as 1/255")
        factor *= given
    if abs(factor - 1) < 1e-6:
        return mean, std
    return tuple(each / factor for each in mean), tuple(each / factor for each in std)


def pair(
    path: Path, tree: Mapping[str, Any], mean_key: str, std_key: str
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and deviation, both or none. Raises Refused."""
    mean, std = (_numbers(path, key, tree.get(key)) for key in (mean_key, std_key))
    if (mean is None) != (std is None):
        lacking = std_key if std is None else mean_key
        raise Refused(f"{path}: {lacking} is missing beside the other; give both")
    if std is not None and min(std) <= 0:
        raise Refused(f"{path}: {std_key}={list(std)} must be above 0")
    return mean, std


def _numbers(path: Path, key: str, value: Any) -> tuple[float, ...] | None:
    """A list of numbers, or one of them; None where there is none. Raises Refused."""
    if value is None:
        return None
    numbers = value if isinstance(value, list) else [value]
    # an integer of thousands of digits is no float
    if not numbers or not all(
        type(each) in (int, float) and abs(each) < 1e9 and math.isfinite(each) for each in numbers
    ):
        raise Refused(f"{path}: {key}={value!r:.80} must be numbers")
    return tuple(float(each) for each in numbers)
