"""What the learning rate and the teacher's momentum are at each step of a run."""

from __future__ import annotations

from rcmae.config import Recipe, Resolved
from rcmae.engines.schedules import Shape, Warmup, learning_rate, teacher_momentum


class Schedule:
    """The rates of a recipe, by step."""

    def __init__(self, recipe: Recipe, sizes: Resolved) -> None:
        self.weight_decay = recipe.schedule.weight_decay
        # whether the teacher moves after each micro-batch, not after each step alone
        self.teacher_each_micro = recipe.teacher.update == "micro_step"
        options = recipe.schedule
        cooldown = options.cooldown
        if options.cooldown_steps is not None:
            before = sizes.warmup_steps if options.warmup is None else 0.0
            cooldown = options.cooldown_steps / (sizes.total_steps - before)
        self._shape = Shape(
            options.shape,
            options.power,
            tuple(options.milestones),
            cooldown,
            options.cooldown_shape,
        )
        self._warmup = Warmup(sizes.warmup_steps, options.warmup_from, options.warmup)
        self._recipe = recipe
        self._sizes = sizes

    def lr(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return learning_rate(
            step,
            total_steps=self._sizes.total_steps,
            lr=self._sizes.lr,
            min_lr=self._recipe.schedule.min_lr,
            shape=self._shape,
            warmup=self._warmup,
        )

    def momentum(self, step: int, micro: int) -> float:
        """The teacher's momentum after a micro-batch of a step, both counted from 0."""
        teacher = self._recipe.teacher
        each = self._sizes.accumulation if self.teacher_each_micro else 1
        update = step * each + (micro if self.teacher_each_micro else 0)
        return teacher_momentum(
            update,
            kind=teacher.schedule,
            base=teacher.momentum,
            end=teacher.momentum_end,
            total_updates=self._sizes.total_steps * each,
            updates_per_epoch=self._sizes.steps_per_epoch * each,
            dynamic=teacher.dynamic,
        )
