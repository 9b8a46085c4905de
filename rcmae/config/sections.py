"""The sections of a recipe: every setting with its default and its unit.

A field belongs to one owner; components are built from values, never from the recipe itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

RECIPES = Path(__file__).parents[1] / "recipes"

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Place = Annotated[str, AfterValidator(os.path.expanduser)]  # a path: ~ is the user's home
Positive = Annotated[int, Strict(), Field(ge=1)]  # strict: not true, nor "8"
Natural = Annotated[int, Strict(), Field(ge=0)]


def _never(value: Any) -> Any:
    """0 as None."""
    return None if type(value) is int and value == 0 else value


# every so many steps; None, or 0 in a recipe: never
Often = Annotated[Positive | None, BeforeValidator(_never)]


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, and nothing is written into it."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True
    )


class TaskOptions(Section):
    """What is trained and how it is judged."""

    name: str = "pretrain"
    """pretrain, finetune, probe, detect, segment, or MODULE:NAME; the command that a user starts
    sets it.
    """
    options: dict[str, Any] = Field(default_factory=dict)
    """Of a task from outside, as it has them."""


class ModelOptions(Section):
    """The student. `name` gives the sizes; any of them can be set over it."""

    name: str = "vit_small_patch16"
    """Sizes of a published network, such as vit_base_patch16; the keys below go over them."""
    image_size: Positive | tuple[Positive, Positive] = 224
    """Pixels, one side or (height, width)."""
    in_channels: Positive = 3
    """Channels of an image."""
    patch_size: Positive | None = None
    """Pixels of a patch's side. None: as `name` has it."""
    embed_dim: Positive | None = None
    """Width of the encoder. None: as `name` has it."""
    depth: Positive | None = None
    """Blocks of the encoder. None: as `name` has it."""
    num_heads: Positive | None = None
    """Heads of the encoder's attention. None: as `name` has it."""
    decoder_dim: Positive | None = None
    """Width of the decoder. None: as `name` has it."""
    decoder_depth: Positive | None = None
    """Blocks of the decoder. None: as `name` has it."""
    decoder_heads: Positive | None = None
    """Heads of the decoder's attention. None: as `name` has it."""
    decoder: Literal["mae", "bootmae"] | None = None
    """bootmae: a regressor a target; None: as the objective has it."""
    cls_token: bool = True
    """Whether the encoder has class tokens."""
    class_tokens: Positive = 1
    """How many of them, where it has any."""
    registers: Natural = 0
    """Tokens beside them that no feature and no decoder sees."""
    decoder_cls: bool = True
    """Whether the class tokens go through the decoder, too."""
    qkv_bias: Literal["qkv", "qv"] = "qkv"
    """qv: no bias for the keys."""
    position_table: Literal["sincos", "learned"] = "sincos"
    """learned: parameters, for the class tokens, too, in encoder and decoder."""
    positions: Literal["column_first", "row_first"] = "column_first"
    """Halves of the sin-cos tables."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the encoder that pretrains, at its last block; grows from 0 at the first."""
    pixel_order: Literal["hwc", "chw"] = "hwc"
    """Of the prediction's weights."""
    num_classes: Positive = 1000
    """Classes of a class term."""
    class_hidden: Natural = 3072
    """Width of the class head's hidden layer; 0: one linear layer."""
    class_pool: Literal["mean", "cls"] = "mean"
    """What a class term's head sees."""
    low_layer: Natural = 0
    """Of the encoder, that bootmae's regressor of pixels looks at."""
    high_layer: Natural | None = None
    """Of the encoder, that bootmae's regressor of features looks at. None: the last."""

    @property
    def image_hw(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (
            self.image_size
            if isinstance(self.image_size, tuple)
            else (self.image_size, self.image_size)
        )


class TeacherOptions(Section):
    """The exponential moving average of the student."""

    momentum: Fraction = 0.996
    """Of the average, at the first step."""
    momentum_end: Fraction = 1.0
    """Of the average, at the last step of the schedule."""
    schedule: Literal["cosine", "constant", "published", "by_epoch"] = "cosine"
    """How the momentum goes from one to the other. published: as the released weights were trained.
    """
    dynamic: bool = True
    """Of by_epoch: on to 0.99999 after the first hundred epochs."""
    accumulate: Literal["fp32_shard", "stochastic"] = "fp32_shard"
    """What keeps the average: fp32 shards, or bf16 rounded stochastically, without them."""
    update: Literal["step", "micro_step"] = "step"
    """When the average moves: once a step, or with each micro-batch."""


class EngineOptions(Section):
    """What moves the weights, and how they are computed with."""

    name: Literal["local", "deepspeed", "fsdp2"] = "local"
    """What moves the weights: one process, or ranks by DeepSpeed's ZeRO or PyTorch's FSDP2."""
    config: Place | None = None
    """DeepSpeed's JSON: a path, or the name of one in ds_configs/."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where every rank's device multiplies it in hardware (CUDA capability 8.0 or above;
    CPUs with AVX512-BF16 or AMX), else fp32.
    """
    activation_checkpointing: Literal["none", "torch", "fairscale", "fairscale_offload"] = "none"
    """Recomputes activations in the backward pass: less memory, slower."""
    compile: bool = False
    """torch.compile, block by block."""
    layer_norm: Literal["torch", "apex"] = "torch"
    """Whose layer norm; apex where NVIDIA's has been built."""
    optimizer: Literal["torch", "apex"] = "torch"
    """Whose AdamW; apex where NVIDIA's has been built."""
    timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """A collective that a peer does not join raises after this; every rank then ends and says whom
    it lost. Above the longest that one rank keeps the others waiting: a save's write, an index read
    from the shards' headers.
    """


class WeightedShards(Section):
    """A set of a mixture."""

    shards: str | list[str]
    """A pattern, or a list of them."""
    weight: Annotated[float, Field(gt=0)]
    """Its part of an epoch, in proportion to the other sets'."""


class DataOptions(Section):
    """Which samples, in which order, with which crops."""

    shards: str | list[str] | list[WeightedShards] = Field(default_factory=list)
    """A pattern (braces, globs, URLs, pipe:COMMAND), a list of them, or of {shards: ..., weight:
    ...} for a mixture.
    """
    images: Place | None = None
    """In the place of shards: a folder of images, whose sub-folders are classes. Packed into shards
    once, under cache_dir or else ~/.cache/rcmae.
    """
    index: Place | None = None
    """A folder with the index of these shards, where it does not lie beside them."""
    cache_dir: Place | None = None
    """For shards from elsewhere, on each node's disk; None: of this user, in $TMPDIR."""
    cache_gb: Annotated[float, Field(gt=0)] = 100.0
    """Its limit, 10^9 bytes, over all jobs that use it."""
    source_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Of a request for 8 MiB of a shard from elsewhere."""
    source_attempts: Positive = 8
    """Requests that fail one after the other end the run."""
    workers: Natural = 4
    """Decoding processes of each rank; 0 decodes in the rank itself."""
    seed: Natural = 0
    """Of the order of samples, crops, flips and masks."""
    epoch_samples: Positive | None = None
    """Samples of an epoch. None: all that the shards have."""
    canonical_streams: Positive | None = None
    """V; None: 256, fewer where each would have fewer than 512 samples an epoch, raised to a
    multiple of the ranks at the first start.
    """
    shuffle_window: Positive = 4096
    """Samples permuted together within a stream; a stream that has fewer is permuted whole."""
    repeats: Positive = 1
    """Crops and masks of each image that is read, in one batch: less to read and decode."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of the crop over the image's."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop."""
    flip: Fraction = 0.5
    """Probability that an image is mirrored."""
    decode_margin: Annotated[float, Field(ge=1)] = 2.5
    """JPEGs are decoded at 1/2, 1/4 or 1/8 where the crop keeps this many times the target's side;
    .inf: never. Under 2.5 is looser and faster: the likeness to a full-size decode may fall under
    45 dB.
    """
    decode: Literal["cpu", "gpu", "auto"] = "cpu"
    """Who decodes JPEGs: the workers, or the GPU (nvJPEG, whose pixels differ in their last bits);
    auto: the GPU where it can. Where it cannot the workers do, with a warning under gpu.
    """
    max_pixels: Positive = 100_000_000
    """An image of more is a bad sample, before it takes memory: up to 15 bytes a pixel."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Of each channel, for images from 0 to 1: taken off."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Of each channel, for images from 0 to 1: divided by."""
    max_bad_fraction: Fraction = 0.001
    """Part of the samples that may be unreadable before the run stops."""
    max_bad_in_a_row: Positive = 100
    """Samples in a row that may be unreadable before the run stops."""


class BatchOptions(Section):
    """Images per optimizer step over all ranks, and how many a rank takes at once."""

    images: Positive = 4096
    """Images of an optimizer step, over all ranks."""
    per_device: Positive | None = None
    """At most this many at once; the largest divisor is taken. None: all."""


class ScheduleOptions(Section):
    """How long, and how fast. `epochs` or `steps`, `base_lr` or `lr`."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Length of the training; or give steps."""
    steps: Positive | None = None
    """Length of the training; or give epochs."""
    warmup_epochs: Annotated[float, Field(ge=0)] | None = None
    """Linear warm-up of the learning rate; or give warmup_steps."""
    warmup_steps: Natural | None = None
    """Linear warm-up of the learning rate; or give warmup_epochs."""
    base_lr: Annotated[float, Field(gt=0)] | None = None
    """Per 256 images."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate; or give base_lr."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the cosine."""
    shape: Literal["cosine", "poly", "steps", "wsd"] = "cosine"
    """cosine: half a cosine to min_lr. poly: (1 - done)^power. steps: a tenth at each milestone.
    wsd: stays, then falls over the last part (cooldown).
    """
    power: Annotated[float, Field(gt=0)] = 1.0
    """Of poly."""
    milestones: list[Fraction] = Field(default_factory=list)
    """Of steps, as parts of the training."""
    cooldown: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Of wsd, as a part of the training after the warm-up; or give cooldown_steps."""
    cooldown_steps: Positive | None = None
    """Of wsd, its length; None: cooldown."""
    cooldown_shape: Literal["linear", "1-sqrt"] = "linear"
    """Of wsd, how the rate falls."""
    warmup: Literal["multiply", "to_schedule"] | None = None
    """None: the shape begins after the warm-up. multiply: the warm-up is a factor on the falling
    rate. to_schedule: linear to the value that the shape has at the end of the warm-up.
    """
    warmup_from: Fraction = 0.0
    """Part of the rate that the very first step has."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled, of AdamW; biases and norms have none."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Of AdamW's averages of the gradient and of its square."""
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    """Global L2 norm."""


class CheckpointOptions(Section):
    """When the run is committed, and from what it goes on."""

    every_steps: Often = 1000
    """Commit every so many steps; 0: never."""
    every_minutes: Annotated[float, Field(gt=0)] | None = None
    """Commit after so many minutes."""
    keep: Positive = 2
    """Newest ones; two stay at least."""
    keep_every: Often = None
    """One of every so many steps stays for good."""
    resume: Place = "auto"
    """auto | never | must | a checkpoint's folder, to start a new run from."""
    init: Place | None = None
    """A new pretraining starts from these weights: a run, a checkpoint or a file of any family."""
    init_decoder: Literal["file", "fresh"] = "file"
    """Fresh: the encoder alone is taken from there, the decoder is drawn anew."""
    background: bool = True
    """Write while training goes on."""
    allow: list[str] = Field(default_factory=list)
    """Frozen keys that this job may change, knowingly."""


class GuardOptions(Section):
    """What to do about numbers gone bad: a loss or gradient that is not finite, or a loss that
    jumps.
    """

    action: Literal["stop", "skip", "rewind"] = "stop"
    """Stop, leave the update out, or go back to a checkpoint and on beyond these samples."""
    max_skips: Natural = 10
    """Of the run; then stop."""
    max_rewinds: Natural = 3
    """Of the run; then stop."""
    spike_factor: Annotated[float, Field(gt=0)] | None = None
    """deviations above the median; costs an all-reduce a step."""
    spike_window: Annotated[int, Field(ge=16)] = 64
    """Steps that the median and the deviation are of."""
    drill_nan_position: Natural | None = None
    """Puts a NaN into the image at this position of the run, to try this out."""


class EvaluateOptions(Section):
    """k-NN on labelled shards and a reconstruction picture, while training."""

    every_steps: Often = None
    """Evaluate every so many steps and after the last; 0: never."""
    train_shards: str | list[str] = Field(default_factory=list)
    """Labelled shards whose features k-NN compares with."""
    test_shards: str | list[str] = Field(default_factory=list)
    """Labelled shards that are judged."""
    k: list[Positive] = [20]
    """Neighbours that vote."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """Of the votes: the lower, the more the nearest count."""
    logistic: bool = False
    """Also logistic regression on the same features: slower, and nearer to a linear probe."""
    pool: Literal["cls", "cls_before_norm", "mean"] = "mean"
    """What stands for an image: the class token (the mean of several), before the encoder's last
    norm or after, or the mean of the patches.
    """
    batch: Positive = 128
    """Images at once."""
    picture_every_steps: Often = None
    """Draw a reconstruction every so many steps and after the last; 0: never."""
    picture_images: Positive = 4
    """Images of a reconstruction."""


class ClassifyOptions(Section):
    """What rcmae.finetune and rcmae.probe train; nothing else reads it.

    Evaluation is on evaluate.test_shards.
    """

    init: Place | None = None
    """A run's or a checkpoint's folder, or a file of weights; None: weights of run.seed."""
    network: Literal["student", "teacher"] | None = None
    """Whose weights; None: the teacher's where there is one."""
    follow: bool = False
    """What the recipe does not give follows: network, image size and statistics from init; batch,
    engine and evaluations from the set and the ranks.
    """
    num_classes: Positive | None = None
    """None: one more than the largest label of data.shards."""
    class_names: Place | None = None
    """A text file, a name a line, for tables and pictures."""
    pool: Literal["cls", "mean"] = "mean"
    """What the head sees: the class token or the mean of the patches."""
    depth: Positive | None = None
    """Of a probe: features after this block; None: after the last."""
    rule: Literal["adamw", "lars", "sgd"] = "adamw"
    """What moves the head; fine-tuning uses adamw."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Lr of a layer over that of the one above it."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """At the last block; grows from 0 at the first."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the labels."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Parameter of the beta distribution; 0: never."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """Parameter of CutMix's beta distribution; 0: never."""
    mix_probability: Fraction = 1.0
    """Of a step."""
    mix_switch: Fraction = 0.5
    """CutMix's share of mixed steps."""
    rand_augment: str | None = None
    """Timm's policy, such as rand-m9-mstd0.5-inc1."""
    erase: Fraction = 0.0
    """Of the images."""
    average: bool = False
    """Keep a moving average of the classifier by the section teacher, and evaluate it too."""


class DetectOptions(Section):
    """What rcmae.detect trains; nothing else reads it. model.image_size is the canvas.

    Evaluation is on evaluate.test_shards.
    """

    backbone: Literal["vitdet", "benchmark"] = "vitdet"
    """vitdet: windows and a simple pyramid. benchmark: that of arXiv 2111.11429, with batch norm,
    which RC-MAE's table of COCO was made with.
    """
    init: Place | None = None
    """A run, a checkpoint, a file of an encoder, or a published detector (.pth, .pkl); None:
    weights of run.seed.
    """
    network: Literal["student", "teacher"] | None = None
    """Whose weights; None: the teacher's where there is one."""
    num_classes: Positive | None = None
    """None: as many as categories.json beside data.shards has."""
    category_ids: list[int] | None = None
    """COCO's id of each class. None: those of categories.json, in their order."""
    category_names: list[str] | None = None
    """Of each class, for tables and pictures. None: those of categories.json."""
    positions: Literal["mae", "published"] = "mae"
    """Of benchmark's fixed table; published: its halves swapped against MAE's, as theirs is."""
    window: Positive | None = None
    """Side of an attention window in patches. None: 14, of benchmark 16."""
    pretrain_size: Positive = 224
    """Pixels of an image's side in the pretraining: vitdet's table of positions has its grid."""
    channels: Positive = 256
    """Of each level of the pyramid."""
    box_width: Positive = 1024
    """Of the box head's linear layer."""
    anchors: Annotated[list[float], Field(min_length=5, max_length=5)] = [32, 64, 128, 256, 512]
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
    """Lr of a layer over that of the one above it."""
    decay_norms: bool = False
    """Whether norms and positions of the ViT decay, too."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """At the last block; grows from 0 at the first."""
    score: Fraction = 0.05
    """A detection's must be above."""
    detections: Positive = 100
    """Of an image, at most."""
    average: bool = False
    """Keep a moving average of the detector by the section teacher, and evaluate it too."""


class LogOptions(Section):
    """What is written while training."""

    every_steps: Often = 20
    """Log every so many steps and the last; 0: never."""
    tensorboard: bool = True
    """Whether to write curves and pictures for TensorBoard."""
    trackers: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()
    """Where to show the run, too: each committed step once, also over kills and requeues."""


class RunOptions(Section):
    """Where the run lives."""

    dir: Place | None = None
    """Default: runs/<name>."""
    name: str | None = None
    """Default: the recipe's."""
    seed: Natural = 0
    """Initial weights and stochastic rounding."""
    stop_after_steps: Positive | None = None
    """This many steps in this job, then commit and exit 75."""
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    """Of this job, from its start; SLURM's end is known anyway."""
    lease_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """A job that gives no sign this long has lost the run."""
    lease_wait_s: Annotated[float, Field(ge=0)] = 120.0
    """How long to wait for a job that trains here and is alive."""
