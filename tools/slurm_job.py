#!/usr/bin/env python3
"""What the templates in slurm/ ask around a training: where it runs, whether to run it again, which
run of a sweep.

    python tools/slurm_job.py begin RECIPE [key=value ...] --nodes 8 --ranks-per-node 8
    python tools/slurm_job.py end RUN_DIR --status 75
    python tools/slurm_job.py follow RUN_DIR [--status 75]
    python tools/slurm_job.py sweep SWEEP.yaml [--task 3]
    python tools/slurm_job.py submit [sbatch's options] TEMPLATE [arguments]
        what slurm/submit.sh does

Answers are shell assignments or words on standard output, for `eval`; what people should know goes
to standard error. `begin` says which module trains the recipe, on how many of the nodes the run can
go on (the largest number whose ranks divide the batch and the canonical streams), and notes the
start in `run.dir/jobs.jsonl`; outside a job it only answers. `end` asks for another start where the
training stopped on request with a checkpoint committed or lost a rank, and for none after several
starts without a step of progress. `follow` does both for a side-car that evaluates the run, whose
progress is the last step evaluated. Imports no torch: the answer comes at once. Exit status: 0
answered; 1 no progress; 2 refused.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rcmae import config
from rcmae.config import Recipe
from rcmae.errors import Refused

# As rcmae.run.preempt and rcmae.follow have them; not imported, so as not to import torch.
STOPPED = 75  # the exit status of "run me again"
EVALUATIONS = "evaluations"  # the side-car's folder in the run's


# ------------------------------------------------------------------------------------------ placing


def streams_of(folder: Path) -> int | None:
    """The canonical streams that a checkpoint's folder has frozen, None if it is no checkpoint."""
    try:
        return int(
            json.loads((folder / "manifest.json").read_text())["meta"]["sizes"]["canonical_streams"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first; whether they are valid is not looked at."""
    try:
        found = sorted((run_dir / "checkpoints").iterdir())
    except OSError:
        return []
    return [path for path in found if re.fullmatch(r"step-\d{8}", path.name)]


def freeze_streams(recipe: Recipe) -> None:
    """Put the number of streams into the recipe that the run it goes on with has chosen for
    good.
    """
    asked = recipe.checkpoint.resume
    if recipe.data.canonical_streams is None and asked != "never":
        own = checkpoints(recipe.run_dir)[::-1]
        found = [streams for streams in map(streams_of, own) if streams]
        other = streams_of(Path(asked)) if asked not in ("auto", "must") else None
        recipe.data.canonical_streams = next(iter(found), other)


def nodes_that_fit(recipe: Recipe, *, nodes: int, ranks_per_node: int) -> int:
    """The largest number of nodes, at most `nodes`, whose ranks divide the batch and the streams.

    Raises:
        ValueError: not even one node's do, with what stands against it.
    """
    for count in range(nodes, 0, -1):
        if not config.batch_problems(recipe, count * ranks_per_node):
            return count
    problems = "\n".join(
        f"  {problem}" for problem in config.batch_problems(recipe, ranks_per_node)
    )
    raise Refused(
        f"no number of nodes of {ranks_per_node} ranks fits this run; on one node:\n{problems}"
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


def committed_step(run_dir: Path) -> int:
    """The step of the newest checkpoint that was committed in a run's folder, 0 without one."""
    try:
        return int((run_dir / "checkpoints" / "LATEST").read_text().strip().removeprefix("step-"))
    except (OSError, ValueError):
        return 0


def outcome(run_dir: Path) -> dict[str, Any]:
    """What outcome.json says, empty where it says nothing."""
    try:
        found = json.loads((run_dir / "outcome.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def starts(folder: Path, job: str | None = None) -> list[Started]:
    """The starts that a folder's jobs.jsonl tells of, oldest first; of one job or all."""
    try:
        lines = (folder / "jobs.jsonl").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(Started(**json.loads(line)))
        except (ValueError, TypeError):  # torn by a full disk or a kill
            continue
    return [start for start in found if job in (None, start.job)]


def evaluated_step(run_dir: Path) -> int:
    """The last step of a run that a side-car has evaluated, 0 before the first."""
    try:
        lines = (run_dir / EVALUATIONS / "events.jsonl").read_text().splitlines(keepends=True)
    except OSError:
        return 0
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return max((event["step"] for event in events if event["event"] == "evaluate"), default=0)


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
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def note_start(folder: Path, limit: int, **about: Any) -> bool:
    """Note in a folder's jobs.jsonl that this job starts, if it is one.

    False: too many starts came to nothing.
    """
    job, step = os.environ.get("SLURM_JOB_ID", ""), about["step"]
    if not job:
        return True
    idle = idle_starts(folder, job, step)
    if idle >= limit:
        tell(
            f"{idle} starts of this job in a row did not get beyond step {step}: not started again"
        )
        return False
    folder.mkdir(parents=True, exist_ok=True)
    start = Started(job=job, restart=this_restart(), time=time.time(), **about)
    with (folder / "jobs.jsonl").open("a") as file:
        file.write(json.dumps(start._asdict()) + "\n")
    return True


def start_again(
    folder: Path, step: int, status: int, options: argparse.Namespace, *, lost: bool = False
) -> str:
    """The answer to how a start ended: the status that counts, whether to start again, and after
    how many seconds.
    """
    again, delay = status == STOPPED or lost, 0
    last = max((start.restart for start in starts(folder, options.job)), default=0)
    if last > this_restart():  # this shell was cut off, and is back: a requeue would be the other's
        tell(
            f"start {last} of this job goes on with the run: start {this_restart()} asks for "
            "nothing"
        )
        again = False
    if again:
        idle = idle_starts(folder, options.job, step)
        if idle >= options.idle_starts:
            tell(
                f"{idle} starts of this job in a row did not get beyond step {step}: not started "
                "again"
            )
            again = False
        elif idle:
            delay = options.backoff_s * 2 ** (idle - 1)
            tell(
                f"no step was done beyond {step}; another start in {delay} s, "
                f"{options.idle_starts - idle} are left"
            )
    return f"status={status} again={'yes' if again else 'no'} delay_s={delay} step={step}"


# ----------------------------------------------------------------------------------------- commands


def begin(options: argparse.Namespace) -> int:
    """Answer run_dir, nodes and the module that trains the recipe, and note the start."""
    recipe = config.load(options.recipe, options.overrides)
    freeze_streams(recipe)
    used = nodes_that_fit(recipe, nodes=options.nodes, ranks_per_node=options.ranks_per_node)
    if used < options.nodes:
        tell(
            f"{options.nodes - used} of {options.nodes} nodes stay idle: {options.nodes} x "
            f"{options.ranks_per_node} "
            f"ranks do not divide batch.images={recipe.batch.images} and the "
            f"{recipe.data.canonical_streams or 'future'} canonical streams, {used} x "
            f"{options.ranks_per_node} do"
        )
    if (limit := recipe.run.stop_after_steps) is not None:
        tell(
            f"run.stop_after_steps={limit}: so many steps a start, until the run is finished; "
            "schedule.steps ends it"
        )
    if not note_start(
        recipe.run_dir,
        options.idle_starts,
        nodes=options.nodes,
        used=used,
        ranks=used * options.ranks_per_node,
        step=committed_step(recipe.run_dir),
        outcome=outcome(recipe.run_dir).get("time"),
    ):
        return 1
    print(
        f"run_dir={shlex.quote(str(recipe.run_dir))} nodes={used} module={config.module_of(recipe)}"
    )
    return 0


def end(options: argparse.Namespace) -> int:
    """Answer the status that counts, whether to start again, and after how many seconds."""
    mine = starts(options.run_dir, options.job)
    told, status, lost = outcome(options.run_dir), options.status, False
    if mine and told and told.get("time") != mine[-1].outcome:
        # written since: torchrun's status is 1 whatever it was
        status = int(told.get("exit_status", status))
        lost = bool(told.get("again")) and status != STOPPED
    if lost:
        tell(f"started again: {told.get('reason')}")
    print(start_again(options.run_dir, committed_step(options.run_dir), status, options, lost=lost))
    return 0


def follow(options: argparse.Namespace) -> int:
    """Note the start of a side-car.

    With a status, answer as `end`, and which job trains the run.
    """
    folder, step = options.run_dir / EVALUATIONS, evaluated_step(options.run_dir)
    if options.status is None:
        return (
            0
            if note_start(
                folder, options.idle_starts, nodes=1, used=1, ranks=1, step=step, outcome=None
            )
            else 1
        )
    jobs = starts(options.run_dir)
    print(
        start_again(folder, step, options.status, options),
        f"followed={jobs[-1].job if jobs else ''}",
    )
    return 0


def sweep(options: argparse.Namespace) -> int:
    """Answer the arguments of one run of a sweep.

    Without a task check all of them and answer the array's range.
    """
    runs = read_sweep(options.file)
    if options.task is None:
        for name, arguments in runs.items():
            try:
                config.load(arguments[0], arguments[1:])
            except ValueError as error:
                raise Refused(f"{options.file}, run {name}: {error}") from error
        for number, arguments in enumerate(runs.values()):
            tell(f"{number}: {shlex.join(arguments)}")
        print(f"0-{len(runs) - 1}")
        return 0
    if not 0 <= options.task < len(runs):
        raise Refused(
            f"{options.file} has runs 0 to {len(runs) - 1}, not {options.task}; submit that array"
        )
    print(shlex.join(list(runs.values())[options.task]))
    return 0


def read_sweep(path: Path) -> dict[str, list[str]]:
    """The arguments of each run of a sweep, by its name, in the file's order.

    Raises:
        ValueError: the file is no sweep; says what one looks like.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise Refused(f"{path} cannot be read: {error}") from error
    known = {"recipe", "dir", "set", "runs"}
    if (
        not isinstance(tree, dict)
        or not {"recipe", "runs"} <= tree.keys() <= known
        or not tree["runs"]
    ):
        raise Refused(
            f"{path}: a sweep has 'recipe' (a name or path), 'runs' (a mapping of each run's "
            "name to its keys), and "
            "may have 'set' (keys of all runs) and 'dir' (the folder of their folders)"
        )
    folder, runs = tree.get("dir") or f"runs/{path.stem}", {}
    for name, keys in tree["runs"].items():
        if not re.fullmatch(r"[\w.=+-]+", str(name)):
            raise Refused(
                f"{path}: the run {name!r} names a folder; use letters, digits and . _ = + -"
            )
        keys = {**(tree.get("set") or {}), **(keys or {}), "run.dir": f"{folder}/{name}"}
        runs[str(name)] = [
            str(tree["recipe"]),
            *(f"{key}={json.dumps(value)}" for key, value in keys.items()),
        ]
    return runs


def submit(options: argparse.Namespace) -> int:
    """Hand a job to sbatch if it can run on what it asks for; 2 if tools/plan.py refuses it."""
    words = options.words
    at = next((number for number, word in enumerate(words) if word.endswith(".sbatch")), None)
    if at is None:
        raise Refused(
            "no template given: submit [sbatch's options] slurm/pretrain.sbatch RECIPE "
            "[key=value ...]"
        )
    asked, template, arguments = words[:at], Path(words[at]), words[at + 1 :]
    text = template.read_text()
    if template.name == "sweep.sbatch":
        runs = list(read_sweep(Path(arguments[0])).values()) if arguments else []
        if not any(word.startswith(("--array", "-a")) for word in asked):
            asked = [*asked, f"--array=0-{len(runs) - 1}"]
    else:
        fixed = re.search(r'pretrain\.sbatch" (\w+) "\$@"', text)
        runs = (
            []
            if template.name == "evaluate.sbatch"
            else [[fixed[1], *arguments] if fixed else arguments]
        )
    nodes, gpus = shape(asked, text)
    for run in runs:
        if not run:
            raise Refused(f"no recipe given: {template} RECIPE [key=value ...]")
        recipe = config.load(run[0], run[1:])
        freeze_streams(recipe)
        used = nodes_that_fit(recipe, nodes=nodes, ranks_per_node=gpus)
        if used < nodes:
            tell(
                f"{nodes - used} of {nodes} nodes would stay idle: the batch and the streams "
                f"divide over {used}"
            )
        if config.module_of(recipe) != "rcmae.train":
            tell(
                f"{recipe.run.name}: tools/plan.py knows pretraining only; the batch divides, "
                "the rest is unchecked"
            )
            continue
        plan = [
            sys.executable,
            str(Path(__file__).with_name("plan.py")),
            *run,
            f"--nodes={used}",
            f"--gpus={gpus}",
        ]
        if subprocess.run(
            [*plan, *([f"--gpu={os.environ['GPU']}"] if "GPU" in os.environ else [])]
        ).returncode:
            tell("not submitted")
            return 2
    return subprocess.run(["sbatch", *asked, str(template), *arguments]).returncode


def shape(asked: Sequence[str], template: str) -> tuple[int, int]:
    """(nodes, GPUs of each) at most, by sbatch's options and else by a template's own.

    Raises:
        ValueError: they cannot be told.
    """
    found = {"nodes": "1", "gpus-per-node": "1"}
    given = re.sub(r"(^| )(?:-N ?|--nodes )", r"\1--nodes=", " ".join(asked))
    given = given.replace("--gpus-per-node ", "--gpus-per-node=")
    for word in [*re.findall(r"^#SBATCH (--\S+)", template, re.MULTILINE), *given.split()]:
        name, equals, value = word.removeprefix("--").partition("=")
        if equals and name in found:
            found[name] = value
    try:
        return int(re.split("[-,:]", found["nodes"])[-1]), int(
            found["gpus-per-node"].rpartition(":")[2]
        )
    except ValueError as error:
        raise Refused(f"cannot tell the shape of the job from {found}: {error}") from error


def tell(text: str) -> None:
    """Say something to people."""
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Answer one question of a template; the exit status."""
    parser = argparse.ArgumentParser(
        prog="tools/slurm_job.py", description="What the templates in slurm/ ask."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    parser_begin = verbs.add_parser(
        "begin", help="on how many nodes a run goes on; notes the start"
    )
    parser_begin.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser_begin.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="as rcmae.train takes them"
    )
    parser_begin.add_argument("--nodes", type=int, required=True, help="that the job has")
    parser_begin.add_argument("--ranks-per-node", type=int, required=True, help="one a GPU")
    parser_begin.set_defaults(answer=begin)
    parser_end = verbs.add_parser("end", help="whether to start again")
    parser_end.add_argument("run_dir", type=Path)
    parser_end.add_argument("--status", type=int, required=True, help="the launcher's exit status")
    parser_end.set_defaults(answer=end)
    parser_follow = verbs.add_parser(
        "follow", help="notes the start of a side-car, or whether to start it again"
    )
    parser_follow.add_argument("run_dir", type=Path)
    parser_follow.add_argument("--status", type=int, help="its exit status; without it, it starts")
    parser_follow.set_defaults(answer=follow)
    for each in (parser_end, parser_follow):
        each.add_argument(
            "--backoff-s", type=int, default=60, help="wait after a start without progress; doubles"
        )
        each.add_argument(
            "--job", default=os.environ.get("SLURM_JOB_ID", ""), help="default: this one"
        )
    for each in (parser_begin, parser_end, parser_follow):
        each.add_argument(
            "--idle-starts",
            type=int,
            default=5,
            help="so many in a row without progress end the job",
        )
    parser_sweep = verbs.add_parser("sweep", help="the runs of a sweep")
    parser_sweep.add_argument(
        "file", type=Path, help="YAML: recipe, runs, and set and dir if wanted"
    )
    parser_sweep.add_argument(
        "--task", type=int, help="the array's task; without it all runs are checked"
    )
    parser_sweep.set_defaults(answer=sweep)
    verbs.add_parser(
        "submit", help="submits a job that can run; arguments as for sbatch, the GPUs' kind in GPU"
    )
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["submit"] and words[1:] in (["--help"], ["-h"]):
        print(
            "slurm/submit.sh [sbatch's options] slurm/TEMPLATE.sbatch [arguments]: sbatch where "
            "tools/plan.py does"
        )
        print(
            "not refuse. The GPUs' kind, as its --gpu has them, in GPU: GPU=h200 slurm/submit.sh "
            "--nodes=2-8 ..."
        )
        return 0
    if words[:1] == ["submit"]:  # what follows is sbatch's
        options = argparse.Namespace(answer=submit, words=words[1:])
    else:
        options = parser.parse_args(words)
    try:
        return int(options.answer(options))
    except (ValueError, OSError) as error:
        tell(f"error: {error}")
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
