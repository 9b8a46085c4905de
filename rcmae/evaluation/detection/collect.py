"""A detector over a test set: each image once over all ranks, one at a time, so that nothing
depends on how many there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rcmae import dist
from rcmae.data.dense.annotated import Canvas, Judged
from rcmae.data.dense.objects import encoded
from rcmae.errors import Refused
from rcmae.models.detection.inference import Detections, paste, rescaled

Normalise = Callable[[Tensor], Tensor]  # [B, C, H, W] uint8 -> float32


class Drawn(NamedTuple):
    """An image for a picture."""

    number: int  # in its set
    pixels: NDArray[np.uint8]  # [h, w, C]
    annotations: list[dict[str, Any]] | None  # None: not known
    detections: dict[str, list[dict[str, Any]]]  # by network


@dataclass
class Collected:
    """What was found, in COCO's formats."""

    truth: dict[str, Any]  # images, categories, annotations
    detections: dict[str, list[dict[str, Any]]]  # network -> result format
    drawn: list[Drawn] = field(default_factory=list)


class _Row(NamedTuple):
    """What a rank found of an image."""

    number: int
    image: dict[str, Any]
    annotations: list[dict[str, Any]]
    detections: dict[str, list[dict[str, Any]]]


def collect(
    networks: dict[str, nn.Module],
    samples: Iterator[Judged | None],
    *,
    canvas: Canvas,
    categories: Sequence[dict[str, Any]],
    normalise: Normalise,
    device: torch.device,
) -> Collected:
    """Detections of networks on a set. Collective: every rank calls, with as many turns; rank 0
    alone has the answer, the others an empty one.

    Args:
        networks: name -> detector, in evaluation mode.
        samples: this rank's; None: a turn without one, at which the network is called all the same.
        canvas: what images are put on.
        categories: COCO's, in the order of the classes.
        normalise: images on the device.
        device: of the networks.

    Raises:
        Refused: on every rank; two images have one image_id.
    """
    rows: list[_Row] = []
    drawn: list[Drawn] = []
    nothing = torch.zeros(canvas.channels, *canvas.size, dtype=torch.uint8)
    ids = [int(each["id"]) for each in categories]
    for sample in samples:
        image = nothing if sample is None else sample.image
        extent = (0, 0, 32, 32) if sample is None else sample.extent
        extents = torch.tensor([extent], dtype=torch.float32, device=device)
        images = padded_with_zero(normalise(image[None].to(device)), extents)
        found = {name: network(images, extents)[0] for name, network in networks.items()}
        if sample is None:
            continue
        results = {name: results_of(each, sample, ids) for name, each in found.items()}
        height, width = sample.size
        about = {"id": sample.image_id, "height": height, "width": width}
        rows.append(_Row(sample.number, about, sample.annotations, results))
        if sample.pixels is not None:
            drawn.append(Drawn(sample.number, sample.pixels, sample.annotations, results))
    every = sorted((row for part in dist.to_first(rows) for row in part), key=_number)
    pictures = sorted((each for part in dist.to_first(drawn) for each in part), key=_number)
    counts = Counter(row.image["id"] for row in every)
    twice = [number for number, count in counts.items() if count > 1]
    if twice := dist.from_first(twice):
        raise Refused(
            f"evaluate.test_shards: {len(twice)} image_ids belong to several images, such as "
            f"{twice[0]}; pack the set with other ids"
        )
    return Collected(
        truth_of(every, categories),
        {name: [one for row in every for one in row.detections[name]] for name in networks},
        pictures,
    )


def _number(row: _Row | Drawn) -> int:
    return row.number


def padded_with_zero(images: Tensor, extents: Tensor) -> Tensor:
    """Normalised images [B, C, H, W], 0 outside of their extents [B, 4]."""
    rows = torch.arange(images.shape[2], device=images.device) + 0.5
    columns = torch.arange(images.shape[3], device=images.device) + 0.5
    x0, y0, x1, y1 = extents[:, :, None].unbind(1)
    down = (rows > y0) & (rows < y1)  # [B, H]
    along = (columns > x0) & (columns < x1)  # [B, W]
    inside = (down[:, :, None] & along[:, None])[:, None]
    return torch.where(inside, images, torch.zeros_like(images))


def results_of(found: Detections, sample: Judged, ids: Sequence[int]) -> list[dict[str, Any]]:
    """Detections of an image in COCO's result format."""
    extent = torch.tensor(sample.extent, dtype=torch.float32, device=found.boxes.device)
    whole = rescaled(found, extent, sample.size)
    has_area = (whole.boxes[:, 2:] > whole.boxes[:, :2]).all(dim=1)
    boxes = whole.boxes[has_area]
    masks = paste(whole.masks[has_area], boxes, sample.size).cpu().numpy()
    rows = zip(
        boxes.tolist(),
        whole.scores[has_area].tolist(),
        whole.classes[has_area].tolist(),
        masks,
        strict=True,
    )
    results = []
    for (x0, y0, x1, y1), score, kind, mask in rows:
        results.append(
            {
                "image_id": sample.image_id,
                "category_id": ids[kind],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": score,
                "segmentation": encoded(mask),
            }
        )
    return results


def truth_of(rows: Sequence[_Row], categories: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """COCO's document of what is there. Ids of objects are counted anew, from 1: its evaluation
    takes an object of id 0 for none.
    """
    annotations: list[dict[str, Any]] = []
    for row in rows:
        for each in row.annotations:
            x, y, width, height = each["bbox"]
            if not width * height > 0:
                continue
            one = {
                "id": len(annotations) + 1,
                "image_id": row.image["id"],
                "category_id": each["category_id"],
                "bbox": [x, y, width, height],
                "area": each.get("area", width * height),
                "iscrowd": int(each.get("iscrowd", 0)),
                "segmentation": each.get("segmentation") or [_rectangle(each["bbox"])],
            }
            annotations.append(one)
    return {
        "info": {},
        "images": [row.image for row in rows],
        "categories": [dict(each) for each in categories],
        "annotations": annotations,
    }


def _rectangle(box: Sequence[float]) -> list[float]:
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]
