"""The sections of a recipe: every setting with its default and its unit.

A field belongs to one owner; components are built from values, never from the recipe itself.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

from rcmae.errors import Refused

RECIPES = Path(__file__).parents[1] / "recipes"

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
# a path: ~ is the user's home


def _at_home(path: str) -> str:
    """A path with the home folder in the place of ~. Raises Refused where there is none."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise Refused(
            "no home folder is known of this user; set HOME, or give the whole path "
            f"(./{path} for a folder of this name)"
        )
    if re.match(r"[$]([A-Za-z_]|{)", expanded):
        raise Refused(
            f"variables of a shell stay as they are here; give the path (./{path} for a folder of "
            "this name)"
        )
    return expanded


def _here(path: str) -> str:
    """A path on a file system of this machine; that of a `file://` URL. Raises Refused."""
    path = path.removeprefix("file://")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
        raise Refused(
            "a URL is no place here (a folder of that name would be made); give a path, of a file "
            "system that all nodes share where several nodes use it. Shards and data.index may "
            "be URLs"
        )
    return path


PlaceOrUrl = Annotated[str, Field(min_length=1), AfterValidator(_at_home)]
Place = Annotated[str, Field(min_length=1), AfterValidator(_here), AfterValidator(_at_home)]
Positive = Annotated[int, Strict(), Field(ge=1)]  # strict: not true, nor "8"
Natural = Annotated[int, Strict(), Field(ge=0)]


def _never(value: Any) -> Any:
    """0 as None."""
    return None if type(value) is int and value == 0 else value


# every so many steps; None, or 0 in a recipe: never
Often = Annotated[Positive | None, BeforeValidator(_never)]


class Section(BaseModel):
    """A section of the recipe. Unknown keys are refused; values are frozen."""

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
    """Options of a task of your own."""


class ModelOptions(Section):
    """The student network. `name` gives the sizes; each can be overridden."""

    name: str = "vit_small_patch16"
    """Sizes of a published network, such as vit_base_patch16; the keys below override them."""
    image_size: Positive | tuple[Positive, Positive] = 224
    """Input size in pixels: one side, or (height, width)."""
    in_channels: Positive = 3
    """Image channels."""
    patch_size: Positive | None = None
    """Side of a patch, in pixels. null: that of `name`."""
    embed_dim: Positive | None = None
    """Encoder width. null: that of `name`."""
    depth: Positive | None = None
    """Encoder blocks. null: those of `name`."""
    num_heads: Positive | None = None
    """Attention heads of the encoder. null: those of `name`."""
    decoder_dim: Positive | None = None
    """Decoder width. null: that of `name`."""
    decoder_depth: Positive | None = None
    """Decoder blocks. null: those of `name`."""
    decoder_heads: Positive | None = None
    """Attention heads of the decoder. null: those of `name`."""
    decoder: Literal["mae", "bootmae"] | None = None
    """mae: one decoder; bootmae: one regressor per target. null: the objective's."""
    cls_token: bool = True
    """Whether the encoder has class tokens."""
    class_tokens: Positive = 1
    """Number of class tokens, if there are any."""
    registers: Natural = 0
    """Register tokens: extra tokens that neither features nor the decoder use."""
    decoder_cls: bool = True
    """Whether the class tokens also pass through the decoder."""
    qkv_bias: Literal["qkv", "qv"] = "qkv"
    """Biases of the attention: queries, keys and values (qkv), or without keys (qv)."""
    position_table: Literal["sincos", "learned"] = "sincos"
    """Position table of encoder and decoder: fixed sines and cosines, or learned parameters (class
    tokens included).
    """
    positions: Literal["column_first", "row_first"] = "column_first"
    """Which axis fills the first half of the sin-cos position table."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Drop path rate of the encoder's last block in pretraining; it grows linearly from 0 at the
    first.
    """
    pixel_order: Literal["hwc", "chw"] = "hwc"
    """Order of a patch's pixels in the prediction."""
    num_classes: Positive = 1000
    """Classes of the class term."""
    class_hidden: Natural = 3072
    """Width of the class head's hidden layer; 0: one linear layer."""
    class_pool: Literal["mean", "cls"] = "mean"
    """What the class head sees: the mean of the patches, or the class token."""
    low_layer: Natural = 0
    """Encoder block that feeds bootmae's pixel regressor."""
    high_layer: Natural | None = None
    """Encoder block that feeds bootmae's feature regressor. null: the last."""

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
    """Momentum of the average at the first step."""
    momentum_end: Fraction = 1.0
    """Momentum of the average at the end of the schedule."""
    schedule: Literal["cosine", "constant", "published", "by_epoch"] = "cosine"
    """How the momentum moves between the two. published: as for the released weights."""
    dynamic: bool = True
    """With by_epoch: rise to 0.99999 after epoch 100."""
    accumulate: Literal["fp32_shard", "stochastic"] = "fp32_shard"
    """How the average is stored: in fp32 shards, or in bf16 alone with stochastic rounding."""
    update: Literal["step", "micro_step"] = "step"
    """When the average is updated: at each step, or at each micro-batch."""


