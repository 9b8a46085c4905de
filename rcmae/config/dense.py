"""The sections `segment` and `detect` of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rcmae.config.sections import Fraction, Place, Positive, Section

Scale = Annotated[float, Field(gt=0)]


class SegmentOptions(Section):
    """What rcmae.segment trains; nothing else reads it. Evaluation is on evaluate.test_shards."""

    init: Place | None = None
    """A run's or a checkpoint's folder, or a file of weights; null: weights of run.seed."""
    network: Literal["student", "teacher"] | None = None
    """Whose weights; null: the teacher's where there is one."""
    num_classes: Positive | None = None
    """null: as many as class_names has, or classes.txt beside data.shards."""
    class_names: Place | None = None
    """A text file, a name a line, for tables and pictures; null: classes.txt beside data.shards."""
    map_zero: Literal["class", "none"] = "class"
    """none: zero in a map means that there is no label, and n is class n - 1."""
    crop: Positive | tuple[Positive, Positive] | None = None
    """Pixels of a training image and of an evaluation's window, one side or (height, width); null:
    model.image_size.
    """
    levels: list[int] | None = None
    """Blocks, from 0, whose outputs make the pyramid: four. null: 3, 5, 7, 11 of 12, and alike."""
    head: Literal["uper", "linear"] = "uper"
    """uper: UPerNet on a pyramid. linear: one layer on the last block's normed tokens."""
    width: Positive | None = None
    """Channels of UPerNet; null: the encoder's."""
    aux_weight: Annotated[float, Field(ge=0)] = 0.4
    """Of the loss of the head beside UPerNet; 0: there is none."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of whole channels, before each head's last layer."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """At the last block; grows from 0 at the first."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Lr of a layer over that of the one above it."""
    relative_positions: bool = True
    """A learnt bias for each relative position, in each block."""
    layer_scale: bool = True
    """A learnt factor for each channel of a block's branches, 1 at the start."""
    frozen: bool = False
    """The encoder stays as it is: a dense probe. With head=linear."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Of the limits that an image is resized to: four times the crop, and the crop."""
    max_class_share: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Of a crop's labelled pixels, that no class may reach; ten tries. 1: any crop."""
    distort: bool = True
    """Brightness, contrast, saturation and hue of the crops."""
    resize: Literal["bilinear", "antialias"] = "bilinear"
    """How images become smaller; bilinear is published."""
    mean_over: Literal["pixels", "labelled"] = "pixels"
    """pixels: those without a label count in the loss's mean, as published."""
    average: bool = False
    """Keep a moving average of the network by the section teacher, and evaluate it too."""
    test_stride: Annotated[float, Field(gt=0, le=1)] = 2 / 3
    """Of an evaluation's windows, as a part of the crop."""
    test_scales: Annotated[tuple[Scale, ...], Field(min_length=1)] = (1.0,)
    """Sizes that a picture is judged at; probabilities are averaged."""
    test_flip: bool = False
    """Judge the mirror image, too."""


class DetectOptions(Section):
    """What rcmae.detect trains; nothing else reads it. model.image_size is the canvas.

    Evaluation is on evaluate.test_shards.
    """

    backbone: Literal["vitdet", "benchmark"] = "vitdet"
    """vitdet: windows and a simple pyramid. benchmark: that of arXiv 2111.11429, with batch norm,
    which RC-MAE's table of COCO was made with.
    """
    init: Place | None = None
    """A run, a checkpoint, a file of an encoder, or a published detector (.pth, .pkl); null:
    weights of run.seed.
    """
    network: Literal["student", "teacher"] | None = None
    """Network to take. null: the teacher, if there is one."""
    num_classes: Positive | None = None
    """null: as many as categories.json beside data.shards has."""
    category_ids: list[int] | None = None
    """COCO's id of each class. null: those of categories.json, in their order."""
    category_names: list[str] | None = None
    """Of each class, for tables and pictures. null: those of categories.json."""
    positions: Literal["mae", "published"] = "mae"
    """Of benchmark's fixed table; published: its halves swapped against MAE's, as theirs is."""
    window: Positive | None = None
    """Side of an attention window in patches. null: 14, of benchmark 16."""
    pretrain_size: Positive = 224
    """Pixels of an image's side in the pretraining: vitdet's table of positions has its grid."""
    channels: Positive = 256
    """Of each level of the pyramid."""
    box_width: Positive = 1024
    """Of the box head's linear layer."""
    anchors: list[float] = Field(default=[32, 64, 128, 256, 512], min_length=5, max_length=5)
    """Sides of the anchors in pixels, one a level."""
    canonical_size: Annotated[float, Field(gt=0)] = 224.0
    """Pixels of a region's side that is read at stride 16."""
    anchors_sampled: Positive = 256
    """Of an image, that the loss sees."""
    proposals_per_level: tuple[Positive, Positive] = (2000, 1000)
    """In training and in evaluation, before suppression."""
    proposals: tuple[Positive, Positive] = (1000, 1000)
    """Of all levels, in training and in evaluation."""
    regions_sampled: Positive = 512
    """Of an image, that the losses see."""
    scale: tuple[float, float] = (0.1, 2.0)
    """Of an image over the canvas, drawn evenly."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of a layer, relative to the layer above."""
    decay_norms: bool = False
    """Whether norms and positions of the ViT decay, too."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Drop path rate of the last block; it grows linearly from 0 at the first."""
    score: Fraction = 0.05
    """A detection's must be above."""
    detections: Positive = 100
    """Of an image, at most."""
    average: bool = False
    """Keep a moving average of the detector by the section teacher, and evaluate it too."""
