"""Try the promises that cannot be seen in a quiet run: kill a training again and again, and resume
it under any engine.

    python tools/drill.py kill RECIPE --times 100 [--layout "ds2 x2"] [--json] [key=value ...]
    python tools/drill.py matrix RECIPE [--layouts "local x1,ds3 x2"] \\
        [--pairs "ds1 x2 -> fsdp2 x4"] [--json [FILE]] ...
    python tools/drill.py cost RECIPE [--layout "ds2 x2"] [--json [FILE]] [key=value ...]

`kill` SIGKILLs one rank or all at random moments, a third of them inside a save, starts the same
command again each time and compares what comes out with a run that was not interrupted. `matrix`
saves under each engine and world size, goes on under each, and compares samples, losses and teacher
with an uninterrupted run on one process; of engine.precision bf16, with one of fp32. `cost` tells
for how long saves hold the training up, in the background and not, and what they write. Exit
status: 0 all as promised, 1 not, 2 the recipe cannot run.

Over 500 lines, since three drills start, watch and compare runs by the same parts."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from rich.table import Table

from rcmae import checkpoint, config, dist, train
from rcmae.checkpoint import retention, saver
from rcmae.commands.arguments import add_json, told
from rcmae.errors import Refused
from rcmae.files import json_lines
from rcmae.models.build import new_student
from rcmae.models.precision import bf16_of
from rcmae.planning.states import checkpoint_bytes
from rcmae.process import cores
from rcmae.run import preempt
from rcmae.run.folder import versions
from rcmae.run.loop.agreement import Agreement
from rcmae.tasks.registry import task_of

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = {  # name -> ranks, overrides
    "local x1": (1, ["engine.name=local", "engine.config=null"]),
    "ddp x2": (2, ["engine.name=ddp", "engine.config=null"]),
    "ddp/2 x2": (2, ["engine.name=ddp", "engine.config=null", "engine.shard_ranks=2"]),
    "ddp/2 x4": (4, ["engine.name=ddp", "engine.config=null", "engine.shard_ranks=2"]),
    "ds0 x2": (2, ["engine.name=deepspeed", "engine.config=zero0.json"]),
    "ds1 x2": (2, ["engine.name=deepspeed", "engine.config=zero1.json"]),
    "ds2 x2": (2, ["engine.name=deepspeed", "engine.config=zero2.json"]),
    "ds3 x2": (2, ["engine.name=deepspeed", "engine.config=zero3.json"]),
    "ds3 x4": (4, ["engine.name=deepspeed", "engine.config=zero3.json"]),
    "fsdp2 x2": (2, ["engine.name=fsdp2", "engine.config=null"]),
    "fsdp2 x4": (4, ["engine.name=fsdp2", "engine.config=null"]),
    "fsdp2/2 x4": (4, ["engine.name=fsdp2", "engine.config=null", "engine.shard_ranks=2"]),
}
PHASES = (
    "copied",
    "half a file",
    "file written",
    "manifest written",
    "renamed",
    "LATEST not moved",
    "pruning",
)
# of every training that is killed
FIXED = [
    "run.lease_timeout_s=3",
    "log.every_steps=1",
    "engine.timeout_s=120",
    "log.tensorboard=false",
    "log.report=false",
]
BY_ANY_RANK = ("copied", "half a file", "file written")  # the others are rank 0's alone
# relative; L2 for tensors
BOUNDS = {"fp32": {"loss": 1e-5, "teacher": 1e-5}, "bf16": {"loss": 1e-2, "teacher": 1e-3}}


class Failed(RuntimeError):
    """A training did not do what the drill needs; says what it printed."""


# -------------------------------------------------------------------------------------------- ranks


class Fork:
    """A fork of this process, which has imported everything, with what `Ranks` uses of a Popen."""

    def __init__(self, env: dict[str, str], out: IO[str], action: Callable[[], int]) -> None:
        sys.stdout.flush()
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.environ.update(env)
            warnings.simplefilter("default")  # as a new process has them, whatever started this one
            for stream in (1, 2):
                os.dup2(out.fileno(), stream)
            status = 1
            try:
                status = action()
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        if self._status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if ended else None
        return self._status

    def wait(self) -> int:
        """The exit status, once it has one."""
        while (status := self.poll()) is None:
            time.sleep(0.02)
        return status

    def kill(self) -> None:
        """End it now."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class Ranks:
    """Processes that train these recipes one after the other, as a launcher starts them.

    Args:
        world: how many.
        jobs: a recipe and its overrides each.
        log: what they print is added to this file.
        die: PHASE@RANK of a save to die in.
        record: whether each run's folder gets the samples of each step.
        fork: forks of this process, which saves the imports; else new processes.
    """

    def __init__(
        self,
        world: int,
        jobs: Sequence[Sequence[str]],
        log: Path,
        *,
        die: str = "",
        record: bool = False,
        fork: bool = False,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        path = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
        shared = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
        }
        command = [
            sys.executable,
            __file__,
            "ranks",
            json.dumps(jobs),
            die,
            "record" if record else "",
        ]
        self.log = log
        self.processes: list[subprocess.Popen[bytes] | Fork] = []
        with log.open("a") as out:
            for rank in range(world):
                env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                self.processes.append(
                    Fork(env, out, lambda: run_ranks(jobs, die, record))
                    if fork
                    else subprocess.Popen(
                        command, env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL
                    )
                )

    def running(self) -> bool:
        """Whether none has ended."""
        return all(process.poll() is None for process in self.processes)

    def end(self, timeout_s: float = 900.0) -> list[int]:
        """Wait for all; once one has failed the others have a minute. Their exit statuses."""
        give_up = time.monotonic() + timeout_s
        while any(process.poll() is None for process in self.processes):
            if any(process.poll() for process in self.processes):
                give_up = min(give_up, time.monotonic() + 60)
            if time.monotonic() > give_up:
                for process in self.processes:
                    process.kill()
                raise Failed(
                    f"ranks outlived a failed one by a minute, or {timeout_s:.0f} s:\n{self.said()}"
                )
            time.sleep(0.02)
        return [process.wait() for process in self.processes]

    def succeed(self) -> None:
        """Wait for all to finish, or to stop where they were told to.

        Raises:
            Failed: one ended otherwise.
        """
        statuses = self.end()
        if not set(statuses) <= {preempt.FINISHED, preempt.STOPPED}:
            raise Failed(f"exit statuses {statuses}:\n{self.said()}")

    def said(self) -> str:
        """The end of what they printed."""
        return self.log.read_text()[-4000:]


