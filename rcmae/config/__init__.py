"""The recipe: one typed tree of every setting, read from YAML and `key=value`, checked whole.

`load()` gives a `Recipe` or one `Refused` that names every problem. `resolve()` derives the numbers
that depend on the ranks and the data (micro-batch, accumulation, steps, learning rate); nothing
else computes them again. Reading it takes no torch.
"""

from rcmae.config.checks import rounding_problems
from rcmae.config.commands import sources_in, without_pipes
from rcmae.config.dense import DetectOptions, SegmentOptions
from rcmae.config.loading import load, recipe_path
from rcmae.config.objective import (
    CLASSIFYING,
    Catalogue,
    MaskKind,
    ObjectiveOptions,
    OwnOptions,
    Reads,
    objective_class,
    shipped,
)
from rcmae.config.recipe import (
    FROZEN,
    OF_WEIGHTS,
    Recipe,
    differences,
    is_under,
    module_of,
    stored,
    with_values,
)
from rcmae.config.resolve import (
    Resolved,
    batch_problems,
    compiles,
    engine_problems,
    per_device,
    precision_of,
    resolve,
    streams_for,
    with_precision,
    with_streams,
)
from rcmae.config.sections import (
    RECIPES,
    BatchOptions,
    CheckpointOptions,
    ClassifyOptions,
    DataOptions,
    EngineOptions,
    Fraction,
    GuardOptions,
    LogOptions,
    ModelOptions,
    Natural,
    Positive,
    RunOptions,
    ScheduleOptions,
    Section,
    TaskOptions,
    TeacherOptions,
    WeightedShards,
)
from rcmae.config.statistics import first_batch_doubts, statistics_doubts
from rcmae.config.trunks import ties_to_the_end

__all__ = [
    "CLASSIFYING",
    "FROZEN",
    "OF_WEIGHTS",
    "RECIPES",
    "BatchOptions",
    "Catalogue",
    "CheckpointOptions",
    "ClassifyOptions",
    "DataOptions",
    "DetectOptions",
    "EngineOptions",
    "EvaluateOptions",
    "Fraction",
    "GuardOptions",
    "LogOptions",
    "MaskKind",
    "ModelOptions",
    "Natural",
    "ObjectiveOptions",
    "OwnOptions",
    "Positive",
    "Reads",
    "Recipe",
    "Resolved",
    "RunOptions",
    "ScheduleOptions",
    "Section",
    "SegmentOptions",
    "TaskOptions",
    "TeacherOptions",
    "WeightedShards",
    "batch_problems",
    "compiles",
    "differences",
    "engine_problems",
    "first_batch_doubts",
    "is_under",
    "load",
    "module_of",
    "objective_class",
    "per_device",
    "precision_of",
    "recipe_path",
    "resolve",
    "rounding_problems",
    "shipped",
    "sources_in",
    "statistics_doubts",
    "stored",
    "streams_for",
    "ties_to_the_end",
    "with_precision",
    "with_streams",
    "with_values",
    "without_pipes",
]
