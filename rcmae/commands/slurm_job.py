"""What the SLURM templates call, and a submission that is checked first.

    rcmae slurm-job begin RECIPE [key=value ...] --nodes N --ranks-per-node R
        on how many nodes the run can resume; records the start
    rcmae slurm-job end RUN_DIR --status S
        whether to restart
    rcmae slurm-job follow RUN_DIR [--status S]
        records the start of a follower, or says whether to restart it
    rcmae slurm-job sweep SWEEP.yaml [--task T]
        the arguments of a run of a sweep; without a task the array's range, all runs checked
    rcmae slurm-job submit [sbatch's options] TEMPLATE.sbatch [arguments]
        runs sbatch unless `rcmae plan` refuses. GPU names the kind of GPU, as its --gpu does:
        GPU=h200 rcmae slurm-job submit --nodes=2-8 ...

Answers are `name=value` words for a shell, each quoted; with --lines a line each, as they are, for
a shell that must not evaluate them. Exit status: 0 answered; 1 the job restarted without progress
too often; 2 the input is wrong, or the plan refuses it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer one question of a template; the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    is_submit = words[:1] == ["submit"] and words[1:] not in (["--help"], ["-h"])
    if is_submit:  # what follows is sbatch's
        asked = argparse.Namespace(answer=submit, words=words[1:])
    elif words[:1] == ["submit"]:
        print(__doc__)
        return 0
    else:
        asked = _parser().parse_args(words)

    from rcmae.errors import Refused

    try:
        return int(asked.answer(asked))
    except (Refused, OSError) as error:
        _tell(f"rcmae: {error}")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rcmae slurm-job",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    begins = verbs.add_parser("begin", help="on how many nodes a run resumes; records the start")
    begins.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    begins.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="as rcmae train takes them"
    )
    begins.add_argument("--nodes", type=int, required=True, help="that the job has")
    begins.add_argument("--ranks-per-node", type=int, required=True, help="one a GPU")
    begins.set_defaults(answer=begin)

    ends = verbs.add_parser("end", help="whether to restart")
    ends.add_argument("run_dir", type=Path)
    ends.add_argument("--status", type=int, required=True, help="the launcher's exit status")
    ends.set_defaults(answer=end)

    follows = verbs.add_parser(
        "follow", help="records the start of a follower, or says whether to restart it"
    )
    follows.add_argument("run_dir", type=Path)
    follows.add_argument("--status", type=int, help="its exit status; without it, it starts")
    follows.set_defaults(answer=follow)

    this_job = os.environ.get("SLURM_JOB_ID", "")
    for each in (ends, follows):
        each.add_argument(
            "--backoff-s",
            type=int,
            default=60,
            help="seconds to wait after a start without progress; doubles each time",
        )
        each.add_argument("--job", default=this_job, help="default: this one")
    for each in (begins, ends, follows):
        each.add_argument(
            "--idle-starts",
            type=int,
            default=5,
            help="restarts without progress in a row that end the job",
        )

    sweeps = verbs.add_parser("sweep", help="the runs of a sweep")
    sweeps.add_argument("file", type=Path, help="YAML: recipe, runs, and set and dir if wanted")
    sweeps.add_argument(
        "--task", type=int, help="the array's task; without it all runs are checked"
    )
    sweeps.set_defaults(answer=sweep)
    for each in (begins, ends, follows, sweeps):
        each.add_argument("--lines", action="store_true", help="a line an answer, unquoted")
    verbs.add_parser("submit", help="submits a job that can run; arguments as for sbatch")
    return parser


def _tell(text: str) -> None:
    """Say something to people."""
    print(text, file=sys.stderr, flush=True)


def _answer(asked: argparse.Namespace, **values: object) -> None:
    """Give a shell its answers: whatever lies in a run's folder, none of it is a command."""
    if asked.lines:
        _print_lines([f"{name}={value}" for name, value in values.items()])
    else:
        print(*(f"{name}={shlex.quote(str(value))}" for name, value in values.items()))


def _print_lines(words: Sequence[str]) -> None:
    """Words, a line each.

    Raises:
        Refused: one is not a line.
    """
    from rcmae.errors import Refused

    for word in words:
        if "\n" in word:
            raise Refused(f"{word!r} has a line end in it; choose another name")
    print("\n".join(words))


def begin(asked: argparse.Namespace) -> int:
    """Answer run_dir, nodes and the module that trains the recipe, and note the start."""
    from rcmae import config
    from rcmae.run import jobs

    recipe = jobs.with_its_streams(config.load(asked.recipe, asked.overrides))
    ranks = asked.ranks_per_node
    used = jobs.nodes_that_fit(recipe, nodes=asked.nodes, ranks_per_node=ranks)
    if used < asked.nodes:
        _tell(
            f"{asked.nodes - used} of {asked.nodes} nodes stay idle: {asked.nodes} x {ranks} ranks "
            f"do not divide batch.images={recipe.batch.images} and the "
            f"{recipe.data.canonical_streams or 'future'} canonical streams, {used} x {ranks} do"
        )
    if (limit := recipe.run.stop_after_steps) is not None:
        _tell(
            f"run.stop_after_steps={limit}: so many steps a start, until the run is finished; "
            "schedule.steps ends it"
        )
    why_not = jobs.note_start(
        recipe.run_dir,
        jobs.Shape(asked.nodes, used, used * ranks),
        step=jobs.committed_step(recipe.run_dir),
        limit=asked.idle_starts,
        outcome=jobs.outcome(recipe.run_dir).get("time"),
    )
    if why_not is not None:
        _tell(why_not)
        return 1
    _answer(asked, run_dir=recipe.run_dir, nodes=used, module=config.module_of(recipe))
    return 0


