"""A recipe from YAML and `key=value`, or one refusal that names every problem."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from rcmae import plugins
from rcmae.config.alternatives import give_way
from rcmae.config.checks import contradictions
from rcmae.config.limits import limit_problems, text_problems, truth_problems
from rcmae.config.objective import (
    OWN_LOSS,
    TASKS_OWN,
    Catalogue,
    ObjectiveOptions,
    own_objective,
    shipped,
)
from rcmae.config.recipe import Recipe, known_keys
from rcmae.config.sections import RECIPES
from rcmae.config.trees import tree_of
from rcmae.errors import Refused, did_you_mean
from rcmae.files import patiently

_SHOWN = 2000  # characters of a problem
_DEEPEST = 16  # sections of a key


def recipe_path(name: str, task: str | None = None) -> Path:
    """The file of a recipe given by path or by the name of a shipped one.

    Args:
        name: of it.
        task: of the command that asks, whose recipes a hint names; None: any.

    Raises:
        Refused: there is no such file, with the names that are near.
    """
    given = Path(os.path.expanduser(name))
    for candidate in (given, RECIPES / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    if (given / "recipe.yaml").is_file():
        raise Refused(f"{name} is a folder of a run; its recipe is {given / 'recipe.yaml'}")
    if given.is_dir():
        raise Refused(
            f"{name} is a folder, not a recipe; to train on its images: RECIPE data.images={name} "
            "(rcmae recipe lists the shipped ones)"
        )
    close = difflib.get_close_matches(name, recipe_names(task), n=3, cutoff=0.75)
    if close:
        near = " or ".join(map(repr, close))
        raise Refused(f"no recipe {name!r}; did you mean {near}? (rcmae recipe lists all)")
    raise Refused(
        f"no recipe {name!r}: it is neither a file nor a shipped recipe, which rcmae recipe lists"
    )


def recipe_names(task: str | None = None) -> list[str]:
    """The shipped recipes, of a task alone where one is given: their names begin with it, but for
    those of a pretraining.
    """
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    others = [each for each in COMMANDS if each != "pretrain"]
    if task in others:
        return [name for name in names if name.startswith(task)]
    if task == "pretrain":
        return [name for name in names if not name.startswith(tuple(others))]
    return names


def load(
    name: str,
    overrides: Sequence[str] = (),
    *,
    task: str | None = None,
    objectives: Catalogue | None = None,
) -> Recipe:
    """The recipe of a file with `key=value` set over it.

    Args:
        name: a path or a shipped recipe's name.
        overrides: `section.key=value`, values in YAML.
        task: of the command that loads it; None: any.
        objectives: what `objective.name` may be and which keys belong to it; None: as shipped.

    Raises:
        Refused: one message that names every problem.
    """
    path = recipe_path(name, task)
    try:
        tree = tree_of(patiently(path.read_text)) or {}
    except UnicodeDecodeError as error:
        raise Refused(f"{path} is not YAML: {error}") from error
    except Refused as error:
        raise Refused(f"{path} {error}") from error
    if not isinstance(tree, dict):
        raise Refused(f"{path}: a recipe is a mapping of sections, got {type(tree).__name__}")
    usual = tree.get("schedule")
    lengths = dict(usual) if isinstance(usual, dict) else {}
    problems = _override(tree, overrides)
    given = {item.partition("=")[0] for item in overrides}
    of_line = len(problems)  # of the command line, as far as that is known
    give_way(tree, given, lengths)
    if any(item.startswith("task.name=") for item in overrides):
        drop_objective(tree, overrides)
    problems += name_task(tree, task)
    problems += crop_as_image_size(tree)
    drop_null_shards(tree)
    name_run(tree, path.stem)
    recipe, more = _parse(tree, objectives or shipped())
    problems += more.values()
    of_line += sum(key in given for key in more)
    if recipe is not None:
        problems += truth_problems(tree, recipe.model_dump()) + text_problems(tree)
        problems += limit_problems(recipe) or contradictions(recipe)
    if problems or recipe is None:
        head = "the command line, over " if of_line == len(problems) else ""
        lines = [f"  {_short(problem)}" for problem in problems]
        raise Refused(f"{head}{path}:\n" + "\n".join(lines))
    return recipe


def _short(problem: str) -> str:
    """A problem that a terminal can show: values may be of any length."""
    half = _SHOWN // 2
    return problem if len(problem) <= _SHOWN else f"{problem[:half]} ... {problem[-half:]}"


def drop_null_shards(tree: dict[str, Any]) -> None:
    """`data.shards=null`, and no value at all, name none."""
    data = tree.get("data")
    if isinstance(data, dict) and data.get("shards", ()) is None:
        del data["shards"]


def name_run(tree: dict[str, Any], stem: str) -> None:
    """Fill in the run's name and folder, after the recipe's file."""
    run = tree.setdefault("run", {})
    if isinstance(run, dict):
        for key, usual in {"name": stem, "dir": f"runs/{run.get('name') or stem}"}.items():
            if run.get(key) is None:
                run[key] = usual


def drop_objective(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Leave out the objective of the file, where the command line has another task with its own."""
    task, objective = tree.get("task"), tree.get("objective")
    brings_its_own = isinstance(task, dict) and task.get("name") != "pretrain"
    asked = any(item.startswith(("objective.name=", "objective=")) for item in overrides)
    if brings_its_own and not asked and isinstance(objective, dict):
        tree["objective"] = {}


