"""The one thing that objectives and tasks see of the data: a micro-batch of images with their
masks, labels and names.

Each field says in its type what it is (`Kind`); moving, cutting, pinning and recording a batch
follow from that alone. A task that needs more puts it into `extra`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Flag, auto
from functools import cache
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from rcmae.data.tars import NO_LABEL as NO_LABEL

# [B, ...], or of ragged values a tensor for each image
Extra = Tensor | tuple[Tensor, ...]


class Kind(Flag):
    """What a field of a batch is."""

    WHOLE = 0  # of the batch as a whole
    ROWS = auto()  # has a row, or an entry, for each image
    MOVES = auto()  # is copied to the device; what does not is bookkeeping and stays on the CPU
    NESTED = auto()  # a batch of as many images
    NAMED = auto()  # several values by their names
    RECORDED = auto()  # says which samples these are: kept to replay a step


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B images of L patches each.

    Images leave the stream as uint8 and are normalised later.
    """

    images: Annotated[Tensor, Kind.ROWS | Kind.MOVES]  # [B, C, H, W] uint8; float32 once normalised
    # [B, L] int64, each row an order of the patches: the first num_visible are seen
    ids_shuffle: Annotated[Tensor, Kind.ROWS | Kind.MOVES]
    num_visible: Annotated[int, Kind.WHOLE]
    # [B] int64, NO_LABEL where a sample has none; None: data that never has
    labels: Annotated[Tensor | None, Kind.ROWS | Kind.MOVES]
    # "shard/key" of each sample that was read
    keys: Annotated[tuple[str, ...], Kind.ROWS | Kind.RECORDED]
    # [B] int64, absolute position in the run (in an evaluation: number of the sample, -1 = padding)
    positions: Annotated[Tensor, Kind.ROWS | Kind.RECORDED]
    # [B, 5] int64: top, left, height, width in pixels of the source image, 1 = flipped
    crops: Annotated[Tensor, Kind.ROWS]
    # [B, L] int64, an order of the patches for a teacher that sees others
    teacher_ids: Annotated[Tensor | None, Kind.ROWS | Kind.MOVES] = None
    # [B, classes] float: what mixed images show
    targets: Annotated[Tensor | None, Kind.ROWS | Kind.MOVES] = None
    # what these images are to be mixed with, row by row
    mate: Annotated[Batch | None, Kind.NESTED] = None
    # what a task adds by name: maps, annotations
    extra: Annotated[Mapping[str, Extra] | None, Kind.ROWS | Kind.MOVES | Kind.NAMED] = None

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch with what an objective reads on `device`; the rest stays on the CPU."""
        return self._each(Kind.MOVES, lambda value: value.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of what is on a GPU until work that `stream` has by now is done."""

        def recorded(value: Tensor) -> Tensor:
            value.record_stream(stream)
            return value

        self._each(Kind.MOVES, recorded)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, so that `to` can copy while the GPU computes."""
        return self._each(Kind.MOVES, lambda value: value.pin_memory())

    def part(self, rows: slice) -> Batch:
        """Some of its images, with all that is theirs."""
        return self._each(Kind.ROWS, lambda value: value[rows], whole=True)

    def record(self) -> dict[str, Any]:
        """Which samples these are, with their masks, as JSON can write it."""
        found: dict[str, Any] = {}
        for name, kind in fields_of().items():
            if Kind.RECORDED in kind:
                value = getattr(self, name)
                found[name] = value.tolist() if isinstance(value, Tensor) else list(value)
        found["masks"] = self.ids_shuffle[:, : self.num_visible].tolist()
        return found

    def __getstate__(self) -> dict[str, Any]:
        """For another process: the tensors of a ragged value travel as one piece of memory."""
        state = dict(self.__dict__)
        if self.extra is not None:
            packed = {name: _joined(value) for name, value in self.extra.items()}
            state["extra"] = packed
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["extra"] is not None:
            state["extra"] = {name: _parted(value) for name, value in state["extra"].items()}
        self.__dict__.update(state)

    def _each(self, which: Kind, make: Callable[[Any], Any], *, whole: bool = False) -> Batch:
        """The batch with `make` called on its fields of a kind, and on those of its mate.

        Args:
            which: the kind.
            make: old value -> new value.
            whole: hand over a ragged value, too, as one; else each of its tensors.
        """

        def changed(value: Any) -> Any:
            if isinstance(value, tuple) and not whole:
                return tuple(make(one) for one in value)
            return make(value)

        values: dict[str, Any] = {}
        for name, kind in fields_of().items():
            value = getattr(self, name)
            if value is None:
                continue
            if Kind.NESTED in kind:
                values[name] = value._each(which, make, whole=whole)
            elif which not in kind:
                continue
            elif Kind.NAMED in kind:
                values[name] = {key: changed(one) for key, one in value.items()}
            else:
                values[name] = changed(value)
        return replace(self, **values)


class _Joined(NamedTuple):
    """A ragged value on its way to another process."""

    values: Tensor  # all, one after the other
    shapes: list[torch.Size]


def _joined(value: Extra) -> Tensor | _Joined:
    if isinstance(value, Tensor):
        return value
    flat = [each.reshape(-1) for each in value]
    return _Joined(torch.cat(flat), [each.shape for each in value])


def _parted(value: Tensor | _Joined) -> Extra:
    if isinstance(value, Tensor):
        return value
    parts = value.values.split([shape.numel() for shape in value.shapes])
    return tuple(part.view(shape) for part, shape in zip(parts, value.shapes, strict=True))


@cache
def fields_of() -> dict[str, Kind]:
    """Name -> kind of each field of a batch."""
    hints = get_type_hints(Batch, include_extras=True)
    kinds = {}
    for name, hint in hints.items():
        assert get_origin(hint) is Annotated, f"Batch.{name} does not say what kind it is"
        kinds[name] = next(each for each in get_args(hint)[1:] if isinstance(each, Kind))
    return kinds
