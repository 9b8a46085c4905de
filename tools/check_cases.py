"""Run a folder of cases: situations that went wrong once, each a folder with a program `run.py`
that makes the situation and judges what this package does in it.

    python tools/check_cases.py CASES [NAME ...] [--timeout-s 600] [--json]

A program exits with 0 where all is right, 1 where it is not, 2 where what it looks for has another
name by now. Cases take seconds to minutes each, one after the other. Exit status: 0 all are right.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
VERDICTS = {0: "right", 1: "WRONG", 2: "moved"}
LAST = 5  # lines that are shown of what a case printed


class Verdict(NamedTuple):
    """How a case ended."""

    name: str
    verdict: str
    seconds: float
    said: str


def verdicts(folder: Path, names: Sequence[str], timeout_s: float) -> Iterator[Verdict]:
    """Each case's verdict, as it ends."""
    for program in sorted(folder.glob("*/run.py")):
        name = program.parent.name
        if names and name not in names:
            continue
        begin = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, str(program)],
                env={**os.environ, "PROJECT": str(ROOT), "PYTHON": sys.executable},
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
            )
            verdict = VERDICTS.get(done.returncode, f"ended with {done.returncode}")
            said = done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            verdict = f"not done after {timeout_s:.0f} s"
            said = ""
        yield Verdict(name, verdict, time.monotonic() - begin, said)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="CASES")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="of a case (600)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    asked = parser.parse_args(arguments)
    found = []
    for each in verdicts(asked.folder, asked.names, asked.timeout_s):
        found.append(each)
        line = f"{each.name:<32} {each.verdict:<8} {each.seconds:6.1f} s"
        print(line, file=sys.stderr if asked.json else sys.stdout, flush=True)
        if each.verdict != "right" and not asked.json:
            print("    " + "\n    ".join(each.said.splitlines()[-LAST:]), flush=True)
    if not found:
        print(f"error: {asked.folder} has no case", file=sys.stderr)
        return 2
    if asked.json:
        print(json.dumps([each._asdict() for each in found], indent=1))
    wrong = [each for each in found if each.verdict != "right"]
    print(f"{len(found) - len(wrong)} of {len(found)} cases are right", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
