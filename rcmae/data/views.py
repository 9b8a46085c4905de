"""What a stream's workers do: requests for samples -> batches of views, each keyed by its position.

Workers keep no state that could decide anything: which of them serves a request, or when, does not
matter. A sample that cannot be read is replaced by the next readable one, and reported."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from rcmae.config import Recipe
from rcmae.data.batch import NO_LABEL, Batch
from rcmae.data.cache import Cache, Reader
from rcmae.data.device_decode import Boxes, Encoded, Leaves, pack, pack_boxes
from rcmae.data.index import Sample, ShardIndex
from rcmae.data.masking import Mask
from rcmae.data.members.protocol import Members, empty
from rcmae.data.members.reading import image_bytes, member_bytes
from rcmae.data.plan import Plan, Requests
from rcmae.data.sources import AccessDenied, redacted
from rcmae.data.tars import Shard, TablePart
from rcmae.data.transforms import BadImage, CentreTransform, Crop, TrainTransform, Transform, View
from rcmae.errors import Refused

_log = logging.getLogger(__name__)
# (image [C, H, W] uint8, number of its sample) -> the same
Change = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Views:
    """What becomes of a sample that is read."""

    transform: Transform  # image bytes -> view; with `members` these see the image
    mask: Mask  # which patches the encoder sees
    seed: int  # of crops, flips and masks
    # views of each sample, one after the other in a micro-batch: the plan's position p gives those
    # at p x repeats and the following, each with its own crop, flip and mask
    repeats: int = 1
    teacher_masks: bool = False  # a second mask for each image: the teacher sees other patches
    members: Members | None = None  # how a task reads more of a sample than image and label


class BadSample(NamedTuple):
    """A line of the ledger: a sample that could not be read, and what took its place."""

    position: int  # absolute position in the run
    shard: str
    key: str
    offset: int  # bytes from the start of the shard
    reason: str
    replaced_by: str  # "shard/key"


class TooManyBadSamples(Refused):
    """The limit on unreadable samples is passed; the message lists them."""


class Viewed(NamedTuple):
    """A sample as its positions' keys have it."""

    sample: Sample
    views: list[View]  # empty images where the device decodes them, boxes where it resizes
    encoded: bytes  # a JPEG that is left to the device; else none
    extra: list[Mapping[str, Tensor]]  # of each view, where a task reads other members


class Asked(NamedTuple):
    """What a worker is handed: a micro-batch to make, and remote shards to copy
    meanwhile.
    """

    requests: Requests
    ahead: tuple[int, ...] = ()


class Read(NamedTuple):
    """What a request gave."""

    batch: Batch
    bad: list[BadSample]
    encoded: Encoded | None = None  # JPEGs left to the device
    boxes: Boxes | None = None  # of all its images, which it resizes


