"""Features of images as a table: a key, a label where there is one, and a vector each.

    rcmae embed RUN photos/ --out features.parquet
        a folder: sub-folders are classes; or a .csv with path and label
    rcmae embed weights.pth 'shards/val-*.tar' --out features.npz
        WebDataset shards
    torchrun --no-python --nproc-per-node 8 rcmae embed RUN 'shards/*.tar' --out x.safetensors
        any number of ranks: the table is the same

RUN is a run, a checkpoint or a file of any family. The same command resumes a job that was
stopped. Exit status: 0 written; 2 these do not go together; 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rcmae.errors import Refused


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    options = _parser().parse_args(arguments)
    from rcmae import dist
    from rcmae.checkpoint import CheckpointError
    from rcmae.evaluation.embedding import embed, images_of
    from rcmae.weights.encoder import load_encoder

    try:
        dist.start(required=False)
        model = load_encoder(options.source, network=options.what, pool=options.pool)
        done = embed(
            model,
            images_of(options.images),
            options.out,
            batch=options.batch,
            workers=options.workers,
            say=lambda text: print(f"rank {dist.rank()}: {text}", file=sys.stderr, flush=True),
        )
        dist.finish()
    except (Refused, CheckpointError, OSError) as error:
        print(f"rcmae: {error}", file=sys.stderr)
        return 2 if isinstance(error, Refused) else 1
    if dist.launched_first():
        _tell(done._asdict(), as_json=options.json)
    return 0


def _tell(done: dict[str, object], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(done | {"path": str(done["path"])}, indent=1))
        return
    print(f"{done['path']}: {done['images']:,} images, vectors of {done['width']}")
    bad = done["bad"]
    assert isinstance(bad, list)
    if bad:
        print(f"left out, as they cannot be decoded: {len(bad):,}, such as {bad[:5]}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rcmae embed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="RUN_OR_FILE")
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="a folder, a list, or shards")
    parser.add_argument(
        "--out", type=Path, required=True, help="ends in .parquet, .npz or .safetensors"
    )
    parser.add_argument(
        "--what",
        choices=("student", "teacher"),
        help="default: the teacher, if there is one",
    )
    parser.add_argument("--pool", choices=("mean", "cls"), default="mean")
    parser.add_argument("--batch", type=int, default=128, help="images per forward pass (128)")
    parser.add_argument("--workers", type=int, default=0, help="decoding processes per rank (0)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser
