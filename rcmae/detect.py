"""Train a detector of boxes and masks on annotated shards, and judge it by COCO's rules.

    rcmae detect RECIPE.yaml [key=value ...]       one process
    torchrun -m rcmae.detect RECIPE.yaml ...                 or deepspeed --module, or srun

The training of `rcmae.train` (the same loop, engines, stream, checkpoints, run folder, resume and
exit status) with another task, `rcmae.tasks.detect`: Mask R-CNN on a plain ViT that starts from
`detect.init`. Beside the usual files, `evaluation/step-*.json` has AP by category,
`evaluation/detections-step-*.json` the detections as COCO's test server takes them, and
`pictures/detections-*.png` some of them beside what is there.
"""

from __future__ import annotations

from collections.abc import Sequence

from rcmae import train
from rcmae.process.leaving import leaving


def main(argv: Sequence[str] | None = None) -> int:
    """Train a detector by a command line; the exit status of this rank."""
    return train.main(argv, "detect")


if __name__ == "__main__":
    raise SystemExit(leaving(main()))
