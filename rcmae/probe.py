"""Train a linear classifier on the features of a frozen encoder.

    rcmae probe RECIPE.yaml [key=value ...]     one process
    torchrun -m rcmae.probe RECIPE.yaml ...               or deepspeed --module, or srun

The training of `rcmae.train` with another task, `rcmae.tasks.probe`: the engine holds the head
alone, the encoder of `classify.init` runs beside it. `classify.depth` takes the features after that
block.
"""

from __future__ import annotations

from collections.abc import Sequence

from rcmae import train
from rcmae.process.leaving import leaving


def main(argv: Sequence[str] | None = None) -> int:
    """Probe by a command line; the exit status of this rank."""
    return train.main(argv, "probe")


if __name__ == "__main__":
    raise SystemExit(leaving(main()))
