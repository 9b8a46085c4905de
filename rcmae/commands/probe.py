"""Train a linear head on a frozen encoder, by a recipe.

    rcmae probe RECIPE [key=value ...]
        one process
    torchrun --no-python rcmae probe RECIPE ...
        or srun rcmae probe, or deepspeed --module rcmae.probe

The same command on the same run.dir resumes from the newest complete checkpoint. Exit status: 0
finished; 75 stopped on request with a checkpoint committed (run it again); 2 the user's input is
wrong; 1 anything else.
"""

from __future__ import annotations

from collections.abc import Sequence

from rcmae.commands import training


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and train; the exit status of this rank."""
    asked = training.parse(arguments, "rcmae probe", __doc__ or "")
    if training.refused(asked, "probe"):
        return 2
    from rcmae.probe import main as run

    return run([asked.recipe, *asked.overrides])
