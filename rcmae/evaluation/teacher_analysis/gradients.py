"""Gradients of the terms at a batch, and what the consistency takes back of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import vector_to_parameters

from rcmae.data.batch import Batch
from rcmae.models.vit import MaskedAutoencoder
from rcmae.objectives.terms import Sum

SAME = "same image and mask"
REMASKED = "same image, other mask"
OTHER = "other image"
KINDS = (SAME, REMASKED, OTHER)  # at which inputs the teacher's pull is looked at


class Networks(NamedTuple):
    """Both of one architecture, with all that the consistency's gradient reaches, in float64."""

    student: MaskedAutoencoder
    teacher: MaskedAutoencoder


def gradients(objective: Sum, networks: Networks, batch: Batch) -> dict[str, Tensor]:
    """The gradient of each term's mean over a batch, unweighted, as one vector in the order of
    the parameters.
    """
    sums = objective(networks.student, networks.teacher, batch, 1.0)
    counts = objective.counts(batch)
    params = list(networks.student.parameters())
    found = {}
    for term, total in sums.items():
        mean = total / counts[term]
        parts = torch.autograd.grad(mean, params, retain_graph=True, materialize_grads=True)
        found[term] = torch.cat([part.flatten() for part in parts])
    return found


def layer_of(name: str) -> str:
    """The stretch of the network that a parameter belongs to."""
    part, _, rest = name.partition(".")
    if part in ("blocks", "decoder_blocks"):
        return f"{'decoder ' if part.startswith('decoder') else ''}block {rest.partition('.')[0]}"
    if part in ("norm", "decoder_embed", "mask_token"):
        return "bridge"
    return "head" if part.startswith("decoder_") else "embedding"


def layers(model: MaskedAutoencoder) -> dict[str, Tensor]:
    """Layer -> which elements of the vector of all parameters are its.

    In the order of the forward pass.
    """
    sizes = [(layer_of(name), param.numel()) for name, param in model.named_parameters()]
    blocks = list(dict.fromkeys(name for name, _ in sizes if "block" in name))
    encoder = [name for name in blocks if name.startswith("block")]
    decoder = [name for name in blocks if name not in encoder]
    order = ["embedding", *encoder, "bridge", *decoder, "head"]
    owner = torch.cat([torch.full((count,), order.index(name)) for name, count in sizes])
    return {name: owner == index for index, name in enumerate(order)}


def cosine(one: Tensor, other: Tensor) -> float:
    """Cosine of the angle between two vectors; 0 where one of them is 0."""
    norms = one.norm() * other.norm()
    return float(one @ other / norms) if norms > 0 else 0.0


def by_layer(
    found: Mapping[str, Tensor], weight: float, layers: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Cosine of the two gradients and weight x norm of the consistency's over that of the
    reconstruction's: of all parameters, and of each layer.

    Args:
        found: of `gradients`.
        weight: of the consistency.
        layers: of `layers`.
    """
    reconstruction = found["reconstruction"]
    consistency = found["consistency"]
    rows = {"all": _compared(reconstruction, consistency, weight)}
    for name, mask in layers.items():
        rows[name] = _compared(reconstruction[mask], consistency[mask], weight)
    return rows


def _compared(reconstruction: Tensor, consistency: Tensor, weight: float) -> dict[str, float]:
    ratio = float(weight * consistency.norm() / reconstruction.norm())
    return {"cosine": cosine(reconstruction, consistency), "ratio": ratio}


class Step(NamedTuple):
    """The one step that student and teacher differ by."""

    at: Tensor  # the weights that both stood at, as one vector
    gradient: Tensor  # that the student goes along
    length: float  # in units of it


def taken_back(
    consistency: Sum, networks: Networks, step: Step, batch: Batch
) -> tuple[float, float]:
    """What the consistency takes back, at a batch, of the one step student and teacher differ by.

    Both stood at the same weights; the student goes along the gradient, the teacher stays (a
    momentum below 1 scales the difference, and so the result).

    Returns:
        -<c, g> / (length x |g|^2), c being the consistency's gradient: the share of the step that
        gradient descent on c at a rate of 1 undoes. And -cos(c, g).
    """
    gradient = step.gradient
    vector_to_parameters(step.at - step.length * gradient, networks.student.parameters())
    vector_to_parameters(step.at.clone(), networks.teacher.parameters())
    pull = gradients(consistency, networks, batch)["consistency"]
    share = -(pull @ gradient) / (step.length * gradient.square().sum())
    return float(share), -cosine(pull, gradient)


@torch.no_grad()
def features(model: MaskedAutoencoder, batch: Batch) -> Tensor:
    """The mean over an image's visible tokens out of the encoder, [B, D]."""
    tokens = model.encode(batch.images, batch.ids_shuffle[:, : batch.num_visible])
    return tokens[:, model.num_prefix :].mean(1)
