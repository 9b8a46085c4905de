"""Weights & Biases, by its own variables: WANDB_MODE, WANDB_API_KEY, WANDB_BASE_URL, WANDB_ENTITY.

Offline (WANDB_MODE=offline) each start writes a folder of its own; `wandb sync` of all of them
makes one run: they share the run's id.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from rcmae.run.trackers.offline_wandb import last_step
from rcmae.run.trackers.protocol import About, How

# Offline its process keeps rows in memory for so long; without the setting for 15 s.
_FLUSH = {"x_transaction_log_flush_interval": 0.5}
_WRITTEN_S = 60.0  # after which it will not write them


class WeightsAndBiases:
    """A run of Weights & Biases."""

    def open(self, about: About) -> str:
        """The run whose id is the token."""
        about.folder.mkdir(parents=True, exist_ok=True)
        self._folder = about.folder
        self._step = -1  # the newest of this session
        known = wandb.Settings.model_fields
        self._run = wandb.init(
            project=about.project,
            name=about.name,
            id=about.token,
            resume="allow",
            dir=str(about.folder),
            config=dict(about.config),
            save_code=False,
            settings=wandb.Settings(
                console="off",
                disable_git=True,
                x_disable_stats=True,
                silent=True,
                **{name: value for name, value in _FLUSH.items() if name in known},
            ),
        )
        self._run.define_metric("time", hidden=True)  # no curve, but an axis
        return self._run.url or f"{about.folder / 'wandb'} (offline: wandb sync its offline-run-*)"

    def last_step(self) -> int:
        """Of the server, or of what lies in the offline folders."""
        if self._run.offline:
            return max([-1, *map(last_step, self._folder.glob("wandb/offline-run-*/*.wandb"))])
        return int(self._run.step) - 1

    def scalars(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        """The row of a step, which is whole with them."""
        self._run.log({**values, "time": time_s}, step=step, commit=True)
        self._step = step

    def image(self, step: int, name: str, path: Path) -> None:
        """With the step's numbers."""
        self._run.log({name: wandb.Image(str(path))}, step=step, commit=False)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Any]) -> None:
        """With the step's numbers."""
        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        self._run.log({name: table}, step=step, commit=False)

    def flush(self) -> None:
        """Offline: wait for its file. Online a process of its own has it, and survives this one."""
        if not self._run.offline:
            return
        (path,) = Path(self._run.dir).parent.glob("*.wandb")
        end = time.monotonic() + _WRITTEN_S
        while last_step(path) < self._step:
            if time.monotonic() > end:
                raise TimeoutError(f"{path}: step {self._step} was not written in {_WRITTEN_S:g} s")
            time.sleep(0.1)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Beside the last values of curves."""
        self._run.summary.update({f"run/{name}": value for name, value in values.items()})

    def close(self, ended: How) -> None:
        """Wait until everything is written or sent."""
        self._run.finish(exit_code=1 if ended == "failed" else 0)