class _Copying:
    """Copies shards into the cache in a thread, while the process decodes. Travels to another
    process idle.

    It is a help only: who needs a shard copies it itself, or waits for whoever does. So nothing is
    raised here."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._thread: threading.Thread | None = None
        self._coming: queue.SimpleQueue[Sequence[Shard]] = queue.SimpleQueue()

    def ask(self, shards: Sequence[Shard]) -> None:
        """Copy these as soon as those before are there."""
        if not shards:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="copy shards ahead")
            self._thread.start()
        self._coming.put(shards)

    def _run(self) -> None:
        while True:
            try:
                self._reader.prepare(self._coming.get())
            except Exception as error:  # who needs it meets it again, and says so
                _log.debug("not copied ahead: %s", error)

    def __reduce__(self) -> tuple[type[_Copying], tuple[Reader]]:
        return _Copying, (self._reader,)


class TrainReading(Dataset[Read | Exception]):
    """Requests -> views and masks, each keyed by its position. Unreadable samples are replaced.

    What a user has to fix is returned, not raised: a worker's exception would reach them as its
    traceback."""

    def __init__(
        self,
        index: ShardIndex,
        plan: Plan,
        views: Views,
        cache: Cache | None,
        *,
        max_bad_in_a_row: int,
        leaves: Leaves,
    ) -> None:
        self._index = index
        self._plan = plan
        self._views = views
        self._max_bad_in_a_row = max_bad_in_a_row
        self._leaves = leaves
        self._reader = Reader(cache)
        self._copying = _Copying(self._reader)
        # Saves looking again for bytes that are not there. Of what does not decode nothing is kept:
        # a crop may do without the damaged part, and what a worker happens to have met must not
        # decide.
        self._known_bad: dict[int, str] = {}

    def __getitem__(self, asked: Asked) -> Read | Exception:
        requests = asked.requests
        rows: list[tuple[Sample, View]] = []
        # to the device: files, and the rows of their views
        left: list[tuple[bytes, list[int]]] = []
        extra: list[Mapping[str, Tensor]] = []
        bad: list[BadSample] = []
        self._copying.ask([self._index.shards[number] for number in asked.ahead])
        try:
            self._reader.prepare(
                [self._index.shards[number] for number in self._index.shards_of(requests.samples)]
            )
        except OSError as error:
            return error
        for position, number in zip(
            requests.positions.tolist(), requests.samples.tolist(), strict=True
        ):
            try:
                viewed = self.viewed(position, number, bad, leaves=self._leaves)
            except TooManyBadSamples as error:
                return error
            except OSError as error:
                told = f"{self._index[number].id} at position {position} cannot be read: {error}"
                refused = isinstance(error, PermissionError | AccessDenied)
                return PermissionError(told) if refused else OSError(told)
            except Exception as error:
                raise RuntimeError(
                    f"{self._index[number].id} at position {position}: {error!r}"
                ) from error
            if viewed.encoded:
                end = len(rows) + len(viewed.views)
                left.append((viewed.encoded, list(range(len(rows), end))))
            rows += [(viewed.sample, view) for view in viewed.views]
            extra += viewed.extra
        repeats = self._views.repeats
        positions = (requests.positions[:, None] * repeats + np.arange(repeats)).reshape(-1)
        boxes = None
        if self._leaves == "boxes":
            boxes = pack_boxes([view.image for _, view in rows])
            blank = self._blank()
            rows = [(sample, view._replace(image=blank)) for sample, view in rows]
        batch = _batch(rows, positions, self._ids(positions), self._views.mask.num_visible)
        if self._views.teacher_masks:
            batch = replace(batch, teacher_ids=self._ids(positions, draw=1))
        if self._views.members is not None:
            batch = replace(batch, extra=self._views.members.collate(extra))
        return Read(batch, bad, pack(left), boxes)

    def _ids(self, positions: NDArray[np.int64], draw: int = 0) -> Tensor:
        views = self._views
        ids = [views.mask.ids(views.seed, position, draw) for position in positions.tolist()]
        return torch.from_numpy(np.stack(ids))

    def viewed(
        self, position: int, number: int, bad: list[BadSample], *, leaves: Leaves = "nothing"
    ) -> Viewed:
        """The sample of a number, or else the next that can be read, seen as its positions' keys
        have it.

        Args:
            position: in the plan.
            number: of the sample that stands there.
            bad: gets a line if another takes its place.
            leaves: what the device does.

        Raises:
            TooManyBadSamples: no sample can be read in its place.
            OSError: a shard is gone.
        """
        reason = ""
        repeats = self._views.repeats
        positions = range(position * repeats, (position + 1) * repeats)
        beyond = int(self._index.counts[self._index.place(number)[0]]) + self._max_bad_in_a_row
        for tried in islice(self._candidates(position, number), beyond):
            try:
                viewed = self._viewed(tried, positions, leaves)
            except (BadImage, MemoryError) as error:
                reason = reason or _why(error)
                continue
            if tried != number:
                bad.append(_bad_sample(positions[0], self._index[number], reason, viewed.sample.id))
            return viewed
        sample = self._index[number]
        raise TooManyBadSamples(
            f"nothing can be read in place of {sample.id} ({redacted(sample.path)} at byte "
            f"{sample.offset}: {reason}): "
            f"the rest of its shard and data.max_bad_in_a_row={self._max_bad_in_a_row} "
            "samples after it failed as well"
        )

    def _viewed(self, number: int, positions: range, leaves: Leaves) -> Viewed:
        """The sample of a number itself. Raises BadImage, MemoryError, OSError."""

        def attempt() -> Viewed:
            if number in self._known_bad:
                raise BadImage(self._known_bad[number])
            sample = self._index[number]
            data = self._read(number, sample)
            if self._views.members is not None:
                return self._with_members(number, sample, data, positions)
            if leaves == "boxes":
                assert isinstance(self._views.transform, TrainTransform)
                boxes = self._views.transform.parts(data, self._views.seed, positions)
                return Viewed(sample, boxes, b"", [])
            crops = self._crops(data, positions) if leaves == "jpegs" else None
            if crops is None:
                views = self._views.transform.views(data, self._views.seed, positions)
            else:
                views = [View(self._blank(), crop) for crop in crops]
            return Viewed(sample, views, data if crops is not None else b"", [])

        try:
            return attempt()
        except BadImage:
            if not self._reader.renewed(self._index[number].shard):
                raise
            self._known_bad.clear()  # of a copy that is no more
            return attempt()

    def _with_members(self, number: int, sample: Sample, image: bytes, positions: range) -> Viewed:
        members = self._views.members
        assert members is not None
        content = member_bytes(self._reader, self._index, number, members.kinds, members.optional)
        seen = members.views(image, content, self._views.seed, positions)
        assert len(seen) == len(positions), "a view for each position"
        return Viewed(sample, [each.view for each in seen], b"", [each.extra for each in seen])

    def _crops(self, data: bytes, positions: range) -> list[Crop] | None:
        assert isinstance(self._views.transform, TrainTransform)
        return self._views.transform.crops(data, self._views.seed, positions)

    def _blank(self) -> Tensor:
        transform = self._views.transform
        blank = torch.zeros((), dtype=torch.uint8)
        return blank.expand(transform.in_channels, *transform.image_size)

    def _read(self, number: int, sample: Sample) -> bytes:
        try:
            return image_bytes(self._reader, sample)
        except BadImage as error:
            self._known_bad[number] = str(error)
            raise

    def _candidates(self, position: int, number: int) -> Iterator[int]:
        yield number
        yield from self._plan.substitutes(position, number)


class LabelledReading(Dataset[Read]):
    """Numbers of samples -> views at the centre.

    What cannot be read, and -1, gives an empty image at position -1.
    """

    def __init__(
        self,
        index: ShardIndex,
        transform: CentreTransform,
        cache: Cache | None,
        change: Change | None,
    ) -> None:
        self._index = index
        self._transform = transform
        self._reader = Reader(cache)
        self._change = change

    def __getitem__(self, asked: Asked) -> Read:
        requests = asked.requests
        nothing = View(
            torch.zeros(
                self._transform.in_channels, *self._transform.image_size, dtype=torch.uint8
            ),
            (0, 0, 0, 0, 0),
        )
        padding = (Sample(Shard("", 0, 0, "", TablePart(b"")), "", 0, 0, NO_LABEL), nothing)
        rows: list[tuple[Sample, View]] = []
        bad: list[BadSample] = []
        positions = requests.positions.copy()
        for row, number in enumerate(requests.samples.tolist()):
            rows.append(padding)
            if number < 0:
                continue
            sample = self._index[number]
            try:
                view = self._view(sample, number)
                changed = self._change(view.image, number) if self._change else view.image
                rows[row] = (sample, view._replace(image=changed))
            except (BadImage, MemoryError) as error:
                bad.append(_bad_sample(number, sample, _why(error), ""))
                positions[row] = -1
        return Read(_batch(rows, positions, torch.zeros(len(rows), 0, dtype=torch.int64), 0), bad)

    def _view(self, sample: Sample, number: int) -> View:
        try:
            return self._transform(image_bytes(self._reader, sample), 0, number)
        except BadImage:
            if not self._reader.renewed(sample.shard):
                raise
            return self._transform(image_bytes(self._reader, sample), 0, number)


def _batch(
    rows: list[tuple[Sample, View]], positions: NDArray[np.int64], ids: Tensor, num_visible: int
) -> Batch:
    first = rows[0][1].image
    if first.stride() == (0, 0, 0) and len({view.image.data_ptr() for _, view in rows}) == 1:
        images = first.expand(len(rows), *first.shape)  # the device makes them all
    else:
        images = empty((len(rows), *first.shape), torch.uint8)
        for row, (_, view) in enumerate(rows):
            images[row] = view.image
    labels = [sample.label for sample, _ in rows]
    keys = tuple(sample.id for sample, _ in rows)
    crops = [view.crop for _, view in rows]
    return Batch(
        images=images,
        ids_shuffle=ids,
        num_visible=num_visible,
        labels=torch.tensor(labels, dtype=torch.int64),
        keys=keys,
        positions=torch.from_numpy(positions),
        crops=torch.tensor(crops, dtype=torch.int64),
    )


def _bad_sample(position: int, sample: Sample, reason: str, replaced_by: str) -> BadSample:
    shard, _, key = sample.id.partition("/")
    return BadSample(position, shard, key, sample.offset, reason, replaced_by)


def _why(error: BadImage | MemoryError) -> str:
    """What is wrong with a sample."""
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    return str(error)


def train_transform(recipe: Recipe) -> TrainTransform:
    """A random box of an image, flipped or not. Raises Refused."""
    data = recipe.data
    return TrainTransform(
        recipe.model.image_hw,
        recipe.model.in_channels,
        data.crop_scale,
        data.crop_ratio,
        data.flip,
        data.decode_margin,
        data.max_pixels,
    )
