"""Write a run's student or teacher to a file that others read: safetensors, MAE's and RC-MAE's
.pth, timm's names.

    rcmae export RUN --format timm --out encoder.safetensors
    rcmae export RUN/checkpoints/step-00001000 --what student --format mae --out encoder.pth

RUN stands for its newest valid checkpoint. Checksums are verified first; weights pass tensor by
tensor, so a network of any size fits into memory. Exit status: 0 written; 2 these arguments do not
go together; 1 the checkpoint is damaged or the file could not be written, and what was there before
still is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rcmae.errors import Refused
from rcmae.weights.layouts import KIND, LAYOUTS


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    options = _parser().parse_args(arguments)
    from rcmae.checkpoint import CheckpointError, find_checkpoint
    from rcmae.weights.writing import export

    try:
        manifest, passed_over = find_checkpoint(options.source)
        for problem in passed_over:
            print(f"passed over: {problem}", file=sys.stderr)
        done = export(
            manifest,
            options.out,
            layout=options.format,
            network=options.what,
            overwrite=options.overwrite,
        )
    except (Refused, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, Refused) else 1
    if options.json:
        document = done._asdict() | {"path": str(done.path), "checkpoint": str(manifest.path)}
        print(json.dumps(document, indent=1))
        return 0
    print(
        f"{done.path}: {' and '.join(done.networks)} of step {done.step:,} ({manifest.path}), "
        f"{done.tensors} tensors, {done.bytes / 1e6:,.1f} MB\n  {done.use}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    layouts = "\n".join(f"  {name:<12} {layout.about}" for name, layout in LAYOUTS.items())
    parser = argparse.ArgumentParser(
        prog="rcmae export",
        description=__doc__,
        epilog=f"formats:\n{layouts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument(
        "--what",
        choices=KIND,
        help="default: the teacher where there is one, which RC-MAE fine-tunes",
    )
    parser.add_argument("--format", choices=LAYOUTS, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser
