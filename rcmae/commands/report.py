"""Show a run on one page, or several beside each other: curves, evaluations, pictures, where the
time went, what happened, the recipe.

    rcmae report RUN [RUN ...] [--out report.html]

One HTML file that opens anywhere: it fetches nothing, and nothing in it runs. A training writes
RUN/report.html by itself at each evaluation and at its end (log.report). Read-only but for that
file. Exit status: 0 written; 2 there is no such run; 1 the file cannot be written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; the exit status."""
    asked = _parser().parse_args(arguments)

    from rcmae.errors import Refused
    from rcmae.run.report import page

    out = asked.out or (asked.runs[0] / page.FILE if len(asked.runs) == 1 else Path(page.FILE))
    try:
        if asked.beside:
            from rcmae.run.report import beside

            os.nice(beside.NICENESS)
            beside.keep(asked.runs[0], out, asked.beside)
            return 0
        written = page.write(asked.runs, out, asks=True)
    except Refused as error:
        print(f"rcmae: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"rcmae: {error}", file=sys.stderr)
        return 1
    if asked.json:
        print(json.dumps(written._asdict() | {"path": str(written.path)}))
    else:
        print(f"{written.path}: {', '.join(written.runs)}, {written.bytes / 1e6:.1f} MB")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rcmae report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run.dir")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: RUN/report.html; of several runs report.html here",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    # of a training that started this: look so often, until standard input ends
    parser.add_argument("--beside", type=float, metavar="SECONDS", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
