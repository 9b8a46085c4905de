"""The task that trains a recipe, for programs that take any: pretraining, fine-tuning or a
linear probe.
"""

from __future__ import annotations

from rcmae.config import Recipe
from rcmae.train import Pretraining, Task


def task_of(recipe: Recipe) -> Task:
    """A new task of the kind that `objective.name` asks for.

    Its module is imported now: torchmetrics takes seconds.
    """
    if recipe.objective.name == "finetune":
        from rcmae.finetune import Finetuning

        return Finetuning()
    if recipe.objective.name == "probe":
        from rcmae.probe import Probe

        return Probe()
    return Pretraining()
