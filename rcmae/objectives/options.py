"""The keys of the section `objective` that belong to one objective, or to one term.

Without torch, so that a recipe is read, and a typo refused, before it is imported. An objective
of your own has such a class as its attribute `Options`; any pydantic model will do, with `reads`
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
    """Options of objectives that reconstruct pixels."""

    norm_pix_loss: bool = True
    """Normalise each target patch by its own mean and variance."""
    pixel_norm: PixelNorm | None = None
    """Which mean and variance normalise a patch. null: as published for the objective."""
    published_norm: ClassVar[PixelNorm] = "unbiased"

    @property
    def norm(self) -> PixelNorm:
        """What a patch's pixels are normalised by."""
        return self.pixel_norm or self.published_norm


class ConsistencyOptions(OwnOptions):
    """Options of the term `consistency`."""

    reads: ClassVar[Reads] = Reads(student=("pixels",), teacher=("pixels",))
    teacher_mask: Literal["same", "different"] = "same"
    """Patches that the teacher of the consistency term sees."""


class ClassOptions(OwnOptions):
    """Options of the term `class`."""

    reads: ClassVar[Reads] = Reads(student=("classes",))
    class_temperature: Annotated[float, Field(gt=0.0)] = 10.0
    """Temperature that divides the class head's logits."""
    class_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Label smoothing of the class term."""


class FeatureOptions(OwnOptions):
    """Options of the term `features`."""

    reads: ClassVar[Reads] = Reads(student=("features",), teacher=("tokens",))
    follows_progress: ClassVar[bool] = True  # the weight grows over the run's first quarter
    weight_mask: bool | None = None
    """Weight hidden patches by their hidden neighbours. null: as published for the objective."""
    published_weight_mask: ClassVar[bool] = False

    @property
    def weighs_mask(self) -> bool:
        """Whether hidden patches among hidden ones count more."""
        return self.published_weight_mask if self.weight_mask is None else self.weight_mask


class MAEOptions(PixelOptions):
    """Options of `mae`."""

    weight_mask: bool | None = None
    """Weight hidden patches by their hidden neighbours."""


class RCMAEOptions(ConsistencyOptions, PixelOptions):
    """Options of `rcmae`."""

    consistency_weight: Weight = 1.0
    """Weight of the consistency term: gamma of the RC-MAE paper."""


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
    """Weight of the consistency term: gamma of the RC-MAE paper."""


class SupMAEOptions(ClassOptions, PixelOptions):
    """Options of `supmae`."""

    reads: ClassVar[Reads] = Reads(student=("classes", "pixels"))
    class_weight: Weight = 0.01
    """Weight of the class term."""


class BootMAEOptions(FeatureOptions, PixelOptions):
    """Options of `bootmae`."""

    decoder: ClassVar[str] = "bootmae"
    published_norm: ClassVar[PixelNorm] = "channel"
    published_weight_mask: ClassVar[bool] = True
    feature_weight: Weight = 1.0
    """Weight of the feature term; 0: no feature term and no teacher."""

    @property
    def reads(self) -> Reads:  # type: ignore[override]
        """Pixels, and features where they have a weight."""
        if self.feature_weight == 0:
            return Reads()
        return Reads(student=("features", "pixels"), teacher=("tokens",))
