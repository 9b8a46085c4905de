"""A run in a tracker: each committed step once, whatever is killed when; and it delays nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from conftest import free_port

from rcmae.checkpoint.manifest import sealed
from rcmae.commands import track
from rcmae.config import LogOptions
from rcmae.errors import Refused
from rcmae.run.trackers import beside, offline_wandb, protocol, pushing, records, registry
from runs import Folder, python_path, start


def test_a_recipe_names_the_trackers_that_there_are() -> None:
    (one, _) = get_args(LogOptions.model_fields["trackers"].annotation)
    assert get_args(one) == registry.NAMES


class Killed(BaseException):
    """The process is gone at this call."""


class Remembering:
    """A tracker that remembers all that it is told, and whose process may be killed at any call."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.images: list[tuple[int, str]] = []
        self.tables: list[int] = []
        self.tokens: set[str] = set()
        self.config: Mapping[str, Any] = {}
        self.kept: dict[str, Any] = {}
        self.calls_left = 10**9

    def _call(self) -> None:
        self.calls_left -= 1
        if self.calls_left < 0:
            raise Killed

    def open(self, about: protocol.About) -> str:
        self.tokens.add(about.token)
        self.config = about.config
        return "here"

    def last_step(self) -> int:
        return max([-1, *(step for step, _ in self.rows)])

    def scalars(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        self._call()
        self.rows.append((step, dict(values)))

    def image(self, step: int, name: str, path: Path) -> None:
        self._call()
        self.images.append((step, name))

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Any]) -> None:
        self._call()
        self.tables.append(step)
        self.shown = [list(columns), *map(list, rows)]

    def flush(self) -> None:
        self._call()

    def summary(self, values: Mapping[str, Any]) -> None:
        self._call()
        self.kept = dict(values)

    def close(self, ended: protocol.How) -> None:
        self.ended = ended


