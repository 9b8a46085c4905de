"""Trained encoders for other code: a timm model from a run, a checkpoint or a file of any family,
in one call.

    model = rcmae.load_encoder("runs/rcmae_vit_b_16")
        # or a .pth, .safetensors, a checkpoint's folder
    tokens = model.forward_features(images)
        # [B, 1 + L, D], normalised, class token first if any
    vector = model(images)
        # [B, D], the mean of the patches
    maps = model.get_intermediate_layers(images, n=4, reshape=True)

Images are normalised as in the pretraining: `model.transform` makes an input of a PIL image or a
tensor, and `model.mean`, `model.std`, `model.image_size` have the numbers; timm finds them in
`model.pretrained_cfg`. A guess or a choice is a `WeightsWarning`. Weights are fitted
by name and shape; nothing in a file is run.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch
from PIL import Image
from torch import Tensor, nn

from rcmae.config import Recipe, stored
from rcmae.data.transforms import CentreTransform
from rcmae.errors import Refused
from rcmae.models.build import Network, new_network
from rcmae.models.classifier import Classifier
from rcmae.models.fitting import Fit, fit_weights
from rcmae.models.patches import is_sincos
from rcmae.models.sizes import ARCHITECTURES, NetworkSizes
from rcmae.models.vit import MaskedAutoencoder, PositionTable
from rcmae.weights.beside import apply_to
from rcmae.weights.layouts import Which
from rcmae.weights.names import family_names, of_autoencoder, published_names
from rcmae.weights.reading import NetworkWeights, read_network
from rcmae.weights.shapes import sizes_of, whole_network

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# of the architectures that the field shares, by width
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1536: 24, 3072: 32}
DECODER_HEADS = {512: 16, 256: 8}


class WeightsWarning(UserWarning):
    """Something that a file of weights does not say was guessed or chosen."""


class Encoder(Classifier):
    """timm's model with the transform, statistics and size of its images."""

    mean: tuple[float, ...]  # of each channel, pixels from 0 to 1
    std: tuple[float, ...]
    image_size: tuple[int, int]  # (height, width) in pixels
    transform: ToInput
    about: str  # which network it is, and where it was read

    def forward_features(self, images: Tensor, *args: Any, **named: Any) -> Tensor:
        """Tokens [B, 1 + L, D]. Raises Refused: images of another size or layout."""
        self._refuse(images)
        tokens: Tensor = super().forward_features(images, *args, **named)
        return tokens

    def forward_intermediates(self, x: Tensor, *args: Any, **named: Any) -> Any:
        """As timm's. Raises Refused: images of another size or layout."""
        self._refuse(x)
        return super().forward_intermediates(x, *args, **named)

    def _refuse(self, images: Tensor) -> None:
        if torch.compiler.is_compiling():
            return  # exported or compiled for what it was given
        wanted = (self.in_chans, *self.image_size)
        if images.ndim == 4 and tuple(images.shape[1:]) == wanted:
            return
        raise Refused(
            f"images are [B, {', '.join(map(str, wanted))}], got {list(images.shape)}: make them "
            "by model.transform (with [None] for one alone), or load a model for that size: "
            "load_encoder(..., image_size=(height, width))"
        )


@dataclass(frozen=True)
class ToInput:
    """Turns an image into an input [C, H, W]: resized, centre-cropped, normalised."""

    image_size: tuple[int, int]  # (height, width) in pixels
    mean: tuple[float, ...]  # of each channel, pixels from 0 to 1
    std: tuple[float, ...]

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """[C, height, width] float32 of a PIL image, or of a tensor [C, h, w] or [B, C, h, w] with
        pixels of uint8, or of floats from 0 to 1.

        Raises:
            Refused: it is neither, or has another number of channels.
        """
        if isinstance(image, Tensor):
            if image.ndim == 4:
                return torch.stack([self(each) for each in image])
            pixels = image
        else:
            mode = "L" if len(self.mean) == 1 else "RGB"
            if not isinstance(image, Image.Image) or len(self.mean) not in (1, 3):
                raise Refused(
                    f"a {type(image).__name__} is not an image of {len(self.mean)} channels; "
                    "give a "
                    "PIL image (of 1 or 3), or a tensor [C, h, w]"
                )
            rows = np.asarray(image.convert(mode))
            pixels = torch.from_numpy(rows.copy()).view(*rows.shape[:2], -1).permute(2, 0, 1)
        if pixels.ndim != 3 or len(pixels) != len(self.mean):
            raise Refused(
                f"a tensor of shape {list(pixels.shape)} is not an image of {len(self.mean)} "
                "channels: "
                "give [C, h, w] or [B, C, h, w]"
            )
        if pixels.is_floating_point():
            pixels = (pixels * 255).round().clamp(0, 255)
        bytes_ = pixels.to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
        centre, _ = CentreTransform(self.image_size, len(self.mean)).of(bytes_)
        mean, std = (torch.tensor(each)[:, None, None] for each in (self.mean, self.std))
        return (centre.float() / 255 - mean) / std


