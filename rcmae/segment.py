"""Train a segmenter, a class for each pixel, on shards with maps.

    rcmae segment RECIPE.yaml [key=value ...]     one process
    torchrun -m rcmae.segment RECIPE.yaml ...               or deepspeed --module, or srun

The training of `rcmae.train` (the same loop, engines, stream, checkpoints, run folder, resume and
exit status) with another task, `rcmae.tasks.segment`: UPerNet, or a linear head, on an encoder
that starts from `segment.init`. Beside the usual files, `evaluation/step-*.json` has the table of
classes and `pictures/segments-*.png` pictures with their maps and what was predicted.
"""

from __future__ import annotations

from collections.abc import Sequence

from rcmae import train
from rcmae.process.leaving import leaving


def main(argv: Sequence[str] | None = None) -> int:
    """Segment by a command line; the exit status of this rank."""
    return train.main(argv, "segment")


if __name__ == "__main__":
    raise SystemExit(leaving(main()))
