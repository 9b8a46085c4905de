"""Whole classifiers, encoder and head: from a fine-tuning, a probe or an exported file, and out to
timm and Hugging Face.

A probe's batch norm is folded into its linear layer: in evaluation both are one linear map. Its
encoder is that of `classify.init`, which must still exist."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from rcmae.checkpoint import CheckpointError, Manifest, find_checkpoint
from rcmae.data.sets import names_in
from rcmae.errors import Refused
from rcmae.files import write_aside
from rcmae.models.build import student_sizes
from rcmae.models.fitting import fit_weights
from rcmae.models.kernels import LAYER_NORM_EPS
from rcmae.weights.conversion import hugging_face_processor
from rcmae.weights.encoder import Encoder, dressed, model_of, recipe_of, say
from rcmae.weights.formats import PATH, WeightsFormat, Wrote
from rcmae.weights.layouts import Which
from rcmae.weights.names import family_names, published_names
from rcmae.weights.reading import NetworkWeights, public_metadata, read_network
from rcmae.weights.writing import timm_arguments

_FOLD_EPS = 1e-6  # of a probe's batch norm


class WholeClassifier(Encoder):
    """A classifier with its transform, image size and class names."""

    class_names: tuple[str, ...]  # in the order of the scores; empty if unknown


def load_classifier(
    source: str | Path,
    *,
    network: Which | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> WholeClassifier:
    """A classifier in evaluation mode, on the CPU, in float32: images [B, C, H, W] to scores
    [B, classes]; `class_names` has their names, `transform` makes an input.

    Args:
        source: a run of `rcmae finetune` or `rcmae probe`, a checkpoint of one, or a file of
            weights with a head.
        network: whose weights; None: the average's where there is one.
        image_size: in pixels; None: as it was trained with. Positions are interpolated.

    Local: one process of many may call alone.

    Raises:
        Refused: nothing is there, or it has no head.
        CheckpointError: the checkpoint is damaged.
    """
    found = read_network(Path(source), network)
    say(found)
    if _is_probe(found):
        model = _of_probe(Path(source), found, image_size)
    elif "head.weight" not in found.weights:
        raise Refused(
            f"{source} has no head: it is an encoder; fine-tune it, or give a run of rcmae.finetune"
        )
    else:
        made, _ = model_of(found, image_size=image_size, num_heads=None, head=True)
        model = made
    model.__class__ = WholeClassifier
    assert isinstance(model, WholeClassifier)
    model.class_names = _class_names(found, model.num_classes)
    recipe = json.loads(found.metadata.get("recipe", "{}"))
    model.pretrained_cfg["class_names"] = recipe.get("classify", {}).get("class_names")
    return model


def _is_probe(found: NetworkWeights) -> bool:
    return {"0.running_mean", "1.weight"} <= found.weights.keys()


def _of_probe(
    source: Path, found: NetworkWeights, image_size: int | tuple[int, int] | None
) -> Encoder:
    """A probe's head on its encoder. Raises Refused."""
    manifest, _ = find_checkpoint(source)
    classify = manifest.meta["recipe"]["classify"]
    init = _init_of(found, classify)
    sizes = student_sizes(recipe_of(found).model)
    if image_size is not None:
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size
        sizes = replace(sizes, image_size=sides)
    weight, bias = _folded(found.weights)
    model = Encoder(sizes, num_classes=len(weight), pool=classify["pool"])
    fit_weights(model, published_names(init.weights), init.grid)
    if classify["depth"] is not None:
        model.blocks = model.blocks[: classify["depth"]]
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.copy_(bias)
    dressed(model, found, sizes.image_size)
    return model.eval()


def _init_of(found: NetworkWeights, classify: Mapping[str, Any]) -> NetworkWeights:
    """The encoder that a probe stands on. Raises Refused."""
    init = classify["init"]
    if init is None:
        raise Refused(f"{found.about}: its recipe names no classify.init, the probe's encoder")
    try:
        return read_network(Path(init), classify.get("network"))
    except (Refused, CheckpointError, OSError) as error:
        raise Refused(
            f"{found.about}: a probe is a head on the encoder of classify.init={init}, which "
            f"cannot be read: {error}"
        ) from error


