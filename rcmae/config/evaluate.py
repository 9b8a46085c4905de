"""The section `evaluate` of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rcmae.config.sections import Natural, Often, Place, Positive, Section


class DenseOptions(Section):
    """k-NN for every pixel, beside that of images: patches of labelled pictures vote for those of a
    test set (mIoU), for student and teacher. Off while it has no shards.
    """

    train_shards: str | list[str] = Field(default_factory=list)
    """Shards with label maps, whose patches vote."""
    test_shards: str | list[str] = Field(default_factory=list)
    """Shards with label maps, that are judged."""
    num_classes: Positive | None = None
    """Number of classes. null: as many as class_names has, or classes.txt beside train_shards."""
    class_names: Place | None = None
    """Text file with one class name per line. null: classes.txt beside train_shards."""
    map_zero: Literal["class", "none"] = "class"
    """none: zero in a map means that there is no label, and n is class n - 1."""
    k: Positive = 30
    """Number of neighbours."""
    temperature: Annotated[float, Field(gt=0)] = 0.02
    """Temperature of the votes: the lower, the more the nearest count."""
    bank: Positive = 100_000
    """Patches that vote, at most: memory (300 MB of ViT-B) and time (as many products a test patch)
    grow with it.
    """


class EvaluateOptions(Section):
    """k-NN on labelled shards, quality without labels, and pictures, during training."""

    every_steps: Often = None
    """Evaluate every so many steps and after the last; 0: never."""
    train_shards: str | list[str] = Field(default_factory=list)
    """Labelled shards that k-NN votes with."""
    test_shards: str | list[str] = Field(default_factory=list)
    """Labelled shards that are classified."""
    held_shards: str | list[str] = Field(default_factory=list)
    """Shards, labelled or not, that are judged without labels: effective ranks of the features, and
    the loss. Without them: test_shards.
    """
    held_images: Natural = 4096
    """At most so many of these images, evenly spread; more than the encoder is wide. 0: none."""
    dense: DenseOptions = Field(default_factory=DenseOptions)
    """k-NN for every pixel, on shards with label maps."""
    k: list[Positive] = Field(default=[20])
    """Numbers of neighbours; each is reported."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """Temperature of the votes: the lower, the more the nearest count."""
    logistic: bool = False
    """Also fit a logistic regression on the features: slower, closer to a linear probe."""
    pool: Literal["cls", "cls_before_norm", "mean"] = "mean"
    """Features of an image: the class token (the mean of several), before the encoder's last
    norm or after, or the mean of the patches.
    """
    batch: Positive = 128
    """Images per forward pass."""
    picture_every_steps: Often = None
    """Draw a reconstruction every so many steps and after the last; 0: never."""
    picture_images: Positive = 4
    """Images in a picture."""
