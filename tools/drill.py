"""Try the promises that cannot be seen in a quiet run: kill a training again and again, and resume it under any engine.

    python tools/drill.py kill RECIPE --times 100 [--layout "ds2 x2"] [--json FILE] [key=value ...]
    python tools/drill.py matrix RECIPE [--layouts "local x1,ds3 x2"] [--json FILE] [key=value ...]

`kill` SIGKILLs one rank or all at random moments, a third of them inside a save, starts the same command again each
time and compares what comes out with a run that nobody touched. `matrix` saves under each engine and world size, goes
on under each, and compares losses and teacher with an uninterrupted run on one process. Exit status: 0 all as
promised, 1 not, 2 the recipe cannot run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rcmae import checkpoint, config, dist, preempt, train

ROOT = Path(__file__).parent.parent
KINDS = ("weight", "exp_avg", "exp_avg_sq", "teacher")
LAYOUTS = {  # name -> ranks, overrides
    "local x1": (1, ["engine.name=local"]),
    "ds0 x2": (2, ["engine.name=deepspeed", "engine.config=zero0.json"]),
    "ds1 x2": (2, ["engine.name=deepspeed", "engine.config=zero1.json"]),
    "ds2 x2": (2, ["engine.name=deepspeed", "engine.config=zero2.json"]),
    "ds3 x2": (2, ["engine.name=deepspeed", "engine.config=zero3.json"]),
    "ds3 x4": (4, ["engine.name=deepspeed", "engine.config=zero3.json"]),
    "fsdp2 x2": (2, ["engine.name=fsdp2"]),
    "fsdp2 x4": (4, ["engine.name=fsdp2"]),
}
PHASES = ("copied", "half a file", "file written", "manifest written", "renamed", "LATEST not moved", "pruning")


# ------------------------------------------------------------------------------------------------------------- ranks


def start(world: int, jobs: Sequence[Sequence[str]], log: Path, die: str = "") -> list[subprocess.Popen[bytes]]:
    """Start ranks that train these recipes one after the other; `die` is PHASE@RANK of a save to die in."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
    }  # fmt: skip
    command = [sys.executable, __file__, "ranks", json.dumps(jobs), die]
    ranks = []
    with log.open("a") as out:
        for rank in range(world):
            env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL))
    return ranks


def end(ranks: Sequence[subprocess.Popen[bytes]], timeout_s: float = 600.0) -> list[int]:
    """Wait for ranks; once one has failed the others have ten seconds. Their exit statuses."""
    give_up = time.monotonic() + timeout_s
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):
            give_up = min(give_up, time.monotonic() + 10)
        if time.monotonic() > give_up:
            for rank in ranks:
                rank.kill()
        time.sleep(0.02)
    return [rank.wait() for rank in ranks]


def run_ranks(jobs: Sequence[Sequence[str]], die: str) -> int:
    """What a started rank does."""
    torch.set_num_threads(1)
    phase, _, rank = die.partition("@")
    if die and int(rank) == int(os.environ["RANK"]):
        arm(phase)
    dist.start(required=True, timeout_s=120)
    statuses = [train.train(config.load(name, overrides), preempt.StopRequest()) for name, *overrides in jobs]
    dist.finish()
    return next((status for status in statuses if status not in (preempt.FINISHED, preempt.STOPPED)), 0)


def arm(phase: str) -> None:
    """Make this process kill itself in a phase of its second save: the first has committed by then."""
    saves = 0

    def now(*_: object) -> None:
        if saves >= 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(before: bool, original: Callable[..., Any], applies: Callable[..., bool] = lambda *_: True) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            if before and applies(*args):
                now()
            result = original(*args, **named)
            if not before and applies(*args):
                now()
            return result

        return call

    def half(path: Path, tensors: Any) -> dict[str, Any]:
        about = write(path, tensors)
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

    snapshot, write = checkpoint.Saver._snapshot, checkpoint._write_safetensors
    checkpoint.Saver._snapshot = counted  # type: ignore[assignment,method-assign]

    def is_commit(source: object, target: object) -> bool:
        return Path(str(target)).name.startswith("step-")

    if phase == "half a file":
        checkpoint._write_safetensors = half
    elif phase == "file written":
        checkpoint._write_safetensors = wrapped(False, write)
    elif phase == "manifest written":
        os.rename = wrapped(True, os.rename, is_commit)
    elif phase == "renamed":
        os.rename = wrapped(False, os.rename, is_commit)
    elif phase == "LATEST not moved":
        os.replace = wrapped(True, os.replace, lambda _, target: Path(target).name == "LATEST")
    elif phase == "pruning":
        checkpoint.prune = wrapped(True, checkpoint.prune)


# ------------------------------------------------------------------------------------------------------------- kill


