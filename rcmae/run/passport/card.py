"""The card of a model, and the same for programs: what it is, what made it, what was not tested."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from rcmae import __version__
from rcmae.checkpoint import Manifest
from rcmae.run.report.axes import duration, told
from rcmae.run.report.judged import last_evaluation
from rcmae.run.report.page import METRICS
from rcmae.run.report.reading import Seen, device_hours
from rcmae.run.report.recipes import Change, changes
from rcmae.weights.writing import TimmModel

# what one may want to know -> the first words of an evaluation's groups that tell it, and the tasks
# that it tells it of; none: of all
UNTESTED = {
    "k-NN or linear classification of frozen features": (
        ("knn", ()),
        ("logistic", ()),
        ("scores", ("probe",)),
    ),
    "classification after fine-tuning": (("scores", ("finetune",)),),
    "semantic segmentation": (("segmentation", ()),),
    "detection of objects": (("box", ()), ("detection", ())),
}
_NEVER = (
    "images of other kinds than the training's, of other sizes or other aspect ratios",
    "robustness: corruptions, shifts of the domain, adversarial images",
    "fairness: whether it works alike for images of all people and places",
    "bias, private or harmful content of the training images, which it may have learnt",
    "inference in half precision or quantised",
)


@dataclass(frozen=True)
class About:
    """What a card is made of."""

    manifest: Manifest
    recipe: Mapping[str, Any]  # without secrets
    network: str  # student, teacher
    run: Seen | None  # None: the checkpoint lies outside of its run
    model: TimmModel | None  # None: it is none of timm's
    bytes: int  # of the weights
    has_curves: bool
    has_processor: bool = False  # of a segmenter: preprocessor_config.json


class Fact(NamedTuple):
    """A line of a table."""

    name: str
    value: str


def card(about: About) -> str:
    """README.md."""
    base, differing = changes(about.recipe)
    model = about.model
    return _template().render(
        name=_name(about),
        task=_section(about.recipe, "task").get("name", "pretrain"),
        model=model,
        facts=list(_facts(about)),
        training=list(_training(about)),
        evaluation=last_evaluation(about.run) if about.run is not None else [],
        step=about.manifest.step,
        best=_best(about),
        base=base,
        changes=differing,
        untested=untested(about),
        has_curves=about.has_curves,
        has_processor=about.has_processor,
        mean=_section(about.recipe, "data").get("mean"),
        std=_section(about.recipe, "data").get("std"),
        has_page=about.run is not None,
        version=__version__,
    )


def document(about: About) -> dict[str, Any]:
    """training.json: the card for programs."""
    run = about.run
    changed: Sequence[Change] = changes(about.recipe)[1]
    found: dict[str, Any] = {
        "name": _name(about),
        "network": about.network,
        "step": about.manifest.step,
        "images": about.manifest.images,
        "data_fingerprint": about.manifest.meta.get("data_fingerprint"),
        "versions": about.manifest.meta.get("versions", {}),
        "sizes": about.manifest.meta.get("sizes", {}),
        "changed": {change.key: list(change.values) for change in changed},
        "not_tested": untested(about),
        "written_by": f"rcmae {__version__}",
    }
    if run is not None:
        found |= {
            "device_hours": device_hours(run.status),
            "devices": devices(run),
            "goodput": run.status["goodput"],
            "best": run.best,
            "evaluations": {
                step: [each._asdict() for each in figures] for step, figures in run.judged.items()
            },
        }
    return found


def devices(run: Seen) -> list[str]:
    """What the run was trained on, as its starts tell."""
    starts = run.of("start", "resume")
    return list(dict.fromkeys(str(event["device"]) for event in starts if event.get("device")))


def untested(about: About) -> list[str]:
    """What nobody tested of this model, as far as its run's folder tells."""
    judged = about.run.judged.values() if about.run is not None else ()
    made = {figure.group.split("_")[0] for figures in judged for figure in figures}
    task = str(_section(about.recipe, "task").get("name", "pretrain"))
    found = []
    if about.has_processor:
        found.append("whole images, resized to the window as preprocessor_config.json does")
    for what, tests in UNTESTED.items():
        if not any(group in made and task in (tasks or (task,)) for group, tasks in tests):
            found.append(what)
    return [*found, *_NEVER]


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    return environment.get_template("card.md")


def _cell(text: object) -> Markup:
    """A text that breaks no table of Markdown and is no HTML."""
    return Markup(html.escape(" ".join(str(text).split()), quote=False).replace("|", "\\|"))


def _name(about: About) -> str:
    return str(_section(about.recipe, "run").get("name") or "model")


def _facts(about: About) -> Iterator[Fact]:
    model, objective = (_section(about.recipe, name) for name in ("model", "objective"))
    yield Fact("Network", f"{model.get('name')}, the {about.network}'s weights")
    size = model.get("image_size")
    sides = "x".join(map(str, size)) if isinstance(size, list | tuple) else f"{size}x{size}"
    yield Fact("Input", f"{model.get('in_channels', 3)} x {sides} pixels")
    yield Fact("Objective", str(objective.get("name")))
    yield Fact("Weights", f"{about.bytes / 4e6:,.1f} million, float32")
    total = _sizes(about).get("total_steps")
    of = f" of {total:,}" if isinstance(total, int) else ""
    yield Fact("Step", f"{about.manifest.step:,}{of}")
    yield Fact("Images seen", f"{about.manifest.images:,}")


def _training(about: About) -> Iterator[Fact]:
    data, engine = (_section(about.recipe, name) for name in ("data", "engine"))
    sizes, run = _sizes(about), about.run
    yield Fact("Data", str(data.get("shards")))
    yield Fact("Fingerprint of the data", str(about.manifest.meta.get("data_fingerprint")))
    if "samples_per_epoch" in sizes:
        yield Fact("Samples of an epoch", f"{sizes['samples_per_epoch']:,}")
    yield Fact("Images of a step", f"{sizes.get('images_per_step', '?')}")
    yield Fact("Learning rate", told(float(sizes.get("lr") or 0.0)))
    yield Fact("Precision", str(engine.get("precision")))
    if run is not None:
        ranks = " and ".join(sorted({str(job["ranks"]) for job in run.status["jobs"]}))
        yield Fact("Engine and ranks", f"{engine.get('name')}, {ranks}")
        if devices(run):
            yield Fact("Devices", "; ".join(devices(run)))
        yield Fact("Device hours", f"{device_hours(run.status):,.2f}, of all jobs and ranks")
        since = duration(run.status["wall_s"])
        yield Fact("Goodput", f"{run.status['goodput']:.1%} of {since} since the first start")
    versions = about.manifest.meta.get("versions", {})
    yield Fact("Versions", ", ".join(f"{name} {version}" for name, version in versions.items()))


def _best(about: About) -> list[Fact]:
    found = []
    for network, row in (about.run.best if about.run is not None else {}).items():
        for metric, value in row.items():
            if metric != "step":
                at = f"at step {told(float(row.get('step', 0)))}"
                name = f"{network}, {METRICS.get(metric, metric)}"
                unit = " %" if metric in METRICS else ""
                found.append(Fact(name, f"{told(float(value))}{unit} {at}"))
    return found


def _sizes(about: About) -> Mapping[str, Any]:
    return about.manifest.meta.get("sizes", {})


def _section(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = recipe.get(name)
    return section if isinstance(section, Mapping) else {}
