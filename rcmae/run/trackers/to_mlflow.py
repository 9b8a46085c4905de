"""MLflow: a server (MLFLOW_TRACKING_URI), or a database beside the run's folder.

Its pages are those of language models until one chooses "Model training" at the left.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunStatus
from mlflow.exceptions import MlflowException

from rcmae.run.trackers.protocol import About, How

_ENDED = {"finished": RunStatus.FINISHED, "failed": RunStatus.FAILED, "stopped": RunStatus.KILLED}
_TOKEN = "rcmae.token"  # the tag by which a run is found again
_METRICS = 900  # a request takes 1,000 at most, and all or none of them
_PARAMS = 100
_LONGEST = 500  # characters of a parameter that every store takes
# MLflow's own would try for minutes, in silence; what is not pushed now is pushed later
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}


class MLflow:
    """An MLflow run."""

    def open(self, about: About) -> str:
        """Find the run by its tag, or make it."""
        where = os.environ.get("MLFLOW_TRACKING_URI")
        if not where:
            about.folder.mkdir(parents=True, exist_ok=True)
            where = f"sqlite:///{about.folder.resolve()}/mlflow.db"
        for variable, value in _PATIENCE.items():
            os.environ.setdefault(variable, value)
        mlflow.set_tracking_uri(where)
        self._client = MlflowClient(where)
        self._metrics: list[Metric] = []
        experiment = self._experiment(about, where)
        query = f"tags.`{_TOKEN}` = '{about.token}'"
        found = self._client.search_runs([experiment], query, max_results=1)
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, RunStatus.to_string(RunStatus.RUNNING))
        else:
            tags = {_TOKEN: about.token, "mlflow.source.name": "rcmae"}
            made = self._client.create_run(experiment, tags=tags, run_name=about.name)
            self._run = made.info.run_id
            self._describe(about.config)
        return f"{where.split('@')[-1]} experiment {about.project} run {self._run}"

    def last_step(self) -> int:
        """Of the numbers that every logged step has."""
        last = -1
        for name in self._client.get_run(self._run).data.metrics:
            if name.startswith("train/"):
                history = self._client.get_metric_history(self._run, name)
                last = max([last, *(metric.step for metric in history)])
                break
        return last

    def scalars(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        """Numbers of a step; the same ones again change nothing: they carry the step's own time."""
        if len(self._metrics) + len(values) > _METRICS:
            self.flush()
        stamp = int(time_s * 1000)
        self._metrics += [Metric(name, value, stamp, step) for name, value in values.items()]

    def image(self, step: int, name: str, path: Path) -> None:
        """Under artifacts: pictures/NAME/step-00000010.png."""
        from PIL import Image

        with Image.open(path, formats=["PNG"]) as picture:
            self._client.log_image(self._run, picture, f"{name}/step-{step:08d}.png")

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Any]) -> None:
        """Under artifacts, as CSV: its page shows that as a table."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *rows])
        self._client.log_text(self._run, text.getvalue(), f"{name}/step-{step:08d}.csv")

    def flush(self) -> None:
        """Numbers of whole steps, all or none."""
        if self._metrics:
            self._client.log_batch(self._run, metrics=self._metrics)
            self._metrics = []

    def summary(self, values: Mapping[str, Any]) -> None:
        """As the run's description, and as tags: a metric would be a curve."""
        for name, value in values.items():
            if name.startswith("seconds/"):
                continue
            self._client.set_tag(self._run, f"rcmae.{name.replace('/', '.')}", str(value))
        rows = "".join(f"| {name} | {value} |\n" for name, value in values.items())
        self._client.set_tag(self._run, "mlflow.note.content", f"| | |\n|---|---|\n{rows}")

    def close(self, ended: How) -> None:
        """A run that trains on stays "running"; one that was stopped may be continued."""
        if ended in _ENDED:
            self._client.set_terminated(self._run, RunStatus.to_string(_ENDED[ended]))

    def _experiment(self, about: About, where: str) -> str:
        found = self._client.get_experiment_by_name(about.project)
        if found is not None:
            return str(found.experiment_id)
        place = _artifacts_of(where)
        try:
            made = self._client.create_experiment(about.project, artifact_location=place)
            return str(made)
        except MlflowException:  # another run made it meanwhile
            return str(self._client.get_experiment_by_name(about.project).experiment_id)

    def _describe(self, config: Mapping[str, Any]) -> None:
        self._client.log_dict(self._run, dict(config), "recipe.json")
        flat = [
            Param(f"{section}.{key}", str(value)[:_LONGEST])
            for section, values in config.items()
            for key, value in (values.items() if isinstance(values, dict) else [("value", values)])
        ]
        for start in range(0, len(flat), _PARAMS):
            self._client.log_batch(self._run, params=flat[start : start + _PARAMS])


def _artifacts_of(where: str) -> str | None:
    """Where pictures and tables of a database lie: beside its file. None: the server knows."""
    if not where.startswith("sqlite:"):
        return None
    database = Path(where.removeprefix("sqlite:///").partition("?")[0])
    return (database.parent / "artifacts").resolve().as_uri()
