"""The recipe: one typed tree of every setting, and what makes two of them the same training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import pydantic
from pydantic import BaseModel, Field, SerializeAsAny

from rcmae.config.dense import DetectOptions, SegmentOptions
from rcmae.config.evaluate import EvaluateOptions
from rcmae.config.objective import (
    OWN_LOSS,
    ObjectiveOptions,
    foreign_keys,
    objective_class,
    own_objective,
    read_objective,
    shipped,
)
from rcmae.config.sections import (
    BatchOptions,
    CheckpointOptions,
    ClassifyOptions,
    DataOptions,
    EngineOptions,
    GuardOptions,
    LogOptions,
    ModelOptions,
    RunOptions,
    ScheduleOptions,
    Section,
    TaskOptions,
    TeacherOptions,
)
from rcmae.plugins import is_plugin

S = TypeVar("S", bound=Section)


class Recipe(Section):
    """Everything a run depends on."""

    objective: Annotated[
        ObjectiveOptions, SerializeAsAny(), pydantic.WrapValidator(read_objective)
    ] = Field(default_factory=dict, validate_default=True)
    task: TaskOptions = Field(default_factory=TaskOptions)
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
    detect: DetectOptions = Field(default_factory=DetectOptions)
    segment: SegmentOptions = Field(default_factory=SegmentOptions)
    log: LogOptions = Field(default_factory=LogOptions)
    run: RunOptions = Field(default_factory=RunOptions)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to other ranks as values: the class of the objective section is created again."""
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
    "task",
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
    "data.resize",
    "data.mean",
    "data.std",
)


# Of these none may be allowed to change: the weights would be those of another network.
OF_WEIGHTS = ("model", "classify.num_classes")


def stored(tree: Mapping[str, Any], *, imports: bool = True) -> Recipe:
    """The recipe of a run's folder or a checkpoint, of this version or one before.

    Keys of objectives that the run does not train are left out: once, every recipe had all of them.

    Args:
        tree: as it was dumped.
        imports: whether an objective's own module is imported; not where a file is only read,
            which may come from anybody.

    Raises:
        pydantic.ValidationError: it is not a recipe.
    """
    return Recipe.model_validate(with_task(tree), context={"stored": True, "imports": imports})


def with_task(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """A dumped recipe with its task: before there was that section, the objective told it."""
    if not isinstance(tree, Mapping):
        return tree  # refused by its type
    if "task" in tree or not isinstance(tree.get("objective"), Mapping):
        return tree
    name = own_objective(tree["objective"].get("name"))
    return {**tree, "task": {"name": name}} if name else tree


class Difference(NamedTuple):
    """A key whose value is another in a run than in a recipe."""

    key: str
    written: Any  # in the run
    asked: Any

    def __str__(self) -> str:
        return (
            f"{self.key}={json.dumps(self.written)}, but this recipe has {json.dumps(self.asked)}"
        )


def differences(
    mine: Mapping[str, Any],
    saved: Mapping[str, Any],
    frozen: Sequence[str] = (),
    reports: Sequence[str] = (),
) -> list[Difference]:
    """Every frozen key that differs between two dumped recipes, sorted.

    Args:
        mine, saved: the two.
        frozen: keys or sections that are frozen beside FROZEN: the task's own.
        reports: keys among those that change nothing in the training.
    """
    left = dict(leaves(mine))
    right = _leaves_with_defaults(with_task(saved), mine)
    allowed = [*(left.get("checkpoint.allow") or []), *reports]
    found = []
    for key in sorted(left.keys() | right.keys()):
        if not is_under(key, (*FROZEN, *frozen)) or is_under(key, allowed):
            continue
        if key == "data.canonical_streams" and left.get(key) is None:
            continue
        if _is_of_one_objective(key, left, right):
            continue
        if _plain(left.get(key)) != _plain(right.get(key)):
            found.append(Difference(key, right.get(key), left.get(key)))
    return found


def _leaves_with_defaults(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a dumped recipe, with the default where it is from before a key was there.

    Without keys of objectives that it does not train. A module that is named in it is imported only
    if `mine` names it, too.
    """
    section = saved.get("objective", {})
    wanted = mine.get("objective", {})
    same = section.get("name") == wanted.get("name")
    own_terms = {term for term in section.get("terms") or {} if is_plugin(term)}
    kind = objective_class(section, imports=same and own_terms <= set(wanted.get("terms") or {}))
    defaults = Recipe().model_dump(mode="json")
    defaults["objective"] = _defaults(kind)
    options = kind.model_fields.get("options")
    if options is not None and same:
        assert isinstance(options.annotation, type)
        defaults["objective"]["options"] = _defaults(options.annotation)
    foreign = foreign_keys(section, kind, shipped())
    told = {key: value for key, value in section.items() if key not in foreign}
    return {**dict(leaves(defaults)), **dict(leaves({**saved, "objective": told}))}


def _defaults(kind: type[BaseModel]) -> dict[str, Any]:
    """The values of a section in which nothing is set; without those that must be."""
    return {
        key: field.get_default(call_default_factory=True)
        for key, field in kind.model_fields.items()
        if not field.is_required()
    }


def _is_of_one_objective(key: str, left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether a key is an option that one of two objectives lacks: then their names or terms
    differ, which is said.
    """
    section, _, name = key.partition(".")
    if section != "objective" or (key in left and key in right):
        return False
    if name.startswith("options."):
        return left.get("objective.name") != right.get("objective.name")
    return name.partition(".")[0] not in ObjectiveOptions.model_fields


def is_under(key: str, names: Sequence[str]) -> bool:
    """Whether a key is one of some keys or sections, or lies in one."""
    return any(key == name or key.startswith(name + ".") for name in names)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`section.key`, value of a nested mapping."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """A copy of the recipe with other values: `section.key` -> value."""
    for name, value in values.items():
        recipe = _changed(recipe, name.split("."), value)
    return recipe


def _changed(section: S, place: Sequence[str], value: Any) -> S:
    key, *inside = place
    if inside:
        value = _changed(getattr(section, key), inside, value)
    return section.model_copy(update={key: value})


def module_of(recipe: Recipe) -> str:
    """The module that trains a recipe, as in `python -m rcmae.train`."""
    name = recipe.task.name
    return f"rcmae.{name}" if name in OWN_LOSS else "rcmae.train"


def known_keys(place: Sequence[str], objective: Any = None) -> list[str]:
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
