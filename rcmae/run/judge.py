"""Judge: whether a run can start, decided from facts alone.

A pure function: no disk, no collective, no clock. Every rank comes to the same answer, so a refusal
ends all of them together, and tests need no ranks. All problems are reported at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import yaml

from rcmae import config
from rcmae.config import Recipe, Resolved
from rcmae.data.batch import NO_LABEL
from rcmae.data.cache import cache_problem
from rcmae.data.index import ShardIndex
from rcmae.data.masking import Mask
from rcmae.data.plan import Plan
from rcmae.data.sets import Labelled, class_problems, met
from rcmae.data.stream import refuse_unlabelled
from rcmae.data.tars import suffix_of
from rcmae.engines.build import engine_settings
from rcmae.errors import Refused
from rcmae.run.differences import mismatches
from rcmae.run.look import Facts, Sight
from rcmae.tasks.protocol import Data, EvaluationSet, Saved, Task, options_of

NAMED = 5  # ranks or shards that a message names before it counts the rest


class Precision(NamedTuple):
    """What the networks compute in."""

    asked: str  # auto, bf16 or fp32
    used: str  # bf16 or fp32
    why: str

    def row(self) -> tuple[str, str, str]:
        """Of the start-up print, as those of `kernels.table`."""
        auto = "auto: " if self.asked == "auto" else ""
        return "precision", self.used, auto + self.why


@dataclass(frozen=True)
class Verdict:
    """A run that can start, and the numbers that follow."""

    recipe: Recipe  # resolved: every value that follows from data and ranks is in it
    sizes: Resolved
    plan: Plan
    mask: Mask
    data: Data
    saved: Saved | None
    found: Any  # what the task looked at
    engine_config: dict[str, Any]
    precision: Precision
    warnings: tuple[str, ...]  # what may be meant, but seldom is
    trains: bool = True  # else the run is evaluated as it is
    notes: tuple[str, ...] = ()  # what was taken or chosen

    def shown(self, *more: str) -> str:
        """The resolved recipe as YAML, under the numbers that follow from it, for people.

        Args:
            more: lines beside the numbers.
        """
        sizes = [f"# {name}: {value}" for name, value in self.sizes.asdict().items()]
        state = f"resumes from step {self.saved.step}" if self.saved else "starts from scratch"
        warnings = [f"# {told}" for told in self.notes]
        warnings += [f"# warning: {told}" for told in self.warnings]
        tree = self.recipe.model_dump(mode="json")
        body = yaml.safe_dump(tree, sort_keys=False)
        said = f"# precision: {self.precision.used} ({self.precision.why})"
        first = f"# This run can start; it {state}. In numbers:"
        return "\n".join([first, *sizes, said, *(f"# {told}" for told in more), *warnings, body])


class AnotherTraining(Refused):
    """The recipe is not that of the checkpoint in the run's folder, which may itself be damaged."""


