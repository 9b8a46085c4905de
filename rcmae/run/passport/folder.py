"""The folder: weights and config.json for timm and transformers, card, curves, recipe, page.

timm and transformers read the same config.json: it is timm's, and `AutoModel` wraps timm's model. A
segmenter's is Hugging Face's UPerNet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rcmae.checkpoint import Manifest
from rcmae.config import CLASSIFYING, stored
from rcmae.data.sources import without_secrets
from rcmae.errors import Refused
from rcmae.evaluation.comparison import curves
from rcmae.evaluation.comparison.runs import Group, Run
from rcmae.files import write_aside
from rcmae.run.passport.card import About, card, document
from rcmae.run.report import page
from rcmae.run.report.reading import Seen, seen
from rcmae.weights.classifiers import FORMATS, load_classifier, timm_head
from rcmae.weights.conversion import convert
from rcmae.weights.formats import WeightsFormat, Wrote, export_whole
from rcmae.weights.layouts import Which
from rcmae.weights.reading import read_network
from rcmae.weights.segmenters import SEGMENTER_FORMATS
from rcmae.weights.writing import Exported, TimmModel, export, timm_model

NAME = "folder"  # of the format
WEIGHTS = "model.safetensors"


def write_folder(
    manifest: Manifest, out: Path, *, network: Which | None = None, overwrite: bool = False
) -> Exported:
    """Write the passport of a checkpoint's network. What is at `out` is replaced whole or not at
    all.

    Args:
        manifest: of a verified checkpoint.
        out: the folder.
        network: whose weights; None: the teacher's where there is one.
        overwrite: replace a folder of a model that is there.

    Raises:
        Refused: these do not go together, or no library has a network like this one.
        OSError: it could not be written.
    """
    formats = {NAME: WeightsFormat("weights, config.json, card and curves", (), _write)}
    done = export_whole(manifest, out, formats, name=NAME, network=network, overwrite=overwrite)
    if _task(manifest) == "segment":
        return done
    return done._replace(use=f"timm.create_model({f'local-dir:{out}'!r}, pretrained=True)")


def _write(manifest: Manifest, network: Which | None, path: Path) -> Wrote:
    task = _task(manifest)
    model = None
    if task == "detect":
        raise Refused(
            f"{manifest.path}: timm and transformers have no detector like this one; use --format "
            "detectron2, or rcmae.load_detector"
        )
    if task == "segment":
        wrote = SEGMENTER_FORMATS["hf-upernet"].write(manifest, network, path)
    else:
        path.mkdir()
        if task in CLASSIFYING:
            wrote, model = _classifier(manifest, network, path)
        else:
            wrote, model = _encoder(manifest, network, path)
    recipe = without_secrets(manifest.meta["recipe"])
    run = _run_of(manifest)
    has_curves = run is not None and _draw(manifest, run, path / "curves.png")
    about = About(
        manifest=manifest,
        recipe=recipe,
        network=wrote.network,
        run=run,
        model=model,
        bytes=(path / WEIGHTS).stat().st_size,
        has_curves=has_curves,
        has_processor=(path / "preprocessor_config.json").is_file(),
    )
    write_aside(path / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
    write_aside(path / "training.json", json.dumps(document(about), indent=1) + "\n")
    write_aside(path / "README.md", card(about))
    if run is not None:
        page.write([run.folder], path / page.FILE)
    return wrote


def _task(manifest: Manifest) -> str:
    return str(manifest.meta["recipe"].get("task", {}).get("name", "pretrain"))


def _run_of(manifest: Manifest) -> Seen | None:
    """The run that a checkpoint lies in; None: it lies elsewhere."""
    try:
        (run,) = seen([manifest.path.resolve().parent.parent])
    except Refused:
        return None
    return run


def _draw(manifest: Manifest, run: Seen, path: Path) -> bool:
    """Draw the curves, if anything was logged; whether they are there."""
    if "loss" not in run.curves:
        return False
    recipe = stored(manifest.meta["recipe"], imports=False)
    drawn = Run(run.folder, recipe, run.step)
    curves.draw([Group(run.name, (drawn,), labelled=False)], path)
    return True


# ----------------------------------------------------------------------------------------- weights


def _encoder(manifest: Manifest, network: Which | None, path: Path) -> tuple[Wrote, TimmModel]:
    """The encoder alone; further class tokens are timm's registers."""
    sizes = manifest.meta["recipe"]["model"]
    more = sizes.get("class_tokens", 1) - 1 + sizes.get("registers", 0)
    if more > 0:
        source = read_network(manifest.path, network)
        done = convert(source, "timm", path / WEIGHTS)
        wrote = Wrote(source.metadata["network"], len(done.taken), "")
        head = {"num_classes": 0, "global_pool": "avg", "fc_norm": False, "reg_tokens": more}
        model = timm_model(manifest, head)
    else:
        exported = export(manifest, path / WEIGHTS, layout="timm", network=network)
        wrote = Wrote(exported.networks[0], exported.tensors, "")
        model = timm_model(manifest)
    _write_config(model, (), path)
    return wrote, model


def _classifier(manifest: Manifest, network: Which | None, path: Path) -> tuple[Wrote, TimmModel]:
    """Encoder and head."""
    wrote = FORMATS["timm"].write(manifest, network, path / WEIGHTS)
    classifier = load_classifier(manifest.path, network=network)
    model = timm_model(manifest, timm_head(classifier, manifest))
    _write_config(model, classifier.class_names, path)
    return wrote, model


def _write_config(model: TimmModel, class_names: tuple[str, ...], path: Path) -> None:
    """config.json, as timm writes it for a hub."""
    cfg: dict[str, Any] = {
        **model.cfg,
        "num_classes": model.num_classes,
        "fixed_input_size": True,
        "crop_mode": "center",
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    config: Mapping[str, Any] = {
        "architecture": model.architecture,
        "num_classes": model.num_classes,
        "global_pool": model.arguments["global_pool"],
        "model_args": model.arguments,
        "pretrained_cfg": cfg,
        **({"label_names": list(class_names)} if class_names else {}),
    }
    write_aside(path / "config.json", json.dumps(config, indent=1) + "\n")
