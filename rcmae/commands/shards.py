"""Make, index and check WebDataset shards.

    rcmae shards make IMAGES [IMAGES ...] OUT     shards from folders, lists, Parquet or other tars
    rcmae shards index PATTERN [PATTERN ...]      an index for tars where they lie
    rcmae shards check verify|repair|report ...   what is in shards, and what is wrong with them

`rcmae shards make --help` and so on tell the arguments of each. Exit status: 0 done; 1 check found
something wrong; 2 the input cannot be used; 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcmae.process import cores
from rcmae.process.console import say

if TYPE_CHECKING:
    from rcmae.data.packing.verify import Checked
    from rcmae.data.packing.writer import Report

NO_LABEL = -100  # as in an index
SHOWN = 20  # of a list, for people
STOPPED = 130  # exit status
PATTERNS = (
    "shards, as data.shards names them: 'data/train-{000000..000099}.tar', 'data/*.tar', paths, "
    "URLs, `pipe:` commands"
)

MAKE = """Make WebDataset shards, with their index, from images.

IMAGES is a folder with a sub-folder for each class, or with images alone (no labels then); or a
.csv or .tsv file with the columns `path` (from the file's folder) and, if wanted, `label`; or
.parquet files with a column `image` (bytes, or a struct with `bytes`) and, if wanted, `label`; or
.tar files, whose images and labels are laid out anew. Labels are whole numbers from 0, or names;
an empty cell and -1 are none (--unlabelled, where others have one); --label names another column.
Class folders are numbered in the order of the alphabet, or of their numbers; hidden and system
folders are not read. OUT gets NAME-000000.tar, ..., `index.json` and, with class names,
`classes.txt`: line i, counted from 0, is the class of label i (--classes takes such a file, so that
a validation set gets the training set's labels). ImageNet-1k in one command:

    rcmae shards make ILSVRC2012/train shards --name train --size 256

Every image is decoded once; what cannot be is left out and listed, as are those whose shorter side
has fewer pixels than --min-size. The order is that of a hash of the name, so each shard mixes the
classes. The same images and options give the same bytes. --size makes images whose shorter side has
more pixels than that smaller, as JPEG; all others go in as they are. Images of any number of
channels are taken, as .npy or TIFF (which stay .npy or TIFF when made smaller). A job that was
killed or stopped goes on where it was when the same command is started again.
"""
INDEX = """Index WebDataset tars where they lie: training then starts at once and reads by offset.

Of files here only headers are read, and nothing is rewritten: `index.json` and `index-*.bin` are
put beside the shards, or all into --out. What of a tar is not used is counted, with names. A key
ends at the first dot of a name, as in WebDataset; --keys last-dot reads `trip v1.07.jpg` as an
image with the key `trip v1.07`, and the index remembers it. Tars from elsewhere are read whole,
once, and hashed, so that each later copy is verified; they need --out: upload its two files beside
the shards, or give the folder as data.index. What an index already says of shards that still have
their size and time is kept. If a shard or a folder cannot be used, nothing is changed in its
folder.
"""
CHECK = """Look at every byte of a shard set: what is in it, what is wrong, and a clean copy of it.

    rcmae shards check verify PATTERN [PATTERN ...] [--picture FILE.png] [--json]
    rcmae shards check repair PATTERN [PATTERN ...] --out FOLDER [--drop] [--jobs N] [--json]
    rcmae shards check report PATTERN [PATTERN ...] [--json]
    rcmae shards check report --ledger RUN [--json]

`verify` reads each tar to its end, compares it with the index beside it (samples, and SHA-256 where
that has it), decodes each image strictly, looks for keys that are there twice, and counts classes
and sizes (--picture draws the sizes). It names any flaw that a decoder warns of, also where
training would read the image with a smear in it. What it cannot see is damage that leaves a valid
image: other colours in a JPEG, other pixels in a file without a checksum (.npy, .bmp, .tif).
`repair` writes what can be read into FOLDER under the same names, with an index: images without a
flaw, the first of each key, and of a tar that is cut short what comes before the cut. A shard of
which a copy would lose what is not understood (files without a suffix, links that lead nowhere,
several images under one key, bytes behind the end) is written with --drop only. `report`
tells what the index says, without reading images; with --ledger, which samples a run (its folder,
or its events.jsonl) could not read, and what took their place.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the three; the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"make": make, "index": index, "check": check}
    parser = argparse.ArgumentParser(
        prog="rcmae shards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=tuple(commands))
    chosen = parser.parse_args(words[:1]).command
    return commands[chosen](words[1:])


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"rcmae shards {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


# --------------------------------------------------------------------------------------------- make


def _make_arguments() -> argparse.ArgumentParser:
    parser = _parser("make", MAKE)
    parser.add_argument(
        "images", nargs="+", metavar="IMAGES", help="a folder, a list, .parquet or .tar files"
    )
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="folder of the shards, their index.json and classes.txt; made if need be",
    )
    parser.add_argument(
        "--name", default="train", help="what the shards' names begin with (default: %(default)s)"
    )
    parser.add_argument(
        "--samples", type=_positive, default=1000, help="most in a shard (default: %(default)s)"
    )
    parser.add_argument(
        "--size", type=_positive, help="shorter side, in pixels, of images that have more"
    )
    parser.add_argument(
        "--quality",
        type=_positive,
        default=90,
        help="of the JPEG they become (default: %(default)s)",
    )
    parser.add_argument(
        "--min-size", type=_positive, default=1, help="leave out images with fewer pixels a side"
    )
    parser.add_argument(
        "--classes", type=Path, help="file with a class on each line, in the order of the labels"
    )
    parser.add_argument(
        "--label", metavar="COLUMN", help="that has the labels, where it is not label; none: none"
    )
    parser.add_argument(
        "--unlabelled", action="store_true", help="take images without a label among others"
    )
    parser.add_argument(
        "--jobs", type=_positive, default=cores.usable(), help="processes (default: the cores)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace shards of this name")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def make(arguments: Sequence[str] | None = None) -> int:
    """Make shards; the exit status."""
    asked = _make_arguments().parse_args(arguments)
    from rcmae.data.packing.writer import PackingOptions, make_shards
    from rcmae.errors import Refused

    try:
        options = PackingOptions(
            name=asked.name,
            samples=asked.samples,
            size=asked.size,
            quality=asked.quality,
            min_size=asked.min_size,
            classes=None if asked.classes is None else _lines(asked.classes),
            label=asked.label,
            unlabelled=asked.unlabelled,
            jobs=asked.jobs,
            overwrite=asked.overwrite,
            progress=sys.stderr.isatty(),
        )
        report = make_shards(asked.images, asked.out, options)
    except (Refused, OSError) as error:
        say(f"error: {error}", error=True)
        return 2
    except KeyboardInterrupt:
        say("stopped; the same command goes on", error=True)
        return STOPPED
    if asked.json:
        rejected = [reject._asdict() for reject in report.rejected]
        say(json.dumps(report._asdict() | {"rejected": rejected}, indent=1))
    else:
        print_report(report, asked.out)
    return 0


def _lines(path: Path) -> list[str]:
    from rcmae.errors import Refused

    try:
        return path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise Refused(f"{path}: is no text in UTF-8 ({error})") from error


def print_report(report: Report, out: Path) -> None:
    """Print what was made, for people."""
    from rcmae.data.packing.inputs import some

    say(
        f"{out}: {report.samples:,} images of {len(report.classes) or 'no'} classes"
        f" in {len(report.shards)} shards, {report.bytes / 1e6:,.1f} MB"
    )
    for note in report.notes:
        say(f"  {note}")
    if report.kept:
        say(f"  {report.kept:,} shards were there from a job that did not end")
    if report.other_files:
        say(
            f"  {report.other_files:,} other files were not looked at: "
            f"{some(report.such_as, report.other_files)}"
        )
    for reject in report.rejected:
        say(f"  left out: {reject.path} ({reject.reason})")


# -------------------------------------------------------------------------------------------- index


def index(arguments: Sequence[str] | None = None) -> int:
    """Index shards; the exit status."""
    parser = _parser("index", INDEX)
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
        say(f"error: {error}", error=True)
        return 2
    except KeyboardInterrupt:
        say("stopped; the same command goes on", error=True)
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
    for note in facts["notes"]:
        say(f"  {note['text']}")


# -------------------------------------------------------------------------------------------- check


def check(arguments: Sequence[str] | None = None) -> int:
    """Verify, repair or report; the exit status."""
    parser = _parser("check", CHECK)
    parser.add_argument("command", choices=("verify", "report", "repair"), help="see above")
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
    parser.add_argument(
        "--jobs",
        type=int,
        default=cores.usable(),
        help="processes (default: one for each core)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    asked = parser.parse_args(arguments)
    from rcmae.errors import Refused

    try:
        told = _checked(asked)
    except (Refused, OSError) as error:
        say(f"error: {error}", error=True)
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
    from rcmae.errors import Refused

    if (asked.command == "repair") != (asked.out is not None):
        raise Refused("repair writes into a new folder: give --out with it, and with nothing else")
    if asked.drop and asked.command != "repair":
        raise Refused("--drop belongs to repair")
    if asked.ledger is not None and asked.command != "report":
        raise Refused("--ledger belongs to report")
    if asked.ledger is not None:
        return {"bad_samples": verify.ledger(asked.ledger)}
    if asked.command == "report":
        return verify.described(asked.patterns)
    if asked.command == "repair":
        copying = verify.Copying(asked.out, asked.drop)
        told = verify.repaired(asked.patterns, copying, asked.jobs, _shown)
    else:
        told = verify.verified(asked.patterns, asked.jobs, _shown)
    if asked.picture is not None:
        verify.draw_sides(told["shorter_sides"], asked.picture)
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
    if left_out := found.get("left_out"):
        say(f"  left out, for nothing in them can be read: {', '.join(left_out)}")
    for note in found.get("notes", []):
        say(f"  {note['text']}")
    lines = []
    for name in found.get("not_written", []):
        lines.append(
            f"{name}: not written, for a copy would lose what the lines above tell; mend it, or "
            "leave that out with --drop"
        )
    for key, names in found.get("keys_in_several_shards", {}).items():
        lines.append(f"the same key in several shards: {key}: in {', '.join(names)}")
    for row in found.get("rejected", []):
        where = f"/{row['key']} at byte {row['offset']}" if row["offset"] >= 0 else ""
        lines.append(f"{row['shard']}{where}: {row['reason']}")
    for line in lines[:SHOWN]:
        say(f"  {line}")
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
        say(
            f"  {shard}/{key} at byte {first['offset']}, {len(times)} times: {first['reason']}; "
            f"read instead: {', '.join(instead)}"
        )
    for reason, count in sorted(reasons.items(), key=lambda each: -each[1])[:5]:
        say(f"  {count:>6} x {reason}")


if __name__ == "__main__":
    raise SystemExit(main())
