"""What a task has to say: the loop, engines, stream, checkpoints and files are the same for all.

A task is an object without state of its own. It is asked in the order of a start: `look` on rank 0,
`judge` on every rank, then `network`, `objective` and `teacher` are built; then per batch, and per
evaluation. Nothing here knows a run, an engine or a launcher; what a method needs is handed to it.
CONTRIBUTING.md has a whole one.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import pydantic
import torch
from torch import nn

from rcmae import dist
from rcmae.config import Recipe, Resolved, Section
from rcmae.data.batch import Batch
from rcmae.data.cache import Cache
from rcmae.data.index import ShardIndex
from rcmae.data.masking import Mask
from rcmae.data.members.beyond import Highest
from rcmae.data.members.protocol import Members
from rcmae.data.members.whole import Whole, num_turns, whole_samples
from rcmae.data.patterns import Patterns
from rcmae.data.sets import ClassList
from rcmae.data.stream import Readers, labelled_batches, num_batches
from rcmae.data.transforms import CentreTransform, Normalise, Transform
from rcmae.engines.protocol import Optimizing
from rcmae.errors import Refused, did_you_mean
from rcmae.models.cost import StepCost
from rcmae.objectives import Objective
from rcmae.process import waits
from rcmae.weights.formats import WeightsFormat

T = TypeVar("T")
_log = logging.getLogger(__name__)


class EvaluationSet(NamedTuple):
    """Shards that an evaluation reads."""

    key: str  # of the recipe, for messages: evaluate.test_shards
    shards: Patterns
    labelled: bool = True  # whether each sample must have a label
    needs: tuple[str, ...] = ()  # kinds of members that each sample must have


class Saved(NamedTuple):
    """The checkpoint that a run resumes from, or starts from."""

    path: Path
    step: int
    images: int  # consumed
    meta: Mapping[str, Any]  # recipe, sizes, data_fingerprint, guard, best, versions
    is_own: bool  # of this run's folder; else a new run begins from it


@dataclass(frozen=True)
class Data:
    """The samples that a recipe names. What could not be read is None, and a problem already."""

    train: ShardIndex | None
    sets: tuple[ShardIndex, ...]  # as `Task.evaluation_sets` lists them; none if one is unreadable
    # files of classes beside the shards of `train`, and of each of the `sets`
    classes: tuple[ClassList, ...] = ()
    set_classes: tuple[tuple[ClassList, ...], ...] = ()
    # the largest numbers of a few maps of `train`, and of each of the `sets`, where maps are read
    numbers: tuple[Highest, ...] = ()
    set_numbers: tuple[tuple[Highest, ...], ...] = ()


@dataclass
class Judgement:
    """What a task finds in the facts."""

    problems: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)  # keys of the recipe that follow from them
    warnings: list[str] = field(default_factory=list)  # what may be meant, but seldom is
    notes: list[str] = field(default_factory=list)  # what was taken or chosen: a user is told


class Interrupted(Exception):
    """A stop was asked for in the middle of an evaluation. Raised on all ranks together."""


class Score(NamedTuple):
    """How good one network was, by the metric that its task ranks by."""

    metric: str  # as in "knn"; higher is better
    value: float


@dataclass
class LeftOut:
    """Samples of an evaluation's sets that this rank could not use, by the number of the set."""

    samples: dict[int, set[str]] = field(default_factory=dict)
    of: dict[int, int] = field(default_factory=dict)  # samples that all ranks look at

    def looks(self, number: int, count: int) -> None:
        """So many samples of a set are read; a second time for another network, say."""
        self.samples.setdefault(number, set())
        self.of[number] = max(count, self.of.get(number, 0))

    def note(self, number: int, told: str) -> None:
        """One cannot be used: "shard/key (what is wrong)". Logged once."""
        if told not in self.samples[number]:
            self.samples[number].add(told)
            _log.warning("left out of the evaluation: %s", told)


