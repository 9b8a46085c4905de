"""Write a run's student or teacher for other programs: safetensors, MAE's and RC-MAE's .pth, timm.

    rcmae export RUN --format timm --out encoder.safetensors
    rcmae export RUN/checkpoints/step-00001000 --what student --format mae --out encoder.pth
    rcmae export RUN --format folder --out model
        a folder that timm and transformers load without a network, with a model card

A run of `rcmae finetune`, `probe`, `segment` or `detect` is written whole, encoder and head, in the
formats of its task. --encoder leaves the head out.

RUN stands for its newest valid checkpoint. Checksums are verified first; weights pass tensor by
tensor, so a network of any size fits into memory. Exit status: 0 written; 2 these arguments do not
go together; 1 the checkpoint is damaged or the file could not be written, and what was there before
still is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rcmae.errors import Refused, did_you_mean
from rcmae.weights.layouts import KIND, LAYOUTS

FOLDER = "folder"  # the format of a model's passport
OF_TASKS = {  # formats of a whole trained network, which its task has; said here without importing
    "timm": "of rcmae finetune, probe: the classifier",
    "hf": "of rcmae finetune, probe: the classifier, a folder for transformers",
    "mmseg": "of rcmae segment: mmsegmentation 0.x's file",
    "hf-upernet": "of rcmae segment: a folder for transformers",
    "detectron2": "of rcmae detect: by the names of detectron2's model zoo",
}

WITHOUT_LAYOUT = ("detect", "segment")  # tasks whose encoders are no published layout's

if TYPE_CHECKING:
    from rcmae.checkpoint import Manifest
    from rcmae.weights.writing import Exported


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    options = _parser().parse_args(arguments)
    from rcmae.checkpoint import CheckpointError, find_checkpoint
    from rcmae.process import extensions

    try:
        manifest, passed_over = find_checkpoint(options.source)
        for problem in passed_over:
            print(f"skipped: {problem}", file=sys.stderr)
        done = _exported(manifest, options)
    except (Refused, CheckpointError, OSError) as error:
        print(f"rcmae: {error}", file=sys.stderr)
        return 2 if isinstance(error, Refused) else 1
    if options.json:
        document = done._asdict() | {"path": str(done.path), "checkpoint": str(manifest.path)}
        print(json.dumps(document, indent=1))
        return 0
    print(
        f"{done.path}: {' and '.join(done.networks)} of step {done.step:,} ({manifest.path}), "
        f"{done.tensors} tensors, {done.bytes / 1e6:,.1f} MB\n  {done.use}"
    )
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    if "timm." in done.use and extensions.guard_torchvision():
        print(
            "  timm does not import by itself here, as torchvision does not fit this torch: "
            f"{extensions.remedy()}"
        )
    return 0


def _exported(manifest: Manifest, options: argparse.Namespace) -> Exported:
    """Write the whole network where its task has the format, else as the encoder's layouts say."""
    from rcmae.tasks.registry import TASKS, task_named
    from rcmae.weights.formats import export_whole
    from rcmae.weights.writing import export

    if options.format == FOLDER:
        from rcmae.run.passport.folder import write_folder

        return write_folder(
            manifest, options.out, network=options.what, overwrite=options.overwrite
        )
    task = options.task or manifest.meta["recipe"].get("task", {}).get("name", "pretrain")
    # a module of somebody else's is imported only where the user names it
    known = options.task is not None or task in TASKS
    formats = task_named(task).formats if known and not options.encoder else {}
    if options.format in formats:
        return export_whole(
            manifest,
            options.out,
            formats,
            name=options.format,
            network=options.what,
            overwrite=options.overwrite,
        )
    if options.format not in LAYOUTS:
        if options.format in OF_TASKS:
            raise Refused(_not_this_task(manifest, options, task, list(formats)))
        names = list(dict.fromkeys([*formats, *LAYOUTS, FOLDER]))
        raise Refused(f"--format {options.format}: {did_you_mean(options.format, names)}")
    try:
        return export(
            manifest,
            options.out,
            layout=options.format,
            network=options.what,
            overwrite=options.overwrite,
        )
    except Refused as error:
        if options.encoder and options.format in task_named(task).formats:
            raise Refused(f"{error}; without --encoder the whole network is written") from error
        if task not in WITHOUT_LAYOUT:
            raise
        way = " or ".join(task_named(task).formats)
        raise Refused(f"{error}; a run of rcmae {task}: --format {way}") from error


def _not_this_task(
    manifest: Manifest, options: argparse.Namespace, task: str, formats: Sequence[str]
) -> str:
    """Why a format of other tasks is refused, and which way there is for a run of this one."""
    ways = [f"--format {name}" for name in [*(formats or LAYOUTS), FOLDER]]
    if task in ("detect", "segment") or not options.format.startswith("hf"):
        way = " or ".join(ways)
    else:
        model = manifest.meta["recipe"].get("model", {})
        family = "pixio" if model.get("class_tokens", 1) > 1 else "huggingface"
        convert = f"`rcmae convert {options.source} --to {family} --out FOLDER` for transformers"
        ways = [*([] if model.get("registers") else [convert]), f"--format {FOLDER} for timm"]
        way = f"its encoder: {' or '.join(ways)}"
    about = OF_TASKS[options.format]
    return f"--format {options.format} is {about}; this is a run of rcmae {task}: {way}"


def _parser() -> argparse.ArgumentParser:
    about = {name: layout.about for name, layout in LAYOUTS.items()}
    about[FOLDER] = "a folder for timm and transformers, with a model card, curves and recipe"
    layouts = "\n".join(f"  {name:<12} {text}" for name, text in about.items())
    whole = "\n".join(f"  {name:<12} {text}" for name, text in OF_TASKS.items())
    parser = argparse.ArgumentParser(
        prog="rcmae export",
        description=__doc__,
        epilog=f"formats:\n{layouts}\n\nformats of whole networks:\n{whole}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument(
        "--what",
        choices=KIND,
        help="default: the teacher, if there is one, which RC-MAE fine-tunes",
    )
    parser.add_argument(
        "--format", required=True, help="see below; a task of your own may have more"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--encoder", action="store_true", help="the encoder alone, without decoder and heads"
    )
    parser.add_argument(
        "--task",
        metavar="MODULE:NAME",
        help="task of the run, if it is your own: brings its formats",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser
