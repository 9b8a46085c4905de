"""Pretrain Vision Transformers by masked autoencoding with a teacher.

Read `rcmae/train.py` first.

    rcmae.start(recipe, {"schedule.steps": 100})   train, in a separate process
    rcmae.load_encoder(run_or_file)                a pretrained encoder, as a torch module
    rcmae.load_classifier(run_or_file)             a fine-tuned classifier or a probe: scores, names
    rcmae.load_detector(run)                       boxes, classes, scores and masks of images
    rcmae.load_segmenter(run)                      a class for each pixel, of images of any size
    rcmae.check_objective("mine:Mine", lam=0.5)    tries a loss of yours on random images
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rcmae.process import early

early.hear()
if TYPE_CHECKING:
    from rcmae.evaluation.dense.loading import load_segmenter
    from rcmae.starting import start
    from rcmae.tasks.checking import check_objective
    from rcmae.weights.classifiers import load_classifier
    from rcmae.weights.detection import load_detector
    from rcmae.weights.encoder import load_encoder

__version__ = "0.2.0"
__all__ = [
    "__version__",
    "check_objective",
    "load_classifier",
    "load_detector",
    "load_encoder",
    "load_segmenter",
    "start",
]
# name -> module; imported when asked for: torch and timm cost seconds
_LAZY = {
    "check_objective": "rcmae.tasks.checking",
    "load_classifier": "rcmae.weights.classifiers",
    "load_detector": "rcmae.weights.detection",
    "load_encoder": "rcmae.weights.encoder",
    "load_segmenter": "rcmae.evaluation.dense.loading",
    "start": "rcmae.starting",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'rcmae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__doc__"]
