#!/usr/bin/env python3
"""How a fine-tuned classifier does on other labelled sets and on corrupted images.

    python tools/robustness.py RUN --sets val='val-*.tar' [sets.yaml ...]
    python tools/robustness.py RUN --sets val='val-*.tar' --corruptions all \\
        [--severities 1-5] [--baselines FILE]
    torchrun --nproc-per-node 8 tools/robustness.py RUN --sets ...
        the same figures, shared out among GPUs

RUN is a run of rcmae.finetune, a checkpoint or a file with a head. A set is NAME=SHARDS, or comes
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
report of this tool; without, it is the plain mean, and is called so. Exit status: 0 done; 2 these
do not go together; 1 the checkpoint is damaged or a file cannot be read."""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml
from rich.console import Console
from rich.table import Table

from rcmae import dist
from rcmae.checkpoint import CheckpointError
from rcmae.data.batch import Batch
from rcmae.data.cache import node_cache
from rcmae.data.index import ShardIndex
from rcmae.data.stream import labelled_batches
from rcmae.data.transforms import Normalise
from rcmae.errors import Refused
from rcmae.evaluation.corruptions import KINDS, SEVERITIES, Corruption, opened
from rcmae.evaluation.scores import Scores, classify
from rcmae.models.classifier import Classifier
from rcmae.weights.encoder import load_classifier

# --------------------------------------------------------------------------------------------- sets


class LabelledSet(NamedTuple):
    """What is asked of a set."""

    name: str
    shards: list[str]
    classes: list[int] | None = None  # of the classifier, that compete; None: all
    listed: bool = False  # whether labels are places in `classes`


def sets_of(given: Sequence[str], names: Sequence[str]) -> list[LabelledSet]:
    """The sets of the command line, in its order.

    Args:
        given: NAME=SHARDS, or files of sets.
        names: of the classifier's classes.

    Raises:
        ValueError: everything that is wrong with them.
    """
    found, problems = [], []
    for item in given:
        plain = re.match(r"([\w.-]+)=(.+)", item)
        if plain and not Path(item).is_file():
            found.append(LabelledSet(plain[1], [plain[2]]))
        elif Path(item).suffix in (".yaml", ".yml"):
            for name, about in document_of(Path(item)).items():
                try:
                    found.append(set_of(str(name), about, Path(item).parent, names))
                except ValueError as error:
                    problems.append(f"{item}: {name}: {error}")
        else:
            problems.append(f"{item!r} is no set: give NAME=SHARDS, or a .yaml file of sets")
    twice = {each.name for each in found if sum(other.name == each.name for other in found) > 1}
    if twice:
        problems.append(f"two sets are called {', '.join(sorted(twice))}")
    if problems:
        raise Refused("\n".join(problems))
    return found


def set_of(name: str, about: Any, folder: Path, names: Sequence[str]) -> LabelledSet:
    """A set of a file in `folder`. Raises ValueError."""
    if (
        not isinstance(about, dict)
        or "shards" not in about
        or set(about) - {"shards", "classes", "labels"}
    ):
        raise Refused(f"wants shards, and may have classes and labels; got {about!r}")
    labels, classes = about.get("labels", "own"), about.get("classes")
    if labels not in ("own", "listed"):
        raise Refused(f"labels={labels!r}; use own or listed")
    if labels == "listed" and classes is None:
        raise Refused("labels: listed wants the list, as classes")
    shards = about["shards"] if isinstance(about["shards"], list) else [about["shards"]]
    chosen = None if classes is None else classes_of(classes, folder, names)
    return LabelledSet(name, shards, chosen, labels == "listed")


def classes_of(given: Any, folder: Path, names: Sequence[str]) -> list[int]:
    """Numbers of classes from a list of numbers or names, or a file of them, a line each.

    Raises:
        ValueError: one of them is unknown or there twice, or the file is not there.
    """
    if isinstance(given, str):
        path = folder / given
        try:
            given = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        except OSError as error:
            raise Refused(f"classes={given}: {error}") from error
    if not isinstance(given, list):
        raise Refused(f"classes={given!r}; give a list or a file")
    places = {name: number for number, name in enumerate(names)}
    found = [int(item) if str(item).isdigit() else places.get(str(item), -1) for item in given]
    unknown = [str(item) for item, number in zip(given, found, strict=True) if number < 0]
    if unknown:
        known = (
            f"none of the {len(names)} class names"
            if names
            else "no numbers, and there are no class names"
        )
        raise Refused(f"classes {', '.join(unknown[:5])} are {known}; give --class-names")
    if len(set(found)) < len(found):
        raise Refused("classes has one of them twice")
    return found


def document_of(path: Path) -> dict[str, Any]:
    """A JSON or YAML file of settings. Raises ValueError."""
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refused(f"{path} is neither JSON nor YAML: {error}") from error
    if not isinstance(found, dict):
        raise Refused(
            f"{path} should hold names and what they stand for, got {type(found).__name__}"
        )
    return found


