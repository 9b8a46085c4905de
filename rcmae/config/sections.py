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

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class TaskOptions(Section):
    """What is trained and how it is judged."""

    # pretrain, finetune, probe, or MODULE:NAME; the command that a user starts sets it
    name: str = "pretrain"
    options: dict[str, Any] = Field(default_factory=dict)  # of a task from outside, as it has them


class ModelOptions(Section):
    """The student. `name` gives the sizes; any of them can be set over it."""

    name: str = "vit_small_patch16"
    image_size: Positive | tuple[Positive, Positive] = 224  # pixels, one side or (height, width)
    in_channels: Positive = 3
    patch_size: Positive | None = None
    embed_dim: Positive | None = None
    depth: Positive | None = None
    num_heads: Positive | None = None
    decoder_dim: Positive | None = None
    decoder_depth: Positive | None = None
    decoder_heads: Positive | None = None
    # bootmae: a regressor a target; None: as the objective has it
    decoder: Literal["mae", "bootmae"] | None = None
    cls_token: bool = True
    decoder_cls: bool = True  # whether it goes through the decoder, too
    qkv_bias: Literal["qkv", "qv"] = "qkv"  # qv: none for the keys
    positions: Literal["column_first", "row_first"] = "column_first"  # halves of the sin-cos tables
    pixel_order: Literal["hwc", "chw"] = "hwc"  # of the prediction's weights
    num_classes: Positive = 1000  # of a class term
    class_hidden: Natural = 3072  # width of its head's hidden layer; 0: one linear layer
    class_pool: Literal["mean", "cls"] = "mean"
    low_layer: Natural = 0  # of the encoder, that bootmae's regressor of pixels looks at
    high_layer: Natural | None = None  # and that of features; None: the last

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
    momentum_end: Fraction = 1.0
    schedule: Literal["cosine", "constant", "published", "by_epoch"] = "cosine"
    dynamic: bool = True  # of by_epoch: on to 0.99999 after the first hundred epochs
    accumulate: Literal["fp32_shard", "stochastic"] = "fp32_shard"
    update: Literal["step", "micro_step"] = "step"


class EngineOptions(Section):
    """What moves the weights, and how they are computed with."""

    name: Literal["local", "deepspeed", "fsdp2"] = "local"
    config: Place | None = None  # DeepSpeed's JSON: a path, or the name of one in ds_configs/
    # auto: bf16 where every rank's device multiplies it in hardware (CUDA capability 8.0 or above;
    # CPUs with AVX512-BF16 or AMX), else fp32
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    activation_checkpointing: Literal["none", "torch", "fairscale", "fairscale_offload"] = "none"
    compile: bool = False  # torch.compile, block by block
    layer_norm: Literal["torch", "apex"] = "torch"
    optimizer: Literal["torch", "apex"] = "torch"
    # A collective that a peer does not join raises after this; every rank then ends and says whom
    # it lost. Above the longest that one rank keeps the others waiting: a save's write, an index
    # read from the shards' headers.
    timeout_s: Annotated[float, Field(gt=0)] = 1800.0


class WeightedShards(Section):
    """A set of a mixture."""

    shards: str | list[str]
    weight: Annotated[float, Field(gt=0)]  # its part of an epoch, in proportion to the other sets'


class DataOptions(Section):
    """Which samples, in which order, with which crops."""

    # A pattern (braces, globs, URLs, pipe:COMMAND), a list of them, or of {shards: ..., weight:
    # ...} for a mixture.
    shards: str | list[str] | list[WeightedShards] = Field(default_factory=list)
    # a folder with the index of these shards, where it does not lie beside them
    index: Place | None = None
    # for shards from elsewhere, on each node's disk; None: of this user, in $TMPDIR
    cache_dir: Place | None = None
    # its limit, 10^9 bytes, over all jobs that use it
    cache_gb: Annotated[float, Field(gt=0)] = 100.0
    # of a request for 8 MiB of a shard from elsewhere
    source_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    source_attempts: Positive = 8  # requests that fail one after the other end the run
    workers: Natural = 4  # decoding processes of each rank; 0 decodes in the rank itself
    seed: Natural = 0
    epoch_samples: Positive | None = None
    # V; None: 256, raised to a multiple of the ranks at the first start
    canonical_streams: Positive | None = None
    shuffle_window: Positive = 4096  # samples permuted together within a stream
    # crops and masks of each image that is read, in one batch: less to read and decode
    repeats: Positive = 1
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of the crop over the image's
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height of the crop
    flip: Fraction = 0.5
    # JPEGs are decoded at 1/2, 1/4 or 1/8 where the crop keeps this many times the target's side;
    # .inf: never. Under 2.5 is looser and faster: the likeness to a full-size decode may fall under
    # 45 dB.
    decode_margin: Annotated[float, Field(ge=1)] = 2.5
    # Who decodes JPEGs: the workers, or the GPU (nvJPEG, whose pixels differ in their last bits);
    # auto: the GPU where it can. Where it cannot the workers do, with a warning under gpu.
    decode: Literal["cpu", "gpu", "auto"] = "cpu"
    # an image of more is a bad sample, before it takes memory: up to 15 bytes a pixel
    max_pixels: Positive = 100_000_000
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    max_bad_fraction: Fraction = 0.001
    max_bad_in_a_row: Positive = 100


