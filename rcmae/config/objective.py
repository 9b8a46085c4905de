"""The section `objective`: common keys, and those of what it names.

No objective is imported here. The catalogue, name -> options, is handed in; a shipped one is found
by name, without torch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import pydantic
from pydantic import BaseModel, Field
from pydantic_core import InitErrorDetails, PydanticCustomError

from rcmae import plugins
from rcmae.config.sections import Fraction, Positive, Section
from rcmae.errors import Refused, did_you_mean

CLASSIFYING = ("finetune", "probe")  # tasks that do
# shipped tasks that bring an objective of their own, of the same name
OWN_LOSS = (*CLASSIFYING, "detect", "segment")
TASKS_OWN = "task"  # objective.name of a task from outside: it brings its own


MaskKind = Literal["random", "boxes", "grid"]


class Reads(NamedTuple):
    """Outputs of the networks that a loss reads, by the names of `models.protocol.Output`."""

    student: tuple[str, ...] = ("pixels",)
    teacher: tuple[str, ...] = ()  # none: it has no teacher


class ObjectiveOptions(Section):
    """What the student is asked to do.

    A recipe's section has these keys, those of the named objective and those of the terms that are
    added to it: its class is made of all their classes (`objective_class`).
    """

    imports: ClassVar[bool] = True  # whether modules that it names may be; not of a file's recipe

    name: str = "rcmae"
    """A shipped objective, or MODULE:NAME of your own."""
    terms: dict[str, Annotated[float, Field(ge=0.0)]] = Field(default_factory=dict)
    """Terms to add and their weights, such as {class: 0.01} to rcmae; one's own by MODULE:NAME."""
    mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.75
    """Share of the patches that is hidden from the encoder."""
    mask: MaskKind = "random"
    """random: single patches. boxes: BEiT's boxes, filled up with single patches to mask_ratio.
    grid: square blocks (Pixio).
    """
    mask_grid: Positive = 4
    """With grid: side of a block, in patches."""
    mask_shared: Literal["image", "step"] = "image"
    """Which images share a mask."""
    box_ratio: Fraction = 0.62
    """Share of the patches that boxes hide."""
    box_smallest: Positive = 16
    """Smallest box, in patches."""
    box_largest: Positive = 60
    """Largest box, in patches."""

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
            found.update(self._reads(term).student)
        return tuple(sorted(found))

    @property
    def teacher_outputs(self) -> tuple[str, ...]:
        """Outputs of the teacher that the loss reads; none: it has no teacher."""
        found = set(getattr(self.own, "reads", Reads()).teacher)
        for term in self.terms:
            found.update(self._reads(term).teacher)
        return tuple(sorted(found))

    def _reads(self, term: str) -> Reads:
        """Outputs that an added term reads."""
        if not plugins.is_plugin(term):
            return shipped().terms[term].reads
        return reads_of_term(term) if self.imports else Reads(())

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
    needs_class_token: ClassVar[bool] = False
    follows_progress: ClassVar[bool] = False  # whether the loss depends on when the training ends


@dataclass(frozen=True, eq=False)
class Catalogue:
    """The shipped objectives and terms by name, with the class of each one's options."""

    objectives: Mapping[str, type[OwnOptions]]
    terms: Mapping[str, type[OwnOptions]]


def reads_of_term(name: str) -> Reads:
    """What a term of somebody's module reads, by the attributes of its class.

    Raises:
        Refused: it does not import, or is no term.
    """
    kind = plugins.find(name, key="objective.terms")
    student = getattr(kind, "student_output", None)
    teacher = getattr(kind, "teacher_output", None)
    if not isinstance(kind, type) or not isinstance(student, str):
        raise Refused(
            f"objective.terms: {name} is no class with a `student_output` (a name of "
            "rcmae/models/protocol.py), `teacher_output`, `count` and `total`"
        )
    return Reads((student,), (teacher,) if isinstance(teacher, str) else ())


def shipped() -> Catalogue:
    """The catalogue of this package, found by name: those who have it stand above this module."""
    catalogue = plugins.find("rcmae.objectives:CATALOGUE", key="objective.name")
    assert isinstance(catalogue, Catalogue)
    return catalogue


class NoOptions(OwnOptions):
    """Of an objective that a task brings along, or of one that has none."""

    reads: ClassVar[Reads] = Reads(student=())


