"""Pixio (arXiv 2512.15715): masked autoencoding whose student has several class tokens, learned
positions and a deep decoder, and hides blocks of patches.

The loss is MAE's. What differs is the network (`model.class_tokens`, `position_table`,
`decoder_depth`) and the mask (`objective.mask: grid`), so those are values of the recipe. Not done:
the paper's self-curation of its images."""

from __future__ import annotations

from rcmae.objectives.mae import Reconstruction
from rcmae.objectives.options import PixioOptions
from rcmae.objectives.protocol import Context
from rcmae.objectives.terms import Sum


class Pixio:
    """Mean squared error on the patches of hidden blocks."""

    Options = PixioOptions

    @staticmethod
    def make(options: PixioOptions, context: Context) -> Sum:
        """The loss."""
        return Sum({"reconstruction": Reconstruction(options.norm_pix_loss, options.norm)})
