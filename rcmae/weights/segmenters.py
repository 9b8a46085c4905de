"""Segmenters out of a run or a published file, and into files of others: mmsegmentation's, Hugging
Face's UPerNet.

A probe's encoder is that of `segment.init`, which must still exist."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from rcmae.checkpoint import CheckpointError, Manifest, find_checkpoint
from rcmae.config import Recipe
from rcmae.data.sets import names_in
from rcmae.errors import Refused
from rcmae.files import write_aside
from rcmae.models.kernels import LAYER_NORM_EPS
from rcmae.models.segmentation.attention import relative_bias
from rcmae.models.segmentation.build import new_segmenter
from rcmae.models.segmentation.fitting import HEADS, INDEX, fit_encoder, split_bias
from rcmae.models.segmentation.heads import AUXILIARY_WIDTH, POOL_SCALES
from rcmae.models.segmentation.segmenter import Segmenter
from rcmae.weights.conversion import hugging_face_processor
from rcmae.weights.encoder import recipe_of
from rcmae.weights.formats import PATH, WeightsFormat, Wrote
from rcmae.weights.layouts import TORCH, Which
from rcmae.weights.names import published_names
from rcmae.weights.reading import (
    COUNTED,
    NetworkWeights,
    is_dense,
    opened,
    public_metadata,
    read_network,
    refuse_not_finite,
)

# ours -> Hugging Face's, inside a block and in the heads
_BLOCK = {
    "gamma_1": "lambda_1",
    "gamma_2": "lambda_2",
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "attn.relative_position_bias_table": (
        "attention.attention.relative_position_bias.relative_position_bias_table"
    ),
    "attn.proj.": "attention.output.dense.",
    "attn.q_bias": "attention.attention.query.bias",
    "attn.v_bias": "attention.attention.value.bias",
    "mlp.fc1.": "intermediate.dense.",
    "mlp.fc2.": "output.dense.",
}
_EMBEDDING = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
}

_PROCESSOR = "SegformerImageProcessor"  # which makes maps of logits, too

# mmsegmentation 1.x -> ours, by what a name begins with; outside, and inside of a block
_MMSEG = {
    "backbone.patch_embed.projection.": "backbone.patch_embed.proj.",
    "backbone.ln1.": "backbone.norm.",
    "neck.upsample_4x.": "backbone.fpn1.",
    "neck.upsample_2x.": "backbone.fpn2.",
}
_MMSEG_BLOCK = {
    "ln1.": "norm1.",
    "ln2.": "norm2.",
    "ffn.layers.0.0.": "mlp.fc1.",
    "ffn.layers.1.": "mlp.fc2.",
}


class Trained(NamedTuple):
    """A segmenter and what is known of it."""

    model: Segmenter  # in evaluation mode, on the CPU, in float32
    recipe: Recipe
    class_names: tuple[str, ...]  # empty where nothing tells them
    source: NetworkWeights


def read_segmenter(source: Path, network: Which | None = None) -> Trained:
    """The segmenter of a run of `rcmae segment`, or of a checkpoint of one. Local.

    Args:
        source: its folder.
        network: whose weights; None: the average's where there is one.

    Raises:
        Refused: there is none, or a probe's encoder is gone.
        CheckpointError: the checkpoint is damaged.
    """
    found = read_network(source, network)
    recipe = recipe_of(found) if "recipe" in found.metadata else None
    if recipe is None or recipe.task.name != "segment" or recipe.segment.num_classes is None:
        raise Refused(f"{source} is no segmenter: give a run of rcmae segment, or a checkpoint")
    model = new_segmenter(recipe, recipe.segment.num_classes)
    state = dict(found.weights)
    if recipe.segment.frozen:
        encoder = _encoder_of(source, found)
        fit_encoder(model, encoder.weights, encoder.grid)
        state = model.state_dict() | state
    counters = {name: value for name, value in model.state_dict().items() if name not in state}
    try:
        model.load_state_dict(counters | state)
    except RuntimeError as error:
        raise Refused(f"{found.about} does not fit its own recipe: {error}") from error
    return Trained(model.eval(), recipe, _names_of(recipe), found)


def _encoder_of(source: Path, found: NetworkWeights) -> NetworkWeights:
    """The encoder that a probe stands on. Raises Refused."""
    manifest, _ = find_checkpoint(source)
    segment = manifest.meta["recipe"]["segment"]
    init = segment["init"]
    try:
        return read_network(Path(str(init)), segment["network"])
    except (Refused, CheckpointError, OSError) as error:
        raise Refused(
            f"{found.about}: a probe is a head on the encoder of segment.init={init}, which cannot "
            f"be read: {error}"
        ) from error


def _names_of(recipe: Recipe) -> tuple[str, ...]:
    """Names of the classes, where the file of the recipe is there and has as many."""
    where = recipe.segment.class_names
    try:
        names = names_in(where) if where else ()
    except Refused:
        return ()
    return names if len(names) == recipe.segment.num_classes else ()


# -------------------------------------------------------------------------------------- from others


def read_start(
    path: Path, network: Which | None = None, *, first: Which = "teacher"
) -> NetworkWeights:
    """What a segmentation starts from: a whole segmenter's file, by the published names or by those
    of mmsegmentation 1.x, or whatever `read_network` takes. Local; nothing in it is run.

    Raises:
        Refused: it cannot be read.
        CheckpointError: the checkpoint is damaged.
    """
    whole = _whole_segmenter(opened(path)) if path.is_file() and path.suffix in TORCH else None
    if whole is None:
        return read_network(path, network, first=first)
    weights = {name: value for name, value in whole.items() if not name.endswith(COUNTED)}
    strange = [name for name, value in weights.items() if not is_dense(value)]
    if strange:
        raise Refused(
            f"{path} has entries that are not dense tensors of floats, such as {strange[0]}; give "
            "a file of weights by name"
        )
    weights = {name: value.float() for name, value in weights.items()}
    refuse_not_finite(str(path), weights)
    about = f"segmenter of {path} ({len(weights)} tensors)"
    return NetworkWeights(weights=weights, grid=None, sizes={}, about=about, metadata={})


def _whole_segmenter(document: Any) -> dict[str, Any] | None:
    """A segmenter's weights in what a file holds, by the published names; None: it has none."""
    table = document
    for key in ("state_dict", "model"):
        if isinstance(table, Mapping) and isinstance(table.get(key), Mapping):
            table = table[key]
    if not isinstance(table, Mapping) or not any(str(name).startswith(HEADS) for name in table):
        return None
    names = {str(name).removeprefix("module."): value for name, value in table.items()}
    if not any(name.startswith("backbone.") for name in names):
        return None  # a probe's head alone
    if any(name.startswith("backbone.layers.") for name in names):
        names = {_of_mmsegmentation(name): value for name, value in names.items()}
    return published_names(names)


