"""Bootstrapped masked autoencoding (Dong et al., ECCV 2022): predict a moving average's features of
the image, too.

The teacher is the encoder alone and sees the whole image; the tokens of its last block,
layer-normalised, are the second target (section 3.2). The student has a regressor for each target
(`bootmae_vit`). Patches whose surroundings are hidden count more (`weight_mask`), and the weight of
the features grows over the run's first quarter, as published.

Not done: the published code rolls each order of patches by up to three, which moves that many
across the masks' edge."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional as F

from rcmae.data.batch import Batch
from rcmae.objectives.mae import Reconstruction, crowding, squared_error
from rcmae.objectives.options import BootMAEOptions, FeatureOptions
from rcmae.objectives.protocol import Context
from rcmae.objectives.terms import Sum, hidden_patches, widen

FEATURE_EPS = 1e-6  # of the layer norms of predictions and targets


class BootMAE:
    """Error to the pixels plus `feature_weight` times the error to the teacher's tokens, both on
    the hidden patches.

    With a weight of 0 there is no teacher.
    """

    Options = BootMAEOptions

    @staticmethod
    def make(options: BootMAEOptions, context: Context) -> Sum:
        """The loss."""
        pixels = Reconstruction(options.norm_pix_loss, options.norm, options.weighs_mask)
        if options.feature_weight == 0:
            return Sum({"reconstruction": pixels})
        features = Features.make(options.feature_weight, options, context)
        return Sum({"reconstruction": pixels, "features": features})


@dataclass(frozen=True)
class Features:
    """Squared error between the layer norms of predicted and of the teacher's tokens of the hidden
    patches.

    Where `epochs` says how many the run has, the sum is scaled by min(1, 4 x (1 + epoch) / epochs):
    the published weight grows at each epoch.
    """

    weight: float = 1.0
    weight_mask: bool = False
    epochs: float | None = None
    student_output: str = field(default="features", init=False)
    teacher_output: str = field(default="tokens", init=False)

    @classmethod
    def make(cls, weight: float, options: FeatureOptions, context: Context) -> Features:
        """The term, to be added to an objective."""
        return cls(weight, options.weighs_mask, context.epochs)

    def count(self, batch: Batch) -> int:
        """Hidden patches."""
        return hidden_patches(batch)

    def total(
        self, student: Tensor, teacher: Tensor | None, batch: Batch, progress: float
    ) -> Tensor:
        """Sum over hidden patches of the mean over their numbers.

        Student: [B, hidden, D], teacher: [B, L, D].
        """
        assert teacher is not None
        hidden = batch.ids_shuffle[:, batch.num_visible :, None]
        target, pred = (
            F.layer_norm(widen(tokens), tokens.shape[2:], eps=FEATURE_EPS)
            for tokens in (teacher.take_along_dim(hidden, dim=1), student)
        )
        return self.ramp(progress) * squared_error(
            pred, target, crowding(batch) if self.weight_mask else None
        )

    def ramp(self, progress: float) -> float:
        """The share of the weight that counts yet."""
        if self.epochs is None:
            return 1.0
        epoch = int(progress * self.epochs + 1e-9)  # the step's share is a rounded quotient
        return min(1.0, 4 * (1 + epoch) / self.epochs)
