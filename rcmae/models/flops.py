"""Floating-point operations of one image's forward pass: matrix products alone, a multiply-add
counted as 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rcmae.models.sizes import NetworkSizes


def flops_per_image(
    sizes: NetworkSizes,
    *,
    num_visible: int,
    hidden_only: bool = True,
    decoder_prefix: int | None = None,
) -> float:
    """Floating-point operations of one image's forward pass: matrix products alone, a multiply-add
    counted as 2.

    A step is 3 times that (the backward pass has twice as many), 4 times with a teacher (RC-MAE).

    Args:
        sizes: those of `MaskedAutoencoder`; numbers of heads do not matter.
        num_visible: patches that the encoder sees.
        hidden_only: the training path of this package. Otherwise what the published code computes,
            the figure to compare models by: every patch embedded, every token through the last
            block and predicted.
        decoder_prefix: class tokens that the decoder gets; None: all.
    """
    patches = sizes.num_patches
    pixels = sizes.patch_pixels
    width = sizes.decoder_dim
    prefix = sizes.class_tokens if decoder_prefix is None else decoder_prefix
    visible = sizes.num_prefix + num_visible
    bridged = prefix + num_visible
    tokens = prefix + patches
    predicted = patches - num_visible if hidden_only else tokens
    embedded = num_visible if hidden_only else patches

    encoder: float = 2 * pixels * sizes.embed_dim * embedded
    encoder += sizes.depth * block_flops(sizes.embed_dim, visible, visible, sizes.mlp_ratio)
    blocks = (sizes.decoder_depth - 1) * block_flops(width, tokens, tokens, sizes.mlp_ratio)
    decoder = 2 * sizes.embed_dim * width * bridged + blocks
    last = block_flops(width, tokens, predicted, sizes.mlp_ratio)
    return encoder + decoder + last + 2 * width * pixels * predicted


def block_flops(width: int, keys: int, queries: int, mlp_ratio: float) -> float:
    """Floating-point operations of a block for one image, of `keys` tokens that answers for
    `queries` of them.
    """
    projections = 6 * width**2 * keys + 2 * width**2 * queries  # qkv of all, output of those asked
    return projections + 4 * queries * keys * width + 4 * mlp_ratio * width**2 * queries


def classifier_flops(sizes: NetworkSizes) -> float:
    """Floating-point operations of one image's forward pass without the head, as
    `flops_per_image` counts them.
    """
    tokens = sizes.num_prefix + sizes.num_patches
    block = 24 * sizes.embed_dim**2 * tokens + 4 * tokens**2 * sizes.embed_dim
    embedding = 2.0 * sizes.patch_pixels * sizes.embed_dim * sizes.num_patches
    return embedding + sizes.depth * block
