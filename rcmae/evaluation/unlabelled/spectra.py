"""How many directions features use: effective ranks of their spectra.

An effective rank is the exponential of the entropy of a spectrum: of n equal values it is n, of one
value above all others 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ENTROPY = 1e-7  # added to each share of a spectrum (both papers' epsilon)
_WITHIN = 1e-4  # added to the variances within images (LiDAR's delta)
_LEAST = 2.0  # an effective rank below it had nowhere to fall from


def effective_rank(spectrum: Tensor) -> float:
    """exp(entropy) of the shares of a spectrum, none of whose values is negative."""
    shares = spectrum / spectrum.sum().clamp_min(torch.finfo(spectrum.dtype).tiny) + _ENTROPY
    return float((-(shares * shares.log()).sum()).exp())


def singular_values(features: Tensor) -> Tensor:
    """Of features [n, D], which are not centred: constant ones have a single one. Float64,
    descending.
    """
    return torch.linalg.svdvals(features.double())


def rankme(features: Tensor) -> float:
    """RankMe of features [n, D] (Garrido et al., 2023, section 3.2), from 1 to min(n, D).

    The number of images should exceed D: it is the most that can be found.
    """
    return effective_rank(singular_values(features))


def lidar(views: Tensor) -> float:
    """The effective rank of what tells images apart, over what differs between an image's views
    (LiDAR, Thilak et al., 2023, section 4: linear discriminants, each image a class of its own).

    Args:
        views: [n, q, D] features of q views of each of n images.
    """
    views = views.double()
    means = views.mean(dim=1)  # [n, D]
    centred = means - means.mean(dim=0)
    inside = (views - means[:, None]).flatten(0, 1)  # [n * q, D]
    between = centred.T @ centred / len(centred)  # [D, D]
    within = inside.T @ inside / len(inside)
    within.diagonal().add_(_WITHIN)
    lower = torch.linalg.cholesky(within)
    half = torch.linalg.solve_triangular(lower, between, upper=False)
    whitened = torch.linalg.solve_triangular(lower, half.T, upper=False)
    return effective_rank(torch.linalg.eigvalsh(whitened).clamp_min(0.0))


def is_collapsed(rank: float, highest: float) -> bool:
    """Whether an effective rank fell below a tenth of the highest that it had.

    Features that are all the same have 1: that is where both are counted from.
    """
    return highest >= _LEAST and rank - 1 < (highest - 1) / 10