def _folded(weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Weight and bias of the linear layer that a batch norm and one after it are."""
    scale = (weights["0.running_var"].double() + _FOLD_EPS).rsqrt()
    weight = weights["1.weight"].double() * scale
    bias = weights["1.bias"].double() - weight @ weights["0.running_mean"].double()
    return weight.float(), bias.float()


def _class_names(found: NetworkWeights, count: int) -> tuple[str, ...]:
    """The names of the classes: the file's own, or those of the recipe's file where it is there."""
    if "class_names" in found.metadata:
        try:
            names = tuple(json.loads(found.metadata["class_names"]))
        except (ValueError, TypeError, RecursionError):
            names = (None,)
        if not all(isinstance(each, str) for each in names):
            raise Refused(f"{found.about}: its class_names are no list of texts; write it anew")
        return names if len(names) == count else ()
    where = json.loads(found.metadata.get("recipe", "{}")).get("classify", {}).get("class_names")
    try:
        names = names_in(where) if where else ()
    except Refused:
        return ()
    return names if len(names) == count else ()


# ---------------------------------------------------------------------------------------- to others


class _Source(NamedTuple):
    """A checkpoint's classifier, to be written."""

    model: WholeClassifier
    network: str
    metadata: dict[str, str]


def _source(manifest: Manifest, network: Which | None) -> _Source:
    found = read_network(manifest.path, network)
    model = load_classifier(manifest.path, network=network)
    metadata = public_metadata(found.metadata) | {"class_names": json.dumps(model.class_names)}
    return _Source(model, found.metadata["network"], metadata)


def _write_timm(manifest: Manifest, network: Which | None, out: Path) -> Wrote:
    source = _source(manifest, network)
    model = source.model
    if model.class_tokens > 1 and model.global_pool == "token":
        raise Refused(
            f"{manifest.path}: timm's model pools one class token, this one the mean of "
            f"{model.class_tokens}; read it by load_classifier, or export its encoder (--encoder)"
        )
    named = family_names(model.state_dict(), "timm")
    state = {name: value.contiguous() for name, value in named.items()}
    if out.suffix == ".safetensors":
        save_file(state, out, source.metadata)
    else:
        torch.save(state, out)
    call = ", ".join(timm_arguments(manifest, timm_head(model, manifest)))
    return Wrote(source.network, len(state), f"timm.create_model({call}, checkpoint_path={PATH})")


def timm_head(model: WholeClassifier, manifest: Manifest) -> dict[str, Any]:
    """What of a classifier timm's create_model is told besides the sizes of its encoder."""
    head: dict[str, Any] = {"num_classes": model.num_classes, "global_pool": model.global_pool}
    head["fc_norm"] = isinstance(model.fc_norm, torch.nn.LayerNorm)
    if model.num_prefix_tokens > 1:
        head["reg_tokens"] = model.num_prefix_tokens - 1
    if manifest.meta["recipe"]["classify"].get("depth") is not None:
        head["depth"] = len(model.blocks)
    return head


def _write_hugging_face(manifest: Manifest, network: Which | None, out: Path) -> Wrote:
    """ViTForImageClassification reads the class token, BeitForImageClassification the mean of the
    patches, normalised: MAE's pooling.
    """
    source = _source(manifest, network)
    model = source.model
    token = model.global_pool == "token"
    if model.num_prefix_tokens > 1:
        raise Refused(
            f"{manifest.path}: Hugging Face's classifiers have one class token and no registers; "
            "use --format timm"
        )
    if not model.has_class_token or not (token or isinstance(model.fc_norm, torch.nn.LayerNorm)):
        raise Refused(
            f"{manifest.path}: its pooling is none of Hugging Face's classifiers; use --format timm"
        )
    height, width = model.image_size
    if height != width:
        raise Refused(
            f"Hugging Face's classifiers have square images, this one {height}x{width}; use "
            "--format timm"
        )
    architecture = "ViTForImageClassification" if token else "BeitForImageClassification"
    state = _hugging_face_names(model.state_dict(), "vit" if token else "beit")
    config = _hugging_face_config(model, architecture)
    out.mkdir()
    write_aside(out / "config.json", json.dumps(config, indent=1))
    save_file(state, out / "model.safetensors", source.metadata | {"format": "pt"})
    processor = hugging_face_processor(height, model.mean, model.std)
    write_aside(out / "preprocessor_config.json", json.dumps(processor, indent=1))
    use = f"transformers.{architecture}.from_pretrained({PATH})"
    return Wrote(source.network, len(state), use)


def _hugging_face_config(model: WholeClassifier, architecture: str) -> dict[str, Any]:
    names = model.class_names or [f"LABEL_{number}" for number in range(model.num_classes)]
    block = model.blocks[0]
    config = {
        "architectures": [architecture],
        "model_type": "vit",
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "image_size": model.image_size[0],
        "patch_size": model.patch_embed.patch_size[0],
        "num_channels": model.in_chans,
        "qkv_bias": True,
        "layer_norm_eps": LAYER_NORM_EPS,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
    if architecture.startswith("Beit"):
        config |= {
            "model_type": "beit",
            "use_mean_pooling": True,
            "use_mask_token": False,
            "use_absolute_position_embeddings": True,
            "use_relative_position_bias": False,
            "use_shared_relative_position_bias": False,
            "layer_scale_init_value": 0.0,
            "drop_path_rate": 0.0,
        }
    return config


def _hugging_face_names(state: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """Weights of a classifier by the names of transformers' ViT or BEiT, whose keys have no bias:
    softmax does not see it.
    """
    outside = {
        "cls_token": f"{family}.embeddings.cls_token",
        "pos_embed": f"{family}.embeddings.position_embeddings",
        "patch_embed.proj": f"{family}.embeddings.patch_embeddings.projection",
        "norm": f"{family}.layernorm",
        "fc_norm": f"{family}.pooler.layernorm",
        "head": "classifier",
    }
    inside = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        place, _, last = name.rpartition(".")
        if name in outside:
            found[outside[name]] = value
        elif place in outside:
            found[f"{outside[place]}.{last}"] = value
        else:
            _, number, rest = place.split(".", 2)
            block = f"{family}.encoder.layer.{number}"
            if rest != "attn.qkv":
                found[f"{block}.{inside[rest]}.{last}"] = value
                continue
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                if family == "beit" and (part, last) == ("key", "bias"):
                    continue
                found[f"{block}.attention.attention.{part}.{last}"] = piece
    return {name: value.contiguous() for name, value in found.items()}


FORMATS: dict[str, WeightsFormat] = {
    "timm": WeightsFormat(
        "the classifier with its head, as timm's vit_* models name it",
        (".safetensors", ".pth"),
        _write_timm,
    ),
    "hf": WeightsFormat(
        "a folder for Hugging Face with id2label: ViTForImageClassification, or "
        "BeitForImageClassification where patches are pooled",
        (),
        _write_hugging_face,
    ),
}