def say(source: NetworkWeights) -> None:
    """Warn of what was chosen where weights leave a choice."""
    for note in source.notes:
        warnings.warn(note, WeightsWarning, stacklevel=3)


def load_encoder(
    source: str | Path,
    *,
    network: Which | None = None,
    image_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    pool: str = "mean",
) -> Encoder:
    """An encoder in evaluation mode, on the CPU, in float32.

    Args:
        source: a run's or a checkpoint's folder, or a file of weights of any family.
        network: whose weights; None: the teacher's where there is one.
        image_size: in pixels, one side or (height, width), a multiple of the patch; None: as it was
            trained with. The position table is interpolated. Files with a learned table, that is
            not of a square, and nothing beside it need the one they were trained with.
        num_heads: the number of heads, for an architecture whose file does not tell it.
        pool: what calling the model gives: "mean" of the normalised patch tokens, or "cls".

    Local: one process of many may call alone.

    Raises:
        Refused: there is no such thing, or its weights are not those of an encoder; everything
            at once.
        CheckpointError: the checkpoint is damaged.
    """
    if pool not in ("mean", "cls"):
        raise Refused(f"pool={pool!r} is unknown; use mean or cls")
    found = read_network(Path(source), network)
    say(found)
    model, _ = model_of(found, image_size=image_size, num_heads=num_heads, head=False)
    if pool == "cls" and not model.has_class_token:
        raise Refused(f"{source} has no class token to pool; use pool='mean'")
    if pool == "mean":
        model.global_pool = "avg"
    return model


def load_autoencoder(
    source: str | Path,
    *,
    network: Which | None = None,
    num_heads: int | None = None,
    decoder_heads: int | None = None,
) -> tuple[Network, NetworkWeights]:
    """A whole network in evaluation mode, that of its recipe where there is one, and what is known
    of it. Local.

    Args:
        source: as `load_encoder`.
        network: whose weights.
        num_heads: the number of heads, for an architecture whose file does not tell it.
        decoder_heads: alike.

    Raises:
        Refused: there is none, it has no decoder, or the numbers of heads are not known.
        CheckpointError: the checkpoint is damaged.
    """
    found = read_network(Path(source), network)
    if not found.weights.keys() & {"decoder_pred.weight", "lm_head.weight", "lm_head.proj.weight"}:
        raise Refused(
            f"{found.about} has no decoder, so it cannot reconstruct; give a whole network"
        )
    if "recipe" in found.metadata:
        model = _of_recipe(recipe_of(found), found)
    else:
        model = _of_shapes(found, num_heads, decoder_heads)
    return model.eval(), found


def recipe_of(source: NetworkWeights) -> Recipe:
    """The recipe in the metadata of weights. Raises Refused: it is none that this rcmae knows."""
    try:
        return stored(json.loads(source.metadata["recipe"]), imports=False)
    except (json.JSONDecodeError, pydantic.ValidationError) as error:
        raise Refused(f"{source.about}: its recipe cannot be read: {error}") from error