def _of_mmsegmentation(name: str) -> str:
    """Ours for a name of mmsegmentation 1.x."""
    layer = re.fullmatch(r"backbone\.layers\.(\d+)\.(.+)", name)
    if layer is None:
        return _renamed(name, _MMSEG)
    return f"backbone.blocks.{layer[1]}.{_renamed(layer[2], _MMSEG_BLOCK)}"


# ---------------------------------------------------------------------------------------- to others


def _write_mmseg(manifest: Manifest, network: Which | None, out: Path) -> Wrote:
    trained = _of_upernet(manifest, network)
    state = {name: value.contiguous() for name, value in trained.model.state_dict().items()}
    grid = trained.model.backbone.grid
    for name, table in list(state.items()):
        if name.endswith("relative_position_bias_table"):
            rows = torch.arange(len(table), dtype=torch.float64)[:, None]
            index = relative_bias(rows, grid)[0].long()
            state[name.removesuffix(".relative_position_bias_table") + INDEX] = index
    meta = {"CLASSES": trained.class_names, "written_by": "rcmae"}
    torch.save({"meta": meta, "state_dict": state}, out)
    use = f"torch.load({PATH}, weights_only=True)['state_dict']  # of mmsegmentation 0.x's network"
    return Wrote(trained.source.metadata["network"], len(state), use)