class EngineOptions(Section):
    """What updates the weights, and in which precision they compute."""

    name: Literal["local", "ddp", "deepspeed", "fsdp2"] = "local"
    """local: one process. On all ranks: ddp, fsdp2: PyTorch's; deepspeed: its ZeRO."""
    shard_ranks: Positive | None = None
    """Neighbouring ranks that share shards; others have copies. ddp shards fp32 weights, moments
    and the average (null: nothing); fsdp2 everything (null: over all ranks).
    """
    config: Place | None = None
    """DeepSpeed's JSON: a path, or the name of one in ds_configs/."""
    tf32: bool = False
    """Multiply fp32 matrices in TF32 on NVIDIA GPUs: three digits instead of seven, faster."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where every rank's device multiplies it in hardware (CUDA capability 8.0 or above;
    CPUs with AVX512-BF16 or AMX), else fp32.
    """
    activation_checkpointing: Literal["none", "torch", "fairscale", "fairscale_offload"] = "none"
    """Recompute activations in the backward pass: less memory, slower."""
    compile: bool | Literal["auto"] = False
    """Compile each block with torch.compile, a graph for each shape. auto: on GPUs, but not under
    ZeRO-3.
    """
    layer_norm: Literal["torch", "apex"] = "torch"
    """Implementation of layer norm; apex needs NVIDIA's build."""
    optimizer: Literal["torch", "apex"] = "torch"
    """Implementation of AdamW; apex needs NVIDIA's build."""
    timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """Timeout of a collective. When a peer does not join, every rank ends and names it. Keep it
    above the longest wait for one rank: writing a checkpoint, indexing shards.
    """


class WeightedShards(Section):
    """One set of a mixture."""

    shards: str | list[str]
    """A pattern, or a list of them."""
    weight: Annotated[float, Field(gt=0)]
    """Its share of an epoch, relative to the other sets."""


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
    index: PlaceOrUrl | None = None
    """Folder of the shards' index, if it is not beside them; a path or a URL."""
    cache_dir: Place | None = None
    """For remote shards, on each node's disk; null: of this user, in $TMPDIR."""
    cache_gb: Annotated[float, Field(gt=0)] = 100.0
    """Size limit of the cache in GB (10^9 bytes), over all jobs that share it."""
    source_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Timeout of a request for 8 MiB of a remote shard."""
    source_attempts: Positive = 8
    """Failed requests in a row that end the run."""
    workers: Natural = 4
    """Decoding processes per rank; 0: decode in the rank itself."""
    seed: Natural = 0
    """Seed of the sample order, crops, flips and masks."""
    epoch_samples: Positive | None = None
    """Samples per epoch. null: all samples of the shards."""
    canonical_streams: Positive | None = None
    """Canonical streams: the parts of an epoch that are read side by side, sample by sample in
    turn. Their number is fixed at the first start, so that the order of samples does not depend on
    the number of ranks. null: 256, fewer where each would have fewer than 512 samples per epoch,
    raised to a multiple of the ranks.
    """
    shuffle_window: Positive = 4096
    """Samples that are shuffled together within a stream. A shorter stream is shuffled whole."""
    repeats: Positive = 1
    """Crops and masks drawn per decoded image, in the same batch: less to read and decode."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of the crop, as a fraction of the image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of the crop, width over height."""
    flip: Fraction = 0.5
    """Probability that an image is mirrored."""
    decode_margin: Annotated[float, Field(ge=1)] = 2.5
    """Decode a JPEG at 1/2, 1/4 or 1/8 of its size while the crop keeps this multiple of the
    target's side; .inf: always at full size. Below 2.5 it is faster and less exact: the PSNR to a
    full-size decode may fall below 45 dB.
    """
    decode: Literal["cpu", "gpu", "auto"] = "cpu"
    """Who decodes JPEGs: the workers, or the GPU (nvJPEG, whose pixels differ in their last bits);
    auto: the GPU where it can. Where it cannot the workers do, with a warning under gpu.
    """
    resize: Literal["workers", "device"] = "workers"
    """Who resizes and flips the decoded crops: the workers, or the device that trains, which rounds
    once instead of twice (56 dB to the workers'). Of photographs of about 500 pixels the workers
    then make a quarter more; of large ones they make fewer, since a crop travels at the size it was
    decoded to, up to twice decode_margin times the target's side.
    """
    max_pixels: Positive = 100_000_000
    """Larger images are bad samples, refused before they take memory (up to 15 bytes a pixel)."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean per channel, subtracted; for pixels from 0 to 1."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation per channel, divided by; for pixels from 0 to 1."""
    max_bad_fraction: Fraction = 0.001
    """Share of unreadable samples above which the run stops."""
    max_bad_in_a_row: Positive = 100
    """Unreadable samples in a row above which the run stops."""