def name_task(tree: dict[str, Any], task: str | None) -> list[str]:
    """Fill in the task, and the objective of a task that brings its own; what stands against it.

    Args:
        task: of the command that loads the recipe; None: any.
    """
    section = tree.get("task", {})
    objective = tree.get("objective", {})
    if not isinstance(section, dict) or not isinstance(objective, dict):
        return []  # refused by its type
    own = own_objective(objective.get("name"))
    name = section.get("name") or own or task or "pretrain"
    tree["task"] = {**section, "name": name}
    if name != "pretrain":
        mine = name if name in OWN_LOSS else TASKS_OWN
        tree["objective"] = {**objective, "name": mine}
        if objective.get("name") not in (None, mine):
            said = f"objective.name={objective['name']} is a pretraining's"
            if not section.get("name") and name in COMMANDS:
                return [f"{said}: train it by `rcmae train`, not by `rcmae {COMMANDS[str(name)]}`"]
            return [f"{said}, and task.name={name} has its own; leave one of them out"]
    if task is None or name == task or (task == "pretrain" and plugins.is_plugin(str(name))):
        return []
    if name not in COMMANDS:
        return [f"task.name: unknown task {name!r}; {did_you_mean(str(name), COMMANDS)}"]
    right, wrong = COMMANDS[str(name)], COMMANDS[task]
    return [f"task.name={name} is trained by `rcmae {right}`, not by `rcmae {wrong}`"]


def crop_as_image_size(tree: dict[str, Any]) -> list[str]:
    """Let `segment.crop`, where it is given, be the size of the model's images; what stands
    against it.
    """
    segment, model = tree.get("segment", {}), tree.setdefault("model", {})
    if not isinstance(segment, dict) or not isinstance(model, dict) or not segment.get("crop"):
        return []  # not given, or refused by its type
    crop = segment["crop"]
    if model.setdefault("image_size", crop) != crop:
        return [
            f"segment.crop={crop} is the size of the network's images, and "
            f"model.image_size={model['image_size']} is another; leave one of them out"
        ]
    return []


# tasks that are shipped -> the command that trains each
COMMANDS = {"pretrain": "train"} | {name: name for name in OWN_LOSS}