# ------------------------------------------------------------------------------------------ judging


def judged(
    model: Classifier,
    index: ShardIndex,
    of: LabelledSet,
    *,
    batch: int,
    workers: int,
    change: Corruption | None = None,
) -> Scores:
    """How good the model is on a set, whole or corrupted. Collective: every rank calls.

    Raises:
        ValueError: labels do not fit the classes.
    """
    height, width = (side * model.patch_embed.patch_size[0] for side in model.grid)
    config = model.pretrained_cfg
    batches = labelled_batches(
        index,
        image_size=(height, width),
        in_channels=model.in_chans,
        batch=batch,
        rank=dist.rank(),
        world=dist.world(),
        workers=workers,
        cache=node_cache([index]),
        change=change,
    )
    return classify(
        model,
        relabelled(batches, of.classes) if of.listed else batches,
        num_classes=model.num_classes,
        device=dist.device(),
        normalise=Normalise(config["mean"], config["std"], dist.device()).images,
        among=of.classes,
    )


def relabelled(batches: Iterator[Batch], classes: Sequence[int] | None) -> Iterator[Batch]:
    """The batches with the classifier's numbers for places in a list.

    A place beyond it stays, to be refused.
    """
    table = torch.tensor(classes)
    for batch in batches:
        assert batch.labels is not None
        inside = (batch.labels >= 0) & (batch.labels < len(table))
        labels = torch.where(inside, table[batch.labels.clamp(0, len(table) - 1)], -1)
        yield replace(batch, labels=labels)


class Baselines(NamedTuple):
    """Errors of another classifier, in percent."""

    # corruption -> of each severity asked for, or one number for their mean
    errors: dict[str, list[float]]
    clean: float | None


def baselines_of(path: Path, corruptions: Sequence[str], severities: Sequence[int]) -> Baselines:
    """What corruption errors are divided by.

    Raises:
        ValueError: one is missing, is no error in percent, or does not fit the severities.
    """
    document = document_of(path)
    document = document.get("corrupted", document)
    given, problems, found = document.get("corruptions", {}), [], {}
    for name in corruptions:
        value: Any = given.get(name) if isinstance(given, dict) else None
        values = value if isinstance(value, list) else [value]
        if any(
            isinstance(each, bool) or not isinstance(each, int | float) or not 0 < each <= 100
            for each in values
        ):
            problems.append(f"{name}: {value!r}; wanted is an error in percent, above 0")
        elif len(values) == len(SEVERITIES):
            found[name] = [float(values[severity - 1]) for severity in severities]
        elif len(values) == 1 and tuple(severities) == SEVERITIES:
            found[name] = [float(values[0])]
        else:
            problems.append(
                f"{name}: {len(values)} numbers; one severity or another needs the five of 1 to 5"
            )
    clean = document.get("clean")
    if problems:
        raise Refused(f"{path}:\n" + "\n".join(f"  {problem}" for problem in problems))
    return Baselines(found, None if clean is None else float(clean))


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def corruption_errors(
    errors: Mapping[str, Sequence[float]], clean: float, baselines: Baselines | None
) -> dict[str, float | None]:
    """The figures over all corruptions (Hendrycks and Dietterich, 2019, section 4), in percent.

    Args:
        errors: of each corruption, at each severity.
        clean: error without any.
        baselines: another classifier's.

    Returns:
        mean_error; and with baselines mce, each corruption's error over theirs, and relative_mce,
        the same of what the corruption adds to the clean error, where theirs is known.
    """
    plain = {name: mean(each) for name, each in errors.items()}
    found: dict[str, float | None] = {
        "mean_error": mean(list(plain.values())),
        "mce": None,
        "relative_mce": None,
    }
    if baselines is not None:
        theirs = {name: mean(each) for name, each in baselines.errors.items()}
        found["mce"] = mean([100 * plain[name] / theirs[name] for name in plain])
        if baselines.clean is not None and all(theirs[name] > baselines.clean for name in plain):
            found["relative_mce"] = mean(
                [100 * (plain[name] - clean) / (theirs[name] - baselines.clean) for name in plain]
            )
    return found


# --------------------------------------------------------------------------------------------- main


def numbers(text: str) -> list[int]:
    """Severities of "1-5", "3" or "1,3,5". Raises ValueError."""
    parts = [re.fullmatch(r"(\d)(?:-(\d))?", part) for part in text.split(",")]
    found = {
        each for part in parts if part for each in range(int(part[1]), int(part[2] or part[1]) + 1)
    }
    if None in parts or not found or not found <= set(SEVERITIES):
        raise Refused(f"--severities {text}: use some of 1 to 5, as 1-5 or 1,3,5")
    return sorted(found)


