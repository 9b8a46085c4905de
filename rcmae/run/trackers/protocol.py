"""What a tracker is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol


class About(NamedTuple):
    """The run that a tracker shows."""

    token: str  # of this run in this tracker: the same at each start
    name: str
    project: str
    folder: Path  # where a tracker without a server may keep its files
    config: Mapping[str, Any]  # the resolved recipe, without secrets


# how a run stands when a session with a tracker ends
How = Literal["finished", "failed", "stopped", "training"]


class Tracker(Protocol):
    """A run in a tracker. Everything may raise whatever its library raises."""

    def open(self, about: About) -> str:
        """Begin the run, or continue the one with this token; where it is to be seen."""

    def last_step(self) -> int:
        """The newest step that the tracker has numbers of; -1: none."""

    def scalars(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        """Numbers of a step. The last call for it: its images and tables come before.

        Args:
            step: ascends from call to call.
            time_s: when it was done, seconds since 1970.
            values: name -> number.
        """

    def image(self, step: int, name: str, path: Path) -> None:
        """A PNG."""

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Any]) -> None:
        """Rows: a text, then numbers, or None where there is none."""

    def flush(self) -> None:
        """Return when the tracker has all of it."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """What the run is worth, in single values; those before are replaced."""

    def close(self, ended: How) -> None:
        """End this session. Any run can be continued."""
