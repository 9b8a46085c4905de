#!/usr/bin/env python3
"""Check this package against folders of recorded numbers: the same weights, images and masks in,
the same numbers out.

    python tools/check_parity.py FOLDER [FOLDER ...] [--json]

A folder holds `fixture.json` (sizes, formulas, limits, a checksum for each file) and
`*.safetensors`. Every size and limit is read from it, everything is computed by the package's own
code in float64 and in float32, and every array and value of the folder must be compared, or be
named here as left out with the reason.

Exit status: 0 all within limits; 1 something is not, or a folder or a part of one has no check; 2
unusable input, and nothing else is wrong."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from parity.report import check, lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    verdicts = [check(path) for path in options.folders]
    passed = all(verdict.status == "passed" for verdict in verdicts)
    if options.json:
        print(
            json.dumps(
                {"passed": passed, "folders": [verdict.document() for verdict in verdicts]},
                indent=1,
            )
        )
    else:
        for verdict in verdicts:
            print("\n".join(lines(verdict)))
        print(
            f"{sum(verdict.status == 'passed' for verdict in verdicts)} of {len(verdicts)} "
            "folders passed"
        )
    if passed:
        return 0
    found = {verdict.status for verdict in verdicts}
    return 2 if found <= {"passed", "unusable"} else 1


if __name__ == "__main__":
    raise SystemExit(main())
