"""How a fine-tuned classifier does on other labelled sets and on corrupted images.

    rcmae robustness RUN --sets val='val-*.tar' [sets.yaml ...]
    rcmae robustness RUN --sets val='val-*.tar' --corruptions all \\
        [--severities 1-5] [--baselines FILE]
    torchrun --nproc-per-node 8 -m rcmae robustness RUN --sets ...
        the same figures on several GPUs

RUN is a run of rcmae finetune, a checkpoint or a file with a head. A set is NAME=SHARDS, or comes
from a YAML file of sets, where it may have some of the classes only (ImageNet-A, ImageNet-R), which
alone compete then:

    imagenet-sketch: {shards: "sketch-*.tar"}
    imagenet-a: {shards: "a-*.tar", classes: imagenet_a.txt, labels: listed}

`classes` is a list, or a file, of class numbers or names (names as in --class-names, a name a line,
by default the run's classify.class_names). Labels are the classifier's numbers; `labels: listed`
says that they are places in that list instead, as they are where a folder of the subset was made
into shards.

Corruptions are those of ImageNet-C, made on the fly of the first set (or --corrupt NAME). The mean
corruption error is normalised by --baselines, JSON or YAML: {clean: 43.5, corruptions:
{gaussian_noise: 88.6, ...}}, errors in percent over severities 1 to 5, or five numbers each, or a
report of this command; without, it is the plain mean, and is called so. Exit status: 0 done; 2
these do not go together; 1 the checkpoint is damaged or a file cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcmae.commands.arguments import add_json, told
from rcmae.errors import Refused

if TYPE_CHECKING:
    from rcmae.data.sets import ClassList
    from rcmae.evaluation.robustness import Corruptions
    from rcmae.models.classifier import Classifier


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    options = _parser().parse_args(arguments)
    from rcmae import dist
    from rcmae.checkpoint import CheckpointError

    try:
        dist.start(required=False)
        found = _report(options)
        if dist.rank() == 0 and not told(found, options.json):
            _show(found)
    except (Refused, CheckpointError, OSError) as error:
        if dist.launched_first():
            print(f"rcmae: {error}", file=sys.stderr)
        return 2 if isinstance(error, Refused) else 1
    dist.finish()
    return 0


def _report(options: argparse.Namespace) -> dict[str, Any]:
    from rcmae import dist
    from rcmae.evaluation.labelled_sets import sets_of
    from rcmae.evaluation.robustness import Loading, report
    from rcmae.weights.classifiers import load_classifier

    def tell(text: str) -> None:
        if dist.rank() == 0:
            print(text, file=sys.stderr, flush=True)

    model = load_classifier(options.source, network=options.what)
    names = _class_names(options, model)
    sets = sets_of(options.sets, names.names if names else ())
    corruptions = _corruptions(options, sets[0].name)
    loading = Loading(options.batch, options.workers)
    found = report(model, sets, corruptions, loading, tell, names)
    if "corrupted" in found:
        found["corrupted"]["baselines"] = str(options.baselines) if options.baselines else None
    return {"classifier": str(options.source), **found}


def _class_names(options: argparse.Namespace, model: Classifier) -> ClassList | None:
    """Names of the classes, from --class-names or the file that the run's recipe names.

    Raises:
        Refused: it cannot be read, or is not text.
    """
    from rcmae.data.sets import ClassList, names_in

    path = options.class_names or model.pretrained_cfg.get("class_names")
    if not path or not (options.class_names or Path(path).is_file()):
        return None
    return ClassList(str(path), names_in(path))


def _corruptions(options: argparse.Namespace, first: str) -> Corruptions:
    from rcmae.evaluation import robustness

    names = robustness.corruptions_in(options.corruptions) if options.corruptions else []
    severities = robustness.severities_in(options.severities)
    frost: tuple[Path, ...] = ()
    if options.frost:
        frost = tuple(sorted(path for path in options.frost.iterdir() if path.is_file()))
    baselines = None
    if options.baselines:
        baselines = robustness.baselines_of(options.baselines, names, severities)
    return robustness.Corruptions(options.corrupt or first, names, severities, frost, baselines)


def _show(found: dict[str, Any]) -> None:
    """A report for people."""
    from rich.console import Console
    from rich.table import Table

    from rcmae.evaluation.corruptions import KINDS
    from rcmae.evaluation.robustness import mean

    console = Console()
    table = Table("set", "images", "classes", "top-1", "top-5", "loss", "calibration error")
    for name, row in found["sets"].items():
        table.add_row(
            name,
            f"{row['images']:,}",
            str(row["classes"]),
            f"{row['top1']:.2f}",
            f"{row['top5']:.2f}",
            f"{row['loss']:.3f}",
            f"{row['calibration_error']:.4f}",
        )
    console.print(table)
    if "corrupted" not in found:
        return
    about = found["corrupted"]
    severities = [f"severity {severity}" for severity in about["severities"]]
    table = Table("corruption", *severities, "mean", "group")
    for name, errors in about["corruptions"].items():
        cells = [f"{error:.1f}" for error in errors]
        table.add_row(name, *cells, f"{mean(errors):.1f}", KINDS[name].group)
    console.print(table)
    console.print(f"errors in percent on {about['set']}; frost: {about['frost']}")
    console.print(f"error without corruption: {about['clean']:.2f} %")
    console.print(f"mean error over corruptions, not normalised: {about['mean_error']:.2f} %")
    if about["mce"] is not None:
        console.print(
            f"mean corruption error (mCE), normalised by {about['baselines']}: {about['mce']:.2f} %"
        )
    if about["relative_mce"] is not None:
        console.print(f"relative mCE: {about['relative_mce']:.2f} %")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rcmae robustness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="RUN_OR_FILE")
    parser.add_argument("--sets", nargs="+", required=True, metavar="NAME=SHARDS")
    parser.add_argument(
        "--what", choices=("student", "teacher"), help="default: the average, if the run kept one"
    )
    parser.add_argument(
        "--class-names", type=Path, metavar="FILE", help="class names, one per line"
    )
    parser.add_argument(
        "--corruptions", metavar="NAMES", help="all, groups or names, separated by commas"
    )
    parser.add_argument("--severities", default="1-5")
    parser.add_argument("--corrupt", metavar="NAME", help="set to corrupt (the first)")
    parser.add_argument("--baselines", type=Path, metavar="FILE", help="errors to normalise by")
    parser.add_argument(
        "--frost", type=Path, metavar="FOLDER", help="photographs of frost (drawn, if not given)"
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=0, help="decoding processes of each rank")
    add_json(parser)
    return parser
