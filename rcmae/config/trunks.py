"""What of a pretraining depends on when it ends, beside its learning rate.

A training whose rate stays (schedule.shape=wsd) and that has none of it is a trunk, of which
cooldowns of several lengths are taken (`rcmae cooldown`)."""

from __future__ import annotations

from rcmae import plugins
from rcmae.config.objective import shipped
from rcmae.config.recipe import Recipe


def ties_to_the_end(recipe: Recipe) -> list[str]:
    """What depends on the training's end, a line each with the way out."""
    problems = []
    teacher = recipe.teacher
    moves = teacher.schedule in ("cosine", "published") and teacher.momentum != teacher.momentum_end
    if recipe.objective.teacher_outputs and moves:
        problems.append(
            f"teacher.schedule={teacher.schedule} goes towards the trunk's end: train the trunk "
            "with teacher.schedule=constant"
        )
    objective = recipe.objective
    follows = getattr(objective.own, "follows_progress", None)
    terms = [name for name in objective.terms if shipped().terms[name].follows_progress]
    if follows is None and plugins.is_plugin(objective.name):
        problems.append(
            f"objective.name={objective.name} does not say whether its loss depends on the trunk's "
            "end: give its Options `follows_progress: ClassVar[bool] = False`"
        )
    if follows or terms:
        named = f"objective.terms: {', '.join(terms)}" if terms else f"objective={objective.name}"
        problems.append(
            f"{named}: the weight of features grows with the part of the trunk that is done"
        )
    return problems
