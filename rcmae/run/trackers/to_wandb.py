"""Weights & Biases, by its own variables: WANDB_MODE, WANDB_API_KEY, WANDB_BASE_URL, WANDB_ENTITY.

Offline (WANDB_MODE=offline) each start writes a folder of its own; `wandb sync` of all of them
makes one run: they share the run's id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from rcmae.run.trackers.offline_wandb import rows
from rcmae.run.trackers.protocol import About


class WeightsAndBiases:
    """A run of Weights & Biases."""

    def open(self, about: About) -> str:
        """The run whose id is the token."""
        about.folder.mkdir(parents=True, exist_ok=True)
        self._folder = about.folder
        self._run = wandb.init(
            project=about.project,
            name=about.name,
            id=about.token,
            resume="allow",
            dir=str(about.folder),
            config=dict(about.config),
            save_code=False,
            settings=wandb.Settings(
                console="off", disable_git=True, x_disable_stats=True, silent=True
            ),
        )
        return self._run.url or f"{about.folder / 'wandb'} (offline: wandb sync its offline-run-*)"

    def last_step(self) -> int:
        """Of the server, or of what lies in the offline folders."""
        if self._run.offline:
            return max([-1, *map(_last_step_in, self._folder.glob("wandb/offline-run-*/*.wandb"))])
        return int(self._run.step) - 1

    def scalars(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        """The row of a step, which is whole with them."""
        self._run.log({**values, "time": time_s}, step=step, commit=True)

    def image(self, step: int, name: str, path: Path) -> None:
        """With the step's numbers."""
        self._run.log({name: wandb.Image(str(path))}, step=step, commit=False)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Any]) -> None:
        """With the step's numbers."""
        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        self._run.log({name: table}, step=step, commit=False)

    def flush(self) -> None:
        """Nothing to wait for: a process of its own has it, and survives this one."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Beside the last values of curves."""
        self._run.summary.update({f"run/{name}": value for name, value in values.items()})

    def close(self, *, finished: bool) -> None:
        """Wait until everything is written or sent. Any run can be continued."""
        self._run.finish(exit_code=0)


def _last_step_in(path: Path) -> int:
    """The newest step of a file of an offline run; -1: it has none."""
    return max([-1, *(row.step for row in rows(path))])
