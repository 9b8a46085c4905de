"""The trackers, by name. An adapter imports its library when it is opened, not before."""

from __future__ import annotations

import importlib.util

from rcmae.errors import Refused
from rcmae.run.trackers.protocol import Tracker

NAMES = ("wandb", "mlflow", "trackio")


def tracker(name: str) -> Tracker:
    """The adapter of a name.

    Raises:
        Refused: there is none, or its library is not installed.
    """
    if name not in NAMES:
        raise Refused(f"no tracker {name!r}; there are {', '.join(NAMES)}")
    if problem := missing(name):
        raise Refused(problem)
    if name == "mlflow":
        from rcmae.run.trackers.to_mlflow import MLflow

        return MLflow()
    if name == "wandb":
        from rcmae.run.trackers.to_wandb import WeightsAndBiases

        return WeightsAndBiases()
    from rcmae.run.trackers.to_trackio import Trackio

    return Trackio()


def missing(name: str) -> str | None:
    """What to install for a tracker, where its library is not there. Imports nothing."""
    if importlib.util.find_spec(name) is not None:
        return None
    return f"{name} is not installed; pip install 'rcmae[{name}]'"