class BatchOptions(Section):
    """Images per optimizer step over all ranks, and how many a rank takes at once."""

    images: Positive = 4096
    # at most this many at once; the largest divisor is taken. None: all
    per_device: Positive | None = None


class ScheduleOptions(Section):
    """How long, and how fast. `epochs` or `steps`, `base_lr` or `lr`."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: Positive | None = None
    warmup_epochs: Annotated[float, Field(ge=0)] | None = None
    warmup_steps: Natural | None = None
    base_lr: Annotated[float, Field(gt=0)] | None = None  # per 256 images
    lr: Annotated[float, Field(gt=0)] | None = None
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    # cosine: half a cosine to min_lr. poly: (1 - done)^power. steps: a tenth at each milestone.
    # wsd: stays, then falls linearly over the last part (cooldown)
    shape: Literal["cosine", "poly", "steps", "wsd"] = "cosine"
    power: Annotated[float, Field(gt=0)] = 1.0  # of poly
    milestones: list[Fraction] = Field(default_factory=list)  # of steps, as parts of the training
    cooldown: Annotated[float, Field(gt=0, le=1)] = 0.2  # of wsd, as a part of the training
    # None: the shape begins after the warm-up. multiply: the warm-up is a factor on the falling
    # rate. to_schedule: linear to the value that the shape has at the end of the warm-up
    warmup: Literal["multiply", "to_schedule"] | None = None
    warmup_from: Fraction = 0.0  # part of the rate that the very first step has
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    clip_grad: Annotated[float, Field(gt=0)] | None = None  # global L2 norm


class CheckpointOptions(Section):
    """When the run is committed, and from what it goes on."""

    every_steps: Often = 1000
    every_minutes: Annotated[float, Field(gt=0)] | None = None
    keep: Positive = 2  # newest ones; two stay at least
    keep_every: Often = None  # one of every so many steps stays for good
    resume: Place = "auto"  # auto | never | must | a checkpoint's folder, to start a new run from
    # a new pretraining starts from these weights: a run, a checkpoint or a file of any family
    init: Place | None = None
    # fresh: the encoder alone is taken from there, the decoder is drawn anew
    init_decoder: Literal["file", "fresh"] = "file"
    background: bool = True  # write while training goes on
    # frozen keys that this job may change, knowingly
    allow: list[str] = Field(default_factory=list)


class GuardOptions(Section):
    """What to do about numbers gone bad: a loss or gradient that is not finite, or a loss that
    jumps.
    """

    action: Literal["stop", "skip", "rewind"] = "stop"
    max_skips: Natural = 10  # of the run; then stop
    max_rewinds: Natural = 3  # of the run; then stop
    # deviations above the median; costs an all-reduce a step
    spike_factor: Annotated[float, Field(gt=0)] | None = None
    # steps that the median and the deviation are of
    spike_window: Annotated[int, Field(ge=16)] = 64
    # puts a NaN into the image at this position of the run, to try this out
    drill_nan_position: Natural | None = None


class EvaluateOptions(Section):
    """k-NN on labelled shards and a reconstruction picture, while training."""

    every_steps: Often = None
    train_shards: str | list[str] = Field(default_factory=list)
    test_shards: str | list[str] = Field(default_factory=list)
    k: list[Positive] = [20]
    temperature: Annotated[float, Field(gt=0)] = 0.07
    # also logistic regression on the same features: slower, and nearer to a linear probe
    logistic: bool = False
    pool: Literal["cls", "mean"] = "mean"
    batch: Positive = 128
    picture_every_steps: Often = None
    picture_images: Positive = 4


class ClassifyOptions(Section):
    """What rcmae.finetune and rcmae.probe train; nothing else reads it.

    Evaluation is on evaluate.test_shards.
    """

    # a run's or a checkpoint's folder, or a file of weights; None: weights of run.seed
    init: Place | None = None
    # whose weights; None: the teacher's where there is one
    network: Literal["student", "teacher"] | None = None
    num_classes: Positive | None = None  # None: one more than the largest label of data.shards
    class_names: Place | None = None  # a text file, a name a line, for tables and pictures
    pool: Literal["cls", "mean"] = "mean"
    depth: Positive | None = None  # of a probe: features after this block; None: after the last
    rule: Literal["adamw", "lars", "sgd"] = "adamw"
    # lr of a layer over that of the one above it
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    # at the last block; grows from 0 at the first
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mixup: Annotated[float, Field(ge=0)] = 0.0  # parameter of the beta distribution; 0: never
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    mix_probability: Fraction = 1.0  # of a step
    mix_switch: Fraction = 0.5  # CutMix's share of mixed steps
    rand_augment: str | None = None  # timm's policy, such as rand-m9-mstd0.5-inc1
    erase: Fraction = 0.0  # of the images
    # keep a moving average of the classifier by the section teacher, and evaluate it too
    average: bool = False


class LogOptions(Section):
    """What is written while training."""

    every_steps: Often = 20
    tensorboard: bool = True


class RunOptions(Section):
    """Where the run lives."""

    dir: Place | None = None  # default: runs/<name>
    name: str | None = None  # default: the recipe's
    seed: Natural = 0  # initial weights and stochastic rounding
    stop_after_steps: Positive | None = None  # this many steps in this job, then commit and exit 75
    # of this job, from its start; SLURM's end is known anyway
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    # a job that gives no sign this long has lost the run
    lease_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    # how long to wait for a job that trains here and is alive
    lease_wait_s: Annotated[float, Field(ge=0)] = 120.0
