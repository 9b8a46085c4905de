"""`rcmae COMMAND ...`: one door to all that this package does.

A command is a module with a `main(arguments) -> exit status`; it is imported only when it is asked
for, so that help and a mistyped command answer at once.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from rcmae import __version__
from rcmae.process import console
from rcmae.process.leaving import leaving


class Command(NamedTuple):
    """A command of the command line."""

    module: str  # of rcmae.commands; with MODULE:FUNCTION, another than its `main` is called
    about: str  # a line of `rcmae --help`


COMMANDS = {
    "train": Command("training:train", "pretrain by a recipe"),
    "cooldown": Command("cooldown", "end a training of constant rate early, as a run of its own"),
    "finetune": Command("training:finetune", "fine-tune a pretrained encoder on labelled shards"),
    "probe": Command("training:probe", "train a linear head on a frozen encoder"),
    "detect": Command("training:detect", "train and judge a detector of boxes and masks"),
    "segment": Command("training:segment", "train and judge a segmenter: a class for each pixel"),
    "follow": Command("follow", "evaluate each checkpoint of a run from a separate job"),
    "plan": Command(
        "plan", "check that a run fits and divides, and estimate its time, before queueing it"
    ),
    "doctor": Command("doctor", "check one node, or several, for what a run needs"),
    "runs": Command("runs", "show a run's progress and where its time went"),
    "track": Command("track", "show a run in Weights & Biases, MLflow or trackio"),
    "report": Command("report", "write a page with a run, or several beside each other"),
    "shards": Command("shards", "make, index and check shards of images"),
    "checkpoint": Command("checkpoint", "list, show, verify, diff and prune checkpoints"),
    "export": Command("export", "write a run's weights for other programs"),
    "convert": Command("convert", "convert weights between families"),
    "embed": Command("evaluation.embed", "write the features of images to a table"),
    "probes": Command(
        "evaluation.probes", "judge features by k-NN, logistic regression and few labels"
    ),
    "visualize": Command(
        "evaluation.visualize", "draw reconstructions, attention, features and filters"
    ),
    "robustness": Command(
        "evaluation.robustness", "judge a classifier on other sets and corrupted images"
    ),
    "replay": Command("again.replay", "rerun a bad step on one process"),
    "reproduce": Command("again.reproduce", "train the first steps of a run again, and compare"),
    "analyze-teacher": Command(
        "evaluation.analyze_teacher", "analyse what the teacher does to the gradients"
    ),
    "compare": Command(
        "evaluation.compare", "train objectives by one recipe and judge them side by side"
    ),
    "recipe": Command("recipe", "list the shipped recipes, or print one with all its settings"),
    "slurm-templates": Command("slurm_templates", "copy the templates of SLURM jobs to a folder"),
    "slurm-job": Command(
        "slurm_job", "what the SLURM templates call; submit a job once it is checked"
    ),
}

WRONG_INPUT = 2  # exit status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        print(overview(), file=sys.stderr)
        return WRONG_INPUT
    name = words[0]
    if name in ("-h", "--help", "help"):
        print(overview())
        return 0
    if name == "--version":
        print(f"rcmae {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"rcmae: no command {name!r}; {_way_out(name)}", file=sys.stderr)
        return WRONG_INPUT
    console.guard()
    module, _, function = COMMANDS[name].module.partition(":")
    command = importlib.import_module(f"rcmae.commands.{module}")
    status = int(getattr(command, function or "main")(words[1:]))
    return status if arguments is not None else leaving(status)


def overview() -> str:
    """What `rcmae --help` prints."""
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: rcmae COMMAND ...",
            "",
            "Pretrain Vision Transformers by masked autoencoding with a teacher.",
            "",
            *lines,
            "",
            "rcmae COMMAND --help shows a command's arguments; rcmae --version prints the version.",
        ]
    )


def _way_out(name: str) -> str:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    return f"did you mean {close[0]!r}?" if close else "rcmae --help lists them"


if __name__ == "__main__":
    raise SystemExit(main())
