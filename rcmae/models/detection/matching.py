"""Which anchor or region shows which object, and which of them a loss sees.

Sampling takes those of the smallest draws. A draw belongs to an anchor or an object of an image,
not to a place in a list: a region that another process leaves out changes no other's luck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from rcmae.models.detection.boxes import overlaps

FOREGROUND = 1
BACKGROUND = 0
IGNORED = -1
PAIRS = 2**24  # of a box and an object that are compared at once: some 40 bytes each


class Match(NamedTuple):
    """What each of N boxes shows."""

    kind: Tensor  # [N] int8: FOREGROUND, BACKGROUND or IGNORED
    object: Tensor  # [N] int64, the object that it overlaps most; 0 where there is none


def match_anchors(anchors: Tensor, objects: Tensor, iou: tuple[float, float]) -> Match:
    """Anchors [N, 4] to objects [M, 4]: background below the first threshold, foreground from the
    second on, ignored between. The nearest anchors of each object are foreground whatever they
    reach, ties too (Ren et al., 2015, section 3.1.2).
    """
    kind = torch.zeros(len(anchors), dtype=torch.int8, device=anchors.device)
    if not len(objects):
        return Match(kind, torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device))
    tables = _tables(anchors, objects)
    best, object = _best(tables)
    low, high = iou
    kind[(best >= low) & (best < high)] = IGNORED
    kind[best >= high] = FOREGROUND
    kind[_nearest(tables)] = FOREGROUND
    return Match(kind, object)


def match_regions(regions: Tensor, objects: Tensor, iou: float) -> Match:
    """Regions [N, 4] to objects [M, 4]: foreground from a threshold on, else background."""
    kind = torch.zeros(len(regions), dtype=torch.int8, device=regions.device)
    if not len(objects):
        return Match(kind, torch.zeros(len(regions), dtype=torch.int64, device=regions.device))
    best, object = _best(_tables(regions, objects))
    kind[best >= iou] = FOREGROUND
    return Match(kind, object)


def _tables(boxes: Tensor, objects: Tensor) -> Callable[[], Iterable[Tensor]]:
    """Overlaps [M, n] of the objects with the boxes, part by part; computed again each time where
    there are several parts, so that an image of thousands of objects does not fill the memory.
    """
    parts = boxes.split(max(1, PAIRS // len(objects)))
    if len(parts) == 1:
        whole = [overlaps(objects, boxes)]
        return lambda: whole
    return lambda: (overlaps(objects, part) for part in parts)


def _best(tables: Callable[[], Iterable[Tensor]]) -> tuple[Tensor, Tensor]:
    """Of each box the largest overlap [N], and with which object [N]."""
    found = [table.max(dim=0) for table in tables()]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def _nearest(tables: Callable[[], Iterable[Tensor]]) -> Tensor:
    """[N] whether no other box overlaps one of the objects more."""
    highest = torch.stack([table.amax(dim=1) for table in tables()]).amax(dim=0)
    return torch.cat([(table == highest[:, None]).any(dim=0) for table in tables()])


def sample(kind: Tensor, draws: Tensor, count: int, positive: float) -> tuple[Tensor, Tensor]:
    """Numbers of the foreground and of the background that a loss sees, each in rising order.

    Args:
        kind: [N] as `Match.kind`.
        draws: [N] int64, one a box; the smallest are taken.
        count: of both together: what foreground lacks of it is filled up with background.
        positive: of `count`, foreground at most.
    """
    foreground = (kind == FOREGROUND).nonzero()[:, 0]
    background = (kind == BACKGROUND).nonzero()[:, 0]
    taken = _smallest(foreground, draws, int(count * positive))
    return taken, _smallest(background, draws, count - len(taken))


def _smallest(numbers: Tensor, draws: Tensor, count: int) -> Tensor:
    chosen = draws[numbers].argsort(stable=True)[:count]
    return numbers[chosen].sort().values