def _override(tree: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    problems = []
    for number, item in enumerate(overrides):
        key, equals, text = item.partition("=")
        *sections, last = key.split(".")
        if not equals or not last:
            problems += _unequalled(item, overrides[number + 1 :], overrides[:number])
            continue
        if len(sections) > _DEEPEST:
            problems.append(f"{key!r}: no key is {len(sections)} sections deep")
            continue
        try:
            value = tree_of(text)
        except Refused as error:
            told = "is not YAML" if str(error).startswith("is not YAML") else error
            problems.append(f"{item[:100]!r}: the value {told}")
            continue
        node = tree
        for section in sections:
            if not isinstance(node.get(section), dict):
                node[section] = {}
            node = node[section]
        node[last] = value
    return problems


def _unequalled(item: str, behind: Sequence[str], before: Sequence[str]) -> list[str]:
    """What is wrong with a word that has no `=`, by those beside it."""
    if before and _is_key(before[-1]) and not _is_key(item):
        return []  # told with its key
    if not _is_key(item):
        return [f"{item!r} is not of the form key=value, such as batch.images=64"]
    value = behind[0] if behind and "=" not in behind[0] else "VALUE"
    return [f"{item} has no value: write {item}={value}, without a space"]


def _is_key(item: str) -> bool:
    section, dot, name = item.partition(".")
    return bool(dot and name) and section in Recipe.model_fields and "=" not in item


NESTED = (("objective", "options"), ("evaluate", "dense"))  # sections inside sections


def _parse(tree: Mapping[str, Any], catalogue: Catalogue) -> tuple[Recipe | None, dict[str, str]]:
    """The recipe, or what is wrong with it, by keys."""
    try:
        return Recipe.model_validate(tree, context={"objectives": catalogue}), {}
    except pydantic.ValidationError as error:
        lines: dict[str, str] = {}  # one line a key, though each branch of a union complains
        for item in error.errors():
            place = [str(part) for part in item["loc"]]
            key = ".".join(place[: 3 if tuple(place[:2]) in NESTED else 2])
            if item["type"] == "refused":
                lines[key] = item["msg"]
            elif item["type"] == "extra_forbidden":
                lines[".".join(place)] = _unknown(place, tree, catalogue)
            elif len(place) == 1 and key in Recipe.model_fields:
                lines[key] = (
                    f"{key} is a section, got {item['input']!r}; set its keys, such as "
                    f"{key}.{_first_key(key)}=VALUE (rcmae recipe --keys {key}. lists them)"
                )
            elif key == "data.shards":
                lines[key] = (
                    f"{key}: wants a pattern, a list of patterns, or, for a mixture, a list "
                    f"of {{shards: PATTERN, "
                    f"weight: above 0}}, got {tree['data']['shards']!r}"
                )
            elif key == "model.class_tokens" and item["input"] == 0:
                lines[key] = "model.class_tokens=0: set model.cls_token=false for none"
            elif key in lines:
                lines[key] += f", or {item['msg'].lower()}"
            else:
                told = item["msg"].removeprefix("Value error, ")
                told = f"{told[0].lower()}{told[1:]}"
                lines[key] = f"{key}: {told}, got {item['input']!r}"
        return None, lines


def _first_key(section: str) -> str:
    """A key of a section, for an example."""
    return next(iter(known_keys([section], {})), "KEY")


def _unknown(place: Sequence[str], tree: Mapping[str, Any], catalogue: Catalogue) -> str:
    """The message about a key that is unknown, or belongs to another objective."""
    key = place[-1]
    section = tree.get("objective")
    if len(place) == 2 and place[0] == "objective" and isinstance(section, Mapping):
        name = section.get("name", ObjectiveOptions.model_fields["name"].default)
        if key in known_keys(("objective", "options"), section):
            return f"objective.{key} is an option of {name}: 'objective.options={{{key}: ...}}'"
        owners = [name for name, each in catalogue.objectives.items() if key in each.model_fields]
        for term, each in catalogue.terms.items():
            if key in each.model_fields:
                owners.append(f"the term {term}")
        if owners:
            others = ", ".join(owners[:-1])
            whose = f"{others} and {owners[-1]}" if others else owners[-1]
            return f"objective.{key} belongs to {whose}, and has no effect with {name}; remove it"
    named = ".".join(part for part in place[:-1] if "[" not in part)  # not the branch of a union
    known = known_keys(place[:-1], section)
    hint = did_you_mean(key, known)
    elsewhere = [] if difflib.get_close_matches(key, known, n=1, cutoff=0.75) else _keys_like(key)
    if elsewhere and len(place) <= 2:
        hint = f"did you mean {' or '.join(map(repr, elsewhere))}?"
    return f"unknown key {key!r}{f' in {named}' if named else ''}; {hint}"


def _keys_like(name: str) -> list[str]:
    """Keys of any section with this name or one near it, at most three."""
    found: dict[str, list[str]] = {}
    for section in Recipe.model_fields:
        for key in known_keys([section], {}):
            found.setdefault(key, []).append(f"{section}.{key}")
    close = difflib.get_close_matches(name, found, n=1, cutoff=0.8)
    return found[close[0]][:3] if close else []
