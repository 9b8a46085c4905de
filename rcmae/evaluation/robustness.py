"""How a classifier does on other labelled sets and on corrupted images, with the mean corruption
error (Hendrycks and Dietterich, 2019, section 4)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rcmae import dist
from rcmae.data.cache import node_cache
from rcmae.data.index import ShardIndex
from rcmae.data.sets import ClassList
from rcmae.data.stream import Readers, labelled_batches
from rcmae.data.transforms import CentreTransform, Normalise
from rcmae.errors import Refused
from rcmae.evaluation.corruptions import KINDS, SEVERITIES, Corruption, opened
from rcmae.evaluation.labelled_sets import (
    LabelledSet,
    document_of,
    refuse_other_classes,
    relabelled,
)
from rcmae.evaluation.scores import Scores, classify
from rcmae.models.classifier import Classifier
from rcmae.weights.encoder import pixels_of


@dataclass(frozen=True)
class Loading:
    """How images are read."""

    batch: int = 128  # images of a forward
    workers: int = 0  # decoding processes of each rank


class Baselines(NamedTuple):
    """Errors of another classifier, in percent."""

    # corruption -> of each severity asked for, or one number for their mean
    errors: dict[str, list[float]]
    clean: float | None


@dataclass(frozen=True)
class Corruptions:
    """Which corruptions a set gets."""

    set: str  # its name
    names: Sequence[str]  # empty: none
    severities: Sequence[int]
    frost: tuple[Path, ...] = ()  # photographs; none: it is drawn
    baselines: Baselines | None = None


# ------------------------------------------------------------------------------------------ judging


def judged(
    model: Classifier,
    index: ShardIndex,
    of: LabelledSet,
    loading: Loading,
    change: Corruption | None = None,
) -> Scores:
    """How good the model is on a set, whole or corrupted, computed where its weights are.
    Collective: every rank calls.

    Raises:
        Refused: labels do not fit the classes.
    """
    device = next(model.parameters()).device
    batches = labelled_batches(
        index,
        CentreTransform(pixels_of(model), model.in_chans),
        batch=loading.batch,
        rank=dist.rank(),
        world=dist.world(),
        readers=Readers(loading.workers, cache=node_cache([index])),
        change=change,
    )
    if of.listed:
        assert of.classes is not None
        batches = relabelled(batches, of.classes)
    config = model.pretrained_cfg
    normalise = Normalise(config["mean"], config["std"], device)
    return classify(
        model,
        batches,
        num_classes=model.num_classes,
        device=device,
        normalise=normalise.images,
        among=of.classes,
    )


def report(
    model: Classifier,
    sets: Sequence[LabelledSet],
    corruptions: Corruptions,
    loading: Loading,
    tell: Callable[[str], None] = lambda text: None,
    names: ClassList | None = None,
) -> dict[str, Any]:
    """Every figure. Collective: every rank calls.

    Args:
        model: in evaluation mode.
        sets: that it is judged on.
        corruptions: of one of them.
        loading: of the images.
        tell: called with a line for each finished corruption.
        names: of the model's classes; None: not known.

    Returns:
        sets: a row each; and with corruptions corrupted: each one's error at each severity, and
        the figures over all.

    Raises:
        Refused: sets, corruptions and classes do not go together.
        OSError: something cannot be read.
    """
    chosen = next((each for each in sets if each.name == corruptions.set), None)
    if chosen is None:
        raise Refused(f"--corrupt {corruptions.set}: no set has that name")
    for path in corruptions.frost:
        opened(path)  # now, and not in a worker half-way
    indexes = {each.name: ShardIndex.open(each.shards) for each in sets}
    refuse_other_classes(sets, indexes, names)
    for index in indexes.values():
        index.tell_unused()
    model.to(dist.device())
    begin = time.monotonic()
    rows = {}
    for each in sets:
        scores = judged(model, indexes[each.name], each, loading)
        classes = len(each.classes) if each.classes else model.num_classes
        rows[each.name] = {**scores.figures(), "classes": classes}
    found: dict[str, Any] = {"sets": rows}
    if not corruptions.names:
        return found

    errors: dict[str, list[float]] = {}
    for name in corruptions.names:
        errors[name] = []
        for severity in corruptions.severities:
            change = Corruption(name, severity, corruptions.frost)
            scores = judged(model, indexes[chosen.name], chosen, loading, change)
            errors[name].append(100 - scores.top1)
        seconds = time.monotonic() - begin
        tell(f"{name}: error {mean(errors[name]):.2f} % ({seconds:.0f} s)")
    clean = 100 - rows[chosen.name]["top1"]
    found["corrupted"] = {
        "set": chosen.name,
        "severities": list(corruptions.severities),
        "clean": clean,
        "corruptions": errors,
        "frost": f"{len(corruptions.frost)} photographs" if corruptions.frost else "drawn",
        **corruption_errors(errors, clean, corruptions.baselines),
    }
    return found


def severities_in(text: str) -> list[int]:
    """Severities of "1-5", "3" or "1,3,5". Raises Refused."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"([1-5])(?:-([1-5]))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise Refused(f"--severities {text}: use some of 1 to 5, as 1-5 or 1,3,5")
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(found)


