"""Every key of a recipe, for people and for editors: default, unit, meaning."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rcmae.config.objective import ObjectiveOptions, shipped
from rcmae.config.recipe import Recipe

# how a key's name ends -> its unit
UNITS = {
    "_s": "seconds",
    "_gb": "10^9 bytes",
    "steps": "steps",
    "epochs": "epochs",
    "minutes": "minutes",
    "image_size": "pixels",
    "patch_size": "pixels",
    "max_pixels": "pixels",
    "images": "images",
    "per_device": "images",
    "batch": "images",
    "keep_every": "steps",
    "smallest": "patches",
    "largest": "patches",
    "samples": "samples",
    "window": "samples",
}


class Key(NamedTuple):
    """A key of a recipe."""

    name: str  # section.key
    default: Any
    unit: str  # or the values that it may have
    meaning: str
    owners: tuple[str, ...] = ()  # objectives and terms that have it; none: every recipe has


def keys(prefix: str = "") -> list[Key]:
    """The keys with this prefix, in the order of the sections."""
    found = []
    for section, field in Recipe.model_fields.items():
        model = ObjectiveOptions if section == "objective" else field.annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        found += [_key(section, name, each) for name, each in model.model_fields.items()]
        if section == "objective":
            found += _objectives_own()
    return [key for key in found if key.name.startswith(prefix)]


def _objectives_own() -> list[Key]:
    """The keys that only some objectives, or terms, have."""
    catalogue = shipped()
    whose: dict[str, list[str]] = {}
    fields: dict[str, FieldInfo] = {}
    for kind in (catalogue.objectives, catalogue.terms):
        for owner, options in kind.items():
            for name, field in options.model_fields.items():
                whose.setdefault(name, []).append(owner)
                fields.setdefault(name, field)
    return [
        _key("objective", name, field)._replace(owners=tuple(dict.fromkeys(whose[name])))
        for name, field in fields.items()
    ]


def _key(section: str, name: str, field: FieldInfo) -> Key:
    default = field.get_default(call_default_factory=True)
    meaning = " ".join((field.description or "").split())
    return Key(f"{section}.{name}", default, unit_of(name, field), meaning)


def unit_of(name: str, field: FieldInfo) -> str:
    """A key's unit, or the values that it may have."""
    choices = [str(each) for each in _choices(field.annotation)]
    if choices:
        return " | ".join(choices)
    annotations = set(_plain_types(field.annotation))
    if bool in annotations:
        return "true | false"
    for end, unit in UNITS.items():
        if name.endswith(end) and annotations & {int, float}:
            return unit
    bounds = {type(each).__name__: each for each in field.metadata}
    if float in annotations and getattr(bounds.get("Le"), "le", None) == 1:
        return "0 to 1"
    names = {str: "text", int: "count", float: "number", dict: "mapping"}
    return names.get(next(iter(annotations), str), "text")


def _choices(annotation: Any) -> Iterator[Any]:
    """The values of a Literal, alone or in a union."""
    if typing.get_origin(annotation) is Literal:
        yield from typing.get_args(annotation)
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from _choices(part)


def _plain_types(annotation: Any) -> Iterator[type]:
    """The types that a value may have, those of lists' members too."""
    parts = typing.get_args(annotation)
    if isinstance(annotation, type) and not parts:
        if annotation is not type(None):
            yield annotation
    elif typing.get_origin(annotation) is dict:
        yield dict
    else:
        for part in parts:
            yield from _plain_types(part)


def schema() -> Mapping[str, Any]:
    """The JSON schema of a recipe, for editors. Keys of all objectives are in it; which of them
    belong together only a training says.
    """
    made = Recipe.model_json_schema()
    section = made["$defs"]["ObjectiveOptions"]
    catalogue = shipped()
    for kind in (catalogue.terms, catalogue.objectives):
        for options in kind.values():
            section["properties"] |= options.model_json_schema()["properties"]
    section["properties"]["options"] = {"type": "object", "description": "Of MODULE:NAME."}
    return made
