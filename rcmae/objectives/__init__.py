"""What the student is asked to do. An objective is a file, its options and a line here; one of
somebody else's module is named MODULE:NAME in the recipe (`protocol`, and CONTRIBUTING.md).

Without torch until one is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from rcmae import plugins
from rcmae.config import Catalogue, ObjectiveOptions, Recipe, Resolved
from rcmae.errors import Refused
from rcmae.objectives import options
from rcmae.objectives.protocol import Context, Objective

if TYPE_CHECKING:
    from rcmae.objectives.terms import Sum


class Shipped(NamedTuple):
    """What a name of a recipe stands for."""

    factory: str  # MODULE:NAME, imported when one is made
    options: type[options.OwnOptions]


OBJECTIVES = {
    "mae": Shipped("rcmae.objectives.mae:MAE", options.MAEOptions),
    "rcmae": Shipped("rcmae.objectives.rcmae:RCMAE", options.RCMAEOptions),
    "supmae": Shipped("rcmae.objectives.supmae:SupMAE", options.SupMAEOptions),
    "bootmae": Shipped("rcmae.objectives.bootmae:BootMAE", options.BootMAEOptions),
    "pixio": Shipped("rcmae.objectives.pixio:Pixio", options.PixioOptions),
    "rcpixio": Shipped("rcmae.objectives.rcpixio:RCPixio", options.RCPixioOptions),
}
# Terms that can be added to a sum of terms (`objective.terms`).
TERMS = {
    "consistency": Shipped("rcmae.objectives.rcmae:Consistency", options.ConsistencyOptions),
    "class": Shipped("rcmae.objectives.supmae:Classification", options.ClassOptions),
    "features": Shipped("rcmae.objectives.bootmae:Features", options.FeatureOptions),
}
CATALOGUE = Catalogue(
    objectives={name: each.options for name, each in OBJECTIVES.items()},
    terms={name: each.options for name, each in TERMS.items()},
)


def make(asked: ObjectiveOptions, context: Context) -> Objective:
    """The objective of a recipe, with the terms added to it.

    Raises:
        Refused: it cannot be made, or is not a sum that terms can be added to.
    """
    listed = OBJECTIVES.get(asked.name)
    factory = plugins.find(listed.factory if listed else asked.name, key="objective.name")
    if not callable(getattr(factory, "make", None)):
        raise Refused(f"objective.name={asked.name}: it has no `make(options, context)`")
    objective: Objective = factory.make(asked.own, context)
    if asked.terms:
        objective = _plus(objective, asked, context)
    for whose in ("student_outputs", "teacher_outputs"):
        read = set(getattr(objective, whose, ()))
        if not read <= set(getattr(asked, whose)):
            raise Refused(
                f"objective.name={asked.name} reads {', '.join(sorted(read))} of the "
                f"{whose.removesuffix('_outputs')}; say so in its Options:\n"
                f"reads = rcmae.config.Reads(student=(...), teacher=(...))"
            )
    return objective


def make_objective(recipe: Recipe, sizes: Resolved) -> Objective:
    """The objective of a recipe. Raises as `make`."""
    epochs = sizes.total_steps / sizes.steps_per_epoch
    return make(recipe.objective, Context(epochs=epochs, steps=sizes.total_steps))


def new(name: str, context: Context | None = None, **values: Any) -> Sum:
    """A shipped objective of values: `new("rcmae", consistency_weight=0.5)`."""
    factory = plugins.find(OBJECTIVES[name].factory, key="objective.name")
    made: Sum = factory.make(OBJECTIVES[name].options(**values), context or Context())
    return made


def _plus(objective: Objective, asked: ObjectiveOptions, context: Context) -> Sum:
    from rcmae.objectives.terms import Sum  # torch: only where an objective is made

    if not isinstance(objective, Sum):
        raise Refused(
            f"objective.terms: {asked.name} is not a sum of terms, so none can be added; leave "
            "it out"
        )
    more = {}
    for name, weight in asked.terms.items():
        if plugins.is_plugin(name):
            short = name.partition(":")[2].lower()  # in metrics: loss_absolute
            taken = short in objective.terms or short in asked.terms
            more[name if taken else short] = _own_term(name, weight)
            continue
        term = plugins.find(TERMS[name].factory, key="objective.terms")
        more[name] = term.make(weight, asked, context)
    return objective.plus(more)


def _own_term(name: str, weight: float) -> Any:
    """A term of somebody's module, with the defaults of its class. Raises Refused."""
    kind = plugins.find(name, key="objective.terms")
    try:
        return kind(weight=weight)
    except TypeError as error:
        raise Refused(
            f"objective.terms: {name}(weight={weight:g}) cannot be made ({error}); give its class "
            "a `weight`, and what else it has a default"
        ) from error


def pixel_options(asked: ObjectiveOptions) -> options.PixelOptions:
    """How an objective normalises the pixels that the student predicts, for pictures of them."""
    if isinstance(asked.own, options.PixelOptions):
        return asked.own
    return options.PixelOptions(norm_pix_loss=False)