@dataclass(frozen=True)
class Evaluating:
    """What an evaluation may use. Collective: every rank evaluates, each its part of the sets.

    Raises:
        Interrupted: by `batches` and `pause`; the evaluation is left, and made again by the job
            that resumes. A task has nothing to do for it.
    """

    recipe: Recipe
    step: int
    student: nn.Module  # wrapped by the engine; call it
    teacher: nn.Module | None
    objective: Objective
    found: Any  # what `Task.look` gave
    sets: Sequence[ShardIndex]
    cache: Cache | None  # of this node, for remote shards
    normalise: Normalise
    device: torch.device
    # lets a stop request end the evaluation here. Collective: every rank calls
    pause: Callable[[], None] = lambda: None
    baselines: bool = True  # whether to judge networks, too, that training does not change

    @cached_property
    def left_out(self) -> LeftOut:
        """What of the sets could not be used so far."""
        return LeftOut()

    def batches(self, number: int, most: int | None = None) -> Iterator[Batch]:
        """This rank's batches of a set, in order, views cut from the centre; as many on each rank.

        A stop request is heard before each, also in the wait for one. Collective: every rank
        iterates to the end.

        Args:
            number: which of `sets`.
            most: samples, evenly spread over the set; None: all.
        """
        recipe, index = self.recipe, self.sets[number]
        left_out = self.left_out
        left_out.looks(number, len(index) if most is None else min(most, len(index)))
        found = labelled_batches(
            index,
            CentreTransform(
                recipe.model.image_hw, recipe.model.in_channels, recipe.data.max_pixels
            ),
            batch=recipe.evaluate.batch,
            rank=dist.rank(),
            world=dist.world(),
            readers=self._readers,
            on_bad=lambda bad: left_out.note(number, f"{bad.shard}/{bad.key} ({bad.reason})"),
            all_labelled=False,  # a start has refused those that have to be
            most=most,
        )
        turns = num_batches(index, recipe.evaluate.batch, dist.world(), most)
        return self._turns(found, turns)

    def whole(
        self,
        number: int,
        make: Callable[[Whole], T],
        kinds: Sequence[str] = (),
        optional: Sequence[str] = (),
    ) -> Iterator[T | None]:
        """This rank's samples of a set as they are, each once over all ranks; as many turns on
        each rank. None: a turn without a sample, or with one that cannot be used, which is logged.

        A stop request is heard before each, also in the wait for one. Collective: every rank
        iterates to the end.

        Args:
            number: which of `sets`.
            make: what a worker makes of a sample: decodes, resizes. It is picklable, and raises
                BadImage of a sample that cannot be used.
            kinds: of the members that each sample must have.
            optional: kinds that are read where a sample has them.
        """
        index, world = self.sets[number], dist.world()
        left_out = self.left_out
        left_out.looks(number, len(index))
        found = whole_samples(
            index,
            make,
            kinds=kinds,
            optional=optional,
            rank=dist.rank(),
            world=world,
            readers=self._readers,
            on_bad=lambda told: left_out.note(number, told),
        )
        return self._turns(found, num_turns(index, world))

    @property
    def _readers(self) -> Readers:
        return Readers(self.recipe.data.workers, cache=self.cache)

    def _turns(self, found: Iterator[T], turns: int) -> Iterator[T]:
        """What a rank reads, a stop request heard before each. Collective."""
        for _ in range(turns):
            try:
                with waits.waiting(f"samples of an evaluation, after step {self.step}"):
                    one = next(found)
            except waits.StopAsked as error:
                self.pause()  # the others do so, too, with what they have read
                raise Interrupted from error
            self.pause()
            yield one
        for _ in found:  # ends its workers
            pass


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found; the run writes it down."""

    event: Mapping[str, Any]  # for events.jsonl
    table: str  # for people
    caption: str  # of the table, for the summary
    says: str  # the line above the table in the log; {step} is filled in
    scalars: Mapping[str, Mapping[str, float]] = field(
        default_factory=dict
    )  # group -> name -> value
    best: Mapping[str, Score] = field(default_factory=dict)  # by network, of those that train
    # by network: how many directions its features use; an alarm where that falls to a tenth
    effective_rank: Mapping[str, float] = field(default_factory=dict)
    document: Mapping[str, Any] | None = None  # for evaluation/step-*.json; rank 0's
    # name -> JSON of evaluation/NAME-step-*.json; rank 0's
    files: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, np.ndarray] = field(default_factory=dict)  # name -> [H, W, 3]; rank 0's


class Ended(NamedTuple):
    """A run at its end, for a task's hints."""

    recipe: Recipe
    run_dir: Path
    is_done: bool  # the last step is done
    launcher: str  # what starts a module on as many ranks; of SLURM's templates, a recipe

    @property
    def place(self) -> str:
        """The run's folder as a word of a command line."""
        return shlex.quote(str(self.run_dir))

    def file(self, suffix: str) -> str:
        """A file named after the run, as a word of a command line."""
        return shlex.quote(f"{self.run_dir.name}{suffix}")

    def start(self, module: str, words: str) -> str:
        """The command line that starts a module (rcmae.train) with these words."""
        if self.launcher == "rcmae":  # one process
            return f"rcmae {module.removeprefix('rcmae.')} {words}"
        whole = self.launcher.endswith(".sbatch")
        return f"{self.launcher} {words}" if whole else f"{self.launcher} -m {module} {words}"