def corruptions_in(text: str) -> list[str]:
    """Corruptions of "all", or of names and groups (noise, blur, weather, digital).

    Raises Refused.
    """
    wanted = set(text.split(","))
    groups = list(dict.fromkeys(kind.group for kind in KINDS.values()))
    unknown = wanted - {"all", *KINDS, *groups}
    if unknown:
        raise Refused(
            f"--corruptions: unknown {', '.join(sorted(unknown))}; known: all, "
            f"{', '.join(groups)}, {', '.join(KINDS)}"
        )
    return [name for name, kind in KINDS.items() if wanted & {"all", name, kind.group}]


# ---------------------------------------------------------------------------- mean corruption error


def baselines_of(path: Path, corruptions: Sequence[str], severities: Sequence[int]) -> Baselines:
    """What corruption errors are divided by, from a JSON or YAML file.

    Raises:
        Refused: one is missing, is no error in percent, or does not fit the severities.
        OSError: the file cannot be read.
    """
    document = document_of(path)
    document = document.get("corrupted", document)
    given = document.get("corruptions", {})
    problems = []
    found: dict[str, list[float]] = {}
    for name in corruptions:
        value: Any = given.get(name) if isinstance(given, dict) else None
        values = value if isinstance(value, list) else [value]
        if not all(map(_is_error, values)):
            problems.append(f"{name}: {value!r}; expected an error in percent, above 0")
        elif len(values) == len(SEVERITIES):
            found[name] = [float(values[severity - 1]) for severity in severities]
        elif len(values) == 1 and tuple(severities) == SEVERITIES:
            found[name] = [float(values[0])]
        else:
            problems.append(
                f"{name}: {len(values)} numbers; one severity or another needs the five of 1 to 5"
            )
    clean = document.get("clean")
    if clean is not None and clean != 0 and not _is_error(clean):
        problems.append(f"clean: {clean!r}; expected an error in percent")
    if problems:
        raise Refused(f"{path}:\n" + "\n".join(f"  {problem}" for problem in problems))
    return Baselines(found, None if clean is None else float(clean))


def _is_error(value: object) -> bool:
    """Whether it is an error in percent that can be divided by."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value <= 100


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def corruption_errors(
    errors: Mapping[str, Sequence[float]], clean: float, baselines: Baselines | None
) -> dict[str, float | None]:
    """The figures over all corruptions, in percent.

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
    if baselines is None:
        return found
    theirs = {name: mean(each) for name, each in baselines.errors.items()}
    found["mce"] = mean([100 * plain[name] / theirs[name] for name in plain])
    their_clean = baselines.clean
    if their_clean is not None and all(theirs[name] > their_clean for name in plain):
        added = [100 * (plain[name] - clean) / (theirs[name] - their_clean) for name in plain]
        found["relative_mce"] = mean(added)
    return found