def end(asked: argparse.Namespace) -> int:
    """Answer the status that counts, whether to restart, and after how many seconds."""
    from rcmae.run import jobs

    patience = jobs.Patience(asked.idle_starts, asked.backoff_s)
    _answer(asked, **_said(jobs.after_training(asked.run_dir, asked.job, asked.status, patience)))
    return 0


def follow(asked: argparse.Namespace) -> int:
    """Note the start of a follower. With a status, answer as `end`, and which jobs came to train
    the run, the last one first: it may have been refused while one before it is in the queue.
    """
    from rcmae.run import jobs

    if asked.status is None:
        why_not = jobs.note_start(
            asked.run_dir / jobs.EVALUATIONS,
            jobs.Shape(nodes=1, used=1, ranks=1),
            step=jobs.evaluated_step(asked.run_dir),
            limit=asked.idle_starts,
        )
        if why_not is not None:
            _tell(why_not)
        return 0 if why_not is None else 1
    patience = jobs.Patience(asked.idle_starts, asked.backoff_s)
    verdict = jobs.after_evaluating(asked.run_dir, asked.job, asked.status, patience)
    came = dict.fromkeys(start.job for start in reversed(jobs.starts(asked.run_dir)))
    _answer(asked, **_said(verdict), followed=",".join(came))
    return 0


def _said(verdict: object) -> dict[str, object]:
    """A verdict as words for a shell; what it has for people is said."""
    from rcmae.run.jobs import Verdict

    assert isinstance(verdict, Verdict)
    for text in verdict.told:
        _tell(text)
    return {
        "status": verdict.status,
        "again": "yes" if verdict.again else "no",
        "delay_s": verdict.delay_s,
        "step": verdict.step,
    }


def sweep(asked: argparse.Namespace) -> int:
    """Answer the arguments of one run of a sweep.

    Without a task check all of them and answer the array's range.
    """
    from rcmae import config
    from rcmae.errors import Refused
    from rcmae.run.jobs import read_sweep

    runs = read_sweep(asked.file)
    if asked.task is None:
        for name, words in runs.items():
            try:
                config.load(words[0], words[1:])
            except Refused as error:
                raise Refused(f"{asked.file}, run {name}: {error}") from error
        for number, words in enumerate(runs.values()):
            _tell(f"{number}: {shlex.join(words)}")
        print(f"0-{len(runs) - 1}")
        return 0
    if not 0 <= asked.task < len(runs):
        raise Refused(
            f"{asked.file} has runs 0 to {len(runs) - 1}, not {asked.task}; submit that array"
        )
    words = list(runs.values())[asked.task]
    if asked.lines:
        _print_lines(words)
    else:
        print(shlex.join(words))
    return 0


# ------------------------------------------------------------------------------------------- submit


def submit(asked: argparse.Namespace) -> int:
    """Hand a job to sbatch if it can run on what it asks for; 2 if the planner refuses it."""
    from rcmae.errors import Refused
    from rcmae.run.jobs import read_sweep, recipe_of_template, shape_of

    at = next((at for at, word in enumerate(asked.words) if word.endswith(".sbatch")), None)
    if at is None:
        raise Refused(
            "no template given: submit [sbatch's options] slurm/pretrain.sbatch RECIPE "
            "[key=value ...]"
        )
    options = asked.words[:at]
    template = Path(asked.words[at])
    arguments = asked.words[at + 1 :]
    text = template.read_text()

    fixed = recipe_of_template(text)
    runs = [[fixed, *arguments] if fixed else arguments]
    if template.name == "evaluate.sbatch":
        runs = []
    elif template.name == "sweep.sbatch":
        runs = list(read_sweep(Path(arguments[0])).values()) if arguments else []
        if not any(word.startswith(("--array", "-a")) for word in options):
            options = [*options, f"--array=0-{len(runs) - 1}"]

    nodes, gpus = shape_of(options, text)
    for run in runs:
        if not run:
            raise Refused(f"no recipe given: {template} RECIPE [key=value ...]")
        if not _can_run(run, nodes, gpus):
            _tell("not submitted")
            return 2
    return subprocess.run(["sbatch", *options, str(template), *arguments]).returncode


def _can_run(run: Sequence[str], nodes: int, gpus: int) -> bool:
    """Whether the planner lets a run be submitted; says what it says."""
    from rcmae import config
    from rcmae.run import jobs

    recipe = jobs.with_its_streams(config.load(run[0], run[1:]))
    used = jobs.nodes_that_fit(recipe, nodes=nodes, ranks_per_node=gpus)
    if used < nodes:
        _tell(
            f"{nodes - used} of {nodes} nodes would stay idle: the batch and the streams divide "
            f"over {used}"
        )
    plan = [sys.executable, "-m", "rcmae", "plan", *run, f"--nodes={used}", f"--gpus={gpus}"]
    if "GPU" in os.environ:
        plan.append(f"--gpu={os.environ['GPU']}")
    return subprocess.run(plan).returncode == 0