class BatchOptions(Section):
    """Images per optimizer step over all ranks, and how many a rank takes at once."""

    images: Positive = 4096
    """Images per optimizer step, over all ranks."""
    per_device: Positive | None = None
    """Largest micro-batch of a rank; the largest divisor that fits is used. null: no limit."""


class ScheduleOptions(Section):
    """Length and learning rate. Give `epochs` or `steps`, `base_lr` or `lr`."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Length of the training in epochs; or give steps."""
    steps: Positive | None = None
    """Length of the training in steps; or give epochs."""
    warmup_epochs: Annotated[float, Field(ge=0)] | None = None
    """Linear warm-up of the learning rate; or give warmup_steps."""
    warmup_steps: Natural | None = None
    """Linear warm-up of the learning rate; or give warmup_epochs."""
    base_lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate per 256 images: lr = base_lr x batch.images / 256."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate; or give base_lr."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the schedule."""
    shape: Literal["cosine", "poly", "steps", "wsd"] = "cosine"
    """cosine: half a cosine to min_lr. poly: (1 - done)^power. steps: divided by 10 at each
    milestone. wsd: constant, then falls to min_lr over the cooldown.
    """
    power: Annotated[float, Field(gt=0)] = 1.0
    """Exponent of poly."""
    milestones: list[Fraction] = Field(default_factory=list)
    """Milestones of steps, as fractions of the training."""
    cooldown: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Cooldown of wsd, as a fraction of the training after the warm-up; or give cooldown_steps."""
    cooldown_steps: Positive | None = None
    """Cooldown of wsd in steps. null: by cooldown."""
    cooldown_shape: Literal["linear", "1-sqrt"] = "linear"
    """How the learning rate falls in the cooldown of wsd."""
    warmup: Literal["multiply", "to_schedule"] | None = None
    """null: the shape begins after the warm-up. multiply: the warm-up is a factor on the falling
    rate. to_schedule: linear to the value that the shape has at the end of the warm-up.
    """
    warmup_from: Fraction = 0.0
    """Learning rate of the first step, as a fraction of the peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """AdamW's decoupled weight decay; biases and norms have none."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's decay rates of the gradient and its square."""
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    """Clip the gradient to this global L2 norm. null: no clipping."""


class CheckpointOptions(Section):
    """When checkpoints are committed, and what a run resumes or starts from."""

    every_steps: Often = 1000
    """Commit a checkpoint every so many steps; 0: never."""
    every_minutes: Annotated[float, Field(gt=0)] | None = None
    """Commit a checkpoint every so many minutes, too."""
    keep: Positive = 2
    """Newest checkpoints that are kept, at least two."""
    keep_every: Often = None
    """Also keep every checkpoint whose step is a multiple of this."""
    resume: Place = "auto"
    """auto, never, must, or a checkpoint's folder to start a new run from."""
    init: Place | None = None
    """Weights that a new pretraining starts from: a run, a checkpoint or a file of any family."""
    init_decoder: Literal["file", "fresh"] = "file"
    """fresh: load the encoder alone and initialise the decoder."""
    background: bool = True
    """Write checkpoints in the background, while training continues."""
    allow: list[str] = Field(default_factory=list)
    """Frozen keys that this job may override."""


