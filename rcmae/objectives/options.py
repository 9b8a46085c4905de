"""The keys of the section `objective` that belong to one objective, or to one term.

Without torch, so that a recipe is read, and a typo refused, before it is imported. An objective
from elsewhere has such a class as its attribute `Options`; any pydantic model will do, with `reads`
where the loss reads other outputs than the student's pixels."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rcmae.config import MaskKind, OwnOptions, Reads

# By what a patch's pixels are normalised. MAE: the patch's mean and unbiased variance; MAE-priv:
# the biased one; BootMAE: each channel's own mean and biased variance.
PixelNorm = Literal["unbiased", "biased", "channel"]
Weight = Annotated[float, Field(ge=0.0)]


class PixelOptions(OwnOptions):
    """Of whatever reconstructs pixels."""

    norm_pix_loss: bool = True
    """The target of a patch is normalised by its own mean and variance."""
    pixel_norm: PixelNorm | None = None
    """By which variance; None: as published."""
    published_norm: ClassVar[PixelNorm] = "unbiased"

    @property
    def norm(self) -> PixelNorm:
        """What a patch's pixels are normalised by."""
        return self.pixel_norm or self.published_norm


class ConsistencyOptions(OwnOptions):
    """Of the term `consistency`."""

    reads: ClassVar[Reads] = Reads(student=("pixels",), teacher=("pixels",))
    teacher_mask: Literal["same", "different"] = "same"
    """Which patches the teacher of the consistency sees."""


class ClassOptions(OwnOptions):
    """Of the term `class`."""

    reads: ClassVar[Reads] = Reads(student=("classes",))
    class_temperature: Annotated[float, Field(gt=0.0)] = 10.0
    """The class head's logits are divided by it."""
    class_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Of the labels."""


class FeatureOptions(OwnOptions):
    """Of the term `features`."""

    reads: ClassVar[Reads] = Reads(student=("features",), teacher=("tokens",))
    follows_progress: ClassVar[bool] = True  # the weight grows over the run's first quarter
    weight_mask: bool | None = None
    """Hidden patches among hidden ones count more; None: as published."""
    published_weight_mask: ClassVar[bool] = False

    @property
    def weighs_mask(self) -> bool:
        """Whether hidden patches among hidden ones count more."""
        return self.published_weight_mask if self.weight_mask is None else self.weight_mask


class MAEOptions(PixelOptions):
    """Of `mae`."""

    weight_mask: bool | None = None
    """Hidden patches among hidden ones count more."""


class RCMAEOptions(ConsistencyOptions, PixelOptions):
    """Of `rcmae`."""

    consistency_weight: Weight = 1.0
    """Gamma of the RC-MAE paper."""


class BlocksOptions(PixelOptions):
    """Of objectives that hide blocks of patches."""

    needs_class_token: ClassVar[bool] = True  # its mean is what such an encoder is read by
    mask: MaskKind = "grid"
    """Square blocks (Pixio); random, or boxes of BEiT."""


class PixioOptions(BlocksOptions):
    """Of `pixio`."""


class RCPixioOptions(ConsistencyOptions, BlocksOptions):
    """Of `rcpixio`."""

    consistency_weight: Weight = 1.0
    """Gamma of the RC-MAE paper."""


class SupMAEOptions(ClassOptions, PixelOptions):
    """Of `supmae`."""

    reads: ClassVar[Reads] = Reads(student=("classes", "pixels"))
    class_weight: Weight = 0.01
    """Of the class term in the loss."""


class BootMAEOptions(FeatureOptions, PixelOptions):
    """Of `bootmae`."""

    decoder: ClassVar[str] = "bootmae"
    published_norm: ClassVar[PixelNorm] = "channel"
    published_weight_mask: ClassVar[bool] = True
    feature_weight: Weight = 1.0
    """0: no features, and no teacher."""

    @property
    def reads(self) -> Reads:  # type: ignore[override]
        """Pixels, and features where they have a weight."""
        if self.feature_weight == 0:
            return Reads()
        return Reads(student=("features", "pixels"), teacher=("tokens",))
