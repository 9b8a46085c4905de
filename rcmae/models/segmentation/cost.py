"""What a step of a segmenter costs for one image, by sizes alone."""

from __future__ import annotations

import math

from rcmae.models.activations import FP32, Computing, Part, bytes_of, classifier_activations
from rcmae.models.cost import StepCost, probe_cost
from rcmae.models.flops import classifier_flops
from rcmae.models.segmentation.heads import FCNHead, LinearHead, UPerHead
from rcmae.models.segmentation.segmenter import DenseProbe, Segmenter
from rcmae.models.sizes import NetworkSizes


def segmenter_cost(
    model: Segmenter, num_classes: int, *, averaged: bool, computing: Computing
) -> StepCost:
    """The cost of training a segmenter, all layers.

    Args:
        model: on the meta device.
        num_classes: that it tells apart.
        averaged: whether an average follows it; it computes nothing.
        computing: how blocks are computed.
    """
    sizes = model.backbone.sizes
    parts = classifier_activations(model.backbone, sizes, computing=computing)
    encoder = parts[:-1]  # the last is a classifier's head
    heads = head_parts(model, num_classes, computing)
    known = sum(part.params for part in (*encoder, *heads))
    every = sum(param.numel() for param in model.parameters())
    norm = Part("norms of the encoder", every - known, 0.0, 0.0)
    flops = classifier_flops(sizes) + pyramid_flops(sizes) * bool(model.backbone.levels)
    flops += head_flops(model, num_classes)
    pixels = math.prod(sizes.image_size)
    return StepCost(
        student=model,
        teacher=("encoder", "head") if averaged else (),
        forward_flops=flops,
        step_flops=3 * flops,
        parts=(*encoder, norm, *heads),
        input_bytes=(FP32 * sizes.in_channels + 1) * pixels,
        ahead_bytes=(sizes.in_channels + 1) * pixels,
    )


def dense_probe_cost(
    head: DenseProbe, sizes: NetworkSizes, num_classes: int, *, precision: str
) -> StepCost:
    """The cost of training a linear head on a frozen encoder.

    Args:
        head: on the meta device.
        sizes: of the encoder.
        num_classes: that it tells apart.
        precision: of the encoder.
    """
    cost = probe_cost(head, sizes, depth=sizes.depth, precision=precision)
    loss = loss_part(sizes, num_classes, heads=1)
    features = float(bytes_of(precision) * sizes.embed_dim * sizes.num_patches)
    params = sum(param.numel() for param in head.parameters())
    return cost._replace(
        parts=(Part("head", params, 3 * features, features), loss), waiting_bytes=features
    )


def pyramid_flops(sizes: NetworkSizes) -> float:
    """Of one image's pyramid: three convolutions that double a map's side."""
    return 8.0 * sizes.embed_dim**2 * sizes.num_patches * (1 + 4 + 1)


def head_flops(model: Segmenter, num_classes: int) -> float:
    """Of one image's way through the heads."""
    sizes = model.backbone.sizes
    places = sizes.num_patches
    width = sizes.embed_dim
    head = model.decode_head
    if isinstance(head, LinearHead):
        return 2.0 * width * num_classes * places
    assert isinstance(head, UPerHead)
    own = head.width
    scales = len(head.psp_modules)
    small = places / 4
    flops = 18.0 * (width + scales * own) * own * small  # bottleneck
    flops += 2.0 * width * own * 21 * places  # laterals of 16, 4 and 1 times the patches
    flops += 18.0 * own**2 * 21 * places  # of the pyramid
    flops += 18.0 * 4 * own**2 * 16 * places  # of all levels together
    flops += 2.0 * own * num_classes * 16 * places
    beside = getattr(model, "auxiliary_head", None)
    if isinstance(beside, FCNHead):
        flops += (18.0 * width * beside.width + 2.0 * beside.width * num_classes) * places
    return flops


def head_parts(model: Segmenter, num_classes: int, computing: Computing) -> list[Part]:
    """What pyramid, heads and loss keep between the passes: of a module the input of its
    convolution, of its norm and of what comes after."""
    sizes = model.backbone.sizes
    places = sizes.num_patches
    width = sizes.embed_dim
    number = computing.width
    head = model.decode_head
    params = sum(param.numel() for param in head.parameters())
    if isinstance(head, LinearHead):
        kept = 3.0 * width * places * number
        return [Part("head", params, kept, kept), loss_part(sizes, num_classes, heads=1)]
    assert isinstance(head, UPerHead)
    backbone = model.backbone
    of_pyramid = sum(
        param.numel() for name in ("fpn1", "fpn2") for param in getattr(backbone, name).parameters()
    )
    own = head.width
    pyramid = (3 * 4 + 21) * width * places * number
    levels = 21 * places * (2 * own + 3 * own)  # laterals and what the pyramid makes of them
    joined = 16 * places * (4 * own + 3 * own)  # all levels together, and their module
    pooled = places / 4 * (width + 4 * own + 2 * own)
    kept = (levels + joined + pooled) * number
    largest = 16.0 * places * 4 * own * number
    found = [Part("pyramid", of_pyramid, float(pyramid), 16.0 * places * width * number)]
    beside = getattr(model, "auxiliary_head", None)
    heads = 1
    if isinstance(beside, FCNHead):
        heads = 2
        theirs = sum(param.numel() for param in beside.parameters())
        found.append(Part("auxiliary head", theirs, 3.0 * beside.width * places * number, 0.0))
    found.append(Part("head", params, kept, largest))
    return [*found, loss_part(sizes, num_classes, heads=heads)]


def loss_part(sizes: NetworkSizes, num_classes: int, *, heads: int) -> Part:
    """Logits at the size of the map, and their logarithms, in float32."""
    logits = float(FP32 * num_classes * math.prod(sizes.image_size))
    return Part("loss", 0, 2 * heads * logits, logits)