@pytest.fixture(scope="module")
def judged(tiny: Path, photo_shards: str, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A run with evaluations and pictures, finished, and a secret in its recipe."""
    folder = tmp_path_factory.mktemp("tracked") / "run"
    first = photo_shards.replace("{000000..000005}", "000000")
    second = photo_shards.replace("{000000..000005}", "000001")
    options = [
        "schedule.steps=12",
        "checkpoint.every_steps=4",
        "evaluate.every_steps=6",
        "evaluate.picture_every_steps=6",
        f"evaluate.train_shards={first}",
        f"evaluate.test_shards={second}",
    ]
    assert start(tiny, folder, *options) == 0
    return Folder(folder)


def pushed(run: Path, tracker: Remembering) -> int:
    with pushing.opened(run, "mlflow", tracker) as pusher:
        return pusher.push()


def copied(folder: Folder, to: Path) -> Path:
    return Path(
        shutil.copytree(folder.path, to / "copy", ignore=shutil.ignore_patterns("trackers"))
    )


def test_each_step_is_there_once_after_a_kill_at_any_call(judged: Folder, tmp_path: Path) -> None:
    run = copied(judged, tmp_path)
    tracker = Remembering()
    calls = 1
    while True:
        tracker.calls_left = calls
        try:
            pushed(run, tracker)
            break
        except Killed:
            calls += 1
            # its process is gone: what it noted before stands
    rows = judged.rows()
    assert [step for step, _ in tracker.rows] == [row["step"] for row in rows]
    losses = [values["train/loss"] for _, values in tracker.rows]
    assert losses == [row["loss"] for row in rows]
    assert calls > 5
    assert len(tracker.tokens) == 1
    assert {step for step, _ in tracker.images} == set(tracker.tables) == {6, 12}
    assert tracker.kept["step"] == 12
    assert tracker.ended == "finished"


def test_steps_beyond_the_last_checkpoint_wait(judged: Folder, tmp_path: Path) -> None:
    run = copied(judged, tmp_path)
    (run / "outcome.json").unlink()  # the job is alive, or was killed
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    tracker = Remembering()
    pushed(run, tracker)
    # step 8 is committed, and an evaluation of it may come
    assert [step for step, _ in tracker.rows] == [*range(1, 8)]
    assert pushed(run, tracker) == 0


def test_an_evaluation_that_was_left_comes_with_its_step(judged: Folder, tmp_path: Path) -> None:
    """The checkpoint of a job that was stopped in its last evaluation stays as it was committed."""
    run = copied(judged, tmp_path)
    manifest = run / "checkpoints" / "step-00000012" / "manifest.json"
    document = json.loads(manifest.read_text())
    document["meta"]["evaluated"] = False
    del document["sha256"]
    manifest.write_text(sealed(document))
    outcome = run / "outcome.json"
    finished = outcome.read_text()
    outcome.write_text(finished.replace('"finished"', '"stopped"'))
    tracker = Remembering()
    pushed(run, tracker)
    assert tracker.rows[-1][0] == 11
    outcome.write_text(finished)
    assert pushed(run, tracker) == 1
    assert tracker.rows[-1][0] == 12
    assert set(tracker.tables) == {6, 12}


def test_an_evaluation_is_a_table_and_curves(judged: Folder) -> None:
    (record,) = records.records(judged.path, 5, 6)
    assert record.table
    group, name, value = record.table[0]
    assert record.scalars[f"{group}/{name}"] == value
    assert [name for name, _ in record.images] == ["reconstruction"]


def test_an_evaluation_is_shown_by_network(judged: Folder, tmp_path: Path) -> None:
    tracker = Remembering()
    pushed(copied(judged, tmp_path), tracker)
    columns, *rows = tracker.shown
    assert columns == ["metric", "student", "teacher", "random", "pixels"]
    (knn,) = [row for row in rows if str(row[0]).startswith("k-NN (k = ")]
    event = judged.events("evaluate")[-1]["knn"]
    assert knn[1:] == [*(row for name in columns[1:] for row in event[name].values())]
    (loss,) = [row for row in rows if row[0] == "held images, fixed masks: loss"]
    assert loss[2:] == [None, None, None]


def test_a_tracker_hears_how_the_run_stands(judged: Folder, tmp_path: Path) -> None:
    run = copied(judged, tmp_path)
    tracker = Remembering()
    pushed(run, tracker)
    assert (tracker.ended, tracker.kept["state"]) == ("finished", "finished")
    events = (run / "events.jsonl").read_text().splitlines(keepends=True)
    assert '"stop"' in events.pop()
    (run / "events.jsonl").write_text("".join(events))
    lease = next((run / "leases").glob("*.json"))
    holder = json.loads(lease.read_text())
    for beat in (run / "leases").glob("*.beat"):
        os.utime(beat)
    pushed(run, tracker)
    assert (tracker.ended, tracker.kept["state"]) == ("training", "training")
    gone = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True)
    lease.write_text(json.dumps({**holder, "pid": int(gone.stdout)}))
    pushed(run, tracker)
    assert tracker.ended == "stopped"
    assert tracker.kept["state"] == "not running: ended without an event"


def test_no_momentum_is_shown_where_there_is_no_teacher(judged: Folder, tmp_path: Path) -> None:
    run = copied(judged, tmp_path)
    (record,) = records.records(run, 5, 6)
    assert "train/momentum" in record.scalars
    rows = [
        {key: value for key, value in row.items() if not key.startswith("teacher")}
        for row in judged.rows()
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (record,) = records.records(run, 5, 6)
    assert "train/momentum" not in record.scalars
    assert "train/loss" in record.scalars


def test_no_secret_is_shown(judged: Folder, tmp_path: Path) -> None:
    run = copied(judged, tmp_path)
    path = run / "recipe.yaml"
    path.write_text(path.read_text().replace("shards:", "shards: https://TOKEN@host/a.tar #", 1))
    tracker = Remembering()
    pushed(run, tracker)
    assert "TOKEN" not in json.dumps(tracker.config)


def test_a_folder_without_a_run_and_a_newer_note_are_refused(
    judged: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Refused, match="no run"):
        pushed(tmp_path, Remembering())
    run = copied(judged, tmp_path)
    pushed(run, Remembering())
    note = run / "trackers" / "mlflow.json"
    note.write_text(note.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(Refused, match="format 9"):
        pushed(run, Remembering())
    for text in ("5", "[" * 100_000, '{"format": 1}', '{"format": 1, "token": "x", "other": 2}'):
        note.write_text(text)
        with pytest.raises(Refused, match=r"mlflow\.json .*delete it to begin the run anew"):
            pushed(run, Remembering())


def test_a_tracker_that_is_not_installed_is_refused_before_the_start(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    assert start(tiny, tmp_path / "run", "log.trackers=[mlflow]") == 2
    assert "pip install 'rcmae[mlflow]'" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("program", "told"),
    [("raise SystemExit(1)", "failed"), ("import time; time.sleep(60)", "within")],
)
def test_a_tracker_that_fails_or_hangs_is_told_once_and_left(
    program: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = subprocess.Popen

    def instead(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        return started([sys.executable, "-c", program], **options)

    monkeypatch.setattr(beside.subprocess, "Popen", instead)
    monkeypatch.setattr(beside, "LAST_PUSH_S", 1.0)
    said: list[str] = []
    trackers = beside.Trackers(["mlflow"], tmp_path, said.append)
    began = time.monotonic()
    trackers.close(in_a_hurry=False)
    trackers.close(in_a_hurry=False)
    assert time.monotonic() - began < 5.0
    (line,) = said
    assert told in line
    assert f"rcmae track {tmp_path} --to mlflow" in line


# ---------------------------------------------------------------------- the trackers themselves


class Series:
    """What a tracker has of a run: (step, loss) of each point, in its own words."""

    def __init__(self, name: str, run: Path, home: Path) -> None:
        self.name = name
        self.run = run
        self.home = home

    def points(self) -> list[tuple[int, float]]:
        return sorted(getattr(self, f"_{self.name}")())

    def _mlflow(self) -> Iterator[tuple[int, float]]:
        from mlflow import MlflowClient

        client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
        experiment = client.get_experiment_by_name("rcmae")
        (run,) = client.search_runs([experiment.experiment_id])
        for metric in client.get_metric_history(run.info.run_id, "train/loss"):
            yield metric.step, metric.value

    def _trackio(self) -> Iterator[tuple[int, float]]:
        from trackio.sqlite_storage import SQLiteStorage

        (record,) = SQLiteStorage.get_run_records("rcmae")
        for row in SQLiteStorage.get_logs("rcmae", record["name"]):
            if "train/loss" in row:
                yield row["step"], row["train/loss"]

    def _wandb(self) -> Iterator[tuple[int, float]]:
        for path in self.run.glob("trackers/wandb/wandb/offline-run-*/*.wandb"):
            for row in offline_wandb.rows(path):
                if "train/loss" in row.values:
                    yield row.step, row.values["train/loss"]


@pytest.mark.trackers
@pytest.mark.slow
def test_what_was_pushed_offline_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is noted as pushed: its process may be killed in the next moment."""
    if problem := registry.missing("wandb"):
        pytest.skip(problem)
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = registry.tracker("wandb")
    tracker.open(protocol.About("token", "name", "project", tmp_path, {}))
    try:
        steps = []
        for first in (1, 2001):  # several blocks of the file, too
            steps += range(first, first + 2000)
            for step in steps[-2000:]:
                tracker.scalars(step, 0.0, {f"train/{name}": 0.1 * step for name in "abcdefgh"})
            tracker.flush()
            (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
            assert [row.step for row in offline_wandb.rows(path)] == steps
            assert tracker.last_step() == offline_wandb.last_step(path) == steps[-1]
        assert path.stat().st_size > 10 << 15
    finally:
        tracker.close("finished")


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    """A real one."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--workers", "1"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        import requests

        end = time.monotonic() + 120
        while True:
            try:
                requests.get(f"{address}/health", timeout=2).raise_for_status()
                break
            except requests.RequestException:
                assert time.monotonic() < end, (tmp_path / "server.log").read_text()
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(server.pid, 15)
        server.wait()


@pytest.mark.trackers
@pytest.mark.slow
@pytest.mark.parametrize("name", registry.NAMES)
def test_a_training_killed_again_and_again_is_there_step_by_step(
    name: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if problem := registry.missing(name):
        pytest.skip(problem)  # not imported before its variables are set: trackio reads them then
    if name == "mlflow":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", request.getfixturevalue("mlflow_server"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", python_path())
    monkeypatch.setattr(beside, "EVERY_S", 0.5)
    folder = Folder(tmp_path / "run")
    job = [sys.executable, "-m", "rcmae", "train", str(tiny), f"run.dir={folder.path}"]
    job += ["schedule.steps=400", "checkpoint.every_steps=5", f"log.trackers=[{name}]"]
    kills = int(os.environ.get("RCMAE_TEST_KILLS", "4"))
    for number in range(kills):
        process = subprocess.Popen(job, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        step = folder.steps()[-1] if (folder.path / "metrics.jsonl").exists() else 0
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
            if (folder.path / "metrics.jsonl").exists():
                steps = folder.steps()
                if steps and steps[-1] > step + 20 + 7 * number % 13:
                    break
        process.kill()
        process.wait()
    assert subprocess.run(job, check=False, stdout=subprocess.DEVNULL).returncode == 0
    assert track.main([str(folder.path), "--to", name]) == 0  # whatever was cut off by the kills
    assert track.main([str(folder.path), "--to", name]) == 0
    if name == "mlflow":
        from mlflow import MlflowClient

        client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
        experiment = client.get_experiment_by_name("rcmae")
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.info.status == "FINISHED"
        assert "| state | finished |" in run.data.tags["mlflow.note.content"]
    expected = [(row["step"], pytest.approx(row["loss"])) for row in folder.rows()]
    assert Series(name, folder.path, tmp_path).points() == expected
