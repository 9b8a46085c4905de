"""The runs of a comparison: trained where they are missing, grouped where only seeds differ."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pydantic

from rcmae import config
from rcmae.config import Recipe
from rcmae.config.trees import tree_of
from rcmae.errors import Refused
from rcmae.models.build import student_sizes

OBJECTIVES = {
    "mae": ["objective.name=mae"],
    "rcmae": ["objective.name=rcmae"],
    "supmae": ["objective.name=supmae"],
    "rcsupmae": ["objective.name=rcmae", "objective.terms={class: 0.01}"],
    "bootmae": ["objective.name=bootmae"],
}
LABELLED = ("supmae", "rcsupmae")  # trained with labels
# Keys without effect on what is learnt, and the seeds: runs that differ in these are one group.
NOT_COMPARED = ("run", "log", "data.seed", "data.workers", "data.cache_dir")


class TrainingFailed(RuntimeError):
    """A training ended with an error; says which, and where its log is."""


class Run(NamedTuple):
    """A finished run."""

    folder: Path
    recipe: Recipe
    steps: int

    @property
    def seed(self) -> int:
        """Of its weights and, as a rule, its data."""
        return self.recipe.run.seed


class Group(NamedTuple):
    """Runs that differ in their seeds alone."""

    name: str  # of the objective, with what sets the group apart from others of that objective
    runs: tuple[Run, ...]  # by seed
    labelled: bool  # trained with labels


@dataclass(frozen=True)
class Comparison:
    """Objectives to be trained by one recipe. The class head is four times as wide as the encoder,
    as published for ViT-B.
    """

    recipe: str  # a file, or the name of a shipped one
    overrides: Sequence[str]  # key=value, for all
    objectives: Sequence[str]  # some of OBJECTIVES, or MODULE:NAME with its default options
    seeds: Sequence[int]
    runs: Path  # the folder of the runs
    classes: int  # of the training images

    def overrides_of(self, name: str) -> list[str]:
        """What the recipe gets for an objective. Raises Refused."""
        given = [*self.overrides, *OBJECTIVES.get(name, [f"objective.name={name}"])]
        if name in LABELLED:
            width = student_sizes(config.load(self.recipe, given).model).embed_dim
            given += [f"model.num_classes={self.classes}", f"model.class_hidden={4 * width}"]
        return given

    def folder(self, name: str, seed: int) -> Path:
        """Where a run lives."""
        return self.runs / f"{name.replace(':', '.')}-s{seed}"

    def groups(self) -> list[Group]:
        """The finished runs of each objective. Raises Refused."""
        found = []
        for name in self.objectives:
            folders = [self.folder(name, seed) for seed in self.seeds]
            runs = tuple(read_run(folder) for folder in folders if is_finished(folder))
            if runs:
                found.append(Group(name, runs, name in LABELLED))
        return found


def is_finished(run: Path) -> bool:
    """Whether a run has reached its last step."""
    return _outcome(run).get("exit_status") == 0


def _outcome(run: Path) -> dict[str, Any]:
    try:
        found = json.loads((run / "outcome.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def train_all(compared: Comparison, tell: Callable[[str], None] = lambda text: None) -> None:
    """Every run that is not finished, one after the other, seed by seed.

    Raises:
        Refused: a recipe is wrong.
        TrainingFailed: one failed.
    """
    wanted = [(seed, name) for seed in compared.seeds for name in compared.objectives]
    for number, (seed, name) in enumerate(wanted, 1):
        run = compared.folder(name, seed)
        place = f"run {number} of {len(wanted)}, {run}"
        if is_finished(run):
            tell(f"{place}: finished before")
            continue
        log = run.with_name(f"{run.name}.log")
        tell(f"{place}: training; its log: {log}")
        own = [f"run.seed={seed}", f"data.seed={seed}", f"run.dir={run}"]
        words = [compared.recipe, *compared.overrides_of(name), *own]
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with log.open("a") as out:
            command = [sys.executable, "-m", "rcmae.train", *words]
            done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT)
        if done.returncode:
            raise TrainingFailed(f"{run} ended with exit status {done.returncode}; see {log}")
        tell(f"{place}: finished after {time.monotonic() - began:.0f} s")


def read_run(folder: Path) -> Run:
    """A finished run. Raises Refused where the folder holds none."""
    file = folder / "recipe.yaml"
    try:
        recipe = config.stored(tree_of(file.read_text()))
    except (OSError, Refused, UnicodeDecodeError, pydantic.ValidationError) as error:
        raise Refused(f"{folder} is not a run's folder: {error}") from error
    if not is_finished(folder):
        raise Refused(f"{folder} is not finished; resume it with the command that started it")
    return Run(folder, recipe, int(_outcome(folder)["step"]))


def on_one_process(recipe: Recipe) -> Recipe:
    """The recipe with engine local, to time its step in this process."""
    return config.with_values(recipe, {"engine.name": "local", "engine.config": None})


# ------------------------------------------------------------------------------------------ grouped


def grouped(folders: Sequence[Path]) -> list[Group]:
    """Finished runs, those together that differ in their seeds alone.

    Raises:
        Refused: a folder is not a finished run, or two have the same recipe and seed.
    """
    runs = [read_run(folder) for folder in folders]
    together: dict[str, list[Run]] = {}
    for run in runs:
        together.setdefault(json.dumps(_identity(run), sort_keys=True), []).append(run)
    identities = [json.loads(each) for each in together]
    groups = []
    for members, identity in zip(together.values(), identities, strict=True):
        members.sort(key=lambda run: (run.seed, run.recipe.data.seed))
        _refuse_twins(members)
        alike = [each for each in identities if _named(each) == _named(identity)]
        labelled = "classes" in members[0].recipe.objective.student_outputs
        groups.append(Group(_title(identity, alike), tuple(members), labelled))
    return groups


def _refuse_twins(members: Sequence[Run]) -> None:
    for one, two in itertools.pairwise(members):
        if (one.seed, one.recipe.data.seed) == (two.seed, two.recipe.data.seed):
            raise Refused(
                f"{one.folder} and {two.folder} have the same recipe and seed {one.seed}: give "
                "one of them, or train the other with --seed"
            )


def _identity(run: Run) -> dict[str, Any]:
    """What a run was trained by, without its seeds: key -> value."""
    keys = _flat(run.recipe.model_dump(mode="json"))
    hidden = tuple(f"{name}." for name in NOT_COMPARED)
    kept = {key: value for key, value in keys.items() if not f"{key}.".startswith(hidden)}
    return {**kept, "steps": run.steps}


def _flat(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{before}{name}.")
        else:
            found[before + name] = value
    return found


def _named(identity: Mapping[str, Any]) -> str:
    """The objective, with the terms that were added to it."""
    terms = [key.rpartition(".")[2] for key in identity if key.startswith("objective.terms.")]
    return " + ".join([str(identity["objective.name"]), *terms])


def _title(identity: Mapping[str, Any], alike: Sequence[Mapping[str, Any]]) -> str:
    """The name of a group; among others of its objective, with the keys that set it apart."""
    differing = []
    for key in sorted({key for each in alike for key in each}):
        values = {json.dumps(each.get(key), sort_keys=True) for each in alike}
        if len(values) > 1:
            differing.append(f"{key}={identity.get(key)}")
    return ", ".join([_named(identity), *differing])
