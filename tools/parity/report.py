"""Which check a folder gets, and how it went."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .architectures import arch_names, pos_embed
from .bootmae import bootmae_forward, bootmae_schedules
from .detection import benchmark_backbone, detect_arch_names, vitdet_backbone
from .detection_data import coco_ap, detect_inputs
from .detectors import maskrcnn_losses
from .downstream import lars_steps, linprobe_lars, mixup_cutmix, vit_finetune
from .evaluation import knn_votes, rollout
from .fixture import Fixture, Row, Unusable
from .mae import mae_forward
from .maepriv import maepriv_pretrain
from .maps import miou, seg_augment
from .pixio import pixio_arch_names, pixio_encoder, pixio_forward, pixio_masks
from .rcmae import rcmae_forward, rcmae_train, rcmae_train_accum
from .schedules import lr_schedule, momentum_schedule
from .segmentation import seg_backbone, seg_schedule, slide_inference, upernet
from .supmae import supmae_forward

# A fixture's name -> what checks a folder of it. A new objective adds its line here.
CHECKS: dict[str, Callable[[Fixture], None]] = {
    "mae-forward": mae_forward,
    "rcmae-forward": rcmae_forward,
    "rcmae-train": rcmae_train,
    "rcmae-train-accum": rcmae_train_accum,
    "lr-schedule": lr_schedule,
    "momentum-schedule": momentum_schedule,
    "pos-embed": pos_embed,
    "arch-names": arch_names,
    "supmae-forward": supmae_forward,
    "bootmae-forward": bootmae_forward,
    "bootmae-schedules": bootmae_schedules,
    "maepriv-pretrain": maepriv_pretrain,
    "vit-finetune": vit_finetune,
    "linprobe-lars": linprobe_lars,
    "lars-steps": lars_steps,
    "knn": knn_votes,
    "rollout": rollout,
    "mixup-cutmix": mixup_cutmix,
    "vitdet-backbone": vitdet_backbone,
    "benchmark-backbone": benchmark_backbone,
    "maskrcnn-losses": maskrcnn_losses,
    "detect-arch-names": detect_arch_names,
    "detect-inputs": detect_inputs,
    "coco-ap": coco_ap,
    "seg-backbone": seg_backbone,
    "upernet": upernet,
    "slide-inference": slide_inference,
    "miou": miou,
    "seg-schedule": seg_schedule,
    "seg-augment": seg_augment,
    "pixio-forward": pixio_forward,
    "pixio-masks": pixio_masks,
    "pixio-encoder": pixio_encoder,
    "pixio-arch-names": pixio_arch_names,
}


@dataclass
class Verdict:
    """How one folder went."""

    folder: str
    fixture: str = ""
    status: str = "unusable"  # passed | failed | no check | unusable
    problems: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Plain values for JSON, null for what is not finite."""
        rows = []
        for row in self.rows:
            finite = {
                key: None if value in (math.inf, -math.inf) else value
                for key, value in vars(row).items()
            }
            rows.append(finite | {"passed": not row.failures})
        return vars(self) | {"rows": rows}


def check(path: Path) -> Verdict:
    """Check one folder."""
    verdict = Verdict(str(path))
    try:
        fixture = Fixture(path)
        verdict.fixture = fixture.name
        if fixture.name not in CHECKS:
            verdict.status = "no check"
            verdict.problems.append(
                f"there is no check for {fixture.name!r}; known: {', '.join(CHECKS)}"
            )
            return verdict
        CHECKS[fixture.name](fixture)
    except Unusable as error:
        verdict.problems.append(str(error))
        return verdict
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        verdict.problems.append(
            f"cannot be computed from what it holds: {type(error).__name__}: {error}"
        )
        return verdict
    verdict.rows = list(fixture.rows.values())
    verdict.left_out = fixture.left_out
    verdict.problems += [f"{name}: no check has looked at it" for name in fixture.unread()]
    failed = verdict.problems or any(row.failures for row in verdict.rows)
    verdict.status = "failed" if failed else "passed"
    return verdict


def lines(verdict: Verdict) -> Iterator[str]:
    """A folder's part of the table."""
    yield f"{verdict.fixture or '?'}: {verdict.status}   {verdict.folder}"
    for row in sorted(verdict.rows, key=lambda row: row.precision, reverse=True):
        measured = (
            f"off by at most {row.worst:8.1e}, {row.of_limit:8.1e} of the limit"
            if row.worst
            else "equal"
        )
        verdict_word = "FAILED" if row.failures else "ok"
        yield (
            f"  {verdict_word:<7}{row.precision or 'exact':<9}{row.what:<44}{row.compared:>5} "
            f"compared, {measured}"
        )
        yield from (f"         {failure}" for failure in row.failures[:10])
        if len(row.failures) > 10:
            yield f"         and {len(row.failures) - 10} more"
    yield from (f"  FAILED {problem}" for problem in verdict.problems)
    yield from (f"  left out: {name} ({reason})" for name, reason in verdict.left_out.items())
