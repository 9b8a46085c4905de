"""What a detector finds in pictures without annotations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcmae.data.dense.objects import encoded
from rcmae.evaluation.detection.collect import Drawn
from rcmae.evaluation.detection.pictures import detections_picture
from rcmae.evaluation.visualisation.segments import decoded
from rcmae.evaluation.visualisation.sources import Images
from rcmae.models.detection.inference import Detections
from rcmae.weights.detection import load_detector


def detections(source: Path, images: Images) -> dict[str, NDArray[np.uint8]]:
    """Each picture with the boxes, masks, classes and scores that were found in it.

    Args:
        source: a run of `rcmae detect`, a checkpoint of one, or a published detector.
        images: which pictures, of any sizes.

    Raises:
        Refused: there is no detector or no picture, or one does not decode.
    """
    model = load_detector(source)
    names = dict(enumerate(model.class_names))
    drawn = []
    for number, pixels in enumerate(decoded(images, model.in_channels)):
        [found] = model([pixels])
        drawn.append(Drawn(number, pixels, None, {"detector": _rows(found)}))
    return {"detections": detections_picture(drawn, names)}


def _rows(found: Detections) -> list[dict[str, Any]]:
    """Detections of an image in COCO's format of results, with classes from 0."""
    rows = []
    for box, score, number, mask in zip(*found, strict=True):
        left, top, right, bottom = box.tolist()
        rows.append(
            {
                "bbox": [left, top, right - left, bottom - top],
                "score": float(score),
                "category_id": int(number),
                "segmentation": encoded(mask.numpy()),
            }
        )
    return rows
