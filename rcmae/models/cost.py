"""What a training step costs for one image, by sizes alone: FLOPs and bytes.

The planner computes memory and hours from it, a run its utilisation (MFU).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from rcmae.models.activations import (
    FP32,
    Computing,
    Part,
    activations,
    bytes_of,
    classifier_activations,
    inference_bytes,
)
from rcmae.models.build import Network
from rcmae.models.flops import classifier_flops
from rcmae.models.sizes import NetworkSizes

if TYPE_CHECKING:  # it imports timm, which costs seconds: for who classifies
    from rcmae.models.classifier import Classifier


class StepCost(NamedTuple):
    """A training step for one image; only sizes are read, networks are on the meta device."""

    student: nn.Module  # what is trained
    teacher: tuple[str, ...]  # the parts of it that an average follows; none: there is no average
    forward_flops: float  # of the student
    step_flops: float  # of forward and backward, and of what computes beside the student
    parts: tuple[Part, ...]  # what the forward keeps, in its order
    input_bytes: float  # of an image and its mask
    beside_bytes: float = 0.0  # at the height of what computes without gradients beside the student
    waiting_bytes: float = 0.0  # what that leaves for the loss
    frozen_params: int = 0  # of a network beside, which nothing moves
    ahead_bytes: float = (
        0.0  # of an image and its mask that is on the device before its turn: uint8
    )


def pretraining_cost(
    student: Network,
    *,
    teacher_outputs: tuple[str, ...],
    teacher: tuple[str, ...],
    num_visible: int,
    computing: Computing,
) -> StepCost:
    """The cost of pretraining a masked autoencoder.

    Args:
        student: on the meta device.
        teacher_outputs: what the objective asks of a teacher.
        teacher: the parts that it has for that.
        num_visible: patches that the encoder sees.
        computing: how blocks are computed.
    """
    forward = student.flops(num_visible)
    step = 3 * forward  # a backward pass is two
    beside = 0.0
    waiting = 0.0
    if "pixels" in teacher_outputs:
        step += forward
    if "tokens" in teacher_outputs:
        step += student.encoder_flops(student.num_patches)
    if teacher:
        decodes = "decoder" in teacher
        seen = num_visible if decodes else student.num_patches
        precision = computing.precision
        beside = inference_bytes(
            student.sizes, num_visible=seen, precision=precision, decodes=decodes
        )
        if not decodes:  # its tokens of the whole image wait for the student's
            waiting = student.num_patches * student.sizes.embed_dim * bytes_of(precision)
    pixels = math.prod(student.image_size) * student.in_channels
    parts = activations(
        student, num_visible=num_visible, computing=computing, teacher="pixels" in teacher_outputs
    )
    return StepCost(
        student=student,
        teacher=teacher,
        forward_flops=forward,
        step_flops=step,
        parts=tuple(parts),
        input_bytes=FP32 * pixels + 8 * student.num_patches,
        ahead_bytes=pixels + 8 * student.num_patches,
        beside_bytes=beside,
        waiting_bytes=waiting,
    )


def classifier_cost(
    student: Classifier, sizes: NetworkSizes, *, averaged: bool, computing: Computing
) -> StepCost:
    """The cost of training a classifier, all layers.

    Args:
        student: on the meta device.
        sizes: of its encoder.
        averaged: whether an average follows it; it computes nothing.
        computing: how blocks are computed.
    """
    forward = classifier_flops(sizes)
    pixels = sizes.in_channels * math.prod(sizes.image_size)
    return StepCost(
        student=student,
        teacher=("encoder", "head") if averaged else (),
        forward_flops=forward,
        step_flops=3 * forward,
        parts=tuple(classifier_activations(student, sizes, computing=computing)),
        input_bytes=FP32 * pixels,
        ahead_bytes=pixels,
    )


def probe_cost(head: nn.Module, sizes: NetworkSizes, *, depth: int, precision: str) -> StepCost:
    """The cost of training a head on a frozen encoder.

    Args:
        head: on the meta device.
        sizes: of the encoder.
        depth: blocks that are computed.
        precision: of the encoder.
    """
    encoder = replace(sizes, depth=depth)
    forward = classifier_flops(encoder)
    params = sum(param.numel() for param in head.parameters())
    features = float(FP32 * sizes.embed_dim)
    beside = inference_bytes(
        sizes, num_visible=sizes.num_patches, precision=precision, decodes=False
    )
    pixels = sizes.in_channels * math.prod(sizes.image_size)
    return StepCost(
        student=head,
        teacher=(),
        forward_flops=forward,
        step_flops=forward,  # the head is nothing beside it
        parts=(Part("head", params, 2 * features, features),),
        input_bytes=FP32 * pixels,
        ahead_bytes=pixels,
        beside_bytes=beside,
        waiting_bytes=features,
        frozen_params=12 * depth * sizes.embed_dim**2 + sizes.patch_pixels * sizes.embed_dim,
    )