class Problems(list[str]):
    """What stands against a run, one entry a problem."""

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Turn a refusal in this block into an entry."""
        try:
            yield
        except Refused as error:
            self.append(str(error))


def judge(sight: Sight, task: Task) -> Verdict:
    """Decide whether this run can start.

    Raises:
        Refused: naming every problem.
        AnotherTraining: the same, where what lies in the run's folder is among them.
    """
    refuse_differing_ranks(sight)
    facts = sight.facts
    recipe = with_streams(facts, sight.world)
    precision, emulated = precision_of(recipe, sight)
    chosen = {"engine.precision": precision.used, "engine.compile": compiles(recipe, sight)}
    recipe = config.with_values(recipe, chosen)
    problems = Problems(facts.problems)
    problems += node_problems(sight)
    command = sight.views[0].command
    if command.evaluate_only and not facts.recipe.evaluate.every_steps:
        problems.append(
            "--evaluate-only: this recipe evaluates nothing; set evaluate.every_steps and the "
            "shards that it needs"
        )
    problems += engine_problems(recipe, sight)
    warnings = [
        *sets_judged(recipe, task, facts.data, problems),
        *samples_judged(recipe, task, facts.data, problems),
    ]
    with problems.collected():
        options_of(task, recipe)
    judgement = task.judge(recipe, facts.task, facts.data, facts.saved, sight.world)
    problems += judgement.problems
    recipe = config.with_values(recipe, judgement.values)
    mask = None
    with problems.collected():
        mask = task.mask(recipe)
        task.transform(recipe)
    plan, sizes = plan_of(recipe, sight, problems)
    if sizes is not None and recipe.engine.name == "deepspeed":
        problems += deepspeed_problems(recipe, sizes, task, facts.engine_config)
    index = facts.data.train
    against = mismatches(
        recipe, facts.saved, task=task, written=facts.written, index=index, sizes=sizes
    )
    if against:
        raise AnotherTraining("\n".join(dict.fromkeys([*problems, *against])))
    if problems:
        raise Refused("\n".join(dict.fromkeys(problems)))
    assert mask is not None
    assert plan is not None
    assert sizes is not None
    return Verdict(
        recipe=recipe,
        sizes=sizes,
        plan=plan,
        mask=mask,
        data=facts.data,
        saved=facts.saved,
        found=facts.task,
        engine_config=dict(facts.engine_config),
        precision=precision,
        warnings=(
            *emulated,
            *dict.fromkeys(view.crowded for view in sight.views if view.crowded),
            *config.statistics_doubts(recipe),
            *members_unused(facts.data),
            *warnings,
            *judgement.warnings,
        ),
        trains=not command.evaluate_only,
        notes=(*facts.notes, *judgement.notes),
    )


def sets_judged(recipe: Recipe, task: Task, data: Data, problems: Problems) -> list[str]:
    """Add what stands against the evaluation sets; warnings of them."""
    sets = task.evaluation_sets(recipe)
    tests = judged_sets(sets, data)
    meetings = [met(train, test) for train, test in pairwise(tests)]
    for meeting in meetings:
        problems += meeting.problems
    warnings = [told for meeting in meetings for told in meeting.warnings]
    for tested, each in zip(data.sets, sets if data.sets else [], strict=True):
        if each.labelled:
            with problems.collected():
                refuse_unlabelled(tested)
        problems += all_without(each.key, tested, each.needs)
        warnings += some_without(each.key, tested, each.needs, "left out")
    return warnings


def samples_judged(recipe: Recipe, task: Task, data: Data, problems: Problems) -> list[str]:
    """Add what stands against the samples of data.shards; warnings of them."""
    members = None
    with problems.collected():
        members = task.members(recipe)
    if data.train is None:
        return []
    if "classes" in recipe.objective.student_outputs:
        problems += label_problems(data.train, recipe.model.num_classes)
        problems += class_problems([Labelled("data.shards", data.train, data.classes)])
    if members is None:
        return []
    problems += all_without("data.shards", data.train, members.kinds)
    return some_without("data.shards", data.train, members.kinds, "replaced")


def members_unused(data: Data) -> list[str]:
    """What of the tars is not used, and why: a line for each kind."""
    indexes = [index for index in (data.train, *data.sets) if index is not None]
    told = [f"shards: {note}" for index in indexes for note in index.notes]
    return list(dict.fromkeys(told))


# ------------------------------------------------------------------------------------------- ranks


def refuse_differing_ranks(sight: Sight) -> None:
    """All ranks must have been given the same command and run the same software.

    Raises:
        Refused: naming each key, its values, and the ranks that have them.
    """
    problems = []
    asked = [named_values(view.command.overrides) for view in sight.views]
    recipes = [view.command.recipe for view in sight.views]
    problems += differing("the recipe", recipes)
    problems += differing("--check", [str(view.command.check) for view in sight.views])
    evaluate_only = [str(view.command.evaluate_only) for view in sight.views]
    problems += differing("--evaluate-only", evaluate_only)
    for key in sorted({key for each in asked for key in each}):
        problems += differing(key, [each.get(key, "not given") for each in asked])
    versions = [view.versions for view in sight.views]
    for name in sorted({name for each in versions for name in each}):
        values = [each.get(name, "not installed") for each in versions]
        problems += differing(f"the version of {name}", values)
    if problems:
        raise Refused("the ranks were started differently:\n" + "\n".join(problems))


def named_values(overrides: tuple[str, ...]) -> dict[str, str]:
    """`key=value` of a command line, the last of each key."""
    return dict(item.partition("=")[::2] for item in overrides)


def differing(what: str, values: list[str]) -> list[str]:
    """A problem where ranks have different values of something."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    if len(ranks) < 2:
        return []
    told = [f"{value!r} on {ranks_named(of)}" for value, of in ranks.items()]
    return [f"{what} is {' and '.join(told)}; start every rank with the same command"]


