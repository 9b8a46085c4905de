"""Pixio with RC-MAE's teacher: agree with a moving average of oneself on hidden blocks, too.

The teacher is an average of encoder and decoder and sees the same blocks; its prediction of the
hidden ones is a second target (Lee et al., ICLR 2023, section 3)."""

from __future__ import annotations

from rcmae.objectives.mae import Reconstruction
from rcmae.objectives.options import RCPixioOptions
from rcmae.objectives.protocol import Context
from rcmae.objectives.rcmae import Consistency
from rcmae.objectives.terms import Sum


class RCPixio:
    """Error to the pixels plus `consistency_weight` times the error to the teacher, both on the
    patches of hidden blocks.
    """

    Options = RCPixioOptions

    @staticmethod
    def make(options: RCPixioOptions, context: Context) -> Sum:
        """The loss."""
        return Sum(
            {
                "reconstruction": Reconstruction(options.norm_pix_loss, options.norm),
                "consistency": Consistency(options.consistency_weight),
            }
        )
