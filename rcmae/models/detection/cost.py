"""What a training step of a detector takes for one image, by sizes alone."""

from __future__ import annotations

import math

from torch import nn

from rcmae.models.activations import FP32, LOG_SUMS, Part, bytes_of
from rcmae.models.cost import StepCost
from rcmae.models.detection.detector import Detector
from rcmae.models.detection.sizes import POOLED, STRIDES, DetectorSizes

_WIDE = 192  # channels of a query that carries rows and columns along, over a head's 64


def detection_cost(
    student: Detector, *, averaged: bool, precision: str, checkpointing: str
) -> StepCost:
    """Of a detector that is trained whole.

    Args:
        student: on the meta device.
        averaged: whether an average follows it; it computes nothing.
        precision: "bf16" or "fp32".
        checkpointing: as in `kernels.checkpoint_blocks`.
    """
    sizes = student.sizes
    forward = backbone_flops(sizes) + head_flops(sizes)
    vit = sizes.backbone.vit
    pixels = vit.in_channels * math.prod(vit.image_size)
    masks = 8 * math.prod(vit.image_size) / 8  # of the objects of an image, a bit a pixel
    return StepCost(
        student=student,
        teacher=("encoder", "head") if averaged else (),
        forward_flops=forward,
        step_flops=3 * forward,
        parts=tuple(_parts(student, bytes_of(precision), checkpointing)),
        input_bytes=FP32 * pixels + masks,
        ahead_bytes=pixels + masks,
    )


def backbone_flops(sizes: DetectorSizes) -> float:
    """Floating-point operations of an image's way through the ViT: matrix products alone."""
    vit = sizes.backbone.vit
    tokens = vit.num_patches
    rows, columns = vit.grid
    side = sizes.backbone.window
    padded = (-(-rows // side) * side) * (-(-columns // side) * side)
    total = 2.0 * vit.patch_pixels * vit.embed_dim * tokens
    for number in range(vit.depth):
        windowed = number in sizes.backbone.windowed
        attended = padded if windowed else tokens
        keys = side**2 if windowed else tokens
        total += 8.0 * vit.embed_dim**2 * attended + 4.0 * attended * keys * vit.embed_dim
        total += 4.0 * vit.mlp_ratio * vit.embed_dim**2 * tokens
    return total


def head_flops(sizes: DetectorSizes) -> float:
    """Of the pyramid, the proposals and the heads of the sampled regions."""
    channels = sizes.backbone.channels
    regions = sizes.regions
    cells = sum(_cells(sizes, stride) for stride in STRIDES)
    three = 2.0 * 9 * channels**2
    shown = regions.sampled * regions.positive
    total = cells * three * (1 + sizes.proposals.convs)  # of the pyramid the last convolution
    total += regions.sampled * regions.box_side**2 * three * regions.heads.box_convs
    total += 2.0 * regions.sampled * regions.box_side**2 * channels * regions.heads.box_width
    total += shown * regions.mask_side**2 * three * regions.heads.mask_convs
    return total


def _cells(sizes: DetectorSizes, stride: int) -> int:
    height, width = sizes.backbone.vit.image_size
    return (height // stride) * (width // stride)


def _numel(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def _parts(student: Detector, width: int, checkpointing: str) -> list[Part]:
    """What the forward keeps, in its order: the ViT's blocks, the pyramid, the heads."""
    sizes = student.sizes
    vit = sizes.backbone.vit
    tokens = vit.num_patches
    dim = vit.embed_dim
    image = vit.in_channels * math.prod(vit.image_size)
    parts = [Part("embedding", 0, image * width, 2 * tokens * dim * width)]
    hidden = vit.mlp_ratio
    # of a block: what norms, attention and the MLP read again in the backward pass
    plain = tokens * dim * width * (7 + 2 * hidden) + tokens * vit.num_heads * LOG_SUMS
    whole = plain + 3 * tokens * vit.num_heads * (_WIDE - dim // vit.num_heads) * width
    for number, block in enumerate(student.all_blocks()):
        inner = plain if number in sizes.backbone.windowed else whole
        saved = inner if checkpointing == "none" else tokens * dim * width
        passing = tokens * dim * width * 4 + (0 if checkpointing == "none" else inner)
        parts.append(Part(f"block {number}", _numel(block), saved, passing))
    channels = sizes.backbone.channels
    cells = sum(_cells(sizes, stride) for stride in STRIDES)
    fine = _cells(sizes, STRIDES[0])
    up = fine * (dim // 2 + dim // 4) * width  # of the finest level, before its channels
    pyramid = _numel(student.backbone) - sum(part.params for part in parts)
    parts.append(
        Part("pyramid", pyramid, cells * channels * width * 3 + up, 2 * fine * dim * width)
    )
    proposals = cells * channels * width * (1 + sizes.proposals.convs) + cells * 15 * FP32
    regions = sizes.regions
    pooled = sum(_cells(sizes, stride) for stride in STRIDES[:POOLED]) * channels * FP32
    box = regions.sampled * regions.box_side**2 * channels
    mask = regions.sampled * regions.positive * regions.mask_side**2 * channels
    heads = 2 * (box * regions.heads.box_convs + mask * regions.heads.mask_convs) * width
    heads += mask * 4 * (2 * channels + regions.num_classes) / channels * width
    rest = _numel(student.proposal_generator) + _numel(student.roi_heads)
    parts.append(Part("proposals and heads", rest, proposals + pooled + heads, pooled + box * FP32))
    return parts