class GuardOptions(Section):
    """What to do about a loss or gradient that is not finite, or a loss that
    jumps.
    """

    action: Literal["stop", "skip", "rewind"] = "stop"
    """Stop the run, skip the update, or rewind to a checkpoint and skip these samples."""
    max_skips: Natural = 10
    """Of the run; then stop."""
    max_rewinds: Natural = 3
    """Of the run; then stop."""
    spike_factor: Annotated[float, Field(gt=0)] | None = None
    """Standard deviations above the recent median that count as a jump. Costs an all-reduce a
    step.
    """
    spike_window: Annotated[int, Field(ge=16)] = 64
    """Recent steps for that median and deviation."""
    drill_nan_position: Natural | None = None
    """For drills: put a NaN into the image at this position of the run."""


class ClassifyOptions(Section):
    """What rcmae.finetune and rcmae.probe train; nothing else reads it.

    Evaluation is on evaluate.test_shards.
    """

    init: Place | None = None
    """Run, checkpoint or file of weights to start from. null: random weights of run.seed."""
    network: Literal["student", "teacher"] | None = None
    """Network to take. null: the teacher, if there is one."""
    follow: bool = False
    """What the recipe does not give follows: network, image size and statistics from init; batch,
    engine and evaluations from the set and the ranks.
    """
    num_classes: Positive | None = None
    """Number of classes. null: one more than the largest label of data.shards."""
    class_names: Place | None = None
    """Text file with one class name per line, for tables and pictures."""
    pool: Literal["cls", "mean"] = "mean"
    """Features that the head sees: the class token, or the mean of the patches."""
    depth: Positive | None = None
    """Block whose output a probe reads. null: the last."""
    rule: Literal["adamw", "lars", "sgd"] = "adamw"
    """Optimizer of a probe's head; fine-tuning uses adamw."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of a layer, relative to the layer above."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Drop path rate of the last block; it grows linearly from 0 at the first."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Mixup's alpha of the beta distribution; 0: no mixup."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """CutMix's alpha of the beta distribution; 0: no CutMix."""
    mix_probability: Fraction = 1.0
    """Probability that a step mixes its images."""
    mix_switch: Fraction = 0.5
    """Probability that a mixed step uses CutMix."""
    rand_augment: str | None = None
    """Timm's policy, such as rand-m9-mstd0.5-inc1."""
    erase: Fraction = 0.0
    """Probability that a part of an image is erased."""
    average: bool = False
    """Keep a moving average of the classifier (section `teacher`) and evaluate it, too."""


class LogOptions(Section):
    """What is written while training."""

    every_steps: Often = 20
    """Log every so many steps and the last; 0: never."""
    tensorboard: bool = True
    """Write curves and pictures for TensorBoard."""
    report: bool = True
    """Keep run.dir/report.html, the run on one page: anew at each evaluation and at the end."""
    trackers: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()
    """Trackers that also show the run: each committed step once, even after kills and requeues."""


class RunOptions(Section):
    """The run's folder, seed and limits."""

    dir: Place | None = None
    """Folder of the run. null: runs/<name>."""
    name: str | None = None
    """Name of the run. null: the recipe's."""
    seed: Natural = 0
    """Seed of the initial weights and of stochastic rounding."""
    stop_after_steps: Positive | None = None
    """Stop after this many steps of this job: commit and exit with 75."""
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    """Time limit of this job from its start. SLURM's time limit is read by itself."""
    lease_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """A job that shows no sign of life for this long loses the run's lease to the next one."""
    lease_wait_s: Annotated[float, Field(ge=0)] = 120.0
    """How long to wait for a running job to release the run's lease."""
