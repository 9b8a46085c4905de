"""Tasks by name: the shipped ones, and MODULE:NAME of anybody's module. Imported when asked for."""

from __future__ import annotations

from typing import cast

from rcmae import plugins
from rcmae.config import Recipe
from rcmae.errors import Refused, did_you_mean
from rcmae.tasks.protocol import Task

TASKS = {
    "pretrain": "rcmae.tasks.pretrain:Pretraining",
    "finetune": "rcmae.tasks.finetune:Finetuning",
    "probe": "rcmae.tasks.probe:LinearProbe",
    "detect": "rcmae.tasks.detect:Detection",
    "segment": "rcmae.tasks.segment:Segmentation",
}


def task_named(name: str) -> Task:
    """A new task of a name.

    Raises:
        Refused: there is none of that name, or its module does not import.
    """
    if name not in TASKS and not plugins.is_plugin(name):
        raise Refused(f"task.name: unknown task {name!r}; {did_you_mean(name, TASKS)}")
    return cast(Task, plugins.find(TASKS.get(name, name), key="task.name")())


def task_of(recipe: Recipe) -> Task:
    """A new task of the kind that a recipe asks for. Raises Refused."""
    return task_named(recipe.task.name)