def objective_class(
    section: Mapping[str, Any], catalogue: Catalogue | None = None, *, imports: bool = True
) -> type[ObjectiveOptions]:
    """The class of a section `objective`: the common keys, and those of what it names.

    Args:
        section: as read.
        catalogue: None for what is shipped.
        imports: whether MODULE:NAME is imported; if not, its options may be anything.

    Raises:
        pydantic.ValidationError: no such objective, at `name`.
    """
    name = section.get("name", ObjectiveOptions.model_fields["name"].default)
    terms = section.get("terms")
    named = sorted(map(str, terms)) if isinstance(terms, Mapping) else []
    try:
        return _made_class(str(name), tuple(named), catalogue or shipped(), imports)
    except Refused as error:
        told = PydanticCustomError("refused", "{why}", {"why": str(error)})
        details = InitErrorDetails(type=told, loc=("name",), input=name)
        raise pydantic.ValidationError.from_exception_data("objective", [details]) from error


@functools.cache
def _made_class(
    name: str, terms: tuple[str, ...], catalogue: Catalogue, imports: bool
) -> type[ObjectiveOptions]:
    known = [*catalogue.objectives, *OWN_LOSS, TASKS_OWN]
    bases: list[type[BaseModel]] = [
        catalogue.terms[term] for term in terms if term in catalogue.terms
    ]
    own_terms = [term for term in terms if plugins.is_plugin(term)]
    for term in own_terms if imports else ():
        reads_of_term(term)
    addable: Any = Literal[(*catalogue.terms, *own_terms)]
    weights = dict[addable, Annotated[float, Field(ge=0.0)]]
    about = ObjectiveOptions.model_fields["terms"].description
    fields: dict[str, Any] = {"terms": (weights, Field(default_factory=dict, description=about))}
    if plugins.is_plugin(name) and not imports:
        fields["options"] = (dict[str, Any], Field(default_factory=dict))
    elif plugins.is_plugin(name):
        options = _strict(plugins.find(name, key="objective.name"), name)
        fields["options"] = (options, Field(default_factory=dict, validate_default=True))
    elif name in known:
        bases.insert(0, catalogue.objectives.get(name, NoOptions))
    else:
        hint = did_you_mean(name, catalogue.objectives)
        module, dot, last = str(name).rpartition(".")
        own = f"{module}:{last}" if dot else "MODULE:NAME"
        raise Refused(f"objective.name: unknown objective {name!r}; {hint}, or give {own}")
    made: Any = pydantic.create_model(
        "ObjectiveOptions", __base__=(*bases, ObjectiveOptions), __doc__=None, **fields
    )
    made.imports = imports
    return made


def _strict(factory: Any, name: str) -> type[BaseModel]:
    """The `Options` of an objective, unknown ones refused."""
    options = getattr(factory, "Options", OwnOptions)
    if not isinstance(options, type) or not issubclass(options, BaseModel):
        raise Refused(f"objective.name={name}: its Options must be a pydantic model")
    refusing = pydantic.ConfigDict(extra="forbid")
    return type(options.__name__, (options,), {"model_config": refusing, "__module__": __name__})


def read_objective(
    value: Any, read: pydantic.ValidatorFunctionWrapHandler, info: pydantic.ValidationInfo
) -> ObjectiveOptions:
    """The section of a recipe, of the class that its name and terms ask for."""
    name = value.get("name", "") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(name, str):
        section: ObjectiveOptions = read(value)
        return section
    context = info.context or {}
    catalogue = context.get("objectives") or shipped()
    kind = objective_class(value, catalogue, imports=context.get("imports", True))
    mine = dict(value)
    for key, options in foreign_keys(value, kind, catalogue).items():
        if context.get("stored") or mine[key] == options.model_fields[key].get_default():
            del mine[key]
    return kind.model_validate(mine)


def foreign_keys(
    section: Mapping[str, Any], kind: type[ObjectiveOptions], catalogue: Catalogue
) -> dict[str, type[OwnOptions]]:
    """Keys of a section that are other objectives', or of terms that are not added, and whose."""
    found = {}
    for options in (*catalogue.objectives.values(), *catalogue.terms.values()):
        for key in options.model_fields:
            if key in section and key not in kind.model_fields:
                found[key] = options
    return found


def own_objective(name: Any) -> str | None:
    """The task that an objective belongs to, where it is not a pretraining's: how recipes said once
    what they train.
    """
    return name if name in OWN_LOSS else None