def run_ranks(jobs: Sequence[Sequence[str]], die: str, record: bool) -> int:
    """What a started rank does."""
    torch.set_num_threads(1)
    phase, _, rank = die.partition("@")
    if die and int(rank) == int(os.environ["RANK"]):
        arm(phase)
    if record:
        record_samples()
    recipes = [config.load(name, overrides) for name, *overrides in jobs]
    if len(jobs) == 1:
        return train.main(list(jobs[0]), task_of(recipes[0]).name)
    dist.start(required=True, timeout_s=120)
    statuses = [train.train(recipe, preempt.StopRequest(), task_of(recipe)) for recipe in recipes]
    dist.finish()
    return next(
        (status for status in statuses if status not in (preempt.FINISHED, preempt.STOPPED)), 0
    )


def record_samples() -> None:
    """Have each rank write the position and key of every sample it trains on to
    `samples-RANK.jsonl` of the run.
    """
    before_step = Agreement.before_step

    def recorded(self: Agreement, micros: Sequence[Any]) -> Any:
        found = [
            pair
            for batch in micros
            for pair in zip(batch.positions.tolist(), batch.keys, strict=True)
        ]
        with (self.recipe.run_dir / f"samples-{dist.rank()}.jsonl").open("a") as file:
            file.write(json.dumps([self.progress.step, found]) + "\n")
        return before_step(self, micros)

    Agreement.before_step = recorded  # type: ignore[method-assign]


def samples(run: Path) -> dict[int, set[tuple[int, str]]]:
    """Step -> the (position, key) that all ranks of all jobs read for it."""
    found: dict[int, set[tuple[int, str]]] = {}
    for path in run.glob("samples-*.jsonl"):
        for step, pairs in map(json.loads, path.read_text().splitlines()):
            found.setdefault(step, set()).update((position, key) for position, key in pairs)
    return found


def arm(phase: str) -> None:
    """Make this process kill itself in a phase of its second save: the first has committed by
    then.
    """
    saves = 0

    def now(*_: object) -> None:
        if saves >= 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(
        before: bool, original: Callable[..., Any], applies: Callable[..., bool] = lambda *_: True
    ) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            if before and applies(*args):
                now()
            result = original(*args, **named)
            if not before and applies(*args):
                now()
            return result

        return call

    def half(path: Path, entries: Any) -> dict[str, Any]:
        about = write(path, entries)
        if saves >= 2:
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size // 2)
            now()
        return about

    def counted(self: checkpoint.Saver, *args: Any) -> Any:
        nonlocal saves
        saves += 1
        found = snapshot(self, *args)
        if phase == "copied":
            now()
        return found

    snapshot = checkpoint.Saver._snapshot
    write = saver.write_safetensors
    checkpoint.Saver._snapshot = counted  # type: ignore[assignment,method-assign]

    def is_commit(source: object, target: object) -> bool:
        return Path(str(target)).name.startswith("step-")

    if phase == "half a file":
        saver.write_safetensors = half
    elif phase == "file written":
        saver.write_safetensors = wrapped(False, write)
    elif phase == "manifest written":
        os.rename = wrapped(True, os.rename, is_commit)
    elif phase == "renamed":
        os.rename = wrapped(False, os.rename, is_commit)
    elif phase == "LATEST not moved":
        os.replace = wrapped(True, os.replace, lambda _, target: Path(target).name == "LATEST")
    elif phase == "pruning":
        prune = wrapped(True, retention.Retention.prune)
        retention.Retention.prune = prune  # type: ignore[method-assign]


# --------------------------------------------------------------------------------------------- kill


def kill(
    recipe: str, times: int, layout: str, overrides: Sequence[str], seed: int
) -> dict[str, Any]:
    """Kill a training so many times and resume it each time.

    What was hit, and whether it ends as an untouched one.
    """
    draw = random.Random(seed)
    plan = draw.sample(moments(times), times)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        killing = Killing(recipe, layout, overrides, Path(folder), draw)
        killing.train_untouched()
        for phase in plan:
            killing.kill(phase)
        killing.train_to_the_end()
    hits = killing.hits
    exact = "bit_equal" if killing.world == 1 else "close"
    fine = all(check["steps_once"] and check[exact] for check in killing.checks)
    saves = [hits[f"in a save: {phase}"] for phase in set(plan) - {""}]
    return {
        "layout": layout,
        "kills": hits.total(),
        "hits": dict(sorted(hits.items())),
        "resumes": killing.resumed,
        "starts_before_a_first_checkpoint": killing.anew,
        "ended_before_the_kill": killing.finished_before,
        "slowest_end_after_a_kill_s": killing.slowest_s,
        "trainings_finished_and_compared": killing.checks,
        "seconds": time.monotonic() - begin,
        "ok": fine and hits.total() == len(plan) and min(saves, default=1) > 0,
    }


