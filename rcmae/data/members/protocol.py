"""How a task reads its samples' members: image and target are seen together.

In segmentation and detection a crop depends on the target, and what is done to the image is done to
the target. So a task is handed a whole sample and gives its views, each with what belongs to it."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rcmae.data.batch import Extra
from rcmae.data.transforms import Transform, View


class Seen(NamedTuple):
    """A view of a sample, and what its members show there."""

    view: View
    extra: Mapping[str, Tensor]  # by names; a row of what `collate` makes


class Members(Protocol):
    """What a task reads of a sample beside its label. Workers hold a copy: it has to be picklable,
    and keeps no state that could decide anything.
    """

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of members (rcmae/data/tars); a sample without one of them is a bad sample."""

    @property
    def optional(self) -> tuple[str, ...]:
        """Kinds that are read where a sample has them."""

    def views(
        self, image: bytes, content: Mapping[str, bytes], seed: int, positions: Sequence[int]
    ) -> list[Seen]:
        """What is seen of a sample at several positions of the run, in their order. Every draw is
        keyed by seed and position (rcmae/data/draws.py).

        Args:
            image: encoded.
            content: kind -> bytes of the member.
            seed: data.seed.
            positions: the random keys; more than one with data.repeats.

        Raises:
            BadImage: something of the sample cannot be used. Another takes its place, and the
                ledger has a line.
        """

    def collate(self, rows: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Extra]:
        """`Batch.extra` of a micro-batch: `stacked` tensors of all rows, or of ragged values a
        tuple with a tensor for each row.
        """


def beside(
    transform: Transform,
    read: Callable[[Mapping[str, bytes], View], Mapping[str, Tensor]],
    image: bytes,
    content: Mapping[str, bytes],
    seed: int,
    positions: Sequence[int],
) -> list[Seen]:
    """`Members.views` of a task that leaves the image to a transform, and reads the members of its
    views.

    Args:
        transform: of the image.
        read: (content, view) -> what the view shows of the members.
        image, content, seed, positions: as `Members.views` gets them.
    """
    views = transform.views(image, seed, positions)
    return [Seen(view, read(content, view)) for view in views]


def stacked(rows: Sequence[Tensor]) -> Tensor:
    """[B, ...] of tensors of one shape; in a worker in shared memory, handed over as it is."""
    found = empty((len(rows), *rows[0].shape), rows[0].dtype)
    return torch.stack(list(rows), out=found)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor to be filled. A worker's lies in shared memory, handed over as it is.

    torch has no public way to begin there; its own collation does the same.
    """
    if multiprocessing.parent_process() is None:
        return torch.empty(*shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize, device="cpu")
    return torch.empty(0, dtype=dtype).set_(storage).view(*shape)
