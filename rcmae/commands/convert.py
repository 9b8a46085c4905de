"""Convert weights between families, in both directions. No code in a file is run.

    rcmae convert mae_pretrain_vit_base.pth --to huggingface --out vit-mae-base
    rcmae convert runs/rcmae_vit_b_16 --to onnx --out encoder.onnx
    rcmae convert checkpoint-799.pth --to safetensors --out weights.safetensors

The source is a run, a checkpoint or a file: of MAE, RC-MAE, SupMAE, BootMAE, MAE-priv, timm,
Hugging Face or this package. A table says what matched. `checkpoint.init=FILE` continues
pretraining from any whole network. Exit status: 0 written; 2 these do not go together; 1 the
checkpoint is damaged or the file could not be written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rcmae.errors import Refused
from rcmae.weights.layouts import KIND, TARGETS


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    options = _parser().parse_args(arguments)
    from rcmae.checkpoint import CheckpointError
    from rcmae.weights.conversion import convert
    from rcmae.weights.reading import read_network

    try:
        source = read_network(options.source, options.what)
        heads = {"num_heads": options.num_heads, "decoder_heads": options.decoder_heads}
        done = convert(source, options.to, options.out, **heads)
    except (Refused, CheckpointError, OSError) as error:
        print(f"rcmae: {error}", file=sys.stderr)
        return 2 if isinstance(error, Refused) else 1
    for note in source.notes:
        print(f"note: {note}", file=sys.stderr)
    if options.json:
        document = {
            "source": done.source,
            "taken": done.taken,
            "left out": done.left_out,
            "out": str(done.out),
            "use": done.use,
        }
        print(json.dumps(document, indent=1))
        return 0
    print(f"{done.source}\n  {len(done.taken)} tensors to {done.out} ({options.to})")
    kinds = sorted({name.split(".")[0] for name in done.left_out})
    if kinds:
        print(f"  {len(done.left_out)} left out: {', '.join(kinds)}")
    print(f"  {done.use}")
    return 0


def _parser() -> argparse.ArgumentParser:
    targets = "\n".join(f"  {name:<12} {text}" for name, text in TARGETS.items())
    parser = argparse.ArgumentParser(
        prog="rcmae convert",
        description=__doc__,
        epilog=f"targets:\n{targets}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="RUN_OR_FILE")
    parser.add_argument("--to", choices=TARGETS, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--what", choices=KIND, help="default: the teacher, if there is one")
    parser.add_argument(
        "--num-heads", type=int, help="number of heads, for an unusual architecture"
    )
    parser.add_argument("--decoder-heads", type=int, help="of its decoder, for --to huggingface")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser
