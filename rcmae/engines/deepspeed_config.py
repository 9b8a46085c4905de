"""DeepSpeed's JSON: found, read, and held against the recipe, which owns the numbers they share."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rcmae.engines.protocol import EngineSettings
from rcmae.errors import Refused
from rcmae.files import shipped

CONFIGS = shipped("ds_configs")
# what is looked into here; of the rest DeepSpeed has the say (`deepspeeds_problems`)
SECTIONS = (
    "zero_optimization",
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
    "optimizer",
    "optimizer.params",
    "bf16",
    "bfloat16",
    "fp16",
    "torch_autocast",
)


def read_config(name: str) -> dict[str, Any]:
    """DeepSpeed's JSON, from a path or by the name of a shipped one; without what is null in it.

    Raises:
        Refused: there is no such file, or it or a section of it is not a JSON object.
    """
    path = next(
        (p for p in (Path(name), CONFIGS / name, CONFIGS / f"{name}.json") if p.is_file()), None
    )
    if path is None:
        shipped = ", ".join(sorted(p.name for p in CONFIGS.glob("*.json")))
        raise Refused(f"engine.config: no file {name!r}, and the shipped ones are {shipped}")
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"engine.config: {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise Refused(f"engine.config: {path} is not a JSON object")
    config = _without_null(config)
    found = {name: _at(config, name) for name in SECTIONS}
    told = [
        f"{name}={json.dumps(value)}"
        for name, value in found.items()
        if not (value is None or isinstance(value, Mapping))
    ]
    if told:
        raise Refused(
            f"engine.config: {path} says {', '.join(told)}; give an object, as {CONFIGS.name}/ has "
            "it, or leave it out"
        )
    return config


def _without_null(tree: Any) -> Any:
    """A document without the keys that are null: they say nothing."""
    if not isinstance(tree, Mapping):
        return tree
    return {key: _without_null(value) for key, value in tree.items() if value is not None}


def _at(config: Mapping[str, Any], name: str) -> Any:
    """The value of `section.key`; None where it is not there."""
    node: Any = config
    for part in name.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def handed_over(config: Mapping[str, Any], settings: EngineSettings) -> dict[str, Any]:
    """What DeepSpeed gets: its JSON, with the recipe's numbers."""
    owned = {
        "train_micro_batch_size_per_gpu": settings.per_device,
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": settings.clip_grad or 0.0,
        "bf16": {"enabled": settings.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    dropped = ("train_batch_size", "optimizer", "fp16", "bfloat16", "torch_autocast", *owned)
    kept = {key: value for key, value in config.items() if key not in dropped}
    if settings.precision == "fp32" or kept.get("zero_optimization", {}).get("stage", 0) == 0:
        kept.pop("data_types", None)  # stage 0 accumulates in the parameters' type
    return {**kept, **owned}


def deepspeeds_problems(config: Mapping[str, Any], settings: EngineSettings) -> list[str]:
    """What DeepSpeed itself has against a JSON: keys that it does not know, values of another type,
    what it no longer does. Imports it.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(copy.deepcopy(handed_over(config, settings)))
    except ValidationError as error:
        return [
            f"DeepSpeed's JSON, {error.title}: {'.'.join(map(str, problem['loc']))}: "
            f"{problem['msg'].lower()}, got {problem['input']!r}"
            for problem in error.errors()
        ]
    except Exception as error:  # of any kind: its own, ValueError, what comes of a wrong type
        return [f"DeepSpeed does not take its JSON: {error}"]
    return []


def config_problems(
    config: Mapping[str, Any], settings: EngineSettings, *, lr: float, world: int
) -> list[str]:
    """What a DeepSpeed JSON says against the recipe, one line a problem: the recipe owns these
    numbers.
    """
    images = settings.per_device * settings.accumulation * world
    bf16 = settings.precision == "bf16"
    # key -> (whose it is, the value, the recipe's word for it where that is another)
    mine: dict[str, tuple[Any, ...]] = {
        "train_batch_size": ("batch.images", images),
        "train_micro_batch_size_per_gpu": ("batch.per_device", settings.per_device),
        "gradient_accumulation_steps": (
            "the accumulation that follows from batch",
            settings.accumulation,
        ),
        "gradient_clipping": (
            "schedule.clip_grad",
            settings.clip_grad or 0.0,
            settings.clip_grad or "null",
        ),
        "bf16.enabled": ("engine.precision", bf16, settings.precision),
        "bfloat16.enabled": ("engine.precision", bf16, settings.precision),  # as it was once called
        "fp16.enabled": ("engine.precision", False, settings.precision),
        "torch_autocast.enabled": ("engine.precision", False, settings.precision),
        "optimizer.type": ("the optimizer", "AdamW"),
        "optimizer.params.adam_w_mode": ("the optimizer", True, "AdamW"),
        "optimizer.params.lr": ("schedule.lr", lr),
        "optimizer.params.betas": ("schedule.betas", list(settings.betas)),
        "optimizer.params.eps": ("Adam's eps", 1e-8),
        "optimizer.params.weight_decay": ("schedule.weight_decay", settings.weight_decay),
    }
    problems = []
    for key, (owner, value, *word) in mine.items():
        given = _at(config, key)
        if given not in (None, "auto") and given != value:
            problems.append(
                f"DeepSpeed's JSON says {key}={json.dumps(given)}, the recipe says {owner}: "
                f"{word[0] if word else value}; delete it there"
            )
    if "scheduler" in config:
        problems.append(
            "DeepSpeed's JSON has a scheduler, but the recipe's schedule owns the lr: delete it "
            "there"
        )
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        problems.append(f"DeepSpeed's JSON says zero_optimization.stage={stage}; known: 0, 1, 2, 3")
    for key in ("offload_optimizer", "offload_param"):
        place = (zero.get(key) or {}).get("device", "none")
        if place == "nvme" or (key == "offload_param" and place != "none"):
            problems.append(
                f"DeepSpeed's JSON says zero_optimization.{key}.device={place}; only "
                "offload_optimizer to cpu works"
            )
    return problems
