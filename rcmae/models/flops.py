"""Floating-point operations of one image's forward pass: matrix products alone, a multiply-add
counted as 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rcmae.models.build import Network


def flops_per_image(
    *,
    image_size: tuple[int, int],
    patch_size: int,
    in_channels: int,
    embed_dim: int,
    depth: int,
    num_heads: int,
    decoder_dim: int,
    decoder_depth: int,
    decoder_heads: int,
    mlp_ratio: float = 4.0,
    num_visible: int,
    hidden_only: bool = True,
) -> float:
    """Floating-point operations of one image's forward pass: matrix products alone, a multiply-add
    counted as 2.

    A step is 3 times that (the backward pass has twice as many), 4 times with a teacher (RC-MAE).

    Args:
        image_size: as the other sizes, those of `MaskedAutoencoder`; numbers of heads do not
            matter.
        num_visible: patches that the encoder sees.
        hidden_only: the training path of this package. Otherwise what the published code computes,
            the figure to compare models by: every patch embedded, every token through the last
            block and predicted.
    """
    patches = (image_size[0] // patch_size) * (image_size[1] // patch_size)
    pixels = patch_size**2 * in_channels
    visible = 1 + num_visible
    tokens = 1 + patches
    predicted = patches - num_visible if hidden_only else tokens

    def block(width: int, keys: int, queries: int) -> float:
        return block_flops(width, keys, queries, mlp_ratio)

    embed = 2 * pixels * embed_dim * (num_visible if hidden_only else patches)
    encoder = embed + depth * block(embed_dim, visible, visible)
    decoder = 2 * embed_dim * decoder_dim * visible + (decoder_depth - 1) * block(
        decoder_dim, tokens, tokens
    )
    head = 2 * decoder_dim * pixels * predicted
    return encoder + decoder + block(decoder_dim, tokens, predicted) + head


def block_flops(width: int, keys: int, queries: int, mlp_ratio: float) -> float:
    """Floating-point operations of a block for one image, of `keys` tokens that answers for
    `queries` of them.
    """
    projections = 6 * width**2 * keys + 2 * width**2 * queries  # qkv of all, output of those asked
    return projections + 4 * queries * keys * width + 4 * mlp_ratio * width**2 * queries


def classifier_flops(
    *,
    image_size: tuple[int, int],
    patch_size: int,
    in_channels: int,
    embed_dim: int,
    depth: int,
    num_heads: int,
) -> float:
    """Floating-point operations of one image's forward pass without the head, as
    `flops_per_image` counts them.
    """
    patches = (image_size[0] // patch_size) * (image_size[1] // patch_size)
    tokens = 1 + patches
    block = 24 * embed_dim**2 * tokens + 4 * tokens**2 * embed_dim
    return 2.0 * patch_size**2 * in_channels * embed_dim * patches + depth * block


def step_flops(student: Network, teacher_outputs: tuple[str, ...], num_visible: int) -> float:
    """Floating-point operations of a step for one image: the student's forward pass three times,
    as a backward pass is two, and the teacher's once for what it is asked.
    """
    total = 3 * student.flops(num_visible)
    if "pixels" in teacher_outputs:
        total += student.flops(num_visible)
    if "tokens" in teacher_outputs:
        total += student.encoder_flops(student.num_patches)
    return total
