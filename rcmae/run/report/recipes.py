"""What makes a run's recipe another than the one it stands on, or than those of other runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from rcmae import config
from rcmae.config.recipe import leaves, with_task
from rcmae.errors import Refused
from rcmae.run.report.reading import Seen

_NOT_COMPARED = ("run.dir", "run.name")
_NOWHERE = "none.tar"  # stands for shards where a shipped recipe leaves them to its user


class Base(NamedTuple):
    """What a recipe stands on."""

    name: str  # of a shipped recipe; empty: the defaults of all keys
    values: dict[str, Any]  # key -> value


class Change(NamedTuple):
    """A key whose values differ."""

    key: str
    values: tuple[str, ...]  # of the base and the run, or of each run


def changes(recipe: Mapping[str, Any]) -> tuple[str, list[Change]]:
    """The shipped recipe that a recipe stands on (empty: none), and what differs from it."""
    mine = _flat(recipe)
    base = base_of(recipe, mine)
    return base.name, _changes([base.values, mine])


def between(runs: Sequence[Seen]) -> list[Change]:
    """The keys in which these runs differ."""
    return _changes([_flat(run.recipe) for run in runs])


def base_of(recipe: Mapping[str, Any], mine: Mapping[str, Any]) -> Base:
    """The shipped recipe of the run's name, else the one that the fewest keys differ from, else the
    defaults.
    """
    named = str(_section(recipe, "run").get("name"))
    shipped = sorted(path.stem for path in config.RECIPES.glob("*.yaml"))
    if named in shipped:
        shipped = [named]
    task = _section(recipe, "task").get("name", "pretrain")
    found = [Base("", dict(_defaults()))]
    for name in shipped:
        try:
            loaded = _shipped(name)
        except (Refused, ValidationError):
            continue
        if loaded.task.name == task:
            found.append(Base(name, _flat(loaded.model_dump(mode="json"))))
    if named in shipped and len(found) > 1:
        return found[-1]
    return min(found, key=lambda base: len(_changes([base.values, mine])))


def as_yaml(recipe: Mapping[str, Any]) -> str:
    """The whole recipe."""
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)


def _changes(sides: Sequence[Mapping[str, Any]]) -> list[Change]:
    keys = dict.fromkeys(key for side in sides for key in side)
    same_objective = len({side.get("objective.name") for side in sides}) == 1
    found = []
    for key in keys:
        if same_objective and not all(key in side for side in sides):
            continue  # an older recipe does not have it
        texts = tuple(_text(side[key]) if key in side else "not set" for side in sides)
        if len(set(texts)) > 1:
            found.append(Change(key, texts))
    return found


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Key -> value; of keys that an older recipe lacks, the default."""
    mine = dict(leaves(with_task(recipe)))
    found = {**_defaults(), **mine}
    own = {key for key in mine if key.startswith("objective.")}
    return {
        key: value
        for key, value in found.items()
        if key not in _NOT_COMPARED and (key in own or not key.startswith("objective."))
    }


@cache
def _defaults() -> Mapping[str, Any]:
    return dict(leaves(config.Recipe().model_dump(mode="json")))


def _shipped(name: str) -> config.Recipe:
    """A shipped recipe, its shards those that it names, if it names any. Raises Refused."""
    try:
        return config.load(name)
    except Refused:
        return config.load(name, [f"data.shards={_NOWHERE}"])


def _section(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = recipe.get(name)
    return section if isinstance(section, Mapping) else {}


def _text(value: Any) -> str:
    if value == _NOWHERE:
        return "yours to give"
    return value if isinstance(value, str) else json.dumps(value, default=str)
