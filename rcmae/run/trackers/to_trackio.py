"""trackio: its local database (TRACKIO_DIR), a Space (TRACKIO_SPACE_ID) or a server."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trackio
from trackio.sqlite_storage import SQLiteStorage

from rcmae.run.trackers.protocol import About, How


class Trackio:
    """A trackio run."""

    def open(self, about: About) -> str:
        """The run with the token in its name."""
        self._project = about.project
        self._name = f"{about.name}-{about.token[:8]}"
        self._pending: dict[str, Any] = {}
        self._about = about
        self._begin()
        where = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
        return f"{where.split('?')[0] if where else 'trackio show'}: {self._project}/{self._name}"

    def last_step(self) -> int:
        """Of the local database."""
        last = SQLiteStorage.get_last_step(self._project, self._name)
        return -1 if last is None else int(last)

    def scalars(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        """The row of a step, which is whole with them. Its time is when it is pushed: trackio takes
        none, and would draw it as a curve.
        """
        self._run.log({**self._pending, **values}, step=step)
        self._pending = {}

    def image(self, step: int, name: str, path: Path) -> None:
        """With the step's numbers."""
        self._pending[name] = trackio.Image(str(path))

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Any]) -> None:
        """With the step's numbers."""
        data = [list(row) for row in rows]
        self._pending[name] = trackio.Table(columns=list(columns), data=data)

    def flush(self) -> None:
        """Its threads write on their own; ending the session is the one way to wait for them."""
        self._end()
        self._begin()

    def summary(self, values: Mapping[str, Any]) -> None:
        """trackio has no place for it."""

    def close(self, ended: How) -> None:
        """Wait until everything is written or sent."""
        self._end()

    def _begin(self) -> None:
        with _quiet():
            self._run = trackio.init(
                project=self._project,
                name=self._name,
                config=dict(self._about.config),
                resume="allow",
                auto_log_gpu=False,
                auto_log_cpu=False,
                embed=False,
            )

    def _end(self) -> None:
        with _quiet():
            self._run.finish()


@contextlib.contextmanager
def _quiet() -> Any:
    """It prints greetings."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