class Killing:
    """A training that is killed again and again, beside one that is not.

    Args:
        recipe: a name or a path.
        layout: one of LAYOUTS.
        overrides: of the recipe.
        root: a folder for both trainings.
        draw: the randomness.
    """

    def __init__(
        self, recipe: str, layout: str, overrides: Sequence[str], root: Path, draw: random.Random
    ) -> None:
        self.world, engine = LAYOUTS[layout]
        self._words = [recipe, *FIXED, *engine, *overrides]
        self._run = root / "run"
        self._oracle = root / "untouched"
        self._log = root / "log"
        self._draw = draw
        self._step_s = 0.0  # of the untouched one
        self.hits: Counter[str] = Counter()
        self.resumed = 0
        self.anew = 0  # starts before a first checkpoint
        self.finished_before = 0
        self.slowest_s = 0.0  # from a kill to the end of the last rank
        self.checks: list[dict[str, Any]] = []

    def train_untouched(self) -> None:
        """Train once without a kill."""
        self._start(self._oracle).succeed()
        rows = list(json_lines(self._oracle / "metrics.jsonl"))
        steps = max(1, last_step(self._oracle) - 1)
        self._step_s = (rows[-1]["time"] - rows[0]["time"]) / steps

    def kill(self, phase: str) -> None:
        """Train until a kill in this phase of a save, or, without one, at a random moment.

        Raises:
            Failed: it ended by itself, or did not resume from what was committed.
        """
        while not self._is_hit(phase):
            self.finished_before += 1

    def train_to_the_end(self) -> None:
        """Let the training end, and compare it with the untouched one."""
        if not finished(self._run):
            self._start(self._run).succeed()
        self.checks.append(compare(self._run, self._oracle))

    def _start(self, where: Path, die: str = "") -> Ranks:
        recipe, *overrides = self._words
        return Ranks(self.world, [[recipe, f"run.dir={where}", *overrides]], self._log, die=die)

    def _is_hit(self, phase: str) -> bool:
        """Start once; whether the kill came before the end of the training."""
        run = self._run
        if finished(run):  # the drill is longer than the training
            self.checks.append(compare(run, self._oracle))
            shutil.rmtree(run)
        begun = len(starts_of(run))
        committed = last_step(run)
        if phase:
            rank = self._draw.randrange(self.world) if phase in BY_ANY_RANK else 0
            ranks = self._start(run, die=f"{phase}@{rank}")
            what = f"in a save: {phase}"
        else:
            ranks = self._start(run)
            what = strike(self._draw, ranks, run, begun, self._step_s)
        at = time.monotonic()
        statuses = ranks.end()
        if -signal.SIGKILL not in statuses:
            if any(statuses):
                raise Failed(f"it ended by itself with {statuses}:\n{ranks.said()}")
            return False
        self.hits[what] += 1
        if not phase:
            self.slowest_s = max(self.slowest_s, time.monotonic() - at)
        for event in starts_of(run)[begun:]:
            if event["step"] < committed or (committed and event["event"] != "resume"):
                raise Failed(
                    f"step {committed} was committed, but it resumed from {event}:\n{ranks.said()}"
                )
        if committed:
            self.resumed += 1
        else:
            self.anew += 1
        return True


