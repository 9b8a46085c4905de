"""Architectures by name, and which sizes of a network fit together."""

from __future__ import annotations

_DECODER = {"decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16}

# Encoders of ViT (Dosovitskiy et al.; tiny and small of DeiT) with the decoders of MAE and RC-MAE.
ARCHITECTURES: dict[str, dict[str, int]] = {
    "vit_tiny_patch16": {
        "patch_size": 16,
        "embed_dim": 192,
        "depth": 12,
        "num_heads": 3,
        "decoder_dim": 128,
        "decoder_depth": 2,
        "decoder_heads": 4,
    },
    "vit_small_patch16": {
        "patch_size": 16,
        "embed_dim": 384,
        "depth": 12,
        "num_heads": 6,
        "decoder_dim": 256,
        "decoder_depth": 4,
        "decoder_heads": 8,
    },
    "vit_base_patch16": {
        "patch_size": 16,
        "embed_dim": 768,
        "depth": 12,
        "num_heads": 12,
        **_DECODER,
    },
    "vit_large_patch16": {
        "patch_size": 16,
        "embed_dim": 1024,
        "depth": 24,
        "num_heads": 16,
        **_DECODER,
    },
    "vit_huge_patch14": {
        "patch_size": 14,
        "embed_dim": 1280,
        "depth": 32,
        "num_heads": 16,
        **_DECODER,
    },
    # of MAE-priv; its 1.6 billion parameters are those of other people's ViT-G less the wider MLP
    "vit_giant_patch14": {
        "patch_size": 14,
        "embed_dim": 1664,
        "depth": 48,
        "num_heads": 16,
        "decoder_dim": 512,
        "decoder_depth": 8,
        "decoder_heads": 8,
    },
}


def size_problems(
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
    heads_divide: bool = True,
) -> list[str]:
    """What stands against these sizes of a model, one line a problem, with the way out.

    `heads_divide`: whether the decoder's heads must divide its width (BootMAE's need not).
    """
    counts = {
        "image height": image_size[0],
        "image width": image_size[1],
        "patch_size": patch_size,
        "in_channels": in_channels,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "decoder_dim": decoder_dim,
        "decoder_depth": decoder_depth,
        "decoder_heads": decoder_heads,
    }
    if problems := [
        f"{name}={count} must be at least 1" for name, count in counts.items() if count < 1
    ]:
        return problems
    for name, side in (("height", image_size[0]), ("width", image_size[1])):
        if side % patch_size:
            near = [
                size
                for size in (side // patch_size * patch_size, -(-side // patch_size) * patch_size)
                if size
            ]
            problems.append(
                f"patch_size={patch_size} does not divide the image {name} {side}; use "
                f"{' or '.join(map(str, near))}"
            )
    if image_size[0] // patch_size * (image_size[1] // patch_size) < 2 and not problems:
        problems.append(
            f"an image of {image_size} has one patch of {patch_size}; masking needs two or more"
        )
    for name, width, key, heads in (
        ("embed_dim", embed_dim, "num_heads", num_heads),
        ("decoder_dim", decoder_dim, "decoder_heads", decoder_heads),
    ):
        if width % heads and (heads_divide or key != "decoder_heads"):
            problems.append(f"{name}={width} is not divisible by {key}={heads}")
        if width % 4:
            problems.append(
                f"{name}={width} must be a multiple of 4, for sines and cosines of two axes"
            )
    if mlp_ratio <= 0:
        problems.append(f"mlp_ratio={mlp_ratio} must be above 0")
    return problems