def kill(recipe: str, times: int, layout: str, overrides: Sequence[str], seed: int) -> dict[str, Any]:
    """Kill a training so many times and resume it each time; what was hit, and whether it ends as an untouched one."""
    draw, (world, engine) = random.Random(seed), LAYOUTS[layout]
    hits: Counter[str] = Counter()
    aimed = [phase for phase in PHASES for _ in range(max(1, round(times / 3 / len(PHASES))))]
    plan = [*aimed, *[""] * (times - len(aimed))][:times]
    draw.shuffle(plan)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        log, run, oracle = root / "log", root / "run", root / "untouched"

        def job(where: Path) -> list[list[str]]:
            return [[recipe, f"run.dir={where}", "run.lease_timeout_s=3", "log.every_steps=1", *engine, *overrides]]

        begin = time.monotonic()
        assert end(start(world, job(oracle), log)) == [0] * world, log.read_text()[-3000:]
        whole = time.monotonic() - begin
        resumed, finished_early = 0, 0
        for phase in plan:
            if finished(run):  # start over: the drill is longer than the training
                finished_early += 1
                check = compare(run, oracle)
                assert check["bit_equal"] or world > 1, check
                shutil.rmtree(run)
            victims = draw.choice(("one", "all")) if world > 1 else "all"
            die = f"{phase}@0" if phase else ""
            if phase in ("copied", "half a file", "file written"):
                die = f"{phase}@{draw.randrange(world)}"
            before = last_step(run)
            ranks = start(world, job(run), log, die)
            resumed += before > 0
            if phase:
                statuses = end(ranks)
                hits[f"in a save: {phase}" if -signal.SIGKILL in statuses else "ended before its phase came"] += 1
                continue
            time.sleep(draw.uniform(0.2, 0.9) * whole)
            for rank in ranks if victims == "all" else [draw.choice(ranks)]:
                rank.kill()
            end(ranks)
            hits[f"at a random moment: {victims}"] += 1
        assert end(start(world, job(run), log)) == [0] * world, log.read_text()[-3000:]
        after = compare(run, oracle)
    return {
        "times": len(plan), "hits": dict(sorted(hits.items())), "resumes": resumed,
        "runs_finished_on_the_way": finished_early, **after, "seconds": time.monotonic() - begin,
        "ok": after["steps_once"] and after["bit_equal" if world == 1 else "close"],
    }  # fmt: skip


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
    """The last checkpoints and the metrics of two runs."""
    mine, theirs = (checkpoint.newest_unverified(each / "checkpoints") for each in (run, oracle))
    assert mine is not None
    assert theirs is not None
    keys = [key for key in theirs.tensors if key.partition("/")[0] in KINDS]
    pairs = [(checkpoint.tensor_of(mine, key).double(), checkpoint.tensor_of(theirs, key).double()) for key in keys]
    difference = sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(b.square().sum()) for _, b in pairs)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "step": mine.step, "bit_equal": mine.step == theirs.step and all(torch.equal(a, b) for a, b in pairs),
        "relative_l2": difference**0.5, "close": mine.step == theirs.step and difference**0.5 < 1e-5,
        "steps_once": steps == list(range(1, theirs.step + 1)),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ matrix


def matrix(recipe: str, names: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
    """Save under each layout, go on under each: the largest error of the next losses and of the teacher, by pair."""
    half = ["run.stop_after_steps=10", "log.every_steps=1", "checkpoint.every_steps=5", *overrides]
    rest = ["log.every_steps=1", "checkpoint.every_steps=5", *overrides]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        log, oracle = root / "log", root / "untouched"

        def launch(layout: str, jobs: Sequence[Sequence[str]]) -> None:
            world, engine = LAYOUTS[layout]
            assert end(start(world, [[*job, *engine] for job in jobs], log)) == [0] * world, log.read_text()[-3000:]

        launch("local x1", [[recipe, f"run.dir={oracle}", *rest]])
        for saver in names:  # one launch a saver, one a loader that opens all of them
            launch(saver, [[recipe, f"run.dir={root / saver}", *half]])
        for loader in names:
            for saver in names:
                shutil.copytree(root / saver, root / f"{saver} -> {loader}")
            launch(loader, [[recipe, f"run.dir={root / f'{saver} -> {loader}'}", *rest] for saver in names])
        pairs = {}
        for saver in names:
            for loader in names:
                pair = f"{saver} -> {loader}"
                wanted, got = losses(oracle), losses(root / pair)
                worst = max(abs(a - b) / abs(b) for a, b in zip(got, wanted, strict=True))
                teacher = compare(root / pair, oracle)
                fine = worst < 1e-5 and teacher["steps_once"]
                pairs[pair] = {"loss": worst, "state": teacher["relative_l2"], "ok": fine}
    return {"pairs": pairs, "ok": all(pair["ok"] for pair in pairs.values())}


def losses(run: Path) -> list[float]:
    """The logged losses of a run."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------------------------------- main


def show(found: dict[str, Any], console: Console) -> None:
    """A report for people."""
    if "pairs" in found:
        table = Table("saved by -> gone on by", "worst loss, relative", "state, relative L2")
        for name, pair in found["pairs"].items():
            table.add_row(name, f"{pair['loss']:.1e}", f"{pair['state']:.1e}")
    else:
        table = Table("what", "value")
        for name, value in found.items():
            table.add_row(name, str(value))
    console.print(table)
    console.print("as promised" if found["ok"] else "[red]NOT as promised[/red]")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["ranks"]:
        return run_ranks(json.loads(arguments[1]), arguments[2])
    parser = argparse.ArgumentParser(description="Kill and resume a training, and see that nothing is lost.")
    parser.add_argument("drill", choices=("kill", "matrix"))
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--times", type=int, default=100, help="kills")
    parser.add_argument("--layout", default="local x1", choices=tuple(LAYOUTS), help="what is killed")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="of the matrix, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to keep the report")
    args = parser.parse_intermixed_args(arguments)
    try:
        config.load(args.recipe, args.overrides)
    except ValueError as error:
        print(f"drill: {error}", file=sys.stderr)
        return 2
    if args.drill == "kill":
        found = kill(args.recipe, args.times, args.layout, args.overrides, args.seed)
    else:
        found = matrix(args.recipe, args.layouts.split(","), args.overrides)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    show(found, Console())
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