def _of_recipe(recipe: Recipe, found: NetworkWeights) -> Network:
    """The network of a recipe with the weights, its heads for classes and features left out.

    Raises Refused.
    """
    model = new_network(recipe, norm="torch")
    model.keep(("pixels",))
    wanted = model.state_dict()
    split = any(name.endswith(".q_bias") for name in wanted)  # a file has them joined
    weights = family_names(found.weights, "bootmae") if split else found.weights
    kept = {name: value for name, value in weights.items() if name in wanted}
    try:
        model.load_state_dict(whole_network(model, kept))
    except Refused as error:
        raise Refused(f"{found.about} {error}") from error
    return model


def _of_shapes(
    found: NetworkWeights, num_heads: int | None, decoder_heads: int | None
) -> MaskedAutoencoder:
    """The network that the shapes describe, with the weights. Raises Refused."""
    weights = {name: found.weights[name] for name in of_autoencoder(found.weights)}
    sizes = sizes_of({name: tuple(value.shape) for name, value in weights.items()})
    grid = grid_of(found, sizes.pop("num_patches"))
    size = (grid[0] * sizes["patch_size"], grid[1] * sizes["patch_size"])
    heads = chosen_heads(found, sizes["embed_dim"], num_heads)
    told = decoder_heads or found.sizes.get("decoder_heads")
    heads_of_decoder = told or DECODER_HEADS.get(sizes["decoder_dim"])
    if heads_of_decoder is None:
        raise Refused(f"{found.about}: its widths do not tell the numbers of heads; give both")
    if told is None:
        warnings.warn(
            f"{found.about}: decoder_heads={heads_of_decoder} is guessed from its width; give "
            "decoder_heads",
            WeightsWarning,
            stacklevel=3,
        )
    decoder_cls = sizes.pop("decoder_cls", True)
    network = NetworkSizes(
        image_size=size, num_heads=heads, decoder_heads=heads_of_decoder, **sizes
    )
    learned = not is_sincos(weights["pos_embed"], grid)
    positions: PositionTable = "learned" if learned else "column_first"
    model = MaskedAutoencoder(network, decoder_cls=decoder_cls, positions=positions)
    model.load_state_dict(whole_network(model, weights))
    apply_to(model, found.beside)
    return model


