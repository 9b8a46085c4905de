"""Fine-tune a pretrained encoder on labelled shards.

    rcmae finetune RECIPE.yaml [key=value ...]     one process
    torchrun -m rcmae.finetune RECIPE.yaml ...               or deepspeed --module, or srun

The training of `rcmae.train` (the same loop, engines, stream, checkpoints, run folder, resume and
exit status) with another task, `rcmae.tasks.finetune`: a classifier whose encoder starts from
`classify.init`. Beside the usual files, `evaluation/step-*.json` has the table of classes and
`pictures/confusion-*.png` what was taken for what.
"""

from __future__ import annotations

from collections.abc import Sequence

from rcmae import train
from rcmae.process.leaving import leaving


def main(argv: Sequence[str] | None = None) -> int:
    """Fine-tune by a command line; the exit status of this rank."""
    return train.main(argv, "finetune")


if __name__ == "__main__":
    raise SystemExit(leaving(main()))
