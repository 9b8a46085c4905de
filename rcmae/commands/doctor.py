"""Check that this node has what a run needs. Each finding is green, yellow or red, with its remedy.

    rcmae doctor [RECIPE [key=value ...]] [--gpus N] [--json]
        this node
    srun rcmae doctor ...
        or torchrun --no-python rcmae doctor: all nodes, compared, links measured

Without a recipe, the checks of its folder, shards and precision are skipped. Nothing is trained;
test files are removed. Exit status: 0 no red; 1 something is red; 2 the
input is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from rcmae.planning.findings import OnRanks


def main(arguments: Sequence[str] | None = None, *, now: Callable[[], float] = time.time) -> int:
    """Examine and report; the exit status. Collective: every rank calls.

    `now`: this node's clock.
    """
    asked = parse(arguments)
    from rich.console import Console

    from rcmae import config, dist
    from rcmae.errors import Refused
    from rcmae.planning.cluster import examine
    from rcmae.planning.findings import COLOURS

    try:
        recipe = config.load(asked.recipe, asked.overrides) if asked.recipe else None
        found = examine(recipe, asked.gpus, now)
    except Refused as error:
        print(f"rcmae: {error}", file=sys.stderr)
        return 2
    world = dist.world()
    worst = COLOURS[max(COLOURS.index(each.finding.colour) for each in found)]
    if dist.launched().rank == 0:
        if asked.json:
            rows = [{**each.finding._asdict(), "ranks": each.ranks} for each in found]
            print(json.dumps({"verdict": worst, "world": world, "findings": rows}, indent=1))
        else:
            print_report(found, world, Console(width=max(Console().width, 100)))
        sys.stdout.flush()
    dist.finish()
    return 1 if worst == "red" else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="rcmae doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="recipe keys, as for rcmae train",
    )
    parser.add_argument(
        "--gpus", type=int, help="GPUs that a process should see (what the scheduler gave it)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_intermixed_args(arguments)


def print_report(found: Sequence[OnRanks], world: int, console: Console) -> None:
    """The findings for people."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for finding, ranks in found:
        at = "" if len(ranks) == world else f" [dim](rank {', '.join(map(str, ranks))})[/]"
        way = f"\n[bold]{finding.way_out}[/]" if finding.way_out else ""
        table.add_row(
            f"[{finding.colour}]{finding.colour}[/]", finding.check, f"{finding.found}{at}{way}"
        )
    console.print(table)