def model_of(
    source: NetworkWeights,
    *,
    image_size: int | tuple[int, int] | None,
    num_heads: int | None,
    head: bool,
) -> tuple[Encoder, Fit]:
    """A model of the weights' own sizes with them in it, and what matched. Raises Refused."""
    # a run of BootMAE's or MAE-priv's network has a bias for queries and for values
    weights = published_names(source.weights)
    try:
        sizes = sizes_of({name: tuple(value.shape) for name, value in weights.items()})
    except Refused as error:
        raise Refused(f"{source.about}: {error}") from error
    patch = sizes["patch_size"]
    width = sizes["embed_dim"]
    if isinstance(image_size, int):
        image_size = (image_size, image_size)
    asked = image_size and (image_size[0] // patch, image_size[1] // patch)
    grid = grid_of(source, sizes["num_patches"], asked)

    heads = chosen_heads(source, width, num_heads)
    size = image_size or (grid[0] * patch, grid[1] * patch)
    if size[0] % patch or size[1] % patch:
        raise Refused(
            f"image_size={size[0]}x{size[1]} is not a multiple of the patch of {patch} pixels"
        )

    own_norm = "fc_norm.weight" in weights and "norm.weight" not in weights
    model = Encoder(
        NetworkSizes(
            image_size=size,
            patch_size=patch,
            in_channels=sizes["in_channels"],
            embed_dim=width,
            depth=sizes["depth"],
            num_heads=heads,
            mlp_ratio=sizes["mlp_ratio"],
            class_tokens=sizes["class_tokens"],
            registers=sizes["registers"],
        ),
        num_classes=len(weights["head.weight"]) if head else 0,
        pool="mean" if own_norm else "cls",
    )
    try:
        fit = fit_weights(model, weights, grid)
    except Refused as error:
        raise Refused(f"{source.about}: {error}") from error

    apply_to(model, source.beside)
    dressed(model, source, size)
    return model.eval(), fit


def grid_of(
    source: NetworkWeights, patches: int, asked: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Rows and columns of the patches of weights: as something tells, else of a square, else as
    asked for.

    Raises:
        Refused: they are none of these.
    """
    side = round(patches**0.5)
    if source.grid is not None:
        return source.grid
    if side * side == patches:
        return side, side
    if asked is None or asked[0] * asked[1] != patches:
        raise Refused(
            f"{source.about}: its positions are of {patches} patches, which are no square, and "
            "nothing tells rows and columns; give image_size=(height, width), the one it was "
            "trained with"
        )
    return asked


def dressed(model: Encoder, source: NetworkWeights, size: tuple[int, int]) -> None:
    """Attach transform, statistics and size of its images to a model."""
    mean, std = statistics_of(source, model.in_chans)
    model.mean, model.std, model.image_size = mean, std, size
    model.transform = ToInput(size, mean, std)
    model.about = source.about
    # where timm looks for them: timm.data.resolve_model_data_config(model)
    model.pretrained_cfg = {"input_size": (model.in_chans, *size), "mean": mean, "std": std}


def pixels_of(model: Classifier) -> tuple[int, int]:
    """Height and width of the images that a model takes."""
    rows, columns = model.grid
    height, width = model.patch_embed.patch_size
    return rows * height, columns * width


def statistics_of(
    source: NetworkWeights, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, 0 to 1, that images were normalised by: the recipe's,
    else ImageNet's.
    """
    data = json.loads(source.metadata.get("recipe", "{}")).get("data", {})
    told = source.beside
    return statistics(data.get("mean") or told.mean, data.get("std") or told.std, channels)


def statistics(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of so many channels; ImageNet's where none are given."""
    return _each(tuple(mean or IMAGENET_MEAN), channels), _each(
        tuple(std or IMAGENET_STD), channels
    )


def _each(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """A number a channel: where there are more channels than numbers, the last for the rest."""
    return (*values, *values[-1:] * channels)[:channels]


def chosen_heads(source: NetworkWeights, width: int, asked: int | None) -> int:
    """The number of heads of weights: as requested, as configured beside them, else a guess, which
    is reported.

    Raises:
        Refused: their width does not determine it.
    """
    heads = heads_of(source) if asked is None else asked
    guessed = HEADS.get(width)
    if heads is None and guessed is not None:
        warnings.warn(
            f"{source.about}: nothing says how many heads it has; num_heads={guessed} is guessed "
            f"of its width of {width}, and another number is another network: give num_heads",
            WeightsWarning,
            stacklevel=4,
        )
        return guessed
    if heads is not None and (heads < 1 or width % heads):
        by = "as requested" if asked is not None else "by what lies beside the weights"
        raise Refused(
            f"{source.about}: num_heads={heads}, {by}, does not divide its width of {width}; give "
            "num_heads"
        )
    if heads is None:
        raise Refused(
            f"{source.about}: its width of {width} does not tell the number of heads; give "
            "num_heads"
        )
    return heads


def heads_of(source: NetworkWeights) -> int | None:
    """The number of heads that a recipe beside the weights says; None where there is none."""
    told: dict[str, Any] = source.sizes
    named = ARCHITECTURES.get(str(told.get("name")), {})
    return told.get("num_heads") or named.get("num_heads")


class _Tokens(nn.Module):
    """What an ONNX file computes."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.forward_features(images)


def to_onnx(model: Classifier, path: Path) -> None:
    """Write the encoder as ONNX: `images` [B, C, H, W] normalised to `tokens` [B, 1 + L, D], for
    any B.

    The metadata has "mean" and "std", of each channel, 0 to 1, that images are to be normalised by,
    and "input_size", their channels, height and width.

    Raises:
        Refused: onnx and onnxscript are not installed.
    """
    if importlib.util.find_spec("onnxscript") is None:
        # torch's exporter asks for it only when it is under way
        raise Refused("ONNX needs two more packages: pip install onnx onnxscript")
    images = torch.zeros(2, model.in_chans, *pixels_of(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program = torch.onnx.export(
            _Tokens(model).eval(),
            (images,),
            input_names=["images"],
            output_names=["tokens"],
            dynamo=True,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
        assert program is not None
        told = {key: json.dumps(model.pretrained_cfg[key]) for key in ("mean", "std", "input_size")}
        program.model.metadata_props.update(told)
        program.save(path, external_data=False)
