"""DeepSpeed's JSON: found, read, and held against the recipe, which owns the numbers they share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rcmae.engines.protocol import EngineSettings
from rcmae.errors import Refused
from rcmae.files import shipped

CONFIGS = shipped("ds_configs")


def read_config(name: str) -> dict[str, Any]:
    """DeepSpeed's JSON, from a path or by the name of a shipped one.

    Raises:
        Refused: there is no such file, or it is not a JSON object.
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
    return config


def config_problems(
    config: Mapping[str, Any], settings: EngineSettings, *, lr: float, world: int
) -> list[str]:
    """What a DeepSpeed JSON says against the recipe, one line a problem: the recipe owns these
    numbers.
    """
    images = settings.per_device * settings.accumulation * world
    mine: dict[str, tuple[str, Any]] = {
        "train_batch_size": ("batch.images", images),
        "train_micro_batch_size_per_gpu": ("batch.per_device", settings.per_device),
        "gradient_accumulation_steps": (
            "the accumulation that follows from batch",
            settings.accumulation,
        ),
        "gradient_clipping": ("schedule.clip_grad", settings.clip_grad or 0.0),
        "bf16.enabled": ("engine.precision=bf16", settings.precision == "bf16"),
        "fp16.enabled": ("engine.precision", False),
        "torch_autocast.enabled": ("engine.precision", False),
        "optimizer.type": ("the optimizer", "AdamW"),
        "optimizer.params.lr": ("schedule.lr", lr),
        "optimizer.params.betas": ("schedule.betas", list(settings.betas)),
        "optimizer.params.eps": ("Adam's eps", 1e-8),
        "optimizer.params.weight_decay": ("schedule.weight_decay", settings.weight_decay),
    }
    problems = []
    for key, (owner, value) in mine.items():
        node: Any = config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        if node not in (None, "auto") and node != value:
            problems.append(
                f"DeepSpeed's JSON says {key}={node}, the recipe says {owner}: {value}; delete "
                "it there"
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
