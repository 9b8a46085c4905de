"""COCO's average precision: its twelve numbers, and those of each category.

Counted by faster-coco-eval, which equals pycocotools on recorded numbers and is several times as
fast. As there, of a detection with a box and a mask the box's area says whether it is small, medium
or large, also where masks are judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray

_PRECISIONS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_RECALLS = ("AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
NUMBERS = (*_PRECISIONS, *_RECALLS)
Kind = Literal["bbox", "segm"]
NOTHING = -1.0  # of what there is nothing to average


@dataclass(frozen=True)
class Judged:
    """How good detections of one kind are; numbers from 0 to 1, or NOTHING."""

    numbers: dict[str, float]  # NUMBERS -> value
    by_category: dict[int, float]  # COCO's id -> AP
    precision: NDArray[np.float64]  # [10 thresholds, 101 recalls, categories, 4 areas, 3 maxima]
    recall: NDArray[np.float64]  # [10 thresholds, categories, 4 areas, 3 maxima]


def judge(truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], kind: Kind) -> Judged:
    """How good detections are.

    Args:
        truth: COCO's format: images, categories, annotations.
        detections: COCO's result format: image_id, category_id, bbox, segmentation, score.
        kind: whether boxes are judged, or masks.
    """
    # the evaluation writes into what it is given
    mine = [dict(each) for each in detections]
    known = COCO(dict(truth))
    evaluation = COCOeval_faster(known, known.loadRes(mine), kind, print_function=_silent)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    precision = np.asarray(evaluation.eval["precision"])
    by_category = {}
    for place, category in enumerate(evaluation.params.catIds):
        seen = precision[:, :, place, 0, -1]
        seen = seen[seen > NOTHING]
        by_category[int(category)] = float(seen.mean()) if seen.size else NOTHING
    numbers = {
        name: float(value)
        for name, value in zip(NUMBERS, evaluation.stats[: len(NUMBERS)], strict=True)
    }
    return Judged(numbers, by_category, precision, np.asarray(evaluation.eval["recall"]))


def _silent(*_: object, **__: object) -> None:
    """It tells its progress otherwise."""