class Task(Protocol):
    """What a run trains and how it is judged."""

    name: str  # as in task.name=
    module: str  # that a user starts: rcmae.NAME, by `rcmae NAME` or by a launcher
    options: type[Section] | None  # of task.options, for a task from outside; None: it has none
    frozen: tuple[str, ...]  # keys beside the core's that make two runs the same training
    reports: tuple[str, ...]  # keys under `frozen` that change nothing in the training
    metrics: Mapping[str, str]  # of a Score -> its name for people
    # name -> a file of the whole network for other code: `rcmae export --format NAME`
    formats: Mapping[str, WeightsFormat]

    # before a start

    def look(self, recipe: Recipe, saved: Saved | None) -> Any:
        """Read whatever lies on disks and is not a shard: names, headers of weights. Rank 0 alone.

        Returns:
            A small picklable value, broadcast to `judge` and `network` on every rank.

        Raises:
            Refused: it cannot be read.
        """

    def judge(
        self, recipe: Recipe, found: Any, data: Data, saved: Saved | None, world: int
    ) -> Judgement:
        """What stands against this recipe on these data. Pure: no disk, no collective.

        Args:
            found: what `look` gave; None where that was refused.
        """

    def evaluation_sets(self, recipe: Recipe) -> Sequence[EvaluationSet]:
        """Shards that the evaluation reads, besides data.shards."""

    def mask(self, recipe: Recipe) -> Mask:
        """Which patches of an image the network sees. Raises Refused."""

    def transform(self, recipe: Recipe) -> Transform:
        """Image bytes to views. Raises Refused."""

    def members(self, recipe: Recipe) -> Members | None:
        """How a sample of data.shards is seen where more of it is read than image and label; None:
        `transform` alone sees the image.
        """

    # to build; `found` is what `look` gave, the recipe has what `judge` added

    def network(self, recipe: Recipe, found: Any, saved: Saved | None) -> nn.Module:
        """What is trained, the same on every rank. Collective: every rank calls."""

    def objective(self, recipe: Recipe, sizes: Resolved) -> Objective:
        """Its loss. Called after `network`."""

    def teacher(self, student: nn.Module, objective: Objective) -> nn.Module | None:
        """What follows the student as its moving average; None where nothing does."""

    def optimizing(self, recipe: Recipe) -> Optimizing:
        """The optimizer's rule and groups."""

    def cost(self, recipe: Recipe, *, fused_attention: bool = True) -> StepCost:
        """What a step takes for one image, by sizes alone: for the planner, and for MFU. Pure.

        Args:
            fused_attention: as in `kernels.attention`.

        Raises:
            Refused: sizes that do not fit together.
        """

    # each step

    def pair(self, recipe: Recipe, micros: list[Batch]) -> list[Batch]:
        """A rank's micro-batches of a step, each with what it needs of another."""

    def ready(
        self, recipe: Recipe, batch: Batch, normalise: Callable[[Batch], Batch], step: int
    ) -> Batch:
        """A normalised batch on the device, as the objective wants it.

        Args:
            normalise: for what `pair` added.
            step: of the stream, the key of what is drawn for a whole step.
        """

    # to judge

    def evaluate(self, context: Evaluating) -> Evaluated:
        """How good student and teacher are. Collective: every rank calls."""

    def picture(self, context: Evaluating, batch: Batch) -> np.ndarray | None:
        """[H, W, 3] uint8 of a few images of the stream; None: draws nothing. Collective."""

    def hints(self, ended: Ended) -> list[tuple[str, str]]:
        """What to run next: (what it does, command line)."""


def options_of(task: Task, recipe: Recipe) -> Section | None:
    """`task.options` of a recipe, as the task's own class; None where it has none.

    Raises:
        Refused: an option that the task does not have, or a value that does not fit, all named.
    """
    given = recipe.task.options
    if task.options is None:
        if given:
            raise Refused(f"task.options: task.name={recipe.task.name} has none; leave it out")
        return None
    try:
        return task.options.model_validate(given)
    except pydantic.ValidationError as error:
        known = task.options.model_fields
        problems = []
        for item in error.errors():
            key = ".".join(map(str, item["loc"]))
            if item["type"] == "extra_forbidden":
                problems.append(f"task.options: unknown option {key!r}; {did_you_mean(key, known)}")
            else:
                problems.append(f"task.options.{key}: {item['msg'].lower()}, got {item['input']!r}")
        raise Refused("\n".join(problems)) from error
