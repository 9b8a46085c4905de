"""`rcmae shards check`: what is in shards, what is wrong with them, and a clean copy."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcmae.commands.arguments import check_verb
from rcmae.commands.shards.arguments import (
    PATTERNS,
    STOPPED,
    add_kinds,
    parser_of,
    register_kinds,
)
from rcmae.process import cores
from rcmae.process.console import in_line, say

if TYPE_CHECKING:
    from rcmae.data.packing.verify import Checked

NO_LABEL = -100  # as in an index
SHOWN = 20  # of a list, for people
CHECK = """Look at every byte of a shard set: what is in it, what is wrong, and a clean copy of it.

    rcmae shards check verify PATTERN [PATTERN ...] [--picture FILE.png] [--json]
    rcmae shards check repair PATTERN [PATTERN ...] --out FOLDER [--drop] [--jobs N] [--json]
    rcmae shards check report PATTERN [PATTERN ...] [--json]
    rcmae shards check report --ledger RUN [--json]

`verify` reads each tar to its end, compares it with the index beside it (samples, and SHA-256 where
that has it), decodes each image and map strictly, compares maps (.seg.png) and annotations (.json,
COCO's) with their image, classes.txt and categories.json, looks for keys that are there twice, and
counts classes, sizes and restart markers (--picture draws the sizes). It names any flaw that a
decoder warns of, also where training would read the image with a smear in it. What it cannot see is
damage that leaves a valid image: other colours in a JPEG, other pixels in a file without a checksum
(.npy, .bmp, .tif).
`repair` writes what can be read into FOLDER under the same names, with an index: images without a
flaw, the first of each key, and of a tar that is cut short what comes before the cut. A shard of
which a copy would lose what is not understood (files without a suffix, links that lead nowhere,
several images under one key, bytes behind the end) is written with --drop only. `report`
tells what the index says, and the pixels of each class in maps and the boxes of each category in
annotations, without reading images; with --ledger, which samples a run (its folder,
or its events.jsonl) could not read, and what took their place.
"""


def check(arguments: Sequence[str] | None = None) -> int:
    """Verify, repair or report; the exit status."""
    parser = parser_of("check", CHECK)
    verbs = ("verify", "report", "repair")
    parser.add_argument("command", choices=verbs, help="see above")
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help=PATTERNS)
    parser.add_argument(
        "--ledger", type=Path, metavar="RUN", help="a run's folder or events.jsonl, for report"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="of the clean shards, for repair"
    )
    parser.add_argument(
        "--drop",
        action="store_true",
        help="leave out of a repaired shard what is not understood of it",
    )
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="of the sizes, for verify")
    add_kinds(parser)
    parser.add_argument(
        "--jobs",
        type=int,
        default=cores.usable(),
        help="processes (default: one for each core)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    words = sys.argv[1:] if arguments is None else list(arguments)
    check_verb(parser, words, verbs, "verify")
    asked = parser.parse_args(words)
    from rcmae.errors import Refused

    try:
        register_kinds(asked.kind)
        told = _checked(asked)
    except (Refused, OSError) as error:
        say(f"rcmae: {error}", error=True)
        return 2
    except KeyboardInterrupt:
        say("stopped", error=True)
        return STOPPED
    try:
        if asked.json:
            say(json.dumps(told, indent=1))
        elif "bad_samples" in told:
            print_ledger(told["bad_samples"])
        else:
            print_verdict(told, asked.command)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    wrong = ("bad_samples", "rejected", "keys_in_several_shards", "short", "not_written")
    return 1 if any(told.get(name) for name in wrong) else 0


def _checked(asked: argparse.Namespace) -> dict[str, Any]:
    from rcmae.data.packing import verify
    from rcmae.data.packing.ledger import ledger
    from rcmae.errors import Refused

    if (asked.command == "repair") != (asked.out is not None):
        raise Refused("repair writes into a new folder: give --out with it, and with nothing else")
    if asked.drop and asked.command != "repair":
        raise Refused("--drop belongs to repair")
    if asked.ledger is not None and asked.command != "report":
        raise Refused("--ledger belongs to report")
    if asked.ledger is not None:
        return {"bad_samples": ledger(asked.ledger)}
    if asked.command == "report":
        return verify.described(asked.patterns, asked.jobs)
    if asked.command == "repair":
        copying = verify.Copying(asked.out, asked.drop)
        told = verify.repaired(asked.patterns, copying, asked.jobs, _shown)
    else:
        told = verify.verified(asked.patterns, asked.jobs, _shown)
    if asked.picture is not None:
        from rcmae.data.packing.drawing import draw_sides

        draw_sides(told["shorter_sides"], asked.picture)
    return told


def _shown(shards: Iterable[Checked], count: int) -> Iterable[Checked]:
    from rich.console import Console
    from rich.progress import track

    return track(
        shards,
        "reading shards",
        total=count,
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )


def print_verdict(found: dict[str, Any], what: str) -> None:
    """Print what was found of a set, for people."""
    say(
        f"{what}: {found['samples']:,} samples in {len(found['shards'])} shards, "
        f"{found['bytes'] / 1e6:,.1f} MB"
    )
    _print_classes(found["classes"])
    _print_sides({int(side): count for side, count in found.get("shorter_sides", {}).items()})
    for number, count in found.get("channels", {}).items():
        if number != "3":
            say(f"  {count:,} images have {number} channels")
    if marked := found.get("restart_markers"):
        say(f"  {marked:,} of {found['samples']:,} images have restart markers")
    for members in found.get("members", {}).values():
        for line in members["lines"]:
            say(f"  {line}")
    if left_out := found.get("left_out"):
        say(f"  left out, for nothing in them can be read: {', '.join(left_out)}")
    for note in found.get("notes", []):
        say(f"  {note['text']}")
    lines = []
    for name in found.get("not_written", []):
        lines.append(
            f"{name}: not written, because a copy would lose what the lines above list; repair "
            "it, or "
            "leave that out with --drop"
        )
    for key, names in found.get("keys_in_several_shards", {}).items():
        lines.append(f"the same key in several shards: {key}: in {', '.join(names)}")
    for row in found.get("rejected", []):
        where = f"/{row['key']} at byte {row['offset']}" if row["offset"] >= 0 else ""
        lines.append(f"{row['shard']}{where}: {row['reason']}")
    for line in lines[:SHOWN]:
        say(f"  {in_line(line)}")
    if len(lines) > SHOWN:
        say(f"  ... and {len(lines) - SHOWN} more; --json has all")


def _print_classes(classes: dict[str, int]) -> None:
    labelled = {label: count for label, count in classes.items() if int(label) != NO_LABEL}
    if labelled:
        least = min(labelled, key=labelled.__getitem__)
        most = max(labelled, key=labelled.__getitem__)
        if labelled[least] == labelled[most]:
            say(f"  {len(labelled)} classes of {labelled[least]} samples")
        else:
            say(
                f"  {len(labelled)} classes of {labelled[least]} (class {least}) to "
                f"{labelled[most]} (class {most}) samples"
            )
    if unlabelled := classes.get(str(NO_LABEL), 0):
        say(f"  {unlabelled:,} samples have no label")


def _print_sides(sides: dict[int, int]) -> None:
    if not sides:
        return
    import numpy as np

    ordered = sorted(sides)
    middle = int(np.median(np.repeat(ordered, [sides[side] for side in ordered])))
    say(f"  shorter side {min(sides)} to {max(sides)} pixels, median {middle}")


def print_ledger(entries: Sequence[dict[str, Any]]) -> None:
    """Print what a run could not read, for people: each sample once, with how often it was met."""
    if not entries:
        say("no bad samples")
        return
    met: dict[tuple[str, str], list[dict[str, Any]]] = {}
    reasons: dict[str, int] = {}
    for entry in entries:
        met.setdefault((entry["shard"], entry["key"]), []).append(entry)
        reasons[entry["reason"]] = reasons.get(entry["reason"], 0) + 1
    say(f"{len(met)} samples could not be read, {len(entries)} times:")
    for (shard, key), times in sorted(met.items()):
        first = times[0]
        instead = sorted({entry["replaced_by"] for entry in times})
        told = (
            f"{shard}/{key} at byte {first['offset']}, {len(times)} times: {first['reason']}; "
            f"read instead: {', '.join(instead)}"
        )
        say(f"  {in_line(told)}")
    for reason, count in sorted(reasons.items(), key=lambda each: -each[1])[:5]:
        say(f"  {count:>6} x {in_line(reason)}")