def moments(times: int) -> list[str]:
    """So many moments to kill at: a third in saves, each phase as often as the others, and ""
    for a random one.
    """
    each = -(-times // (3 * len(PHASES)))
    aimed = [phase for _ in range(each) for phase in PHASES][: max(1, times // 2)]
    return [*aimed, *[""] * (times - len(aimed))]


def strike(draw: random.Random, ranks: Ranks, run: Path, begun: int, step_s: float) -> str:
    """Kill one rank or all at a random moment of the start or of the first 60 steps; what it was.

    Args:
        draw: the randomness.
        ranks: who is killed.
        run: where they train.
        begun: starts that the run had before this one.
        step_s: seconds of a step.
    """
    moment = "at a random moment"
    wait = draw.uniform(0, 60) * step_s
    if draw.random() < 0.15:
        moment = "while it started"
        wait = draw.uniform(0.0, 3.0)
    while ranks.running() and moment == "at a random moment" and len(starts_of(run)) == begun:
        time.sleep(0.005)
    until = time.monotonic() + wait
    while ranks.running() and time.monotonic() < until:
        time.sleep(0.002)
    world = len(ranks.processes)
    chosen = ranks.processes if draw.random() < 0.5 else [draw.choice(ranks.processes)]
    for process in chosen:
        process.kill()
    return moment + (f", {len(chosen)} of {world} ranks" if world > 1 else "")


def starts_of(run: Path) -> list[dict[str, Any]]:
    """The events of starts and resumes in a run's folder."""
    events = json_lines(run / "events.jsonl")
    return [event for event in events if event["event"] in ("start", "resume")]


def finished(run: Path) -> bool:
    """Whether a run has ended by itself."""
    try:
        return json.loads((run / "outcome.json").read_text())["exit_status"] == 0
    except OSError:
        return False


def last_step(run: Path) -> int:
    """The newest committed step, 0 if there is none."""
    last = checkpoint.newest_unverified(run / "checkpoints")
    return last.step if last else 0


def compare(run: Path, oracle: Path) -> dict[str, Any]:
    """The last checkpoints, every byte verified, and the metrics of two runs."""
    (mine, _), (theirs, _) = (checkpoint.newest(each / "checkpoints") for each in (run, oracle))
    if mine is None or theirs is None:
        raise Failed(f"no valid checkpoint in {run if mine is None else oracle}")
    distances = {"weight": 0.0, "teacher": 0.0}  # of a task without one, too
    equal = mine.step == theirs.step and mine.tensors.keys() == theirs.tensors.keys()
    for kind in dict.fromkeys(key.partition("/")[0] for key in theirs.tensors):
        # and moments, and running statistics
        keys = [key for key in theirs.tensors if key.partition("/")[0] == kind]
        difference = norm = 0.0
        for key in keys:
            a, b = (checkpoint.tensor_of(each, key).double() for each in (mine, theirs))
            equal = equal and torch.equal(a, b)
            difference = difference + float((a - b).square().sum())
            norm = norm + float(b.square().sum())
        distances[kind] = (difference / norm) ** 0.5 if norm else 0.0
    steps = [row["step"] for row in json_lines(run / "metrics.jsonl")]
    return {
        "step": mine.step,
        "bit_equal": equal,
        "relative_l2": distances,
        "close": mine.step == theirs.step and max(distances["weight"], distances["teacher"]) < 1e-5,
        "steps_once": steps == list(range(1, theirs.step + 1)),
    }


# ------------------------------------------------------------------------------------------- matrix


def matrix(
    recipe: str, pairs: Sequence[tuple[str, str]], precision: str, overrides: Sequence[str]
) -> dict[str, Any]:
    """Save under each layout, go on under each: the largest error of the next losses and of the
    teacher, by pair.

    Args:
        recipe: of 20 steps; saved is the tenth.
        pairs: (saver, loader) layouts.
        precision: of both; the losses are compared with an uninterrupted `local` run in fp32 in any
            case, the teacher with one in this precision.
        overrides: of the recipe.
    """
    fixed = [
        "log.every_steps=1",
        "checkpoint.every_steps=5",
        "log.tensorboard=false",
        "log.report=false",
        "schedule.steps=20",
        *overrides,
    ]
    begin = time.monotonic()
    bounds = BOUNDS[precision]
    savers, loaders = (list(dict.fromkeys(pair[side] for pair in pairs)) for side in (0, 1))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        log = root / "log"
        oracles = {each: root / each for each in dict.fromkeys(("fp32", precision))}

        def launch(layout: str, jobs: Sequence[tuple[Path, Sequence[str]]]) -> None:
            world, engine = LAYOUTS[layout]
            told = [[recipe, f"run.dir={where}", *fixed, *engine, *more] for where, more in jobs]
            Ranks(world, told, log, record=True, fork=True).succeed()

        # before the forks; this process itself trains nothing
        importlib.import_module("rcmae.engines.deepspeed")
        importlib.import_module("rcmae.engines.fsdp2")
        for each, where in oracles.items():
            launch("local x1", [(where, [f"engine.precision={each}"])])
        exact = [f"engine.precision={precision}"]
        for saver in savers:  # one launch a saver, one a loader that opens all of them
            launch(saver, [(root / saver, [*exact, "run.stop_after_steps=10"])])
        found = {}
        for loader in loaders:
            mine = [saver for saver, other in pairs if other == loader]
            for saver in mine:
                shutil.copytree(root / saver, root / f"{saver} -> {loader}")
            launch(loader, [(root / f"{saver} -> {loader}", exact) for saver in mine])
            for saver in mine:
                pair = f"{saver} -> {loader}"
                found[pair] = judge(root / pair, oracles["fp32"], oracles[precision], bounds)
                shutil.rmtree(root / pair)
    return {
        "precision": precision,
        "bounds": bounds,
        "pairs": found,
        "seconds": time.monotonic() - begin,
        "ok": all(pair["ok"] for pair in found.values()),
    }


def judge(run: Path, fp32: Path, same: Path, bounds: dict[str, float]) -> dict[str, Any]:
    """What a resumed run's last ten steps are, beside uninterrupted ones."""
    wanted = losses(fp32)
    got = losses(run)
    after = compare(run, same)
    worst = max(abs(got[step] - wanted[step]) / abs(wanted[step]) for step in range(11, 21))
    same_samples = samples(run) == samples(fp32)
    teacher = after["relative_l2"]["teacher"]
    fine = (
        worst < bounds["loss"]
        and teacher < bounds["teacher"]
        and same_samples
        and after["steps_once"]
    )
    return {"loss": worst, "teacher": teacher, "same_samples": same_samples, "ok": fine}


def losses(run: Path) -> dict[int, float]:
    """Step -> its logged loss."""
    return {row["step"]: row["loss"] for row in json_lines(run / "metrics.jsonl")}


# --------------------------------------------------------------------------------------------- cost

COST_EVERY = 3  # steps between two saves
COST_SAVES = 3
COST_FIXED = [
    "log.every_steps=1",
    "log.tensorboard=false",
    "log.report=false",
    f"schedule.steps={COST_EVERY * COST_SAVES + 1}",
    "schedule.warmup_steps=1",
    "schedule.epochs=null",
    "schedule.warmup_epochs=null",
    f"checkpoint.every_steps={COST_EVERY}",
]


def cost(recipe: str, layout: str, overrides: Sequence[str], rounds: int = 2) -> dict[str, Any]:
    """Seconds that saves hold a training up, written in the background and not, and their bytes
    beside the formula.
    """
    world, engine = LAYOUTS[layout]
    words = [*engine, *overrides]
    seen: dict[str, list[dict[str, Any]]] = {"background": [], "waiting": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for turn in range(rounds):
            for kind, turns in seen.items():
                run = root / f"{kind}-{turn}"
                background = f"checkpoint.background={json.dumps(kind == 'background')}"
                job = [recipe, f"run.dir={run}", *COST_FIXED, background, *words]
                Ranks(world, [job], root / "log").succeed()
                turns.append(saves_of(run))
                files = sizes_of(run)
                shutil.rmtree(run)
    loaded = config.load(recipe, words)
    formula = checkpoint_bytes(new_student(loaded), teacher=loaded.objective.teacher_parts)
    held = {kind: held_up(turns, kind == "background") for kind, turns in seen.items()}
    as_told = all(abs(size * world / formula - 1) < 0.01 for size in files)
    return {
        "layout": layout,
        "median_seconds_held_up": held,
        "rounds": seen,
        "bytes_of_each_rank": files,
        "formula_bytes": formula,
        "formula_bytes_a_rank": formula / world,
        "ok": held["background"] < held["waiting"] and as_told,
    }


def saves_of(run: Path) -> dict[str, Any]:
    """What a run says of its saves, and of its steps."""
    events = [row for row in json_lines(run / "events.jsonl") if row["event"] == "checkpoint"]
    saved = events[:COST_SAVES]
    rows = list(json_lines(run / "metrics.jsonl"))
    return {
        "stall_s": [event["stall_s"] for event in saved],
        "waited_for_the_one_before_s": [event["waited_s"] for event in saved],
        "commit_s": [event["seconds"] for event in saved],
        "step_s": [row["step_s"] for row in rows[1:]],
    }


def sizes_of(run: Path) -> list[int]:
    """Bytes of each rank's file in the newest checkpoint."""
    last, _ = checkpoint.newest(run / "checkpoints")
    assert last is not None
    return [last.files[name]["bytes"] for name in sorted(last.files)]


def held_up(turns: Sequence[dict[str, Any]], background: bool) -> float:
    """The median of the seconds that a save held the training up."""
    found = []
    for turn in turns:
        for stall, commit in zip(turn["stall_s"], turn["commit_s"], strict=True):
            found.append(stall if background else stall + commit)
    return statistics.median(found)


# --------------------------------------------------------------------------------------------- main


def about(arguments: Sequence[str], recipe: config.Recipe) -> dict[str, Any]:
    """What a report was made with."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    command = " ".join(
        ["tools/drill.py", *(f"'{word}'" if " " in word else word for word in arguments)]
    )
    machine = f"{platform.machine()}, {cores.usable()} cores"
    return {
        "command": command,
        "recipe": recipe.model_dump(mode="json"),
        "commit": commit,
        "versions": versions(),
        "machine": machine,
    }


def show(found: dict[str, Any], console: Console) -> None:
    """A report for people."""
    if "pairs" in found:
        table = Table(
            "saved by -> gone on by", "worst loss, relative", "teacher, relative L2", "samples"
        )
        for name, pair in found["pairs"].items():
            same = "the same" if pair["same_samples"] else "[red]others[/red]"
            table.add_row(name, f"{pair['loss']:.1e}", f"{pair['teacher']:.1e}", same)
    else:
        table = Table("what", "value")
        for name, value in found.items():
            if name not in ("rounds", "versions"):
                table.add_row(name, str(value))
    console.print(table)
    console.print("as promised" if found["ok"] else "[red]NOT as promised[/red]")


def pairs_of(layouts: str, pairs: str | None) -> list[tuple[str, str]]:
    """The (saver, loader) pairs asked for.

    Raises:
        Refused: an unknown layout.
    """
    names = [name.strip() for name in layouts.split(",")]
    found = [(saver, loader) for saver in names for loader in names]
    if pairs:
        found = [
            (one.strip(), other.strip())
            for one, _, other in (pair.partition("->") for pair in pairs.split(","))
        ]
    unknown = {name for pair in found for name in pair} - set(LAYOUTS)
    if unknown:
        raise Refused(f"unknown layouts {', '.join(sorted(unknown))}; known: {', '.join(LAYOUTS)}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["ranks"]:
        return run_ranks(json.loads(arguments[1]), arguments[2], bool(arguments[3]))
    parser = argparse.ArgumentParser(
        description="Kill and resume a training, and see that nothing is lost."
    )
    parser.add_argument("drill", choices=("kill", "matrix", "cost"))
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--times", type=int, default=100, help="kills")
    parser.add_argument(
        "--layout", default="local x1", choices=tuple(LAYOUTS), help="what is killed, or measured"
    )
    parser.add_argument(
        "--layouts", default=",".join(LAYOUTS), help="of the matrix, separated by commas"
    )
    parser.add_argument(
        "--pairs",
        help="of the matrix, SAVER -> LOADER, separated by commas; default: all of layouts",
    )
    parser.add_argument("--seed", type=int, default=0)
    add_json(parser)
    args = parser.parse_intermixed_args(arguments)
    try:
        recipe = config.load(args.recipe, args.overrides)
        pairs = pairs_of(args.layouts, args.pairs)
        if args.drill == "cost" and config.module_of(recipe) != "rcmae.train":
            raise Refused(
                f"cost is of a pretraining's checkpoints; {args.recipe} is trained by another "
                "module"
            )
    except Refused as error:
        print(f"drill: {error}", file=sys.stderr)
        return 2
    try:
        if args.drill == "kill":
            found = kill(args.recipe, args.times, args.layout, args.overrides, args.seed)
        elif args.drill == "matrix":
            units = bf16_of(dist.device()).units
            precision = config.precision_of(recipe.engine.precision, units)
            found = matrix(args.recipe, pairs, precision, args.overrides)
        else:
            found = cost(args.recipe, args.layout, args.overrides)
    except Failed as error:
        print(f"drill: {error}", file=sys.stderr)
        return 1
    if not told({**about(arguments, recipe), **found}, args.json):
        show(found, Console())
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
