"""The recipe: one typed tree of every setting, read from YAML and `key=value`, checked whole,
resolved once.

`load()` gives a `Recipe` or one ValueError that names every problem. `resolve()` derives the
numbers that depend on the world and the data (per-device batch, accumulation, steps, learning rate)
and nothing else computes them again. A field belongs to one owner; components are built from
values, never from the recipe itself."""

from __future__ import annotations

import difflib
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, Strict
from pydantic_core import InitErrorDetails, PydanticCustomError

from rcmae import plugins
from rcmae.errors import Refused

RECIPES = Path(__file__).parent / "recipes"

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Strict(), Field(ge=1)]  # strict: not true, nor "8"
Natural = Annotated[int, Strict(), Field(ge=0)]


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, values are checked when assigned."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())


class Reads(NamedTuple):
    """Outputs of the networks that a loss reads, by the names of `models.protocol.Output`."""

    student: tuple[str, ...] = ("pixels",)
    teacher: tuple[str, ...] = ()  # none: it has no teacher


class ObjectiveOptions(Section):
    """What the student is asked to do.

    A recipe's section has these keys, those of the named objective and those of the terms that are
    added to it: its class is made of all their classes (`objective_class`).
    """

    name: str = "rcmae"  # of a shipped objective, or MODULE:NAME
    # terms to add and their weights, such as {class: 0.01} to rcmae
    terms: dict[str, Annotated[float, Field(ge=0.0)]] = Field(default_factory=dict)
    mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.75
    # boxes: BEiT's, with single patches up to mask_ratio
    mask: Literal["random", "boxes"] = "random"
    mask_shared: Literal["image", "step"] = "image"  # who has the same mask
    box_ratio: Fraction = 0.62  # share of the patches that boxes hide
    box_smallest: Positive = 16  # patches
    box_largest: Positive = 60  # patches

    @property
    def own(self) -> BaseModel:
        """What the named objective is made with: this section, or its `options`."""
        options = getattr(self, "options", None)
        return options if isinstance(options, BaseModel) else self

    @property
    def student_outputs(self) -> tuple[str, ...]:
        """Outputs of the student that the loss reads, by the names of `models.protocol.Output`."""
        found = set(getattr(self.own, "reads", Reads()).student)
        for term in self.terms:
            found.update(shipped().terms[term].reads.student)
        return tuple(sorted(found))

    @property
    def teacher_outputs(self) -> tuple[str, ...]:
        """Outputs of the teacher that the loss reads; none: it has no teacher."""
        found = set(getattr(self.own, "reads", Reads()).teacher)
        for term in self.terms:
            found.update(shipped().terms[term].reads.teacher)
        return tuple(sorted(found))

    @property
    def own_decoder(self) -> str:
        """The decoder that the objective comes with, a value of model.decoder."""
        return str(getattr(self.own, "decoder", "mae"))

    @property
    def teacher_sees(self) -> str:
        """The patches that the teacher sees: the "same" as the student, or "different" ones."""
        return str(getattr(self, "teacher_mask", "same"))

    @property
    def teacher_parts(self) -> tuple[str, ...]:
        """Parts of the student that its teacher has: none, the encoder, or the decoder, too."""
        if "pixels" in self.teacher_outputs:
            return ("encoder", "decoder")
        return ("encoder",) if self.teacher_outputs else ()


class OwnOptions(Section):
    """Options of one objective, or of one term that can be added to others."""

    reads: ClassVar[Reads] = Reads()
    decoder: ClassVar[str] = "mae"  # that the objective comes with, a value of model.decoder


@dataclass(frozen=True, eq=False)
class Catalogue:
    """The shipped objectives and terms by name, with the class of each one's options."""

    objectives: Mapping[str, type[OwnOptions]]
    terms: Mapping[str, type[OwnOptions]]


def shipped() -> Catalogue:
    """The catalogue of this package, found by name: those who have it stand above this module."""
    catalogue = plugins.find("rcmae.objectives:CATALOGUE", key="objective.name")
    assert isinstance(catalogue, Catalogue)
    return catalogue


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
    config: str | None = None  # DeepSpeed's JSON: a path, or the name of one in ds_configs/
    precision: Literal["fp32", "bf16"] = "bf16"
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
    index: str | None = None
    # for shards from elsewhere, on each node's disk; None: of this user, in $TMPDIR
    cache_dir: str | None = None
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
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    clip_grad: Annotated[float, Field(gt=0)] | None = None  # global L2 norm


