"""MAE-priv: each of its variants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rcmae.models.vit import MaskedAutoencoder
from rcmae.objectives import new
from rcmae.objectives.mae import pixel_targets

from .fixture import EXACT, PRECISIONS, Fixture
from .networks import build, check_grads, gradients, image_size, losses, masked

MAEPRIV_NAMES = (
    ("encoder_to_decoder.", "decoder_embed."),
    ("encoder.", ""),
    ("decoder.blocks.", "decoder_blocks."),
    ("decoder.norm.", "decoder_norm."),
    ("decoder.head.", "decoder_pred."),
)


def maepriv_name(name: str) -> str:
    """What this package calls a parameter of MAE-priv's model."""
    for theirs, ours in MAEPRIV_NAMES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def maepriv_pretrain(fixture: Fixture) -> None:
    """Each variant: masks, encoder's and decoder's output, targets, loss and gradients."""
    config = fixture.config
    height, width = image_size(config)
    num_patches = (height // config["patch_size"]) * (width // config["patch_size"])
    for key in ("embed_dim", "depth", "num_heads"):
        config.setdefault(key, config[f"encoder_{key}"])
    for precision, dtype in PRECISIONS.items():
        limits = fixture.limits(precision)
        inputs = fixture.arrays("inputs.safetensors")
        for case, stated in fixture.value("cases").items():
            raw = fixture.arrays(f"{case}.safetensors")
            state = {maepriv_name(name): array for name, array in raw.items()}
            shared = build_variant(fixture, case, stated, state)
            model = shared.to(dtype)
            noise = (
                inputs["noise"][:1].expand_as(inputs["noise"])
                if stated["batched_shuffle"]
                else inputs["noise"]
            )
            batch = masked(
                fixture, inputs["images"], noise, dtype, num_patches - stated["visible_size"]
            )
            expected = {
                name.partition(".")[2]: array
                for name, array in fixture.arrays("expected.safetensors").items()
                if name.startswith(f"{case}.")
            }
            fixture.close(
                "masks", f"{case} shuffle", batch.ids_shuffle, expected.pop("shuffle"), EXACT
            )
            latent = model.encode(batch.images, batch.ids_shuffle[:, : batch.num_visible])
            everything = torch.arange(num_patches).expand(len(batch), -1)
            target = pixel_targets(
                batch.images,
                everything,
                num_patches,
                norm_pix=stated["normalized_pixel"],
                kind="biased",
            )
            outputs = {
                "encoder_output": latent[:, model.num_prefix :],
                "decoder_output": channels_first(
                    model(batch.images, batch.ids_shuffle, batch.num_visible, ("all_pixels",))[
                        "all_pixels"
                    ]
                ),
                "target": channels_first(target),
            }
            fixture.all_close(f"{case} outputs", outputs, expected, limits.activation, precision)
            objective = new("mae", norm_pix_loss=stated["normalized_pixel"], pixel_norm="biased")
            loss, _ = losses(objective, model, None, batch)
            fixture.close("losses", case, loss, stated["loss"], limits.loss, precision)
            norms = {maepriv_name(name): norm for name, norm in stated["grad_norm"].items()}
            check_grads(
                fixture, case, gradients(model, loss), {**stated, "grad_norm": norms}, precision
            )


def build_variant(
    fixture: Fixture, case: str, stated: Mapping[str, Any], state: dict[str, Tensor]
) -> MaskedAutoencoder:
    """MAE-priv's model by this package's options."""
    return build(
        fixture,
        f"{case}.safetensors",
        torch.float32,
        state,
        class_tokens=int(stated["use_cls_token"]),
        decoder_cls=False,
        qkv_bias="qv",
        positions="row_first",
        pixel_order="chw",
    )


def channels_first(pixels: Tensor) -> Tensor:
    """Patches [B, n, p*p*C] of `patchify`, counted channel by channel."""
    return pixels.unflatten(2, (-1, 3)).transpose(2, 3).flatten(2)