def ranks_named(ranks: list[int]) -> str:
    """Ranks for people."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:NAMED]))
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"ranks {shown}{more}"


def node_problems(sight: Sight) -> list[str]:
    """What single nodes do not have."""
    problems = []
    for rank, view in enumerate(sight.views):
        place = f"rank {rank} ({view.host})" if sight.world > 1 else view.host
        shown = "; ".join(view.shards[:NAMED])
        more = f"; and {len(view.shards) - NAMED} more" if len(view.shards) > NAMED else ""
        if view.shards:
            problems.append(f"{place} does not see the shards of rank 0: {shown}{more}")
        for told in filter(None, (view.cache, view.workers)):
            problems.append(told if sight.world == 1 else f"{place}: {told}")
    return problems


def engine_problems(recipe: Recipe, sight: Sight) -> list[str]:
    """What the engine cannot do on these ranks."""
    problems = config.engine_problems(recipe, sight.world)
    return problems + config.rounding_problems(recipe)


def compiles(recipe: Recipe, sight: Sight) -> bool:
    """Whether the ranks compile their blocks: all or none."""
    zero = sight.facts.engine_config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None  # else it is refused elsewhere
    cuda = all(view.device != "cpu" for view in sight.views)
    return config.compiles(recipe, cuda=cuda, zero3=stage == 3)


def precision_of(recipe: Recipe, sight: Sight) -> tuple[Precision, list[str]]:
    """What the ranks compute in, and a warning where they emulate it.

    It is one for all: ranks that differ have fp32 in common.
    """
    asked = recipe.engine.precision
    without = [rank for rank, view in enumerate(sight.views) if not view.bf16.units]
    used = config.precision_of(asked, not without)
    deciding = without[0] if without else 0
    why = sight.views[deciding].bf16.why
    if 0 < len(without) < sight.world:
        why += f" on {ranks_named(without)}"
    warnings = []
    if used == "bf16" and without:
        warnings.append(
            f"engine.precision=bf16 is emulated here: {why}; a step takes several times as long "
            "as in fp32. engine.precision=auto takes what every device multiplies in hardware"
        )
    if asked != "auto":
        why = "as requested"
    return Precision(asked, used, why), warnings


# -------------------------------------------------------------------------------------------- data


def with_streams(facts: Facts, world: int) -> Recipe:
    """The recipe with its number of streams: part of the order of samples, chosen by the first
    start for good.
    """
    recipe, index = facts.recipe, facts.data.train
    streams = recipe.data.canonical_streams
    if streams is None and facts.saved is not None:
        streams = facts.saved.meta["sizes"]["canonical_streams"]
    if streams is None and facts.written is not None:
        streams = (facts.written.get("data") or {}).get("canonical_streams")
    if streams is None:
        samples = recipe.data.epoch_samples
        if samples is None and index is not None:
            samples = len(index)
        streams = config.streams_for(recipe, world, samples)
    return config.with_values(recipe, {"data.canonical_streams": streams})


def judged_sets(asked: Sequence[EvaluationSet], data: Data) -> list[Labelled]:
    """The labelled sets of an evaluation: of several, the first is learnt from."""
    found = []
    for each, index, classes in zip(asked, data.sets, data.set_classes, strict=False):
        if each.labelled:
            found.append(Labelled(each.key, index, classes))
    return found


def label_problems(index: ShardIndex, num_classes: int) -> list[str]:
    """What stands against these labels for a class term, one line a problem.

    -100 means no label, and is no problem.
    """
    labels = index.labels[index.labels != NO_LABEL]
    if not labels.size:
        return [
            "no sample of data.shards has a label (.cls); a class term needs some, or use mae or "
            "rcmae"
        ]
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        return [
            f"data.shards have labels {low} to {high}, model.num_classes={num_classes}; use "
            f"{high + 1} or more"
        ]
    return []


def all_without(key: str, index: ShardIndex, kinds: Sequence[str]) -> list[str]:
    """A problem for each kind of members that a task reads and no sample of a set has."""
    return [
        f"{key}: no sample has a .{suffix_of(kind)} ({kind}), which the task reads"
        for kind in kinds
        if len(index.without(kind)) == len(index)
    ]


def some_without(key: str, index: ShardIndex, kinds: Sequence[str], fate: str) -> list[str]:
    """A line for each kind of members that a task reads and some samples of a set lack.

    `fate`: what becomes of those samples."""
    told = []
    for kind in kinds:
        numbers = index.without(kind).tolist()
        named = ", ".join(index[number].id for number in numbers[:NAMED])
        if 0 < len(numbers) < len(index):
            told.append(
                f"{key}: {len(numbers):,} of {len(index):,} samples have no .{suffix_of(kind)} "
                f"({kind}) and are {fate}: {named}"
            )
    return told


def plan_of(
    recipe: Recipe, sight: Sight, problems: Problems
) -> tuple[Plan | None, Resolved | None]:
    """The order of the samples, and the numbers that follow; None where there is a problem."""
    index = sight.facts.data.train
    if recipe.classify.follow and problems and "images" not in recipe.batch.model_fields_set:
        return None, None  # what the batch follows from is refused
    undivided = config.batch_problems(recipe, sight.world)
    problems += undivided
    if index is None or undivided:
        return None, None
    data, world = recipe.data, sight.world
    plan, sizes = None, None
    with problems.collected():
        plan = Plan(
            index.counts,
            seed=data.seed,
            images=recipe.batch.images // data.repeats,
            streams=config.streams_for(recipe, world),
            window=data.shuffle_window,
            epoch_samples=data.epoch_samples,
            weights=index.weights,
        )
        samples = plan.samples_per_epoch * data.repeats
        sizes = config.resolve(recipe, world=world, samples_per_epoch=samples)
        small = cache_problem(
            index,
            streams=plan.streams,
            window=plan.window,
            nodes=world // sight.views[0].local_world,
            world=world,
            limit=int(data.cache_gb * 1e9),
        )
        if small:
            problems.append(small)
    return plan, sizes


def deepspeed_problems(recipe: Recipe, sizes: Resolved, task: Task, document: Any) -> list[str]:
    """What DeepSpeed's JSON says against the recipe, and what DeepSpeed says against it."""
    # costs seconds: only where it is used
    from rcmae.engines.deepspeed_config import config_problems, deepspeeds_problems

    settings = engine_settings(recipe, sizes, task.optimizing(recipe))
    problems = config_problems(document, settings, lr=sizes.lr, world=sizes.world)
    return problems + deepspeeds_problems(document, settings)