class CheckpointOptions(Section):
    """When the run is committed, and from what it goes on."""

    every_steps: Positive | None = 1000
    every_minutes: Annotated[float, Field(gt=0)] | None = None
    keep: Positive = 2  # newest ones; two stay at least
    keep_every: Positive | None = None  # one of every so many steps stays for good
    resume: str = "auto"  # auto | never | must | a checkpoint's folder, to start a new run from
    # a new pretraining starts from these weights: a run, a checkpoint or a file of any family
    init: str | None = None
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

    every_steps: Positive | None = None
    train_shards: str | list[str] = Field(default_factory=list)
    test_shards: str | list[str] = Field(default_factory=list)
    k: list[Positive] = [20]
    temperature: Annotated[float, Field(gt=0)] = 0.07
    # also logistic regression on the same features: slower, and nearer to a linear probe
    logistic: bool = False
    pool: Literal["cls", "mean"] = "mean"
    batch: Positive = 128
    picture_every_steps: Positive | None = None
    picture_images: Positive = 4


class ClassifyOptions(Section):
    """What rcmae.finetune and rcmae.probe train; nothing else reads it.

    Evaluation is on evaluate.test_shards.
    """

    # a run's or a checkpoint's folder, or a file of weights; None: weights of run.seed
    init: str | None = None
    # whose weights; None: the teacher's where there is one
    network: Literal["student", "teacher"] | None = None
    num_classes: Positive | None = None  # None: one more than the largest label of data.shards
    class_names: str | None = None  # a text file, a name a line, for tables and pictures
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


CLASSIFYING = ("finetune", "probe")  # values of objective.name, and modules that train them


class LogOptions(Section):
    """What is written while training."""

    every_steps: Positive = 20
    tensorboard: bool = True


class RunOptions(Section):
    """Where the run lives."""

    dir: str | None = None  # default: runs/<name>
    name: str | None = None  # default: the recipe's
    seed: Natural = 0  # initial weights and stochastic rounding
    stop_after_steps: Positive | None = None  # this many steps in this job, then commit and exit 75
    # of this job, from its start; SLURM's end is known anyway
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    # a job that gives no sign this long has lost the run
    lease_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    # how long to wait for a job that trains here and is alive
    lease_wait_s: Annotated[float, Field(ge=0)] = 120.0


class NoOptions(OwnOptions):
    """Of an objective that a task brings along, or of one that has none."""

    reads: ClassVar[Reads] = Reads(student=())


def objective_class(
    section: Mapping[str, Any], catalogue: Catalogue | None = None
) -> type[ObjectiveOptions]:
    """The class of a section `objective`: the common keys, and those of what it names.

    Raises:
        pydantic.ValidationError: no such objective, at `name`.
    """
    name = section.get("name", ObjectiveOptions.model_fields["name"].default)
    terms = section.get("terms")
    named = sorted(map(str, terms)) if isinstance(terms, Mapping) else []
    try:
        return _objective_class(str(name), tuple(named), catalogue or shipped())
    except Refused as error:
        told = PydanticCustomError("refused", "{why}", {"why": str(error)})
        details = InitErrorDetails(type=told, loc=("name",), input=name)
        raise pydantic.ValidationError.from_exception_data("objective", [details]) from error


@functools.cache
def _objective_class(
    name: str, terms: tuple[str, ...], catalogue: Catalogue
) -> type[ObjectiveOptions]:
    known = [*catalogue.objectives, *CLASSIFYING]
    bases: list[type[BaseModel]] = [
        catalogue.terms[term] for term in terms if term in catalogue.terms
    ]
    addable: Any = Literal[tuple(catalogue.terms)]
    weights = dict[addable, Annotated[float, Field(ge=0.0)]]
    fields: dict[str, Any] = {"terms": (weights, Field(default_factory=dict))}
    if plugins.is_plugin(name):
        options = _strict(getattr(plugins.find(name, key="objective.name"), "Options", OwnOptions))
        fields["options"] = (options, Field(default_factory=dict, validate_default=True))
    elif name in known:
        bases.insert(0, catalogue.objectives.get(name, NoOptions))
    else:
        hint = _did_you_mean(name, known)
        raise Refused(f"objective.name: unknown objective {name!r}; {hint}, or give MODULE:NAME")
    made: Any = pydantic.create_model(
        "ObjectiveOptions", __base__=(*bases, ObjectiveOptions), __doc__=None, **fields
    )
    return made