def kinds(text: str) -> list[str]:
    """Corruptions of "all", or of names and groups (noise, blur, weather, digital).

    Raises ValueError.
    """
    asked = text.split(",")
    unknown = set(asked) - {"all", *KINDS, *(kind.group for kind in KINDS.values())}
    if unknown:
        raise Refused(
            f"--corruptions: unknown {', '.join(sorted(unknown))}; known: all, noise, blur, "
            "weather, digital, "
            f"{', '.join(KINDS)}"
        )
    return [name for name, kind in KINDS.items() if {"all", name, kind.group} & set(asked)]


def names_of(options: argparse.Namespace, model: Classifier) -> list[str]:
    """Names of the classes, from --class-names or the file that the run's recipe names.

    Raises OSError.
    """
    path = options.class_names or model.pretrained_cfg.get("class_names")
    return Path(path).read_text().splitlines() if path else []


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Every figure. Collective: every rank calls.

    Raises:
        ValueError: these do not go together; every problem of the sets at once.
        OSError, CheckpointError: something cannot be read.
    """
    model = load_classifier(options.source, network=options.what)
    corruptions = kinds(options.corruptions) if options.corruptions else []
    severities = numbers(options.severities)
    sets = sets_of(options.sets, names_of(options, model))
    chosen = next((each for each in sets if each.name == (options.corrupt or sets[0].name)), None)
    if chosen is None:
        raise Refused(f"--corrupt {options.corrupt}: no set is called so")
    frost = (
        tuple(sorted(path for path in options.frost.iterdir() if path.is_file()))
        if options.frost
        else ()
    )
    for path in frost:
        opened(path)  # now, and not in a worker half-way
    baselines = (
        baselines_of(options.baselines, corruptions, severities) if options.baselines else None
    )
    indexes = {each.name: ShardIndex.open(each.shards) for each in sets}
    model.to(dist.device())
    judge = functools.partial(judged, model, batch=options.batch, workers=options.workers)
    begin, rows = time.monotonic(), {}
    for each in sets:
        scores = judge(indexes[each.name], each)
        rows[each.name] = {
            **scores.figures(),
            "classes": len(each.classes) if each.classes else model.num_classes,
        }
    found: dict[str, Any] = {"classifier": str(options.source), "sets": rows}
    if corruptions:
        errors: dict[str, list[float]] = {}
        for name in corruptions:
            for severity in severities:
                change = Corruption(name, severity, frost)
                errors.setdefault(name, []).append(
                    100 - judge(indexes[chosen.name], chosen, change=change).top1
                )
            tell(f"{name}: error {mean(errors[name]):.2f} % ({time.monotonic() - begin:.0f} s)")
        clean = 100 - rows[chosen.name]["top1"]
        found["corrupted"] = {
            "set": chosen.name,
            "severities": severities,
            "clean": clean,
            "corruptions": errors,
            "frost": f"{len(frost)} photographs" if frost else "drawn",
            "baselines": str(options.baselines) if baselines else None,
            **corruption_errors(errors, clean, baselines),
        }
    return found


def tell(text: str) -> None:
    """Progress, on standard error, once for all ranks."""
    if dist.rank() == 0:
        print(text, file=sys.stderr, flush=True)


def show(found: Mapping[str, Any], console: Console) -> None:
    """A report for people."""
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
    table = Table(
        "corruption", *(f"severity {severity}" for severity in about["severities"]), "mean", "group"
    )
    for name, errors in about["corruptions"].items():
        table.add_row(
            name, *(f"{error:.1f}" for error in errors), f"{mean(errors):.1f}", KINDS[name].group
        )
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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="RUN_OR_FILE")
    parser.add_argument("--sets", nargs="+", required=True, metavar="NAME=SHARDS")
    parser.add_argument(
        "--what", choices=("student", "teacher"), help="default: the average where the run kept one"
    )
    parser.add_argument("--class-names", type=Path, metavar="FILE", help="a name a line")
    parser.add_argument(
        "--corruptions", metavar="NAMES", help="all, groups or names, separated by commas"
    )
    parser.add_argument("--severities", default="1-5")
    parser.add_argument(
        "--corrupt", metavar="NAME", help="the set that is corrupted; default: the first"
    )
    parser.add_argument("--baselines", type=Path, metavar="FILE", help="errors to normalise by")
    parser.add_argument(
        "--frost", type=Path, metavar="FOLDER", help="photographs of frost; default: it is drawn"
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=0, help="decoding processes of each rank")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    options = parser.parse_args(arguments)
    try:
        dist.start(required=False)
        found = report(options)
        if dist.rank() == 0:
            if options.json:
                options.json.write_text(json.dumps(found, indent=1) + "\n")
            show(found, Console())
    except (ValueError, CheckpointError, OSError) as error:
        if dist.launched_first():
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    dist.finish()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
