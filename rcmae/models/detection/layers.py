"""Convolutions with a norm of their own, by the published names, and how weights start."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcmae.models.batchnorm import GlobalBatchNorm
from rcmae.models.detection.sizes import Norm
from rcmae.process import extensions  # noqa: F401, it makes timm importable beside a CPU torch

from timm.layers import LayerNorm2d


class NormedConv(nn.Conv2d):
    """A convolution without bias, then its norm (`.norm`), then a ReLU if asked for.

    Args:
        inputs, outputs: channels.
        side: of the kernel, 1 or 3; the map keeps its size.
        norm: over the channels of a pixel, or over all pixels of all ranks' images.
        relu: whether to end with one.
    """

    def __init__(
        self, inputs: int, outputs: int, side: int, norm: Norm, *, relu: bool = False
    ) -> None:
        super().__init__(inputs, outputs, side, padding=side // 2, bias=False)
        self.norm = map_norm(outputs, norm)
        self._relu = relu

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C', h, w]."""
        found: Tensor = self.norm(super().forward(input))
        return F.relu(found) if self._relu else found


def map_norm(channels: int, norm: Norm) -> nn.Module:
    """Of maps [B, C, h, w]."""
    return LayerNorm2d(channels, eps=1e-6) if norm == "LN" else GlobalBatchNorm(channels)


def patch_embedding(channels: int, width: int, patch: int) -> nn.Module:
    """Images [B, C, H, W] to tokens [B, D, rows, columns]; its parameters are `proj.*`."""
    return nn.Sequential(OrderedDict(proj=nn.Conv2d(channels, width, patch, stride=patch)))


@torch.no_grad()
def draw(name: str, param: Tensor, generator: torch.Generator) -> None:
    """Give a parameter of this published name the weight that it starts from.

    As detectron2 draws them: He's for what a ReLU follows, small normals before scores, deltas and
    masks, Glorot's for laterals and the linear layer, torch's own for the rest of the pyramid; the
    ViT's as at the start of a pretraining, relative positions 0.
    """
    kind = name.rsplit(".", 1)[1]
    if "norm" in name or _is_norm(name):
        param.fill_(0.0 if kind == "bias" else 1.0)
    elif kind == "bias" or "rel_pos" in name:
        param.zero_()
    elif "bbox_pred" in name or "mask_head.predictor" in name:
        param.normal_(std=0.001, generator=generator)
    elif "rpn_head" in name or "cls_score" in name:
        param.normal_(std=0.01, generator=generator)
    elif "box_head.conv" in name or "mask_head" in name:
        nn.init.kaiming_normal_(param, mode="fan_out", nonlinearity="relu", generator=generator)
    elif ("fc1" in name and "box_head" in name) or "fpn_" in name:
        nn.init.kaiming_uniform_(param, a=1, generator=generator)
    elif "simfp_" in name or "ms_adaptor" in name:
        nn.init.kaiming_uniform_(param, a=math.sqrt(5), generator=generator)
    else:
        nn.init.xavier_uniform_(param.flatten(1), generator=generator)


def _is_norm(name: str) -> bool:
    """Norms that have no name but a number: of the first level of each pyramid."""
    return ".simfp_2.1." in f".{name}" or ".ms_adaptor.0.1." in f".{name}"