def _strict(options: type[BaseModel]) -> type[BaseModel]:
    """The same options, unknown ones refused."""
    refusing = pydantic.ConfigDict(extra="forbid")
    return type(options.__name__, (options,), {"model_config": refusing, "__module__": __name__})


def _read_objective(
    value: Any, read: pydantic.ValidatorFunctionWrapHandler, info: pydantic.ValidationInfo
) -> ObjectiveOptions:
    """The section of a recipe, of the class that its name and terms ask for."""
    name = value.get("name", "") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(name, str):
        section: ObjectiveOptions = read(value)
        return section
    context = info.context or {}
    catalogue = context.get("objectives") or shipped()
    kind = objective_class(value, catalogue)
    mine = dict(value)
    for key, options in _foreign(value, kind, catalogue).items():
        if context.get("stored") or mine[key] == options.model_fields[key].get_default():
            del mine[key]
    return kind.model_validate(mine)


def _foreign(
    section: Mapping[str, Any], kind: type[ObjectiveOptions], catalogue: Catalogue
) -> dict[str, type[OwnOptions]]:
    """Keys of a section that are other objectives', or of terms that are not added, and whose."""
    found = {}
    for options in (*catalogue.objectives.values(), *catalogue.terms.values()):
        for key in options.model_fields:
            if key in section and key not in kind.model_fields:
                found[key] = options
    return found


class Recipe(Section):
    """Everything a run depends on."""

    objective: Annotated[
        ObjectiveOptions, SerializeAsAny(), pydantic.WrapValidator(_read_objective)
    ] = Field(default_factory=dict, validate_default=True)
    model: ModelOptions = Field(default_factory=ModelOptions)
    teacher: TeacherOptions = Field(default_factory=TeacherOptions)
    engine: EngineOptions = Field(default_factory=EngineOptions)
    data: DataOptions = Field(default_factory=DataOptions)
    batch: BatchOptions = Field(default_factory=BatchOptions)
    schedule: ScheduleOptions = Field(default_factory=ScheduleOptions)
    checkpoint: CheckpointOptions = Field(default_factory=CheckpointOptions)
    guard: GuardOptions = Field(default_factory=GuardOptions)
    evaluate: EvaluateOptions = Field(default_factory=EvaluateOptions)
    classify: ClassifyOptions = Field(default_factory=ClassifyOptions)
    log: LogOptions = Field(default_factory=LogOptions)
    run: RunOptions = Field(default_factory=RunOptions)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to other ranks as values: the class of the objective section is made anew."""
        return stored, (self.model_dump(mode="json"),)

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        assert self.run.dir is not None, "load() names the run"
        return Path(self.run.dir)

    @property
    def decoder(self) -> str:
        """The student's decoder: model.decoder, else as the objective has it."""
        return self.model.decoder or self.objective.own_decoder


# What makes two runs the same training. A resume may change anything else (engine, ranks, workers,
# logging, ...). data.shards is not here: the fingerprint of the index is compared instead, so
# shards may move to another disk.
FROZEN = (
    "objective",
    "model",
    "teacher",
    "schedule",
    "batch.images",
    "run.seed",
    "data.seed",
    "data.epoch_samples",
    "data.canonical_streams",
    "data.shuffle_window",
    "data.repeats",
    "data.crop_scale",
    "data.crop_ratio",
    "data.flip",
    "data.decode_margin",
    "data.decode",
    "data.mean",
    "data.std",
)


def stored(tree: Mapping[str, Any]) -> Recipe:
    """The recipe of a run's folder or a checkpoint, of this version or one before.

    Keys of objectives that the run does not train are left out: once, every recipe had all of them.

    Raises:
        pydantic.ValidationError: it is no recipe.
    """
    return Recipe.model_validate(tree, context={"stored": True})