def _write_hf_upernet(manifest: Manifest, network: Which | None, out: Path) -> Wrote:
    trained = _of_upernet(manifest, network)
    state = hugging_face_names(trained.model.state_dict())
    out.mkdir()
    write_aside(out / "config.json", json.dumps(_hugging_face_config(trained), indent=1))
    if trained.model.backbone.sizes.in_channels == 3:
        data, side = trained.recipe.data, trained.model.backbone.sizes.image_size[0]
        processor = hugging_face_processor(side, data.mean, data.std, _PROCESSOR)
        write_aside(out / "preprocessor_config.json", json.dumps(processor, indent=1))
    metadata = public_metadata(trained.source.metadata) | {"format": "pt"}
    save_file(state, out / "model.safetensors", metadata)
    use = f"transformers.UperNetForSemanticSegmentation.from_pretrained({PATH})"
    return Wrote(trained.source.metadata["network"], len(state), use)


def _of_upernet(manifest: Manifest, network: Which | None) -> Trained:
    trained = read_segmenter(manifest.path, network)
    if trained.recipe.segment.head != "uper":
        raise Refused(
            f"{manifest.path}: a linear head is in no other code, so there is no such format; "
            "rcmae.load_segmenter reads the run"
        )
    if trained.model.backbone.class_tokens > 1:
        raise Refused(
            f"{manifest.path}: its {trained.model.backbone.class_tokens} class tokens are in no "
            "other code, so there is no such format; rcmae.load_segmenter reads the run"
        )
    return trained


def hugging_face_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of UPerNet by the names that transformers writes. A bias of keys is left out: softmax
    does not see it.
    """
    found: dict[str, Tensor] = {}
    for name, value in split_bias(state).items():
        block = re.match(r"backbone\.blocks\.(\d+)\.(.*)", name)
        if block is None:
            found[_outside(name)] = value.contiguous()
            continue
        place = f"backbone.encoder.layer.{block[1]}."
        if block[2] == "attn.qkv.weight":
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[f"{place}attention.attention.{part}.weight"] = piece.contiguous()
            continue
        found[place + _renamed(block[2], _BLOCK)] = value.contiguous()
    return found


def _outside(name: str) -> str:
    """The name of a weight that is in no block."""
    part, _, rest = name.partition(".")
    if part == "backbone":
        return f"backbone.{_renamed(rest, _EMBEDDING)}"
    return name.replace("conv_seg.", "classifier.").replace(".bn.", ".batch_norm.")


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for ours, theirs in table.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _hugging_face_config(trained: Trained) -> dict[str, Any]:
    """The config.json of UPerNet on a BEiT backbone. Raises Refused."""
    model, options = trained.model, trained.recipe.segment
    sizes = model.backbone.sizes
    height, width = sizes.image_size
    if height != width or not options.relative_positions or not options.layer_scale:
        raise Refused(
            "Hugging Face's BEiT has square images, relative positions and layer scale; use "
            "--format mmseg"
        )
    names = trained.class_names or [f"LABEL_{index}" for index in range(options.num_classes or 0)]
    backbone = {
        "model_type": "beit",
        "hidden_size": sizes.embed_dim,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.num_heads,
        "intermediate_size": int(sizes.embed_dim * sizes.mlp_ratio),
        "image_size": height,
        "patch_size": sizes.patch_size,
        "num_channels": sizes.in_channels,
        "layer_norm_eps": LAYER_NORM_EPS,
        "use_absolute_position_embeddings": True,
        "use_relative_position_bias": True,
        "layer_scale_init_value": 1.0,
        "drop_path_rate": options.drop_path,
        "add_fpn": True,
        "reshape_hidden_states": True,
        "out_indices": [level + 1 for level in model.backbone.levels],
        "out_features": [f"stage{level + 1}" for level in model.backbone.levels],
    }
    return {
        "architectures": ["UperNetForSemanticSegmentation"],
        "model_type": "upernet",
        "backbone_config": backbone,
        "hidden_size": options.width or sizes.embed_dim,
        "pool_scales": list(POOL_SCALES),
        "use_auxiliary_head": hasattr(model, "auxiliary_head"),
        "auxiliary_in_channels": sizes.embed_dim,
        "auxiliary_channels": AUXILIARY_WIDTH,
        "auxiliary_loss_weight": options.aux_weight,
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }


SEGMENTER_FORMATS: Mapping[str, WeightsFormat] = MappingProxyType(
    {
        "mmseg": WeightsFormat(
            "mmsegmentation 0.x: encoder, pyramid and heads under 'state_dict'",
            (".pth",),
            _write_mmseg,
        ),
        "hf-upernet": WeightsFormat(
            "a folder for Hugging Face's UperNetForSemanticSegmentation", (), _write_hf_upernet
        ),
    }
)
