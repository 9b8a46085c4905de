"""Tasks by name; a task is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import cast

from rcmae.config import Recipe
from rcmae.tasks.protocol import Task

TASKS = {
    "pretrain": "rcmae.tasks.pretrain:Pretraining",
    "finetune": "rcmae.tasks.finetune:Finetuning",
    "probe": "rcmae.tasks.probe:LinearProbe",
}


def task_named(name: str) -> Task:
    """A new task of a name."""
    module, _, kind = TASKS[name].partition(":")
    return cast(Task, getattr(importlib.import_module(module), kind)())


def task_of(recipe: Recipe) -> Task:
    """A new task of the kind that a recipe asks for."""
    name = recipe.objective.name
    return task_named(name if name in TASKS else "pretrain")
