"""List the shipped recipes, or print one with all its settings.

    rcmae recipe
        the names, a line each
    rcmae recipe NAME [key=value ...]
        the recipe as a training would have it: defaults filled in, key=value set over it

What it prints is a recipe, too: rcmae recipe NAME > mine.yaml is a start for one's own. Exit
status: 0; 2 there is no such recipe, or it is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


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
    asked = parser.parse_intermixed_args(arguments)
    from rcmae import config
    from rcmae.errors import Refused

    if asked.recipe is None:
        for path in sorted(config.RECIPES.glob("*.yaml")):
            print(f"{path.stem:<30} {''.join(header(path)[:1]).lstrip('# ')}")
        return 0
    try:
        print(resolved(asked.recipe, asked.overrides), end="")
    except Refused as error:
        print(f"rcmae: {error}", file=sys.stderr)
        return 2
    return 0


def header(path: Path) -> list[str]:
    """The comments that a recipe begins with."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line)
    return lines


def resolved(name: str, overrides: Sequence[str]) -> str:
    """A recipe with every setting, as YAML, under the comments that its file begins with.

    Raises:
        Refused: every problem.
    """
    import yaml

    from rcmae import config
    from rcmae.planning.recipe import NO_SHARDS, load

    recipe = load(name, overrides)
    tree = recipe.model_dump(mode="json")
    comments = header(config.recipe_path(name))
    if recipe.data.shards == NO_SHARDS:
        tree["data"]["shards"] = []
        comments.append("# data.shards is yours to give.")
    body = yaml.safe_dump(tree, sort_keys=False)
    return "\n".join([*comments, body])
