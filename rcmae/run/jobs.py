"""A run among the jobs of a scheduler: on how many nodes it may run, what its starts came to, and
whether to restart.

A folder's `jobs.jsonl` has a line a start. Nothing here imports torch: the templates of slurm/ ask
in a batch shell, many times an hour.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rcmae import config
from rcmae.config import Recipe
from rcmae.config.trees import tree_of
from rcmae.data.sources import without_secrets
from rcmae.errors import Refused
from rcmae.files import json_lines
from rcmae.process import launchers

# As rcmae.run.preempt and rcmae.follow have them; not imported, so as not to import torch.
STOPPED = 75  # the exit status of "run me again"
SQUEUE_S = 10.0  # that it may take to answer
EVALUATIONS = "evaluations"  # the follower's folder in the run's

_STEP = re.compile(r"step-(\d{8})")
_JOB = re.compile(r"\d+")


# ------------------------------------------------------------------------------------------ placing


def checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first; whether they are valid is not looked at."""
    try:
        found = sorted((run_dir / "checkpoints").iterdir())
    except OSError:
        return []
    return [path for path in found if _STEP.fullmatch(path.name)]


def streams_of(folder: Path) -> int | None:
    """The canonical streams that a checkpoint's folder has frozen, None if it is not a
    checkpoint.
    """
    try:
        document = json.loads((folder / "manifest.json").read_text())
        return int(document["meta"]["sizes"]["canonical_streams"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def with_its_streams(recipe: Recipe) -> Recipe:
    """The recipe with the number of streams that its run has chosen for good, if it has begun."""
    asked = recipe.checkpoint.resume
    if recipe.data.canonical_streams is not None or asked == "never":
        return recipe
    folders = checkpoints(recipe.run_dir)[::-1]
    if asked not in ("auto", "must"):
        folders.append(Path(asked))
    streams = next(filter(None, map(streams_of, folders)), None)
    data = recipe.data.model_copy(update={"canonical_streams": streams})
    return recipe.model_copy(update={"data": data})


def nodes_that_fit(recipe: Recipe, *, nodes: int, ranks_per_node: int) -> int:
    """The largest number of nodes, at most `nodes`, whose ranks divide the batch and the streams.

    Raises:
        Refused: not even one node's do, with what stands against it.
    """
    for count in range(nodes, 0, -1):
        if not config.batch_problems(recipe, count * ranks_per_node):
            return count
    problems = [f"  {problem}" for problem in config.batch_problems(recipe, ranks_per_node)]
    raise Refused(
        f"no number of nodes of {ranks_per_node} ranks fits this run; on one node:\n"
        + "\n".join(problems)
    )


# ------------------------------------------------------------------------------------------ history


class Started(NamedTuple):
    """A line of jobs.jsonl: a job began here."""

    job: str  # the scheduler's id, the same over requeues
    restart: int  # 0 on the first start of the job
    time: float  # seconds since 1970
    nodes: int  # that the job has
    used: int  # of them, by the training
    ranks: int
    step: int  # committed by then
    # the `time` in outcome.json by then: another one after the training is its own
    outcome: float | None


def starts(folder: Path, job: str | None = None) -> list[Started]:
    """The starts in a folder's jobs.jsonl, oldest first; of one job or all.

    A line that is none is left out: whoever may write to the folder may have written it.
    """
    try:
        rows = list(json_lines(folder / "jobs.jsonl"))
    except OSError:
        return []
    found = [start for start in map(_started, rows) if start is not None]
    return [start for start in found if job in (None, start.job)]


def _started(row: Mapping[str, Any]) -> Started | None:
    if not row.keys() >= set(Started._fields):
        return None
    start = Started(**{name: row[name] for name in Started._fields})
    counts = (start.restart, start.nodes, start.used, start.ranks, start.step)
    times = (start.time, start.outcome or 0.0)
    is_job = isinstance(start.job, str) and _JOB.fullmatch(start.job) is not None
    whole = all(isinstance(count, int) for count in counts)
    timed = all(isinstance(moment, int | float) for moment in times)
    return start if is_job and whole and timed else None


def committed_step(run_dir: Path) -> int:
    """The step of the newest checkpoint that was committed in a run's folder, 0 without one."""
    try:
        name = (run_dir / "checkpoints" / "LATEST").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return 0
    found = _STEP.fullmatch(name)
    return int(found[1]) if found else 0


def evaluated_step(run_dir: Path) -> int:
    """The last step of a run that a follower has evaluated, 0 before the first."""
    try:
        events = list(json_lines(run_dir / EVALUATIONS / "events.jsonl"))
    except OSError:
        return 0
    steps = [event.get("step") for event in events if event.get("event") == "evaluate"]
    return max((step for step in steps if isinstance(step, int)), default=0)


def outcome(run_dir: Path) -> dict[str, Any]:
    """What outcome.json says, empty where it says nothing."""
    try:
        found = json.loads((run_dir / "outcome.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def idle_starts(folder: Path, job: str, step: int) -> int:
    """How many of the job's last starts, in a row, found the step where it stands now: they made
    no progress.
    """
    count = 0
    for start in reversed(starts(folder, job)):
        if start.step != step:
            break
        count += 1
    return count


def this_restart() -> int:
    """How often the scheduler had started this job before this start."""
    return launchers.restarts()


class Shape(NamedTuple):
    """What a start runs on."""

    nodes: int  # that the job has
    used: int  # of them, by the training
    ranks: int


def note_start(
    folder: Path, shape: Shape, *, step: int, limit: int, outcome: float | None = None
) -> str | None:
    """Note in a folder's jobs.jsonl that this job starts, if this is one.

    Args:
        folder: the run's, or its follower's.
        shape: what the start runs on.
        step: how far it has come by now.
        limit: starts in a row without progress that end the job.
        outcome: the `time` in outcome.json.

    Returns:
        Why it is not to start: too many starts came to nothing. None if it is.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    if not job:
        return None
    idle = idle_starts(folder, job, step)
    if idle >= limit:
        return _came_to_nothing(idle, step)
    folder.mkdir(parents=True, exist_ok=True)
    start = Started(
        job=job,
        restart=this_restart(),
        time=time.time(),
        nodes=shape.nodes,
        used=shape.used,
        ranks=shape.ranks,
        step=step,
        outcome=outcome,
    )
    with (folder / "jobs.jsonl").open("a") as file:
        file.write(json.dumps(without_secrets(start._asdict())) + "\n")
    return None


def _came_to_nothing(idle: int, step: int) -> str:
    return f"{idle} restarts in a row without progress beyond step {step}: not restarted"


# ---------------------------------------------------------------------------------------- the queue


class Queued(NamedTuple):
    """What SLURM says of a job that it has not ended."""

    job: str
    state: str  # PENDING, RUNNING, COMPLETING, ...; empty: none of the jobs asked for is left
    why: str = ""  # it is not running

    @property
    def runs(self) -> bool:
        """Whether its batch shell has started and is not over."""
        return self.state in ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED")


GONE = Queued("", "")


def queued(jobs: Iterable[str]) -> Queued | None:
    """The first of these jobs that runs or waits; GONE where all are over.

    None where squeue is not there, or does not answer.
    """
    for job in jobs:
        asked = ["squeue", "--noheader", f"--jobs={job}", "--format=%T %r"]
        try:
            done = subprocess.run(asked, capture_output=True, text=True, timeout=SQUEUE_S)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode and "Invalid job id" not in done.stderr:
            return None
        state, _, why = done.stdout.strip().partition("\n")[0].partition(" ")
        if state and not done.returncode:
            return Queued(job, state, "" if why == "None" else why)
    return GONE


# -------------------------------------------------------------------------------------- start again


class Patience(NamedTuple):
    """How often a job is started again without getting anywhere."""

    idle_starts: int  # so many in a row end the job
    backoff_s: int  # wait after one, doubled after each further one


class Verdict(NamedTuple):
    """What to do after a start has ended."""

    status: int  # the exit status that counts
    again: bool
    delay_s: int  # before the next start
    step: int  # how far the run has come
    told: list[str]  # for people


def after_training(run_dir: Path, job: str, status: int, patience: Patience) -> Verdict:
    """What to do after a start of a training.

    Args:
        run_dir: the run's folder.
        job: the scheduler's id.
        status: the launcher's exit status. torchrun's is 1 whatever happened: what the ranks wrote
            into outcome.json since the start counts before it.
        patience: restarts without progress that are allowed.
    """
    step = committed_step(run_dir)
    found = outcome(run_dir)
    mine = starts(run_dir, job)
    again = status == STOPPED
    told = []
    if mine and found and found.get("time") != mine[-1].outcome:
        exit_status = found.get("exit_status")
        if isinstance(exit_status, int):
            status = exit_status
        again = status == STOPPED
        if found.get("again") and not again:  # it lost a rank
            again = True
            told.append(f"started again: {found.get('reason')}")
    return _verdict(run_dir, job, Verdict(status, again, 0, step, told), patience)


def after_evaluating(run_dir: Path, job: str, status: int, patience: Patience) -> Verdict:
    """What to do after a start of a run's follower. Arguments of `after_training`."""
    verdict = Verdict(status, status == STOPPED, 0, evaluated_step(run_dir), [])
    return _verdict(run_dir / EVALUATIONS, job, verdict, patience)


def _verdict(folder: Path, job: str, asked: Verdict, patience: Patience) -> Verdict:
    """The verdict by how earlier starts of the job fared."""
    told = list(asked.told)
    last = max((start.restart for start in starts(folder, job)), default=0)
    mine = this_restart()
    if last > mine:  # this shell was cut off, and is back: a requeue would be the other's
        told.append(f"start {last} of this job has resumed the run: start {mine} does nothing")
        return asked._replace(again=False, told=told)
    if not asked.again:
        return asked
    idle = idle_starts(folder, job, asked.step)
    if idle >= patience.idle_starts:
        told.append(_came_to_nothing(idle, asked.step))
        return asked._replace(again=False, told=told)
    if not idle:
        return asked
    delay_s = patience.backoff_s * 2 ** (idle - 1)
    told.append(
        f"no progress beyond step {asked.step}; restarts in {delay_s} s, "
        f"{patience.idle_starts - idle} are left"
    )
    return asked._replace(delay_s=delay_s, told=told)


# ------------------------------------------------------------------------------------------- submit


def read_sweep(path: Path) -> dict[str, list[str]]:
    """The arguments of each run of a sweep, by its name, in the file's order.

    Raises:
        Refused: the file is not a sweep; says what one looks like.
    """
    try:
        tree = tree_of(path.read_text())
    except (OSError, UnicodeDecodeError, Refused) as error:
        raise Refused(f"{path} cannot be read: {error}") from error
    known = {"recipe", "dir", "set", "runs"}
    is_sweep = isinstance(tree, dict) and {"recipe", "runs"} <= tree.keys() <= known
    if not is_sweep or not tree["runs"] or not isinstance(tree["runs"], dict):
        raise Refused(
            f"{path}: a sweep has 'recipe' (a name or path), 'runs' (a mapping of each run's "
            "name to its keys), and may have 'set' (keys of all runs) and 'dir' (the folder of "
            "their folders)"
        )
    folder = tree.get("dir") or f"runs/{path.stem}"
    runs = {}
    for name, keys in tree["runs"].items():
        if not re.fullmatch(r"[\w.=+-]+", str(name)):
            raise Refused(
                f"{path}: the run {name!r} names a folder; use letters, digits and . _ = + -"
            )
        given = [tree.get("set") or {}, keys or {}]
        if not all(isinstance(each, dict) for each in given):
            raise Refused(f"{path}: 'set' and the run {name!r} have keys, got {given}")
        values = {**given[0], **given[1], "run.dir": f"{folder}/{name}"}
        overrides = [_override(path, str(name), key, value) for key, value in values.items()]
        runs[str(name)] = [str(tree["recipe"]), *overrides]
    return runs


def _override(path: Path, name: str, key: object, value: object) -> str:
    """A key of a sweep's run as the command line has it. Raises Refused."""
    try:
        return f"{key}={json.dumps(value)}"
    except (TypeError, ValueError) as error:  # YAML knows dates, bytes and sets
        raise Refused(
            f"{path}: the run {name!r} has {key}: {str(value)[:100]}, which is not a number or "
            "text "
            f"({type(value).__name__}); put it in quotes"
        ) from error


def recipe_of_template(text: str) -> str | None:
    """The recipe that a template fixes, such as pretrain_vit_l.sbatch; None of one for any."""
    fixed = re.search(r'pretrain\.sbatch" (\w+) "\$@"', text)
    return fixed[1] if fixed else None


def shape_of(asked: Sequence[str], template: str) -> tuple[int, int]:
    """(nodes, GPUs of each) at most, by sbatch's options and else by a template's own.

    Args:
        asked: sbatch's options.
        template: the text of the file.

    Raises:
        Refused: they cannot be told.
    """
    found = {"nodes": "1", "gpus-per-node": "1"}
    given = re.sub(r"(^| )(?:-N ?|--nodes )", r"\1--nodes=", " ".join(asked))
    given = given.replace("--gpus-per-node ", "--gpus-per-node=")
    for word in [*re.findall(r"^#SBATCH (--\S+)", template, re.MULTILINE), *given.split()]:
        name, equals, value = word.removeprefix("--").partition("=")
        if equals and name in found:
            found[name] = value
    nodes = re.split("[-,:]", found["nodes"])[-1]
    gpus = found["gpus-per-node"].rpartition(":")[2]
    try:
        return int(nodes), int(gpus)
    except ValueError as error:
        raise Refused(f"cannot tell the shape of the job from {found}: {error}") from error
