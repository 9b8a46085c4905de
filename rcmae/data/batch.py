"""The one thing that objectives see of the data: a micro-batch of images with their masks,
labels and names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NO_LABEL = -100


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B images of L patches each.

    Images leave the stream as uint8 and are normalised later.
    """

    images: Tensor  # [B, C, H, W] uint8; float32 once normalised
    # [B, L] int64, each row an order of the patches: the first num_visible are seen
    ids_shuffle: Tensor
    num_visible: int
    labels: Tensor | None  # [B] int64, NO_LABEL where a sample has none; None: data that never has
    keys: tuple[str, ...]  # "shard/key" of each sample that was read
    # [B] int64, absolute position in the run (in an evaluation: number of the sample, -1 = padding)
    positions: Tensor
    # [B, 5] int64: top, left, height, width in pixels of the source image, 1 = flipped
    crops: Tensor
    # [B, L] int64, an order of the patches for a teacher that sees others
    teacher_ids: Tensor | None = None
    targets: Tensor | None = None  # [B, classes] float: what mixed images show
    mate: Batch | None = None  # what these images are to be mixed with, row by row

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch with images, ids_shuffle and labels on `device`.

        The bookkeeping stays on the CPU.
        """
        return self._moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def part(self, rows: slice) -> Batch:
        """Some of its images, with all that is theirs."""

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        mate = None if self.mate is None else self.mate.part(rows)
        return replace(
            self,
            images=self.images[rows],
            ids_shuffle=self.ids_shuffle[rows],
            labels=cut(self.labels),
            keys=self.keys[rows],
            positions=self.positions[rows],
            crops=self.crops[rows],
            teacher_ids=cut(self.teacher_ids),
            targets=cut(self.targets),
            mate=mate,
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, so that `to` can copy while the GPU computes."""
        return self._moved(lambda tensor: tensor.pin_memory())

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        labels = None if self.labels is None else move(self.labels)
        teacher_ids = None if self.teacher_ids is None else move(self.teacher_ids)
        mate = None if self.mate is None else self.mate._moved(move)
        return replace(
            self,
            images=move(self.images),
            ids_shuffle=move(self.ids_shuffle),
            labels=labels,
            teacher_ids=teacher_ids,
            mate=mate,
        )
