#!/usr/bin/env python3
"""Index WebDataset tars where they lie: training then starts at once and reads every image by
offset.

    python tools/index_shards.py PATTERN [PATTERN ...] [--out FOLDER] [--rebuild] [--json]

Patterns are those of data.shards: 'data/train-{000000..000099}.tar', 'data/*.tar', plain paths,
URLs, `pipe:` commands. Of files here only headers are read, and nothing is rewritten: `index.json`
and `index-*.bin` are put beside the shards, or all into --out. Tars from elsewhere are read whole,
once, and hashed, so that each later copy is verified; they need --out: upload its two files beside
the shards, or give the folder as data.index. What an index already says of shards that still have
their size is kept. Exit status: 0 written; 2 a shard or a folder cannot be used,
and nothing is changed in its folder; 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.progress import track

from rcmae.data.index import ShardIndex
from rcmae.data.patterns import expand
from rcmae.data.sources import is_remote, redacted
from rcmae.data.tars import NO_LABEL, Scan
from rcmae.errors import Refused


def index_folder(
    folder: str, paths: Sequence[str], *, rebuild: bool, jobs: int
) -> dict[str, object]:
    """Write the index of one folder and tell what is in it."""
    scans: list[Scan] = []
    index = ShardIndex.refresh(folder, paths, rebuild=rebuild, jobs=jobs, on_scan=scans.append)
    return {
        "folder": folder,
        "shards": len(index.shards),
        "read": len(scans),
        "samples": len(index),
        "unlabelled": int((index.labels == NO_LABEL).sum()),
        "without_image": sum(scan.without_image for scan in scans),
        "bad_labels": sum(scan.bad_labels for scan in scans),
        "fingerprint": index.fingerprint,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "patterns",
        nargs="+",
        metavar="PATTERN",
        help="shards, as data.shards names them: 'data/train-{000000..000099}.tar', 'data/*.tar', "
        "paths, URLs, `pipe:`"
        " commands",
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help="put the index of all there (default: beside the shards)"
    )
    parser.add_argument(
        "--rebuild",
        action="store_true",
        help="read these shards again, whatever an index says of them",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="processes (default: one for each core)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    try:
        folders: dict[str, list[str]] = {}
        for path in expand(options.patterns):
            if options.out is None and is_remote(path):
                raise Refused(
                    f"{redacted(path)} lies elsewhere; say with --out where its index is to be put"
                )
            folders.setdefault(options.out or os.path.dirname(path) or ".", []).append(path)
        told = [
            index_folder(folder, paths, rebuild=options.rebuild, jobs=options.jobs)
            for folder, paths in track(
                folders.items(),
                "reading headers",
                console=Console(stderr=True),
                disable=not sys.stderr.isatty(),
            )
        ]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps({"indexes": told}, indent=1))
        return 0
    for facts in told:
        print(
            f"{facts['folder']}: {facts['samples']:,} samples in {facts['shards']} shards "
            f"({facts['read']} read now)"
        )
        for count, what in (
            (facts["unlabelled"], "samples have no label"),
            (
                facts["bad_labels"],
                "of the read ones have a .cls that is no number: they count as unlabelled",
            ),
            (facts["without_image"], "samples of the read shards have no image: left out"),
        ):
            if count:
                print(f"  {count:,} {what}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
