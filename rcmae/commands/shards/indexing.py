"""`rcmae shards index`: an index for tars where they lie."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from rcmae.commands.shards.arguments import (
    PATTERNS,
    STOPPED,
    add_kinds,
    parser_of,
    register_kinds,
)
from rcmae.process import cores
from rcmae.process.console import say

INDEX = """Index WebDataset tars where they lie: training then starts at once and reads by offset.

Of files here only headers are read, and nothing is rewritten: `index.json` and `index-*.bin` are
put beside the shards, or all into --out. What of a tar is not used is counted, with names. A key
ends at the first dot of a name, as in WebDataset; --keys last-dot reads `trip v1.07.jpg` as an
image with the key `trip v1.07`, and the index remembers it. Remote tars are read whole,
once, and hashed, so that each later copy is verified; they need --out: upload its two files beside
the shards, or give the folder as data.index. What an index already says of shards that still have
their size and time is kept. If a shard or a folder cannot be used, nothing is changed in its
folder.
"""


def index(arguments: Sequence[str] | None = None) -> int:
    """Index shards; the exit status."""
    parser = parser_of("index", INDEX)
    parser.add_argument("patterns", nargs="+", metavar="PATTERN", help=PATTERNS)
    parser.add_argument(
        "--out", metavar="FOLDER", help="put the index of all there (default: beside the shards)"
    )
    parser.add_argument(
        "--rebuild",
        action="store_true",
        help="read these shards again, whatever an index says of them",
    )
    parser.add_argument(
        "--keys",
        choices=("first-dot", "last-dot"),
        help="where the key of a member's name ends (default: what it was; at first first-dot)",
    )
    add_kinds(parser)
    parser.add_argument(
        "--jobs",
        type=int,
        default=cores.usable(),
        help="processes (default: one for each core)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    asked = parser.parse_args(arguments)
    from rich.console import Console
    from rich.progress import track

    from rcmae.data.packing.indexing import by_folder, indexed_folder
    from rcmae.errors import Refused

    try:
        register_kinds(asked.kind)
        folders = track(
            by_folder(asked.patterns, asked.out).items(),
            "reading headers",
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        told = [
            indexed_folder(folder, paths, rebuild=asked.rebuild, jobs=asked.jobs, keys=asked.keys)
            for folder, paths in folders
        ]
    except (Refused, OSError) as error:
        say(f"rcmae: {error}", error=True)
        return 2
    except KeyboardInterrupt:
        say("stopped; run the same command again to resume", error=True)
        return STOPPED
    if asked.json:
        say(json.dumps({"indexes": told}, indent=1))
        return 0
    for facts in told:
        print_index(facts)
    return 0


def print_index(facts: dict[str, Any]) -> None:
    """Print what is in an index, for people."""
    say(
        f"{facts['folder']}: {facts['samples']:,} samples in {facts['shards']} shards "
        f"({facts['read']} read now)"
    )
    if facts["unlabelled"]:
        say(f"  {facts['unlabelled']:,} samples have no label")
    for kind, count in facts["members"].items():
        say(f"  {count:,} samples have a member of the kind {kind}")
    for note in facts["notes"]:
        say(f"  {note['text']}")
