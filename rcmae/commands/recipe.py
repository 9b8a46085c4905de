"""List the shipped recipes, or print one with all its settings.

    rcmae recipe
        the names, one per line
    rcmae recipe NAME [key=value ...]
        the recipe as a training uses it, with defaults filled in
    rcmae recipe --keys [PREFIX]
        every key, or those with this prefix: default, unit, meaning
    rcmae recipe --schema
        the same as JSON schema, for editors

The output is itself a recipe: rcmae recipe NAME > mine.yaml starts your own. Exit
status: 0; 2 there is no such recipe, or it is wrong.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel

    from rcmae.config import Recipe

END = "...\n"  # of a YAML document that is one value


def main(arguments: Sequence[str] | None = None) -> int:
    """List or print; the exit status."""
    parser = argparse.ArgumentParser(
        prog="rcmae recipe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "recipe", nargs="?", metavar="NAME", help="a shipped recipe, or a YAML file"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="set a recipe key"
    )
    told = parser.add_mutually_exclusive_group()
    told.add_argument(
        "--keys", nargs="?", const="", metavar="PREFIX", help="list keys, such as those of data."
    )
    told.add_argument("--schema", action="store_true", help="print the JSON schema of a recipe")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    asked = parser.parse_intermixed_args(arguments)
    try:
        status = _printed(asked)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _printed(asked: argparse.Namespace) -> int:
    """Print what is asked for; the exit status."""
    if asked.schema:
        from rcmae.config.keys import schema

        print(json.dumps(schema(), indent=1))
        return 0
    if asked.keys is not None:
        return list_keys(asked.keys, as_json=asked.json)
    from rcmae.errors import Refused
    from rcmae.planning.recipe import load

    if asked.recipe is None:
        list_recipes(as_json=asked.json)
        return 0
    try:
        if asked.json:
            print(json.dumps(tree_of(load(asked.recipe, asked.overrides)), indent=1))
        else:
            print(resolved(asked.recipe, asked.overrides), end="")
    except Refused as error:
        print(f"rcmae: {error}", file=sys.stderr)
        return 2
    return 0


def list_recipes(*, as_json: bool) -> None:
    """Print the names of the shipped recipes, and what each is for."""
    from rcmae import config

    paths = sorted(config.RECIPES.glob("*.yaml"))
    about = {path.stem: "".join(header(path)[:1]).lstrip("# ") for path in paths}
    if as_json:
        print(json.dumps(about, indent=1))
        return
    for name, said in about.items():
        print(f"{name:<30} {said}")


def list_keys(prefix: str, *, as_json: bool) -> int:
    """Print the keys with this prefix; the exit status."""
    from rcmae.config.keys import keys
    from rcmae.errors import did_you_mean

    found = keys(prefix)
    if not found:
        names = [key.name for key in keys()]
        sections = dict.fromkeys(name.partition(".")[0] for name in names)
        is_near = difflib.get_close_matches(prefix, names, n=1)
        near = did_you_mean(prefix, names if is_near else sections)
        print(f"rcmae: no key begins with {prefix!r}; {near}", file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps([key._asdict() for key in found], indent=1, default=list))
        return 0
    for key in found:
        owners = f" (of {', '.join(key.owners)})" if key.owners else ""
        print(f"{key.name} = {shown(key.default)}  [{key.unit}]{owners}")
        print(textwrap.fill(key.meaning, 96, initial_indent="    ", subsequent_indent="    "))
    return 0


def shown(value: Any) -> str:
    """A default as a recipe has it, on one line."""
    return json.dumps(value, default=list)


def header(path: Path) -> list[str]:
    """The comments that a recipe begins with."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line)
    return lines


def tree_of(recipe: Recipe) -> dict[str, Any]:
    """Every setting of a recipe; without shards where it has none of its own."""
    from rcmae.planning.recipe import NO_SHARDS

    tree = recipe.model_dump(mode="json")
    if recipe.data.shards == NO_SHARDS:
        tree["data"]["shards"] = []
    return tree


def resolved(name: str, overrides: Sequence[str]) -> str:
    """A recipe with every setting, as YAML, under the comments that its file begins with.

    Raises:
        Refused: every problem.
    """
    from rcmae import config
    from rcmae.planning.recipe import load

    recipe = load(name, overrides)
    tree = tree_of(recipe)
    comments = header(config.recipe_path(name))
    if not tree["data"]["shards"]:
        comments.append("# data.shards is yours to give.")
    return "\n".join([*comments, commented(tree, recipe)])


def commented(tree: Mapping[str, Any], recipe: BaseModel) -> str:
    """A recipe as YAML, each key under its meaning."""
    import yaml

    lines = []
    for section, values in tree.items():
        fields = type(getattr(recipe, section)).model_fields
        lines.append(f"{section}:" if values else f"{section}: {{}}")
        for name, value in values.items():
            meaning = " ".join((fields[name].description or "").split())
            lines += textwrap.wrap(meaning, 98, initial_indent="  # ", subsequent_indent="  # ")
            text = yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=10**6)
            lines.append(f"  {name}: {text.removesuffix(END).rstrip()}")
    return "\n".join(lines) + "\n"