def differences(mine: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Lines `key: saved -> mine` for every frozen key that differs between two dumped recipes."""
    left = dict(_leaves(mine))
    right = _leaves_with_defaults(saved)
    allowed = left.get("checkpoint.allow") or []
    frozen = list(FROZEN)
    if left.get("objective.name") in CLASSIFYING:
        frozen += [f"classify.{key}" for key in ClassifyOptions.model_fields]
        frozen.remove("classify.class_names")
    lines = []
    for key in sorted(left.keys() | right.keys()):
        if not _is_under(key, frozen) or _is_under(key, allowed):
            continue
        if key == "data.canonical_streams" and left.get(key) is None:
            continue
        if _is_of_one_objective(key, left, right):
            continue
        if _plain(left.get(key)) != _plain(right.get(key)):
            lines.append(f"{key}: {right.get(key)!r} in the run, {left.get(key)!r} asked for")
    return lines


def _leaves_with_defaults(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a dumped recipe, with the default where it is from before a key was there.

    Without keys of objectives that it does not train.
    """
    section = saved.get("objective", {})
    kind = objective_class(section)
    catalogue = shipped()
    defaults = Recipe().model_dump(mode="json")
    defaults["objective"] = {
        key: field.get_default(call_default_factory=True)
        for key, field in kind.model_fields.items()
        if key != "options"
    }
    foreign = _foreign(section, kind, catalogue)
    told = {key: value for key, value in section.items() if key not in foreign}
    return {**dict(_leaves(defaults)), **dict(_leaves({**saved, "objective": told}))}


def _is_of_one_objective(key: str, left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether a key is an option that one of two objectives lacks: then their names or terms
    differ, which is said.
    """
    section, _, name = key.partition(".")
    if section != "objective" or (key in left and key in right):
        return False
    return name.partition(".")[0] not in ObjectiveOptions.model_fields


def _is_under(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in names)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """A copy of the recipe with other values: `section.key` -> value."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    changed = {
        section: getattr(recipe, section).model_copy(update=keys)
        for section, keys in sections.items()
    }
    return recipe.model_copy(update=changed)


def module_of(recipe: Recipe) -> str:
    """The module that trains a recipe, as in `python -m rcmae.train`."""
    name = recipe.objective.name
    return f"rcmae.{name}" if name in CLASSIFYING else "rcmae.train"


# --------------------------------------------------------------------------------------------- load


def recipe_path(name: str) -> Path:
    """The file of a recipe given by path or by the name of a shipped one.

    Raises:
        ValueError: there is no such file, with the shipped names.
    """
    for candidate in (Path(name), RECIPES / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    shipped = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    raise Refused(
        f"no recipe {name!r}: it is no file, and the shipped ones are {', '.join(shipped)}"
    )


def load(
    name: str, overrides: Sequence[str] = (), *, objectives: Catalogue | None = None
) -> Recipe:
    """The recipe of a file with `key=value` set over it.

    Args:
        name: a path or a shipped recipe's name.
        overrides: `section.key=value`, values in YAML.
        objectives: what `objective.name` may be and which keys belong to it; None: as shipped.

    Raises:
        Refused: one message that names every problem.
    """
    path = recipe_path(name)
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refused(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise Refused(f"{path}: a recipe is a mapping of sections, got {type(tree).__name__}")
    problems = _override(tree, overrides)
    recipe, more = _parse(tree, objectives or shipped())
    problems += more
    if recipe is not None:
        recipe.run.name = recipe.run.name or path.stem
        recipe.run.dir = recipe.run.dir or f"runs/{recipe.run.name}"
        problems += _contradictions(recipe)
    if problems or recipe is None:
        raise Refused(f"{path}:\n" + "\n".join(f"  {problem}" for problem in problems))
    return recipe


def _override(tree: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    problems = []
    for item in overrides:
        key, equals, text = item.partition("=")
        *sections, last = key.split(".")
        if not equals or not last:
            problems.append(f"{item!r} is no key=value")
            continue
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            problems.append(f"{item!r}: the value is not YAML")
            continue
        node = tree
        for section in sections:
            if not isinstance(node.get(section), dict):
                node[section] = {}
            node = node[section]
        node[last] = value
    return problems


def _parse(tree: Mapping[str, Any], catalogue: Catalogue) -> tuple[Recipe | None, list[str]]:
    try:
        return Recipe.model_validate(tree, context={"objectives": catalogue}), []
    except pydantic.ValidationError as error:
        lines: dict[str, str] = {}  # one line a key, though each branch of a union complains
        for item in error.errors():
            place = [str(part) for part in item["loc"]]
            key = ".".join(place[: 3 if place[:2] == ["objective", "options"] else 2])
            if item["type"] == "refused":
                lines[key] = item["msg"]
            elif item["type"] == "extra_forbidden":
                lines[".".join(place)] = _unknown(place, tree, catalogue)
            elif key == "data.shards":
                lines[key] = (
                    f"{key}: wants a pattern, a list of patterns, or, for a mixture, a list "
                    f"of {{shards: PATTERN, "
                    f"weight: above 0}}, got {tree['data']['shards']!r}"
                )
            elif key in lines:
                lines[key] += f", or {item['msg'].lower()}"
            else:
                told = f"{item['msg'][0].lower()}{item['msg'][1:]}"
                lines[key] = f"{key}: {told}, got {item['input']!r}"
        return None, list(lines.values())


def _unknown(place: Sequence[str], tree: Mapping[str, Any], catalogue: Catalogue) -> str:
    """What to say of a key that is nobody's, or another objective's."""
    key = place[-1]
    section = tree.get("objective")
    if len(place) == 2 and place[0] == "objective" and isinstance(section, Mapping):
        owners = [name for name, each in catalogue.objectives.items() if key in each.model_fields]
        for name, each in catalogue.terms.items():
            if key in each.model_fields:
                owners.append(f"the term {name}")
        if owners:
            name = section.get("name", ObjectiveOptions.model_fields["name"].default)
            others = ", ".join(owners[:-1])
            whose = f"{others} and {owners[-1]}" if others else owners[-1]
            return f"objective.{key} is of {whose}, and without effect in {name}; leave it out"
    named = ".".join(part for part in place[:-1] if "[" not in part)  # not the branch of a union
    hint = _did_you_mean(key, _known_keys(place[:-1], section))
    return f"unknown key {key!r}{f' in {named}' if named else ''}; {hint}"


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def _known_keys(place: Sequence[str], objective: Any = None) -> list[str]:
    """The keys of a place in the recipe; `objective`: that section, whose keys depend on it."""
    fields = Recipe.model_fields
    for part in place:
        if part not in fields:  # a branch of a union, or a place in a list
            fields = next(
                (each.model_fields for each in Section.__subclasses__() if each.__name__ in part),
                fields,
            )
            continue
        section = fields[part].annotation
        if section is ObjectiveOptions:
            section = objective_class(objective if isinstance(objective, Mapping) else {})
        if isinstance(section, type) and issubclass(section, BaseModel):
            fields = section.model_fields
    return list(fields)


def _contradictions(recipe: Recipe) -> list[str]:
    """Problems between keys that need neither the ranks nor the data to be seen."""
    problems = _schedule_problems(recipe.schedule)
    problems += _allow_problems(recipe)
    problems += _data_problems(recipe)
    if recipe.objective.name in CLASSIFYING:
        problems += _classifying_problems(recipe)
    elif recipe.evaluate.every_steps and not (
        recipe.evaluate.train_shards and recipe.evaluate.test_shards
    ):
        problems.append(
            "evaluate.every_steps is set: give evaluate.train_shards and test_shards, both labelled"
        )
    if recipe.engine.name == "deepspeed" and recipe.engine.config is None:
        problems.append("engine.config: DeepSpeed needs its JSON, such as engine.config=zero2.json")
    if recipe.engine.name != "deepspeed" and recipe.engine.config is not None:
        problems.append(
            f"engine.config={recipe.engine.config} is DeepSpeed's, but "
            f"engine.name={recipe.engine.name}"
        )
    problems += _objective_problems(recipe)
    if recipe.teacher.accumulate == "stochastic" and recipe.engine.precision != "bf16":
        problems.append(
            "teacher.accumulate=stochastic rounds to bf16: set engine.precision=bf16, or use "
            "fp32_shard"
        )
    return problems


def _schedule_problems(schedule: ScheduleOptions) -> list[str]:
    """Lengths and rates that are given twice, or not at all."""
    problems = []
    for one, other in (("epochs", "steps"), ("base_lr", "lr")):
        given = [name for name in (one, other) if getattr(schedule, name) is not None]
        if len(given) != 1:
            way_out = f"; schedule.{one}=null leaves out the recipe's" if len(given) == 2 else ""
            problems.append(
                f"schedule: give exactly one of {one} and {other}, got "
                f"{' and '.join(given) or 'neither'}{way_out}"
            )
    if schedule.warmup_epochs is not None and schedule.warmup_steps is not None:
        problems.append("schedule: give warmup_epochs or warmup_steps, got both")
    return problems


def _allow_problems(recipe: Recipe) -> list[str]:
    """Keys of checkpoint.allow that are none, or may not change."""
    problems = []
    sections = list(Recipe.model_fields)
    for key in recipe.checkpoint.allow:
        section, dot, name = key.partition(".")
        if section == "model":
            problems.append(
                f"checkpoint.allow: {key} cannot change within a run, the weights would be others'"
            )
        elif section not in sections:
            problems.append(
                f"checkpoint.allow: unknown section {section!r}; {_did_you_mean(section, sections)}"
            )
        elif dot and name not in (known := _known_keys([section], dict(recipe.objective))):
            problems.append(f"checkpoint.allow: unknown key {key!r}; {_did_you_mean(name, known)}")
    return problems


def _data_problems(recipe: Recipe) -> list[str]:
    """Shards that are not named, and numbers that no image could be prepared by."""
    data = recipe.data
    problems = []
    if not data.shards:
        problems.append(
            "data.shards: names no shards; give a path, a brace pattern, a glob or a list of them"
        )
    if len(data.mean) != recipe.model.in_channels or len(data.std) != recipe.model.in_channels:
        problems.append(
            f"data.mean and data.std have {len(data.mean)} and {len(data.std)} values for "
            f"model.in_channels={recipe.model.in_channels}; give one a channel"
        )
    if min(data.std, default=1.0) <= 0:
        problems.append(f"data.std: values must be above 0, got {list(data.std)}")
    for key, top in (("crop_scale", 1.0), ("crop_ratio", math.inf)):
        low, high = getattr(data, key)
        if not 0 < low <= high <= top:
            problems.append(
                f"data.{key}: wants 0 < low <= high{' <= 1' if top == 1 else ''}, got [{low}, "
                f"{high}]"
            )
    return problems


def _objective_problems(recipe: Recipe) -> list[str]:
    """Problems between what is to be learnt and the network that learns it."""
    problems = []
    objective = recipe.objective
    model = recipe.model
    regressors = recipe.decoder == "bootmae"
    own_features = "features" in getattr(objective.own, "reads", Reads()).student
    if objective.own_decoder == "bootmae" and not regressors and own_features:
        problems.append(
            f"objective.name={objective.name} has regressors: leave model.decoder out, or use mae "
            "with terms"
        )
    if regressors:
        needs = {
            "cls_token": True,
            "decoder_cls": True,
            "qkv_bias": "qkv",
            "positions": "column_first",
        }
        needs |= {"pixel_order": "hwc"}
        given = [key for key, default in needs.items() if getattr(model, key) != default]
        if given:
            problems.append(
                f"model.{' and '.join(given)}: bootmae's network has its own; leave it out"
            )
        if "classes" in objective.student_outputs:
            problems.append(
                "objective: bootmae's network has no class head; use a class term with mae or rcmae"
            )
        if objective.teacher_sees == "different":
            problems.append(
                "objective.teacher_mask is of a consistency term; bootmae's teacher sees the "
                "whole image"
            )
    elif not model.cls_token and (model.class_pool == "cls" or recipe.evaluate.pool == "cls"):
        problems.append(
            "model.cls_token=false: there is no token to pool; use class_pool=mean and "
            "evaluate.pool=mean"
        )
    return problems


def _classifying_problems(recipe: Recipe) -> list[str]:
    """Problems of a recipe that fine-tunes or probes."""
    problems = []
    evaluate = recipe.evaluate
    classify = recipe.classify
    probes = recipe.objective.name == "probe"
    if evaluate.every_steps and not evaluate.test_shards:
        problems.append("evaluate.every_steps is set: give evaluate.test_shards, labelled")
    if evaluate.picture_every_steps:
        problems.append(
            "evaluate.picture_every_steps is of a pretraining, which alone reconstructs; leave "
            "it out"
        )
    if recipe.data.decode != "cpu":
        problems.append(
            f"data.decode={recipe.data.decode} is of a pretraining: here images are augmented on "
            "the CPU"
        )
    if not probes and classify.rule != "adamw":
        problems.append(f"classify.rule={classify.rule} is for probes; fine-tuning uses adamw")
    if not probes and classify.depth is not None:
        problems.append("classify.depth is for probes; fine-tuning trains all blocks")
    trains = {
        "drop_path": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "smoothing": 0.0,
        "average": False,
        "layer_decay": 1.0,
    }
    if probes and (set_ := [key for key, off in trains.items() if getattr(classify, key) != off]):
        problems.append(
            f"classify.{' and '.join(set_)} is for fine-tuning; a probe's encoder is frozen"
        )
    if classify.average and recipe.teacher.update != "step":
        problems.append("classify.average moves at each step: leave teacher.update=step")
    return problems


# ------------------------------------------------------------------------------------------ resolve


@dataclass(frozen=True)
class Resolved:
    """Numbers that follow from the recipe, the world and the data.

    Counts, unless a unit is named.
    """

    world: int
    images_per_step: int
    images_per_rank: int
    per_device: int
    accumulation: int
    canonical_streams: int
    samples_per_epoch: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: float
    lr: float

    def asdict(self) -> dict[str, Any]:
        """Plain numbers, for the log."""
        return asdict(self)


def streams_for(recipe: Recipe, world: int) -> int:
    """V: as the recipe says, else 256 raised to the next multiple of the world."""
    return recipe.data.canonical_streams or world * math.ceil(256 / world)


def batch_problems(recipe: Recipe, world: int) -> list[str]:
    """What stands against this batch on this many ranks, one line a problem."""
    problems = []
    images = recipe.batch.images
    streams = streams_for(recipe, world)
    repeats = recipe.data.repeats
    if images % (world * repeats) and repeats > 1:
        problems.append(
            f"batch.images={images} is not divisible by {world} ranks x "
            f"data.repeats={repeats}; use "
            f"{max(1, images // (world * repeats)) * world * repeats}"
        )
    if images % world:
        unit = world * min(recipe.batch.per_device or 1, max(1, images // world))
        near = sorted({max(unit, images // unit * unit), (images // unit + 1) * unit})
        each = f" x {recipe.batch.per_device} per_device" if recipe.batch.per_device else ""
        problems.append(
            f"batch.images={images} is not divisible by {world} ranks{each}; use "
            f"{' or '.join(map(str, near))}"
        )
    if streams % world:
        near = sorted({max(world, streams // world * world), (streams // world + 1) * world})
        problems.append(
            f"data.canonical_streams={streams} is not divisible by {world} ranks; "
            f"use {' or '.join(map(str, near))}, or a number of ranks that divides it"
        )
    return problems


def per_device(recipe: Recipe, world: int) -> int:
    """Images of a micro-batch of a rank: the largest divisor of its part of a step that the recipe
    allows.

    Raises:
        ValueError: that is less than data.repeats.
    """
    per_rank = recipe.batch.images // world
    repeats = recipe.data.repeats
    limit = min(recipe.batch.per_device or per_rank, per_rank)
    if limit < repeats:
        raise Refused(
            f"batch.per_device={limit} is less than data.repeats={repeats}, which belong "
            "together; raise it"
        )
    return next(
        size for size in range(limit, 0, -1) if per_rank % size == 0 and size % repeats == 0
    )


def resolve(recipe: Recipe, *, world: int, samples_per_epoch: int) -> Resolved:
    """The derived numbers, once.

    Args:
        recipe: a checked recipe.
        world: ranks that train.
        samples_per_epoch: what the plan takes of an epoch, times data.repeats: a multiple of
            batch.images.

    Raises:
        ValueError: the batch does not divide, with the nearest that do.
    """
    problems = batch_problems(recipe, world)
    if problems:
        raise Refused("\n".join(problems))
    schedule = recipe.schedule
    images = recipe.batch.images
    steps_per_epoch = samples_per_epoch // images
    total = (
        schedule.steps
        if schedule.steps is not None
        else round((schedule.epochs or 0) * steps_per_epoch)
    )
    warmup = schedule.warmup_steps if schedule.warmup_steps is not None else 0.0
    if schedule.warmup_epochs is not None:
        warmup = schedule.warmup_epochs * steps_per_epoch
    if warmup >= total:
        raise Refused(
            f"schedule: the warm-up of {warmup:g} steps does not end before the last of {total} "
            "steps"
        )
    lr = schedule.lr if schedule.lr is not None else (schedule.base_lr or 0.0) * images / 256
    per_rank = images // world
    size = per_device(recipe, world)
    return Resolved(
        world=world,
        images_per_step=images,
        images_per_rank=per_rank,
        per_device=size,
        accumulation=per_rank // size,
        canonical_streams=streams_for(recipe, world),
        samples_per_epoch=samples_per_epoch,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        warmup_steps=warmup,
        lr=lr,
    )
