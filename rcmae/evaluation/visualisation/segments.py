"""What a segmenter sees in pictures without maps."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rcmae.data.dense.maps import none_of
from rcmae.data.transforms import BadImage, decode
from rcmae.errors import Refused
from rcmae.evaluation.dense.drawing import segments_picture
from rcmae.evaluation.dense.judging import Shown
from rcmae.evaluation.dense.loading import load_segmenter
from rcmae.evaluation.images import encoded
from rcmae.evaluation.visualisation.sources import Images


def segments(source: Path, images: Images) -> dict[str, NDArray[np.uint8]]:
    """Each picture, its classes, and these over it, with names and colours.

    Args:
        source: a run of `rcmae segment`, or a checkpoint of one.
        images: which pictures, of any sizes.

    Raises:
        Refused: there is no segmenter or no picture, or one does not decode.
    """
    segmenter = load_segmenter(source)
    shown = []
    for number, rows in enumerate(decoded(images, segmenter.sight.in_channels)):
        pixels = torch.from_numpy(rows).permute(2, 0, 1)
        classes = segmenter.predict(pixels)
        shown.append(Shown(number, pixels, torch.full_like(classes, none_of(classes)), classes))
    drawn = segments_picture(shown, segmenter.num_classes, segmenter.class_names)
    return {"segments": drawn}


def decoded(images: Images, channels: int) -> Iterator[NDArray[np.uint8]]:
    """[h, w, channels] of each picture, at its own size.

    Raises:
        Refused: there is no picture, or one does not decode.
    """
    number = 0
    for each in islice(encoded(images.paths), images.limit):
        number += 1
        try:
            yield decode(each.data, channels)
        except BadImage as error:
            raise Refused(f"{each.name}: {error}") from error
    if not number:
        raise Refused("--images: there is no image; give files, folders or shards")
