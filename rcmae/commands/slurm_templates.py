"""Copy the templates of SLURM jobs to a folder, to be changed there.

    rcmae slurm-templates DIR [--overwrite]

DIR/README.md says what each is for, and what happens when. Exit status: 0 copied; 2 a file is there
already, or DIR is one, and nothing was copied; 1 the folder cannot be written.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Copy; the exit status."""
    parser = argparse.ArgumentParser(
        prog="rcmae slurm-templates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="made if it is not there")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    asked = parser.parse_args(arguments)
    from rcmae.files import shipped

    if asked.folder.exists() and not asked.folder.is_dir():
        print(f"rcmae: {asked.folder} is a file; give a folder", file=sys.stderr)
        return 2
    templates = [path for path in sorted(shipped("slurm").iterdir()) if _is_template(path)]
    there = [path.name for path in templates if (asked.folder / path.name).exists()]
    if there and not asked.overwrite:
        print(
            f"rcmae: {asked.folder} has {', '.join(there)} already; give another folder, or "
            "--overwrite",
            file=sys.stderr,
        )
        return 2
    try:
        asked.folder.mkdir(parents=True, exist_ok=True)
        for path in templates:
            shutil.copy(path, asked.folder)  # with its mode: some are to be executed
    except OSError as error:
        print(f"rcmae: {error}", file=sys.stderr)
        return 1
    for path in templates:
        print(asked.folder / path.name)
    return 0


def _is_template(path: Path) -> bool:
    # env.sh is the settings of a site, made from env.example.sh
    return path.is_file() and path.name != "env.sh"
